"""Binds at LDAP servers: slapd, and servers that misbehave."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.auth.parts import is_no, is_unknown, is_yes, tells, trusting
from tests.servers import Slapd

from gatepost.auth import Denied, Outcome, Unavailable, Verified, Verifier
from gatepost.auth.ldap import ADDRESSES_MAX, MESSAGE_OCTETS_MAX, LdapVerifier, escape_filter, escape_name
from gatepost.auth.settings import LdapServer
from gatepost.errors import ConfigError
from gatepost.smtp.sasl import Password, Token

USERS = {
    "alice": "wonder",
    "spaces": " two  words ",
    "quotes": """say "so" \\ it's 100%s of {user}""",
    "octets": "pässwörd € 密碼",
    "münchen": "grüezi",
    "wild*": "card",
    "comma, plus+ #": "special",
    "(paren)\\": "thesis",
}
ALIASES = {
    "alice": {"proxyAddresses": ["SMTP:Alice@Example.COM", "smtp:al@example.org", "X500:/o=x", "sip:alice@example.com"]}
}
BIND = f"uid={{user}},{Slapd.people}"
SEARCH: dict[str, Any] = {
    "search_base": Slapd.base,
    "search_filter": "(&(objectClass=inetOrgPerson)(|(uid={user})(mail={user})))",
    "search_bind": Slapd.admin,
    "search_password": Slapd.admin_password,
}


@pytest.fixture(scope="module")
def slapd(certificate: Path) -> Iterator[Slapd]:
    with Slapd(users=USERS, attributes=ALIASES, certificate=certificate) as server:
        yield server


def at(port: int, **options: Any) -> LdapServer:
    return LdapServer("127.0.0.1", port, **{"tls": "off", "bind": BIND} | options)


# ---- slapd


@pytest.mark.parametrize("how", [{}, {"bind": "", **SEARCH}], ids=["bind", "search"])
@pytest.mark.parametrize("user", USERS)
async def test_the_right_password_is_a_yes_and_a_wrong_one_a_no(slapd: Slapd, user: str, how: dict[str, Any]) -> None:
    verifier = LdapVerifier(at(slapd.port, **how))
    assert is_yes(await verifier.verify(Password(user, USERS[user])), user)
    assert is_no(await verifier.verify(Password(user, USERS[user][:-1] + "?")))
    assert is_no(await verifier.verify(Password("x" + user, USERS[user])))


@pytest.mark.parametrize("how", [{}, {"bind": "", **SEARCH}], ids=["bind", "search"])
async def test_a_name_cannot_be_more_than_a_name(slapd: Slapd, how: dict[str, Any]) -> None:
    verifier = LdapVerifier(at(slapd.port, **how))
    for user in (
        "*",
        "al*",
        "alice)(uid=*",
        "*)(|(uid=*",
        "alice,ou=people",
        "alice+cn=alice",
        "alice\\00",
        "(",
        ")",
        "\\",
    ):
        outcome = await verifier.verify(Password(user, "wonder"))
        assert is_no(outcome), (user, outcome)


@pytest.mark.parametrize("how", [{}, {"bind": "", **SEARCH}], ids=["bind", "search"])
async def test_an_empty_password_is_a_no(slapd: Slapd, how: dict[str, Any]) -> None:
    """slapd says success to it, and means nobody.  RFC 4513 §5.1.2."""
    verifier = LdapVerifier(at(slapd.port, **how))
    for secret in ("", "\0", "wonder\0"):
        assert is_no(await verifier.verify(Password("alice", secret)))


async def test_addresses(slapd: Slapd) -> None:
    wanted = ("alice@example.com", "Alice@example.com", "al@example.org")
    search = {"bind": "", **SEARCH, "addresses": ("mail", "proxyAddresses")}
    outcome = await LdapVerifier(at(slapd.port, **search)).verify(Password("alice@example.com", "wonder"))
    assert outcome == Verified("alice@example.com", wanted)
    for how in ({}, {key: SEARCH[key] for key in ("search_base", "search_filter")}):
        verifier = LdapVerifier(at(slapd.port, addresses=("mail", "proxyAddresses"), **how))
        assert await verifier.verify(Password("Alice", "wonder")) == Verified("alice", wanted)
    assert await LdapVerifier(at(slapd.port)).verify(Password("alice", "wonder")) == Verified("alice", ())


