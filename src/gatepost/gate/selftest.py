"""The self-test: the gate probes itself through each of its listeners, as a stranger, and compares with its rules.

Why: the proof is about the rules, and the rules are not the gate.  What stands between the two (the parser, the
    session, the backend, whatever changed this host's network) is asked here, by the relay tester, which shares nothing
    with them.
Trust: the gate's own replies are read by the tester as those of any server.
Promise: it speaks from an address that the rules trust nothing for, so that no grant is used and none is watched; it
    sends no content, tries no login, holds one connection at a time, and opens at most half of the sessions a minute
    that one client may.  What could not be asked is unknown, never an agreement.
Sources: RFC 5321 §3.6.2 (relaying), RFC 4954 §6 (530).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from itertools import takewhile
from typing import NamedTuple

from gatepost import probe
from gatepost.errors import GatepostError
from gatepost.facts import Client, IPAddress, MailboxLogin, Session, Transaction, client_address
from gatepost.gate import interfaces
from gatepost.gate.listeners import endpoint
from gatepost.gate.settings import GateSettings, Limits, ListenSettings
from gatepost.policy import relay
from gatepost.policy.relay import RelayRules
from gatepost.probe import Attempt, ProbeSettings, Report, Round, Target, Verdict
from gatepost.probe.round import REFUSALS_MAX, TAKES_ANYBODY
from gatepost.probe.target import WAIT_S_MAX
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, ReversePath, Shape
from gatepost.telemetry import Level, SessionLog
from gatepost.verdict import Admit

FIRST_TEST_S = 300.0  # after the start: whoever starts a gate has other things to look at
ADDRESS_BUDGET_S = 1800.0  # for one address of one listener
REPLY_WAIT_S = 30.0
PACE_SHARE = 0.5  # of the sessions a minute that one client may open

# Addresses of this host that nobody but the self-test speaks from, one for each address that is tested, so that no two
# share a limit; loopback addresses need no interface.
OWN_NETWORK = IPv4Network("127.77.0.0/16")

_STRANGE = ForwardPath(Mailbox(*probe.DEFAULT_OUTSIDE.split("@")), Shape.PLAIN)
_LOOPBACK: dict[IPAddress, IPAddress] = {
    IPv4Address("0.0.0.0"): IPv4Address("127.0.0.1"),  # noqa: S104  where it is bound, not what is bound here
    IPv6Address("::"): IPv6Address("::1"),
}

HostsOf = Callable[[IPAddress], tuple[str, ...]]


class Bound(NamedTuple):
    """One address of one listener, as bound."""

    listen: ListenSettings
    host: str
    port: int

    @property
    def target(self) -> IPAddress:
        """Where a client of this host reaches it."""
        address = client_address(self.host)
        return _LOOPBACK.get(address, address)


@unique
class Outcome(Enum):
    """What the comparison says; the value is for programs."""

    CLOSED = "closed"  # as the rules say
    OPEN = "open"  # as the rules say, and [gate] open_relay wishes
    TRUSTED = "trusted"  # the rules trust whoever comes to this listener: there is no stranger to ask as
    UNKNOWN = "unknown"
    DISAGREES = "disagrees"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One address of one listener, compared.

    Attributes:
        address: with the port, as tested; source: whom the test spoke as, None where it did not.
        sentence: for a person, about the listener.
        form: by which it relays against the rules, "" for none; transcript: that dialogue.
    """

    listen: str
    address: str
    source: IPAddress | None
    outcome: Outcome
    sentence: str
    form: str = ""
    transcript: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.listen} at {self.address}: {self.sentence}"


class Asker(NamedTuple):
    """Whom to ask as: ``admitted`` is whether the rules let this address send anywhere."""

    address: IPAddress
    admitted: bool


class NoAsker(NamedTuple):
    """Why there is nobody to ask as."""

    outcome: Outcome
    sentence: str


# --- What to compare --------------------------------------------------------------------------------------------------


