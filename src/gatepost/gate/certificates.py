"""TLS with clients that may prove who they are with a certificate, whoever made it.

Why: a device with a certificate of its own is known wherever it is, without a password.  What is trusted is one
    certificate by its SHA-256 and no authority, so that any certificate may be presented: self-signed, expired, or a
    mail server's own, which some present to everybody.  Python's ssl asks for a certificate only where it may judge its
    chain; pyOpenSSL does not insist.  Where no rule names a certificate, the loop's own TLS serves (``connection``).
Trust: every octet is hostile, before the handshake and behind it, and so is the certificate until the handshake is
    over: the library then has verified the client's signature with its key (CertificateVerify), and nothing else.
Promise: what is passed up was protected by TLS, in order, once: nothing before the handshake is over, nothing behind
    close_notify or an error.  Held is no more than one read of the socket beyond what the connection takes.  Every
    failure of the handshake is an OSError.

What an attacker may try, and what becomes of it:
    - commands in plain text, before, instead of or behind the handshake: the library calls it a broken record;
    - a handshake octet by octet, or none at all: one time limit covers all of it, however busy the client looks;
    - a record that says it is huge: refused at its header (RFC 8446 §5.2 allows 2^14 + 256 octets);
    - a certificate list that does not end: the library stops at 100 KiB;
    - a chain that costs much to judge: none is built, its depth is 0;
    - somebody else's certificate: the handshake fails at CertificateVerify, which accepting all chains does not change;
    - floods of empty records or of change_cipher_spec: the library gives up after 32 in a row;
    - key updates that we must answer, from a client that reads nothing: while it does not take what we sent, nothing
      more is read, so that answers cannot pile up;
    - renegotiation and resumption: there is none, so that a certificate is proved anew in each connection;
    - the end of the connection without close_notify (truncation): it ends what is read, and the engine above never
      takes it for the end of content;
    - data behind close_notify: dropped unread (RFC 8446 §6.1);
    - reading paused while decrypted octets wait: they stay in the library, whose octets come first afterwards.
Sources: RFC 8446 §4.4.2 (certificates), §6.1 (closure), RFC 5246 §7.4.6, RFC 5929 and RFC 9266 (channel bindings).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

from OpenSSL import SSL

from gatepost.gate.tls import AskingContext, Secured, end_point_binding, words

RECORD_OCTETS = 1 << 14  # the plain text of one record, RFC 8446 §5.1
_FLUSH_OCTETS = 1 << 16
_EXPORTER_OCTETS = 32  # RFC 9266 §4.2


class AskingTransport(asyncio.Transport, asyncio.Protocol):
    """The server's end of TLS between a TCP transport, whose protocol it becomes, and the connection above.

    It is made with reading paused; ``resume_reading`` begins when the handshake is over.  It can be half closed: who
    has sent close_notify still gets replies.

    Args:
        raw: in plain text; nothing else may read or write it any more.
        protocol: is told nothing before the handshake is over.
    """

    __slots__ = (
        "_blocked",
        "_closing",
        "_context",
        "_ended",
        "_held",
        "_loop",
        "_over",
        "_protocol",
        "_raw",
        "_reading",
        "_shaken",
        "_tls",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        raw: asyncio.Transport,
        protocol: asyncio.Protocol,
        context: AskingContext,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._raw = raw
        self._protocol = protocol
        self._context = context
        self._tls = SSL.Connection(context, None)
        self._tls.set_accept_state()
        self._shaken: asyncio.Future[None] = loop.create_future()
        self._reading = False  # the raw transport is
        self._held = False  # the protocol wants nothing now
        self._blocked = False  # the peer does not take what we sent
        self._ended = False  # the peer's TCP connection ended
        self._over = False  # nothing more is passed up
        self._closing = False

    async def handshake(self, timeout_s: float, early: bytes = b"") -> Secured:
        """Take the raw transport over and speak TLS.

        Args:
            early: the beginning of the client's part, where it has been read already.

        Raises:
            OSError: the handshake failed or took too long; the raw transport is closed or to be aborted.
        """
        if self._raw.is_closing():
            raise ConnectionAbortedError("connection lost before the TLS handshake")
        self._raw.set_protocol(self)
        if early:
            self.data_received(early)
        self._read_or_not()
        try:
            async with asyncio.timeout(timeout_s):
                await self._shaken
        except TimeoutError as error:
            self._over = True
            raise ConnectionAbortedError("TLS handshake took too long") from error
        peer = self._tls.get_peer_certificate()
        return Secured(
            self._tls.get_protocol_version_name(),
            self._tls.get_cipher_name() or "",
            "" if peer is None else peer.digest("sha256").decode().replace(":", "").lower(),
            self._bindings,
        )

    def _bindings(self) -> Mapping[str, bytes]:
        context = self._tls.get_context()  # that of the name which was asked for
        assert isinstance(context, AskingContext)
        bindings = end_point_binding(context.certificate)
        if self._tls.get_protocol_version() >= SSL.TLS1_3_VERSION:
            bindings["tls-exporter"] = self._tls.export_keying_material(
                b"EXPORTER-Channel-Binding", _EXPORTER_OCTETS, b""
            )
        elif unique := self._tls.get_peer_finished():  # the client's came first, as in every full handshake
            bindings["tls-unique"] = unique
        return bindings

    # ---- asyncio.Protocol, for the raw transport

    def data_received(self, data: bytes) -> None:
        """Decrypt what came and pass it up."""
        if not self._over:
            self._tls.bio_write(data)
            self._advance()

    def eof_received(self) -> bool:
        """TCP ended without close_notify, or behind it; what we have to say may still arrive."""
        self._ended = True
        if not self._over:
            self._advance()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Neither direction is left."""
        self._over = self._closing = True
        if not self._shaken.done():
            self._shaken.set_exception(ConnectionAbortedError("connection lost in the TLS handshake"))
        elif self._is_up():
            self._protocol.connection_lost(exc)
        self._protocol = asyncio.Protocol()  # each held the other

    def pause_writing(self) -> None:
        """The peer does not take what was sent: it is not read either."""
        self._blocked = True
        self._read_or_not()
        if self._is_up():
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """It takes it again."""
        self._blocked = False
        if self._is_up():
            self._protocol.resume_writing()
        self._loop.call_soon(self._go_on)

    # ---- asyncio.Transport, for the connection

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Of the TCP connection; there is no ``ssl_object``, and the half close of TCP is possible here, too."""
        return self._raw.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Nothing can be written any more."""
        return self._closing or self._raw.is_closing()

    def get_write_buffer_size(self) -> int:
        """Octets, encrypted, that the peer has not taken."""
        return self._raw.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Pass nothing up."""
        self._held = True
        self._read_or_not()

    def resume_reading(self) -> None:
        """Pass up what is there, and what comes."""
        self._held = False
        self._loop.call_soon(self._go_on)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send."""
        if self._closing or not data:
            return
        try:
            self._tls.sendall(data)
        except SSL.Error as error:
            self._fail(error)
        else:
            self._flush()

    def close(self) -> None:
        """Say close_notify, and close when all is sent; the peer's is not waited for (RFC 8446 §6.1)."""
        if self._closing:
            return
        self._over = self._closing = True
        try:
            self._tls.shutdown()
        except SSL.Error as error:
            self._fail(error)
        else:
            self._flush()
            self._raw.close()

    def abort(self) -> None:
        """Close at once."""
        self._over = self._closing = True
        self._raw.abort()

    # ---- between the two

    def _is_up(self) -> bool:
        """The handshake succeeded: the protocol is told what happens."""
        return self._shaken.done() and not self._shaken.cancelled() and self._shaken.exception() is None

    def _go_on(self) -> None:
        if self._over:
            self._read_or_not()
        else:
            self._advance()

    def _advance(self) -> None:
        """Shake hands or decrypt, as far as what came allows."""
        try:
            if self._shaken.done():
                self._pass_up()
            else:
                self._tls.do_handshake()
                self._held = True  # until the connection has taken this transport for its own
                self._shaken.set_result(None)
        except SSL.WantReadError:
            if self._ended:
                self._end()
        except SSL.ZeroReturnError:
            self._end()
        except SSL.Error as error:
            self._fail(error)
            return
        self._flush()
        self._read_or_not()

    def _pass_up(self) -> None:
        while not (self._held or self._blocked or self._over):
            self._protocol.data_received(self._tls.recv(RECORD_OCTETS))

    def _end(self) -> None:
        """The peer will send no more."""
        self._over = True
        if not self._shaken.done():
            self._shaken.set_exception(ConnectionAbortedError("the client closed in the TLS handshake"))
            self._raw.close()
        elif not self._protocol.eof_received():
            self.close()

    def _flush(self) -> None:
        try:
            while not self._raw.is_closing():
                self._raw.write(self._tls.bio_read(_FLUSH_OCTETS))
        except SSL.WantReadError:
            return

    def _read_or_not(self) -> None:
        """Behind the end all is still read, and dropped: else nobody would notice that the peer is gone."""
        wanted = not (self._held or self._blocked)
        if wanted != self._reading and not self._raw.is_closing():
            self._reading = wanted
            if wanted:
                self._raw.resume_reading()
            else:
                self._raw.pause_reading()

    def _fail(self, error: SSL.Error) -> None:
        """A broken record, a bad signature: the peer gets an alert if it takes it, and nothing more is believed."""
        self._over = self._closing = True
        if not self._shaken.done():
            self._shaken.set_exception(ssl.SSLError(ssl.SSL_ERROR_SSL, words(error)))
        self._flush()
        if self._blocked:
            self._raw.abort()
        else:
            self._raw.close()
