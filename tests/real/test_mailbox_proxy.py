"""POP before SMTP in front of a real Dovecot, with the programs that people fetch mail with.

Why: whether a mail program gets its mail through the proxy, and may send afterwards, is decided by that program and by
    the old server, and by no script of ours.
"""

from __future__ import annotations

import base64
import contextlib
import imaplib
import poplib
import secrets
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.gatehouse import Gate
from tests.real.wire import PATIENCE_S, HungUp, Wire, message
from tests.servers import Dovecot, need

USER = "alice@example.com"
SECRET = f"pä{secrets.token_hex(8)}"  # looked for in everything that the gate writes
ASCII_USER = "bob@example.com"
ASCII_SECRET = f'pw {secrets.token_hex(8)}"\\'
ABROAD = "somebody@elsewhere.test"
BIG = message("big", "x" * 76 + "\r\n" + "".join(f"{number:070}\r\n" for number in range(120_000)))


class Authority:
    """Who vouches for the old server's certificate."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.server = directory / "server.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self.server)
        self.path = directory / "authority.pem"
        authority.cert_pem.write_to_path(self.path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def dovecot(authority) -> Iterator[Dovecot]:
    users = {USER: SECRET, ASCII_USER: ASCII_SECRET}
    with Dovecot(users=users, certificate=authority.server, settings=["mail_max_userip_connections = 0"]) as server:
        yield server


def config(dovecot: Dovecot, *, tls: str = "starttls", more: str = "", server_tls: str = "opportunistic") -> str:
    implicit = server_tls == "implicit"
    ports = {
        "pop3": dovecot.pop3s_port if implicit else dovecot.pop3_port,
        "imap": dovecot.imaps_port if implicit else dovecot.imap_port,
    }
    listens = "".join(
        f"""
        [[listen]]
        name = "{role}"
        address = "127.0.0.1:0"
        role = "{role}"
        tls = "{tls}"
        server = "127.0.0.1:{port}"
        server_tls = "{server_tls}"
        {more}
        """
        for role, port in ports.items()
    )
    return f"""
        [gate]
        name = "mx.example.com"
        workers = 2
        [console]
        address = "127.0.0.1:0"
        [[listen]]
        name = "mx"
        address = "127.0.0.1:0"
        {listens}
        [domains]
        local = ["example.com"]
        [backend.mail]
        address = "embedded:"
        [[trust]]
        pop3 = "30m"
        why = "who has fetched mail may send"
        """


@contextlib.contextmanager
def gate_for(directory: Path, text: str, environment: dict[str, str] | None = None) -> Iterator[Gate]:
    """A gate; when it has ended, no secret is in anything that it wrote."""
    gate = Gate(directory, text, environment)
    try:
        with gate:
            yield gate
    finally:
        written = [gate.said().encode()]
        written += [file.read_bytes() for file in directory.rglob("*") if file.is_file() and not file.is_symlink()]
        for secret in (SECRET, ASCII_SECRET):
            as_sasl = base64.b64encode(f"\0{ASCII_USER}\0{secret}".encode())
            for form in (secret.encode(), secret.encode("unicode_escape"), secret.split('"')[0].encode(), as_sasl):
                assert not any(form in octets for octets in written)


@pytest.fixture(scope="module")
def gate(dovecot, tmp_path_factory) -> Iterator[Gate]:
    with gate_for(tmp_path_factory.mktemp("gate"), config(dovecot)) as gate:
        yield gate


@pytest.fixture(scope="module")
def plain(dovecot, tmp_path_factory) -> Iterator[Gate]:
    """Without TLS on the clients' side."""
    with gate_for(tmp_path_factory.mktemp("plain"), config(dovecot, tls="none")) as gate:
        yield gate