def bound_for_smtp(listens: Iterable[ListenSettings], served: Iterable[tuple[str, str, int]]) -> list[Bound]:
    """The listeners by which mail comes in; what listens for POP3 and IMAP relays nothing.

    Args:
        served: name of the listener, host and port as bound.

    Raises:
        GatepostError: a listener is served that the settings do not have.
    """
    by_name = {listen.name: listen for listen in listens}
    found = []
    for name, host, port in served:
        if name not in by_name:
            raise GatepostError(f"the running gate has a listener {name}, the configuration has none; reload it first")
        if by_name[name].server is None:
            found.append(Bound(by_name[name], host, port))
    return found


def candidates(target: IPAddress, number: int, own: Iterable[IPAddress]) -> list[IPAddress]:
    """Addresses of this host that could speak to the target, best first.

    Args:
        number: of the target among all that are tested; own: addresses of this host's interfaces.
    """
    first: IPAddress = IPv6Address("::1")
    if target.version == 4:
        first = OWN_NETWORK[1 + number % (OWN_NETWORK.num_addresses - 2)]
    others = (at for at in own if at.version == target.version and not at.is_link_local)
    return list(dict.fromkeys((first, *others)))


def asker(
    gate: GateSettings, listen: ListenSettings, addresses: Iterable[IPAddress], hosts_of: HostsOf, now_s: float
) -> Asker | NoAsker:
    """Whom to ask as at this listener: a stranger; where the gate is open as meant, whoever may send anywhere.

    Args:
        addresses: that could be spoken from, best first; hosts_of: the trusted and denied host names of an address.
        now_s: seconds since the epoch.
    """
    heard_otherwise = [ip_network(text) for text in (*listen.proxy_from, *listen.xclient_from)]
    why: list[str] = []
    admitted: IPAddress | None = None
    for address in addresses:
        if any(address in network for network in heard_otherwise):
            why.append(f"{address} is a listed proxy or front end")
            continue
        facts = _facts(gate.rules, listen, address, hosts_of(address), now_s)
        denied = relay.denied(gate.rules, Transaction(facts, NULL_REVERSE_PATH, 0, now_s))
        if denied is not None:
            why.append(f"{address} is denied ({denied.where})")
            continue
        admits = _admits(gate.rules, listen, facts, now_s)
        granted = [entry for entry in relay.grants(gate.rules, facts) if not relay.expired(entry, now_s)]
        if not granted or listen.auth == "required":  # there a grant is worth nothing before AUTH
            return Asker(address, admits)
        for_all = next((entry for entry in granted if entry.listen), None)
        if for_all is not None and not gate.open_relay:
            return NoAsker(Outcome.TRUSTED, f"not asked: whoever comes to this listener is trusted ({for_all.where})")
        why.append(f"{address} is trusted ({granted[0].where})")
        if admits and admitted is None:
            admitted = address
    if gate.open_relay and admitted is not None:
        return Asker(admitted, admitted=True)
    return NoAsker(Outcome.UNKNOWN, f"not asked: this host has no address that is a stranger here: {', '.join(why)}")


def _facts(
    rules: RelayRules, listen: ListenSettings, address: IPAddress, hosts: tuple[str, ...], now_s: float
) -> Session:
    # Others may have logged in to their mailboxes from an address that is not ours alone.
    login = MailboxLogin("", now_s) if rules.index.trust_mailbox_logins and address not in OWN_NETWORK else None
    hello = f"[{address}]" if address.version == 4 else f"[IPv6:{address}]"
    return Session(
        reference="",
        client=Client(address, 0),
        listen=listen.name,
        role=listen.role,
        hello=hello,
        esmtp=True,
        hosts=hosts,
        auth_required=listen.auth == "required",
        mailbox_login=login,
    )


