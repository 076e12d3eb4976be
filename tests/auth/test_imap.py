"""Logins at IMAP servers: Dovecot, and servers that misbehave."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.auth.parts import PASSWORDS, is_no, is_unknown, is_yes, password, serving, tells, trusting
from tests.auth.scripted import (
    HAZARDS,
    Answer,
    Scripted,
    and_hang_up,
    one_by_one,
    patience_s,
    start_tls,
    within_tls,
)
from tests.servers import Dovecot

from gatepost.auth import Denied, Outcome, Unavailable, Verified
from gatepost.auth.imap import ImapVerifier
from gatepost.auth.settings import LoginServer
from gatepost.smtp.sasl import Password

ALICE = Password("alice", "wonder")


@pytest.fixture(scope="module")
def dovecot(certificate: Path) -> Iterator[Dovecot]:
    with Dovecot(users=PASSWORDS, certificate=certificate) as server:
        yield server


def at(port: int, tls: str = "off", **options: Any) -> LoginServer:
    return LoginServer("127.0.0.1", port, tls, **options)


def capable(*words: str) -> bytes:
    return f"* CAPABILITY {' '.join(('IMAP4rev1', *words))}\r\n%T OK done\r\n".encode()


def well_behaved(**other: Answer) -> Scripted:
    answers: dict[str, Answer] = {
        "CAPABILITY": capable("AUTH=PLAIN"),
        "LOGIN": b"%T OK in\r\n",
        "LOGOUT": and_hang_up(b"* BYE\r\n%T OK\r\n"),
    }
    return Scripted(other.pop("greeting", b"* OK hello\r\n"), answers | other)


async def ask(server: Scripted, credentials: Password = ALICE, tls: str = "off", **options: Any) -> Outcome:
    async with server:
        return await ImapVerifier(at(server.port, tls, **options)).verify(credentials)


# ---- Dovecot


@pytest.mark.parametrize("user", PASSWORDS)
async def test_the_right_password_is_a_yes_and_a_wrong_one_a_no(dovecot: Dovecot, user: str) -> None:
    verifier = ImapVerifier(at(dovecot.imap_port))
    assert is_yes(await verifier.verify(password(user)), user)
    assert is_no(await verifier.verify(Password(user, PASSWORDS[user][:-1] + "?")))


async def test_a_user_nobody_knows_is_a_no(dovecot: Dovecot) -> None:
    verifier = ImapVerifier(at(dovecot.imap_port))
    for user in ("nobody@example.com", "nöbödy@example.com", 'a"b\\c', "*", "%", "{5}", "() NIL"):
        assert is_no(await verifier.verify(Password(user, "wonder"))), user


@pytest.mark.parametrize("tls", ["opportunistic", "required", "implicit"])
async def test_tls(dovecot: Dovecot, authority: trustme.CA, tls: str) -> None:
    port = dovecot.imaps_port if tls == "implicit" else dovecot.imap_port
    verifier = ImapVerifier(at(port, tls), judged=trusting(authority))
    assert is_yes(await verifier.verify(password("octets@example.com")), "octets@example.com")
    assert is_no(await verifier.verify(password("octets@example.com", "wrong")))


async def test_a_certificate_that_nobody_vouches_for(dovecot: Dovecot) -> None:
    outcome = await ImapVerifier(at(dovecot.imap_port, "required")).verify(password("alice@example.com"))
    assert isinstance(outcome, Unavailable)
    assert "TLS handshake failed" in outcome.why


async def test_a_changed_password_and_a_server_that_is_gone() -> None:
    with Dovecot(users={"alice@example.com": "wonder"}) as server:
        verifier = ImapVerifier(at(server.imap_port))
        assert is_yes(await verifier.verify(password("alice@example.com")), "alice@example.com")
        server.set_password("alice@example.com", "changed")
        assert is_no(await verifier.verify(password("alice@example.com")))
        server.stop()
        assert is_unknown(await verifier.verify(password("alice@example.com", "changed")))


# ---- what is said


@pytest.mark.parametrize(
    ("user", "secret", "lines"),
    [
        ("alice", "wonder", [b'g2 LOGIN "alice" "wonder"']),
        ("al ice", 'a"b\\c', [b'g2 LOGIN "al ice" "a\\"b\\\\c"']),
        ("alice", "p\u00e4ss", [b'g2 LOGIN "alice" {5}', b"p\xc3\xa4ss"]),
        ("\u00e4", "\u00f6", [b"g2 LOGIN {2}", b"\xc3\xa4 {2}", b"\xc3\xb6"]),
        ("\u00e4", "wonder", [b"g2 LOGIN {2}", b'\xc3\xa4 "wonder"']),
    ],
)
async def test_how_strings_are_said(user: str, secret: str, lines: list[bytes]) -> None:
    """Each literal waits until the server wants it.  RFC 9051 §4.3."""
    literals = [b"+ go ahead\r\n"] * (len(lines) - 1) + [b"%T OK in\r\n"]

    async def answer(peer: Any) -> None:
        await peer.say(literals.pop(0))

    server = well_behaved(LOGIN=answer, ELSE=answer)
    assert is_yes(await ask(server, Password(user, secret)), user)
    assert server.heard == [b"g1 CAPABILITY", *lines, b"g0 LOGOUT"]


async def test_a_literal_that_is_not_wanted_is_not_sent() -> None:
    server = well_behaved(LOGIN=b"%T NO no literals\r\n")
    assert is_no(await ask(server, Password("alice", "p\u00e4ss")))
    assert b"p\xc3\xa4ss" not in server.heard


@pytest.mark.parametrize("text", ["a\r\ng3 NOOP", "a\nb", "a\0b", ""])
async def test_nothing_is_said_that_would_be_two_commands(text: str) -> None:
    server = well_behaved()
    async with server:
        assert is_no(await ImapVerifier(at(server.port)).verify(Password(text, "wonder")))
        assert is_no(await ImapVerifier(at(server.port)).verify(Password("alice", text)))
    assert server.connections == 0


async def test_authenticate_where_login_is_disabled() -> None:
    answers: dict[str, Answer] = {
        "CAPABILITY": capable("LOGINDISABLED", "AUTH=PLAIN"),
        "AUTHENTICATE": b"+ \r\n",
        "ELSE": b"g2 OK in\r\n",
    }
    server = well_behaved(**answers)
    assert is_yes(await ask(server), "alice")
    response = base64.b64encode(b"\0alice\0wonder")
    assert server.heard == [b"g1 CAPABILITY", b"g2 AUTHENTICATE PLAIN", response, b"g0 LOGOUT"]
    assert is_no(await ask(well_behaved(**answers | {"ELSE": b"g2 NO [AUTHENTICATIONFAILED]\r\n"})))
    assert is_unknown(await ask(well_behaved(**answers | {"ELSE": b"+ \r\n"})))
    assert is_unknown(await ask(well_behaved(CAPABILITY=capable("LOGINDISABLED", "AUTH=NTLM"))))


# ---- servers that misbehave


@pytest.mark.parametrize("point", ["greeting", "CAPABILITY", "LOGIN"])
@pytest.mark.parametrize("hazard", HAZARDS)
async def test_trouble_is_never_an_answer(point: str, hazard: str) -> None:
    outcome = await ask(well_behaved(**{point: HAZARDS[hazard]}), timeout_s=patience_s(hazard))
    assert is_unknown(outcome), outcome
    assert not tells("wonder", outcome)


@pytest.mark.parametrize(
    "greeting",
    [b"* PREAUTH you are root\r\n", b"* BYE too busy\r\n", b"* NO\r\n", b"OK\r\n", b"+ OK\r\n", b"g1 OK\r\n"],
)
async def test_no_greeting_is_a_yes(greeting: bytes) -> None:
    server = well_behaved(greeting=greeting)
    assert is_unknown(await ask(server))
    assert server.heard == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"%T OK\r\n", Verified),
        (b"%T ok [CAPABILITY IMAP4rev1 X] in\r\n", Verified),
        (b"* CAPABILITY X\r\n* OK [ALERT] mind the gap\r\n%T OK [REFERRAL imap://x/] in\r\n", Verified),
        (b"%T OKAY\r\n", Unavailable),
        (b"%T\r\n", Unavailable),
        (b"g9 OK\r\n%T NO\r\n", Unavailable),
        (b"* OK\r\n%T NO\r\n", Denied),
        (b"* PREAUTH\r\n%T NO\r\n", Denied),
        (b"* BYE too many errors\r\n%T NO\r\n", Denied),
        (b"%T NO\r\n%T OK\r\n", Denied),
        (b"%T NO [AUTHENTICATIONFAILED] no\r\n", Denied),
        (b"%T NO [AUTHORIZATIONFAILED] no\r\n", Denied),
        (b"%T NO [EXPIRED] no\r\n", Denied),
        (b"%T NO [NEWCODE with words] no\r\n", Denied),
        (b"%T NO [ no code\r\n", Denied),
        (b"%T NO [UNAVAILABLE] User lookup failed\r\n", Unavailable),
        (b"%T no [unavailable]\r\n", Unavailable),
        (b"%T NO [PRIVACYREQUIRED] no\r\n", Unavailable),
        (b"%T NO [CONTACTADMIN] no\r\n", Unavailable),
        (b"%T NO [INUSE] no\r\n", Unavailable),
        (b"%T NO [LIMIT] no\r\n", Unavailable),
        (b"%T NO [SERVERBUG] no\r\n", Unavailable),
        (b"%T NO [OVERQUOTA] no\r\n", Unavailable),
        (b"%T NO [REFERRAL imap://other/] no\r\n", Unavailable),
        (b"%T BAD what\r\n", Unavailable),
        (b"%T BYE\r\n", Unavailable),
        (b"%T PREAUTH\r\n", Unavailable),
        (b"+ more\r\n", Unavailable),
        (b"* X {4}\r\n%T OK\r\n%T NO\r\n", Unavailable),
    ],
)
async def test_what_an_answer_to_login_means(answer: bytes, kind: type) -> None:
    outcome = await ask(well_behaved(LOGIN=answer))
    assert isinstance(outcome, kind), outcome


async def test_an_answer_that_repeats_the_secret_is_not_repeated() -> None:
    for answer in (b"%T BAD wonder\r\n", b"%T NO [WONDER] wonder\r\n", b"wonder\r\n", b"%T wonder\r\n"):
        outcome = await ask(well_behaved(LOGIN=answer))
        assert not isinstance(outcome, Verified)
        assert not tells("wonder", outcome)


async def test_answers_octet_by_octet() -> None:
    slow = well_behaved(
        greeting=one_by_one(b"* OK hello\r\n"),
        CAPABILITY=one_by_one(capable()),
        LOGIN=one_by_one(b"* OK\r\n%T OK in\r\n"),
    )
    assert is_yes(await ask(slow), "alice")


# ---- TLS


async def test_what_was_said_before_tls_counts_for_nothing(certificate: Path) -> None:
    """In plain text somebody in between has taken LOGINDISABLED away, or put it there.  RFC 9051 §6.2.1."""
    server = well_behaved(
        STARTTLS=start_tls(b"%T OK go\r\n"),
        CAPABILITY=within_tls(capable(), capable("STARTTLS", "LOGINDISABLED")),
        LOGIN=within_tls(b"%T OK\r\n", b"%T NO\r\n"),
    )
    server.tls = serving(certificate)
    assert is_yes(await ask(server, tls="opportunistic"), "alice")
    assert server.heard[:3] == [b"g1 CAPABILITY", b"g2 STARTTLS", b"g3 CAPABILITY"]


async def test_octets_behind_starttls_end_the_login(certificate: Path) -> None:
    server = well_behaved(
        CAPABILITY=capable("STARTTLS"), STARTTLS=start_tls(b"%T OK\r\n", behind=b"g3 OK\r\ng4 OK\r\n")
    )
    server.tls = serving(certificate)
    assert is_unknown(await ask(server, tls="opportunistic"))
    assert server.heard == [b"g1 CAPABILITY", b"g2 STARTTLS"]


@pytest.mark.parametrize("capabilities", [capable(), capable("STARTTLS")])
async def test_tls_that_is_required_and_refused(capabilities: bytes) -> None:
    server = well_behaved(CAPABILITY=capabilities, STARTTLS=b"%T NO\r\n")
    assert is_unknown(await ask(server, tls="required"))
    assert not any(b"wonder" in line for line in server.heard)
