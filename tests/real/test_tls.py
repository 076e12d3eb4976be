"""TLS at a live gate: what clients get, what they may prove with a certificate, and certificates that change meanwhile.

Why: a handshake has two ends; the other one here is OpenSSL's own client, Python's, or Node's.
    Everything that holds for TLS in general is tried twice: at a gate that asks clients for certificates, and at one
    that does not, as these are two implementations.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from scramp import ScramClient  # type: ignore[import-untyped]
from tests.gatehouse import Gate
from tests.real.console import events, no_faults
from tests.real.openssl import converse
from tests.real.programs import unjudging
from tests.real.test_logins import account
from tests.real.wire import PATIENCE_S, Wire, message, until
from tests.servers import need
from tests.vectors.lenient import LenientBackend

STRANGER = "127.0.0.9"
LOCAL = "bob@example.com"
OUTSIDE = "friend@elsewhere.test"
ALICE = "alice@example.com"
SECRET = "correct horse battery"
NAME, OTHER_NAME, WILDCARD = "mx.example.com", "mail.example.org", "*.customers.test"

CONFIG = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"
tls = "starttls"

[[listen]]
name = "smtps"
address = "127.0.0.1:0"
tls = "implicit"

[[listen]]
name = "modern"
address = "127.0.0.1:0"
tls = "starttls"
tls_minimum = "1.3"

[[listen]]
name = "submission"
address = "127.0.0.1:0"
role = "submission"
tls = "starttls"

[tls]
certificate = ["first.pem", "second.pem"]

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{port}"
tls = "off"

[[trust]]
accounts = ["*"]
why = "our people"

[limits]
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:0"
"""

CERTIFICATE = """
[[trust]]
certificate = "{fingerprint}"
why = "the branch office"
owner = "it@example.com"
bare_newlines = "normalise"
"""


class Pair(NamedTuple):
    """A certificate with its key in one PEM file."""

    path: Path
    der: bytes

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.der).hexdigest()


def issued(authority: trustme.CA, path: Path, *names: str) -> Pair:
    """What an authority gives a server."""
    leaf = authority.issue_cert(*names)
    path.write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    return Pair(path, ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode()))


def self_signed(path: Path, name: str) -> Pair:
    """What ``openssl req -x509`` gives anybody."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return Pair(path, certificate.public_bytes(serialization.Encoding.DER))


class Site(NamedTuple):
    """A gate with two certificates, what stands behind it, and who vouches for it."""

    gate: Gate
    backend: LenientBackend
    authority: Path
    first: Pair
    second: Pair
    branch: Pair
    asks: bool

    def arrived(self, subject: str) -> int:
        wanted = f"Subject: {subject}\r\n".encode()
        return sum(wanted in transaction.octets for transaction in self.backend.transactions())


@contextmanager
def site_in(directory: Path, *, asks: bool) -> Iterator[Site]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "authority.crt"))
    first = issued(authority, directory / "first.pem", NAME)
    second = issued(authority, directory / "second.pem", OTHER_NAME, WILDCARD)
    branch = self_signed(directory / "branch.pem", "branch")
    with LenientBackend("strict") as backend:
        config = CONFIG.format(port=backend.port)
        if asks:
            config += CERTIFICATE.format(fingerprint=branch.fingerprint)
        gate = Gate(directory, config)
        added = account(gate, "add", ALICE, "--password-stdin", typed=f"{SECRET}\n")
        assert added.returncode == 0, added.stderr
        with gate:
            yield Site(gate, backend, directory / "authority.crt", first, second, branch, asks)
        no_faults(gate)


@pytest.fixture(scope="module")
def not_asking(tmp_path_factory) -> Iterator[Site]:
    with site_in(tmp_path_factory.mktemp("tls"), asks=False) as site:
        yield site


@pytest.fixture(scope="module")
def asking(tmp_path_factory) -> Iterator[Site]:
    with site_in(tmp_path_factory.mktemp("asking"), asks=True) as site:
        yield site


@pytest.fixture(params=["not_asking", "asking"])
def site(request) -> Site:
    found: Site = request.getfixturevalue(request.param)
    return found


def showing(pair: Pair | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that has this certificate, and judges nobody's."""
    context = unjudging()
    context.maximum_version = version
    if pair is not None:
        context.load_cert_chain(pair.path)
    return context


