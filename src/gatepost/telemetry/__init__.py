"""What an operator can see: metrics, occupancy, the session log, the state of the processes.

Why: several processes serve one gate, and its operator wants one count, one limit and one log.  Numbers live in shared
    memory that the supervisor makes; text leaves through one writer a process.
Promise: nothing here waits on the event loop, takes a lock that another process may hold there, or changes a verdict.
"""

from gatepost.telemetry.batches import Batches
from gatepost.telemetry.board import StatusBoard
from gatepost.telemetry.log import (
    Level,
    LoginRecord,
    RecipientRecord,
    SessionLog,
    SessionRecord,
    Style,
    TransactionRecord,
    json_line,
    rfc3339,
)
from gatepost.telemetry.memory import create_memory, map_memory
from gatepost.telemetry.metrics import (
    BACKEND_SECONDS,
    BACKEND_STATE,
    JOURNAL_DAMAGED,
    JOURNAL_DROPPED,
    JOURNAL_RECORDS,
    JOURNAL_STATE,
    JOURNAL_WAITING,
    LOG_DROPPED,
    MESSAGE_OCTETS,
    MESSAGES,
    REASONS,
    RELOADS,
    REPLIES,
    SELFTEST,
    SESSIONS,
    SESSIONS_OPEN,
    STAGES,
    TRUST_SUSPENDED,
    WORKERS_RESTARTED,
    Family,
    Metrics,
)
from gatepost.telemetry.occupancy import Occupancy

__all__ = [
    "BACKEND_SECONDS",
    "BACKEND_STATE",
    "JOURNAL_DAMAGED",
    "JOURNAL_DROPPED",
    "JOURNAL_RECORDS",
    "JOURNAL_STATE",
    "JOURNAL_WAITING",
    "LOG_DROPPED",
    "Level",
    "LoginRecord",
    "MESSAGES",
    "MESSAGE_OCTETS",
    "REASONS",
    "RELOADS",
    "REPLIES",
    "SELFTEST",
    "SESSIONS",
    "SESSIONS_OPEN",
    "STAGES",
    "TRUST_SUSPENDED",
    "WORKERS_RESTARTED",
    "Batches",
    "Family",
    "Metrics",
    "Occupancy",
    "RecipientRecord",
    "SessionLog",
    "SessionRecord",
    "StatusBoard",
    "Style",
    "TransactionRecord",
    "create_memory",
    "json_line",
    "map_memory",
    "rfc3339",
]
