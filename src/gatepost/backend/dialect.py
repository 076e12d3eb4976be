"""How a backend reads addresses: asked with RCPT, of the backend itself.

Why: a backend trusts its gate, so whatever it reads as another address it relays.  What it would make of percent, bang,
    quotes and routes, and of users that nobody is, is better known than guessed.
Trust: a backend is believed about itself; its octets are bounded by ``smtp.client``, and it may answer late, oddly or
    not at all.  The local domain is the administrator's, canonical; ``nonce`` is ours.
Promise: no message is ever sent but by ``end_of_data``, to the one address that it is given.  Every form gets an answer
    in bounded time; where there was none, UNKNOWN is the answer.
Sources: RFC 5321 §3.3 (RCPT), §4.1.1.4 (the end of content), §4.5.1 (postmaster), appendix C (routes);
    RFC 1123 §5.2.16 (percent); RFC 976 (bang); the Sendmail of SunOS 4.1 (caret); Microsoft MS99-027 (encapsulated).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from enum import Enum, unique
from typing import Final, NamedTuple

from gatepost.backend.connection import ConnectFailed, Connection, ConnectionLost, make_context, open_connection
from gatepost.backend.settings import BackendSettings, EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.smtp.client import DATA, QUIT, RSET
from gatepost.smtp.path import Mailbox, PathDefect, Shape, parse_forward_path
from gatepost.smtp.reply import Reply

ELSEWHERE = "elsewhere.invalid"  # RFC 6761 §6.4: nobody has it, so that nobody could ever get what was relayed
ASK_S = 120.0  # for all questions; a backend that slows down whoever errs needs some
ANSWER_S = 15.0  # for one answer
END_S = 60.0  # for one answer to content
# Postfix slows a client down after ten refusals and hangs up after twenty; Exim takes ten commands that are no mail.
QUESTIONS_A_CONNECTION = 7
LOSSES_MAX = 3  # connections lost or refused, after which nothing more is asked
SAID_CHARACTERS_MAX = 200


@unique
class Answer(Enum):
    """Of a backend to one form.  2yz is TAKEN, 5yz and 454 REFUSED; other 4yz, silence and hanging up are UNKNOWN."""

    TAKEN = "taken"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Form:
    """One forward-path to ask for.

    Attributes:
        id: its name in tables and files.
        pattern: the path; {user} stands for a local-part that nobody has, {elsewhere} and {ours} for domains.
        lands_here: read as RFC 5321 says, it is a mailbox of the local domain.
        character: by which a local-part of this form is known, where the form is plain to the gate.
    """

    id: str
    pattern: str
    lands_here: bool = True
    character: str = ""

    def fill(self, user: str, ours: str, elsewhere: str = ELSEWHERE) -> str:
        """The path."""
        return self.pattern.format(user=user, ours=ours, elsewhere=elsewhere)

    @property
    def shape(self) -> Shape | None:
        """What the gate's own parser says of it; None where it takes such a path from nobody."""
        parsed = parse_forward_path(self.fill("user", "ours.invalid").encode(), smtputf8=False)
        return None if isinstance(parsed, PathDefect) else parsed.shape