def s_client(port: int, *options: str, typed: bytes = b"QUIT\r\n") -> tuple[int, str]:
    """``openssl s_client``: its exit code, and all that it shows."""
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *options],
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


# ---- versions and names


@pytest.mark.parametrize(("listen", "how"), [("mx", ("-starttls", "smtp")), ("smtps", ())])
@pytest.mark.parametrize("version", ["1_2", "1_3"])
def test_openssl_is_content(site, listen, how, version):
    judged = ("-CAfile", str(site.authority), "-verify_return_error", "-verify_hostname", NAME)
    replies, of_tls = converse(site.gate.ports[listen], *how, f"-tls{version}", "-servername", NAME, *judged)
    assert replies[-1:] == ["221 2.0.0 mx.example.com closing"], of_tls
    line = site.gate.wait_for_session(
        lambda line: (line["listen"], line["tls"]) == (listen, f"TLSv{version.replace('_', '.')}")
    )
    assert line["end"] == "quit"


@pytest.mark.parametrize(("listen", "how"), [("mx", ("-starttls", "smtp")), ("smtps", ())])
@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_nothing_old_is_spoken(site, listen, how, version):
    code, said = s_client(site.gate.ports[listen], *how, version, "-cipher", "ALL:@SECLEVEL=0")
    assert code != 0, said
    assert "Cipher is (NONE)" in said


def test_a_listener_may_want_more(site):
    with Wire(site.gate.ports["modern"]) as wire:
        wire.hello()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            wire.start_tls(showing(None, ssl.TLSVersion.TLSv1_2))
    for listen, version in (("modern", ssl.TLSVersion.TLSv1_3), ("mx", ssl.TLSVersion.TLSv1_2)):
        with Wire(site.gate.ports[listen]) as wire:
            wire.hello()
            wire.start_tls(showing(None, version))
            assert wire.hello().startswith("250-mx.example.com")


@pytest.mark.parametrize(
    ("name", "second"),
    [
        (NAME, False),
        (OTHER_NAME, True),
        (OTHER_NAME.upper(), True),
        ("shop.customers.test", True),
        ("a.shop.customers.test", False),  # a wildcard stands for one label
        ("customers.test", False),
        ("unknown.test", False),
        (None, False),
    ],
)
def test_the_name_that_is_asked_for_chooses_the_certificate(site, name, second):
    wanted = site.second if second else site.first
    with Wire(site.gate.port) as wire:
        wire.hello()
        wire.start_tls(name=name)
        assert wire.certificate == wanted.der
    with Wire(site.gate.ports["smtps"], greeted=False) as wire:
        wire.secure(name=name)
        assert wire.certificate == wanted.der
        assert wire.reply().startswith("220 ")


def test_each_name_is_vouched_for(site):
    for name in (NAME, OTHER_NAME, "shop.customers.test"):
        judged = ("-CAfile", str(site.authority), "-verify_return_error", "-verify_hostname", name)
        code, said = s_client(site.gate.port, "-starttls", "smtp", "-servername", name, *judged)
        assert code == 0, said


# ---- before TLS, and behind it


def test_commands_behind_starttls_are_never_executed(site):
    since = len(site.backend.journal)
    with Wire(site.gate.port) as wire:
        wire.hello()
        wire.send(b"STARTTLS\r\nMAIL FROM:<a@sender.test>\r\nRCPT TO:<bob@example.com>\r\nDATA\r\n")
        assert wire.reply().startswith("554 5.5.0 ")
        assert wire.end() == b""
    assert site.backend.heard(since) == []


def test_plain_text_in_place_of_the_handshake_is_no_command(site):
    since = len(site.backend.journal)
    with Wire(site.gate.port) as wire:
        wire.hello()
        assert wire.say("STARTTLS").startswith("220 ")
        wire.send(b"EHLO client.test\r\nMAIL FROM:<a@sender.test>\r\nRCPT TO:<bob@example.com>\r\n")
        assert b"250" not in wire.end()
    assert site.backend.heard(since) == []
    line = site.gate.wait_for_session(lambda line: line["end"].startswith("TLS handshake failed"))
    assert line["tls"] == ""


