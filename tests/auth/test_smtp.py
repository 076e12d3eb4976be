"""Logins at SMTP servers: Postfix with Dovecot's SASL, and servers that misbehave."""

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
from tests.servers import Dovecot, Postfix

from gatepost.auth import Denied, Outcome, Unavailable, Verified
from gatepost.auth.settings import LoginServer
from gatepost.auth.smtp import COMMAND_OCTETS_MAX, SmtpVerifier
from gatepost.smtp.sasl import Password

ALICE = Password("alice", "wonder")
PLAIN = base64.b64encode(b"\0alice\0wonder")


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    with Dovecot(users=PASSWORDS) as server:
        yield server


@pytest.fixture(scope="module")
def postfix(dovecot: Dovecot, certificate: Path) -> Iterator[Postfix]:
    sasl = ["smtpd_sasl_auth_enable = yes", "smtpd_sasl_type = dovecot", f"smtpd_sasl_path = {dovecot.auth_path}"]
    with Postfix(certificate=certificate, settings=sasl) as server:
        yield server


def at(port: int, tls: str = "off", **options: Any) -> LoginServer:
    return LoginServer("127.0.0.1", port, tls, **options)


def offering(*keywords: str) -> bytes:
    lines = ("scripted", *keywords)
    return "".join(f"250{' ' if n == len(lines) else '-'}{line}\r\n" for n, line in enumerate(lines, 1)).encode()


def well_behaved(**other: Answer) -> Scripted:
    answers: dict[str, Answer] = {
        "EHLO": offering("AUTH PLAIN LOGIN"),
        "AUTH": b"235 2.7.0 in\r\n",
        "QUIT": and_hang_up(b"221 bye\r\n"),
    }
    return Scripted(other.pop("greeting", b"220 scripted ESMTP\r\n"), answers | other)


async def ask(server: Scripted, credentials: Password = ALICE, tls: str = "off", **options: Any) -> Outcome:
    async with server:
        return await SmtpVerifier(at(server.port, tls, **options), hello="gate.example.com").verify(credentials)


# ---- Postfix


@pytest.mark.parametrize("user", PASSWORDS)
async def test_the_right_password_is_a_yes_and_a_wrong_one_a_no(postfix: Postfix, user: str) -> None:
    verifier = SmtpVerifier(at(postfix.port))
    assert is_yes(await verifier.verify(password(user)), user)
    assert is_no(await verifier.verify(Password(user, PASSWORDS[user][:-1] + "?")))
    assert is_no(await verifier.verify(Password("x" + user, PASSWORDS[user])))


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
async def test_tls(postfix: Postfix, authority: trustme.CA, tls: str) -> None:
    verifier = SmtpVerifier(at(postfix.port, tls), judged=trusting(authority))
    assert is_yes(await verifier.verify(password("octets@example.com")), "octets@example.com")
    assert is_no(await verifier.verify(password("octets@example.com", "wrong")))
    if tls == "required":
        assert is_unknown(await SmtpVerifier(at(postfix.port, tls)).verify(password("alice@example.com")))


async def test_login_where_plain_is_not_offered(dovecot: Dovecot) -> None:
    sasl = ["smtpd_sasl_auth_enable = yes", "smtpd_sasl_type = dovecot", f"smtpd_sasl_path = {dovecot.auth_path}"]
    with Postfix(settings=[*sasl, "smtpd_sasl_mechanism_filter = login"]) as server:
        verifier = SmtpVerifier(at(server.port))
        for user in PASSWORDS:
            assert is_yes(await verifier.verify(password(user)), user)
            assert is_no(await verifier.verify(Password(user, "wrong")))


async def test_a_server_whose_own_verifier_is_gone_knows_nothing() -> None:
    with Dovecot(users=PASSWORDS) as dovecot:
        sasl = ["smtpd_sasl_auth_enable = yes", "smtpd_sasl_type = dovecot", f"smtpd_sasl_path = {dovecot.auth_path}"]
        with Postfix(settings=sasl) as server:
            verifier = SmtpVerifier(at(server.port))
            assert is_yes(await verifier.verify(password("alice@example.com")), "alice@example.com")
            dovecot.stop()
            assert is_unknown(await verifier.verify(password("alice@example.com")))


# ---- what is said


async def test_what_is_said() -> None:
    server = well_behaved()
    assert is_yes(await ask(server), "alice")
    assert server.heard == [b"EHLO gate.example.com", b"AUTH PLAIN " + PLAIN, b"QUIT"]


@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_a_long_response_is_a_line_of_its_own(over: int) -> None:
    """RFC 4954 §4: a command line has 512 octets at most, CRLF included."""
    room = COMMAND_OCTETS_MAX - len(b"AUTH PLAIN \r\n") + over
    octets = room // 4 * 3 + (3 if over > 0 else 0)
    login = Password("alice", "x" * (octets - len(b"\0alice\0")))
    server = well_behaved(AUTH=b"235 in\r\n" if over <= 0 else b"334 \r\n", ELSE=b"235 in\r\n")
    assert is_yes(await ask(server, login), "alice")
    assert all(len(line) + 2 <= COMMAND_OCTETS_MAX for line in server.heard if line.startswith(b"AUTH"))
    assert (b"AUTH PLAIN" in server.heard) == (over > 0)


