"""Logins at a gate whose accounts are somewhere else: at a real Dovecot, slapd, or Postfix, each asked in its own way.

What must hold, whoever is asked: the right password sends anywhere; a wrong one and an unknown user hear the same;
while nobody can tell, the client hears 454, is told the truth afterwards, and was not taken for a guesser.
"""

from __future__ import annotations

import base64
import imaplib
import json
import poplib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from tests.auth.parts import PASSWORDS
from tests.gatehouse import Gate
from tests.real.console import events, no_faults
from tests.real.programs import unjudging
from tests.real.test_logins import account
from tests.real.wire import PATIENCE_S, Wire, message, until
from tests.servers import Dovecot, Postfix, Server, Slapd
from tests.vectors.lenient import LenientBackend

ALICE = "alice@example.com"
OUTSIDE = "friend@elsewhere.test"
WELCOME = "235 2.7.0 Authentication succeeded"
INVALID = "535 5.7.8 Authentication credentials invalid"
UNAVAILABLE = "454 4.7.0 Temporary authentication failure, try again later"
LATECOMER, LATE_SECRET = "latecomer@example.com", "only once it is back"  # nobody has seen this one log in before
USERS = {**PASSWORDS, LATECOMER: LATE_SECRET}
ALIASES = {"alice": {"proxyAddresses": ["SMTP:Alice@Example.COM", "smtp:sales@example.com", "X500:/o=x"]}}

CONFIG = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "submission"
address = "127.0.0.1:0"
role = "submission"
auth_without_tls = true

[auth]
verify = {verify}
cache = "10m"

{tables}

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"
tls = "off"

[[trust]]
accounts = ["*"]
why = "our people"

