"""All verifiers behind one question: order, what is unknown, what is remembered, and whom a login is for."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys

import pytest
from argon2 import PasswordHasher
from scramp import ScramClient  # type: ignore[import-untyped]

from gatepost.auth import Denied, Unavailable, Verified, authenticator
from gatepost.auth.accounts import AccountStore, AccountsVerifier
from gatepost.auth.authenticator import CACHE_ENTRIES_MAX, MARK_OCTETS, Authenticator, Login
from gatepost.auth.scram import SCRAM, SCRAM_PLUS
from gatepost.auth.settings import AuthSettings, LoginServer
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Password, Token

BINDINGS = {"tls-exporter": b"exported keying material"}
ALICE = Password("alice", "wonder")


class Server:
    """A verifier that knows its users, counts questions, and may be slow."""

    def __init__(self, name="pop3", users=None, *, addresses=()):
        self.name = name
        self.users = {"alice": "wonder"} if users is None else users
        self.addresses = addresses
        self.asked = []
        self.says = None
        self.closed = False
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def verify(self, credentials):
        self.asked.append(credentials)
        await self.go_on.wait()
        if self.says is not None:
            return self.says
        if isinstance(credentials, Token):
            known = credentials.token == "good"
            return Verified(credentials.user) if known else Denied("a bad token")
        account = credentials.user.lower()
        if self.users.get(account) == credentials.secret:
            return Verified(account, self.addresses)
        return Denied("wrong password" if account in self.users else "no such account")

    async def close(self):
        self.closed = True


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Shared:
    """What the workers of a gate share."""

    def __init__(self):
        self.key = b"k" * 32
        self.marks = {}

    def last_good(self, user):
        return self.marks.get(user)

    def set_last_good(self, user, mark):
        self.marks[user] = mark


def asking(*verifiers, cache_s=60.0, **more):
    return Authenticator(AuthSettings(cache_s=cache_s), verifiers=verifiers, **more)


@pytest.fixture
def store(tmp_path):
    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    return AccountStore(str(tmp_path / "accounts"), hasher=hasher, iterations=4096)


@pytest.fixture
async def accounts(store):
    verifier = AccountsVerifier(store)
    yield verifier
    await verifier.close()


# --- In order ---------------------------------------------------------------------------------------------------------


async def test_the_first_yes_ends_it_and_says_who_gave_it():
    first, second, third = Server("pop3", {}), Server("imap"), Server("ldap")
    assert await asking(first, second, third).verify(ALICE) == Login(Verified("alice"), "imap")
    assert [len(server.asked) for server in (first, second, third)] == [1, 1, 0]


async def test_all_noes_are_a_no():
    login = await asking(Server("pop3", {}), Server("imap", {"alice": "else"})).verify(ALICE)
    assert login == Login(Denied("pop3: no such account; imap: wrong password"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_where_one_cannot_tell_nobody_can(order):
    silent = Server("imap")
    silent.says = Unavailable("it does not answer")
    servers = (Server("pop3", {}), silent)
    login = await asking(*(servers[number] for number in order)).verify(ALICE)
    assert login == Login(Unavailable("imap: it does not answer"))
    assert all(len(server.asked) == 1 for server in servers)


async def test_a_yes_counts_though_another_cannot_tell():
    silent = Server("imap")
    silent.says = Unavailable("it does not answer")
    assert await asking(silent, Server("pop3")).verify(ALICE) == Login(Verified("alice"), "pop3")


async def test_tokens_go_to_their_issuer_and_passwords_do_not():
    server, issuer = Server("pop3"), Server("oauth")
    both = asking(server, issuer)
    assert await both.verify(Token("alice", "good")) == Login(Verified("alice"), "oauth")
    assert await both.verify(ALICE) == Login(Verified("alice"), "pop3")
    assert (server.asked, issuer.asked) == ([ALICE], [Token("alice", "good")])


async def test_what_nobody_takes_is_denied():
    assert isinstance((await asking(Server("pop3")).verify(Token("alice", "good"))).outcome, Denied)
    assert isinstance((await asking(Server("oauth")).verify(ALICE)).outcome, Denied)


@pytest.mark.parametrize(
    ("authzid", "taken"),
    [
        ("", True), ("alice", True), ("ALICE", True), ("Alice", True), ("al@example.com", True), ("bob", False),
        ("alice@example.com", False),
    ],
)  # fmt: skip
async def test_a_login_is_for_oneself(authzid, taken):
    one = asking(Server(addresses=("al@example.com",)))
    login = await one.verify(Password("Alice", "wonder", authzid))
    assert isinstance(login.outcome, Verified) == taken
    if not taken:
        assert login == Login(Denied("authorization identity of another account"))


async def test_a_wrong_password_stays_one_whatever_the_authorization_identity():
    login = await asking(Server()).verify(Password("alice", "wrong", "bob"))
    assert login.outcome == Denied("pop3: wrong password")


async def test_it_closes_its_verifiers():
    servers = [Server("pop3"), Server("imap")]
    await asking(*servers).close()
    assert all(server.closed for server in servers)


async def test_it_closes_when_logins_under_way_have_their_answer():
    server = Server()
    one = asking(server)
    server.go_on.clear()
    login = asyncio.ensure_future(one.verify(ALICE))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(one.close())
    await asyncio.sleep(0)
    assert not server.closed
    server.go_on.set()
    await closing
    assert server.closed
    assert (await login).verifier == "pop3"


# --- What is remembered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after_s", "asked"), [(0, 1), (59, 1), (60, 2), (61, 2)])
async def test_a_yes_is_believed_for_a_while(after_s, asked):
    clock, server = Clock(), Server()
    one = asking(server, clock=clock)
    await one.verify(ALICE)
    clock.now += after_s
    assert await one.verify(ALICE) == Login(Verified("alice"), "pop3")
    assert len(server.asked) == asked


async def test_it_is_not_believed_longer_for_being_used():
    clock, server = Clock(), Server()
    one = asking(server, clock=clock)
    for _ in range(7):
        await one.verify(ALICE)
        clock.now += 10
    assert len(server.asked) == 2


async def test_nothing_is_remembered_where_that_is_wanted():
    server = Server()
    one = asking(server, cache_s=0)
    await one.verify(ALICE)
    await one.verify(ALICE)
    assert len(server.asked) == 2


async def test_a_no_and_an_unknown_are_not_remembered():
    server = Server()
    one = asking(server)
    for said in (Denied("wrong"), Unavailable("silent"), Denied("wrong")):
        server.says = said
        assert type((await one.verify(ALICE)).outcome) is type(said)
    server.says = None
    assert isinstance((await one.verify(ALICE)).outcome, Verified)


async def test_another_password_is_always_asked_for():
    server = Server()
    one = asking(server)
    await one.verify(ALICE)
    assert isinstance((await one.verify(Password("alice", "wonderful"))).outcome, Denied)
    assert isinstance((await one.verify(Password("bob", "wonder"))).outcome, Denied)
    await one.verify(ALICE)
    assert len(server.asked) == 3  # a wrong guess does not make the right one forgotten


async def test_the_new_password_ends_the_old_ones_rights():
    server = Server()
    one = asking(server)
    await one.verify(ALICE)
    server.users["alice"] = "changed"
    assert isinstance((await one.verify(ALICE)).outcome, Verified)  # nobody knows it yet
    await one.verify(Password("alice", "changed"))
    assert isinstance((await one.verify(ALICE)).outcome, Denied)


async def test_the_new_password_ends_the_old_ones_rights_however_the_name_is_typed():
    server = Server()
    one = asking(server)
    await one.verify(Password("Alice", "wonder"))
    server.users["alice"] = "changed"
    await one.verify(Password("alice", "changed"))
    assert isinstance((await one.verify(Password("Alice", "wonder"))).outcome, Denied)


async def test_the_new_password_ends_the_old_ones_rights_in_every_worker():
    server, shared = Server(), Shared()
    here, there = (asking(server, freshness=shared) for _ in range(2))
    await here.verify(ALICE)
    server.users["alice"] = "changed"
    await there.verify(Password("alice", "changed"))
    assert isinstance((await here.verify(ALICE)).outcome, Denied)
    assert all(len(mark) == MARK_OCTETS for mark in shared.marks.values())


async def test_what_the_workers_forgot_is_asked_for_again():
    server, shared = Server(), Shared()
    one = asking(server, freshness=shared)
    await one.verify(ALICE)
    shared.marks.clear()
    await one.verify(ALICE)
    assert len(server.asked) == 2


async def test_servers_are_remembered_apart():
    pop3, imap = Server("pop3"), Server("imap", {"alice": "other"})
    one = asking(pop3, imap)
    for _ in range(2):
        assert (await one.verify(ALICE)).verifier == "pop3"
        assert (await one.verify(Password("alice", "other"))).verifier == "imap"
    assert (await one.verify(ALICE)).verifier == "pop3"
    assert len(imap.asked) == 1


async def test_tokens_are_not_remembered():
    issuer = Server("oauth")
    one = asking(issuer)
    await one.verify(Token("alice", "good"))
    issuer.says = Denied("expired")
    assert isinstance((await one.verify(Token("alice", "good"))).outcome, Denied)


async def test_own_accounts_are_not_remembered(store, accounts):
    store.add("alice", "correct horse")
    one = asking(accounts)
    assert (await one.verify(Password("alice", "correct horse"))).verifier == "accounts"
    store.set_locked("alice", locked=True)
    assert (await one.verify(Password("alice", "correct horse"))).outcome == Denied("accounts: locked")


@pytest.mark.parametrize(("others", "asked"), [(1, 1), (2, 1), (3, 2)])
async def test_what_is_remembered_has_a_limit(monkeypatch, others, asked):
    assert CACHE_ENTRIES_MAX == 10_000
    monkeypatch.setattr(authenticator, "CACHE_ENTRIES_MAX", 3)
    server = Server(users={"alice": "wonder", "0": "x", "1": "x", "2": "x"})
    one = asking(server)
    await one.verify(ALICE)
    for number in range(others):
        await one.verify(Password(str(number), "x"))
    await one.verify(ALICE)
    assert server.asked.count(ALICE) == asked


# --- Ten connections at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, Denied("wrong"), Unavailable("silent")])
async def test_logins_that_are_the_same_are_asked_once(said):
    server = Server()
    server.says = said
    server.go_on.clear()
    one = asking(server, cache_s=0)
    logins = [asyncio.ensure_future(one.verify(ALICE)) for _ in range(10)]
    other = asyncio.ensure_future(one.verify(Password("alice", "wonderful")))
    await asyncio.sleep(0)
    server.go_on.set()
    outcomes = await asyncio.gather(*logins)
    assert len(set(outcomes)) == 1
    assert server.asked.count(ALICE) == 1
    assert (await other).outcome != Verified("alice")
    await one.verify(ALICE)
    assert server.asked.count(ALICE) == 2  # that was another time


async def test_an_authorization_identity_is_judged_for_each_of_them():
    server = Server()
    server.go_on.clear()
    one = asking(server)
    logins = [asyncio.ensure_future(one.verify(Password("alice", "wonder", who))) for who in ("", "bob")]
    await asyncio.sleep(0)
    server.go_on.set()
    own, others = await asyncio.gather(*logins)
    assert isinstance(own.outcome, Verified)
    assert isinstance(others.outcome, Denied)
    assert len(server.asked) == 1


async def test_where_the_one_who_asks_leaves_the_next_one_asks():
    server = Server()
    server.go_on.clear()
    one = asking(server)
    first, *others = [asyncio.ensure_future(one.verify(ALICE)) for _ in range(4)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    server.go_on.set()
    assert await asyncio.gather(*others) == [Login(Verified("alice"), "pop3")] * 3
    assert len(server.asked) == 2


async def test_one_who_waits_may_leave_alone():
    server = Server()
    server.go_on.clear()
    one = asking(server)
    first, second, third = [asyncio.ensure_future(one.verify(ALICE)) for _ in range(3)]
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})
    server.go_on.set()
    assert (await first, await third) == (Login(Verified("alice"), "pop3"),) * 2
    assert len(server.asked) == 1


# --- Mechanisms -------------------------------------------------------------------------------------------------------


async def test_mechanisms_follow_from_who_is_asked(accounts):
    server, issuer = Server("ldap"), Server("oauth")
    assert asking(accounts).mechanisms({}) == (SCRAM, "PLAIN", "LOGIN")
    assert asking(accounts).mechanisms(BINDINGS) == (SCRAM_PLUS, SCRAM, "PLAIN", "LOGIN")
    assert asking(accounts, issuer).mechanisms({}) == (SCRAM, "OAUTHBEARER", "XOAUTH2", "PLAIN", "LOGIN")
    assert asking(server).mechanisms(BINDINGS) == ("PLAIN", "LOGIN")
    assert asking(issuer).mechanisms(BINDINGS) == ("OAUTHBEARER", "XOAUTH2")
    # Whoever is in the directory only would be refused by a client that prefers SCRAM.
    assert asking(accounts, server).mechanisms(BINDINGS) == ("PLAIN", "LOGIN")
    assert asking(server, accounts).mechanisms(BINDINGS) == ("PLAIN", "LOGIN")


async def test_what_is_not_offered_has_no_exchange(accounts):
    assert asking(Server()).exchange(SCRAM, {}) is None
    assert asking(accounts).exchange(SCRAM_PLUS, {}) is None
    assert asking(accounts).exchange("XOAUTH2", {}) is None
    assert asking(accounts).exchange("CRAM-MD5", {}) is None


@pytest.mark.parametrize("bindings", [{}, {"tls-server-end-point": b"digest"}, BINDINGS])
async def test_who_could_bind_and_was_not_offered_it_is_not_refused_for_that(accounts, bindings):
    """RFC 5802 §6: "y" is a lie told to the client only where -PLUS was offered."""
    one = asking(accounts)
    exchange = one.exchange(SCRAM, bindings)
    assert exchange is not None
    answer = await exchange.step(b"y,,n=alice,r=abcdefgh")
    assert isinstance(answer, Reply if SCRAM_PLUS in one.mechanisms(bindings) else Challenge)


async def test_a_told_secret_is_handed_out_to_be_verified():
    one = asking(Server(), Server("oauth"))
    exchange = one.exchange("PLAIN", {})
    assert exchange is not None
    assert (await exchange.step(None), exchange.user) == (Challenge(b""), "")
    assert await exchange.step(b"\0alice\0wonder") == ALICE
    assert (exchange.user, exchange.denied()) == ("alice", None)
    exchange = one.exchange("LOGIN", {})
    assert exchange is not None
    assert isinstance(await exchange.step(b"alice"), Challenge)
    assert await exchange.step(b"wonder") == ALICE
    exchange = one.exchange("XOAUTH2", {})
    assert exchange is not None
    assert await exchange.step(b"user=alice\x01auth=Bearer good\x01\x01") == Token("alice", "good")
    assert isinstance(exchange.denied(), Challenge)  # it tells the client why


async def by_scram(one, user, secret, header=""):
    """A login by the library's client, whose first message may be given another header."""
    client = ScramClient([SCRAM], user, secret)
    exchange = one.exchange(SCRAM, {})
    first = client.get_client_first()
    answer = await exchange.step((header or "n,,").encode() + first.removeprefix("n,,").encode())
    assert isinstance(answer, Challenge)
    assert exchange.user == user
    client.set_server_first(answer.octets.decode())
    final = client.get_client_final()
    answer = await exchange.step(final.encode())
    if isinstance(answer, Challenge):
        client.set_server_final(answer.octets.decode())
        answer = await exchange.step(b"")
    return answer