def _admits(rules: RelayRules, listen: ListenSettings, facts: Session, now_s: float) -> bool:
    """Whether the rules let this client send to a domain that nobody has, in plain text or under TLS."""
    versions = {"none": ("",), "starttls": ("", "TLSv1.3"), "implicit": ("TLSv1.3",)}[listen.tls]
    local = _local_domain(rules)
    reverse_paths: tuple[ReversePath, ...] = (NULL_REVERSE_PATH, *(Mailbox("postmaster", domain) for domain in local))
    return any(
        isinstance(relay.decide(rules, Transaction(facts._replace(tls=tls), mail, 0, now_s), _STRANGE), Admit)
        for tls in versions
        for mail in reverse_paths
    )


def _local_domain(rules: RelayRules) -> tuple[str, ...]:
    """One domain that the gate takes mail for, which the forms name; none where it takes mail for none."""
    for local in rules.local:
        if not local.pattern.startswith("["):
            return (local.pattern.replace("*", "selftest", 1),)
    return ()


# --- Asking, and comparing --------------------------------------------------------------------------------------------


async def compare(gate: GateSettings, bound: Bound, number: int, hosts_of: HostsOf, now_s: float) -> Comparison:
    """Ask through one address of one listener, and compare with what the rules say.

    Args:
        number: of this address among all that are tested.
        now_s: seconds since the epoch.
    """
    listen, target = bound.listen, bound.target
    address = endpoint(str(target), bound.port)
    who = asker(gate, listen, candidates(target, number, interfaces.own_addresses()), hosts_of, now_s)
    if isinstance(who, NoAsker):
        return Comparison(listen.name, address, None, *who)
    settings = ProbeSettings(
        local_domains=_local_domain(gate.rules),
        families=(target.version,),
        starttls="auto" if listen.tls == "starttls" else "never",
        implicit_tls=listen.tls == "implicit",
        source=who.address,
        pause_s=pause_s(gate.limits),
        timeout_s=REPLY_WAIT_S,
        budget_s=ADDRESS_BUDGET_S,
    )
    try:
        report = await probe.probe(Target(str(target), bound.port), settings)
    except GatepostError as error:
        return Comparison(listen.name, address, who.address, Outcome.UNKNOWN, f"not asked: {error}")
    return judged(listen.name, address, who, report)


def pause_s(limits: Limits) -> float:
    """Between two forms, so that as many connections as they cost stay within what one client may open."""
    per_minute = limits.sessions_per_minute_per_client
    if not per_minute:
        return 0.0
    forms = min(REFUSALS_MAX, limits.errors_per_session or REFUSALS_MAX)  # on one connection
    return min(WAIT_S_MAX, 60 / (per_minute * PACE_SHARE * forms))


def judged(listen: str, address: str, who: Asker, report: Report) -> Comparison:
    """What the tester saw beside what the rules say."""
    source = who.address
    taken = _first_taken(report)
    if taken is None and report.verdict is Verdict.UNKNOWN:
        return Comparison(listen, address, source, Outcome.UNKNOWN, f"cannot be told: {' '.join(report.why)}")
    if taken is None:
        if who.admitted:
            sentence = f"refuses {source}, though the configuration lets it send anywhere"
            return Comparison(listen, address, source, Outcome.DISAGREES, sentence)
        forms = sum(len(one.attempts) for one in report.rounds)
        return Comparison(
            listen, address, source, Outcome.CLOSED, f"refuses {source} in all {forms} forms, as it should"
        )
    one, attempt = taken
    greeting = takewhile(lambda line: not line.startswith("C: MAIL"), one.opening)
    transcript = (*greeting, *attempt.transcript)
    said = f"MAIL FROM:{attempt.reverse_path} and RCPT TO:{attempt.forward_path}, answered {attempt.reply}"
    if who.admitted:
        sentence = f"OPEN RELAY, as [gate] open_relay wishes: takes {said} from {source}"
        return Comparison(listen, address, source, Outcome.OPEN, sentence, attempt.id, transcript)
    sentence = f"RELAYS for {source}, which nothing in the configuration allows: {said} ({attempt.id})"
    return Comparison(listen, address, source, Outcome.DISAGREES, sentence, attempt.id, transcript)


