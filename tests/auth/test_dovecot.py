"""Dovecot's auth protocol: Dovecot itself, and servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.auth.parts import PASSWORDS, is_no, is_unknown, is_yes, password, tells
from tests.auth.scripted import HAZARDS, Answer, Scripted, one_by_one, patience_s, silent
from tests.servers import Dovecot

from gatepost.auth import Denied, Outcome, Unavailable, Verified, Verifier
from gatepost.auth.dovecot import HANDSHAKE_LINES_MAX, TOGETHER_MAX, DovecotVerifier
from gatepost.auth.settings import DovecotServer
from gatepost.smtp.sasl import Password, Token

ALICE = Password("alice", "wonder")
HANDSHAKE = b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nSPID\t7\nCUID\t1\nCOOKIE\t0123\nDONE\n"


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    with Dovecot(users=PASSWORDS) as server:
        yield server


@pytest.fixture(params=["unix", "tcp"])
def verifier(request, dovecot: Dovecot) -> Verifier:
    if request.param == "unix":
        return DovecotVerifier(DovecotServer(path=str(dovecot.auth_path)))
    return DovecotVerifier(DovecotServer(host="127.0.0.1", port=dovecot.auth_port))


def well_behaved(**other: Answer) -> Scripted:
    answers: dict[str, Answer] = {"VERSION": b"", "CPID": HANDSHAKE, "AUTH": b"OK\t1\tuser=alice\n"}
    return Scripted(other.pop("greeting", b""), answers | other, end=b"\n")


async def ask(server: Scripted, credentials: Password = ALICE, timeout_s: float = 20.0) -> Outcome:
    async with server:
        settings = DovecotServer(host="127.0.0.1", port=server.port, timeout_s=timeout_s)
        return await DovecotVerifier(settings).verify(credentials)


# ---- Dovecot


@pytest.mark.parametrize("user", PASSWORDS)
async def test_the_right_password_is_a_yes_and_a_wrong_one_a_no(verifier: Verifier, user: str) -> None:
    assert is_yes(await verifier.verify(password(user)), user)
    assert is_no(await verifier.verify(Password(user, PASSWORDS[user][:-1] + "?")))
    assert is_no(await verifier.verify(Password("x" + user, PASSWORDS[user])))


async def test_the_account_is_the_one_that_dovecot_names(verifier: Verifier) -> None:
    assert is_yes(await verifier.verify(Password("ALICE@example.com", "wonder")), "alice@example.com")


async def test_many_logins_at_once(verifier: Verifier) -> None:
    logins = [verifier.verify(password("alice@example.com", "wonder" if n % 2 else "wrong")) for n in range(60)]
    outcomes = await asyncio.gather(*logins)
    assert [type(outcome) for outcome in outcomes] == [Denied, Verified] * 30


async def test_dovecot_goes_and_comes_back() -> None:
    with Dovecot(users={"alice@example.com": "wonder"}) as server:
        verifier = DovecotVerifier(DovecotServer(path=str(server.auth_path)))
        assert is_yes(await verifier.verify(password("alice@example.com")), "alice@example.com")
        server.set_password("alice@example.com", "changed")
        assert is_no(await verifier.verify(password("alice@example.com")))
        server.stop()
        assert is_unknown(await verifier.verify(password("alice@example.com", "changed")))
        server.start()
        assert is_yes(await verifier.verify(password("alice@example.com", "changed")), "alice@example.com")
        await verifier.close()


async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    outcome = await DovecotVerifier(DovecotServer(path=str(tmp_path / "auth-client"))).verify(ALICE)
    assert outcome == Unavailable(f"{tmp_path}/auth-client: No such file or directory")


# ---- what is said


async def test_what_is_said() -> None:
    server = well_behaved()
    assert is_yes(await ask(server), "alice")
    version, process, request = server.heard
    assert version == b"VERSION\t1\t1"
    assert process.startswith(b"CPID\t")
    assert process[5:].isdigit()
    response = base64.b64encode(b"\0alice\0wonder")
    assert request == b"AUTH\t1\tPLAIN\tservice=smtp\tsecured\tnologin\tresp=" + response


async def test_no_two_connections_have_one_process_id() -> None:
    async with well_behaved() as server:
        verifier = DovecotVerifier(DovecotServer(host="127.0.0.1", port=server.port))
        await asyncio.gather(*(verifier.verify(ALICE) for _ in range(50)))
        ids = [line for line in server.heard if line.startswith(b"CPID")]
        assert len(ids) == len(set(ids)) == 50
        assert server.open_max <= TOGETHER_MAX


# ---- servers that misbehave


@pytest.mark.parametrize("point", ["greeting", "CPID", "AUTH"])
@pytest.mark.parametrize("hazard", sorted(set(HAZARDS) - {"bare LF", "bare LF within"}))
async def test_trouble_is_never_an_answer(point: str, hazard: str) -> None:
    outcome = await ask(well_behaved(**{point: HAZARDS[hazard]}), timeout_s=patience_s(hazard))
    assert is_unknown(outcome), outcome
    assert not tells("wonder", outcome)


@pytest.mark.parametrize(
    ("answer", "kind", "account"),
    [
        (b"OK\t1\n", Verified, "alice"),
        (b"OK\t1\tuser=Bob@Example.com\tnologin\n", Verified, "bob@example.com"),
        (b"OK\t1\tuser=b\xc3\xb6b\n", Verified, "b\u00f6b"),
        (b"OK\t1\tuser=a\x01\x31b\n", Unavailable, ""),
        (b"OK\t1\tuser=a\x01nb\n", Unavailable, ""),
        (b"OK\t1\tuser=\n", Unavailable, ""),
        (b"OK\t1\tuser=a\xff\n", Verified, "a\ufffd"),
        (b"OK\t2\tuser=alice\n", Unavailable, ""),
        (b"OK\n", Unavailable, ""),
        (b"OK 1 user=alice\n", Unavailable, ""),
        (b"CONT\t1\tdata=\n", Unavailable, ""),
        (b"NOTFOUND\t1\n", Unavailable, ""),
        (b"FAIL\t1\n", Denied, ""),
        (b"FAIL\t1\tuser=alice\n", Denied, ""),
        (b"FAIL\t1\tuser=alice\nOK\t1\tuser=alice\n", Denied, ""),
        (b"FAIL\t1\tuser=temp\treason=temp\n", Denied, ""),
        (b"FAIL\t1\tuser=alice\tauthz\n", Denied, ""),
        (b"FAIL\t1\tcode=user_disabled\n", Denied, ""),
        (b"FAIL\t1\tcode=pass_expired\n", Denied, ""),
        (b"FAIL\t1\tuser=alice\ttemp\n", Unavailable, ""),
        (b"FAIL\t1\tcode=temp_fail\n", Unavailable, ""),
        (b"FAIL\t2\n", Unavailable, ""),
    ],
)
async def test_what_an_answer_means(answer: bytes, kind: type, account: str) -> None:
    outcome = await ask(well_behaved(AUTH=answer))
    assert isinstance(outcome, kind), outcome
    assert not isinstance(outcome, Verified) or outcome.account == account


@pytest.mark.parametrize(
    "handshake",
    [
        b"VERSION\t2\t0\nMECH\tPLAIN\nDONE\n",
        b"MECH\tPLAIN\nDONE\n",
        b"VERSION\t1\t2\nMECH\tCRAM-MD5\nDONE\n",
        b"VERSION\t1\t2\nMECH\nDONE\n",
        HANDSHAKE + b"OK\t1\tuser=alice\n",
        b"X\n" + HANDSHAKE,
    ],
)
async def test_a_greeting_that_will_not_do(handshake: bytes) -> None:
    server = well_behaved(CPID=handshake)
    assert is_unknown(await ask(server))
    assert not any(line.startswith(b"AUTH") for line in server.heard)


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_a_greeting_as_long_as_may_be(more: int) -> None:
    first, *others = HANDSHAKE.splitlines(keepends=True)
    fill = [b"X\n"] * (HANDSHAKE_LINES_MAX - len(others) + more)
    outcome = await ask(well_behaved(CPID=b"".join([first, *fill, *others])))
    assert is_unknown(outcome) if more > 0 else is_yes(outcome, "alice")


async def test_octet_by_octet() -> None:
    slow = well_behaved(CPID=one_by_one(HANDSHAKE), AUTH=one_by_one(b"OK\t1\tuser=alice\n"))
    assert is_yes(await ask(slow), "alice")


async def test_what_is_not_for_this_verifier() -> None:
    async with well_behaved(CPID=silent) as server:
        verifier = DovecotVerifier(DovecotServer(host="127.0.0.1", port=server.port))
        credentials: list[Any] = [
            Token("alice", "abc"),
            Password("a\0b", "c"),
            Password("a", "b\nc"),
            Password("a", ""),
        ]
        for one in credentials:
            assert is_no(await verifier.verify(one))
        assert server.connections == 0
