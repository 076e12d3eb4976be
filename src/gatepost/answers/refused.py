"""A refusal of the past by the reference in its reply, and what the same would meet now."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gatepost import store
from gatepost.answers import decided, records
from gatepost.config import Config
from gatepost.errors import GatepostError
from gatepost.facts import Session, Transaction
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import relay
from gatepost.store import Refusal
from gatepost.verdict import Defer, Finding, Reason


def by_reference(loaded: Config, typed: str) -> dict[str, Any]:
    """What was decided then, on what facts, and what the same facts meet now.

    Args:
        typed: the reference, or the whole reply, as a person types it.

    Returns:
        With "found" False and "reasons" where it is not found.

    Raises:
        GatepostError: it holds no reference; StorageError: the journal cannot be read.
    """
    reference = store.reference_of(typed)
    if reference is None:
        raise GatepostError(
            f'"{typed}" holds no reference: it looks like K7Q2M9XD-1, and stands in brackets at the end of a refusal'
        )
    with records.journal(loaded) as journal:
        kept = journal.refusal(reference)
        since, name = journal.kept_since(), journal.name
    refusal = None if kept is None else store.refusal_of(kept.session, kept.entry)
    if refusal is None:
        return {"reference": reference, "found": False, "reasons": _reasons(loaded, since, name)}
    return _then(refusal) | {"now": _now(loaded.gate, refusal)}


def _reasons(loaded: Config, since: float | None, name: str) -> list[str]:
    """Why it may be that nothing is found."""
    kept = (
        f"the journal in {name} is empty"
        if since is None
        else f"the journal in {name} begins on {moment(since)}: an older one is gone, and the gate's log may have it"
    )
    return [
        kept,
        *([] if loaded.gate.journal.enabled else ["the journal is switched off: [journal] enabled = false"]),
        f"the gate may keep its data elsewhere than [gate] data in {loaded.config_path or 'the embedded default'} says",
        "it may be another gate's: its greeting says which one a client spoke to",
        "one of the last moment may not be written yet, and where the disk is full it never is",
    ]


# --- Then -------------------------------------------------------------------------------------------------------------


def _then(refusal: Refusal) -> dict[str, Any]:
    """What was decided, with all that it was decided on."""
    transaction, verdict, path = refusal.transaction, refusal.verdict, refusal.forward_path
    session = transaction.session
    identity, login = session.identity, session.mailbox_login
    return {
        "reference": refusal.reference,
        "found": True,
        "time": stamp(transaction.now),
        "stage": refusal.stage,
        "client": str(session.client.address),
        "port": session.client.port,
        "listen": session.listen,
        "role": session.role,
        "helo": session.hello,
        "esmtp": session.esmtp,
        "tls": session.tls,
        "account": None if identity is None else identity.account,
        "mechanism": None if identity is None else identity.mechanism,
        "verifier": None if identity is None else identity.verifier,
        "device": None if identity is None else identity.device,
        "addresses": [] if identity is None else list(identity.addresses),
        "auth_required": session.auth_required,
        "certificate": session.certificate,
        "hosts": list(session.hosts),
        "mailbox_login": None if login is None else {"account": login.account, "time": stamp(login.at)},
        "suspended": session.suspended,
        "listen_suspended": session.listen_suspended,
        "reverse_path": str(transaction.reverse_path),
        "forward_path": None if path is None else str(path),
        "shape": None if path is None else path.shape.value,
        "recipients": transaction.recipients,
        "authors": [str(author) for author in refusal.authors],
        "backend": refusal.backend or None,
        "findings": [
            {"check": found.check, "result": found.result.value, "evidence": found.evidence}
            for found in refusal.findings
        ],
        "verdict": "defer" if isinstance(verdict, Defer) else "refuse",
        "reason": verdict.reason.name.lower(),
        "why": decided.why(verdict, past=True),
        "where": verdict.where,
        "detail": verdict.detail,
        "reply": refusal.reply,
    }


# --- Now --------------------------------------------------------------------------------------------------------------


def _now(gate: GateSettings, refusal: Refusal) -> dict[str, Any]:
    """The same facts, at this moment, under the configuration as it is."""
    notes: list[str] = []
    listener = _listener(gate, refusal.transaction.session, notes)
    transaction = _this_moment(refusal.transaction, datetime.now(UTC).timestamp())
    hosts, unknown = asyncio.run(decided.hosts(gate.rules, transaction.session.client.address))
    notes += unknown
    session = transaction.session._replace(
        auth_required=listener.auth == "required",
        hosts=tuple(dict.fromkeys((*transaction.session.hosts, *hosts))),
    )
    transaction = transaction._replace(session=session)
    answer = _decided_again(gate, listener, transaction, refusal, notes)
    answer["shadow"] = decided.shadow(gate, transaction, refusal.forward_path, refusal.findings)
    then = "defer" if isinstance(refusal.verdict, Defer) else "refuse"
    same = (answer["verdict"], answer["reason"]) == (then, refusal.verdict.reason.name.lower())
    return {"same": same, **answer, "notes": notes}


def _listener(gate: GateSettings, session: Session, notes: list[str]) -> ListenSettings:
    """The listener as it is configured now, or as much as is known of it."""
    for listen in gate.listens:
        if listen.name == session.listen:
            return listen
    notes.append(f"the configuration has no listener {session.listen} any more; it is taken for what it was")
    return ListenSettings(
        session.listen, (), role=session.role, auth="required" if session.auth_required else "offered"
    )


def _this_moment(transaction: Transaction, now_s: float) -> Transaction:
    """The same, as if it happened now: a login to the mailbox is as long ago as it was then."""
    session, login = transaction.session, transaction.session.mailbox_login
    if login is not None:
        session = session._replace(mailbox_login=login._replace(at=login.at + now_s - transaction.now))
    return transaction._replace(session=session, now=now_s)


def _decided_again(
    gate: GateSettings, listener: ListenSettings, transaction: Transaction, refusal: Refusal, notes: list[str]
) -> dict[str, Any]:
    whole = decided.at_mail(gate, listener, transaction)
    path = refusal.forward_path
    if path is None:
        if whole is None and refusal.stage == "content":
            whole = decided.at_content(gate, listener, transaction, refusal.verdict, refusal.authors)
        return (whole or _accepted(refusal.stage)) | {"chain": []}
    findings = _named_as_now(gate, refusal.findings)
    answer = whole or decided.at_rcpt(gate, listener, transaction, path, findings)
    if refusal.findings and refusal.verdict.reason is Reason.RATE:
        notes.append("whether there is room in this hour, the running gate alone can tell")
    if answer["verdict"] == "admit" and refusal.backend not in ("", answer["backend"]):
        answer |= decided.verdict(gate.rules, Defer(Reason.OTHER_ROUTE), [])
        change = {"condition": "the recipient came in a transaction of its own", "where": ""}
        answer |= {"detail": decided.why(Defer(Reason.OTHER_ROUTE), past=False), "changes": [change]}
    return answer | {"chain": decided.chain(gate.rules, transaction, path, findings)}


def _named_as_now(gate: GateSettings, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The findings on an entry's rate, where the running gate spelled the path of the file in another way."""
    if not findings:
        return ()
    now = {relay.rate_check(Path(entry.where).name): relay.rate_check(entry.where) for entry in gate.rules.trust}
    named = []
    for finding in findings:
        _, _, where = finding.check.partition(" ")
        named.append(finding._replace(check=now.get(relay.rate_check(Path(where).name), finding.check)))
    return tuple(named)


