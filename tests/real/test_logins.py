"""Logins at a live gate, with the programs that people log in with, each by each mechanism it knows.

What must hold: who logged in sends anywhere, as itself alone; nobody else does; no secret is ever written down.
"""

from __future__ import annotations

import base64
import json
import smtplib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.gatehouse import Gate
from tests.marked import MARKED, OF_TESTS, files_with_it, seen_in
from tests.real.console import no_faults
from tests.real.programs import HELLO, unjudging
from tests.real.wire import PATIENCE_S, Wire
from tests.servers import need
from tests.vectors.lenient import LenientBackend

ALICE = "alice@example.com"
OUTSIDE = "friend@elsewhere.test"
INVALID = "535 5.7.8 Authentication credentials invalid"

CONFIG = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"
tls = "starttls"

[[listen]]
name = "submission"
address = "127.0.0.1:0"
role = "submission"
tls = "starttls"

[[listen]]
name = "submissions"
address = "127.0.0.1:0"
role = "submission"
tls = "implicit"

[[listen]]
name = "plain"
address = "127.0.0.1:0"
role = "inside"
auth_without_tls = true
send_as = "enforce"

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


class Site(NamedTuple):
    """A gate with accounts, and what arrives behind it."""

    gate: Gate
    backend: LenientBackend
    device: str

    def arrived(self, since: int) -> list[tuple[bytes, list[bytes], bytes]]:
        return [
            (transaction.reverse_path, [one.argument for one in transaction.recipients], transaction.octets)
            for transaction in self.backend.transactions(since)
        ]


