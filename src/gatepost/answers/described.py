"""What would become of a message that somebody describes, and what would have changed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from gatepost.answers import decided
from gatepost.auth.account import account_name
from gatepost.config import Config, values
from gatepost.errors import GatepostError
from gatepost.facts import Client, Identity, IPAddress, MailboxLogin, Session, Transaction, client_address
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.smtp.path import PathDefect, parse_forward_path, parse_reverse_path
from gatepost.smtp.reply import Reply

T = TypeVar("T")

TLS_VERSIONS: Final = ("1.0", "1.1", "1.2", "1.3")


class Question(NamedTuple):
    """A message as a person describes it: each member as it was typed, None or "" where nothing was.

    Attributes:
        mailbox_login: how long ago somebody read mail from the client's address, such as "5m".
        tls: the version, such as "1.3".
    """

    client: str
    reverse_path: str
    forward_path: str
    account: str | None = None
    certificate: str | None = None
    mailbox_login: str | None = None
    listen: str | None = None
    helo: str = ""
    tls: str = ""


def answer(loaded: Config, asked: Question) -> dict[str, Any]:
    """The verdict at this moment, the rule, and what would have changed it; names in the rules are asked of DNS.

    Raises:
        GatepostError: the question cannot be asked.
    """
    gate = loaded.gate
    address = _address(asked.client)
    listener = _listener(gate, asked.listen)
    if asked.tls and asked.tls not in TLS_VERSIONS:
        raise GatepostError(f'--tls "{asked.tls}": there is no such version; write one of {", ".join(TLS_VERSIONS)}')
    told: dict[str, Any] = {
        "client": str(address),
        "listen": listener.name,
        "reverse_path": asked.reverse_path,
        "forward_path": asked.forward_path,
    }
    reverse = parse_reverse_path(_path_octets(asked.reverse_path), smtputf8=not asked.reverse_path.isascii())
    forward = parse_forward_path(_path_octets(asked.forward_path), smtputf8=not asked.forward_path.isascii())
    if isinstance(reverse, PathDefect):
        told |= _defect(reverse.reply, "reverse_path")
    elif isinstance(forward, PathDefect):
        told |= _defect(forward.reply, "forward_path")
    else:
        hosts, notes = asyncio.run(decided.hosts(gate.rules, address))
        now = datetime.now(UTC).timestamp()
        session = Session(
            reference="",
            client=Client(address, 0),
            listen=listener.name,
            role=listener.role,
            hello=asked.helo,
            esmtp=True,
            tls=f"TLSv{asked.tls}" if asked.tls else "",
            identity=None
            if asked.account is None
            else Identity(account_name(asked.account) or asked.account.lower(), "PLAIN"),
            hosts=hosts,
            auth_required=listener.auth == "required",
            certificate=_value(values.fingerprint, "--certificate", asked.certificate) or "",
            mailbox_login=_mailbox_login(asked.mailbox_login, now),
        )
        transaction = Transaction(session, reverse, 0, now)
        shadow = decided.shadow(gate, transaction, forward)
        told |= decided.at_rcpt(gate, listener, transaction, forward) | {"shadow": shadow, "notes": notes}
    return told


def lines(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The answer in words: a label and what stands behind it; a label may be empty."""
    backend = answer["backend"]
    return [
        *([("passes", f"to the backend {backend}, whose reply the client sees")] if backend else []),
        ("client", f"{answer['client']} at listener {answer['listen']}"),
        ("mail", f"from {answer['reverse_path']} to {answer['forward_path']}"),
        ("rule", decided.rule_text(answer)),
        *decided.change_pairs(answer),
        *decided.shadow_pairs(answer),
        *(("note", note) for note in answer["notes"]),
    ]


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
        "shadow": None,
        "notes": [],
    }
