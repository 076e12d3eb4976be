"""``gatepost probe``: what it prints, its exit codes, and what it never does."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.probe.parts import choosy, inbox
from tests.vectors.lenient import LenientBackend

from gatepost import __version__, cli
from gatepost.cli import report_file
from gatepost.probe.evidence import evidence_object
from gatepost.probe.forms import FORMS

LOCAL = ("--local-domain", "example.com", "--pause", "0")


def typed(capsys, *arguments):
    code = cli.main(["probe", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def closed_server(monkeypatch) -> Iterator[LenientBackend]:
    with choosy("strict", monkeypatch) as backend:
        yield backend


@pytest.fixture
def percent_server(monkeypatch) -> Iterator[LenientBackend]:
    with choosy("percent-hack", monkeypatch) as backend:
        yield backend


def test_closed(closed_server, capsys):
    code, out, err = typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"CLOSED: 127.0.0.1:{closed_server.port}: it refused every form of relaying"
    assert f"why       IPv4: It refused all {len(FORMS)} forms." in lines
    rows = [line for line in lines if re.match(r"\S+ +refuses ", line)]
    assert len(rows) == len(FORMS)
    assert "C: MAIL" not in out, "there is nothing to show"


def test_open_shows_the_first_dialogue_that_relays(percent_server, capsys):
    code, out, _ = typed(capsys, f"127.0.0.1:{percent_server.port}", *LOCAL)
    assert code == 1
    assert out.startswith("OPEN RELAY: ")
    assert re.search(r"^percent-ours +accepts +250 2\.1\.5 ok$", out, re.MULTILINE)
    assert re.search(r"^null-sender +refuses +550 5\.7\.1 Relaying denied$", out, re.MULTILINE)
    shown = [line.strip() for line in out.splitlines() if re.match("  [CS]: ", line)]
    assert shown[0] == "S: 220 lenient.test ESMTP"
    assert shown[-1] == "S: 250 2.1.5 ok"
    assert "C: RCPT TO:<relay-test%gatepost-probe.invalid@example.com>" in shown


def test_verbose_shows_every_dialogue(closed_server, capsys):
    _, out, _ = typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL, "--verbose")
    assert out.count("C: MAIL FROM:") >= len(FORMS)
    assert "IPv4: percent-ours: the percent hack (nmap smtp-open-relay)" in out


def test_json(percent_server, capsys):
    code, out, err = typed(capsys, f"127.0.0.1:{percent_server.port}", *LOCAL, "--json")
    assert (code, err) == (1, "")
    answer = json.loads(out)
    assert answer["verdict"] == "open"
    assert answer["target"] == f"127.0.0.1:{percent_server.port}"
    assert answer["delivery"] is None
    (one,) = answer["rounds"]
    assert (one["forms"], one["tls"], one["local_domains"]) == (len(FORMS), False, ["example.com"])
    attempt = next(attempt for attempt in one["attempts"] if attempt["form"] == "percent-ours")
    assert attempt["outcome"] == "accepts"
    assert attempt["forward_path"] == "<relay-test%gatepost-probe.invalid@example.com>"
    assert attempt["transcript"][-1] == "S: 250 2.1.5 ok"


def test_a_server_that_takes_everything_is_unknown_and_delivery_tells(capsys):
    with LenientBackend("strict") as backend:
        code, out, _ = typed(capsys, f"127.0.0.1:{backend.port}", *LOCAL)
        assert code == 2
        assert out.startswith("UNKNOWN: ")
        assert "next      --deliver you@elsewhere.example" in out
        assert backend.transactions() == []
        for option in ("--deliver", "--deliver-to"):
            code, out, _ = typed(capsys, f"127.0.0.1:{backend.port}", *LOCAL, option, "me@elsewhere.test")
            assert code == 1
            match = re.search(r"look for ([0-9a-f]{16}) in the mailbox of me@elsewhere\.test", out)
            assert match is not None
            assert match[1].encode() in backend.transactions()[-1].octets
        assert len(backend.transactions()) == 2


def test_nobody_answers(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        code, out, _ = typed(capsys, "127.0.0.1", "--port", port)
        assert code == 2
        assert "connection refused" in out
        code, out, _ = typed(capsys, f"127.0.0.1:{port}", "--json")
        assert (code, json.loads(out)["verdict"]) == (2, "unknown")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["192.0.2.0/24"], "name one host"),
        (["192.0.2.1,192.0.2.2"], "name one host"),
        (["192.0.2.1", "192.0.2.2"], "192.0.2.2"),
        ([], "HOST"),
        (["127.0.0.1", "--ipv4", "--ipv6"], "exclude each other"),
        (["127.0.0.1", "--source", "here"], "not an IP address"),
        (["127.0.0.1", "--local-domain", "a b"], "not a domain"),
        (["127.0.0.1", "--outside", "nobody"], "not a plain address"),
        (["127.0.0.1", "--starttls", "perhaps"], "perhaps"),
        (["127.0.0.1", "--pause", "1000"], "600"),
        (["127.0.0.1", "--port", "0"], "port 0"),
        (["127.0.0.1", "--inbox", "https://mail.example.net/"], "unless --deliver-to names an address"),
        (["127.0.0.1", "--deliver-to", "me@x.test", "--inbox", "mail.example.net"], "no URL that can be asked"),
        (["127.0.0.1", "--deliver-to", "me@x.test", "--inbox", "http://x/", "--inbox-wait", "3601"], "3600"),
        (["127.0.0.1", "--deliver-to", "me@x.test", "--inbox", "http://x/", "--inbox-wait", "-1"], "3600"),
        (["127.0.0.1", "--deliver-to", "me@x.test", "--inbox", "http://you:pw@x/"], "others see the password"),
        (["127.0.0.1", "--report", "report.pdf"], "must be .html or .json"),
        (["127.0.0.1", "--report", "/nowhere/report.html"], "there is no directory /nowhere"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_asked_is_said_in_words(arguments, words, capsys):
    code, out, err = typed(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


# ---- the report to hand on


def test_a_report_is_written_for_people_and_for_programs(percent_server, capsys, tmp_path):
    target = f"127.0.0.1:{percent_server.port}"
    for name in ("report.html", "report.json"):
        code, out, _ = typed(capsys, target, *LOCAL, "--report", str(tmp_path / name))
        assert code == 1
        assert out.splitlines()[-1] == f"report    {tmp_path / name}"
    page, answer = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert page.startswith("<!DOCTYPE html>")
    assert "RCPT TO:&lt;relay-test%gatepost-probe.invalid@example.com&gt;" in page
    assert answer["verdict"] == "open"
    assert answer["version"] == f"gatepost {__version__}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer["begun"])
    code, out, _ = typed(capsys, target, *LOCAL, "--json", "--report", str(tmp_path / "other.json"))
    assert json.loads(out).keys() == answer.keys(), "nothing but JSON, and the same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "report.html", "report.json"]


@pytest.mark.parametrize("kind", ["file", "broken link", "directory"])
def test_a_report_takes_no_other_files_place(kind, closed_server, capsys, tmp_path):
    path = tmp_path / "report.html"
    if kind == "file":
        path.write_text("evidence")
    elif kind == "broken link":
        path.symlink_to(tmp_path / "away")
    else:
        path.mkdir()
    code, out, err = typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL, "--report", str(path))
    assert (code, out) == (2, "")
    assert ("a directory" if kind == "directory" else "--force replaces it") in err
    assert closed_server.recipients() == [], "said before the test"
    if kind != "directory":
        assert typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL, "--report", str(path), "--force")[0] == 0
        assert path.read_text().startswith("<!DOCTYPE html>")
        assert not path.is_symlink()
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_came_during_the_test_stays(closed_server, capsys, tmp_path, monkeypatch):
    path = tmp_path / "report.json"

    def meanwhile(*arguments):
        path.write_text("another's")
        return evidence_object(*arguments)

    monkeypatch.setattr(report_file, "evidence_object", meanwhile)
    code, out, err = typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL, "--report", str(path))
    assert code == 2
    assert out.startswith("CLOSED"), "what was found is shown all the same"
    assert "there is a file of that name" in err
    assert path.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [path]


# ---- the proof


def test_the_mark_in_the_inbox_is_proof(capsys, tmp_path, monkeypatch):
    with LenientBackend("strict") as backend, inbox(backend) as url:
        monkeypatch.setattr("sys.stdin", io.StringIO(url.replace("//", "//you:secret@") + "\n"))
        arguments = (f"127.0.0.1:{backend.port}", *LOCAL, "--deliver-to", "me@elsewhere.test", "--inbox-stdin")
        code, out, _ = typed(capsys, *arguments, "--report", str(tmp_path / "report.html"))
    assert code == 1
    match = re.search(r"why +The message marked ([0-9a-f]{16}) arrived: .* in the inbox at 127\.0\.0\.1\.", out)
    assert match is not None
    assert match[1].encode() in backend.transactions()[-1].octets
    page = (tmp_path / "report.html").read_text()
    assert "<b>it arrived</b>" in page
    assert "secret" not in page + out


def test_an_inbox_without_the_mark_leaves_it_to_the_person(capsys):
    with LenientBackend("strict") as backend, LenientBackend("strict") as other, inbox(other) as url:
        arguments = (f"127.0.0.1:{backend.port}", *LOCAL, "--deliver-to", "me@elsewhere.test", "--inbox", url)
        code, out, _ = typed(capsys, *arguments, "--inbox-wait", "0")
    assert code == 1
    assert "not seen at 127.0.0.1 yet; it may still come" in out
    assert re.search(r"look for [0-9a-f]{16} in the mailbox of me@elsewhere\.test: there it is proof", out)


def test_who_does_not_wait_for_the_message_gets_the_report(capsys, tmp_path, monkeypatch):
    async def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatepost.probe.inbox.arrived", interrupted)
    with LenientBackend("strict") as backend:
        arguments = (f"127.0.0.1:{backend.port}", *LOCAL, "--deliver-to", "me@elsewhere.test")
        inbox_and_report = ("--inbox", "http://127.0.0.1/", "--report", str(tmp_path / "report.json"))
        code, out, _ = typed(capsys, *arguments, *inbox_and_report)
    assert code == 1
    assert "not seen at 127.0.0.1 yet" in out
    assert (tmp_path / "report.json").exists()


def test_a_configuration_is_not_needed_and_not_read(closed_server, capsys):
    code, _, _ = typed(capsys, f"127.0.0.1:{closed_server.port}", *LOCAL, "--config", "/nowhere/gatepost.toml")
    assert code == 0


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """The command with a terminal for standard error, and for standard output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gatepost", "probe", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "120", **environment},
    )
    os.close(theirs)
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while octets := os.read(ours, 65_536):
                shown.append(octets)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, shown
    finally:
        process.wait(60)
        reader.join(10)
        os.close(ours)


@pytest.mark.parametrize(
    ("environment", "progress", "colour"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
    ids=["colour", "no colour", "dumb"],
)
def test_a_terminal_sees_progress_and_colour_as_it_wishes(environment, progress, colour, closed_server):
    environment = {"NO_COLOR": "", **environment}
    arguments = ("--local-domain", "example.com", "--pause", "0.02")
    with terminal(f"127.0.0.1:{closed_server.port}", *arguments, **environment) as (process, shown):
        assert process.wait(60) == 0
    octets = b"".join(shown)
    assert (b" of %d" % len(FORMS) in octets.partition(b"CLOSED")[0]) is progress
    assert (b"\x1b[1;32m" in octets) is colour
    assert b"CLOSED" in octets


def test_a_pipe_sees_no_progress(closed_server):
    done = subprocess.run(
        [sys.executable, "-m", "gatepost", "probe", f"127.0.0.1:{closed_server.port}", *LOCAL],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
