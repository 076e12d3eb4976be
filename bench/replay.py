"""How fast the journal is decided again: a million verdicts, read from SQLite, on one core.

.venv/bin/python bench/replay.py
.venv/bin/python bench/replay.py --verdicts 200000 --keep /tmp/journal
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.journal import DAYS, START_S, Traffic, fill

from gatepost import config
from gatepost.answers.replay import replay
from gatepost.store import JournalSettings
from gatepost.store.database import Database
from gatepost.store.journal import Journal
from gatepost.store.writer import Writer

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
name = "mx"
address = "127.0.0.1:25"

[[listen]]
name = "submission"
role = "submission"
tls = "starttls"
address = "127.0.0.1:587"

[domains]
local = ["example.com"{domains}]

[backend.mail]
address = "127.0.0.1:2525"

[[trust]]
accounts = ["*"]
why = "people"

[[deny]]
reverse_path = "*@d77.example"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--verdicts", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="keep the journal in this directory, and use it again")
    options = parser.parse_args()
    directory = options.keep or Path(tempfile.mkdtemp(prefix="gatepost-replay-"))
    try:
        measure(str(directory), options.verdicts)
    finally:
        if options.keep is None:
            shutil.rmtree(directory)


def measure(data: str, verdicts: int) -> None:
    database = Database(data, "", writes=True)
    writer = Writer(data, JournalSettings(), database, time.time)
    if Journal(data, JournalSettings()).last_id() < verdicts:
        fill(writer, database, Traffic(verdicts), verdicts)
    database.close()
    large = "".join(f'\n[[trust]]\nnetwork = "10.{i >> 8 & 255}.{i & 255}.0/24"\nwhy = "x"\n' for i in range(300, 1300))
    domains = "".join(f', "customer-{i}.test"' for i in range(1000))
    for title, text in (
        ("3 rules", CONFIG.replace("{domains}", "")),
        ("1,000 trust entries and 1,000 domains", CONFIG.replace("{domains}", domains) + large),
    ):
        gate = config.load(text.encode(), "gatepost.toml").gate
        journal = Journal(data, JournalSettings())
        began, cpu_s = time.monotonic(), time.process_time()
        replayed = replay(gate, journal.verdicts(START_S, START_S + DAYS * 86400 + 1), time.time())
        elapsed, cpu_s = time.monotonic() - began, time.process_time() - cpu_s
        changes = {change.value: number for change, number in replayed.changes.items() if number}
        print(f"{title}: {replayed.verdicts:,} verdicts in {elapsed:.1f} s ({cpu_s:.1f} s of CPU)", changes)


if __name__ == "__main__":
    main()
