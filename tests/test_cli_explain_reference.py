"""`gatepost explain REF`: what a live gate refused, told by the reference in its reply."""

from __future__ import annotations

import contextlib
import io
import json
import re
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.gatehouse import Gate

from gatepost import cli
from gatepost.facts import Client as ClientFacts
from gatepost.facts import Identity, MailboxLogin, Session
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, Shape
from gatepost.store import Backlog, Entry, Record, backlog_directory
from gatepost.verdict import Finding, Reason, Result

PATIENCE_S = 20.0
PASSWORD = "correct horse battery"
PRINTER, BRANCH = "127.0.0.2", "127.0.0.3"

CONFIG = f"""\
[gate]
name = "mx.example.com"
data = "data"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[[listen]]
name = "submission"
address = "127.0.0.1:0"
role = "submission"
tls = "none"
auth_without_tls = true

[domains]
local = ["example.com", "example.org"]

[backend.mailbox]
address = "embedded:"

[backend.other]
address = "embedded:"

[[route]]
forward_paths = ["*@example.org"]
backend = "other"

[[route]]
forward_paths = ["*"]
backend = "mailbox"

[[trust]]
network = "{PRINTER}"
reverse_paths = ["*@example.com"]
why = "the printer"
owner = "it@example.com"

[[trust]]
network = "{BRANCH}"
why = "the branch"

[[trust]]
accounts = ["*"]

[[deny]]
reverse_path = "*@spam.test"
why = "complaint of 12 May"

[limits]
recipients_per_message = 2
messages_per_hour_per_mailbox = 5
"""


def line_of(text: str) -> int:
    """Where it stands in the file."""
    return CONFIG[: CONFIG.index(text)].count("\n") + 1


# An entry is named by the line of its head.
BY_PRINTER, BY_BRANCH, BY_ACCOUNT, BY_DENY = (
    f"gatepost.toml:{line_of(text) - 1}"
    for text in (f'network = "{PRINTER}"', f'network = "{BRANCH}"', 'accounts = ["*"]', 'reverse_path = "*@spam.test"')
)
BY_LOCAL = f"gatepost.toml:{line_of('local = ')}"


class Said(NamedTuple):
    code: int
    out: str
    err: str


def gatepost(gate: Gate, *arguments: str, file: str = "gatepost.toml") -> Said:
    """A command as it is typed, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*arguments, "--config", str(gate.directory / file)])
    return Said(code, out.getvalue().replace(f"{gate.directory}/", ""), err.getvalue())


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Iterator[Gate]:
    with Gate(tmp_path_factory.mktemp("gate"), CONFIG) as gate:
        program = (sys.executable, "-m", "gatepost")
        add = ("account", "add", "anna", "--password-stdin", "--config", str(gate.config))
        subprocess.run([*program, *add], input=f"{PASSWORD}\n", text=True, check=True, timeout=60)
        yield gate


def reference_in(reply: str) -> str:
    match = re.search(r"\[([0-9A-Z]{8}-[0-9]+)\]$", reply)
    assert match, reply
    return match[1]


def explained(gate: Gate, reference: str, *more: str, file: str = "gatepost.toml") -> Said:
    """What is said of it, once it is written."""
    end = time.monotonic() + PATIENCE_S
    while True:
        said = gatepost(gate, "explain", reference, *more, file=file)
        assert said.code in (0, 1), said.err
        assert said.err == ""
        if ("not found" not in said.out and '"found": false' not in said.out) or time.monotonic() > end:
            return said
        time.sleep(0.01)


def in_json(gate: Gate, reference: str, file: str = "gatepost.toml") -> tuple[int, dict[str, Any]]:
    told = explained(gate, reference, "--json", file=file)
    return told.code, json.loads(told.out)


class Client:
    """A session; a command's whole reply is text."""

    def __init__(self, gate: Gate, listen: str = "mx", source: str = "127.0.0.1") -> None:
        self._smtp = smtplib.SMTP("127.0.0.1", gate.ports[listen], source_address=(source, 0), timeout=PATIENCE_S)
        self.say("EHLO client.test")

    def say(self, line: str) -> str:
        code, text = self._smtp.docmd(line)
        return f"{code} {text.decode()}"

    def says(self, *lines: str) -> str:
        """The reply to the last of them; the others are accepted."""
        for line in lines[:-1]:
            reply = self.say(line)
            assert reply[0] in "23", reply
        return self.say(lines[-1])

    def log_in(self) -> None:
        self._smtp.login("anna", PASSWORD)

    def content(self, text: str) -> str:
        assert self.say("DATA").startswith("354")
        self._smtp.send(text.replace("\n", "\r\n").encode() + b".\r\n")
        code, said = self._smtp.getreply()
        return f"{code} {said.decode()}"

    def close(self) -> None:
        self._smtp.close()


