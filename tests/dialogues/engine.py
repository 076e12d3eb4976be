"""A gate around the bare engine, small enough to be right by reading: no socket, no clock, one local domain.

The engine and the relay policy are the product's own; what is between them here is the least that makes a dialogue,
with replies of the same codes, so that one transcript holds for it and for the live gate.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from gatepost.facts import Client, Session, Transaction
from gatepost.policy import relay
from gatepost.smtp.command import Data, Expn, Hello, Help, Mail, Noop, Quit, Rcpt, Rset, StartTls, Vrfy
from gatepost.smtp.content import ContentLimits
from gatepost.smtp.path import NULL_REVERSE_PATH
from gatepost.smtp.reply import Reply
from gatepost.smtp.server import (
    NEED_DATA,
    PAUSED,
    ChunkEnded,
    ContentChunk,
    ContentEnded,
    Refused,
    ServerEngine,
    State,
)
from gatepost.verdict import Admit

KEYWORDS = ("8BITMIME", "CHUNKING", "DSN", "ENHANCEDSTATUSCODES", "HELP", "PIPELINING", "SIZE 52428800", "SMTPUTF8")
LOCAL = "example.com"
TRUSTED = "127.0.0.2"
RULES = relay.RelayRules(
    local=(relay.LocalPattern(LOCAL, "rules:1"),),
    trust=(relay.TrustEntry("rules:2", network=ip_network(TRUSTED)),),
    default_backend="mail",
    postmaster_domain=LOCAL,
)
_LIMITS = ContentLimits()


class EnginePeer:
    """The engine with the least of a gate around it.

    Args:
        piece_octets: how many octets at most reach the engine at once; 0 for all of them.
        limits: of content; normalise is taken from the argument of that name.
    """

    def __init__(
        self,
        *,
        trusted: bool = False,
        tls: bool = False,
        normalise: bool = False,
        piece_octets: int = 0,
        limits: ContentLimits = _LIMITS,
    ) -> None:
        client = Client(ip_address(TRUSTED if trusted else "127.9.254.1"), 1025)
        self._session = Session("TEST", client, "mx", "mx")
        self._transaction = Transaction(self._session, NULL_REVERSE_PATH, 0, 0.0)
        self._tls_offered = tls
        self._tls = False
        self._limits = limits._replace(normalise=normalise)
        self._piece_octets = piece_octets
        self._output = b""
        self._closed = False
        self._heard: list[bytes] = []
        self._messages: list[bytes] = []
        self._content = b""
        self._smtputf8 = False
        self.ended: list[ContentEnded] = []
        self.engine = ServerEngine(frozenset(), self._limits)
        self.engine.say(Reply(220, "mx.example.com ESMTP"))
        self._collect()

    # ---- what a dialogue does

    def send(self, octets: bytes) -> None:
        step = self._piece_octets or max(len(octets), 1)
        for at in range(0, len(octets), step):
            self.engine.receive(octets[at : at + step])
            self._advance()

    def receive(self) -> bytes:
        octets, self._output = self._output, b""
        if not octets and not self._closed:
            raise TimeoutError
        return octets

    def silent(self) -> bytes:
        return self._output

    def start_tls(self) -> None:
        assert self.engine.state is State.TLS
        self._tls = True
        self.engine = ServerEngine(frozenset(), self._limits)

    def close(self) -> None:
        self._closed = True

    def heard(self) -> list[bytes]:
        return self._heard

    def messages(self) -> list[bytes]:
        return self._messages

    # ---- what a gate does

    def _collect(self) -> None:
        self._output += self.engine.data_to_send()

    def _advance(self) -> None:
        while True:
            event = self.engine.next_event()
            assert event is not PAUSED, "every question was answered"
            if event is NEED_DATA:
                break
            if isinstance(event, ContentChunk):
                self._content += event.octets
            elif isinstance(event, Refused):
                self._closed = self._closed or event.fatal
            else:
                self.engine.respond(self._answer(event))
        self._collect()

    def _answer(self, event: object) -> Reply:
        match event:
            case Hello(verb, _):
                self._content = b""
                self.engine.offered = frozenset(keyword.split()[0] for keyword in self._keywords())
                return Reply(
                    250, "\n".join(["mx.example.com", *self._keywords()]) if verb == "EHLO" else "mx.example.com"
                )
            case Mail(reverse_path, parameters):
                if parameters.size_octets and parameters.size_octets > self._limits.message_size_octets:
                    return Reply(552, "The message is larger than this server takes", "5.3.4")
                self._smtputf8 = parameters.smtputf8
                self._transaction = Transaction(self._session, reverse_path, 0, 0.0)
                self._heard.append(b"MAIL FROM:<%b>%b" % (reverse_path.octets, parameters.octets(self.engine.offered)))
                return Reply(250, "Sender OK", "2.1.0")
            case Rcpt(forward_path, parameters):
                if not self._smtputf8 and not forward_path.octets.isascii():
                    return Reply(553, "The address needs SMTPUTF8 in MAIL", "5.6.7")
                verdict = relay.decide(RULES, self._transaction, forward_path)
                if not isinstance(verdict, Admit):
                    return verdict.reason.reply("TEST")
                admitted = verdict.recipient.forward_path.octets
                self._heard.append(b"RCPT TO:<%b>%b" % (admitted, parameters.octets(self.engine.offered)))
                return Reply(250, "Recipient OK", "2.1.5")
            case Data():
                return Reply(354, "End the message with CRLF.CRLF")
            case ChunkEnded(_, defect):
                if defect is not None:
                    self._content = b""
                return defect.reply if defect else Reply(250, "Chunk taken", "2.0.0")
            case ContentEnded(_, defect):
                self.ended.append(event)
                content, self._content = self._content, b""
                if defect is not None:
                    return defect.reply
                self._heard.append(b"DATA")
                # The last line of a BDAT message may lack its CRLF; whoever sends it on in DATA ends it.
                self._messages.append(content if content.endswith(b"\r\n") or not content else content + b"\r\n")
                return Reply(250, "OK", "2.0.0")
            case StartTls():
                return Reply(220, "Go ahead", "2.0.0")
            case Rset():
                self._content = b""
                return Reply(250, "Forgotten", "2.0.0")
            case Vrfy():
                return Reply(252, "Send some mail and see", "2.5.2")
            case Expn():
                return Reply(502, "There are no lists to expand here", "5.5.1")
            case Help():
                return Reply(214, "RFC 5321", "2.0.0")
            case Noop():
                return Reply(250, "OK", "2.0.0")
            case Quit():
                self._closed = True
                return Reply(221, "mx.example.com closing", "2.0.0")
        raise AssertionError(f"an event without an answer: {event!r}")

    def _keywords(self) -> list[str]:
        return [*KEYWORDS, "STARTTLS"] if self._tls_offered and not self._tls else list(KEYWORDS)
