"""AUTH, XCLIENT and POP-before-SMTP in the conversation: what a client hears, what its mail may do, what is logged."""

from __future__ import annotations

import base64
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from tests.gate.scripted_gate import Peer, Trial, unlimited
from tests.marked import MARKED

from gatepost.auth import Credentials, Denied, Outcome, Unavailable, Verified
from gatepost.auth.accounts import AccountStore
from gatepost.auth.settings import AuthSettings
from gatepost.counters.guesses import GuessLimits
from gatepost.gate.settings import ListenSettings, MailboxServer
from gatepost.policy.admission import SendAsEntry, SendAsRules
from gatepost.policy.relay import TrustEntry
from gatepost.smtp.path import Pattern
from gatepost.smtp.sasl import Password
from gatepost.telemetry import REPLIES

SECRET = MARKED
INVALID = "535 5.7.8 Authentication credentials invalid"
WELCOME = "235 2.7.0 Authentication succeeded"
ANYBODY = TrustEntry("g.toml:20", accounts=("*",), why="our people")
OWN = SendAsRules((), ("example.com",))


class Book:
    """A verifier that knows a few users, and can be out of reach."""

    def __init__(self, name: str = "pop3", **secrets: str) -> None:
        self.name = name
        self.secrets = secrets
        self.down = False
        self.asked: list[str] = []

    async def verify(self, credentials: Credentials) -> Outcome:
        self.asked.append(credentials.user)
        if self.down:
            return Unavailable("nobody answers at 10.0.0.5:110")
        secret = credentials.secret if isinstance(credentials, Password) else credentials.token
        user = credentials.user.lower()
        return Verified(user) if self.secrets.get(user) == secret else Denied("wrong password")

    async def close(self) -> None:
        """Nothing to let go of."""


def listen(**changes: Any) -> tuple[ListenSettings, ...]:
    """An mx, and a submission listener where AUTH works without TLS."""
    submission = {"role": "submission", "auth": "required", "auth_without_tls": True, **changes}
    return (
        ListenSettings("mx", (("127.0.0.1", 0),)),
        ListenSettings("submission", (("127.0.0.1", 0),), **submission),
    )


async def opened(trial: Trial, *verifiers: Book, listens: Any = None, **settings: Any) -> None:
    trial.verifiers = list(verifiers) or [Book(alice=SECRET, bob="battery staple")]
    settings = {"trust": (ANYBODY,), "send_as": OWN, "auth": AuthSettings(("pop3",), cache_s=0.0), **settings}
    await trial.apply(listens=listens or listen(), **settings)


def plain(user: str, secret: str, authzid: str = "") -> str:
    return base64.b64encode(f"{authzid}\0{user}\0{secret}".encode()).decode()


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def bearer(user: str, token: str) -> str:
    return b64(f"user={user}\x01auth=Bearer {token}\x01\x01")


async def logged_in(trial: Trial, user: str = "alice", secret: str = SECRET) -> Peer:
    peer = await trial.greeted(listen="submission")
    assert await peer.ask(f"AUTH PLAIN {plain(user, secret)}") == WELCOME
    return peer


# ---- the verb


async def test_auth_is_offered_by_role_and_only_where_it_may_be_used(trial):
    await opened(trial)
    mx, submission = await trial.connect(), await trial.connect(listen="submission")
    for peer in (mx, submission):
        await peer.reply()
    assert "AUTH" not in await mx.ask("EHLO client.test")
    assert "250-AUTH PLAIN LOGIN" in (await submission.ask("EHLO client.test")).split("\n")
    assert (await mx.ask(f"AUTH PLAIN {plain('alice', SECRET)}")).startswith("502 5.5.1")
    await trial.apply(listens=listen(auth_without_tls=False), trust=(ANYBODY,), auth=AuthSettings(("pop3",)))
    late = await trial.connect(listen="submission")
    await late.reply()
    assert "AUTH" not in await late.ask("EHLO client.test")
    assert (await late.ask(f"AUTH PLAIN {plain('alice', SECRET)}")).startswith("502 5.5.1")
    assert (await late.ask("MAIL FROM:<alice@example.com>")).startswith("530 5.7.0 Authentication required")