@pytest.fixture
def client(gate) -> Iterator[Callable[..., Client]]:
    """Begins sessions, which end with the test."""
    with contextlib.ExitStack() as sessions:

        def begin(listen: str = "mx", source: str = "127.0.0.1") -> Client:
            begun = Client(gate, listen, source)
            sessions.callback(begun.close)
            return begun

        yield begin


# --- Each reason ------------------------------------------------------------------------------------------------------


def test_a_relay_that_was_refused(gate, client):
    reply = client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    told = explained(gate, reference_in(reply))
    assert told.code == 1
    lines = told.out.splitlines()
    assert lines[0] == f"REFUSED with {reply}"
    assert re.fullmatch(r"when    20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, at RCPT", lines[1])
    assert lines[2:] == [
        "client  127.0.0.1 at listener mx (role mx), EHLO client.test, without TLS",
        "mail    from a@stranger.test to victim@elsewhere.test",
        "rule    no rule lets it pass, and what no rule lets pass is refused",
        "now     the same",
        "        [[deny]]: no entry matches",
        "        recipients_per_message: 0 before it, 2 allowed",
        "        [domains] local: victim@elsewhere.test is not at a domain of ours",
        "        [[trust]]: no entry means this client",
        f"admitted if the client were in {BRANCH}/32 ({BY_BRANCH})",
        f"            the client had logged in ({BY_ACCOUNT})",
        f"            the forward-path were at a local domain, such as example.com ({BY_LOCAL})",
        f"            the client were in {PRINTER}/32 and the reverse-path were *@example.com ({BY_PRINTER})",
    ]


def test_in_json_with_all_facts(gate, client):
    reply = client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    code, answer = in_json(gate, reference_in(reply))
    now = answer.pop("now")
    assert (code, answer.pop("reference"), answer.pop("reply")) == (1, reference_in(reply), reply)
    assert answer.pop("port") > 0
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", answer.pop("time"))
    assert answer == {
        "found": True,
        "stage": "rcpt",
        "client": "127.0.0.1",
        "listen": "mx",
        "role": "mx",
        "helo": "client.test",
        "esmtp": True,
        "tls": "",
        "account": None,
        "mechanism": None,
        "verifier": None,
        "device": None,
        "addresses": [],
        "auth_required": False,
        "certificate": "",
        "hosts": [],
        "mailbox_login": None,
        "suspended": False,
        "listen_suspended": False,
        "reverse_path": "a@stranger.test",
        "forward_path": "victim@elsewhere.test",
        "shape": "plain",
        "recipients": 0,
        "authors": [],
        "backend": None,
        "findings": [],
        "verdict": "refuse",
        "reason": "relaying",
        "why": "no rule lets it pass, and what no rule lets pass is refused",
        "where": "",
        "detail": "",
    }
    assert (now["same"], now["verdict"], now["reason"], now["rule"]) == (True, "refuse", "relaying", None)
    assert now["changes"][0] == {"condition": f"the client were in {BRANCH}/32", "where": BY_BRANCH}


def test_routing_characters(gate, client):
    reply = client().says("MAIL FROM:<>", "RCPT TO:<victim%elsewhere.test@example.com>")
    told = explained(gate, reference_in(reply))
    assert "mail    from <> to victim%elsewhere.test@example.com (shape percent)\n" in told.out
    assert "rule    a backend may read the local-part as another address (percent): never from strangers\n" in told.out
    assert "by example.com" in told.out
    assert "but its local-part holds routing characters\n" in told.out
    assert "admitted if the local-part held no routing characters\n" in told.out


