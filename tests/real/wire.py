"""An SMTP client with nothing between the test and the octets: lines as typed, replies as they come.

Why: libraries repair, quote and hide; what a client program cannot be made to say is said here, and what it would not
    show is seen.
Promise: every wait has a generous end and fails with the transcript; nothing is sent but what the test says.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 60.0  # of every wait: its end is a failure, never a result


def until(true: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait for a state.

    Returns:
        What the condition returned.
    """
    end = time.monotonic() + timeout_s
    while not (found := true()):
        if time.monotonic() > end:
            raise AssertionError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(0.02)
    return found


class HungUp(ConnectionError):
    """The server closed the connection where a reply was due."""


class Wire:
    """One connection, greeting included.

    Args:
        source: the address it comes from, "" for whatever the system takes.
        greeted: False where the test reads the greeting itself.

    Attributes:
        greeting: the server's first reply.
        said: the transcript.
    """

    def __init__(
        self, port: int, host: str = "127.0.0.1", *, source: str = "", greeted: bool = True, first: bytes = b""
    ) -> None:
        origin = (source, 0) if source else None
        self.said: list[str] = []
        self._rest = b""
        self._socket = socket.create_connection((host, port), PATIENCE_S, source_address=origin)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if first:
                self.send(first)
            self.greeting = self.reply() if greeted else ""
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up without a word."""
        self._socket.close()

    # ---- octets

    def send(self, octets: bytes) -> None:
        self.said.append(f"C: {octets[:200]!r}")
        self._socket.sendall(octets)

    def type(self, text: str) -> str:
        """A line as a person's telnet in character mode sends it: each octet in a segment of its own."""
        for octet in text.encode("utf-8") + b"\r\n":
            self._socket.sendall(bytes([octet]))
        self.said.append(f"C: {text} (typed)")
        return self.reply()

    def receive(self) -> bytes:
        """Octets as they come, at least one; b"" at the end."""
        return self._socket.recv(65536)

    def say(self, text: str) -> str:
        """One command; returns its reply."""
        self.send(text.encode("utf-8") + b"\r\n")
        return self.reply()

    def reply(self) -> str:
        """One whole reply; its lines are joined by LF.  RFC 5321 §4.2."""
        lines = []
        while True:
            line = self._line().decode("ascii")
            self.said.append(f"S: {line}")
            lines.append(line)
            if line[3:4] != "-":
                return "\n".join(lines)

    def _line(self) -> bytes:
        while b"\r\n" not in self._rest:
            try:
                octets = self._socket.recv(65536)
            except TimeoutError:
                raise AssertionError("no reply came\n" + "\n".join(self.said)) from None
            except ConnectionResetError:
                octets = b""
            if not octets:
                raise HungUp("\n".join([*self.said, "the server hung up"]))
            self._rest += octets
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def end(self) -> bytes:
        """Read until the server closes; returns what came, which is b"" in most tests."""
        octets, self._rest = self._rest, b""
        with contextlib.suppress(ConnectionResetError):
            while more := self._socket.recv(65536):
                octets += more
        return octets

    def quiet(self, seconds: float = 0.2) -> bool:
        """Whether the server has nothing to say now."""
        return not self._rest and not select.select([self._socket], [], [], seconds)[0]

    def half_close(self) -> None:
        """Send no more, but listen."""
        self._socket.shutdown(socket.SHUT_WR)

    def start_tls(self, context: ssl.SSLContext | None = None, name: str | None = None) -> str:
        """STARTTLS; returns the protocol version."""
        assert self.say("STARTTLS").startswith("220"), self.said
        return self.secure(context, name)

    def secure(self, context: ssl.SSLContext | None = None, name: str | None = None) -> str:
        """The TLS handshake; returns the protocol version.

        Args:
            context: None for one by which the certificate is not judged.
            name: the host name to ask for (SNI).
        """
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        wrapped = context.wrap_socket(self._socket, server_hostname=name)
        self._socket = wrapped
        return str(wrapped.version())

    @property
    def certificate(self) -> bytes:
        """The server's, in DER."""
        assert isinstance(self._socket, ssl.SSLSocket)
        return self._socket.getpeercert(binary_form=True) or b""

    # ---- dialogues

    def hello(self, name: str = "client.test") -> str:
        return self.say(f"EHLO {name}")

    def rcpt(self, forward_path: str, reverse_path: str = "sender@sender.test") -> str:
        """EHLO, MAIL and RCPT; returns the reply to RCPT."""
        assert self.hello().startswith("250"), self.said
        return self.envelope(forward_path, reverse_path)

    def envelope(self, forward_path: str, reverse_path: str = "sender@sender.test") -> str:
        """MAIL and RCPT; returns the reply to RCPT."""
        assert self.say(f"MAIL FROM:<{reverse_path}>").startswith("250"), self.said
        return self.say(f"RCPT TO:<{forward_path}>")

    def content(self, octets: bytes) -> str:
        """DATA and dot-stuffed content, ended; returns the final reply.  The octets end with CRLF or are empty."""
        assert self.say("DATA").startswith("354"), self.said
        self.send(stuffed(octets) + b".\r\n")
        return self.reply()

    def mail(self, forward_path: str, octets: bytes, reverse_path: str = "sender@sender.test") -> str:
        """A whole transaction after EHLO; returns the final reply."""
        reply = self.envelope(forward_path, reverse_path)
        return self.content(octets) if reply.startswith("250") else reply


def stuffed(octets: bytes) -> bytes:
    """Content with dot transparency.  RFC 5321 §4.5.2."""
    return (b"." if octets.startswith(b".") else b"") + octets.replace(b"\r\n.", b"\r\n..")


def message(subject: str, body: str = "Hello.") -> bytes:
    """A small message."""
    return f"From: <sender@sender.test>\r\nTo: <bob@example.com>\r\nSubject: {subject}\r\n\r\n{body}\r\n".encode()