async def test_more_than_one_entry_is_nobody(slapd: Slapd) -> None:
    how = {"bind": "", **SEARCH, "search_filter": "(|(uid={user})(objectClass=inetOrgPerson))"}
    outcome = await LdapVerifier(at(slapd.port, **how)).verify(Password("alice", "wonder"))
    assert isinstance(outcome, Unavailable)
    assert "more than one entry" in outcome.why


@pytest.mark.parametrize(
    "how",
    [
        {"search_password": "wrong"},
        {"search_base": "dc=elsewhere"},
        {"search_bind": "no name"},
        {"bind": "{user}"},  # only Active Directory takes such a name
    ],
)
async def test_settings_that_are_wrong_deny_nobody(slapd: Slapd, how: dict[str, Any]) -> None:
    verifier = LdapVerifier(at(slapd.port, **{"bind": "", **SEARCH} | how))
    outcome = await verifier.verify(Password("alice", "wonder"))
    assert is_unknown(outcome), outcome
    assert not tells("wrong", outcome)


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
async def test_tls(slapd: Slapd, authority: trustme.CA, tmp_path: Path, tls: str) -> None:
    port = slapd.ldaps_port if tls == "implicit" else slapd.port
    alice = Password("alice", "wonder")
    assert is_yes(await LdapVerifier(at(port, tls=tls), judged=trusting(authority)).verify(alice), "alice")
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    assert is_yes(await LdapVerifier(at(port, tls=tls, authority=str(file))).verify(alice), "alice")
    outcome = await LdapVerifier(at(port, tls=tls)).verify(alice)
    assert isinstance(outcome, Unavailable)
    assert "TLS handshake failed" in outcome.why


async def test_starttls_that_is_not_there() -> None:
    with Slapd(users={"alice": "wonder"}) as server:
        assert is_unknown(await LdapVerifier(at(server.port, tls="starttls")).verify(Password("alice", "wonder")))


async def test_a_changed_password_and_a_server_that_is_gone() -> None:
    with Slapd(users={"alice": "wonder"}) as server:
        verifier: Verifier = LdapVerifier(at(server.port))
        assert is_yes(await verifier.verify(Password("alice", "wonder")), "alice")
        server.set_password("alice", "changed")
        assert is_no(await verifier.verify(Password("alice", "wonder")))
        assert is_yes(await verifier.verify(Password("alice", "changed")), "alice")
        server.stop()
        assert is_unknown(await verifier.verify(Password("alice", "changed")))
        server.start()
        assert is_yes(await verifier.verify(Password("alice", "changed")), "alice")
        await verifier.close()


async def test_many_logins_at_once(slapd: Slapd) -> None:
    verifier = LdapVerifier(at(slapd.port, connections=5, timeout_s=60))
    outcomes = await asyncio.gather(
        *(verifier.verify(Password("alice", "wonder" if n % 2 else "wrong")) for n in range(40))
    )
    assert [type(outcome) for outcome in outcomes] == [Denied, Verified] * 20


# ---- escaping


@pytest.mark.parametrize(
    ("text", "name", "in_a_filter"),
    [
        ("alice", "alice", "alice"),
        ("a,b+c", "a\\,b\\+c", "a\\2cb\\2bc"),
        (' a"b\\c ', '\\ a\\"b\\\\c\\ ', "\\20a\\22b\\5cc\\20"),
        ("#a#", "\\#a#", "\\23a\\23"),
        ("<a>;=", "\\<a\\>\\;\\=", "\\3ca\\3e\\3b\\3d"),
        ("a*(b)", "a*(b)", "a\\2a\\28b\\29"),
        ("é", "é", "é"),
        (" ", "\\ ", "\\20"),
    ],
)
def test_escapes(text: str, name: str, in_a_filter: str) -> None:
    assert escape_name(text) == name
    assert escape_filter(text) == in_a_filter