def _accepted(stage: str) -> dict[str, Any]:
    said = "its recipients are decided one by one" if stage == "mail" else "it goes to the backend"
    return {
        "verdict": "admit",
        "reason": "accepted",
        "reply": None,
        "rule": None,
        "detail": f"nothing refuses it any more; {said}",
        "backend": None,
        "changes": [],
    }


# --- In words ---------------------------------------------------------------------------------------------------------

STAGES = {"mail": "MAIL", "rcpt": "RCPT", "content": "the end of content"}


def lines(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """A refusal that was found, in words: a label and what stands behind it; a label may be empty."""
    now = answer["now"]
    when = moment(datetime.fromisoformat(answer["time"]).timestamp())
    rule = f"{answer['why']} ({answer['where']})" if answer["where"] else answer["why"]
    return [
        ("when", f"{when}, at {STAGES[answer['stage']]}"),
        *facts(answer),
        ("rule", rule),
        ("now", now_text(now)),
        *(("", step) for step in now["chain"]),
        *decided.change_pairs(now),
        *decided.shadow_pairs(now),
        *(("note", note) for note in now["notes"]),
    ]


def facts(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """What was known, as far as there was anything."""
    hello = f"{'EHLO' if answer['esmtp'] else 'HELO'} {answer['helo']}" if answer["helo"] else "no EHLO"
    client = (
        f"{answer['client']} at listener {answer['listen']} (role {answer['role']}), {hello}, "
        f"{answer['tls'] or 'without TLS'}"
    )
    facts = [("client", client)]
    if answer["account"] is not None:
        by = ", ".join(
            part
            for part in (
                answer["mechanism"],
                answer["verifier"] and f"verified by {answer['verifier']}",
                answer["device"] and f"device {answer['device']}",
            )
            if part
        )
        facts.append(("account", f"{answer['account']} ({by})"))
    elif answer["auth_required"]:
        facts.append(("account", "none, and the listener asks for one"))
    if answer["certificate"]:
        facts.append(("showed", f"the certificate {answer['certificate']}"))
    if answer["hosts"]:
        facts.append(("host", ", ".join(answer["hosts"])))
    if answer["mailbox_login"] is not None:
        facts.append(
            ("mailbox", f"{answer['mailbox_login']['account']} logged in at {answer['mailbox_login']['time']}")
        )
    if answer["suspended"] or answer["listen_suspended"]:
        facts.append(("trust", f"that in the {'client' if answer['suspended'] else 'listener'} was suspended"))
    facts.append(("mail", _mail(answer)))
    if answer["authors"]:
        facts.append(("author", ", ".join(answer["authors"])))
    facts += [("found", f"{found['check']}: {found['result']}, {found['evidence']}") for found in answer["findings"]]
    return facts


def _mail(answer: dict[str, Any]) -> str:
    text = f"from {answer['reverse_path']}"
    if answer["forward_path"] is not None:
        text += f" to {answer['forward_path']}"
        if answer["shape"] != "plain":
            text += f" (shape {answer['shape']})"
    if answer["recipients"]:
        number = answer["recipients"]
        text += f", {number} {'recipient' if number == 1 else 'recipients'} so far"
        text += f", for the backend {answer['backend']}" if answer["backend"] else ""
    return text


def now_text(now: dict[str, Any]) -> str:
    """What it would meet now, in a sentence."""
    if now["verdict"] == "admit":
        if now["rule"] is None:
            return f"ACCEPTED: {now['detail']}"
        return f"ADMITTED by {decided.rule_text(now)}; goes to the backend {now['backend']}"
    if now["same"]:
        return f"the same, by {decided.rule_text(now)}" if now["rule"] else "the same"
    word = "DEFERRED" if now["verdict"] == "defer" else "REFUSED"
    return f"{word} with {now['reply']}, by {decided.rule_text(now)}"


def moment(seconds: float) -> str:
    """Seconds since the epoch, for a person."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def stamp(seconds: float) -> str:
    """Seconds since the epoch, for a program.  RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