def test_a_denial_at_mail(gate, client):
    reply = client().say("MAIL FROM:<a@spam.test>")
    told = explained(gate, reference_in(reply))
    assert told.code == 1
    assert " UTC, at MAIL\n" in told.out
    assert f"rule    the administrator denies it: complaint of 12 May ({BY_DENY})\n" in told.out
    assert f"now     the same, by [[deny]] reverse_path *@spam.test ({BY_DENY}): complaint of 12 May\n" in told.out
    assert f"admitted if this entry did not stand there ({BY_DENY})\n" in told.out


def test_a_narrowed_grant(gate, client):
    reply = client(source=PRINTER).says("MAIL FROM:<a@stranger.test>", "RCPT TO:<b@elsewhere.test>")
    told = explained(gate, reference_in(reply))
    assert f"rule    the permission is narrowed by reverse_paths ({BY_PRINTER})\n" in told.out
    narrowed = "the permission is narrowed by reverse_paths"
    assert f"        [[trust]] network {PRINTER}/32 ({BY_PRINTER}): {narrowed}\n" in told.out
    assert f"admitted if the reverse-path were *@example.com ({BY_PRINTER})\n" in told.out


def test_an_account_that_sends_as_another(gate, client):
    session = client("submission")
    session.log_in()
    told = explained(gate, reference_in(session.say("MAIL FROM:<boss@example.com>")))
    assert told.code == 1
    assert "account anna (" in told.out
    assert "verified by accounts)\n" in told.out
    assert PASSWORD not in told.out
    assert "rule    anna as boss@example.com, which is neither the account's own address nor granted" in told.out
    assert "now     the same\n" in told.out
    assert "admitted if the reverse-path were the account's own (expected anna@example.com or anna@" in told.out


def test_an_author_that_is_another(gate, client):
    session = client("submission")
    session.log_in()
    session.says("MAIL FROM:<anna@example.com>", "RCPT TO:<bob@example.com>")
    told = explained(gate, reference_in(session.content("From: The Boss <boss@example.com>\nSubject: x\n\nx\n")))
    assert told.code == 1
    assert " UTC, at the end of content\n" in told.out
    assert "mail    from anna@example.com, 1 recipient so far, for the backend mailbox\n" in told.out
    assert "author  boss@example.com\n" in told.out
    assert "now     the same\n" in told.out
    assert "admitted if the From field named the account's own address (expected anna@example.com or" in told.out


def test_an_author_that_nobody_can_tell(gate, client):
    session = client("submission")
    session.log_in()
    session.says("MAIL FROM:<anna@example.com>", "RCPT TO:<bob@example.com>")
    told = explained(gate, reference_in(session.content("From: a@example.com\nFrom: b@example.com\n\nx\n")))
    assert "rule    nobody can tell as whom the account sends: There is more than one From field\n" in told.out
    assert "now     the same\n" in told.out
    assert "admitted if its From field named the account's own address, once and in a plain form\n" in told.out


def test_a_rate_that_was_used_up(gate, client):
    session = client()
    for _ in range(5):
        assert session.says("MAIL FROM:<>", "RCPT TO:<busy@example.com>").startswith("250")
        session.say("RSET")
    reply = session.says("MAIL FROM:<>", "RCPT TO:<busy@example.com>")
    assert reply.startswith("450")
    told = explained(gate, reference_in(reply))
    assert told.out.startswith(f"DEFERRED with {reply}\n")
    assert "found   rate mailbox: fail, 5 messages in this hour\n" in told.out
    assert f"rule    too much mail in that hour ({BY_LOCAL})\n" in told.out
    assert "now     the same" in told.out
    assert f"admitted if there had been room in that hour ({BY_LOCAL})\n" in told.out
    assert "note    whether there is room in this hour, the running gate alone can tell\n" in told.out


def test_a_login_that_is_required(gate, client):
    reply = client("submission").say("MAIL FROM:<anna@example.com>")
    told = explained(gate, reference_in(reply))
    assert "account none, and the listener asks for one\n" in told.out
    assert "rule    the listener takes mail only from a client that logged in\n" in told.out
    assert "admitted if the client had logged in\n" in told.out