async def test_who_logged_in_may_send_anywhere_and_is_named_in_the_log(trial):
    await opened(trial)
    peer = await logged_in(trial)
    replies = await peer.asked("MAIL FROM:<alice@example.com>", "RCPT TO:<v@elsewhere.test>", "DATA")
    assert [reply[:3] for reply in replies] == ["250", "250", "354"]
    await peer.say(b"From: alice@example.com\r\n\r\nhello\r\n.\r\n")
    assert await peer.reply() == "250 2.0.0 Taken as 4711"
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert line["account"] == "alice"
    assert line["logins"] == [
        {"account": "alice", "mechanism": "PLAIN", "verdict": "verified", "verifier": "pop3"},
    ]
    assert line["transactions"][0]["recipients"][0]["by"] == "g.toml:20"
    assert SECRET not in trial.log_path.read_text()
    assert plain("alice", SECRET) not in trial.log_path.read_text()
    (delivery,) = trial.backend().deliveries
    assert delivery.session.identity is not None
    assert delivery.session.identity.account == "alice"
    assert b"with ESMTPA id" in delivery.trace_field


async def test_the_flag_off_means_550(trial):
    await opened(trial, trust=())
    peer = await logged_in(trial)
    assert (await peer.ask("MAIL FROM:<alice@example.com>")).startswith("250")
    assert (await peer.ask("RCPT TO:<v@elsewhere.test>")).startswith("550 5.7.1 Relaying is prohibited [")
    assert (await peer.ask("RCPT TO:<bob@example.com>")).startswith("250")


async def test_login_asks_for_name_and_password(trial):
    await opened(trial)
    peer = await trial.greeted(listen="submission")
    assert await peer.ask("AUTH LOGIN") == f"334 {b64('Username:')}"
    assert await peer.ask(b64("alice")) == f"334 {b64('Password:')}"
    assert await peer.ask(b64(SECRET)) == WELCOME


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["AUTH PLAIN", "*"], "501 5.7.0 Authentication cancelled"),
        (["AUTH LOGIN", b64("alice"), "*"], "501 5.7.0 Authentication cancelled"),
        (["AUTH PLAIN !!!!"], "501 5.5.4 Syntax: AUTH mechanism [initial-response]"),
        (["AUTH PLAIN", "YQ"], "501 5.5.2 The response is not base64"),
        (["AUTH PLAIN", b64("no nulls")], "501 5.5.2"),
        (["AUTH PLAIN", "A" * 12287], "500 5.5.6 Authentication exchange line is too long"),
        (["AUTH CRAM-MD5"], "504 5.5.4 This mechanism is not offered here"),
        (["AUTH"], "501 5.5.4"),
        (["AUTH LOGIN", "MAIL FROM:<>"], "501 5.5.2 The response is not base64"),
    ],
)
async def test_a_bad_exchange_is_refused_and_the_session_goes_on(trial, lines, said):
    await opened(trial)
    peer = await trial.greeted(listen="submission")
    *before, last = lines
    for line in before:
        assert (await peer.ask(line)).startswith("334")
    assert (await peer.ask(last)).startswith(said)
    assert (await peer.ask("NOOP")).startswith("250")
    assert await peer.ask(f"AUTH PLAIN {plain('alice', SECRET)}") == WELCOME


async def test_auth_has_its_place_in_the_dialogue(trial):
    await opened(trial)
    peer = await trial.connect(listen="submission")
    await peer.reply()
    for hello in ("", "HELO client.test"):
        if hello:
            assert (await peer.ask(hello)).startswith("250")
        assert (await peer.ask(f"AUTH PLAIN {plain('alice', SECRET)}")).startswith("503 "), hello
    await peer.ask("EHLO client.test")
    assert await peer.ask(f"AUTH PLAIN {plain('alice', SECRET)}") == WELCOME
    assert await peer.ask(f"AUTH PLAIN {plain('bob', 'battery staple')}") == "503 5.5.1 You are authenticated already"
    await peer.ask("MAIL FROM:<alice@example.com>")
    assert (await peer.ask(f"AUTH PLAIN {plain('alice', SECRET)}")).startswith("503")
    # RFC 4954 §4: neither RSET nor EHLO ends a login
    assert (await peer.asked("RSET", "EHLO again.test", "MAIL FROM:<alice@example.com>"))[-1].startswith("250")