def unjudging() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Pop3(poplib.POP3):
    """From an address of its own."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.source = source
        super().__init__("127.0.0.1", port, PATIENCE_S)

    def _create_socket(self, timeout: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, source_address=(self.source, 0))


class Imap(imaplib.IMAP4):
    """From an address of its own."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.source = source
        super().__init__("127.0.0.1", port, PATIENCE_S)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, source_address=(self.source, 0))


def may_send(gate: Gate, source: str) -> bool:
    """Whether the gate takes mail for strangers from this address now; the embedded backend has no such mailbox."""
    with Wire(gate.ports["mx"], source=source) as wire:
        reply = wire.rcpt(ABROAD)
        return "5.7.1" not in reply


def put(gate: Gate, octets: bytes) -> None:
    """One message into bob's mailbox, through the proxy."""
    with Imap(gate.ports["imap"]) as client:
        client.starttls(unjudging())
        client.login(ASCII_USER, ASCII_SECRET)
        assert client.append("INBOX", "", "", octets)[0] == "OK"


def login_of(gate: Gate, client: str) -> dict[str, Any]:
    """The log line of the session that came from this address."""
    return gate.wait_for_session(lambda line: line["client"] == client and "logins" in line, PATIENCE_S)


def session_of(gate: Gate, account: str) -> dict[str, Any]:
    return gate.wait_for_session(lambda line: line.get("account") == account, PATIENCE_S)


# ---- mail programs


def test_fetch_by_pop3_then_send(gate):
    source = "127.0.1.1"
    put(gate, message("by pop3"))
    assert not may_send(gate, source)
    client = Pop3(gate.ports["pop3"], source)
    assert b"APOP" not in client.getwelcome()
    assert b"<" not in client.getwelcome()
    assert "STLS" in client.capa()
    client.stls(unjudging())
    offered = client.capa()
    assert offered["SASL"] == ["PLAIN", "LOGIN"]
    assert "UIDL" in offered
    client.user(ASCII_USER)
    client.pass_(ASCII_SECRET)
    assert may_send(gate, source)
    assert not may_send(gate, "127.0.1.2")
    count, _ = client.stat()
    _, lines, _ = client.retr(count)
    assert b"Subject: by pop3" in lines
    client.dele(count)
    client.quit()
    line = login_of(gate, source)
    assert line["account"] == ASCII_USER
    assert line["window"] == "opened"
    assert str(line["tls"]).startswith("TLSv1.")
    assert may_send(gate, source)
    client = Pop3(gate.ports["pop3"], source)
    client.stls(unjudging())
    client.user(ASCII_USER)
    client.pass_(ASCII_SECRET)
    assert client.stat()[0] == count - 1  # QUIT reached the server
    client.quit()


def test_fetch_by_imap_then_send(gate):
    source = "127.0.1.3"
    assert not may_send(gate, source)
    with Imap(gate.ports["imap"], source) as client:
        assert "LOGINDISABLED" in client.capabilities
        with pytest.raises(imaplib.IMAP4.error, match="PRIVACYREQUIRED"):
            client.login(ASCII_USER, ASCII_SECRET)
        client.starttls(unjudging())
        assert "AUTH=PLAIN" in client.capabilities
        assert "IDLE" in client.capabilities
        client.login(ASCII_USER, ASCII_SECRET)
        assert may_send(gate, source)
        assert client.enable("CONDSTORE")[0] == "OK"  # known from before the login
        client.append("INBOX", "", "", message("by imap"))
        client.select()
        assert client.search(None, "SUBJECT", '"by imap"')[1] != [b""]
    assert login_of(gate, source)["window"] == "opened"