def test_too_many_recipients(gate, client):
    reply = client().says("MAIL FROM:<>", *(f"RCPT TO:<{name}@example.com>" for name in "abc"))
    assert reply.startswith("452 4.5.3 ")
    told = explained(gate, reference_in(reply))
    assert "mail    from <> to c@example.com, 2 recipients so far, for the backend mailbox\n" in told.out
    assert "rule    the transaction had as many recipients as it may have\n" in told.out
    assert "recipients_per_message: 2 before it, 2 allowed\n" in told.out
    assert "admitted if fewer recipients had come before it in the transaction\n" in told.out


def test_another_route(gate, client):
    reply = client().says("MAIL FROM:<>", "RCPT TO:<a@example.com>", "RCPT TO:<b@example.org>")
    told = explained(gate, reference_in(reply))
    assert told.code == 1
    assert "rule    the recipients before it go to another backend, and one reply cannot answer for both\n" in told.out
    assert "now     the same\n" in told.out
    assert "admitted if the recipient came in a transaction of its own\n" in told.out


# --- Another configuration --------------------------------------------------------------------------------------------


@pytest.fixture
def changed(gate) -> Callable[[str, str], str]:
    """Another configuration of the same gate, which goes on under its own."""

    def change(old: str, new: str) -> str:
        assert old in CONFIG
        (gate.directory / "changed.toml").write_text(CONFIG.replace(old, new))
        return "changed.toml"

    return change


def test_a_configuration_that_changed_in_between_admits_it(gate, client, changed):
    reply = client(source="127.0.0.9").says("MAIL FROM:<a@stranger.test>", "RCPT TO:<b@elsewhere.test>")
    reference = reference_in(reply)
    assert explained(gate, reference).code == 1
    told = explained(gate, reference, file=changed(f'network = "{BRANCH}"', 'network = "127.0.0.8/31"'))
    assert told.code == 0
    assert told.out.startswith(f"REFUSED with {reply}\n")
    moved = BY_BRANCH.replace("gatepost", "changed")
    admitted = f"ADMITTED by [[trust]] network 127.0.0.8/31 ({moved}): the branch"
    assert f"now     {admitted}; goes to the backend mailbox\n" in told.out
    assert f"        [[trust]] network 127.0.0.8/31 ({moved}): covers it\n" in told.out
    assert f"refused if  the client were not in 127.0.0.8/31 ({moved})\n" in told.out
    code, answer = in_json(gate, reference, "changed.toml")
    assert (code, answer["verdict"], answer["now"]["same"], answer["now"]["verdict"]) == (0, "refuse", False, "admit")


def test_a_denial_that_is_gone_says_what_comes_next(gate, client, changed):
    reference = reference_in(client().say("MAIL FROM:<a@spam.test>"))
    explained(gate, reference)
    told = explained(gate, reference, file=changed("*@spam.test", "*@other.test"))
    assert told.code == 0
    assert "now     ACCEPTED: nothing refuses it any more; its recipients are decided one by one\n" in told.out


def test_another_reason_now(gate, client, changed):
    reply = client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<b@elsewhere.test>")
    told = explained(gate, reference_in(reply), file=changed("*@spam.test", "*@stranger.test"))
    assert told.code == 1
    assert "now     REFUSED with 550 5.7.1 Refused by the administrator of this server, by [[deny]] rev" in told.out


def test_a_grant_that_has_moved_down_is_the_same(gate, client, changed):
    reply = client(source=PRINTER).says("MAIL FROM:<a@stranger.test>", "RCPT TO:<b@elsewhere.test>")
    explained(gate, reference_in(reply))
    told = explained(gate, reference_in(reply), file=changed("[gate]", "# a comment\n[gate]"))
    assert f"rule    the permission is narrowed by reverse_paths ({BY_PRINTER})\n" in told.out
    assert (
        f"now     the same, by [[trust]] network {PRINTER}/32 (changed.toml:{line_of(PRINTER)}): the printer"
        in told.out
    )


def test_an_account_that_was_granted_the_address(gate, client, changed):
    session = client("submission")
    session.log_in()
    session.says("MAIL FROM:<anna@example.com>", "RCPT TO:<bob@example.com>")
    reference = reference_in(session.content("From: boss@example.com\n\nx\n"))
    assert explained(gate, reference).code == 1
    told = explained(
        gate,
        reference,
        file=changed("[limits]", '[[send_as]]\naccounts = ["anna"]\nreverse_paths = ["boss@example.com"]\n\n[limits]'),
    )
    assert told.code == 0
    assert "now     ACCEPTED: nothing refuses it any more; it goes to the backend\n" in told.out


