"""A fresh clone, as a newcomer meets it: start, one mail, one refusal, the metrics, TERM.

Run inside the clone, after its set-up: ``python smoke.py CLONE``.  Where the caller gave it a network of its own,
it needs nothing from outside, which shows that running the gate does not either.
"""

from __future__ import annotations

import fcntl
import queue
import signal
import smtplib
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import IO

READY_S = 60
END_S = 30
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def loopback_up() -> None:
    """In a new network namespace the loopback interface is down; elsewhere this changes nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))
        if not flags & IFF_UP:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def check(what: str, found: bool) -> None:
    print(f"  {'ok  ' if found else 'FAIL'} {what}", flush=True)
    if not found:
        sys.exit(1)


def read(output: IO[str], lines: queue.Queue[str]) -> None:
    for line in output:
        lines.put(line.rstrip("\n"))


def wait_ready(gate: subprocess.Popen[str], lines: queue.Queue[str]) -> bool:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and gate.poll() is None:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            continue
        print(f"       | {line}")
        if line.startswith("ready"):
            return True
    return False


def converse(clone: Path) -> None:
    mark = f"smoke-{time.monotonic_ns()}"
    message = f"From: a@example.net\r\nTo: b@example.com\r\nSubject: {mark}\r\n\r\n.a line\r\n"
    with smtplib.SMTP("127.0.0.1", 2525, timeout=30) as client:
        refused = client.sendmail("a@example.net", ["b@example.com"], message)
        check("a mail to the local domain is accepted", refused == {})
        client.mail("a@example.net")
        code, text = client.rcpt("victim@example.org")
        check(f"a stranger's relay is refused: {code} {text.decode()}", code == 550 and text.startswith(b"5.7.1 "))
    kept = [
        path for path in (clone / "gatepost-data").rglob("*") if path.is_file() and mark.encode() in path.read_bytes()
    ]
    check("the mail is in the embedded mailbox", len(kept) >= 1)
    for page, words in (("healthz", ""), ("readyz", ""), ("metrics", "gatepost_sessions_total")):
        with urllib.request.urlopen(f"http://127.0.0.1:8025/{page}", timeout=30) as answer:
            check(f"/{page} answers", answer.status == 200 and words in answer.read().decode())


def main() -> int:
    clone = Path(sys.argv[1]).resolve()
    loopback_up()
    gate = subprocess.Popen(
        ["./gatepost", "run"], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert gate.stdout is not None
    output, lines = gate.stdout, queue.Queue[str]()
    reader = threading.Thread(target=read, args=(output, lines), daemon=True)
    reader.start()
    try:
        check("./gatepost run says that it is ready", wait_ready(gate, lines))
        converse(clone)
        gate.send_signal(signal.SIGTERM)
        check("TERM ends it with 0", gate.wait(END_S) == 0)
    finally:
        if gate.poll() is None:
            gate.kill()
        reader.join(5)
        while not lines.empty():
            print(f"       | {lines.get()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