def account(gate: Gate, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """``gatepost account ...``, as an administrator types it."""
    return subprocess.run(
        [sys.executable, "-m", "gatepost", "account", *words, "--config", str(gate.config)],
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=gate.directory,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    with LenientBackend("strict") as backend:
        gate = Gate(tmp_path_factory.mktemp("logins"), CONFIG.format(port=backend.port))
        added = account(gate, "add", ALICE, "--password-stdin", typed=f"{MARKED}\n")
        assert added.returncode == 0, added.stderr
        assert account(gate, "add", "bob", "--password-stdin", typed="battery staple\n").returncode == 0
        made = account(gate, "device", "add", ALICE, "printer", "--json")
        assert made.returncode == 0, made.stderr
        with gate:
            yield Site(gate, backend, json.loads(made.stdout)["password"])
            for pid in gate.processes():
                assert not seen_in(Path(f"/proc/{pid}/cmdline").read_bytes())
                assert not seen_in(Path(f"/proc/{pid}/environ").read_bytes())
        no_faults(gate)
        assert not seen_in("\n".join([*gate.output, *gate.errors]).encode())
        assert files_with_it(gate.directory) == []


# ---- programs

Send = Callable[[Site, str, str, str, str, Path], str]
"""Site, mechanism, user, secret, reverse-path, a directory to work in; gives what the program shows."""

MESSAGE = "From: {sender}\r\nTo: " + OUTSIDE + "\r\nSubject: hello\r\n\r\nA line.\r\n"


def by_smtplib(site: Site, mechanism: str, user: str, secret: str, sender: str, _: Path) -> str:
    with smtplib.SMTP("127.0.0.1", site.gate.ports["submission"], HELLO, PATIENCE_S) as client:
        client.starttls(context=unjudging())
        client.ehlo()
        client.user, client.password = user, secret
        authenticate = {"PLAIN": client.auth_plain, "LOGIN": client.auth_login}[mechanism]
        try:
            client.auth(mechanism, authenticate)
            client.sendmail(sender, [OUTSIDE], MESSAGE.format(sender=sender).encode())
        except smtplib.SMTPResponseException as error:
            return f"{error.smtp_code} {error.smtp_error!r}"
        except smtplib.SMTPSenderRefused as error:
            return f"{error.smtp_code} {error.smtp_error!r}"
    return "sent"


def run(command: list[str], typed: bytes = b"") -> str:
    done = subprocess.run(
        command, input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=2 * PATIENCE_S, check=False
    )
    said = done.stdout.decode("utf-8", "replace")
    return "sent" if done.returncode == 0 else said


def by_swaks(site: Site, mechanism: str, user: str, secret: str, sender: str, place: Path) -> str:
    body = place / "mail.eml"
    body.write_text(MESSAGE.format(sender=sender))
    return run(
        [
            *(str(need("swaks")), "--server", "127.0.0.1", "--port", str(site.gate.ports["plain"]), "--ehlo", HELLO),
            *("--auth", mechanism, "--auth-user", user, "--auth-password", secret, "--from", sender, "--to", OUTSIDE),
            *("--auth-hide-password", "--data", f"@{body}"),
        ]
    )


def by_curl(site: Site, mechanism: str, user: str, secret: str, sender: str, place: Path) -> str:
    body, login = place / "mail.eml", place / f"{OF_TESTS}.curl"
    body.write_text(MESSAGE.format(sender=sender))
    login.write_text(f'user = "{user}:{secret}"\n')
    return run(
        [
            *(str(need("curl")), "--silent", "--show-error", "--verbose", "--max-time", str(int(PATIENCE_S))),
            *("--config", str(login), "--login-options", f"AUTH={mechanism}", "--ssl-reqd", "--insecure"),
            *(f"smtp://127.0.0.1:{site.gate.ports['submission']}/{HELLO}", "--mail-from", sender),
            *("--mail-rcpt", OUTSIDE, "--upload-file", str(body)),
        ]
    )


_NODEMAILER = """
const [directory, options] = [process.argv[1], JSON.parse(require('fs').readFileSync(0, 'utf-8'))];
const transport = require(directory).createTransport(options.transport);
transport.sendMail({envelope: options.envelope, raw: options.raw}).then(
    () => console.log('sent'),
    (error) => { console.log(error.response || error.message); process.exitCode = 1; },
).finally(() => transport.close());
"""


def by_nodemailer(site: Site, mechanism: str, user: str, secret: str, sender: str, _: Path) -> str:
    options = {
        "transport": {
            "host": "127.0.0.1",
            "port": site.gate.ports["submissions"],
            "name": HELLO,
            "secure": True,
            "tls": {"rejectUnauthorized": False},
            "auth": {"user": user, "pass": secret},
            "authMethod": mechanism,
        },
        "envelope": {"from": sender, "to": [OUTSIDE]},
        "raw": MESSAGE.format(sender=sender),
    }
    return run([str(need("node")), "-e", _NODEMAILER, str(need("nodemailer"))], json.dumps(options).encode())


def by_msmtp(site: Site, mechanism: str, user: str, secret: str, sender: str, place: Path) -> str:
    settings = place / f"{OF_TESTS}.msmtprc"
    settings.write_text(
        f"defaults\nauth {mechanism.lower()}\ntls on\ntls_starttls on\ntls_certcheck off\nlogfile -\n"
        f"account gate\nhost 127.0.0.1\nport {site.gate.ports['submission']}\nfrom {sender}\nuser {user}\n"
        f"password {json.dumps(secret)}\ndomain {HELLO}\naccount default : gate\n"
    )
    settings.chmod(0o600)
    return run([str(need("msmtp")), "-C", str(settings), "--debug", OUTSIDE], MESSAGE.format(sender=sender).encode())


PROGRAMS: dict[str, tuple[Send, tuple[str, ...]]] = {
    "smtplib": (by_smtplib, ("PLAIN", "LOGIN")),
    "swaks": (by_swaks, ("PLAIN", "LOGIN")),
    "curl": (by_curl, ("PLAIN", "LOGIN")),
    "nodemailer": (by_nodemailer, ("PLAIN", "LOGIN")),
    "msmtp": (by_msmtp, ("PLAIN", "LOGIN", "SCRAM-SHA-256")),
}
EACH = [
    pytest.param(send, mechanism, id=f"{name}-{mechanism}")
    for name, (send, mechanisms) in PROGRAMS.items()
    for mechanism in mechanisms
]


@pytest.mark.parametrize(("send", "mechanism"), EACH)
def test_who_logs_in_sends_anywhere(site, tmp_path, send, mechanism):
    since = len(site.backend.journal)
    assert send(site, mechanism, ALICE, MARKED, ALICE, tmp_path) == "sent"
    ((sender, recipients, octets),) = site.arrived(since)
    assert ALICE.encode() in sender
    assert [OUTSIDE.encode() in recipient for recipient in recipients] == [True]
    assert b"A line.\r\n" in octets
    assert MARKED.encode() not in octets
    line = site.gate.wait_for_session(
        lambda line: line["logins"][0]["mechanism"] == mechanism if "logins" in line else 0
    )
    assert line["account"] == ALICE


@pytest.mark.parametrize(("send", "mechanism"), EACH)
def test_who_types_a_wrong_password_does_not(site, tmp_path, send, mechanism):
    since = len(site.backend.journal)
    said = send(site, mechanism, ALICE, f"{MARKED}!", ALICE, tmp_path)
    assert said != "sent"
    assert "535" in said
    assert site.arrived(since) == []


@pytest.mark.parametrize("send", [pytest.param(send, id=name) for name, (send, _) in PROGRAMS.items()])
def test_nobody_sends_as_somebody_else(site, tmp_path, send):
    since = len(site.backend.journal)
    said = send(site, "PLAIN", ALICE, MARKED, "boss@example.com", tmp_path)
    assert "550" in said
    assert f"Sending as this address is prohibited: expected {ALICE}" in said
    assert site.arrived(since) == []


def test_a_device_has_a_password_of_its_own(site, tmp_path):
    assert by_msmtp(site, "PLAIN", ALICE, site.device, ALICE, tmp_path) == "sent"
    listed = account(site.gate, "list", "--json")
    assert listed.returncode == 0
    (alice,) = [one for one in json.loads(listed.stdout)["accounts"] if one["name"] == ALICE]
    assert alice["devices"][0]["label"] == "printer"
    assert alice["devices"][0]["last_used"]


def test_a_locked_account_is_out_at_once_and_a_new_password_is_in(site, tmp_path):
    assert by_smtplib(site, "PLAIN", "bob", "battery staple", "bob@example.com", tmp_path) == "sent"
    assert account(site.gate, "lock", "bob").returncode == 0
    assert by_smtplib(site, "PLAIN", "bob", "battery staple", "bob@example.com", tmp_path).startswith("535")
    assert account(site.gate, "unlock", "bob").returncode == 0
    assert account(site.gate, "passwd", "bob", "--password-stdin", typed="other staple\n").returncode == 0
    assert by_smtplib(site, "PLAIN", "bob", "battery staple", "bob@example.com", tmp_path).startswith("535")
    assert by_smtplib(site, "PLAIN", "bob", "other staple", "bob@example.com", tmp_path) == "sent"


def test_submission_wants_a_login_and_the_mx_takes_none(site):
    with Wire(site.gate.ports["submission"]) as wire:
        wire.hello(HELLO)
        wire.start_tls()
        wire.hello(HELLO)
        assert wire.say(f"MAIL FROM:<{ALICE}>").startswith("530 5.7.0 Authentication required")
    token = base64.b64encode(f"\0{ALICE}\0{MARKED}".encode()).decode()
    with Wire(site.gate.ports["mx"]) as wire:
        wire.hello(HELLO)
        wire.start_tls()
        assert "AUTH" not in wire.hello(HELLO)
        assert wire.say(f"AUTH PLAIN {token}").startswith("502")
    with Wire(site.gate.ports["submission"]) as wire:
        assert "AUTH" not in wire.hello(HELLO)  # not before TLS
        assert wire.say(f"AUTH PLAIN {token}").startswith("502")


def test_nothing_said_before_starttls_survives_it(site):
    with Wire(site.gate.ports["submission"]) as wire:
        wire.hello(HELLO)
        wire.start_tls()
        assert wire.say(f"MAIL FROM:<{ALICE}>").startswith("503")