def test_a_listener_that_is_gone_is_taken_for_what_it_was(gate, client, changed):
    reference = reference_in(client("submission").say("MAIL FROM:<anna@example.com>"))
    explained(gate, reference)
    told = explained(gate, reference, file=changed('name = "submission"', 'name = "msa"'))
    assert "now     the same\n" in told.out
    assert "note    the configuration has no listener submission any more; it is taken for what it was\n" in told.out


def kept(directory: Path, **changes: Any) -> str:
    """A refusal that a gate kept here."""
    session = Session("K7Q2M9XD", ClientFacts(ip_address(BRANCH), 4711), "mx", "mx", "client.test", esmtp=True)
    entry = Entry(
        at=1_800_000_000.0,
        number=1,
        stage="rcpt",
        reverse_path=NULL_REVERSE_PATH,
        forward_path=ForwardPath(Mailbox("b", "elsewhere.test"), Shape.PLAIN),
        recipients=0,
        verdict="refused",
        reason="relaying",
        reference="K7Q2M9XD-1",
        reply="550 5.7.1 Relaying is prohibited [K7Q2M9XD-1]",
    )
    backlog = Backlog(backlog_directory(str(directory / "data")), 1 << 30)
    backlog.keep(Record(changes.pop("session", session), [entry._replace(**changes)]), entry.at)
    backlog.close()
    return entry.reference


def test_a_rate_of_a_grant_in_a_file_that_the_gate_calls_by_another_name(tmp_path):
    name = f"/etc/gatepost/{BY_BRANCH}"
    reference = kept(
        tmp_path,
        findings=(Finding(f"rate {name}", Result.FAIL, "60 messages and 90 recipients in this hour"),),
        verdict="deferred",
        reason="rate",
        by=name,
        detail="the branch",
    )
    said = explained(
        Gate(tmp_path, CONFIG.replace('why = "the branch', 'messages_per_hour = 60\nwhy = "the branch')), reference
    )
    assert f"rule    too much mail in that hour: the branch ({name})\n" in said.out
    assert f"now     the same, by [[trust]] network {BRANCH}/32 ({BY_BRANCH}): the branch\n" in said.out
    assert f"        [[trust]] network {BRANCH}/32 ({BY_BRANCH}): too much mail in that hour\n" in said.out
    assert f"admitted if there had been room in that hour ({BY_BRANCH})\n" in said.out


def test_a_login_to_the_mailbox_is_as_long_ago_as_it_was(tmp_path):
    session = Session("K7Q2M9XD", ClientFacts(ip_address("127.0.0.9"), 4711), "mx", "mx")
    session = session._replace(mailbox_login=MailboxLogin("ben", 1_800_000_000.0 - 2000))
    reference = kept(tmp_path, session=session, reason="mailbox_login", by=BY_BRANCH)
    for window, code in (("30m", 1), ("1h", 0)):
        gate = Gate(tmp_path, CONFIG.replace(f'network = "{BRANCH}"', f'pop3 = "{window}"'))
        said = explained(gate, reference)
        assert "mailbox ben logged in at 2027-01-15T07:26:40.000Z\n" in said.out
        assert (said.code, "now     the same" in said.out) == (code, code == 1)