async def test_an_authorization_identity_of_another_account_is_refused(trial):
    await opened(trial)
    peer = await trial.greeted(listen="submission")
    assert await peer.ask(f"AUTH PLAIN {plain('alice', SECRET, 'bob')}") == INVALID
    assert await peer.ask(f"AUTH PLAIN {plain('alice', SECRET, 'alice')}") == WELCOME


async def test_a_token_that_is_refused_is_explained_to_its_client_first(trial):
    await opened(trial, Book("oauth", alice="good"), auth=AuthSettings(("oauth",)))
    peer = await trial.greeted(listen="submission")
    assert "250-AUTH OAUTHBEARER XOAUTH2" in (await peer.ask("EHLO client.test")).split("\n")
    bad = await peer.ask(f"AUTH XOAUTH2 {bearer('alice', 'bad')}")
    assert b'"status": "401"' in base64.b64decode(bad.removeprefix("334 "))
    assert await peer.ask("") == INVALID
    assert await peer.ask(f"AUTH XOAUTH2 {bearer('alice', 'good')}") == WELCOME
    (verdicts,) = [[login["verdict"] for login in trial.session(peer)._logins]]
    assert verdicts == ["denied", "verified"]


async def test_a_server_out_of_reach_is_454_and_no_guess(trial):
    book = Book(alice=SECRET)
    await opened(trial, book)
    peer = await trial.greeted(listen="submission")
    book.down = True
    for number in range(30):
        said = await peer.ask(f"AUTH PLAIN {plain('alice', f'wrong {number}')}")
        assert said == "454 4.7.0 Temporary authentication failure, try again later"
    book.down = False
    assert await peer.ask(f"AUTH PLAIN {plain('alice', SECRET)}") == WELCOME
    assert trial.delays == []
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert line["logins"][0]["why"] == "pop3: nobody answers at 10.0.0.5:110"
    assert len(line["logins"]) == 10  # the last of them


async def test_own_accounts_by_password_and_scram_and_device(trial):
    store = AccountStore(str(trial.data / "accounts"))
    store.add("alice@example.com", SECRET)
    device = store.add_device("alice@example.com", "printer")
    await trial.apply(
        listens=listen(), trust=(ANYBODY,), send_as=OWN, auth=AuthSettings(accounts=str(trial.data / "accounts"))
    )
    peer = await trial.greeted(listen="submission")
    assert "250-AUTH SCRAM-SHA-256 PLAIN LOGIN" in (await peer.ask("EHLO client.test")).split("\n")
    assert await peer.ask(f"AUTH PLAIN {plain('Alice@Example.com', SECRET)}") == WELCOME
    by_device = await trial.greeted(listen="submission")
    assert await by_device.ask(f"AUTH PLAIN {plain('alice@example.com', device)}") == WELCOME
    await by_device.ask("QUIT")
    (line,) = await trial.logged()
    assert (line["account"], line["logins"][0]["device"]) == ("alice@example.com", "printer")


# ---- guessing


LIMITS = GuessLimits(secrets_per_user=3, users_per_client=3, delays_s=(0.0, 0.5, 1.0))


async def guess(trial: Trial, user: str, secret: str, source: str) -> str:
    peer = await trial.greeted(source, listen="submission")
    said = await peer.ask(f"AUTH PLAIN {plain(user, secret)}")
    await peer.ask("QUIT")
    return said


async def test_a_phone_with_an_old_password_is_no_attack(trial):
    await opened(trial, guesses=LIMITS)
    for _ in range(20):
        assert await guess(trial, "alice", "old password", "127.0.0.9") == INVALID
    assert await guess(trial, "alice", SECRET, "127.0.0.9") == WELCOME


async def test_distinct_secrets_are_slowed_then_banned_with_that_account_alone(trial):
    book = Book(alice=SECRET, bob="battery staple")
    await opened(trial, book, guesses=LIMITS)
    for number in range(3):
        assert await guess(trial, "alice", f"guess {number}", "127.0.0.9") == INVALID
    assert trial.delays == [0.5, 1.0]
    asked = len(book.asked)
    assert await guess(trial, "alice", SECRET, "127.0.0.9") == INVALID  # banned: not even asked
    assert len(book.asked) == asked
    assert await guess(trial, "bob", "battery staple", "127.0.0.9") == WELCOME
    assert await guess(trial, "alice", SECRET, "127.0.9.9") == WELCOME  # another network: her account is not locked
    (event,) = await trial.logged("ban")
    assert event["text"].startswith("127.0.0.0/24 with the account alice is banned until ")
    trial.now_s += LIMITS.ban_s + 1
    assert await guess(trial, "alice", SECRET, "127.0.0.9") == WELCOME


