"""The errors Gatepost raises on purpose.

Why: a peer's fault is data (a Reply), never an exception; the world's fault (disk, backend, DNS, a file an
administrator wrote) is one of these, translated once at the edge where it happened.

    GatepostError            something a person can mend; str() is a whole sentence for that person
    ├── ConfigError          the configuration does not load; carries every problem found, with file and line
    ├── BackendUnavailable   no backend address answered, or one was lost before it could answer
    ├── StorageError         a disk, file or database let us down before content was safe
    └── Busy                 the same is being asked for by somebody else; it may be asked again
"""

from __future__ import annotations


class GatepostError(Exception):
    """Root of all errors that Gatepost raises itself; its text is written for a person."""


class ConfigError(GatepostError):
    """The configuration cannot be used.

    Args:
        problems: one line a problem, each "file:line: what is wrong; what to do".
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BackendUnavailable(GatepostError):
    """The backend could not be reached, or was lost before the final reply to content."""


class StorageError(GatepostError):
    """A local disk operation failed; nothing was acknowledged because of it."""


class Busy(GatepostError):
    """Somebody else asks the same just now, and it is answered once at a time."""