[limits]
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:0"
"""


def config(mail: int, verify: list[str], tables: str) -> str:
    return CONFIG.format(verify=json.dumps(verify), tables=tables, mail=mail)


# ---- a client


def plain(user: str, secret: str) -> str:
    return base64.b64encode(f"\0{user}\0{secret}".encode()).decode()


def login(gate: Gate, user: str, secret: str, source: str = "") -> str:
    """What the client hears."""
    with Wire(gate.ports["submission"], source=source) as wire:
        wire.hello()
        reply = wire.say(f"AUTH PLAIN {plain(user, secret)}")
        wire.say("QUIT")
        return reply


def send(gate: Gate, user: str, secret: str, sender: str, source: str = "") -> str:
    """The last thing that the client hears."""
    with Wire(gate.ports["submission"], source=source) as wire:
        wire.hello()
        reply = wire.say(f"AUTH PLAIN {plain(user, secret)}")
        if reply != WELCOME:
            return reply
        reply = wire.say(f"MAIL FROM:<{sender}>")
        if not reply.startswith("250"):
            return reply
        reply = wire.say(f"RCPT TO:<{OUTSIDE}>")
        if not reply.startswith("250"):
            return reply
        return wire.content(f"From: {sender}\r\nSubject: by {sender}\r\n\r\nHello.\r\n".encode())


def logins_from(gate: Gate, source: str) -> list[dict[str, Any]]:
    line = gate.wait_for_session(lambda line: line["client"] == source and bool(line.get("logins")))
    found: list[dict[str, Any]] = line["logins"]
    return found


# ---- servers


class Certified(NamedTuple):
    authority: Path
    server: Path


@pytest.fixture(scope="module")
def certified(tmp_path_factory) -> Certified:
    directory, authority = tmp_path_factory.mktemp("authority"), trustme.CA()
    found = Certified(directory / "authority.pem", directory / "server.pem")
    authority.cert_pem.write_to_path(str(found.authority))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(found.server))
    return found


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    with Dovecot(users=USERS) as server:
        yield server


@pytest.fixture(scope="module")
def postfix(dovecot) -> Iterator[Postfix]:
    sasl = ["smtpd_sasl_auth_enable = yes", "smtpd_sasl_type = dovecot", f"smtpd_sasl_path = {dovecot.auth_path}"]
    with Postfix(settings=sasl) as server:
        yield server


@pytest.fixture(scope="module")
def slapd(certified) -> Iterator[Slapd]:
    people = {user.partition("@")[0]: secret for user, secret in USERS.items()}
    with Slapd(users=people, attributes=ALIASES, certificate=certified.server) as server:
        yield server


@pytest.fixture(scope="module")
def backend() -> Iterator[LenientBackend]:
    with LenientBackend("strict") as backend:
        yield backend


class Site(NamedTuple):
    """A gate, and the server that it asks."""

    gate: Gate
    server: Server
    verifier: str


def tables_of(how: str, server: Server, certified: Certified) -> str:
    """What an administrator writes to have this server asked."""
    if isinstance(server, Dovecot):
        address = {
            "pop3": f"127.0.0.1:{server.pop3_port}",
            "imap": f"127.0.0.1:{server.imap_port}",
            "dovecot": str(server.auth_path),
            "dovecot over TCP": f"127.0.0.1:{server.auth_port}",
        }[how]
        return f'[auth.{how.partition(" ")[0]}]\naddress = "{address}"'
    if how == "smtp":
        return f'[auth.smtp]\naddress = "127.0.0.1:{server.port}"'
    table = f'[auth.ldap]\naddress = "127.0.0.1:{server.port}"\nauthority = "{certified.authority}"\n'
    table += 'addresses = ["mail", "proxyAddresses"]\n'
    if how == "ldap by bind":
        return table + f'bind = "uid={{local_part}},{Slapd.people}"'
    return table + (
        f'search_base = "{Slapd.base}"\nsearch_filter = "(mail={{user}})"\n'
        f'search_bind = "{Slapd.admin}"\nsearch_password = "{Slapd.admin_password}"'
    )


@pytest.fixture(
    scope="module",
    params=["pop3", "imap", "dovecot", "dovecot over TCP", "smtp", "ldap by bind", "ldap by search"],
)
def site(request, tmp_path_factory, backend, certified) -> Iterator[Site]:
    how = request.param
    verifier = how.partition(" ")[0]
    server = request.getfixturevalue({"smtp": "postfix", "ldap": "slapd"}.get(verifier, "dovecot"))
    text = config(backend.port, [verifier], tables_of(how, server, certified))
    with Gate(tmp_path_factory.mktemp(verifier), text) as gate:
        yield Site(gate, server, verifier)
    no_faults(gate)


# ---- one verifier


@pytest.mark.parametrize("user", PASSWORDS)
def test_the_right_password_sends_anywhere(site, backend, user):
    source = f"127.0.2.{1 + list(PASSWORDS).index(user)}"
    since = len(backend.journal)
    assert send(site.gate, user, PASSWORDS[user], user, source).startswith("250 ")
    (taken,) = backend.transactions(since)
    assert taken.reverse_path == user.encode()
    (one,) = logins_from(site.gate, source)
    assert one == {"account": user, "mechanism": "PLAIN", "verdict": "verified", "verifier": site.verifier}


def test_a_wrong_password_and_an_unknown_user_hear_the_same(site):
    for number, (user, secret) in enumerate(
        ((ALICE, "one-off"), ("nobody@example.com", "wonder"), ("*", "wonder"), (ALICE, PASSWORDS[ALICE].upper()))
    ):
        source = f"127.0.3.{1 + number}"
        assert login(site.gate, user, secret, source) == INVALID, (user, secret)
        (one,) = logins_from(site.gate, source)
        assert one["verdict"] == "denied"
        assert one["why"].startswith(f"{site.verifier}: ")
        assert secret not in one["why"]


def test_while_the_server_is_away_nobody_can_tell(site):
    """454 is not a yes, not a no, and no guess: twenty different passwords, and the right one is as good as before."""
    site.server.stop()
    try:
        for number in range(20):
            assert login(site.gate, LATECOMER, f"guess {number}", "127.0.4.1") == UNAVAILABLE
        assert login(site.gate, LATECOMER, LATE_SECRET, "127.0.4.2") == UNAVAILABLE
        (one,) = logins_from(site.gate, "127.0.4.2")
        assert one["verdict"] == "unavailable"
        assert one["why"].startswith(f"{site.verifier}: ")
    finally:
        site.server.start()
    assert send(site.gate, LATECOMER, LATE_SECRET, LATECOMER, "127.0.4.1").startswith("250 ")
    assert not events(site.gate, "ban")


def test_nobody_sends_as_somebody_else(site):
    reply = send(site.gate, ALICE, PASSWORDS[ALICE], "boss@example.com")
    assert reply.startswith("550 5.7.1 Sending as this address is prohibited: expected alice@example.com"), reply


def test_the_directory_says_as_whom_else(site):
    reply = send(site.gate, ALICE, PASSWORDS[ALICE], "sales@example.com")
    if site.verifier == "ldap":
        assert reply.startswith("250 ")
        other = send(site.gate, "spaces@example.com", PASSWORDS["spaces@example.com"], "sales@example.com")
        assert other.startswith("550 5.7.1 ")
    else:
        assert reply.startswith("550 5.7.1 ")


def test_postfix_without_its_own_verifier_cannot_tell(tmp_path, backend):
    """Postfix is there, and Dovecot behind it is not: its 454 becomes ours."""
    with Dovecot(users=USERS) as dovecot:
        sasl = ["smtpd_sasl_auth_enable = yes", "smtpd_sasl_type = dovecot", f"smtpd_sasl_path = {dovecot.auth_path}"]
        with Postfix(settings=sasl) as postfix:
            tables = f'[auth.smtp]\naddress = "127.0.0.1:{postfix.port}"'
            with Gate(tmp_path, config(backend.port, ["smtp"], tables)) as gate:
                dovecot.stop()
                assert login(gate, ALICE, PASSWORDS[ALICE]) == UNAVAILABLE
                dovecot.start()
                until(lambda: login(gate, ALICE, PASSWORDS[ALICE]) == WELCOME, "Postfix has found its verifier again")
            no_faults(gate)


# ---- a password that was changed


@pytest.mark.parametrize("how", ["pop3", "imap", "dovecot"])
def test_a_changed_password_ends_the_old_one_in_every_worker(tmp_path, backend, certified, how):
    with Dovecot(users={ALICE: "before"}) as server:
        with Gate(tmp_path, config(backend.port, [how], tables_of(how, server, certified))) as gate:

            def many(secret: str) -> set[str]:
                """Enough at once that each worker has some."""
                with ThreadPoolExecutor(16) as pool:
                    return set(pool.map(lambda _: login(gate, ALICE, secret), range(48)))

            assert many("before") == {WELCOME}
            server.set_password(ALICE, "after")
            assert login(gate, ALICE, "after") == WELCOME
            assert many("before") == {INVALID}
            assert many("after") == {WELCOME}
        no_faults(gate)


# ---- several verifiers


@pytest.fixture
def both(tmp_path, dovecot, certified, backend) -> Iterator[Gate]:
    """Our own accounts, and behind them those of the old server."""
    tables = tables_of("pop3", dovecot, certified)
    gate = Gate(tmp_path, config(backend.port, ["pop3", "accounts"], tables))
    for name in ("local@example.com", ALICE):
        added = account(gate, "add", name, "--password-stdin", typed="a secret of our own\n")
        assert added.returncode == 0, added.stderr
    with gate:
        yield gate
    no_faults(gate)


def test_who_says_yes_is_asked_in_order(both):
    for number, (user, secret, verifier) in enumerate(
        (
            (ALICE, PASSWORDS[ALICE], "pop3"),
            (ALICE, "a secret of our own", "accounts"),
            ("local@example.com", "a secret of our own", "accounts"),
            ("spaces@example.com", PASSWORDS["spaces@example.com"], "pop3"),
        )
    ):
        source = f"127.0.5.{1 + number}"
        assert login(both, user, secret, source) == WELCOME
        (one,) = logins_from(both, source)
        assert one["verifier"] == verifier
    assert login(both, ALICE, "neither", "127.0.5.9") == INVALID
    (one,) = logins_from(both, "127.0.5.9")
    assert "pop3: " in one["why"]
    assert "accounts: " in one["why"]


def test_one_that_is_away_makes_no_no(both, dovecot):
    dovecot.stop()
    try:
        assert login(both, "local@example.com", "a secret of our own") == WELCOME
        assert login(both, "local@example.com", "wrong") == UNAVAILABLE  # the other one might have said yes
        assert login(both, "quotes@example.com", PASSWORDS["quotes@example.com"]) == UNAVAILABLE
    finally:
        dovecot.start()
    assert login(both, "quotes@example.com", PASSWORDS["quotes@example.com"]) == WELCOME
    assert login(both, "local@example.com", "wrong") == INVALID


# ---- POP before SMTP

BEFORE_SMTP = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[[listen]]
name = "pop3"
address = "127.0.0.1:0"
role = "pop3"
tls = "starttls"
server = "127.0.0.1:{pop3}"

[[listen]]
name = "imap"
address = "127.0.0.1:0"
role = "imap"
tls = "starttls"
server = "127.0.0.1:{imap}"

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"
tls = "off"

[[trust]]
pop3 = "30m"
why = "who has fetched mail may send"
reverse_paths = ["*@example.com"]

[console]
address = "127.0.0.1:0"
"""


