"""Who may send where, all of it: every class of clients and paths, decided by the real policy.

Why: the commonest open relay is no bug but a grant that is wider than its author saw.  The relay policy asks few
    questions of what a client is and says, so that they can all be asked: one witness of each class (``partition``) is
    decided by ``relay.decide`` itself.  docs/proof.md defines *open* and has the argument.
Trust: rules from an administrator's file; nothing that a peer sent comes here.
Promise: pure.  What is open is told with the shortest dialogue that relays for a stranger, and ``replay`` plays it at
    the engine.  Where two questions of one class have two answers there is no proof but an exception.
Sources: RFC 5321 §3.1 (the dialogue), RFC 3207.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from gatepost.facts import Client, Identity, IPAddress, MailboxLogin, Session, Transaction
from gatepost.policy.extent import Range, extent, public_parts
from gatepost.policy.partition import (
    HOP,
    NOBODY,
    TLS_VERSIONS,
    AddressClass,
    Asked,
    Partition,
    Question,
    Standing,
)
from gatepost.policy.relay import RelayRules, decide
from gatepost.smtp.command import Mail, Rcpt, StartTls
from gatepost.smtp.content import ContentLimits
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, ReversePath, Shape
from gatepost.smtp.reply import Reply
from gatepost.smtp.server import Refused, ServerEngine, State
from gatepost.verdict import Admit, Defer, LocalDomain, Refuse, RelayVerdict

# --- Who listens ------------------------------------------------------------------------------------------------------


class Listener(NamedTuple):
    """One listener for SMTP, as far as it matters who may send.

    Attributes:
        where: its place in the file; role: "mx", "submission" or "inside".
        proxied: a proxy stands in front, so that its own address tells nothing.
        tls: "none", "starttls" or "implicit".
    """

    name: str
    where: str
    role: str
    addresses: tuple[IPAddress, ...]
    auth_required: bool = False
    proxied: bool = False
    tls: str = "none"

    @property
    def strangers(self) -> bool:
        """Whether public addresses can reach it: a public address, or role mx anywhere but on the loopback alone."""
        if self.role == "mx" and (self.proxied or not all(address.is_loopback for address in self.addresses)):
            return True
        return any(public_parts([(at.version, int(at), int(at) + 1)]) for at in self.addresses)

    @property
    def everywhere(self) -> bool:
        """Whether it listens on every interface, so that a firewall alone keeps strangers out."""
        return any(address.is_unspecified for address in self.addresses)

    def speaks(self, tls: str) -> bool:
        """Whether a session here can have this version of TLS; a [[trust]] entry may lower the listener's own."""
        return self.tls != "none" if tls else self.tls != "implicit"


# --- What is told -----------------------------------------------------------------------------------------------------


class Dialogue(NamedTuple):
    """The commands by which a stranger has mail sent anywhere.

    Attributes:
        client: where the stranger comes from; listener: whom it talks to.
        tls: the version of TLS, "" for plain text.
    """

    client: IPAddress
    listener: Listener
    tls: str
    hello: str
    reverse_path: ReversePath
    forward_path: ForwardPath

    @property
    def commands(self) -> tuple[str, ...]:
        """What the client types."""
        utf8 = not (self.reverse_path.octets + self.forward_path.octets).isascii()
        route = f"@{HOP}:" if self.forward_path.shape is Shape.ROUTE else ""
        hello = f"EHLO {self.hello}"
        return (
            *((hello, "STARTTLS") if self.tls and self.listener.tls == "starttls" else ()),
            hello,
            f"MAIL FROM:<{self.reverse_path.octets.decode()}>{' SMTPUTF8' if utf8 else ''}",
            f"RCPT TO:<{route}{self.forward_path}>",
        )


class Opening(NamedTuple):
    """One way in which strangers may send anywhere.

    Attributes:
        rule: "local", "network" or "listen"; number: of the entry among [domains] local or [[trust]].
        sentence: how it opens the gate, and the mend.
    """

    rule: Literal["local", "network", "listen"]
    number: int
    sentence: str
    dialogue: Dialogue


@dataclass(frozen=True, slots=True)
class Proof:
    """What was decided.

    Attributes:
        openings: empty where the configuration is closed.
        opened: the rules under which the dialogues relay: without denials that expire, where these alone prevent it.
        standings: how many kinds of clients there are; reverse_paths, forward_paths: how many kinds of these.
        decisions: how often ``relay.decide`` was asked.
        admitted: for each kind of client the kinds of questions, and whether they are admitted.
    """

    openings: tuple[Opening, ...]
    opened: RelayRules
    standings: int
    reverse_paths: int
    forward_paths: int
    decisions: int
    admitted: dict[Standing, dict[Asked, bool]]

    @property
    def proven(self) -> bool:
        """Nobody but who is named may send elsewhere."""
        return not self.openings

    @property
    def shortest(self) -> Dialogue | None:
        """The shortest dialogue of all openings."""
        return min((opening.dialogue for opening in self.openings), key=_length, default=None)