def test_all_that_was_known_of_a_client_is_told(tmp_path):
    session = Session(
        "K7Q2M9XD",
        ClientFacts(ip_address("2001:db8::9"), 4711),
        "mx",
        "mx",
        tls="TLSv1.3",
        identity=Identity("anna", "PLAIN", "ldap", "phone", ("anna@example.com",)),
        hosts=("branch.example.net",),
        certificate="ab" * 32,
        suspended=True,
    )
    reference = kept(tmp_path, session=session, reverse_path=Mailbox("anna", "example.com"))
    said = explained(Gate(tmp_path, CONFIG), reference)
    assert "client  2001:db8::9 at listener mx (role mx), no EHLO, TLSv1.3\n" in said.out
    assert "account anna (PLAIN, verified by ldap, device phone)\n" in said.out
    assert f"showed  the certificate {'ab' * 32}\n" in said.out
    assert "host    branch.example.net\n" in said.out
    assert "trust   that in the client was suspended\n" in said.out
    assert f"now     ADMITTED by [[trust]] accounts * ({BY_ACCOUNT}); goes to the backend mailbox\n" in said.out


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_its_sentence(tmp_path, reason):
    said = explained(
        Gate(tmp_path, CONFIG), kept(tmp_path, reason=reason.name.lower(), by=BY_BRANCH, detail="some detail")
    )
    (rule,) = re.findall(r"^rule    (.*)$", said.out, re.MULTILINE)
    assert rule.endswith(f"({BY_BRANCH})")
    assert reason.wording not in rule, "a sentence for the operator, not the client's"


# --- The reference ----------------------------------------------------------------------------------------------------


def test_a_reference_as_people_type_it(gate, client):
    reply = client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    reference = reference_in(reply)
    wanted = explained(gate, reference)
    misread = reference.replace("0", "O").replace("1", "l")
    for typed in (reference.lower(), f"[{reference}]", f" {misread} ", reply):
        assert explained(gate, typed) == wanted


def test_what_is_not_found_says_what_may_be_the_reason(gate, client):
    client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    done = gatepost(gate, "explain", "ZZZZZZZZ-9")
    assert (done.code, done.err) == (1, "")
    assert done.out.startswith("not found: ZZZZZZZZ-9\n")
    assert re.search(r"        the journal in data/journal/journal\.sqlite begins on 20", done.out)
    assert "elsewhere than [gate] data in gatepost.toml says\n" in done.out
    assert "another gate's" in done.out
    done = gatepost(gate, "explain", "ZZZZZZZZ-9", "--json")
    answer = json.loads(done.out)
    assert (done.code, answer["found"], len(answer["reasons"])) == (1, False, 4)


def test_where_nothing_was_ever_kept(tmp_path):
    other = Gate(tmp_path, CONFIG)
    done = gatepost(other, "explain", "ZZZZZZZZ-9")
    assert done.code == 1
    assert re.search(r"        the journal in data/journal/journal\.sqlite is empty\n", done.out)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["K7Q2M9XD-1", "--client", "192.0.2.1"], "leave --client out"),
        (["K7Q2M9XD-1", "--helo", "x", "--tls", "1.2"], "leave --helo and --tls out"),
        (["K7Q2M9XD"], "looks like K7Q2M9XD-1"),
        (["K7Q2M9XU-1"], "looks like K7Q2M9XD-1"),
        (["\x1b[31m"], "looks like K7Q2M9XD-1"),
        (["--client", "192.0.2.1"], "--reverse-path and --forward-path are missing"),
        ([], "the reference in a reply"),
    ],
)
def test_bad_usage(gate, arguments, said):
    done = gatepost(gate, "explain", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "\x1b" not in done.err


def test_what_a_newer_version_wrote_is_said(gate, tmp_path):
    directory = backlog_directory(str(tmp_path / "data"))
    directory.mkdir(parents=True)
    (directory / "00000001.jsonl").write_text('{"schema":2,"reference":"K7Q2M9XD-1","other":[]}\n')
    done = gatepost(Gate(tmp_path, CONFIG), "explain", "K7Q2M9XD-1")
    assert (done.code, done.out) == (2, "")
    assert "a newer version of Gatepost wrote this record (schema 2, this version reads 1)" in done.err


def test_a_strangers_text_cannot_move_the_terminal(gate, client):
    session = client()
    session.say("EHLO \x1b[31mred")
    reply = session.says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    told = explained(gate, reference_in(reply))
    assert "\x1b" not in told.out
    lines = [path.read_bytes() for path in backlog_directory(str(gate.directory / "data")).glob("*.jsonl")]
    assert not re.search(rb"[^\x20-\x7e\n]", b"".join(lines))


def test_the_files_are_the_gates_alone(gate, client):
    reply = client().says("MAIL FROM:<a@stranger.test>", "RCPT TO:<victim@elsewhere.test>")
    explained(gate, reference_in(reply))
    directory: Path = backlog_directory(str(gate.directory / "data"))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