async def test_scram_is_a_login_by_itself(store, accounts):
    one = asking(accounts)
    store.add("alice", "correct horse")
    phone = store.add_device("alice", "phone")
    assert await by_scram(one, "alice", "correct horse") == Login(Verified("alice"), "accounts")
    assert await by_scram(one, "alice", phone) == Login(Verified("alice", device="phone"), "accounts")
    assert await by_scram(one, "alice", "battery staple") == Login(Denied("accounts: wrong password"))
    assert await by_scram(one, "bob", "battery staple") == Login(Denied("accounts: no such account"))
    store._path.joinpath("alice.json").write_bytes(b"")
    exchange = one.exchange(SCRAM, {})
    assert exchange is not None
    login = await exchange.step(b"n,,n=alice,r=x")
    assert isinstance(login, Login)
    assert isinstance(login.outcome, Unavailable)
    assert exchange.denied() is None


@pytest.mark.parametrize(("authzid", "taken"), [("Alice", True), ("bob", False)])
async def test_a_login_by_scram_is_for_oneself(store, accounts, authzid, taken):
    store.add("alice", "correct horse")
    one = asking(accounts)
    client = ScramClient([SCRAM], "alice", "correct horse")
    header = f"n,a={authzid},"

    # The library's client knows no authorization identity; what it says of the header is put right before it proves it.
    class Header:
        def make_cbind_input(self, channel):
            return header.encode()

    client.gs2_header = Header()
    exchange = one.exchange(SCRAM, {})
    assert exchange is not None
    bare = "n=alice,r=" + client.c_nonce.nonce
    client.stage, client.client_first_bare = 1, bare
    answer = await exchange.step((header + bare).encode())
    assert isinstance(answer, Challenge)
    client.set_server_first(answer.octets.decode())
    final = client.get_client_final()
    assert base64.b64encode(header.encode()).decode() in final
    answer = await exchange.step(final.encode())
    assert isinstance(answer, Challenge)
    login = await exchange.step(b"")
    assert isinstance(login, Login)
    assert isinstance(login.outcome, Verified) == taken