async def test_many_users_from_one_client_ban_it_at_the_door(trial):
    await opened(trial, guesses=LIMITS)
    for user in ("anna", "ben", "carla"):
        assert await guess(trial, user, "123456", "127.0.0.9") == INVALID
    for name in ("submission", "mx"):
        peer = await trial.connect("127.0.0.9", listen=name)
        assert (await peer.rest()).startswith("421 4.7.0 Your address is banned here for a while")
    assert trial.counted(REPLIES, "connect", "banned") == 2
    await trial.greeted("127.0.0.8")
    trial.now_s += LIMITS.ban_s + 1
    await trial.greeted("127.0.0.9")


async def test_the_gates_own_address_and_its_proxies_are_never_banned(trial):
    listens = (
        *listen(),
        ListenSettings("behind", (("127.0.0.1", 0),), proxy_from=("127.0.0.7/32",)),
    )
    await opened(trial, listens=listens, guesses=LIMITS)
    for source in ("127.0.0.1", "127.0.0.7"):
        for number in range(10):
            assert await guess(trial, f"user{number}", "123456", source) == INVALID
    assert not trial.lines("ban")


async def test_a_bait_account_bans_at_once(trial):
    store = AccountStore(str(trial.data / "accounts"))
    store.add("backup", bait=True)
    await trial.apply(listens=listen(), auth=AuthSettings(accounts=str(trial.data / "accounts")))
    assert await guess(trial, "backup", "anything", "127.0.0.9") == INVALID
    peer = await trial.connect("127.0.0.9")
    assert (await peer.rest()).startswith("421 4.7.0")
    (event,) = await trial.logged("ban")
    assert "used the bait account backup" in event["text"]


# ---- who may send as whom


async def test_mail_from_must_be_ones_own(trial):
    grants = SendAsRules(
        (SendAsEntry("g.toml:30", ("alice",), (Pattern.parse("sales@example.com"),)),), ("example.com",)
    )
    await opened(trial, send_as=grants)
    peer = await logged_in(trial)
    said = await peer.ask("MAIL FROM:<bob@example.com>")
    assert said.startswith(
        "550 5.7.1 Sending as this address is prohibited: expected alice@example.com or sales@example.com ["
    )
    for sender in ("sales@example.com", "ALICE@example.com", ""):
        assert (await peer.asked(f"MAIL FROM:<{sender}>", "RSET"))[0].startswith("250"), sender
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert line["transactions"][0]["reason"] == "send_as"


async def submit(peer: Peer, header: str) -> str:
    await peer.asked("MAIL FROM:<alice@example.com>", "RCPT TO:<v@elsewhere.test>", "DATA")
    await peer.say(f"{header}\r\nbody\r\n.\r\n".encode())
    return await peer.reply()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("From: Alice <alice@example.com>\r\n", "250 2.0.0"),
        ("From: alice@example.com\r\nSender: boss@example.com\r\n", "250 2.0.0"),
        ("Subject: no author\r\n", "250 2.0.0"),
        ("", "250 2.0.0"),
        ("From: The Boss <boss@example.com>\r\n", "550 5.7.1 Sending as this address is prohibited: expected alice@"),
        ('From: "boss@example.com" <alice@example.com>\r\n', "550 5.7.1 Sending as this address is prohibited"),
        ("From: alice@example.com, boss@example.com\r\n", "550 5.7.1 Sending as this address is prohibited"),
        ("From: alice@example.com\r\nFrom: boss@example.com\r\n", "550 5.7.1 Nobody can tell whom the message is from"),
        ("FROM:\r\n boss@example.com\r\n", "550 5.7.1 Sending as this address is prohibited"),
        ("From: @@\r\n", "550 5.7.1 Nobody can tell whom the message is from"),
    ],
)
async def test_the_author_must_be_ones_own(trial, header, said):
    await opened(trial)
    peer = await logged_in(trial)
    assert (await submit(peer, header)).startswith(said)
    assert len(trial.backend().contents) == said.startswith("250")
    assert (await submit(peer, "From: alice@example.com\r\n")).startswith("250")