def _length(dialogue: Dialogue) -> tuple[int, int]:
    return len(dialogue.commands), sum(map(len, dialogue.commands))


# --- The proof --------------------------------------------------------------------------------------------------------


def openings(rules: RelayRules, listeners: tuple[Listener, ...], public_trust: int, now: float) -> tuple[Opening, ...]:
    """Every way in which strangers may send anywhere; empty where the configuration is closed.

    Args:
        public_trust: how many public IPv4 addresses may be trusted in all, and how many IPv6 sites (/48).
        now: seconds since the epoch; what has expired opens nothing.
    """
    return _openings(_Prover(rules, listeners, now), public_trust)[0]


def _openings(prover: _Prover, public_trust: int) -> tuple[tuple[Opening, ...], RelayRules]:
    """The openings, and the rules under which they are there: those of today, or of the day when denials have ended."""
    rules = prover.rules
    found = prover.openings(public_trust)
    if found or all(entry.expires_at is None for entry in rules.deny):
        return found, rules
    lasting = replace(rules, deny=tuple(entry for entry in rules.deny if entry.expires_at is None))
    later = _Prover(lasting, prover.listeners, prover.partition.now).openings(public_trust)
    until = "; what keeps strangers out now is a [[deny]] entry that expires"
    return tuple(opening._replace(sentence=opening.sentence + until) for opening in later), lasting


def prove(rules: RelayRules, listeners: tuple[Listener, ...], public_trust: int, now: float) -> Proof:
    """Decide for everybody, and not for strangers alone.  Args as of ``openings``."""
    prover = _Prover(rules, listeners, now)
    found, opened = _openings(prover, public_trust)
    prover.decide_for_known()
    partition = prover.partition
    return Proof(
        openings=found,
        opened=opened,
        standings=len(prover.admitted),
        reverse_paths=len(partition.reverses),
        forward_paths=len(partition.forwards),
        decisions=prover.decisions,
        admitted=prover.admitted,
    )


class _Escape(NamedTuple):
    """A question of somebody who did not log in that is admitted, though it leads elsewhere."""

    verdict: Admit
    tls: str
    reverse_path: ReversePath
    forward_path: ForwardPath