class Pop3(poplib.POP3):
    """From an address of the test's choice."""

    def __init__(self, port: int, source: str) -> None:
        self._source = source
        super().__init__("127.0.0.1", port, PATIENCE_S)

    def _create_socket(self, timeout: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, (self._source, 0))


class Imap(imaplib.IMAP4):
    """From an address of the test's choice."""

    def __init__(self, port: int, source: str) -> None:
        self._source = source
        super().__init__("127.0.0.1", port, PATIENCE_S)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, (self._source, 0))


def explained(gate: Gate, source: str, *more: str, reverse_path: str = ALICE) -> tuple[int, dict[str, Any]]:
    """``gatepost explain``: its exit code, and its answer."""
    question = ("--client", source, "--reverse-path", reverse_path, "--forward-path", OUTSIDE)
    done = subprocess.run(
        [sys.executable, "-m", "gatepost", "explain", *question, *more, "--config", str(gate.config), "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_who_has_fetched_mail_may_send(tmp_path, dovecot, backend):
    ports = {"pop3": dovecot.pop3_port, "imap": dovecot.imap_port, "mail": backend.port}
    with Gate(tmp_path, BEFORE_SMTP.format(**ports)) as gate:

        def mail(source: str, sender: str = ALICE) -> str:
            with Wire(gate.port, source=source) as wire:
                wire.hello()
                return wire.mail(OUTSIDE, message("after fetching"), sender)

        for source in ("127.0.6.1", "127.0.6.2"):
            assert mail(source).startswith("550 5.7.1 Relaying is prohibited"), source
        pop3 = Pop3(gate.ports["pop3"], "127.0.6.1")
        pop3.stls(unjudging())
        pop3.user(ALICE)
        pop3.pass_(PASSWORDS[ALICE])
        assert pop3.stat() == (0, 0)
        pop3.quit()
        with Imap(gate.ports["imap"], "127.0.6.2") as imap:
            imap.starttls(unjudging())
            imap.login("spaces@example.com", PASSWORDS["spaces@example.com"])
            assert imap.select()[0] == "OK"
        since = len(backend.journal)
        for source in ("127.0.6.1", "127.0.6.2"):
            assert mail(source).startswith("250 "), source
            assert mail(source, "somebody@sender.test").startswith("550 5.7.1 ")  # the grant is narrowed
        assert len(backend.transactions(since)) == 2
        # The neighbour did not log in; and who gave a wrong password did not either.
        refused = mail("127.0.6.3")
        assert refused.startswith("550 5.7.1 Relaying is prohibited"), refused
        pop3 = Pop3(gate.ports["pop3"], "127.0.6.4")
        pop3.stls(unjudging())
        pop3.user(ALICE)
        with pytest.raises(poplib.error_proto, match=r"\[AUTH\]"):
            pop3.pass_("wrong")
        pop3.quit()
        assert mail("127.0.6.4").startswith("550 5.7.1 ")

        code, answer = explained(gate, "127.0.6.3")
        assert code == 1
        assert answer["verdict"] == "refuse"
        changes = [change["condition"] for change in answer["changes"]]
        assert changes[0] == "somebody had read mail from the client's address in time", changes
        code, answer = explained(gate, "127.0.6.1", "--mailbox-login", "29m")
        assert (code, answer["verdict"]) == (0, "admit")
        code, answer = explained(gate, "127.0.6.1", "--mailbox-login", "31m")
        assert (code, answer["reason"]) == (1, "mailbox_login")
    no_faults(gate)
