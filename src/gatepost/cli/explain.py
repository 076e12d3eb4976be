"""``gatepost explain``: what would become of one message, or why one was refused, and what would have changed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from gatepost import config
from gatepost.auth.accounts import account_name
from gatepost.cli import BAD_NEWS, DONE, decided
from gatepost.cli.refused import explain_reference
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import values
from gatepost.errors import GatepostError
from gatepost.facts import Client, Identity, IPAddress, MailboxLogin, Session, Transaction, client_address
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.smtp.path import PathDefect, parse_forward_path, parse_reverse_path
from gatepost.smtp.reply import Reply

T = TypeVar("T")


def explain(
    reference: Annotated[
        str | None, Parameter(help="The reference in a reply, such as K7Q2M9XD-1; or the whole reply, in quotes.")
    ] = None,
    /,
    *,
    client: Annotated[str | None, Parameter(help="The client's IP address.")] = None,
    reverse_path: Annotated[
        str | None, Parameter(help='Who the mail claims to come from, as in MAIL FROM; "<>" for a bounce.')
    ] = None,
    forward_path: Annotated[str | None, Parameter(help="Whom it is for, as in RCPT TO.")] = None,
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
    """Say why a message was refused, or what would become of one; by which rule, and what would have changed it.

    With the reference in a reply: what was decided then, on what facts, and what the same facts would meet under the
    configuration as it is now. With --client, --reverse-path and --forward-path: what the gate would do with them at
    this moment. Host names in the rules are looked up in DNS. Exit code: 0 admitted, 1 refused, deferred or not found
    (of a reference: now), 2 the question cannot be asked.
    """
    needed = {"--client": client, "--reverse-path": reverse_path, "--forward-path": forward_path}
    others = {
        "--account": account, "--certificate": certificate, "--mailbox-login": mailbox_login, "--listen": listen,
        "--helo": helo or None, "--tls": tls,
    }  # fmt: skip
    if reference is not None:
        given = [option for option, value in (needed | others).items() if value is not None]
        if given:
            raise GatepostError(
                f"a reference says it all: leave {_and(given)} out, or the reference, to ask about another message"
            )
        return explain_reference(reference, config_path, as_json=as_json)
    if client is None or reverse_path is None or forward_path is None:
        missing = [option for option, value in needed.items() if value is None]
        raise GatepostError(
            "say what to explain: the reference in a reply, such as K7Q2M9XD-1, or a message by --client, "
            f"--reverse-path and --forward-path; {_and(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
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
        hosts, notes = asyncio.run(decided.hosts(gate.rules, address))
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
        answer |= decided.at_rcpt(gate, listener, Transaction(session, reverse, 0, now), forward) | {"notes": notes}
    if as_json:
        say_json(answer)
    else:
        _tell(answer)
    return DONE if answer["verdict"] == "admit" else BAD_NEWS


def _and(options: list[str]) -> str:
    """The options in a sentence: "--a, --b and --c"."""
    return " and ".join(part for part in (", ".join(options[:-1]), options[-1]) if part)


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


def _tell(answer: dict[str, Any]) -> None:
    admitted = answer["verdict"] == "admit"
    if admitted:
        say(f"ADMITTED, and handed to the backend {answer['backend']}, whose reply the client sees", "bold green")
    else:
        word = "DEFERRED" if answer["verdict"] == "defer" else "REFUSED"
        say(f"{word} with {answer['reply']}", "bold red")
    say(f"client  {answer['client']} at listener {answer['listen']}")
    say(f"mail    from {answer['reverse_path']} to {answer['forward_path']}")
    say(f"rule    {decided.rule_text(answer)}")
    for line in decided.change_lines(answer):
        say(line)
    for note in answer["notes"]:
        say(f"note    {note}", "yellow")
