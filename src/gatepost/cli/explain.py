"""``gatepost explain``: what would become of one message, by which rule, and what would have changed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from gatepost import config
from gatepost.auth.accounts import account_name
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import values
from gatepost.errors import GatepostError
from gatepost.facts import Client, Identity, IPAddress, MailboxLogin, Session, Transaction, client_address
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import admission, explanation, relay
from gatepost.policy.relay import RelayRules
from gatepost.resolver import Certainty, Resolver
from gatepost.smtp.path import ForwardPath, PathDefect, parse_forward_path, parse_reverse_path
from gatepost.smtp.reply import Reply
from gatepost.verdict import Admit, Defer, LocalDomain, Refuse, RelayVerdict

T = TypeVar("T")


def explain(
    *,
    client: Annotated[str, Parameter(help="The client's IP address.")],
    reverse_path: Annotated[
        str, Parameter(help='Who the mail claims to come from, as in MAIL FROM; "<>" for a bounce.')
    ],
    forward_path: Annotated[str, Parameter(help="Whom it is for, as in RCPT TO.")],
    account: Annotated[str | None, Parameter(help="The account that the client logged in to.")] = None,
    certificate: Annotated[
        str | None, Parameter(help="SHA-256 of the certificate that the client showed, hexadecimal.")
    ] = None,
    mailbox_login: Annotated[
        str | None, Parameter(help='How long ago somebody read mail from the client\'s address, such as "5m".')
    ] = None,
    listen: Annotated[
        str | None, Parameter(help="The listener that the client came to. Default: the first of role mx.")
    ] = None,
    helo: Annotated[str, Parameter(help="What the client called itself in EHLO or HELO.")] = "",
    tls: Annotated[
        Literal["1.0", "1.1", "1.2", "1.3"] | None, Parameter(help="The version of TLS it spoke. Default: none.")
    ] = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Say what would become of one message, by which rule, and what would have changed it.

    The answer is the relay policy's own: what the gate would do with this client and these paths at this moment. Host
    names in the rules are looked up in DNS. Exit code: 0 admitted, 1 refused or deferred, 2 the question cannot be
    asked.
    """
    gate = config.load_file(config.find(config_path)).gate
    address = _address(client)
    listener = _listener(gate, listen)
    answer: dict[str, Any] = {
        "client": str(address),
        "listen": listener.name,
        "reverse_path": reverse_path,
        "forward_path": forward_path,
    }
    reverse = parse_reverse_path(_path_octets(reverse_path), smtputf8=not reverse_path.isascii())
    forward = parse_forward_path(_path_octets(forward_path), smtputf8=not forward_path.isascii())
    if isinstance(reverse, PathDefect):
        answer |= _defect(reverse.reply, "reverse_path")
    elif isinstance(forward, PathDefect):
        answer |= _defect(forward.reply, "forward_path")
    else:
        hosts, notes = asyncio.run(_hosts(gate.rules, address))
        now = datetime.now(UTC).timestamp()
        session = Session(
            reference="",
            client=Client(address, 0),
            listen=listener.name,
            role=listener.role,
            hello=helo,
            esmtp=True,
            tls="" if tls is None else f"TLSv{tls}",
            identity=None if account is None else Identity(account_name(account) or account.lower(), "PLAIN"),
            hosts=hosts,
            auth_required=listener.auth == "required",
            certificate=_value(values.fingerprint, "--certificate", certificate) or "",
            mailbox_login=_mailbox_login(mailbox_login, now),
        )
        answer |= _decided(gate, listener, Transaction(session, reverse, 0, now), forward) | {"notes": notes}
    if as_json:
        say_json(answer)
    else:
        _tell(answer)
    return DONE if answer["verdict"] == "admit" else BAD_NEWS


def _address(client: str) -> IPAddress:
    try:
        return client_address(client.strip("[]"))
    except ValueError:
        raise GatepostError(f'--client "{client}": this is not an IP address; write it as 192.0.2.1') from None


def _listener(gate: GateSettings, name: str | None) -> ListenSettings:
    if name is None:
        return next((listen for listen in gate.listens if listen.role == "mx"), gate.listens[0])
    for listen in gate.listens:
        if listen.name == name:
            return listen
    names = ", ".join(listen.name for listen in gate.listens)
    raise GatepostError(f'--listen "{name}": there is no such listener; the configuration has {names}')


def _value(read: Callable[[object], T], option: str, written: str | None) -> T | None:
    """An option's value, read as the configuration reads it."""
    try:
        return None if written is None else read(written)
    except ValueError as error:
        raise GatepostError(f'{option} "{written}": {error}') from None


def _mailbox_login(ago: str | None, now: float) -> MailboxLogin | None:
    seconds = _value(values.duration_s, "--mailbox-login", ago)
    return None if seconds is None else MailboxLogin("somebody", now - seconds)


def _path_octets(written: str) -> bytes:
    """The path as a client would send it; the brackets may be left out."""
    octets = written.encode("utf-8", "surrogateescape")
    return octets if octets.startswith(b"<") else b"<" + octets + b">"