def test_what_was_said_in_plain_text_is_forgotten(site):
    with Wire(site.gate.port) as wire:
        assert wire.rcpt(LOCAL).startswith("250")
        assert wire.say("STARTTLS").startswith("503 5.5.1 ")
        assert wire.say("RSET").startswith("250")
        wire.start_tls()
        assert wire.say(f"MAIL FROM:<{ALICE}>").startswith("503 5.5.1 ")
        assert "STARTTLS" not in wire.hello()
        assert wire.mail(LOCAL, message("private")).startswith("250")
        assert wire.say("STARTTLS").startswith("50"), wire.said
    assert site.arrived("private") == 1


@pytest.mark.parametrize("listen", ["mx", "smtps"])
def test_a_client_that_says_goodbye_with_its_last_octet_of_the_handshake(site, listen):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = unjudging().wrap_bio(incoming, outgoing)
    with Wire(site.gate.ports[listen], greeted=listen == "mx", source="127.0.0.41") as wire:
        if listen == "mx":
            wire.hello()
            assert wire.say("STARTTLS").startswith("220 ")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                wire.send(outgoing.read())
                incoming.write(wire.receive())
        with suppress(ssl.SSLWantReadError):
            tls.unwrap()
        wire.send(outgoing.read())  # Finished and close_notify in one segment
        wire.end()
    line = site.gate.wait_for_session(lambda line: (line["client"], line["listen"]) == ("127.0.0.41", listen))
    assert line["end"] != "internal error"
    assert not site.gate.errors


# ---- certificates of clients


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("listen", ["mx", "smtps"])
def test_a_known_certificate_may_send_anywhere(asking, version, listen):
    subject = f"from the branch {listen} {version.name}"
    with Wire(asking.gate.ports[listen], source=STRANGER, greeted=listen == "mx") as wire:
        if listen == "mx":
            wire.hello()
            wire.start_tls(showing(asking.branch, version))
        else:
            wire.secure(showing(asking.branch, version))
            assert wire.reply().startswith("220 ")
        wire.hello()
        assert wire.mail(OUTSIDE, message(subject)).startswith("250"), wire.said
        wire.say("QUIT")
    assert asking.arrived(subject) == 1
    line = asking.gate.wait_for_session(
        lambda line: (
            (line["listen"], line["tls"], line.get("certificate"))
            == (listen, version.name.replace("_", "."), asking.branch.fingerprint)
        )
    )
    (recipient,) = line["transactions"][0]["recipients"]
    lines = asking.gate.config.read_text().splitlines()
    assert recipient["by"] == f"{asking.gate.config}:{len(lines) - lines[::-1].index('[[trust]]')}"


@pytest.mark.parametrize("listen", ["mx", "smtps"])
def test_what_is_granted_to_a_certificate_holds_for_line_ends(asking, listen):
    for shown, code in ((asking.branch, "250"), (None, "550 5.6.0")):
        with Wire(asking.gate.ports[listen], greeted=listen == "mx") as wire:
            if listen == "mx":
                wire.hello()
                wire.start_tls(showing(shown))
            else:
                wire.secure(showing(shown))
                assert wire.reply().startswith("220 ")
            assert wire.rcpt(LOCAL).startswith("250")
            assert wire.content(b"Subject: bare\n\nlines\r\n").startswith(code), wire.said


def test_a_known_certificate_with_openssl(asking):
    key = ("-cert", str(asking.branch.path), "-key", str(asking.branch.path))
    commands = ("EHLO branch", "MAIL FROM:<a@sender.test>", f"RCPT TO:<{OUTSIDE}>")
    replies, of_tls = converse(asking.gate.port, "-starttls", "smtp", *key, commands=commands)
    assert replies[2].startswith("250 2.1.5"), (replies, of_tls)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_another_certificate_or_none_may_not(asking, version, tmp_path):
    another = self_signed(tmp_path / "another.pem", "branch")  # by the same name
    server = issued(trustme.CA(), tmp_path / "server.pem", "mail.sender.test")
    for shown in (another, server, None):
        with Wire(asking.gate.port, source=STRANGER) as wire:
            wire.hello()
            wire.start_tls(showing(shown, version))
            assert wire.rcpt(OUTSIDE).startswith("550 5.7.1 Relaying is prohibited ["), shown
            # A mail server that shows the certificate it has is welcome with what is for us.
            assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")
            assert wire.content(message("from another server")).startswith("250")
    with Wire(asking.gate.port, source=STRANGER) as wire:
        assert wire.rcpt(OUTSIDE).startswith("550 5.7.1 Relaying is prohibited [")


