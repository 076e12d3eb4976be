"""One round: every form over one address, plain or under TLS.

Why: a server is asked what it does, one transaction a form, none of them completed.  What it does with made-up users is
    asked first: without that, a 250 to <victim%elsewhere@ours> may just be a mailbox that takes everything.
Trust: the server is hostile.  Its name is checked before it is said back; connections, refusals on each, silences and
    deferrals in a row are bounded.
Promise: a 2yz to a forward-path that leads outside is ACCEPTED, unless the server takes made-up users wherever it is
    asked.  Content is sent in ``_deliver`` alone, which runs only for an address that the person named, and ends with
    the first message that is taken.
Sources: RFC 5321 §3.3 (MAIL, RCPT), §3.8 (421), §4.1.1.5 (RSET), §4.1.3 (address literals), §6.1 (what 250 to content
    means); RFC 3207 §4; RFC 3834 §5 (Auto-Submitted).
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from ipaddress import ip_address

from gatepost.probe.forms import LANDINGS, Names, Question, domain_of, questions
from gatepost.probe.reply import Heard, Outcome, bad_syntax, denies_relaying, judge, unknown_domain
from gatepost.probe.report import Address, Attempt, Delivery, ProbeSettings, Round, Target, Verdict
from gatepost.probe.target import domain_name
from gatepost.probe.wire import Deadline, Wire, dial

Progress = Callable[[str, int, int], None]

CONNECTIONS_MAX = 100
REFUSALS_MAX = 8  # on one connection; Postfix slows down after 10, the gate hangs up
RESETS_MAX = 16  # on one connection; Sendmail answers each after the 20th later than the one before
SILENCES_MAX = 3  # replies that did not come
DEFERRALS_MAX = 6  # forms put off or left without an answer in a row
NAMED_MAX = 6  # forms that a sentence names
SECOND_TRY_S = 2.0  # before a server that closed its door is asked once more

TAKES_ANYBODY = "it takes every recipient at RCPT, made-up users as well"
TAKES_ANY_LOCAL_PART = "there it takes any local-part, made-up users as well"

_MAILBOX = re.compile(r"\S*@\S*")


class RoundTest:
    """One round.  Used once.

    Attributes:
        offers_tls: the server offered STARTTLS.
        delivery: the message that was sent or tried; None for none.
    """

    def __init__(
        self,
        target: Target,
        address: Address,
        settings: ProbeSettings,
        deadline: Deadline,
        progress: Progress | None,
        *,
        tls: bool,
    ) -> None:
        self._target = target
        self._address = address
        self._settings = settings
        self._deadline = deadline
        self._progress = progress
        self._tls = tls
        self._wire: Wire | None = None
        self._keywords: frozenset[str] = frozenset()
        self._hello = settings.hello
        self._own_address = ""
        self._greeting = ""
        self._server = ""
        self._tls_version = ""
        self._connections = 0
        self._silences = 0
        self._given_up = ""
        self._sender = settings.reverse_path
        self._controls: dict[str, Heard] = {}
        self._opening: tuple[str, ...] = ()
        self._asked: list[tuple[Question, Attempt]] = []
        self._refusals = 0
        self._resets = 0
        self._pretends = False  # the name said last on this connection is a form's, not ours
        self.offers_tls = False
        self.delivery: Delivery | None = None

    async def run(self, *, deliver: bool) -> Round:
        """Ask everything.

        Args:
            deliver: the message may be sent, where the settings name an address.
        """
        try:
            return await self._run(deliver=deliver)
        finally:
            if self._wire is not None:  # whoever cancels the test leaves no connection behind
                self._wire.abort()

    async def _run(self, *, deliver: bool) -> Round:
        self._given_up = await self._open()
        names = self._names()
        local = self._local_domains()
        planned = list(questions(names, local[1:]))
        if not self._given_up and names.outside in local:
            self._given_up = f"{names.outside} is its own domain; name an address elsewhere"
        if not self._given_up:
            await self._ask_about_itself(names, local)
        deferred = 0
        for question in planned:
            if self._given_up:
                break
            self._tell(len(self._asked), len(planned))
            await asyncio.sleep(self._deadline.at_most(self._settings.pause_s))
            attempt = await self._ask(question)
            if attempt is None:
                break
            self._asked.append((question, attempt))
            put_off = attempt.outcome is Outcome.UNCLEAR and not attempt.reply.startswith(("2", "5"))
            deferred = deferred + 1 if put_off else 0
            if deferred == DEFERRALS_MAX:
                self._given_up = f"it put us off, or gave no answer, {deferred} times in a row"
        if deliver and self._settings.deliver and not self._given_up:
            await self._deliver()
        if self._wire is not None:
            await self._wire.quit()
        return self._result(local, len(planned))

    def _tell(self, done: int, planned: int) -> None:
        if self._progress is not None:
            self._progress(f"{self._address} {'under TLS' if self._tls else 'in plain'}", done, planned)

    # ---- connections

    async def _open(self) -> str:
        """A connection, up to EHLO.

        Returns:
            "", or why there is none.
        """
        self._connections += 1
        self._refusals = self._resets = 0
        self._pretends = False
        settings = self._settings
        wire = await dial(self._address, self._target.port, settings.source, settings.timeout_s, self._deadline)
        if isinstance(wire, str):
            return wire
        self._wire = wire
        if settings.implicit_tls:
            reason = await self._handshake(wire)
            if reason:
                return reason
        greeting = await wire.reply()
        self._greeting = self._greeting or greeting.line
        if greeting.code != 220:
            await wire.quit()
            return f"it greets with {greeting.line}" if greeting.code else f"no greeting: {greeting.text}"
        self._own_address = wire.own_address.partition("%")[0]
        self._hello = self._hello or _literal(ip_address(self._own_address))
        heard = await self._say_hello()
        if heard.positive and self._tls and not settings.implicit_tls:
            reason = await self._start_tls(wire)
            if reason:
                await wire.quit()
                return reason
            heard = await self._say_hello()
        if not heard.positive:
            await wire.quit()
            return f"it answers EHLO and HELO with {heard.line}" if heard.code else heard.text
        self._server = self._server or _name_in(heard.text) or _name_in(greeting.text)
        return ""

    async def _say_hello(self, name: str = "") -> Heard:
        assert self._wire is not None
        heard = await self._wire.command(f"EHLO {name or self._hello}")
        self._keywords = frozenset(line.split(" ", 1)[0].upper() for line in heard.text.split("\n")[1:])
        self.offers_tls = self.offers_tls or "STARTTLS" in self._keywords
        if not heard.positive and not self._wire.closed:
            heard = await self._wire.command(f"HELO {name or self._hello}")
        return heard

    async def _start_tls(self, wire: Wire) -> str:
        if "STARTTLS" not in self._keywords:
            return "it does not offer STARTTLS"
        heard = await wire.command("STARTTLS")
        if heard.code != 220:
            return f"it answers STARTTLS with {heard.line}"
        return await self._handshake(wire)

    async def _handshake(self, wire: Wire) -> str:
        name = self._target.host if domain_name(self._target.host) else ""
        self._tls_version = await wire.start_tls(name)
        return "" if self._tls_version else "the TLS handshake failed"

    async def _ready(self, *, fresh: bool = False) -> str:
        """See to it that there is a connection on which a transaction can begin.

        Returns:
            "", or why there is none.
        """
        if self._wire is not None and self._wire.silent:
            self._silences += 1
            if self._silences == SILENCES_MAX:
                return f"it left us without a reply {SILENCES_MAX} times"
        if self._wire is not None and not self._wire.closed:
            if not fresh and self._refusals < REFUSALS_MAX and self._resets < RESETS_MAX:
                return ""
            await self._wire.quit()
        if self._deadline.over:
            return "the time for the whole test is over"
        if self._connections >= CONNECTIONS_MAX:
            return f"it ended {CONNECTIONS_MAX} connections"
        reason = await self._open()
        if reason and not self._deadline.over:
            await asyncio.sleep(self._deadline.at_most(SECOND_TRY_S))
            reason = await self._open()
        return f"it does not talk to us any more ({reason})" if reason else ""

    # ---- questions

    async def _ask_about_itself(self, names: Names, local: tuple[str, ...]) -> None:
        """Which reverse-path it takes, and what it says to made-up users."""
        opening: list[str] = []
        local_sender = f"<postmaster@{local[0]}>"
        candidates = (self._sender,) if self._sender else ("<>", f"<{names.user}@{names.outside}>", local_sender)
        taken = False
        for candidate in candidates:
            self._sender = candidate
            taken = (await self._by_the_way(opening, f"MAIL FROM:{candidate}")).positive
            if taken:
                break
        for domain in dict.fromkeys([*local, *(domain_of(landing, names) for landing in LANDINGS)]) if taken else ():
            # Each in a transaction of its own: to <> some servers allow no second recipient.
            rcpt = f"RCPT TO:<{names.nobody}{domain and '@'}{domain}>"
            self._controls[domain] = await self._by_the_way(opening, f"MAIL FROM:{self._sender}", rcpt)
        self._sender = self._sender if taken else candidates[0]
        self._opening = tuple(opening)

    async def _by_the_way(self, opening: list[str], *commands: str) -> Heard:
        """A transaction that is no form; returns the reply to its last command, and adds to the transcript."""
        self._given_up = await self._ready()
        if self._given_up:
            return Heard(0, self._given_up)
        assert self._wire is not None
        wire = self._wire
        begun = len(wire.transcript) if opening else 0
        heard = Heard(0, "")
        for command in commands:
            heard = await wire.command(command)
            if not heard.positive:
                self._refusals += 1
                break
        await self._reset()
        opening += wire.transcript[begun:]
        return heard

    async def _ask(self, question: Question) -> Attempt | None:
        """One form; asked again on a new connection if the server ends the old one.  None: it could not be asked."""
        heard, transcript = Heard(0, ""), list[str]()
        for fresh in (False, True):
            reason = await self._ready(fresh=fresh or self._pretends_for(question))
            if reason:
                self._given_up = reason
                return None
            assert self._wire is not None
            begun = len(self._wire.transcript)
            at_mail, heard = await self._transaction(question)
            transcript = self._wire.transcript[begun:]
            if heard.code not in (0, 421):
                outcome, note = self._judged(question, heard, at_mail=at_mail)
                await self._reset()
                return self._attempt(question, outcome, heard.line, note, transcript)
            if self._wire.silent:
                break
        # It hung up twice on this, the second time as the first thing we asked, where it answers to other forms; and it
        # still talks to us.
        answers = any(attempt.outcome is Outcome.REFUSED for _, attempt in self._asked)
        if answers and self._wire is not None and self._wire.hung_up and not await self._ready():
            return self._attempt(question, Outcome.REFUSED, f"({heard.text})", "", transcript)
        return self._attempt(
            question, Outcome.UNCLEAR, heard.line, "it does not answer, or ends the session", transcript
        )

    async def _transaction(self, question: Question) -> tuple[bool, Heard]:
        """EHLO where it matters, MAIL and RCPT; returns whether MAIL was the last, and the reply that decides."""
        assert self._wire is not None
        wire = self._wire
        if question.hello:
            self._pretends = True
            heard = await self._say_hello(question.hello)
            if not heard.positive:
                return True, heard
        mail = f"MAIL FROM:{question.mail or self._sender}"
        if not (question.rcpt + mail).isascii() and "SMTPUTF8" in self._keywords:
            mail += " SMTPUTF8"  # RFC 6531 §3.4
        commands = [mail, *([f"RCPT TO:{question.first}"] if question.first else [])]
        commands.append(question.form.verb + question.rcpt)
        if question.form.together:
            wire.say(*commands)
        for number, command in enumerate(commands):
            heard = await (wire.reply() if question.form.together else wire.command(command))
            last = number == len(commands) - 1
            if not heard.positive and not wire.closed:
                self._refusals += 1
            if wire.closed or last:
                return False, heard
            refused = number == 0 and not heard.positive
            if refused and not question.form.together and not question.form.despite:
                return True, heard
        raise AssertionError("the last command returns")

    def _pretends_for(self, question: Question) -> bool:
        """Whether this connection is of no use for the question: EHLO, said again and again, tires servers."""
        return self._pretends and not question.hello

    async def _reset(self) -> None:
        """Nothing of a transaction is left behind."""
        assert self._wire is not None
        if self._wire.closed:
            return
        self._resets += 1
        heard = await self._wire.command("RSET")
        if not heard.positive:
            await self._wire.quit()

    # ---- what the replies mean

    def _judged(self, question: Question, heard: Heard, *, at_mail: bool) -> tuple[Outcome, str]:
        outcome, note = judge(heard)
        words = heard.text.lower()
        if outcome is Outcome.UNCLEAR and heard.code:
            # Servers that put everything off until RCPT say there what they have against the sender or the name.
            sender = question.form.mail and (at_mail or "sender" in words)
            if sender and (heard.code >= 500 or unknown_domain(heard)):
                return Outcome.REFUSED, ""  # this sender is what the form is about
            if question.hello and ((at_mail and heard.code >= 500) or re.search(r"\b(?:helo|ehlo)\b", words)):
                return Outcome.REFUSED, ""  # and here this name
            control = self._controls.get(question.lands)
            if not question.outside and control is not None and heard.code >= 500 and _same(heard, control):
                return Outcome.REFUSED, ""  # for it this is just one more user that it does not have
        if outcome is Outcome.ACCEPTED:
            return self._accepted(question)
        return outcome, note

    def _accepted(self, question: Question) -> tuple[Outcome, str]:
        if question.outside:
            if self._takes_anybody:
                return Outcome.UNCLEAR, TAKES_ANYBODY
            return Outcome.ACCEPTED, ""
        control = self._controls.get(question.lands)
        if control is None or not control.code:
            return Outcome.UNCLEAR, "it could not be asked whether it takes made-up users there"
        if control.positive:
            return Outcome.UNCLEAR, TAKES_ANY_LOCAL_PART
        return Outcome.ACCEPTED, ""

    @property
    def _takes_anybody(self) -> bool:
        """Whether RCPT tells nothing: some made-up user was taken, and none refused for what it is."""
        knows = any(judge(heard)[0] is Outcome.REFUSED and not bad_syntax(heard) for heard in self._controls.values())
        return not knows and any(heard.positive for heard in self._controls.values())

    def _attempt(self, question: Question, outcome: Outcome, reply: str, note: str, transcript: list[str]) -> Attempt:
        form = question.form
        mail = question.mail or self._sender
        return Attempt(question.id, form.why, form.source, mail, question.rcpt, outcome, reply, note, tuple(transcript))

    # ---- the one message

    async def _deliver(self) -> None:
        """Send the person's message by the first form by which it is taken; last by those that name a local domain."""
        token = secrets.token_hex(8)
        order = sorted(range(len(self._asked)), key=lambda number: not self._asked[number][0].outside)
        for number in order:
            question, attempt = self._asked[number]
            if not attempt.reply.startswith("2") or not question.form.to_the_victim:
                continue
            await asyncio.sleep(self._deadline.at_most(self._settings.pause_s))
            self._given_up = await self._ready(fresh=self._pretends_for(question))
            if self._given_up:
                return
            assert self._wire is not None
            begun = len(self._wire.transcript)
            heard = await self._message(question, token)
            transcript = tuple(self._wire.transcript[begun:])
            self.delivery = Delivery(token, self._settings.deliver, question.id, heard.positive, heard.line, transcript)
            self._asked[number] = question, self._after_content(question, attempt, heard)
            if heard.positive:
                return
            await self._reset()

    async def _message(self, question: Question, token: str) -> Heard:
        """The whole transaction; returns the reply that decides."""
        assert self._wire is not None
        _, heard = await self._transaction(question)
        if not heard.positive:
            return heard
        heard = await self._wire.command("DATA")
        if heard.code != 354:
            self._wire.abort()  # who knows what it takes the next line for
            return heard if heard.code >= 400 else Heard(0, f"it answers DATA with {heard.line}")
        return await self._wire.command(
            _content(self._settings.deliver, self._local_domains()[0], question.id, token),
            shown_as=f"(a message marked {token})",
        )

    def _after_content(self, question: Question, attempt: Attempt, heard: Heard) -> Attempt:
        if heard.positive:
            if self._accepted(question) == (Outcome.ACCEPTED, "") or question.outside:
                return replace(attempt, outcome=Outcome.ACCEPTED, reply=heard.line, note="")
            note = f"{attempt.note}; the message was taken, and your mailbox tells whether it left"
            return replace(attempt, reply=heard.line, note=note)
        if denies_relaying(heard):
            return replace(attempt, outcome=Outcome.REFUSED, reply=heard.line, note="")
        note = "it refused the message, and does not say that it would not relay another"
        return replace(attempt, outcome=Outcome.UNCLEAR, reply=heard.line, note=note)

    # ---- names

    def _names(self) -> Names:
        user, _, outside = self._settings.outside.rpartition("@")
        literal = _literal(self._address)
        nobody = f"no-such-user-{secrets.token_hex(4)}"
        return Names(user, outside, self._local_domains()[0], literal, self._server or literal, nobody)

    def _local_domains(self) -> tuple[str, ...]:
        """What the person says; else what the server's name and HOST suggest; else its address."""
        if self._settings.local_domains:
            return self._settings.local_domains
        suggested = [_mail_domain(name) for name in (self._server, domain_name(self._target.host)) if "." in name]
        return tuple(dict.fromkeys(suggested)) or (_literal(self._address),)

    # ---- the verdict

    def _result(self, local: tuple[str, ...], planned: int) -> Round:
        attempts = tuple(attempt for _, attempt in self._asked)
        verdict, why = self._verdict(attempts, planned)
        return Round(
            self._address,
            self._target.port,
            self._tls,
            self._tls_version,
            self._greeting,
            local,
            verdict,
            tuple(why),
            self._opening,
            self._takes_anybody,
            planned,
            attempts,
            self._own_address,
        )

    def _verdict(self, attempts: tuple[Attempt, ...], planned: int) -> tuple[Verdict, list[str]]:
        relaying = [attempt.id for attempt in attempts if attempt.outcome is Outcome.ACCEPTED]
        why = []
        if relaying:
            why.append(f"It relays in {len(relaying)} of {planned} forms: {_listed(relaying)}.")
        unclear: dict[str, list[str]] = {}
        for attempt in attempts:
            if attempt.outcome is Outcome.UNCLEAR:
                unclear.setdefault(attempt.note, []).append(attempt.id)
        why += [f"Nothing can be concluded from {_listed(ids)}: {note}." for note, ids in unclear.items()]
        if self._given_up:
            why.append(f"Given up after {len(attempts)} of {planned} forms: {self._given_up}.")
        if relaying:
            return Verdict.OPEN, why
        if unclear or self._given_up or len(attempts) < planned:
            return Verdict.UNKNOWN, why
        return Verdict.CLOSED, [f"It refused all {planned} forms."]