def test_a_user_and_a_secret_that_are_not_ascii(gate):
    source = "127.0.1.4"
    client = Pop3(gate.ports["pop3"], source)
    client.encoding = "UTF-8"
    client.stls(unjudging())
    client.user(USER)
    client.pass_(SECRET)
    client.quit()
    with Imap(gate.ports["imap"], source) as other:
        other.starttls(unjudging())
        other.authenticate("PLAIN", lambda _: f"\0{USER}\0{SECRET}".encode())
    assert login_of(gate, source)["account"] == USER


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", None])
@pytest.mark.parametrize("scheme", ["pop3", "imap"])
def test_curl(gate, scheme, mechanism):
    put(gate, message("for curl"))
    options = ["--login-options", f"AUTH={mechanism}"] if mechanism else []
    url = f"{scheme}://127.0.0.1:{gate.ports[scheme]}/" + ("1" if scheme == "pop3" else "INBOX;MAILINDEX=1")
    done = curl(url, "--ssl-reqd", *options)
    assert done.returncode == 0, done.stderr
    assert b"Subject: " in done.stdout


def test_curl_without_tls_is_told_to_use_it(gate):
    for scheme in ("pop3", "imap"):
        assert curl(f"{scheme}://127.0.0.1:{gate.ports[scheme]}/").returncode != 0


