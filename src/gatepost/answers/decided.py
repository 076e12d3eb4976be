"""A verdict under the configuration as it is now, for ``gatepost explain``: as an object, and in words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gatepost.facts import IPAddress, Transaction
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import admission, explanation, relay
from gatepost.policy.relay import RelayRules
from gatepost.resolver import Certainty, Resolver
from gatepost.smtp.path import ForwardPath, Mailbox
from gatepost.verdict import Admit, Defer, Finding, LocalDomain, Reason, Refuse, RelayVerdict


async def hosts(rules: RelayRules, address: IPAddress) -> tuple[tuple[str, ...], list[str]]:
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


# --- Decided ----------------------------------------------------------------------------------------------------------


def at_mail(gate: GateSettings, listener: ListenSettings, transaction: Transaction) -> dict[str, Any] | None:
    """What refuses the transaction as a whole, before any recipient; None where nothing does."""
    rules, identity = gate.rules, transaction.session.identity
    denial = relay.denied(rules, transaction)
    if denial is not None:
        others = tuple(entry for entry in rules.deny if entry.where != denial.where)
        changes = [explanation.Change("this entry did not stand there", denial.where)]
        return verdict(rules, denial, changes if relay.denied(replace(rules, deny=others), transaction) is None else [])
    if identity is None and transaction.session.auth_required:
        return verdict(rules, Refuse(Reason.AUTH_REQUIRED), [explanation.Change("the client had logged in", "")])
    if identity is not None and listener.send_as == "enforce":
        refusal = admission.send_as(gate.send_as, identity, transaction.reverse_path, transaction.now)
        if refusal is not None:
            return not_as_that(refusal, f"the reverse-path were the account's own ({refusal.hint})")
    return None


def at_rcpt(
    gate: GateSettings,
    listener: ListenSettings,
    transaction: Transaction,
    forward_path: ForwardPath,
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """One recipient, the reverse-path before it included."""
    rules = gate.rules
    if transaction.session.identity is not None and relay.denied(rules, transaction) is None:
        refused = at_mail(gate, listener, transaction)
        if refused is not None:
            return refused
    decided, changes = explanation.explain(rules, transaction, forward_path)
    told = list(changes)
    if findings:
        unfettered, decided = decided, relay.decide(rules, transaction, forward_path, findings)
        if isinstance(decided, Defer) and isinstance(unfettered, Admit):
            told = [explanation.Change("there had been room in that hour", decided.where)]
    elif isinstance(decided, Defer) and decided.reason is Reason.TOO_MANY_RECIPIENTS:
        first = transaction._replace(recipients=0)
        if isinstance(relay.decide(rules, first, forward_path), Admit):
            told.insert(0, explanation.Change("fewer recipients had come before it in the transaction", ""))
    return verdict(rules, decided, told)


def at_content(
    gate: GateSettings,
    listener: ListenSettings,
    transaction: Transaction,
    then: Refuse | Defer,
    authors: Sequence[Mailbox],
) -> dict[str, Any] | None:
    """Content whose author was looked at; None where it would pass on to the backend."""
    identity = transaction.session.identity
    if identity is None or listener.send_as != "enforce":
        return None
    if then.reason is Reason.AUTHOR:
        change = explanation.Change("its From field named the account's own address, once and in a plain form", "")
        return verdict(gate.rules, then, [change])
    refusal = admission.author(gate.send_as, identity, authors, transaction.now)
    if refusal is None:
        return None
    return not_as_that(refusal, f"the From field named the account's own address ({refusal.hint})")


def verdict(rules: RelayRules, decided: RelayVerdict, changes: Sequence[explanation.Change]) -> dict[str, Any]:
    """A verdict and what would have turned it, as an object."""
    return {
        "verdict": {Admit: "admit", Defer: "defer", Refuse: "refuse"}[type(decided)],
        "reason": "accepted" if isinstance(decided, Admit) else decided.reason.name.lower(),
        "reply": explanation.reply_text(decided) or None,
        "rule": _rule(rules, decided),
        "detail": "" if isinstance(decided, Admit) else decided.detail,
        "backend": decided.recipient.backend if isinstance(decided, Admit) else None,
        "changes": [{"condition": change.condition, "where": change.where} for change in changes],
    }


def not_as_that(refusal: Refuse, condition: str) -> dict[str, Any]:
    """The account sends as somebody else."""
    return {
        "verdict": "refuse",
        "reason": refusal.reason.name.lower(),
        "reply": refusal.reason.reply(hint=refusal.hint).octets().decode().rstrip(),
        "rule": None,
        "detail": f"{refusal.detail}; [[send_as]] grants other addresses",
        "backend": None,
        "changes": [{"condition": condition, "where": ""}],
    }


def _rule(rules: RelayRules, decided: RelayVerdict) -> dict[str, str] | None:
    """The rule behind the verdict, with its place and reason; None for the gate's own default."""
    rule = explanation.rule_text(rules, decided)
    if not rule:
        return None
    if isinstance(decided, Admit):
        authority = decided.recipient.authority
        if isinstance(authority, LocalDomain):
            return {"rule": rule, "where": authority.where, "why": "", "owner": ""}
        return {"rule": rule, "where": authority.where, "why": authority.why, "owner": authority.owner}
    for grant in rules.trust:
        if grant.where == decided.where:
            return {"rule": rule, "where": grant.where, "why": grant.why, "owner": grant.owner}
    return {"rule": rule, "where": decided.where, "why": decided.detail, "owner": ""}


