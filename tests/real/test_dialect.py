"""What Postfix, Exim and OpenSMTPD make of addresses, users and ends of messages, asked as the gate asks them."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from tests.backend.parts import settings
from tests.real.test_backends import run
from tests.servers import START_S, Exim, OpenSmtpd, Postfix, Server

from gatepost.backend import dialect
from gatepost.backend.dialect import FOREIGN, FORMS, POSTMASTER, Answer, Dialect
from gatepost.smtp.path import Mailbox

NOW = 1_795_650_000.0

# As Debian sets Postfix up: the domain in mydestination, and allow_percent_hack and swap_bangpath at their defaults.
OF_DEBIAN = ["mydestination = example.com", "virtual_mailbox_domains ="]
USERS = "local_recipient_maps = inline:{alice=1, bob=1, postmaster=1}"


class Case(NamedTuple):
    """A server, and what it says.

    Attributes:
        rereads: the forms of its own domain that it reads as another address; None where nobody can tell.
        kept: forms that it takes and the gate never sends.
    """

    make: type[Server]
    options: list[str]
    accept_all: Answer
    postmaster: Answer
    foreign: Answer
    rereads: set[str] | None
    kept: set[str]


TAKEN, REFUSED = Answer.TAKEN, Answer.REFUSED
ROUTINGS = {"percent", "bang", "quoted at", "quoted percent"}
WITHOUT_DOMAIN = {"trailing at", "no domain", "percent, no domain", "bang, no domain", "quoted at, no domain"}
KEPT = {"source route", *WITHOUT_DOMAIN}
CASES = {
    "Postfix, virtual domain": Case(Postfix, [], REFUSED, REFUSED, TAKEN, set(), KEPT),
    "Postfix, as Debian": Case(
        Postfix, [*OF_DEBIAN, USERS], REFUSED, TAKEN, TAKEN, ROUTINGS | {"two ats"}, KEPT
    ),
    "Postfix, without the hacks": Case(
        Postfix,
        [*OF_DEBIAN, USERS, "allow_percent_hack = no", "swap_bangpath = no", "resolve_dequoted_address = no"],
        REFUSED, TAKEN, TAKEN, set(), KEPT - {"trailing at"},
    ),
    "Postfix, relays nothing": Case(
        Postfix,
        [*OF_DEBIAN, USERS, "mynetworks = 192.0.2.1/32"],
        REFUSED, TAKEN, REFUSED, set(), set(),
    ),
    "Postfix, luser_relay": Case(
        Postfix,
        [*OF_DEBIAN, "local_recipient_maps =", "luser_relay = alice@example.com"],
        TAKEN, TAKEN, TAKEN, None, KEPT,
    ),
    "Postfix, catch-all": Case(
        Postfix,
        ["virtual_alias_maps = inline:{ {@example.com = alice@example.com} }"],
        TAKEN, TAKEN, TAKEN, None, KEPT,
    ),
    "Exim": Case(Exim, [], REFUSED, REFUSED, TAKEN, set(), {"source route"}),
    "OpenSMTPD": Case(OpenSmtpd, [], REFUSED, REFUSED, REFUSED, set(), set()),
}  # fmt: skip


def asked(server: Server, **changes) -> Dialect:
    return run(dialect.ask(settings(server.port, **changes), "example.com", nonce="k7w2q9x4", now=NOW))


@pytest.mark.parametrize("name", CASES)
def test_what_a_server_makes_of_each_form(name: str) -> None:
    case = CASES[name]
    with case.make(**({"settings": case.options} if case.options else {})) as server:
        found = asked(server)
    table = "\n".join(map(str, found.heard))
    assert found.accept_all is case.accept_all, table
    assert (found.answer(POSTMASTER), found.answer(FOREIGN)) == (case.postmaster, case.foreign), table
    here = [form for form in FORMS if form.lands_here]
    if case.rereads is None:
        assert {found.rereads(form) for form in here} == {Answer.UNKNOWN}, table
    else:
        assert {form.id for form in here if found.rereads(form) is TAKEN} == case.rereads, table
    assert {form.id for form in FORMS if not form.lands_here and found.answer(form) is TAKEN} == case.kept, table
    assert found.open_to_strangers == (), table


def test_what_is_only_asked_for_reaches_nobody() -> None:
    """Neither a mailbox nor the queue has anything afterwards."""
    with Postfix(settings=[*OF_DEBIAN, USERS]) as server:
        asked(server)
        assert "queued" not in server.log
        until = time.monotonic() + START_S
        while list((server.directory / "queue" / "incoming").iterdir()):  # Postfix begins a file, and drops it
            assert time.monotonic() < until, server.log
            time.sleep(0.05)
        assert not server.mailbox("alice").exists()


def test_a_server_is_asked_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    pem = tmp_path / "pair.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(pem)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with Postfix(certificate=str(pem)) as server:
        found = run(
            dialect.ask(settings(server.port, tls="required"), "example.com", nonce="k7w2q9x4", now=NOW, tls=context)
        )
    assert found.tls.startswith("TLSv1.")
    assert "STARTTLS" in found.keywords
    assert found.accept_all is REFUSED


@pytest.mark.parametrize(
    ("make", "options", "ends"),
    [
        (Postfix, ["smtpd_forbid_bare_newline = yes", "smtpd_forbid_bare_newline_exclusions ="], set()),
        (Postfix, ["smtpd_forbid_bare_newline = no"], {"LF . LF", "LF . CRLF", "CRLF . LF", "CRLF . CR CRLF"}),
        (Exim, [], set()),
        (OpenSmtpd, [], {"LF . LF", "LF . CRLF", "CRLF . LF"}),
    ],
    ids=["Postfix, bare newlines forbidden", "Postfix, bare newlines taken", "Exim", "OpenSMTPD"],
)
def test_which_ends_of_a_message_a_server_takes(make: type[Server], options: list[str], ends: set[str]) -> None:
    with make(**({"settings": options} if options else {})) as server:
        heard = run(
            dialect.end_of_data(settings(server.port), Mailbox("alice", "example.com"), nonce="k7w2q9x4", now=NOW)
        )
        assert {one.id for one in heard if one.answer is TAKEN} == ends, heard
        assert Answer.UNKNOWN not in {one.answer for one in heard}, heard
        assert all(b"Nothing needs to be done." in octets for octets in server.arrived("alice", 1, first=b"Date: "))
