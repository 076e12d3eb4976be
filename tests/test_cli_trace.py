"""``gatepost trace``: a table on a terminal, JSON lines in a pipe, and what comes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.places import NOON_S, Place, entry, record, refused, session

from gatepost import cli
from gatepost.smtp.path import Mailbox
from gatepost.store import End, Record

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gatepost.toml").write_text(CONFIG)
    place = Place(tmp_path / "data")
    yield place
    place.close()


@pytest.fixture
def kept(place: Place) -> Place:
    anna = session(11, client="10.0.0.5", account="anna")
    stranger = session(12, client="192.0.2.77", hello="\x1b[31mred")
    place.keep(
        record([entry(message="00000011.1", message_id="<m@x.example>")], anna, ended=True),
        record([refused("00000012-1", at=NOON_S + 1)], stranger, ended=True),
        Record(stranger, (), End(NOON_S, NOON_S + 2, "lost", 3, logins=({"account": "root", "verdict": "denied"},))),  # type: ignore[typeddict-item]
    )
    return place


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_in_a_pipe_the_newest_last(kept, capsys):
    assert cli.main(["trace"]) == 0
    told = lines(capsys.readouterr().out)
    assert [(line["session"], line["verdict"]) for line in told] == [("00000011", "accepted"), ("00000012", "refused")]
    assert cli.main(["trace", "--limit", "1"]) == 0
    assert lines(capsys.readouterr().out) == told[-1:]


@pytest.mark.parametrize(
    ("arguments", "sessions"),
    [
        (["anna"], ["00000011"]),
        (["192.0.2.77"], ["00000012"]),
        (["bob@example.com"], ["00000011"]),
        (["a@x.example"], ["00000011", "00000012"]),
        (["<m@x.example>"], ["00000011"]),
        (["--verdict", "refused"], ["00000012"]),
        (["x.example", "--reason", "relaying"], ["00000012"]),
        (["00000012-1"], ["00000012"]),
        (["--client", "10.0.0.0/8", "--account", "anna"], ["00000011"]),
    ],
)
def test_found(kept, capsys, arguments, sessions):
    assert cli.main(["trace", *arguments]) == 0
    assert [line["session"] for line in lines(capsys.readouterr().out)] == sessions


def test_nothing_found_is_exit_1_and_says_since_when_there_is_anything(kept, capsys):
    assert cli.main(["trace", "nobody@example.com"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(r"nothing is found in the journal in \S+, which begins on 2027-01-15 08:00:00 UTC\n$", said.err)


def test_an_empty_journal_and_one_that_is_switched_off(place, capsys):
    assert cli.main(["trace"]) == 1
    assert "is empty" in capsys.readouterr().err
    assert not (place.directory / "journal").exists()
    Path("gatepost.toml").write_text(CONFIG + "\n[journal]\nenabled = false\n")
    for follow in ([], ["-f"]):
        assert cli.main(["trace", *follow]) == 2
        assert "[journal] enabled = false (gatepost.toml:16); remove that" in capsys.readouterr().err


def test_what_was_kept_before_it_was_switched_off_is_found(kept, capsys):
    Path("gatepost.toml").write_text(CONFIG + "\n[journal]\nenabled = false\n")
    assert cli.main(["trace", "--account", "anna"]) == 0
    said = capsys.readouterr()
    assert len(lines(said.out)) == 1
    assert "what comes now is not in it" in said.err
    assert cli.main(["trace", "-f"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "write a number from 1 to"),
        (["--limit", "-1", "-f"], "0 goes with --follow"),
        (["--sessions", "-f"], "leave --sessions out"),
        (["--sessions", "--reason", "rate"], "sessions are found by client"),
    ],
)
def test_what_does_not_go_together_is_said(kept, capsys, arguments, said):
    assert cli.main(["trace", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_it_says_that_there_is_more(kept, capsys):
    assert cli.main(["trace", "--limit", "1"]) == 0
    assert capsys.readouterr().err == "these are the 1 newest, and there are more: --limit and --until show others\n"
    assert cli.main(["trace", "--limit", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_bad_usage_and_a_damaged_file_are_exit_2(kept, capsys):
    assert cli.main(["trace", "--client", "x"]) == 2
    assert 'gatepost: --client "x": this is not an IP address' in capsys.readouterr().err
    kept.close()
    for path in (kept.directory / "journal").glob("journal.sqlite-*"):
        path.unlink()
    (kept.directory / "journal" / "journal.sqlite").write_bytes(b"no database " * 1000)
    assert cli.main(["trace"]) == 2
    assert "is damaged (file is not a database)" in capsys.readouterr().err


def test_sessions_also_without_mail(kept, capsys):
    assert cli.main(["trace", "--sessions", "--client", "192.0.2.77"]) == 0
    mail, no_mail = lines(capsys.readouterr().out)
    assert (mail["end"], no_mail["end"], no_mail["errors"]) == ("quit", "lost", 3)
    assert no_mail["logins"] == [{"account": "root", "verdict": "denied"}]


def on_a_terminal(columns: int, *arguments: str) -> str:
    """What a person sees."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "gatepost", "trace", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm"},
    ):  # fmt: skip
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode())