class _Prover:
    """Asks ``relay.decide`` every question of a partition, one fact about the client at a time.

    Grants add up and denials take away, so that what several facts are worth together is known from each alone.
    """

    def __init__(self, rules: RelayRules, listeners: tuple[Listener, ...], now: float) -> None:
        self.rules = rules
        self.listeners = listeners
        self.partition = Partition(rules, now)
        self.admitted: dict[Standing, dict[Asked, bool]] = {}
        self.decisions = 0
        self._hello = self.partition.hellos()[0]
        # Where every other fact is looked at, the address shall be worth nothing; if there is no such address, the
        # grants to networks are left out.
        nobody = [one for one in self.partition.addresses if not one.standing.barred] or self.partition.addresses
        stranger = min(nobody, key=lambda one: (len(one.standing.grants), not public_parts(one.ranges)))
        self._stranger = Session("", Client(stranger.witness, 0), listen="", role="", hello=self._hello, esmtp=True)
        self._others = rules
        if stranger.standing.grants:
            gone = (replace(one, expires_at=now) if one.network is not None else one for one in rules.trust)
            self._others = replace(rules, trust=tuple(gone))

    # ---- Strangers

    def openings(self, public_trust: int) -> tuple[Opening, ...]:
        """Every way in which strangers may send anywhere."""
        if all(listener.auth_required for listener in self.listeners):
            return ()
        return (*self._open_domains(), *self._open_networks(public_trust), *self._open_listeners())

    def _open_domains(self) -> Iterator[Opening]:
        """Strangers are let through because a pattern takes somebody else's domain for ours."""
        found = self._escapes(self._others, NOBODY, self._stranger)
        if found:  # by one of its kind; now by each
            found = self._escapes(self._others, NOBODY, self._stranger, self.partition.questions_of_strangers())
        escapes: dict[str, list[_Escape]] = {}
        for escape in found:
            authority = escape.verdict.recipient.authority
            if isinstance(authority, LocalDomain):
                escapes.setdefault(authority.pattern, []).append(escape)
        for index, local in enumerate(self.rules.local):
            by_pattern = escapes.pop(local.pattern, None)
            if by_pattern:
                below = local.pattern.removeprefix("*.")
                sentence = f'"{local.pattern}" is all of "{below}"; name your own domains'
                yield Opening("local", index, sentence, self._dialogue(self._stranger, by_pattern))

    def _open_networks(self, public_trust: int) -> Iterator[Opening]:
        """The addresses that may send anywhere are more than anybody has clients."""
        reached: list[tuple[AddressClass, list[_Escape]]] = []
        for one in self.partition.addresses:
            if not public_parts(one.ranges):
                continue  # whatever such addresses may do, no stranger has one
            session = self._stranger._replace(client=Client(one.witness, 0))
            escapes = [
                escape
                for escape in self._escapes(self.rules, one.standing, session)
                if not isinstance(escape.verdict.recipient.authority, LocalDomain)
            ]
            if escapes:
                reached.append((one, escapes))
        total = extent(part for one, _ in reached for part in one.ranges)
        if not total.exceeds(public_trust):
            return
        held: dict[int, list[Range]] = {}
        for one, _ in reached:
            for n in filter(self.partition.leads_elsewhere, one.standing.grants):
                held.setdefault(n, []).extend(one.ranges)
        sizes = {n: extent(ranges) for n, ranges in sorted(held.items())}
        alone = [n for n, size in sizes.items() if size.exceeds(public_trust)]
        for n in alone or [max(sizes, key=lambda n: sizes[n])]:
            who = f"{self.rules.trust[n].network} holds {sizes[n]}, whose users may send anywhere"
            if not alone:
                who = f"the networks in [[trust]] hold {total} together"
            yield Opening(
                "network",
                n,
                f"{who}; name your own networks ([gate] public_trust allows {public_trust:,})",
                min(
                    (
                        self._dialogue(self._stranger._replace(client=Client(one.witness, 0)), escapes)
                        for one, escapes in reached
                        if n in one.standing.grants
                    ),
                    key=_length,
                ),
            )

    def _open_listeners(self) -> Iterator[Opening]:
        """Listeners whose every client is trusted, though strangers come there."""
        for listener in self.listeners:
            standing = self.partition.listener(listener.name)
            if not standing.grants or not listener.strangers or listener.auth_required:
                continue
            session = self._at(listener)
            escapes = [
                escape
                for escape in self._escapes(self._others, standing, session)
                if not isinstance(escape.verdict.recipient.authority, LocalDomain) and listener.speaks(escape.tls)
            ]
            if escapes:
                wheres = {escape.verdict.recipient.authority.where for escape in escapes}
                sentence = (
                    f'strangers reach the listener "{listener.name}" at {listener.where}; '
                    'trust a listener of role "inside" at an inside address, or networks'
                )
                for n in sorted(standing.grants):
                    if self.rules.trust[n].where in wheres:
                        yield Opening("listen", n, sentence, self._dialogue(session, escapes, listener))

    def stranger_says(self, listener: Listener, tls: str, forward_path: ForwardPath) -> Dialogue:
        """What somebody types here whom no rule knows."""
        client = self._stranger.client.address
        return Dialogue(client, listener, tls, self._hello, NULL_REVERSE_PATH, forward_path)

    def _at(self, listener: Listener) -> Session:
        return self._stranger._replace(listen=listener.name, role=listener.role, auth_required=listener.auth_required)

    def _escapes(
        self, rules: RelayRules, standing: Standing, session: Session, questions: Iterable[Question] | None = None
    ) -> list[_Escape]:
        """What a session without a login gets through to domains that nobody named, by a listener that there is.

        Args:
            questions: those to ask; None for one of each class.
        """
        if questions is None:
            questions = self.partition.questions(standing, elsewhere=True)
        leading_elsewhere = (question for question in questions if question[2].kind.elsewhere)
        spoken = {
            tls
            for tls in TLS_VERSIONS
            if any(listener.speaks(tls) and not listener.auth_required for listener in self.listeners)
        }
        return [
            _Escape(verdict, tls, reverse.path, forward.path)
            for (tls, reverse, forward), verdict in self._decide(rules, standing, session, leading_elsewhere)
            if isinstance(verdict, Admit) and tls in spoken
        ]

    def _dialogue(self, session: Session, escapes: list[_Escape], listener: Listener | None = None) -> Dialogue:
        """The shortest of these, at this listener or at one that fits."""

        def dialogue(escape: _Escape) -> Dialogue:
            at = listener or next(
                one
                for one in sorted(self.listeners, key=lambda one: not one.strangers)
                if one.speaks(escape.tls) and not one.auth_required
            )
            return Dialogue(
                session.client.address, at, escape.tls, self._hello, escape.reverse_path, escape.forward_path
            )

        return min(map(dialogue, escapes), key=_length)

    # ---- Everybody else

    def decide_for_known(self) -> None:
        """Whoever is more than an address, by name, listener, account, certificate or mailbox login; by EHLO less."""
        rules, partition, session = self.rules, self.partition, self._stranger
        facts: list[tuple[Standing, Session]] = [
            *((partition.hello(name), session._replace(hello=name)) for name in partition.hellos()),
            *(
                (partition.host(name), session._replace(hosts=(name,)))
                for name in dict.fromkeys((*rules.index.trust_hosts, *rules.index.deny_hosts))
            ),
            *(
                (partition.listener(listener.name), self._at(listener)._replace(auth_required=False))
                for listener in self.listeners
            ),
            *(
                (partition.listener(listener.name)._replace(barred=True), self._at(listener))
                for listener in self.listeners
                if listener.auth_required
            ),
            *(
                (partition.account(account), session._replace(identity=Identity(account, "PLAIN")))
                for account in ("", *rules.index.trust_accounts)
            ),
            *(
                (partition.certificate(fingerprint), session._replace(certificate=fingerprint))
                for fingerprint in rules.index.trust_certificates
            ),
            *(
                (
                    partition.mailbox_login(age_s),
                    session._replace(mailbox_login=MailboxLogin("", partition.now - age_s)),
                )
                for age_s in partition.mailbox_login_ages_s()
            ),
        ]
        for standing, witness in facts:
            self._decide(self._others, standing, witness)
        for one in partition.addresses:
            self._decide(rules, one.standing, session._replace(client=Client(one.witness, 0)))
        self._decide(self._others, NOBODY, session, partition.questions_of_strangers())

    def _decide(
        self, rules: RelayRules, standing: Standing, session: Session, questions: Iterable[Question] | None = None
    ) -> list[tuple[Question, RelayVerdict]]:
        """The real policy's verdict on every question of this client, or on these."""
        admitted = self.admitted.setdefault(standing, {})
        out = []
        for question in self.partition.questions(standing) if questions is None else questions:
            tls, reverse, forward = question
            transaction = Transaction(session._replace(tls=tls), reverse.path, 0, self.partition.now)
            verdict = decide(rules, transaction, forward.path)
            self.decisions += 1
            answer = isinstance(verdict, Admit)
            asked = self.partition.asked(standing, tls, reverse, forward)
            if admitted.setdefault(asked, answer) is not answer:  # never a proof that rests on a wrong partition
                raise RuntimeError(f"two questions of one class have two answers: {asked}")
            out.append((question, verdict))
        return out


