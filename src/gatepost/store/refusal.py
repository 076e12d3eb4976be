"""A refusal or deferral of the past, by the reference in its reply.

Why: a person reads "[K7Q2M9XD-1]" over the telephone, and the operator must be able to say which rule it was, what was
    known of the client, and whether the same would pass now.
Trust: what a person typed or copied, with the misreadings that go with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from gatepost.facts import Session, Transaction
from gatepost.smtp.path import ForwardPath, Mailbox
from gatepost.store.backlog import find
from gatepost.store.record import Entry
from gatepost.verdict import Defer, Finding, Reason, Refuse

# As the gate makes them: no I, L, O or U, so that a reference can be read out over the telephone.
_REFERENCE = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}-[0-9]{1,9}")
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_MISREAD = str.maketrans("OIL\u2010\u2011\u2012\u2013\u2212", "011-----")


class Refusal(NamedTuple):
    """One refusal or deferral that carried a reference.

    Attributes:
        stage: "mail", "rcpt" or "content".
        transaction: the facts, its session's among them.
        forward_path: None where the whole transaction was refused.
        authors: whom the From field names, where the content was refused for it.
        backend: which the transaction went to, "" before its first recipient.
        verdict: an administrator's own wording is not in it; ``reply`` has it.
        reply: its first line.
    """

    reference: str
    stage: str
    transaction: Transaction
    forward_path: ForwardPath | None
    authors: tuple[Mailbox, ...]
    backend: str
    findings: tuple[Finding, ...]
    verdict: Refuse | Defer
    reply: str


def refusal_of(session: Session, entry: Entry) -> Refusal | None:
    """The refusal that an entry of the journal tells of; None where it is none of the policy's."""
    try:
        reason = Reason[entry.reason.upper()]
    except KeyError:
        return None
    return Refusal(
        reference=entry.reference,
        stage=entry.stage,
        transaction=Transaction(session, entry.reverse_path, entry.recipients, entry.at),
        forward_path=entry.forward_path,
        authors=entry.authors,
        backend=entry.backend,
        findings=entry.findings,
        verdict=Refuse(reason, entry.by, entry.detail, None, entry.hint)
        if entry.verdict == "refused"
        else Defer(reason, entry.by, entry.detail),
        reply=entry.reply,
    )


def waiting(directory: Path, reference: str) -> tuple[Session, Entry] | None:
    """The verdict that carried this reference, where it still stands in a backlog.

    Args:
        directory: of the backlog.

    Raises:
        StorageError: the files cannot be read, or a newer version wrote the line.
    """
    for record in find(directory, f'"reference":"{reference}"'.encode()):
        for entry in record.entries:
            if entry.reference == reference:
                return record.session, entry
    return None


def reference_of(typed: str) -> str | None:
    """The reference in what a person typed or copied; None where there is none.

    Args:
        typed: in any case, with or without brackets, or the whole reply around it; O for 0 and I or L for 1 are
            understood, and the dashes that a text program makes of a hyphen.
    """
    bracketed = _BRACKETED.findall(typed)
    reference = (bracketed[-1] if bracketed else typed).strip().upper().translate(_MISREAD)
    return reference if _REFERENCE.fullmatch(reference) else None