def _first_taken(report: Report) -> tuple[Round, Attempt] | None:
    """The first form that relays.

    Of a server that takes made-up users wherever it is asked, the tester believes no 250.  Here the backend may be such
    a server, but the gate decides at RCPT: its 250 to a foreign address means that it would relay.
    """
    for one in report.rounds:
        for attempt in one.attempts:
            if attempt.outcome is probe.Outcome.ACCEPTED or attempt.note == TAKES_ANYBODY:
                return one, attempt
    return None


def together(comparisons: Iterable[Comparison]) -> Outcome:
    """Of all listeners: a disagreement if there is one; an agreement only where each was asked that has strangers."""
    outcomes = {comparison.outcome for comparison in comparisons}
    for worst in (Outcome.DISAGREES, Outcome.UNKNOWN, Outcome.OPEN, Outcome.CLOSED):
        if worst in outcomes:
            return worst
    return Outcome.UNKNOWN


# --- On a schedule ----------------------------------------------------------------------------------------------------

_LEVELS = {
    Outcome.CLOSED: Level.NOTE,
    Outcome.TRUSTED: Level.NOTE,
    Outcome.OPEN: Level.WARNING,
    Outcome.UNKNOWN: Level.WARNING,
    Outcome.DISAGREES: Level.ERROR,
}


class SelfTests:
    """When to test, and what is told of it.

    Args:
        told: whether gate and rules agree; None where it is not known.
    """

    def __init__(self, log: SessionLog, told: Callable[[bool | None], None]) -> None:
        self._log = log
        self._told = told
        self._since: float | None = None  # the start, or the end of the last test
        self._tested = False
        self._running = False
        self._agrees: bool | None = None

    def due(self, every_s: float, now_s: float) -> bool:
        """Whether it is time for a test; asked every second.

        Args:
            every_s: 0 for never.
            now_s: of a clock that does not go back.
        """
        if self._since is None:
            self._since = now_s
        wait_s = every_s if self._tested else min(every_s, FIRST_TEST_S)
        return bool(every_s) and not self._running and now_s - self._since >= wait_s

    async def run(self, tests: Iterable[Callable[[], Awaitable[Comparison]]], still: Callable[[], bool]) -> None:
        """One test of each listener, one after the other.

        Args:
            still: whether the configuration is the one that is compared with; once it is not, nothing is told, and
                the test comes again a little later.
        """
        self._running, self._tested = True, False
        try:
            comparisons = []
            for test in tests:
                comparisons.append(await test())
                if not still():
                    return
            self._tested = True
            self._tell(comparisons)
        finally:
            self._running = False
            self._since = None

    def _tell(self, comparisons: list[Comparison]) -> None:
        notes = [one for one in comparisons if _LEVELS[one.outcome] is Level.NOTE]
        for one in comparisons:
            if one not in notes:
                self._event([one])
        if notes:
            self._event(notes)
        overall = together(comparisons)
        if overall is not Outcome.UNKNOWN:
            self._agrees = overall is not Outcome.DISAGREES
        elif self._agrees:
            self._agrees = None  # but an alarm stands until a test says otherwise
        self._told(self._agrees)

    def _event(self, comparisons: list[Comparison]) -> None:
        text = f"self-test: {'; '.join(map(str, comparisons))}"
        listeners = [as_object(one) for one in comparisons]
        self._log.event("selftest", text, _LEVELS[comparisons[0].outcome], listeners=listeners)


def as_object(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON values, for the log and the command line."""
    return {
        "listen": comparison.listen,
        "address": comparison.address,
        "source": "" if comparison.source is None else str(comparison.source),
        "outcome": comparison.outcome.value,
        "text": comparison.sentence,
        "form": comparison.form,
        "transcript": list(comparison.transcript),
    }
