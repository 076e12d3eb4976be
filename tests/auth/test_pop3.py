"""Logins at POP3 servers: Dovecot, and servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import ssl
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
    flood,
    one_by_one,
    patience_s,
    silent,
    start_tls,
    within_tls,
)
from tests.servers import Dovecot

from gatepost.auth import Denied, Outcome, Unavailable, Verified, Verifier
from gatepost.auth.inquiry import CONVERSATION_OCTETS_MAX, LINE_OCTETS_MAX
from gatepost.auth.pop3 import CAPABILITIES_MAX, Pop3Verifier
from gatepost.auth.settings import LoginServer
from gatepost.smtp.sasl import Password, Token

ALICE = Password("alice", "wonder")
PLAIN = base64.b64encode(b"\0alice\0wonder")


@pytest.fixture(scope="module")
def dovecot(certificate: Path) -> Iterator[Dovecot]:
    with Dovecot(users=PASSWORDS, certificate=certificate) as server:
        yield server


def at(port: int, tls: str = "off", **options: Any) -> LoginServer:
    return LoginServer("127.0.0.1", port, tls, **options)


def well_behaved(**other: Answer) -> Scripted:
    answers: dict[str, Answer] = {
        "STLS": b"-ERR\r\n",
        "USER": b"+OK\r\n",
        "PASS": b"+OK\r\n",
        "QUIT": and_hang_up(b"+OK\r\n"),
    }
    return Scripted(other.pop("greeting", b"+OK hello\r\n"), answers | other)


async def ask(server: Scripted, credentials: Password = ALICE, tls: str = "off", **options: Any) -> Outcome:
    async with server:
        return await Pop3Verifier(at(server.port, tls, **options)).verify(credentials)


# ---- Dovecot


@pytest.mark.parametrize("user", PASSWORDS)
async def test_the_right_password_is_a_yes(dovecot: Dovecot, user: str) -> None:
    assert is_yes(await Pop3Verifier(at(dovecot.pop3_port)).verify(password(user)), user)


@pytest.mark.parametrize("user", PASSWORDS)
async def test_a_password_that_is_nearly_right_is_a_no(dovecot: Dovecot, user: str) -> None:
    wrong = Password(user, PASSWORDS[user][:-1] + "?")
    assert is_no(await Pop3Verifier(at(dovecot.pop3_port)).verify(wrong))


async def test_a_user_nobody_knows_is_a_no(dovecot: Dovecot) -> None:
    assert is_no(await Pop3Verifier(at(dovecot.pop3_port)).verify(Password("nobody@example.com", "wonder")))


async def test_the_account_is_in_lower_case(dovecot: Dovecot) -> None:
    assert is_yes(
        await Pop3Verifier(at(dovecot.pop3_port)).verify(Password("Alice@Example.COM", "wonder")), "alice@example.com"
    )


async def test_a_changed_password_counts_at_once() -> None:
    with Dovecot(users={"alice@example.com": "wonder"}) as server:
        verifier = Pop3Verifier(at(server.pop3_port))
        assert is_yes(await verifier.verify(password("alice@example.com")), "alice@example.com")
        server.set_password("alice@example.com", "changed")
        assert is_no(await verifier.verify(password("alice@example.com")))
        assert is_yes(await verifier.verify(password("alice@example.com", "changed")), "alice@example.com")
        server.stop()
        assert is_unknown(await verifier.verify(password("alice@example.com", "changed")))
        server.start()
        assert is_yes(await verifier.verify(password("alice@example.com", "changed")), "alice@example.com")


async def test_many_logins_at_once(dovecot: Dovecot) -> None:
    verifier = Pop3Verifier(at(dovecot.pop3_port, connections=5))
    right = [verifier.verify(password("alice@example.com")) for _ in range(10)]
    wrong = [verifier.verify(password("alice@example.com", "wrong")) for _ in range(10)]
    outcomes = await asyncio.gather(*right, *wrong)
    assert [type(outcome) for outcome in outcomes] == [Verified] * 10 + [Denied] * 10


@pytest.mark.parametrize("tls", ["opportunistic", "required", "implicit"])
async def test_tls(dovecot: Dovecot, authority: trustme.CA, tls: str) -> None:
    port = dovecot.pop3s_port if tls == "implicit" else dovecot.pop3_port
    verifier = Pop3Verifier(at(port, tls), judged=trusting(authority))
    assert is_yes(await verifier.verify(password("alice@example.com")), "alice@example.com")
    assert is_no(await verifier.verify(password("alice@example.com", "wrong")))


@pytest.mark.parametrize(("tls", "judged"), [("opportunistic", False), ("required", True), ("implicit", True)])
async def test_a_certificate_that_nobody_vouches_for(dovecot: Dovecot, tls: str, judged: bool) -> None:
    port = dovecot.pop3s_port if tls == "implicit" else dovecot.pop3_port
    outcome = await Pop3Verifier(at(port, tls)).verify(password("alice@example.com"))
    if judged:
        assert isinstance(outcome, Unavailable)
        assert "TLS handshake failed: unable to get local issuer certificate" in outcome.why
    else:
        assert is_yes(outcome, "alice@example.com")


async def test_a_certificate_for_another_name(authority: trustme.CA, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    authority.issue_cert("other.example.com").private_key_and_cert_chain_pem.write_to_path(str(other))
    server = well_behaved(STLS=start_tls(b"+OK\r\n"))
    server.tls = serving(other)
    async with server:
        outcome = await Pop3Verifier(at(server.port, "required"), judged=trusting(authority)).verify(ALICE)
    assert isinstance(outcome, Unavailable)
    assert "IP address mismatch" in outcome.why


async def test_plain_text_will_do_only_where_the_settings_say_so() -> None:
    with Dovecot(users=PASSWORDS) as server:  # it has no certificate
        login = password("alice@example.com")
        assert is_yes(await Pop3Verifier(at(server.pop3_port, "opportunistic")).verify(login), "alice@example.com")
        outcome = await Pop3Verifier(at(server.pop3_port, "required")).verify(login)
        assert isinstance(outcome, Unavailable)
        assert "does not offer TLS" in outcome.why
        assert is_unknown(await Pop3Verifier(at(server.pop3_port, "implicit", timeout_s=5)).verify(login))


# ---- servers that misbehave


async def test_what_is_said() -> None:
    server = well_behaved()
    assert is_yes(await ask(server), "alice")
    assert server.heard == [b"USER alice", b"PASS wonder", b"QUIT"]


@pytest.mark.parametrize("point", ["greeting", "USER", "PASS"])
@pytest.mark.parametrize("hazard", HAZARDS)
async def test_trouble_is_never_an_answer(point: str, hazard: str) -> None:
    outcome = await ask(well_behaved(**{point: HAZARDS[hazard]}), timeout_s=patience_s(hazard))
    assert is_unknown(outcome), outcome
    assert not tells("wonder", outcome)


@pytest.mark.parametrize("answer", [b"", b"+OK", b"+OK\r\n+OK\r\n", b"-ERR no\r\n+OK\r\n"])
async def test_a_server_that_speaks_before_it_is_asked(answer: bytes) -> None:
    """Nothing may be taken for an answer to PASS that was said before it."""
    outcome = await ask(well_behaved(greeting=b"+OK\r\n+OK\r\n+OK\r\n", USER=b"", PASS=answer), timeout_s=5)
    assert isinstance(outcome, Unavailable)
    assert "before it is asked" in outcome.why


async def test_replies_octet_by_octet() -> None:
    slow: dict[str, Answer] = {
        "greeting": one_by_one(b"+OK hello\r\n"),
        "USER": one_by_one(b"+OK\r\n"),
        "PASS": one_by_one(b"+OK logged in\r\n"),
    }
    assert is_yes(await ask(well_behaved(**slow)), "alice")
    assert is_no(await ask(well_behaved(**slow | {"PASS": one_by_one(b"-ERR [AUTH] no\r\n")})))


async def test_what_follows_the_answer_changes_nothing() -> None:
    assert is_no(await ask(well_behaved(PASS=b"-ERR\r\n+OK\r\n")))
    assert is_yes(await ask(well_behaved(PASS=b"+OK\r\n-ERR\r\n")), "alice")
    assert is_yes(await ask(well_behaved(QUIT=flood)), "alice")
    assert is_yes(await ask(well_behaved(QUIT=silent), timeout_s=5), "alice")


@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_a_line_as_long_as_may_be(over: int) -> None:
    line = b"+OK " + b"x" * (LINE_OCTETS_MAX + over - len(b"+OK \r\n")) + b"\r\n"
    assert len(line) == LINE_OCTETS_MAX + over
    outcome = await ask(well_behaved(PASS=line))
    assert is_unknown(outcome) if over > 0 else is_yes(outcome, "alice")


@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_as_much_as_may_be_said(over: int) -> None:
    head, tail = b"+OK\r\n" + (b"x" * 998 + b"\r\n") * 64, b"\r\n.\r\n"
    room = CONVERSATION_OCTETS_MAX + over - len(b"+OK hello\r\n-ERR\r\n") - len(head) - len(tail)
    server = well_behaved(USER=b"-ERR\r\n", CAPA=head + b"x" * room + tail)
    outcome = await ask(server)
    assert isinstance(outcome, Unavailable)
    expected = "says more than a login needs" if over > 0 else "offers neither USER nor SASL PLAIN"
    assert expected in outcome.why


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"+OK", Verified),
        (b"+OK Mailbox locked and ready", Verified),
        (b"+OKAY", Unavailable),
        (b"+ok", Unavailable),
        (b" +OK", Unavailable),
        (b"-ERR", Denied),
        (b"-ERR [AUTH] Authentication failed.", Denied),
        (b"-ERR [AUTH]", Denied),
        (b"-ERR Logon failure: unknown user name or bad password.", Denied),
        (b"-ERR +OK", Denied),
        (b"-ERR [XYZZY] nothing happens", Denied),
        (b"-ERR [ not a code", Denied),
        (b"-ERR account locked", Denied),
        (b"-ERR [SYS/TEMP] try later", Unavailable),
        (b"-ERR [SYS/PERM] call somebody", Unavailable),
        (b"-ERR [sys/temp] try later", Unavailable),
        (b"-ERR [SYS] call somebody", Unavailable),
        (b"-ERR [SYS/NEW/CODE] what is this", Unavailable),
        (b"-ERR [LOGIN-DELAY] not so fast", Unavailable),
        (b"-ERR [IN-USE] Do you have another POP session running?", Unavailable),
        (b"-ERR maildrop already locked", Unavailable),
        (b"-ERR unable to lock maildrop", Unavailable),
        (b"-ERR Your mailbox is already locked", Unavailable),
    ],
)
async def test_what_a_reply_to_pass_means(reply: bytes, kind: type) -> None:
    outcome = await ask(well_behaved(PASS=reply + b"\r\n"))
    assert isinstance(outcome, kind), outcome


async def test_a_reply_that_repeats_the_secret_is_not_repeated() -> None:
    for reply in (b"-ERR bad command: PASS wonder\r\n", b"-ERR [WONDER] wonder\r\n", b"wonder?\r\n"):
        outcome = await ask(well_behaved(PASS=reply))
        assert not isinstance(outcome, Verified)
        assert not tells("wonder", outcome)


@pytest.mark.parametrize("text", ["a\r\nPASS b", "a\nb", "a\rb", "a\0b", "\r\n", ""])
async def test_nothing_is_said_that_would_be_two_commands(text: str) -> None:
    server = well_behaved()
    async with server:
        verifier = Pop3Verifier(at(server.port))
        assert is_no(await verifier.verify(Password(text, "wonder")))
        assert is_no(await verifier.verify(Password("alice", text)))
    assert server.connections == 0


async def test_a_token_is_not_for_this_verifier() -> None:
    assert is_no(await Pop3Verifier(at(1)).verify(Token("alice", "abc")))


@pytest.mark.parametrize(
    ("template", "user", "told"),
    [
        ("{user}", "Alice@Example.com", b"Alice@Example.com"),
        ("{local_part}", "alice@example.com", b"alice"),
        ("{local_part}", "alice", b"alice"),
        ("EXCHANGE\\{local_part}", "al ice@example.com", b"EXCHANGE\\al ice"),
        ("{domain}/{local_part}", "a@b@example.com", b"example.com/a@b"),
        ("{local_part}#{domain}", "{domain}@example.com", b"{domain}#example.com"),
    ],
)
async def test_how_the_user_is_named_to_the_server(template: str, user: str, told: bytes) -> None:
    server = well_behaved()
    assert is_yes(await ask(server, Password(user, "wonder"), login=template), user.lower())
    assert server.heard[0] == b"USER " + told


async def test_a_user_of_whom_nothing_is_left_is_a_no() -> None:
    server = well_behaved()
    assert is_no(await ask(server, Password("@example.com", "wonder"), login="{local_part}"))
    assert server.connections == 0


# ---- USER refused


async def test_sasl_plain_where_user_is_refused() -> None:
    answers: dict[str, Answer] = {
        "USER": b"-ERR not without TLS\r\n",
        "CAPA": b"+OK\r\nTOP\r\nSASL LOGIN PLAIN\r\n.\r\n",
        "AUTH": b"+ \r\n",
        "ELSE": b"+OK\r\n",
    }
    server = well_behaved(**answers)
    assert is_yes(await ask(server), "alice")
    assert server.heard == [b"USER alice", b"CAPA", b"AUTH PLAIN", PLAIN, b"QUIT"]
    assert is_no(await ask(well_behaved(**answers | {"ELSE": b"-ERR [AUTH] no\r\n"})))
    assert is_unknown(await ask(well_behaved(**answers | {"ELSE": b"-ERR [SYS/TEMP] no\r\n"})))
    assert is_unknown(await ask(well_behaved(**answers | {"AUTH": b"-ERR no\r\n"})))


@pytest.mark.parametrize(
    ("user", "capa", "kind"),
    [
        (b"-ERR never heard of it", b"-ERR what?\r\n", Denied),
        (b"-ERR never heard of it", b"+OK\r\nUSER\r\nTOP\r\n.\r\n", Denied),
        (b"-ERR [AUTH] no", b"+OK\r\nUSER\r\n.\r\n", Denied),
        (b"-ERR not without TLS", b"+OK\r\nSTLS\r\nSASL NTLM\r\n.\r\n", Unavailable),
        (b"-ERR not without TLS", b"+OK\r\n\r\nSTLS\r\n.\r\n", Unavailable),
        (b"-ERR [SYS/TEMP] later", b"-ERR\r\n", Unavailable),
        (b"-ERR", b"+OK\r\n" + b"X\r\n" * CAPABILITIES_MAX + b".\r\n", Unavailable),
        (b"-ERR", b"+OK\r\nUSER\r\n" + b"X\r\n" * (CAPABILITIES_MAX - 2) + b".\r\n", Denied),
    ],
)
async def test_what_a_refused_user_means(user: bytes, capa: bytes, kind: type) -> None:
    outcome = await ask(well_behaved(USER=user + b"\r\n", CAPA=capa))
    assert isinstance(outcome, kind), outcome


# ---- TLS


async def test_octets_behind_stls_end_the_login(certificate: Path) -> None:
    """Else somebody in between could say +OK in plain text, and be believed under TLS."""
    server = well_behaved(STLS=start_tls(b"+OK\r\n", behind=b"+OK\r\n+OK\r\n"), PASS=b"-ERR\r\n")
    server.tls = serving(certificate)
    assert is_unknown(await ask(server, tls="opportunistic"))
    assert server.heard == [b"STLS"]


async def test_all_is_said_under_tls(certificate: Path) -> None:
    server = well_behaved(
        STLS=start_tls(b"+OK\r\n"), USER=within_tls(b"+OK\r\n", b"-ERR\r\n"), PASS=within_tls(b"+OK\r\n", b"-ERR\r\n")
    )
    server.tls = serving(certificate)
    assert is_yes(await ask(server, tls="opportunistic"), "alice")


async def test_a_handshake_that_fails_is_not_replaced_by_plain_text() -> None:
    server = well_behaved(STLS=b"+OK\r\n", ELSE=b"+OK\r\n")
    assert is_unknown(await ask(server, tls="opportunistic", timeout_s=0.5))
    assert not any(b"wonder" in line for line in server.heard)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated:DeprecationWarning")
async def test_tls_of_an_old_server_is_better_than_none(certificate: Path) -> None:
    server = well_behaved(STLS=start_tls(b"+OK\r\n"))
    server.tls = serving(certificate)
    server.tls.set_ciphers("DEFAULT:@SECLEVEL=0")
    server.tls.minimum_version = server.tls.maximum_version = ssl.TLSVersion.TLSv1
    assert is_yes(await ask(server, tls="opportunistic"), "alice")


# ---- how long, how many


async def test_nobody_listens() -> None:
    async with well_behaved() as server:
        port = server.port
    outcome = await Pop3Verifier(at(port)).verify(ALICE)
    assert isinstance(outcome, Unavailable)
    assert str(port) in outcome.why


async def test_a_name_that_leads_nowhere() -> None:
    for host in ("pop3.invalid", "a..b", "x" * 300):
        outcome = await Pop3Verifier(LoginServer(host, 110, timeout_s=20)).verify(ALICE)
        assert is_unknown(outcome), outcome


async def test_no_more_logins_at_a_time_than_the_settings_say() -> None:
    going = asyncio.Event()

    async def wait(peer: Any) -> None:
        await going.wait()
        await peer.say(b"+OK\r\n")

    async with well_behaved(PASS=wait) as server:
        verifier = Pop3Verifier(at(server.port, connections=3, timeout_s=60))
        logins = [asyncio.ensure_future(verifier.verify(ALICE)) for _ in range(10)]
        await server.until(lambda: server.heard.count(b"PASS wonder") == 3)
        going.set()
        assert all(is_yes(outcome, "alice") for outcome in await asyncio.gather(*logins))
        assert server.open_max == 3
        assert server.connections == 10


async def test_waiting_for_a_turn_is_part_of_the_time() -> None:
    async with well_behaved(PASS=silent) as server:
        verifier = Pop3Verifier(at(server.port, connections=1, timeout_s=0.5))
        outcomes = await asyncio.gather(*(verifier.verify(ALICE) for _ in range(4)))
        assert all(is_unknown(outcome) for outcome in outcomes)


async def test_a_login_that_is_called_off_leaves_no_connection() -> None:
    async with well_behaved(PASS=silent) as server:
        verifier: Verifier = Pop3Verifier(at(server.port))
        login = asyncio.ensure_future(verifier.verify(ALICE))
        await server.until(lambda: b"PASS wonder" in server.heard)
        login.cancel()
        with pytest.raises(asyncio.CancelledError):
            await login
        await server.until(lambda: server.open_now == 0)
        await verifier.close()
        assert verifier.name == "pop3"
