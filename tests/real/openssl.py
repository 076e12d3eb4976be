"""``openssl s_client`` as an SMTP client: another implementation of TLS, and one that can be told to be old.

Promise: each command waits for its reply, as RFC 5321 has it; every wait ends.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading

from tests.real.wire import PATIENCE_S


def converse(port: int, *options: str, commands: tuple[str, ...] = (), source: str = "") -> tuple[list[str], str]:
    """Connect and say these commands one after the other, then QUIT.

    Args:
        options: of openssl; with "-starttls", "smtp" it reads the greeting and says EHLO and STARTTLS by itself.

    Returns:
        The last line of each reply, that of the greeting first where it comes over TLS; and what openssl said of TLS.
    """
    command = ["openssl", "s_client", "-quiet", *options, "-connect", f"127.0.0.1:{port}"]
    waiting = [*commands, "QUIT"]
    replies: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as of_tls:
        process = subprocess.Popen(
            [*command, *(("-bind", f"{source}:0") if source else ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=of_tls,
            bufsize=0,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        patience = threading.Timer(PATIENCE_S, process.kill)
        patience.start()
        try:
            if "-starttls" in options:
                process.stdin.write(f"{waiting.pop(0)}\r\n".encode())
            for line in process.stdout:
                if line[3:4] == b" ":
                    replies.append(line.decode().rstrip())
                    if waiting:
                        process.stdin.write(f"{waiting.pop(0)}\r\n".encode())
            process.wait()
        finally:
            patience.cancel()
            process.kill()
            process.communicate()
        of_tls.seek(0)
        return replies, of_tls.read()