# What is no trick: by these the answers to the others are understood.
NOBODY = (
    Form("unknown user", "<{user}@{ours}>"),
    Form("unknown user, dotted", "<{user}.{user}@{ours}>"),
    Form("unknown user, hyphened", "<info-{user}@{ours}>"),
)
POSTMASTER = Form("postmaster", "<postmaster@{ours}>")
FOREIGN = Form("another domain", "<{user}@{elsewhere}>", lands_here=False)
CONTROLS = (*NOBODY, POSTMASTER, FOREIGN)
# What some servers read as user@elsewhere: the Sendmail of BSD and SunOS makes a caret a bang ("convert ^ to !").  The
# last three are ordinary local-parts; but what decodes VERP makes an at-sign of others.
FORMS = (
    Form("percent", "<{user}%{elsewhere}@{ours}>"),
    Form("bang", "<{elsewhere}!{user}@{ours}>"),
    Form("source route", "<@{ours}:{user}@{elsewhere}>", lands_here=False),
    Form("quoted at", '<"{user}@{elsewhere}"@{ours}>'),
    Form("quoted percent", '<"{user}%{elsewhere}"@{ours}>'),
    Form("two ats", "<{user}@{elsewhere}@{ours}>"),
    Form("trailing at", "<{user}@{elsewhere}@>", lands_here=False),
    Form("no domain", "<{user}>", lands_here=False),
    Form("percent, no domain", "<{user}%{elsewhere}>", lands_here=False),
    Form("bang, no domain", "<{elsewhere}!{user}>", lands_here=False),
    Form("quoted at, no domain", '<"{user}@{elsewhere}">', lands_here=False),
    Form("encapsulated", "<IMCEASMTP-{user}+40{elsewhere}@{ours}>"),
    Form("caret", "<{elsewhere}^{user}@{ours}>"),
    Form("equals", "<{user}={elsewhere}@{ours}>", character="="),
    Form("plus", "<{user}+{elsewhere}@{ours}>", character="+"),
    Form("slash", "<{elsewhere}/{user}@{ours}>", character="/"),
)
CHARACTERS = "".join(form.character for form in FORMS)
QUESTIONS = (*CONTROLS, *FORMS)

# What besides CRLF "." CRLF some servers take for the end of content.  RFC 5321 §4.1.1.4 knows no other.
ENDS: Final[dict[str, bytes]] = {
    "LF . LF": b"\n.\n",
    "LF . CRLF": b"\n.\r\n",
    "CRLF . LF": b"\r\n.\n",
    "CR . CR": b"\r.\r",
    "CR . CRLF": b"\r.\r\n",
    "CR . LF": b"\r.\n",
    "CRLF . CR": b"\r\n.\r",
    "CRLF . CR CRLF": b"\r\n.\r\r\n",
}
_TRUE_END = "CRLF . CRLF"


