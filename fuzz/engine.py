#!/usr/bin/env python3
"""Longer fuzzing of the SMTP engine, by hand:  .venv/bin/python fuzz/engine.py --seconds 600

The first octet of an input chooses how the listener is set up, the second where the rest is split; the rest is what a
client sends.  What must hold is in tests/properties/engine_judge.py.  Seeds: the published attacks and the dialogues.
With atheris installed (pip install atheris; coverage guides it) that does the work, else seeded random damage.
An input that breaks a promise is written to --found and the program exits with 1;  --replay FILE judges it again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

OCTETS_MAX = 6000


def judge_one(octets: bytes) -> None:
    """One input, all promises.  Imported late, so that atheris can look into the engine."""
    from tests.properties.engine_judge import judge  # noqa: PLC0415

    if len(octets) < 2:
        return
    how, where = octets[0], octets[1]
    cuts = [where, 3 * where, 17 * where]
    judge(octets[2:OCTETS_MAX], cuts, normalise=bool(how & 1), trusted=bool(how & 2), login=bool(how & 4))


def seeds() -> list[bytes]:
    from tests.dialogues.transcript import load_all, octets_of  # noqa: PLC0415
    from tests.properties.test_engine import ATTACKS, FRAGMENTS  # noqa: PLC0415

    said = [octets for octets in ATTACKS.values() if len(octets) < OCTETS_MAX]
    for dialogue in load_all():
        lines = [
            octets_of(step.text) + (b"\r\n" if step.kind == "C:" else b"")
            for step in dialogue.steps
            if step.kind in ("C:", "C>")
        ]
        said.append(b"".join(lines))
    exchanges = [b"EHLO x\r\n" + octets for octets in FRAGMENTS if octets.upper().startswith((b"AUTH", b"XCLIENT"))]
    return [
        *(bytes([0, 7]) + octets for octets in said),
        *(bytes([1, 2]) + octets for octets in FRAGMENTS),
        *(bytes([4, 9]) + octets for octets in exchanges),
    ]


def damage(octets: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """Some cuts, copies, swaps and splices."""
    out = bytearray(octets)
    for _ in range(chance.randint(1, 8)):
        at = chance.randint(0, len(out))
        match chance.randint(0, 5):
            case 0:
                out[at : at + chance.randint(1, 8)] = b""
            case 1:
                out[at:at] = chance.choice((b"\r\n", b"\n", b"\r", b".", b"\0", b" ", b"\r\n.\r\n", b'"', b"@", b"\\"))
            case 2:
                out[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                other = chance.choice(others)
                begin = chance.randint(0, len(other))
                out[at:at] = other[begin : begin + chance.randint(1, 200)]
            case 4:
                end = min(len(out), at + chance.randint(1, 60))
                out[at:at] = out[at:end] * chance.randint(1, 20)
            case _:
                out[at : at + 4] = str(chance.choice((0, 1, 9, 2**31, 2**63, 10**18))).encode()
    return bytes(out[:OCTETS_MAX])


def fuzz_by_chance(seconds: float, seed: int, found: Path) -> int:
    chance = random.Random(seed)
    corpus = seeds()
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        octets = damage(chance.choice(corpus), corpus, chance)
        count += 1
        try:
            judge_one(octets)
        except BaseException:
            keep(octets, found)
            raise
    print(f"{count} inputs in {seconds:.0f} s, seed {seed}: every promise held")
    return 0


def keep(octets: bytes, found: Path) -> None:
    found.mkdir(parents=True, exist_ok=True)
    path = found / hashlib.sha256(octets).hexdigest()[:16]
    path.write_bytes(octets)
    print(f"a promise is broken by {path}: {octets[2:200]!r}", file=sys.stderr)


def fuzz_with_atheris(seconds: float, seed: int, found: Path) -> int:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["gatepost.smtp"]):
        import gatepost.smtp.server  # noqa: F401, PLC0415
    corpus = Path(tempfile.mkdtemp(prefix="gatepost-corpus-"))
    for octets in seeds():
        (corpus / hashlib.sha256(octets).hexdigest()[:16]).write_bytes(octets)
    found.mkdir(parents=True, exist_ok=True)
    options = [
        sys.argv[0],
        f"-max_total_time={seconds:.0f}",
        f"-max_len={OCTETS_MAX}",
        f"-seed={seed}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup(options, judge_one)
    atheris.Fuzz()  # ends the process itself, with another code than 0 when something was found
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path(tempfile.gettempdir()) / "gatepost-found")
    parser.add_argument("--by-chance", action="store_true", help="random damage even where atheris is installed")
    parser.add_argument("--replay", type=Path, help="judge one kept input again")
    options = parser.parse_args()
    if options.replay:
        judge_one(options.replay.read_bytes())
        print("every promise held")
        return 0
    guided = importlib.util.find_spec("atheris") is not None and not options.by_chance
    return (fuzz_with_atheris if guided else fuzz_by_chance)(options.seconds, options.seed, options.found)


if __name__ == "__main__":
    sys.exit(main())