def shadow(
    gate: GateSettings, transaction: Transaction, forward_path: ForwardPath | None, findings: Sequence[Finding] = ()
) -> str | None:
    """What would be, were the entries acted on that are only watched; None where it is the same."""
    if gate.shadowed is None:
        return None
    return relay.would(gate.rules, gate.shadowed, transaction, forward_path, findings) or None


# --- The chain --------------------------------------------------------------------------------------------------------


def chain(
    rules: RelayRules, transaction: Transaction, forward_path: ForwardPath, findings: Sequence[Finding]
) -> list[str]:
    """The rules in the order in which they are asked, each with what it says, down to the one that decides.

    Each entry is told by what ``relay.decide`` says where it stands alone, and nothing here judges.
    """
    session = transaction.session
    decided = relay.decide(rules, transaction, forward_path, findings)
    if isinstance(decided, Refuse) and decided.reason is Reason.DENIED:
        return [f"{explanation.rule_text(rules, decided)} ({decided.where}): refuses it"]
    if isinstance(decided, Refuse) and decided.reason is Reason.ROUTING:
        undenied = relay.decide(replace(rules, deny=()), transaction, forward_path, findings)
        if undenied != decided:
            return ["[[deny]]: a backend could read the local-part as an address that is denied"]
    steps = ["[[deny]]: no entry matches" if rules.deny else "[[deny]]: there is no entry"]
    if session.auth_required:
        steps.append(f"auth: required, and {'there was no login' if session.identity is None else 'given'}")
        if session.identity is None:
            return steps
    if rules.recipients_max:
        steps.append(f"recipients_per_message: {transaction.recipients} before it, {rules.recipients_max} allowed")
        if transaction.recipients >= rules.recipients_max:
            return steps
    steps.append(f"[domains] local: {_local_text(rules, forward_path)}")
    addressed = relay.with_domain(rules, forward_path)
    if addressed is None or (relay.local_domain(rules, addressed) is not None and not relay.routing(rules, addressed)):
        return steps
    entries = sorted((*relay.withheld(rules, session), *relay.grants(rules, session)), key=[*rules.trust].index)
    for entry in entries:
        alone = replace(rules, local=(), deny=(), trust=(entry,))
        outcome = relay.decide(alone, transaction, addressed, findings)
        said = "covers it" if isinstance(outcome, Admit) else why(outcome, past=False)
        steps.append(f"[[trust]] {relay.who(entry)} ({entry.where}): {said}")
    if not entries:
        steps.append("[[trust]]: no entry means this client")
    return steps