async def test_a_long_header_section_in_a_file_is_read_back(trial):
    await opened(trial, limits=replace(unlimited(), memory_octets=1 << 20, message_memory_octets=1))
    peer = await logged_in(trial)
    padding = "".join(f"X-{number}: {'x' * 900}\r\n" for number in range(200))
    assert (await submit(peer, f"{padding}From: boss@example.com\r\n")).startswith("550 5.7.1")
    assert (await submit(peer, f"{padding}From: alice@example.com\r\n")).startswith("250")


async def test_log_only_tells_what_would_be_refused(trial):
    await opened(trial, listens=listen(send_as="log"))
    peer = await logged_in(trial)
    await peer.asked("MAIL FROM:<boss@example.com>", "RCPT TO:<v@elsewhere.test>", "DATA")
    await peer.say(b"From: boss@example.com\r\n\r\nbody\r\n.\r\n")
    assert (await peer.reply()).startswith("250")
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert line["transactions"][0]["would"] == "refuse: send_as: alice as boss@example.com"
    assert line["transactions"][0]["verdict"] == "accepted"


async def test_off_does_not_look(trial):
    await opened(trial, listens=listen(send_as="off"))
    peer = await logged_in(trial)
    await peer.asked("MAIL FROM:<boss@example.com>", "RCPT TO:<v@elsewhere.test>", "DATA")
    await peer.say(b"From: @@\r\n\r\nbody\r\n.\r\n")
    assert (await peer.reply()).startswith("250")
    assert "would" not in trial.session(peer)._transactions[0]


# ---- XCLIENT

FRONT = (ListenSettings("mx", (("127.0.0.1", 0),), xclient_from=("127.0.0.7/32",)),)
OFFICE = TrustEntry("g.toml:9", network=ip_network("10.1.0.0/16"))
FRONTS_OWN = TrustEntry("g.toml:12", network=ip_network("127.0.0.7/32"))


async def test_a_listed_front_end_says_who_its_client_is(trial):
    await trial.apply(listens=FRONT, trust=(OFFICE, FRONTS_OWN))
    peer = await trial.greeted("127.0.0.7")
    assert "250-XCLIENT NAME ADDR PORT PROTO HELO" in (await peer.ask("EHLO front.test")).split("\n")
    assert (await peer.ask("XCLIENT ADDR=198.51.100.7 PORT=2525 HELO=stranger.test")).startswith("220 ")
    await peer.ask("EHLO stranger.test")
    assert (await peer.asked("MAIL FROM:<>", "RCPT TO:<v@elsewhere.test>"))[-1].startswith("550 5.7.1 Relaying")
    await peer.ask("RSET")
    # the front end may go on to its next client, and is never taken for it
    assert (await peer.ask("XCLIENT ADDR=IPV6:::FFFF:10.1.2.3")).startswith("220 ")
    await peer.ask("EHLO office.test")
    assert (await peer.asked("MAIL FROM:<>", "RCPT TO:<v@elsewhere.test>"))[-1].startswith("250")
    assert str(trial.backend().deliveries[0].session.client.address) == "10.1.2.3"
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert (line["client"], line["real_client"]) == ("10.1.2.3", "127.0.0.7")
    assert trial.server.occupancy.sessions() == 0


async def test_nobody_else_may_say_xclient(trial):
    await trial.apply(listens=FRONT, trust=(OFFICE,))
    peer = await trial.greeted("127.0.0.8")
    assert "XCLIENT" not in await peer.ask("EHLO stranger.test")
    assert (await peer.ask("XCLIENT ADDR=10.1.2.3")).startswith("502 ")
    await peer.asked("EHLO stranger.test", "MAIL FROM:<>")
    assert (await peer.ask("RCPT TO:<v@elsewhere.test>")).startswith("550 5.7.1 Relaying")


