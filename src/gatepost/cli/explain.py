"""``gatepost explain``: what would become of one message, or why one was refused, and what would have changed it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gatepost import config
from gatepost.answers import described, refused
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.errors import GatepostError


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
        answer = refused.by_reference(config.load_file(config.find(config_path)), reference)
        if as_json:
            say_json(answer)
        else:
            _tell_refusal(answer)
        return DONE if answer["found"] and answer["now"]["verdict"] == "admit" else BAD_NEWS
    if client is None or reverse_path is None or forward_path is None:
        missing = [option for option, value in needed.items() if value is None]
        raise GatepostError(
            "say what to explain: the reference in a reply, such as K7Q2M9XD-1, or a message by --client, "
            f"--reverse-path and --forward-path; {_and(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    asked = described.Question(
        client, reverse_path, forward_path, account, certificate, mailbox_login, listen, helo, tls or ""
    )
    answer = described.answer(config.load_file(config.find(config_path)), asked)
    if as_json:
        say_json(answer)
    else:
        _tell(answer)
    return DONE if answer["verdict"] == "admit" else BAD_NEWS


def _and(options: list[str]) -> str:
    """The options in a sentence: "--a, --b and --c"."""
    return " and ".join(part for part in (", ".join(options[:-1]), options[-1]) if part)


def _tell_refusal(answer: dict[str, Any]) -> None:
    if not answer["found"]:
        say(f"not found: {answer['reference']}", "bold red")
        for reason in answer["reasons"]:
            say(f"        {reason}")
        return
    say(f"{'DEFERRED' if answer['verdict'] == 'defer' else 'REFUSED'} with {answer['reply']}", "bold red")
    _tell_lines(refused.lines(answer), "bold green" if answer["now"]["verdict"] == "admit" else "bold red")


def _tell_lines(lines: list[tuple[str, str]], now_style: str = "") -> None:
    styles = {"now": now_style, "note": "yellow", "watched": "yellow"}
    width = 8
    for label, text in lines:
        if label:  # what follows without a label stands below
            width = 12 if label.endswith(" if") else 8
        say(f"{label:<{width}}{text}", styles.get(label, ""))


def _tell(answer: dict[str, Any]) -> None:
    if answer["verdict"] == "admit":
        say(f"ADMITTED, and handed to the backend {answer['backend']}, whose reply the client sees", "bold green")
    else:
        word = "DEFERRED" if answer["verdict"] == "defer" else "REFUSED"
        say(f"{word} with {answer['reply']}", "bold red")
    _tell_lines([pair for pair in described.lines(answer) if pair[0] != "passes"])