async def test_auth_login() -> None:
    answers = [b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", b"235 in\r\n"]

    async def answer(peer: Any) -> None:
        await peer.say(answers.pop(0))

    server = well_behaved(EHLO=offering("AUTH CRAM-MD5 LOGIN"), AUTH=answer, ELSE=answer)
    assert is_yes(await ask(server), "alice")
    assert server.heard[1:4] == [b"AUTH LOGIN", b"YWxpY2U=", b"d29uZGVy"]


# ---- servers that misbehave


@pytest.mark.parametrize("point", ["greeting", "EHLO", "AUTH"])
@pytest.mark.parametrize("hazard", HAZARDS)
async def test_trouble_is_never_an_answer(point: str, hazard: str) -> None:
    outcome = await ask(well_behaved(**{point: HAZARDS[hazard]}), timeout_s=patience_s(hazard))
    assert is_unknown(outcome), outcome
    assert not tells("wonder", outcome)
    assert not tells(PLAIN.decode(), outcome)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"235 2.7.0 in", Verified),
        (b"235", Verified),
        (b"235-in\r\n235 indeed", Verified),
        (b"235-in\r\n535 no", Unavailable),
        (b"250 Ok", Unavailable),
        (b"220 Ok", Unavailable),
        (b"334 more", Unavailable),
        (b"535 5.7.8 no", Denied),
        (b"535 no", Denied),
        (b"535 no\r\n235 yes", Denied),
        (b"550 5.7.8 no", Denied),
        (b"550 no", Unavailable),
        (b"554 5.7.1 no", Unavailable),
        (b"454 4.7.0 later", Unavailable),
        (b"454 4.7.8 later", Unavailable),
        (b"432 4.7.12 transition", Unavailable),
        (b"421 4.3.2 closing", Unavailable),
        (b"500 what", Unavailable),
        (b"501 what", Unavailable),
        (b"504 what", Unavailable),
        (b"530 5.7.0 STARTTLS first", Unavailable),
        (b"534 5.7.9 too weak", Unavailable),
        (b"538 5.7.11 encryption", Unavailable),
        (b"wonder", Unavailable),
    ],
)
async def test_what_a_reply_to_auth_means(reply: bytes, kind: type) -> None:
    outcome = await ask(well_behaved(AUTH=reply + b"\r\n"))
    assert isinstance(outcome, kind), outcome
    assert not tells("wonder", outcome)


@pytest.mark.parametrize(
    "other",
    [
        {"EHLO": offering()},
        {"EHLO": offering("AUTH")},
        {"EHLO": offering("AUTH CRAM-MD5 NTLM")},
        {"EHLO": b"502 what\r\n"},
        {"greeting": b"554 go away\r\n"},
        {"greeting": b"421 later\r\n"},
        {"greeting": b"220 a\r\n220 b\r\n"},
    ],
)
async def test_a_server_that_cannot_be_asked(other: dict[str, Answer]) -> None:
    server = well_behaved(**other)
    assert is_unknown(await ask(server))
    assert not any(line.startswith(b"AUTH") for line in server.heard)


async def test_replies_octet_by_octet() -> None:
    slow = well_behaved(
        greeting=one_by_one(b"220-a\r\n220 b\r\n"),
        EHLO=one_by_one(offering("AUTH PLAIN")),
        AUTH=one_by_one(b"235-in\r\n235 indeed\r\n"),
    )
    assert is_yes(await ask(slow), "alice")


@pytest.mark.parametrize("text", ["a\r\nb", "a\0b", ""])
async def test_what_cannot_be_carried_is_a_no(text: str) -> None:
    server = well_behaved()
    async with server:
        assert is_no(await SmtpVerifier(at(server.port)).verify(Password(text, "wonder")))
        assert is_no(await SmtpVerifier(at(server.port)).verify(Password("alice", text)))
    assert server.connections == 0


async def test_nobody_is_asked_to_act_for_another() -> None:
    server = well_behaved()
    assert is_yes(await ask(server, Password("alice", "wonder", "root")), "alice")
    assert b"AUTH PLAIN " + PLAIN in server.heard


# ---- TLS


async def test_what_was_offered_before_tls_counts_for_nothing(certificate: Path) -> None:
    server = well_behaved(
        EHLO=within_tls(offering("AUTH LOGIN"), offering("STARTTLS", "AUTH PLAIN")),
        STARTTLS=start_tls(b"220 go\r\n"),
        AUTH=b"535 no\r\n",
    )
    server.tls = serving(certificate)
    assert is_no(await ask(server, tls="opportunistic"))
    assert b"AUTH LOGIN" in server.heard


async def test_octets_behind_starttls_end_the_login(certificate: Path) -> None:
    server = well_behaved(
        EHLO=offering("STARTTLS", "AUTH PLAIN"), STARTTLS=start_tls(b"220 go\r\n", behind=b"250 x\r\n")
    )
    server.tls = serving(certificate)
    assert is_unknown(await ask(server, tls="opportunistic"))
    assert not any(line.startswith(b"AUTH") for line in server.heard)


@pytest.mark.parametrize("ehlo", [offering("AUTH PLAIN"), offering("STARTTLS", "AUTH PLAIN")])
async def test_tls_that_is_required_and_refused(ehlo: bytes) -> None:
    server = well_behaved(EHLO=ehlo, STARTTLS=b"454 not now\r\n")
    assert is_unknown(await ask(server, tls="required"))
    assert not any(line.startswith(b"AUTH") for line in server.heard)
    assert is_yes(await ask(well_behaved(EHLO=ehlo, STARTTLS=b"454 not now\r\n"), tls="opportunistic"), "alice")