@pytest.mark.parametrize("columns", [80, 160])
def test_a_table_on_a_terminal(kept, columns):
    seen = on_a_terminal(columns).splitlines()
    heading, first = seen[:2]
    (second,) = (line for line in seen if "192.0.2.77" in line)
    assert heading.split() == ["time", "UTC", "who", "from", "to", "verdict", "why"]
    assert first.split()[:5] == ["08:00:00", "anna", "a@x.example", "bob@example.com", "accepted"]
    assert second.split()[:3] == ["08:00:01", "192.0.2.77", "a@x.example"]
    assert "refused" in second
    assert all(len(line) <= columns for line in seen)
    assert "\x1b" not in on_a_terminal(columns, "--sessions")


def test_follow_shows_what_comes_through_a_database_that_goes_away(kept):
    command = [sys.executable, "-m", "gatepost", "trace", "-f", "--account", "anna"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert json.loads(follower.stdout.readline())["session"] == "00000011"
        anna = session(21, account="anna")
        kept.keep(
            record([refused("00000022-1")], session(22)),
            record([entry(reverse_path=Mailbox("new", "x.example"))], anna),
        )
        assert json.loads(follower.stdout.readline())["reverse_path"] == "new@x.example"
        path = kept.directory / "journal" / "journal.sqlite"
        kept.close()
        path.rename(path.with_name("away"))
        path.write_bytes(b"no database " * 1000)
        assert "is damaged" in follower.stderr.readline()
        path.unlink()
        path.with_name("away").rename(path)
        assert follower.stderr.readline() == f"the journal in {path} answers again\n"
        kept.keep(record([entry(reverse_path=Mailbox("newer", "x.example"))], anna))
        assert json.loads(follower.stdout.readline())["reverse_path"] == "newer@x.example"
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130


def test_follow_ends_when_its_reader_goes_away_though_nothing_comes(kept):
    command = [sys.executable, "-m", "gatepost", "trace", "-f", "--limit", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        follower.stdout.close()
        assert follower.wait(30) == 2
        assert follower.stderr.read() == ""


@pytest.mark.parametrize("columns", [80, 160])
def test_follow_on_a_terminal(kept, columns):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gatepost", "trace", "-f", "--client", "192.0.2.77"]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as follower:
        os.close(theirs)
        seen = b""
        while b"relaying" not in seen:
            seen += os.read(ours, 65536)
        kept.keep(record([refused("00000012-2", at=NOON_S + 2)], session(12, client="192.0.2.77")))
        while b"00000012-2] relaying" not in seen:
            seen += os.read(ours, 65536)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130
    os.close(ours)
    line = next(line for line in seen.decode().splitlines() if "00000012-2" in line)
    assert line.split()[:3] == ["08:00:02", "192.0.2.77", "a@x.example"]
    assert len(line) <= max(columns, 93)