async def test_nonces_are_new_each_time(accounts):
    one = asking(accounts)
    said = set()
    for _ in range(5):
        exchange = one.exchange(SCRAM, {})
        assert exchange is not None
        answer = await exchange.step(b"n,,n=alice,r=x")
        assert isinstance(answer, Challenge)
        said.add(answer.octets.partition(b",")[0])
    assert len(said) == 5


async def test_a_refusal_of_octets_is_handed_on(accounts):
    exchange = asking(accounts).exchange(SCRAM, {})
    assert exchange is not None
    assert isinstance(await exchange.step(b"rubbish"), Reply)


async def test_baits_are_known_where_there_are_accounts(store, accounts):
    store.add("trap", bait=True)
    assert await asking(Server(), accounts).is_bait("TRAP")
    assert not await asking(Server()).is_bait("trap")


# --- From the settings ------------------------------------------------------------------------------------------------


async def test_the_settings_name_who_is_asked(tmp_path, store):
    store.add("alice", "correct horse")
    one = Authenticator(AuthSettings(accounts=str(store._path)))
    assert (await one.verify(Password("alice", "correct horse"))).verifier == "accounts"
    await one.close()
    settings = AuthSettings(verify=("pop3", "accounts"), accounts=str(store._path), pop3=LoginServer("127.0.0.1", 1))
    one = Authenticator(settings)
    login = await one.verify(Password("alice", "wrong"))
    assert isinstance(login.outcome, Unavailable)
    assert login.outcome.why.startswith("pop3: ")
    assert (await one.verify(Password("alice", "correct horse"))).verifier == "accounts"
    await one.close()


def test_a_verifier_without_its_table_is_a_mistake():
    with pytest.raises(ValueError, match=r"no \[auth.imap\]"):
        Authenticator(AuthSettings(verify=("imap",)))


def test_what_is_not_asked_is_not_loaded():
    program = (
        "import sys\n"
        "from gatepost.auth.authenticator import Authenticator\n"
        "from gatepost.auth.settings import AuthSettings\n"
        "Authenticator(AuthSettings())\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {f"gatepost.auth.{name}" for name in ("pop3", "imap", "smtp", "ldap", "dovecot", "oauth")}
    assert not loaded & {"scramp", "aiohttp", "joserfc", "anyldap"}


async def test_nothing_of_it_shows_a_secret():
    one = asking(Server())
    await one.verify(ALICE)
    assert "wonder" not in repr(vars(one))