async def test_a_client_whose_address_is_lost_inherits_nothing(trial):
    await trial.apply(listens=FRONT, trust=(FRONTS_OWN,))
    peer = await trial.greeted("127.0.0.7")
    assert (await peer.ask("XCLIENT ADDR=[UNAVAILABLE]")).startswith("550 5.7.1 XCLIENT must say who the client is")
    await peer.over()


async def test_a_login_that_a_front_end_claims_is_not_believed(trial):
    await trial.apply(listens=FRONT, trust=(ANYBODY,))
    peer = await trial.greeted("127.0.0.7")
    assert (await peer.ask("XCLIENT ADDR=198.51.100.7 LOGIN=alice")).startswith("220 ")
    await peer.asked("EHLO client.test", "MAIL FROM:<alice@example.com>")
    assert (await peer.ask("RCPT TO:<v@elsewhere.test>")).startswith("550 5.7.1 Relaying")


async def test_octets_behind_xclient_are_not_the_clients(trial):
    await trial.apply(listens=FRONT, trust=(OFFICE,))
    peer = await trial.greeted("127.0.0.7")
    await peer.say(b"XCLIENT ADDR=10.1.2.3\r\nMAIL FROM:<>\r\n")
    assert (await peer.reply()).startswith("554 5.5.0")
    await peer.over()


async def test_limits_count_the_client_behind_the_front_end(trial):
    await trial.apply(listens=FRONT, limits=unlimited(sessions_per_client=2))
    peers = [await trial.greeted("127.0.0.7") for _ in range(2)]
    for peer in peers:
        assert (await peer.ask("XCLIENT ADDR=198.51.100.7")).startswith("220 ")
    third = await trial.greeted("127.0.0.7")
    assert (await third.ask("XCLIENT ADDR=198.51.100.7")).startswith("421 4.7.0 Too many sessions")
    await third.over()


# ---- POP before SMTP

WINDOW = TrustEntry("g.toml:40", pop3_s=1800.0)


async def test_a_login_to_the_mailbox_opens_a_window_for_its_address(trial):
    listens = (
        *listen(),
        ListenSettings("pop", (("127.0.0.1", 0),), role="pop3", server=MailboxServer("127.0.0.1", 110)),
    )
    await opened(trial, listens=listens, trust=(WINDOW,))
    peer = await trial.greeted("127.0.0.9")

    async def relays() -> str:
        return (await peer.asked("MAIL FROM:<>", "RCPT TO:<v@elsewhere.test>", "RSET"))[1]

    address = trial.session(peer).facts.client.address
    assert (await relays()).startswith("550 5.7.1 Relaying is prohibited [")
    assert trial.server.login_opened("alice", address, 3, trial.now_s)
    opened_at = trial.now_s
    for after_s, said in (
        (0.0, "250"),
        (1799.0, "250"),
        (1800.0, "550 5.7.1 Relaying is prohibited: read your mail first, then send ["),
        (1801.0, "550 5.7.1 Relaying is prohibited: read your mail first, then send ["),
    ):
        trial.now_s = opened_at + after_s
        assert (await relays()).startswith(said), after_s
    other = await trial.greeted("127.0.0.8")
    await other.ask("MAIL FROM:<>")
    assert (await other.ask("RCPT TO:<v@elsewhere.test>")).startswith("550 5.7.1 Relaying is prohibited [")


# ---- devices


async def test_a_named_device_need_not_know_its_own_name(trial):
    printer = TrustEntry("g.toml:50", network=ip_network("127.0.0.9/32"))
    await trial.apply(trust=(printer,))
    for hello in ("EHLO", "HELO", "EHLO "):
        peer = await trial.connect("127.0.0.9")
        await peer.reply()
        assert (await peer.ask(hello)).startswith("250"), hello
        assert (await peer.ask("EHLO")).startswith("250")
        assert (await peer.asked("MAIL FROM:<>", "RCPT TO:<v@elsewhere.test>"))[-1].startswith("250")
        await peer.ask("QUIT")
    stranger = await trial.connect("127.0.0.8")
    await stranger.reply()
    assert (await stranger.ask("EHLO")).startswith("501")
    await trial.apply(trust=(replace(printer, expires_at=trial.now_s),))
    late = await trial.connect("127.0.0.9")
    await late.reply()
    assert (await late.ask("EHLO")).startswith("501")