def _literal(address: Address) -> str:
    """RFC 5321 §4.1.3."""
    return f"[{address}]" if address.version == 4 else f"[IPv6:{address}]"


def _name_in(text: str) -> str:
    """The server's name: the first word of its greeting or EHLO reply, where that is a domain."""
    word = text.split(None, 1)[0] if text.strip() else ""
    return domain_name(word) if "." in word and word.isascii() else ""


def _mail_domain(host: str) -> str:
    """For which domain a host most likely takes mail: mx.example.com for example.com, but example.co.uk for itself."""
    parent = host.partition(".")[2]
    first, _, rest = parent.partition(".")
    registry = len(rest) == 2 and len(first) <= 3
    return parent if rest and not registry else host


def _same(one: Heard, other: Heard) -> bool:
    """The same refusal, but for the addresses in it."""
    return one.code == other.code and _MAILBOX.sub("", one.text) == _MAILBOX.sub("", other.text)


def _listed(ids: list[str]) -> str:
    more = len(ids) - NAMED_MAX
    return ", ".join(ids[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def _content(address: str, local: str, form: str, token: str) -> str:
    """The one message: says what it is, and asks for no answer.  Its last line is the dot.

    It is written as from the server's own domain: from the person's it would be refused for its DMARC policy.
    """
    lines = (
        f"Date: {formatdate(usegmt=True)}",
        f"From: postmaster@{local}",
        f"To: {address}",
        f"Subject: Relay test {token}",
        f"Message-ID: <{token}@{address.rpartition('@')[2]}>",
        "Auto-Submitted: auto-generated",
        "",
        f"You asked for this test with gatepost probe. Its mark is {token}.",
        f"The server that handed it on took it from a stranger, by the form {form}.",
        "Its name stands in the Received fields of this message. No answer is wanted.",
        ".",
    )
    return "\r\n".join(lines)