# --- The proof on the wire --------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """A command, and the engine's reply to it, without CRLF."""

    command: str
    reply: str


def heard_by_stranger(
    rules: RelayRules, listeners: tuple[Listener, ...], forward_path: ForwardPath, now: float
) -> tuple[Exchange, ...]:
    """What somebody whom no rule knows hears for this forward-path, where strangers get furthest.

    Returns:
        Nothing where there is no listener.
    """
    prover = _Prover(rules, listeners, now)
    # Plain text where there is some, for the dialogue is shorter; where strangers come, and no login is demanded.
    reached = sorted(listeners, key=lambda one: (one.auth_required, not one.strangers, not one.speaks("")))
    if not reached:
        return ()
    tls = "" if reached[0].speaks("") else TLS_VERSIONS[-1]
    return replay(rules, prover.stranger_says(reached[0], tls, forward_path), now)


_OFFERED = frozenset({"SMTPUTF8", "STARTTLS"})


def replay(rules: RelayRules, dialogue: Dialogue, now: float) -> tuple[Exchange, ...]:
    """Play a dialogue at the engine and the policy, joined as in a gate; the last reply is 250 where it relays."""
    listener = dialogue.listener
    session = Session(
        "",
        Client(dialogue.client, 0),
        listen=listener.name,
        role=listener.role,
        hello=dialogue.hello,
        esmtp=True,
        tls=dialogue.tls,
        auth_required=listener.auth_required,
    )
    transaction = Transaction(session, NULL_REVERSE_PATH, 0, now)
    engine = ServerEngine(_OFFERED, ContentLimits())
    exchanges = []
    for command in dialogue.commands:
        engine.receive(command.encode() + b"\r\n")
        event = engine.next_event()
        if not isinstance(event, Refused):
            match event:
                case Mail(reverse_path, _):
                    transaction = Transaction(session, reverse_path, 0, now)
                    reply = Reply(250, "Sender OK", "2.1.0")
                case Rcpt(forward_path, _):
                    verdict = decide(rules, transaction, forward_path)
                    reply = verdict.reason.reply() if isinstance(verdict, Defer | Refuse) else _RELAYED
                case StartTls():
                    reply = Reply(220, "Go ahead", "2.0.0")
                case _:
                    reply = Reply(250, "Hello")
            engine.respond(reply)
        exchanges.append(Exchange(command, engine.data_to_send().decode().rstrip()))
        if engine.state is State.TLS:
            engine = ServerEngine(_OFFERED, ContentLimits())
    return tuple(exchanges)


_RELAYED = Reply(250, "Recipient OK", "2.1.5")