def test_certificates_are_asked_for_only_where_one_is_trusted(site):
    _, said = s_client(site.gate.port, "-starttls", "smtp", "-tls1_2")
    assert ("No client certificate CA names sent" in said) is True
    assert ("Client Certificate Types" in said) is site.asks


_NODEMAILER = """
const [directory, options] = [process.argv[1], JSON.parse(require('fs').readFileSync(0, 'utf-8'))];
const transport = require(directory).createTransport(options.transport);
transport.sendMail({envelope: options.envelope, raw: options.raw}).then(
    () => console.log('sent'),
    (error) => { console.log(error.response || error.message); process.exitCode = 1; },
).finally(() => transport.close());
"""


@pytest.mark.parametrize("listen", ["mx", "smtps"])
def test_a_program_shows_its_certificate(asking, listen):
    pem = asking.branch.path.read_text()
    options = {
        "transport": {
            "host": "127.0.0.1",
            "port": asking.gate.ports[listen],
            "secure": listen == "smtps",
            "requireTLS": True,
            "tls": {"rejectUnauthorized": False, "cert": pem, "key": pem},
        },
        "envelope": {"from": "a@sender.test", "to": [OUTSIDE]},
        "raw": message(f"by a program {listen}").decode(),
    }
    done = subprocess.run(
        [str(need("node")), "-e", _NODEMAILER, str(need("nodemailer"))],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert asking.arrived(f"by a program {listen}") == 1


# ---- SCRAM-SHA-256-PLUS


def scram(wire: Wire, client: ScramClient) -> str:
    """AUTH by this client; gives the last reply.  RFC 4954 §4, RFC 5802 §5."""
    first = client.get_client_first()
    reply = wire.say(f"AUTH {client.mechanism_name} {base64.b64encode(first.encode()).decode()}")
    if not reply.startswith("334 "):
        return reply
    client.set_server_first(base64.b64decode(reply[4:]).decode())
    reply = wire.say(base64.b64encode(client.get_client_final().encode()).decode())
    if not reply.startswith("334 "):
        return reply
    client.set_server_final(base64.b64decode(reply[4:]).decode())  # it knows the password, too
    return wire.say("")


def bound_to(certificate: bytes) -> tuple[str, bytes]:
    """RFC 5929 §4: the hash of the server's certificate."""
    return "tls-server-end-point", hashlib.sha256(certificate).digest()


def offers_plus(site: Site, version: ssl.TLSVersion) -> bool:
    """With TLS 1.3 clients bind by tls-exporter, which Python's own TLS does not give.  RFC 9266 §3."""
    return site.asks or version is not ssl.TLSVersion.TLSv1_3


@contextmanager
def submission(site: Site, version: ssl.TLSVersion, name: str | None = None) -> Iterator[tuple[Wire, str]]:
    """A connection with TLS, and what EHLO offers there."""
    with Wire(site.gate.ports["submission"]) as wire:
        wire.hello()
        wire.start_tls(showing(None, version), name)
        yield wire, wire.hello()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("name", [NAME, OTHER_NAME])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_login_bound_to_the_channel(site, name, version):
    plus = offers_plus(site, version)
    with submission(site, version, name) as (wire, offered):
        assert f"AUTH {'SCRAM-SHA-256-PLUS ' * plus}SCRAM-SHA-256 PLAIN LOGIN" in offered
        client = ScramClient(["SCRAM-SHA-256-PLUS"], ALICE, SECRET, channel_binding=bound_to(wire.certificate))
        reply = scram(wire, client)
        if not plus:
            assert reply.startswith("504 5.5.4 ")
            return
        assert reply.startswith("235 2.7.0 ")
        assert wire.mail(OUTSIDE, b"From: alice@example.com\r\nSubject: bound\r\n\r\nx\r\n", ALICE).startswith("250")
        wire.say("QUIT")
    line = site.gate.wait_for_session(
        lambda line: line["tls"] == version.name.replace("_", ".") and line.get("account") == ALICE
    )
    assert line["logins"] == [
        {"account": ALICE, "mechanism": "SCRAM-SHA-256-PLUS", "verdict": "verified", "verifier": "accounts"}
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_login_through_somebody_in_between_is_refused(site, version):
    """Who passes a login on through a TLS connection of its own has another certificate."""
    with submission(site, version) as (wire, _):
        client = ScramClient(["SCRAM-SHA-256-PLUS"], ALICE, SECRET, channel_binding=bound_to(site.second.der))
        assert scram(wire, client).startswith("535 5.7.8 " if offers_plus(site, version) else "504 5.5.4 ")
        assert wire.say(f"MAIL FROM:<{ALICE}>").startswith("530 5.7.0 ")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_was_made_to_do_without_is_refused(site, version):
    """It can bind, and was told that the gate cannot; where that is not true, somebody changed the reply to EHLO."""
    with submission(site, version) as (wire, _):
        client = ScramClient(["SCRAM-SHA-256"], ALICE, SECRET, channel_binding=bound_to(wire.certificate))
        reply = scram(wire, client)
        if offers_plus(site, version):
            assert reply == "535 5.7.8 Channel binding is supported here, and was offered"
        else:
            assert reply.startswith("235 2.7.0 ")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_secret_by_scram(site, version):
    mechanism = "SCRAM-SHA-256-PLUS" if offers_plus(site, version) else "SCRAM-SHA-256"
    for user, secret in ((ALICE, "wrong"), ("nobody@example.com", SECRET)):
        with submission(site, version) as (wire, _):
            binding = bound_to(wire.certificate) if mechanism.endswith("PLUS") else None
            client = ScramClient([mechanism], user, secret, channel_binding=binding)
            assert scram(wire, client) == "535 5.7.8 Authentication credentials invalid"


# ---- files that change


@pytest.fixture
def changing(tmp_path) -> Iterator[Gate]:
    authority = trustme.CA()
    for name in ("first", "second"):
        issued(authority, tmp_path / f"{name}.pem", f"{name}.example.com")
    with LenientBackend("strict") as backend, Gate(tmp_path, CONFIG.format(port=backend.port)) as gate:
        yield gate
        no_faults(gate)


def served(gate: Gate, name: str | None = None) -> set[bytes]:
    """The certificates that are served now: each worker is asked, most likely."""
    found = set()
    for _ in range(8):
        with closing(Wire(gate.port)) as wire:
            wire.hello()
            wire.start_tls(name=name)
            found.add(wire.certificate)
    return found


def test_a_new_certificate_is_served_while_old_sessions_go_on(changing, tmp_path):
    before = served(changing)
    with Wire(changing.port) as old:
        old.hello()
        old.start_tls()
        old.hello()
        renewed = issued(trustme.CA(), tmp_path / "renewed", "first.example.com")
        renewed.path.replace(tmp_path / "first.pem")  # as certbot and its like do it
        until(lambda: served(changing) == {renewed.der}, "the new certificate is served")
        assert {old.certificate} == before
        assert old.mail(LOCAL, message("under the old one")).startswith("250")
        assert old.say("QUIT").startswith("221")
    until(lambda: events(changing, "reload"), "the log says so")
    assert not events(changing, "reload_refused")


def more_refusals(gate: Gate, than: int) -> bool:
    return len(events(gate, "reload_refused")) > than


def test_a_certificate_that_is_half_written_is_not_served(changing, tmp_path):
    before = served(changing)
    renewed = issued(trustme.CA(), tmp_path / "renewed", "first.example.com")
    octets = renewed.path.read_bytes()
    place = tmp_path / "first.pem"
    for length in (0, 100, len(octets) // 2, len(octets) - 20):
        count = len(events(changing, "reload_refused"))
        place.write_bytes(octets[:length])
        until(partial(more_refusals, changing, count), "it is seen and refused")
        assert served(changing) == before
    said = [event["text"] for event in events(changing, "reload_refused")]
    assert any("first.pem is half written" in text for text in said), said
    assert "the configuration before this one stays in force" in said
    assert not any("PRIVATE KEY" in text for text in said)
    place.write_bytes(octets)
    until(lambda: served(changing) == {renewed.der}, "the whole one is served")


def test_a_key_of_another_certificate_is_not_taken(changing, tmp_path):
    before = served(changing)
    other = issued(trustme.CA(), tmp_path / "other", "first.example.com")
    certificate = other.path.read_text().partition("-----BEGIN CERTIFICATE")
    key = (tmp_path / "second.pem").read_text().partition("-----BEGIN CERTIFICATE")[0]
    (tmp_path / "first.pem").write_text(key + certificate[1] + certificate[2])
    until(lambda: events(changing, "reload_refused"), "it is refused")
    assert "they do not belong together" in events(changing, "reload_refused")[0]["text"]
    assert served(changing) == before