class Heard(NamedTuple):
    """One answer.

    Attributes:
        id: of the form, or of the end of content.
        asked: the path, or "".
        said: the reply's first line, or why there is none.
    """

    id: str
    asked: str
    answer: Answer
    said: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a backend answered.

    Attributes:
        backend: NAME of [backend.NAME]; peer: the address of it that was asked.
        at: when, in seconds since the epoch.
        tls: version spoken, "" in plain text; greeting: the line it greeted with.
        local_domain, elsewhere: what was asked for.
        keywords: of EHLO, in order; size_octets: its SIZE, None where it names none.
        heard: one for each of ``QUESTIONS``, in their order.
        ends: one for each of ``ENDS``; empty where that was not asked.
    """

    backend: str
    peer: str
    at: float
    tls: str
    greeting: str
    local_domain: str
    elsewhere: str
    keywords: tuple[str, ...]
    size_octets: int | None
    heard: tuple[Heard, ...]
    ends: tuple[Heard, ...] = ()

    def with_ends(self, ends: tuple[Heard, ...]) -> Dialect:
        """The same, and what ``end_of_data`` told."""
        return replace(self, ends=ends)

    def answer(self, form: Form) -> Answer:
        """To one form."""
        return next((heard.answer for heard in self.heard if heard.id == form.id), Answer.UNKNOWN)

    @property
    def accept_all(self) -> Answer:
        """Whether it takes users that nobody is: TAKEN where it took each one, REFUSED where it refused one."""
        answers = {self.answer(form) for form in NOBODY}
        if Answer.REFUSED in answers:
            return Answer.REFUSED
        return Answer.UNKNOWN if Answer.UNKNOWN in answers else Answer.TAKEN

    def rereads(self, form: Form) -> Answer:
        """Whether it reads one of ``FORMS`` as another address than the one it is.

        A form that is a mailbox of the local domain which nobody has, and is taken, was read as something else; unless
        every mailbox is taken there: then nobody can tell.
        """
        answer = self.answer(form)
        if answer is Answer.TAKEN and form.lands_here and self.accept_all is not Answer.REFUSED:
            return Answer.UNKNOWN
        return answer

    @property
    def open_to_strangers(self) -> tuple[Form, ...]:
        """The forms that it reads as another address and that are plain to every other server: each of them is a hole.

        The relay policy closes it by the form's ``character``.
        """
        return tuple(
            form
            for form in FORMS
            if form.shape is not None and not form.shape.routing and self.rereads(form) is Answer.TAKEN
        )


def can_be_asked(settings: BackendSettings) -> bool:
    """Whether it is a server.  Embedded mailboxes are code of our own, which gives no local-part a second meaning."""
    return not any(isinstance(address, EmbeddedMailboxes) for address in settings.addresses)


async def ask(
    settings: BackendSettings,
    local_domain: str,
    *,
    nonce: str,
    now: float,
    elsewhere: str = ELSEWHERE,
    budget_s: float = ASK_S,
    tls: ssl.SSLContext | None = None,
) -> Dialect:
    """Ask a backend for every form, with MAIL, RCPT and RSET alone.

    Args:
        local_domain: a domain of ours that this backend takes mail for.
        nonce: letters and digits, a local-part that nobody has.
        now: seconds since the epoch.
        elsewhere: a domain that is not ours; a backend that looks up domains refuses the one that cannot exist.
        budget_s: for all of it; what was not asked by then is UNKNOWN.
        tls: what judges the certificate where settings.tls is "required"; None for the system's authorities.

    Raises:
        BackendUnavailable: none of its addresses can be used.
        ValueError: the local domain is not a canonical domain, the nonce is no nonce, or there is no server to ask.
    """
    _check(settings, local_domain, nonce, elsewhere)
    interview = _Interview(settings, tls, budget_s)
    connection = await interview.connect()
    greeting = (await connection.greeting()).line
    capabilities, spoken, peer = connection.capabilities, connection.tls, connection.peer
    keywords = capabilities.keywords | ({"STARTTLS"} if spoken else set())
    paths = [form.fill(nonce, local_domain, elsewhere) for form in QUESTIONS]
    heard = await interview.recipients(connection, paths, local_domain)
    return Dialect(
        backend=settings.name,
        peer=peer,
        at=now,
        tls=spoken,
        greeting=greeting[:SAID_CHARACTERS_MAX],
        local_domain=local_domain,
        elsewhere=elsewhere,
        keywords=tuple(sorted(keywords)),
        size_octets=capabilities.size_octets,
        heard=tuple(
            Heard(form.id, path, answer, said)
            for form, path, (answer, said) in zip(QUESTIONS, paths, heard, strict=True)
        ),
    )


async def end_of_data(
    settings: BackendSettings,
    recipient: Mailbox,
    *,
    nonce: str,
    now: float,
    tls: ssl.SSLContext | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Heard, ...]:
    """Ask which ends of content a backend takes besides the one there is: with messages, each on its own connection.

    A message holds the trial end, then the lines RSET and ".".  For a server that takes the trial for the end these are
    a command and a mistake, and it answers to each; for any other they are content and its end.  So the number of
    replies tells, and no time does.

    Args:
        recipient: gets up to one message for each of ``ENDS``, and one more.
        progress: told the name of each end before it is tried.

    Raises:
        BackendUnavailable: none of its addresses can be used.
        ValueError: there is no server to ask, or the nonce is no nonce.
    """
    _check(settings, "", nonce, "")
    interview = _Interview(settings, tls, END_S * len(ENDS))

    async def trial(name: str, end: bytes) -> tuple[Answer, str]:
        progress(name)
        content = _content(recipient, settings.hello, nonce, name, now)
        return await interview.content(recipient, content, end)

    answer, said = await trial(_TRUE_END, b"\r\n")
    if answer is not Answer.REFUSED:
        # It did not take the message as it must be, so that its answers to the others would tell nothing.
        return tuple(Heard(name, "", Answer.UNKNOWN, said) for name in ENDS)
    heard = []
    for name, end in ENDS.items():
        try:
            answer, said = await trial(name, end)
        except ConnectFailed as failure:
            answer, said = Answer.UNKNOWN, str(failure)[:SAID_CHARACTERS_MAX]
        heard.append(Heard(name, "", answer, said))
    return tuple(heard)


def _check(settings: BackendSettings, local_domain: str, nonce: str, elsewhere: str) -> None:
    """What goes into a command is what it should be: nothing else than a domain and letters is put into octets."""
    if not can_be_asked(settings):
        raise ValueError(f"the backend {settings.name} is no server: there is nothing to ask")
    if not (nonce.isascii() and nonce.isalnum() and len(nonce) <= 32):
        raise ValueError("a nonce is made of some letters and digits")
    for domain in filter(None, (local_domain, elsewhere)):
        if Mailbox("x", domain).octets != b"x@" + domain.encode():
            raise ValueError(f"{domain!r} is no domain to ask for")


class _Interview:
    """Connections to one backend, one after the other, until the time is up."""

    def __init__(self, settings: BackendSettings, tls: ssl.SSLContext | None, budget_s: float) -> None:
        self._settings = settings
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + budget_s

    def _left_s(self, at_most_s: float) -> float:
        return max(0.0, min(self._end - self._loop.time(), at_most_s))

    async def connect(self) -> Connection:
        """To the first of its addresses that answers."""
        failure = ConnectFailed(f"the backend {self._settings.name} has no address")
        for address in self._settings.addresses:
            if isinstance(address, EmbeddedMailboxes):
                continue
            try:
                async with asyncio.timeout(self._left_s(ANSWER_S * 2)):
                    connection, _ = await open_connection(address, self._settings, self._context(address))
            except ConnectFailed as failed:
                failure = failed
            except TimeoutError:
                failure = ConnectFailed(f"{_peer(address)}: no answer in time")
            else:
                return connection
        raise failure

    def _context(self, address: SmtpAddress | LmtpSocket) -> ssl.SSLContext | None:
        kind = self._settings.tls
        if kind == "off" or isinstance(address, LmtpSocket):
            return None
        if kind == "required" and self._tls is not None:
            return self._tls
        return make_context(required=kind == "required")

    async def _say(self, connection: Connection, octets: bytes, at_most_s: float = ANSWER_S) -> Reply:
        async with asyncio.timeout(self._left_s(at_most_s)):
            return (await connection.exchange(octets, 1, at_most_s))[0]

    async def recipients(
        self, connection: Connection, paths: Sequence[str], local_domain: str
    ) -> list[tuple[Answer, str]]:
        """An answer for each path, a few on each connection; a connection that is lost costs one answer."""
        answers: list[tuple[Answer, str]] = []
        losses = 0
        known: Connection | None = connection
        said = ""
        while len(answers) < len(paths) and losses < LOSSES_MAX and self._left_s(ANSWER_S):
            asked = len(answers)
            try:
                current, known = known or await self.connect(), None
            except ConnectFailed as failure:
                said = str(failure)
                losses += 1
                continue
            try:
                refusal = await self._mail(current, local_domain)
                if refusal is not None:
                    said = _first_line(refusal)
                    losses += 1
                    continue
                for path in paths[asked : asked + QUESTIONS_A_CONNECTION]:
                    reply = await self._say(current, b"RCPT TO:%b\r\n" % path.encode("ascii"))
                    answers.append((_answer(reply), _first_line(reply)))
                await self._leave(current)
            except (ConnectionLost, TimeoutError) as lost:
                said = _why(lost)
                losses += 1
                if len(answers) < min(asked + QUESTIONS_A_CONNECTION, len(paths)):
                    answers.append((Answer.UNKNOWN, said))
            finally:
                current.close()
        said = said if losses >= LOSSES_MAX else "no time was left to ask"
        return answers + [(Answer.UNKNOWN, said[:SAID_CHARACTERS_MAX])] * (len(paths) - len(answers))

    async def _mail(self, connection: Connection, local_domain: str) -> Reply | None:
        """MAIL, by the null reverse-path or that of the postmaster; the refusal where neither will do."""
        reply = await self._say(connection, b"MAIL FROM:<>\r\n")
        if not 200 <= reply.code < 300 and local_domain:
            reply = await self._say(connection, b"MAIL FROM:<postmaster@%b>\r\n" % local_domain.encode("ascii"))
        return None if 200 <= reply.code < 300 else reply

    async def _leave(self, connection: Connection) -> None:
        """RSET and QUIT; what was asked is answered, so that it does not matter how they go."""
        with contextlib.suppress(ConnectionLost, TimeoutError):
            await self._say(connection, RSET)
            await self._say(connection, QUIT)

    async def content(self, recipient: Mailbox, content: bytes, end: bytes) -> tuple[Answer, str]:
        """TAKEN where ``end`` ended content; REFUSED where it did not, or the message was refused for it."""
        first: Reply | None = None
        with contextlib.closing(await self.connect()) as connection:
            try:
                reply = await self._begin(connection, recipient)
                if reply.code != 354:
                    return Answer.UNKNOWN, _first_line(reply)
                first = await self._say(connection, content + end + b"RSET\r\n.\r\n", END_S)
                reply = await self._say(connection, QUIT)
            except (ConnectionLost, TimeoutError) as lost:
                why = _why(lost) if first is None else _first_line(first)
                more_replies = isinstance(lost, ConnectionLost) and lost.defect
            else:
                # 221 is the answer to QUIT: nothing else was due.  Any other code is the answer to RSET.
                return (Answer.REFUSED if reply.code == 221 else Answer.TAKEN), _first_line(first)
        if first is not None and more_replies:
            return Answer.TAKEN, why
        return await self._alone(recipient, content + end, why)

    async def _alone(self, recipient: Mailbox, octets: bytes, why: str) -> tuple[Answer, str]:
        """Again, with nothing behind the end.

        Whoever hung up may have done so for what stood there (OpenSMTPD: "500 Pipelining not supported"), or for what
        came before it (Postfix: "550 bare <LF> received").  Silence tells nothing here, only a reply does.
        """
        with contextlib.closing(await self.connect()) as connection:
            try:
                reply = await self._begin(connection, recipient)
                if reply.code == 354:
                    reply = await self._say(connection, octets)
                    if _answer(reply) is not Answer.UNKNOWN:
                        return _answer(reply), _first_line(reply)
            except (ConnectionLost, TimeoutError):
                pass  # ``why`` tells more
        return Answer.UNKNOWN, why

    async def _begin(self, connection: Connection, recipient: Mailbox) -> Reply:
        """MAIL, RCPT and DATA: the reply to DATA, or the first refusal."""
        domain = recipient.domain if isinstance(recipient.domain, str) else ""
        refusal = await self._mail(connection, domain)
        if refusal is not None:
            return refusal
        reply = await self._say(connection, b"RCPT TO:<%b>\r\n" % recipient.octets)
        return await self._say(connection, DATA) if 200 <= reply.code < 300 else reply


def _content(recipient: Mailbox, hello: str, nonce: str, name: str, now: float) -> bytes:
    """A message that says what it is for; its last line is not ended.  RFC 5322 §3.6, RFC 3834 §5."""
    host = hello.strip("[]")
    lines: Iterable[str] = (
        f"Date: {formatdate(now)}",
        f"From: Gatepost <gatepost@{host}>",
        f"To: {recipient}",
        f"Subject: Gatepost asks whether {name} ends a message",
        f"Message-ID: <{nonce}.{name.replace(' ', '').lower()}@{host}>",
        "Auto-Submitted: auto-generated",
        "",
        "`gatepost check --backend --end-of-data` has sent this. Nothing needs to be done. If the lines",
        '"RSET" or more follow below, the server that delivered it took nothing for the end but CRLF.CRLF.',
    )
    return "\r\n".join(lines).encode()


def _answer(reply: Reply) -> Answer:
    if 200 <= reply.code < 300:
        return Answer.TAKEN
    # 454 to RCPT is how Postfix says "Relay access denied" (defer_unauth_destination, its default): it will not change.
    return Answer.REFUSED if reply.code >= 500 or reply.code == 454 else Answer.UNKNOWN


def _first_line(reply: Reply) -> str:
    return reply.line[:SAID_CHARACTERS_MAX]


def _why(lost: ConnectionLost | TimeoutError) -> str:
    if isinstance(lost, ConnectionLost):
        return (_first_line(lost.reply) if lost.reply is not None else str(lost))[:SAID_CHARACTERS_MAX]
    return "no answer in time"


def _peer(address: SmtpAddress | LmtpSocket) -> str:
    return f"lmtp:{address.path}" if isinstance(address, LmtpSocket) else f"{address.host}:{address.port}"
