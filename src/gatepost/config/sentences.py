"""A loaded configuration in words, for people who have to answer for it.

Why: a grant that is read aloud is judged; a table of keys is skimmed.
Trust: values that were judged before.
Promise: one sentence an entry, nothing left out; the same facts as a structure for programs.
Sources: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from gatepost.config import Config
from gatepost.config.dialects import Reading
from gatepost.config.settings import takes_logins
from gatepost.config.values import address_text, backend_address_text, duration_text
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import prover, relay
from gatepost.policy.admission import SendAsEntry
from gatepost.policy.prover import Dialogue, Proof
from gatepost.policy.relay import DenyEntry, IPNetwork, RelayRules, Route, TrustEntry

SHOWN_MAX = 50  # entries of one kind in text; the structure has them all

_ROLES = {
    "mx": "mail for us from anybody",
    "submission": "AUTH required",
    "inside": "our own machines",
    "pop3": "POP3 proxy",
    "imap": "IMAP proxy",
}
_LISTEN_TLS = {"none": "no TLS", "starttls": "STARTTLS", "implicit": "TLS from the first octet"}
_BACKEND_TLS = {"off": "", "opportunistic": ", STARTTLS where offered", "required": ", STARTTLS required"}


def summary(config: Config, now: float) -> dict[str, Any]:
    """Everything that the configuration says, each rule with its sentence and its place.

    Args:
        now: seconds since the epoch, for what has expired.
    """
    gate = config.gate
    rules = gate.rules
    return {
        "config": config.config_path,
        "valid": True,
        "problems": [],
        "warnings": list(config.warnings),
        "name": gate.name,
        "data": gate.data,
        "user": config.user,
        "workers": gate.workers,
        "console": address_text(*config.console_address),
        "listeners": [
            {
                "name": listen.name,
                "role": listen.role,
                "logins": takes_logins(listen),
                "sentence": listen_sentence(listen),
                "where": listen.where,
            }
            for listen in gate.listens
        ],
        "local": [{"pattern": entry.pattern, "where": entry.where} for entry in rules.local],
        "trust": [
            {
                "who": relay.who(entry),
                "sentence": trust_sentence(entry, now),
                "expires": moment_text(entry.expires_at),
                "where": entry.where,
            }
            for entry in rules.trust
        ],
        "deny": [
            {
                "sentence": deny_sentence(entry, now),
                "expires": moment_text(entry.expires_at),
                "where": entry.where,
            }
            for entry in rules.deny
        ],
        "watched": _watched(gate, now),
        "logins": list(gate.auth.verify),
        "send_as": [
            {"sentence": send_as_sentence(entry, now), "expires": moment_text(entry.expires_at), "where": entry.where}
            for entry in gate.send_as.entries
        ],
        "backends": [
            {
                "name": backend.name,
                "addresses": list(map(backend_address_text, backend.addresses)),
                "tls": backend.tls,
                "takes": _takes(backend.name, rules.routes, rules.default_backend),
                "where": backend.where,
            }
            for backend in gate.backends
        ],
    }


def _watched(gate: GateSettings, now: float) -> list[dict[str, str]]:
    """The entries with shadow = true."""
    if gate.shadowed is None:
        return []
    acting, denying = set(gate.rules.trust), set(gate.rules.deny)  # by value: one line may hold several entries
    grants = [entry for entry in gate.shadowed.trust if entry not in acting]
    denials = [entry for entry in gate.shadowed.deny if entry not in denying]
    return [
        *({"sentence": trust_sentence(entry, now), "where": entry.where} for entry in grants),
        *({"sentence": f"refuses {deny_sentence(entry, now)}", "where": entry.where} for entry in denials),
    ]


def text(facts: dict[str, Any]) -> str:
    """The summary for a person."""
    runs = f"{facts['workers']} workers" if facts["workers"] != 1 else "1 worker"
    lines = [
        f"{facts['config'] or 'The embedded default'} is valid: {facts['name']}, {runs}, data in {facts['data']}"
        + (f", as user {facts['user']}" if facts["user"] else ""),
        *_section("Listens", [f"{at['name']}: {at['sentence']}" for at in facts["listeners"]]),
        *_section("Takes mail from anybody for", [entry["pattern"] for entry in facts["local"]], empty="nobody"),
        *_section("May send elsewhere", [entry["sentence"] for entry in facts["trust"]], empty="nobody"),
        *_section("Logins are verified by", facts["logins"] if _logins_taken(facts) else []),
        *_section("May send as others", [entry["sentence"] for entry in facts["send_as"]]),
        *_section("Refuses whatever else is allowed", [entry["sentence"] for entry in facts["deny"]]),
        *_section("Only watched, and not acted on", [entry["sentence"] for entry in facts["watched"]]),
        *_section(
            "Hands mail on to",
            [
                f"{to['name']}: {', '.join(to['addresses'])}{_BACKEND_TLS[to['tls']]}; takes {to['takes']}"
                for to in facts["backends"]
            ],
        ),
        *_section("Metrics and health", [f"http://{facts['console']}/"]),
        *_section("Warnings", facts["warnings"]),
    ]
    return "\n".join(lines)


def proof_facts(proof: Proof, rules: RelayRules, now: float, readings: Iterable[Reading] = ()) -> dict[str, Any]:
    """What was proven, or how strangers relay; the dialogue is the shortest, as the engine answers it.

    Args:
        readings: what backends read as another address; where the gate lets strangers send it, nothing is proven.
    """
    read = list(readings)
    return {
        "proven": proof.proven and all(reading.closed for reading in read),
        "decisions": proof.decisions,
        "clients": proof.standings,
        "reverse_paths": proof.reverse_paths,
        "forward_paths": proof.forward_paths,
        "openings": [
            {
                "rule": opening.rule,
                "where": (rules.local if opening.rule == "local" else rules.trust)[opening.number].where,
                "sentence": opening.sentence,
            }
            for opening in proof.openings
        ],
        "dialogue": None if proof.shortest is None else _dialogue_facts(proof.shortest, proof.opened, now),
        "backends": [_reading_facts(reading) for reading in read],
    }


def _reading_facts(reading: Reading) -> dict[str, Any]:
    exchanges = [exchange._asdict() for exchange in reading.exchanges]
    return {**reading._asdict(), "exchanges": exchanges, "passing": list(reading.passing)}


def _dialogue_facts(dialogue: Dialogue, rules: RelayRules, now: float) -> dict[str, Any]:
    return {
        "client": str(dialogue.client),
        "listen": dialogue.listener.name,
        "where": dialogue.listener.where,
        "tls": dialogue.tls,
        "exchanges": [exchange._asdict() for exchange in prover.replay(rules, dialogue, now)],
    }


def proof_text(facts: dict[str, Any]) -> str:
    """The proof for a person: one line, or the dialogue."""
    kinds = (
        f"{facts['decisions']:,} decisions on every kind of client ({facts['clients']:,}), reverse-path "
        f"({facts['reverse_paths']:,}) and forward-path ({facts['forward_paths']:,}) that these rules can tell apart"
    )
    read = [_reading_text(reading) for reading in facts["backends"]]
    dialogue = facts["dialogue"]
    if dialogue is None:
        proven = f"PROVEN: nobody else may send elsewhere; {kinds}"
        return "\n\n".join([*read, proven if facts["proven"] else _OPEN_BEHIND])
    under = f", under {dialogue['tls']}" if dialogue["tls"] else ""
    through = f"through the listener {dialogue['listen']} ({dialogue['where']}){under}"
    lines = [f"OPEN RELAY: a stranger at {dialogue['client']} sends anywhere {through}:", ""]
    lines += _exchanged(dialogue["exchanges"])
    return "\n".join([*(f"{text}\n" for text in read), *lines])


_OPEN_BEHIND = "NOT PROVEN: strangers may send what a backend reads as another address"


def _reading_text(facts: dict[str, Any]) -> str:
    state = "closed at the gate" if facts["closed"] else "OPEN AT THE GATE"
    asked = f"  the gate to the backend {facts['backend']}: RCPT TO:{facts['asked']}"
    lines = [
        f"The form {facts['form']}: {state}, open at the backend {facts['backend']}:",
        "",
        *_exchanged(facts["exchanges"]),
        asked,
        f"  the backend to the gate: {facts['said']}",
    ]
    if facts["passing"]:
        lines.append(f"  who may send it: {'; '.join(facts['passing'])}")
    return "\n".join(lines)


def _exchanged(exchanges: Iterable[dict[str, str]]) -> list[str]:
    return [line for one in exchanges for line in (f"  C: {one['command']}", f"  S: {one['reply']}")]


def _logins_taken(facts: dict[str, Any]) -> bool:
    return any(at["logins"] for at in facts["listeners"])


def _section(title: str, entries: list[str], *, empty: str = "") -> list[str]:
    if not entries and not empty:
        return []
    shown = [f"  {entry}" for entry in entries[:SHOWN_MAX] or [empty]]
    if len(entries) > SHOWN_MAX:
        shown.append(f"  and {len(entries) - SHOWN_MAX:,} more; --json shows them all")
    return ["", title, *shown]


def listen_sentence(listen: ListenSettings) -> str:
    """Such as "0.0.0.0:25, mail for us from anybody, STARTTLS"."""
    parts = [", ".join(address_text(*address) for address in listen.addresses), _ROLES[listen.role]]
    if listen.server is not None:
        parts.append(f"in front of {address_text(listen.server.host, listen.server.port)}")
    parts.append(_LISTEN_TLS[listen.tls])
    if takes_logins(listen):
        if listen.auth == "offered":
            parts.append("AUTH offered")
        if listen.auth_without_tls:
            parts.append("AUTH in plain text, too")
        if listen.send_as != "enforce":
            parts.append("accounts may send as anybody" + (", which is logged" if listen.send_as == "log" else ""))
    if listen.xclient_from:
        parts.append(f"XCLIENT from {', '.join(listen.xclient_from)}")
    if listen.proxy_from:
        parts.append(f"PROXY header from {', '.join(listen.proxy_from)}")
    if listen.bare_newlines == "normalise":
        parts.append("bare newlines normalised")
    return ", ".join(parts)


def trust_sentence(entry: TrustEntry, now: float) -> str:
    """Such as "10.1.0.0/16 may send anywhere as *@example.com, until 2027-06-30: office LAN, it@example.com"."""
    where_to = _patterns(entry.forward_paths)
    sentence = f"{_who(entry)} may send {'anywhere' if where_to == '*' else f'to {where_to}'}"
    as_whom = _patterns(entry.reverse_paths)
    if as_whom != "*":
        sentence += f" as {as_whom}"
    if entry.tls_minimum:
        sentence += f" over TLS {entry.tls_minimum} or newer"
    if entry.bare_newlines == "normalise":
        sentence += ", bare newlines normalised"
    rates = [
        f"{number} {what}"
        for number, what in ((entry.messages_per_hour, "messages"), (entry.recipients_per_hour, "recipients"))
        if number
    ]
    if rates:
        sentence += f", at most {' and '.join(rates)} an hour"
    return sentence + _until(entry.expires_at, now) + _because(entry.why, entry.owner)


def deny_sentence(entry: DenyEntry, now: float) -> str:
    """Such as "mail from *@spam.test, with 550 5.7.1 Not from there, until 2027-01-01: complaint of 12 May"."""
    if entry.network is not None:
        sentence = f"clients in {_network(entry.network)}"
    elif entry.host:
        sentence = f"the host {entry.host}"
    elif entry.helo:
        sentence = f"clients that call themselves {entry.helo}"
    elif entry.reverse_path is not None:
        sentence = f"mail from {entry.reverse_path}"
    else:
        sentence = f"mail to {entry.forward_path}"
    if entry.reply is not None:
        sentence += f", with {entry.reply.octets().decode().rstrip()}"
    return sentence + _until(entry.expires_at, now) + _because(entry.why, "")


def send_as_sentence(entry: SendAsEntry, now: float) -> str:
    """Such as "the accounts alice, bob may send as sales@example.com: shared mailbox, it@example.com"."""
    who = "whoever logged in" if "*" in entry.accounts else f"the accounts {', '.join(entry.accounts)}"
    sentence = f"{who} may send as {' or '.join(map(str, entry.reverse_paths))}"
    return sentence + _until(entry.expires_at, now) + _because(entry.why, entry.owner)


def moment_text(moment: float | None) -> str | None:
    """When an entry ends: the last day on which it holds, or a time where it ends within a day."""
    if moment is None:
        return None
    when = datetime(1970, 1, 1, tzinfo=UTC)
    if moment % 86400 == 0:
        return (when + timedelta(seconds=moment - 86400)).strftime("%Y-%m-%d")
    return (when + timedelta(seconds=moment)).strftime("%Y-%m-%d %H:%M:%S UTC")


def _who(entry: TrustEntry) -> str:
    if entry.network is not None:
        return _network(entry.network)
    if entry.host:
        return f"the host {entry.host}"
    if entry.listen:
        return f"whoever comes to the listener {entry.listen}"
    if entry.accounts:
        return "whoever logged in" if "*" in entry.accounts else f"the accounts {', '.join(entry.accounts)}"
    if entry.certificate:
        return f"the client with the certificate {entry.certificate[:16]}..."
    return f"whoever logged in to a mailbox from the same address in the last {duration_text(entry.pop3_s)}"


def _network(network: IPNetwork) -> str:
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def _patterns(patterns: Iterable[object]) -> str:
    written = list(map(str, patterns))
    return "*" if not written or "*" in written else " or ".join(written)


def _until(expires_at: float | None, now: float) -> str:
    if expires_at is None:
        return ""
    return f", EXPIRED {moment_text(expires_at)}" if expires_at <= now else f", until {moment_text(expires_at)}"


def _because(why: str, owner: str) -> str:
    reasons = ", ".join(part for part in (why, owner) if part)
    return f": {reasons}" if reasons else ""


def _takes(name: str, routes: tuple[Route, ...], default: str) -> str:
    taken = [
        "all local domains" if pattern == "local" else "everything" if pattern == "*" else pattern
        for route in routes
        if route.backend == name
        for pattern in (*(["local"] if route.local else []), *map(str, route.forward_paths))
    ]
    if name == default and "everything" not in taken:
        taken.append("everything else" if routes else "everything")
    return ", ".join(taken) or "nothing"