# ---- servers that misbehave


def ber(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    return bytes([tag, 0x84]) + len(content).to_bytes(4, "big") + content


def message(operation: bytes, number: int = 1) -> bytes:
    return ber(0x30, ber(0x02, bytes([number])), operation)


def result(code: int, text: bytes = b"", tag: int = 0x61, matched: bytes = b"") -> bytes:
    return ber(tag, ber(0x0A, bytes([code])), ber(0x04, matched), ber(0x04, text))


def entry(name: bytes, *values: bytes) -> bytes:
    attribute = ber(0x30, ber(0x04, b"mail"), ber(0x31, *(ber(0x04, value) for value in values)))
    return ber(0x64, ber(0x04, name), ber(0x30, attribute))


Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(2)
    length = head[1]
    if length > 0x80:
        more = await reader.readexactly(length - 0x80)
        head, length = head + more, int.from_bytes(more, "big")
    return head + await reader.readexactly(length)


def answering(*answers: bytes, piecemeal: bool = False) -> Play:
    """One answer a request."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await request(reader)
            for piece in [bytes([octet]) for octet in answer] if piecemeal else [answer]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        await reader.read(-1)

    return play


async def ask(play: Play, **options: Any) -> Outcome:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await play(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        return await LdapVerifier(at(port, **{"timeout_s": 20.0} | options)).verify(Password("alice", "wonder"))
    finally:
        server.close()


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (0, b"", Verified),
        (49, b"", Denied),
        (49, b"80090308: LdapErr: DSID-0C090439, comment: AcceptSecurityContext error, data 52e, v4563\0", Denied),
        (49, b"data 775, locked", Denied),
        (49, b"data 999, new", Denied),
        (19, b"Exceed password retry limit", Denied),
        (32, b"", Denied),
        (48, b"", Denied),
        *(
            (code, b"wonder", Unavailable)
            for code in (1, 2, 3, 4, 7, 8, 10, 11, 13, 14, 34, 50, 51, 52, 53, 54, 80, 127)
        ),
    ],
)
async def test_what_a_result_code_means(code: int, text: bytes, kind: type) -> None:
    outcome = await ask(answering(message(result(code, text))))
    assert isinstance(outcome, kind), outcome
    assert not tells("wonder", outcome)
    if b"data 775" in text:
        assert outcome == Denied("the account is locked")


@pytest.mark.parametrize(
    "answer",
    [
        b"\r\n+OK\r\n",
        b"\x30\x80",
        b"\x30\x85\x01\x01\x01\x01\x01",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x83\x01\x00\x01",
        b"\x30\x00",
        b"\x30\x03\x02\x01\x01",
        b"\x30\x05\x02\x01\x01\x61\x05",
        b"\x30\x07\x02\x01\x01\x61\x02\x0a\x05",
        message(ber(0x61)),
        message(ber(0x61, ber(0x0A), ber(0x04), ber(0x04))),
        message(ber(0x61, ber(0x0A, b"\0" * 5), ber(0x04), ber(0x04))),
        message(ber(0x61, ber(0x02, b"\0"), ber(0x04), ber(0x04))),
        message(ber(0x61, ber(0x0A, b"\0"), ber(0x04))),
        message(result(0, tag=0x65)),
        message(result(0, tag=0x78)),
        message(result(0), number=2),
        message(result(0), number=0),
        message(ber(0x30, *[b"\x30\x80"] * 5000)),
        message(b"\x30\x84\x00\x00\x7f\xff" * 4000),
    ],
)
async def test_octets_that_are_no_answer(answer: bytes) -> None:
    outcome = await ask(answering(answer))
    assert is_unknown(outcome), outcome


async def test_a_server_that_speaks_before_it_is_asked() -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(message(result(0)) + message(result(0, tag=0x65), 2) + message(result(0), 3))
        await reader.read(-1)

    assert is_unknown(await ask(play, bind="", **SEARCH))


async def test_silence_floods_and_half_closed_connections() -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async def half_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        await reader.read(-1)

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(message(entry(b"cn=x", b"a@b")) * 1000)
            await writer.drain()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(message(result(0))[:-1])

    assert is_unknown(await ask(silent, timeout_s=0.2))
    for play in (half_close, flood, hang_up):
        assert is_unknown(await ask(play))


async def test_octet_by_octet_and_with_a_tail() -> None:
    assert is_yes(await ask(answering(message(result(0)), piecemeal=True)), "alice")
    assert is_no(await ask(answering(message(result(49)) + message(result(0)))))


FOUND = message(entry(b"cn=alice,dc=x", b"alice@example.com"), 2)
DONE = message(result(0, tag=0x65), 2)
REFERENCE = message(ber(0x73, ber(0x04, b"ldap://elsewhere/dc=x")), 2)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (FOUND + DONE, Verified),
        (REFERENCE + FOUND + REFERENCE + DONE, Verified),
        (DONE, Denied),
        (REFERENCE + DONE, Denied),
        (FOUND + FOUND + DONE, Unavailable),
        (FOUND + FOUND + message(result(4, tag=0x65), 2), Unavailable),
        (FOUND + message(result(4, tag=0x65), 2), Unavailable),
        (message(result(10, tag=0x65), 2), Unavailable),
        (message(result(32, tag=0x65), 2), Unavailable),
        (message(result(51, tag=0x65), 2), Unavailable),
        (message(entry(b""), 2) + DONE, Unavailable),
        (message(entry(b"\xff"), 2) + DONE, Unavailable),
        (message(ber(0x64, ber(0x04, b"cn=x")), 2) + DONE, Unavailable),
        (message(ber(0x64, ber(0x04, b"cn=x"), ber(0x30, ber(0x04, b"y"))), 2) + DONE, Unavailable),
        (message(result(0), 2), Unavailable),
    ],
)
async def test_what_an_answer_to_the_search_means(answer: bytes, kind: type) -> None:
    play = answering(message(result(0)), answer, message(result(0), 3))
    outcome = await ask(play, bind="", **SEARCH)
    assert isinstance(outcome, kind), outcome


async def test_no_more_addresses_than_may_be() -> None:
    values = [b"%d@x.test" % number for number in range(ADDRESSES_MAX + 10)]
    found = message(entry(b"cn=alice", *values), 2)
    assert len(found) < MESSAGE_OCTETS_MAX
    outcome = await ask(answering(message(result(0)), found + DONE, message(result(0), 3)), bind="", **SEARCH)
    assert isinstance(outcome, Verified)
    assert len(outcome.addresses) == ADDRESSES_MAX


async def test_values_that_are_no_addresses() -> None:
    values = (
        b"",
        b"alice",
        b"a@b@c",
        b"<y@example.com>",
        b"\xff@example.com",
        b"smtp:",
        b"x@EXAMPLE.com",
        b"a\r\n@b.test",
    )
    found = message(entry(b"cn=alice", *values), 2)
    outcome = await ask(answering(message(result(0)), found + DONE, message(result(0), 3)), bind="", **SEARCH)
    assert outcome == Verified("alice", ("x@example.com",))


async def test_a_token_is_not_for_this_verifier() -> None:
    assert is_no(await LdapVerifier(at(1)).verify(Token("alice", "abc")))


# ---- settings


def test_a_missing_library_is_told_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "anyldap"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "anyldap", None)
    with pytest.raises(ConfigError, match=r"needs the Python package anyldap.*install gatepost\[ldap\]"):
        LdapVerifier(at(389))


@pytest.mark.parametrize("text", ["mail={user}", "(mail={user}", "(&)(x", "(mail={user}))"])
def test_a_filter_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="search_filter is no LDAP filter"):
        LdapVerifier(at(389, search_filter=text))


def test_an_authority_that_is_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for path in (empty, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=r"authority .*\.pem cannot be used .*name a PEM file"):
            LdapVerifier(at(636, tls="implicit", authority=str(path)))