def _defect(reply: Reply, which: str) -> dict[str, Any]:
    """Refused before any rule was looked at: what came is no path."""
    return {
        "verdict": "refuse",
        "reason": "syntax",
        "reply": reply.octets().decode().rstrip(),
        "rule": None,
        "detail": f"the {which.replace('_', '-')} cannot be parsed, whoever sends it",
        "backend": None,
        "changes": [],
        "notes": [],
    }


async def _hosts(rules: RelayRules, address: IPAddress) -> tuple[tuple[str, ...], list[str]]:
    """The names in the rules that this address has now, and what DNS did not tell."""
    names = sorted(({entry.host for entry in rules.trust} | {entry.host for entry in rules.deny}) - {""})
    if not names:
        return (), []
    resolver = Resolver()
    try:
        answers = await asyncio.gather(*map(resolver.addresses, names))
    finally:
        await resolver.close()
    notes = [
        f"DNS does not answer for {name} ({answer.why}); a gate that has run for a while may still know it"
        for name, answer in zip(names, answers, strict=True)
        if answer.certainty is Certainty.UNKNOWN
    ]
    return tuple(name for name, answer in zip(names, answers, strict=True) if address in answer.addresses), notes


def _decided(
    gate: GateSettings, listener: ListenSettings, transaction: Transaction, forward_path: ForwardPath
) -> dict[str, Any]:
    rules, identity = gate.rules, transaction.session.identity
    if identity is not None and listener.send_as == "enforce":
        refusal = admission.send_as(gate.send_as, identity, transaction.reverse_path, transaction.now)
        if refusal is not None and relay.denied(rules, transaction) is None:
            return _not_as_that(refusal)
    verdict, changes = explanation.explain(rules, transaction, forward_path)
    return {
        "verdict": {Admit: "admit", Defer: "defer", Refuse: "refuse"}[type(verdict)],
        "reason": "accepted" if isinstance(verdict, Admit) else verdict.reason.name.lower(),
        "reply": explanation.reply_text(verdict) or None,
        "rule": _rule(rules, verdict),
        "detail": "" if isinstance(verdict, Admit) else verdict.detail,
        "backend": verdict.recipient.backend if isinstance(verdict, Admit) else None,
        "changes": [{"condition": change.condition, "where": change.where} for change in changes],
    }


def _not_as_that(refusal: Refuse) -> dict[str, Any]:
    """Refused at MAIL FROM: the account sends as somebody else."""
    return {
        "verdict": "refuse",
        "reason": refusal.reason.name.lower(),
        "reply": refusal.reason.reply(hint=refusal.hint).octets().decode().rstrip(),
        "rule": None,
        "detail": f"{refusal.detail}; [[send_as]] grants other addresses",
        "backend": None,
        "changes": [{"condition": f"the reverse-path were the account's own ({refusal.hint})", "where": ""}],
    }


def _rule(rules: RelayRules, verdict: RelayVerdict) -> dict[str, str] | None:
    """The rule behind the verdict, with its place and reason; None for the gate's own default."""
    rule = explanation.rule_text(rules, verdict)
    if not rule:
        return None
    if isinstance(verdict, Admit):
        authority = verdict.recipient.authority
        if isinstance(authority, LocalDomain):
            return {"rule": rule, "where": authority.where, "why": "", "owner": ""}
        return {"rule": rule, "where": authority.where, "why": authority.why, "owner": authority.owner}
    for grant in rules.trust:
        if grant.where == verdict.where:
            return {"rule": rule, "where": grant.where, "why": grant.why, "owner": grant.owner}
    return {"rule": rule, "where": verdict.where, "why": verdict.detail, "owner": ""}


def _tell(answer: dict[str, Any]) -> None:
    admitted = answer["verdict"] == "admit"
    if admitted:
        say(f"ADMITTED, and handed to the backend {answer['backend']}, whose reply the client sees", "bold green")
    else:
        word = "DEFERRED" if answer["verdict"] == "defer" else "REFUSED"
        say(f"{word} with {answer['reply']}", "bold red")
    say(f"client  {answer['client']} at listener {answer['listen']}")
    say(f"mail    from {answer['reverse_path']} to {answer['forward_path']}")
    say(f"rule    {_rule_text(answer)}")
    for number, change in enumerate(answer["changes"]):
        label = ("refused if" if admitted else "admitted if") if number == 0 else ""
        say(f"{label:<12}{_change_text(change)}")
    for note in answer["notes"]:
        say(f"note    {note}", "yellow")


def _rule_text(answer: dict[str, Any]) -> str:
    rule = answer["rule"]
    if rule is None:
        if answer["reason"] == "routing":
            return f"a backend may read the local-part as another address ({answer['detail']}): never from strangers"
        return answer["detail"] or "none lets it pass, and what no rule lets pass is refused"
    reasons = ", ".join(part for part in (rule["why"], rule["owner"]) if part)
    text = f"{rule['rule']} ({rule['where']})" + (f": {reasons}" if reasons else "")
    if answer["reason"] == "narrowed":
        text += f"; it is narrowed by {answer['detail']}"
    elif answer["reason"] == "expired_trust":
        text += "; it has expired"
    return text


def _change_text(change: dict[str, str]) -> str:
    return f"{change['condition']} ({change['where']})" if change["where"] else change["condition"]