def _local_text(rules: RelayRules, forward_path: ForwardPath) -> str:
    addressed = relay.with_domain(rules, forward_path)
    if addressed is None:
        return "there is no domain of ours that a bare postmaster could be of"
    local = relay.local_domain(rules, addressed)
    if local is None:
        return f"{addressed} is not at a domain of ours"
    ours = f"{addressed} is ours by {local.pattern} ({local.where})"
    return f"{ours}, but its local-part holds routing characters" if relay.routing(rules, addressed) else ours


# --- In words ---------------------------------------------------------------------------------------------------------

_WHY = {
    Reason.RELAYING: "no rule lets it pass, and what no rule lets pass is refused",
    Reason.DENIED: "the administrator denies it",
    Reason.EXPIRED_TRUST: "the permission has expired",
    Reason.SUSPENDED: "the trust in where the client came from is suspended, for strangers were seen behind it",
    Reason.MAILBOX_LOGIN: "the permission needs a login to the mailbox server in time, and there was none",
    Reason.RATE: "too much mail in that hour",
    Reason.AUTH_REQUIRED: "the listener takes mail only from a client that logged in",
    Reason.TOO_MANY_RECIPIENTS: "the transaction had as many recipients as it may have",
    Reason.OTHER_ROUTE: "the recipients before it go to another backend, and one reply cannot answer for both",
    Reason.NO_ROUTE: "no backend takes mail for it",
}
_WHY_WITH_DETAIL = {
    Reason.ROUTING: "a backend may read the local-part as another address ({}): never from strangers",
    Reason.NARROWED: "the permission is narrowed by {}",
    Reason.TLS_REQUIRED: "the permission asks for {}",
    Reason.SEND_AS: "{}, which is neither the account's own address nor granted by [[send_as]]",
    Reason.AUTHOR: "nobody can tell as whom the account sends: {}",
}


def why(decided: Refuse | Defer, *, past: bool) -> str:
    """Why not, in a sentence.

    Args:
        past: the reason that its entry gave then stands in the verdict alone, and is told, too.
    """
    if decided.reason in _WHY_WITH_DETAIL:
        return _WHY_WITH_DETAIL[decided.reason].format(decided.detail)
    words = _WHY.get(decided.reason, decided.reason.wording)
    return f"{words}: {decided.detail}" if past and decided.detail else words


def rule_text(answer: dict[str, Any]) -> str:
    """The rule behind an answer, in words."""
    rule = answer["rule"]
    if rule is None:
        if answer["reason"] == "routing":
            return _WHY_WITH_DETAIL[Reason.ROUTING].format(answer["detail"])
        return answer["detail"] or "none lets it pass, and what no rule lets pass is refused"
    reasons = ", ".join(part for part in (rule["why"], rule["owner"]) if part)
    text = f"{rule['rule']} ({rule['where']})" + (f": {reasons}" if reasons else "")
    if answer["reason"] == "narrowed":
        text += f"; it is narrowed by {answer['detail']}"
    elif answer["reason"] == "expired_trust":
        text += "; it has expired"
    return text


def change_pairs(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """What would have turned the verdict: a label, empty from the second on, and the change."""
    label = "refused if" if answer["verdict"] == "admit" else "admitted if"
    return [(label if number == 0 else "", _change_text(change)) for number, change in enumerate(answer["changes"])]


def shadow_pairs(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """What the entries would change that are only watched."""
    if answer["shadow"] is None:
        return []
    return [("watched", f"with the entries of shadow = true acted on: {answer['shadow']}")]


def _change_text(change: dict[str, str]) -> str:
    return f"{change['condition']} ({change['where']})" if change["where"] else change["condition"]