def curl(url: str, *options: str, user: str = ASCII_USER, secret: str = ASCII_SECRET) -> subprocess.CompletedProcess:
    # The secret comes from a file: a process list is read by everybody.
    quoted = secret.replace("\\", "\\\\").replace('"', '\\"')
    command = [
        str(need("curl")),
        "--config",
        "-",
        "--silent",
        "--show-error",
        "--insecure",
        "--max-time",
        "60",
        *options,
    ]
    return subprocess.run(
        [*command, url], input=f'user = "{user}:{quoted}"\n'.encode(), capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize("scheme", ["pop3", "imap"])
def test_tls_on_both_sides_from_the_first_octet(dovecot, authority, scheme, tmp_path):
    text = config(dovecot, tls="implicit", server_tls="implicit")
    with gate_for(tmp_path, text, {"SSL_CERT_FILE": str(authority.path)}) as gate:
        done = curl(f"{scheme}s://127.0.0.1:{gate.ports[scheme]}/")
        assert done.returncode == 0, done.stderr
        line = login_of(gate, "127.0.0.1")
        assert (line["account"], line["window"]) == (ASCII_USER, "opened")


@pytest.mark.parametrize("server_tls", ["required", "implicit"])
def test_a_server_that_nobody_vouches_for_is_told_no_secret(dovecot, server_tls, tmp_path):
    with gate_for(tmp_path, config(dovecot, tls="none", server_tls=server_tls)) as gate:
        client = Pop3(gate.ports["pop3"])
        client.user(ASCII_USER)
        with pytest.raises(poplib.error_proto, match="SYS/TEMP"):
            client.pass_(ASCII_SECRET)
        client.quit()
        (login,) = login_of(gate, "127.0.0.1")["logins"]
        assert login["verdict"] == "unavailable"
        assert "CERTIFICATE_VERIFY_FAILED" in login["why"]


def test_required_tls_to_a_server_that_is_vouched_for(dovecot, authority, tmp_path):
    text = config(dovecot, tls="none", server_tls="required")
    with gate_for(tmp_path, text, {"SSL_CERT_FILE": str(authority.path)}) as gate:
        client = Pop3(gate.ports["pop3"])
        client.user(ASCII_USER)
        client.pass_(ASCII_SECRET)
        client.quit()


AS_SASL = base64.b64encode(f"\0{ASCII_USER}\0{ASCII_SECRET}".encode()).decode()


@pytest.mark.parametrize(
    ("role", "lines", "last"),
    [
        ("pop3", [f"USER {ASCII_USER}", f"PASS {ASCII_SECRET}", "STAT", "QUIT"], "+OK Logging out"),
        ("imap", [f"a AUTHENTICATE PLAIN {AS_SASL}", "b LOGOUT"], "b OK"),
    ],
)
def test_typed_behind_openssl(gate, role, lines, last):
    """A person's way to look at it: openssl s_client speaks STLS or STARTTLS, the rest is typed."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{gate.ports[role]}", "-starttls", role, "-quiet"]
    with subprocess.Popen(
        [*command, "-verify_quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        heard = ""
        for line in lines:
            process.stdin.write(line.encode() + b"\n")  # a bare LF, as s_client sends it
            process.stdin.flush()
        for answer in process.stdout:
            heard += answer.decode()
            if answer.decode().startswith(last):
                break
        assert last in heard
        process.stdin.close()
        process.wait(PATIENCE_S)


# ---- refusals


@pytest.mark.parametrize("user", [ASCII_USER, "nobody@example.com"])
def test_a_wrong_password_and_an_unknown_user_hear_the_same(gate, user):
    source = "127.0.1.5" if user == ASCII_USER else "127.0.1.6"
    client = Pop3(gate.ports["pop3"], source)
    client.stls(unjudging())
    client.user(user)
    with pytest.raises(poplib.error_proto, match=r"^b'-ERR \[AUTH\] Authentication failed'$"):
        client.pass_("wrong")
    client.quit()
    assert not may_send(gate, source)
    line = login_of(gate, source)
    assert line["logins"] == [
        {"account": user, "mechanism": "USER", "verdict": "denied", "why": "the server refused it"}
    ]
    assert "window" not in line
    with Imap(gate.ports["imap"], source) as other:
        other.starttls(unjudging())
        with pytest.raises(imaplib.IMAP4.error, match=r"^b'\[AUTHENTICATIONFAILED\] Authentication failed'$"):
            other.login(user, "wrong")


def test_a_server_that_is_down_and_comes_back(authority, tmp_path):
    with (
        Dovecot(users={ASCII_USER: ASCII_SECRET}, certificate=authority.server) as server,
        gate_for(tmp_path, config(server, tls="none")) as gate,
    ):
        server.stop()
        client = Pop3(gate.ports["pop3"])
        assert "UIDL" not in client.capa()
        client.user(ASCII_USER)
        with pytest.raises(poplib.error_proto, match="SYS/TEMP"):
            client.pass_(ASCII_SECRET)
        assert not may_send(gate, "127.0.0.1")
        server.start()
        assert "UIDL" in client.capa()
        client.user(ASCII_USER)
        client.pass_(ASCII_SECRET)
        assert may_send(gate, "127.0.0.1")
        client.quit()


def test_a_changed_password_holds_at_once(authority, tmp_path):
    with (
        Dovecot(users={ASCII_USER: "old"}, certificate=authority.server) as server,
        gate_for(tmp_path, config(server, tls="none")) as gate,
    ):
        for secret, good in (("old", True), ("new", False)):
            client = Pop3(gate.ports["pop3"])
            client.user(ASCII_USER)
            with contextlib.nullcontext() if good else pytest.raises(poplib.error_proto, match="AUTH"):
                client.pass_(secret)
            client.quit()
        server.set_password(ASCII_USER, "new")
        for secret, good in (("new", True), ("old", False)):
            client = Pop3(gate.ports["pop3"])
            client.user(ASCII_USER)
            with contextlib.nullcontext() if good else pytest.raises(poplib.error_proto, match="AUTH"):
                client.pass_(secret)
            client.quit()


def test_an_address_of_many_accounts(authority, tmp_path):
    users = {f"user{number}@example.com": ASCII_SECRET for number in range(3)}
    with (
        Dovecot(users=users, certificate=authority.server) as server,
        gate_for(tmp_path, config(server, tls="none", more="accounts_per_address = 2")) as gate,
    ):
        windows = []
        for user in users:
            client = Pop3(gate.ports["pop3"], "127.0.1.7")
            client.user(user)
            client.pass_(ASCII_SECRET)
            client.quit()
            line = session_of(gate, user)
            windows.append((line["window"], may_send(gate, "127.0.1.7")))
        assert windows == [
            ("opened", True),
            ("opened", True),
            ("not opened: many accounts log in from this address", False),
        ]


# ---- much, long, and the end


def test_large_mail_both_ways_in_plain_text(plain):
    with Imap(plain.ports["imap"]) as writer:
        writer.login(ASCII_USER, ASCII_SECRET)
        assert writer.append("INBOX", "", "", BIG)[0] == "OK"
    client = Pop3(plain.ports["pop3"])
    client.user(ASCII_USER)
    client.pass_(ASCII_SECRET)
    _, lines, _ = client.retr(client.stat()[0])
    assert b"\r\n".join(lines) + b"\r\n" == BIG
    client.dele(client.stat()[0])
    client.quit()


def test_many_at_once(plain):
    faults: list[BaseException] = []

    def visit() -> None:
        try:
            client = Pop3(plain.ports["pop3"])
            client.user(ASCII_USER)
            client.pass_(ASCII_SECRET)
            client.stat()
            client.quit()
        except BaseException as fault:  # noqa: BLE001 - told by the test's own thread
            faults.append(fault)

    threads = [threading.Thread(target=visit) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    # Dovecot locks a mailbox for one POP3 session at a time, in some set-ups; the refusal is its own, and temporary.
    assert all("IN-USE" in str(fault) for fault in faults)


def test_new_mail_is_told_to_who_waits_for_it(plain):
    with Wire(plain.ports["imap"], greeted=False) as wire:
        assert b"* OK mx.example.com IMAP" in wire.receive()
        wire.send(b"a LOGIN %s {%d+}\r\n%s\r\n" % (ASCII_USER.encode(), len(ASCII_SECRET), ASCII_SECRET.encode()))
        assert heard(wire, b"a OK")
        wire.send(b"b SELECT INBOX\r\n")
        assert heard(wire, b"b OK")
        wire.send(b"c IDLE\r\n")
        assert heard(wire, b"+ ")
        with Imap(plain.ports["imap"]) as client:
            client.login(ASCII_USER, ASCII_SECRET)
            client.append("INBOX", "", "", message("while one waits"))
        assert heard(wire, b"EXISTS")
        wire.send(b"DONE\r\n")
        assert heard(wire, b"c OK")


def heard(wire: Wire, wanted: bytes) -> bytes:
    octets = b""
    while wanted not in octets:
        more = wire.receive()
        if not more:
            raise HungUp(octets.decode("utf-8", "replace"))
        octets += more
    return octets


def test_a_gate_that_goes_down_ends_sessions_that_wait(dovecot, tmp_path):
    with gate_for(tmp_path, config(dovecot, tls="none")) as gate:
        with (
            Wire(gate.ports["imap"], greeted=False) as idle,
            Wire(gate.ports["imap"], greeted=False) as inside,
            Wire(gate.ports["pop3"], greeted=False) as other,
        ):
            assert b"* OK" in idle.receive()
            assert b"* OK" in inside.receive()
            assert b"+OK" in other.receive()
            inside.send(f"a AUTHENTICATE PLAIN {AS_SASL}\r\n".encode())
            assert heard(inside, b"a OK")
            gate.signal(signal.SIGTERM)
            assert idle.end() == b"* BYE This server is going down\r\n"
            assert inside.end().endswith(b"* BYE This server is going down\r\n")
            assert other.end() == b""
        assert gate.stop() == 0
        assert {line["end"] for line in gate.sessions()} == {"draining"}


def test_too_many_sessions_are_turned_away_in_their_own_tongue(dovecot, tmp_path):
    text = config(dovecot, tls="none") + "\n[limits]\nsessions_per_client = 1\n"
    with gate_for(tmp_path, text) as gate, Wire(gate.ports["pop3"], greeted=False) as first:
        assert b"+OK" in first.receive()
        with Wire(gate.ports["pop3"], greeted=False) as second, Wire(gate.ports["imap"], greeted=False) as third:
            assert second.end().startswith(b"-ERR [SYS/TEMP] ")
            assert third.end().startswith(b"* BYE [UNAVAILABLE] ")
        first.send(b"QUIT\r\n")
        assert first.end() == b"+OK Bye\r\n"
