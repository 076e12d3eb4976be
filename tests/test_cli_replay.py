"""``gatepost replay``: another configuration, tried on yesterday's mail."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.places import Place, entry, record, refused, session

from gatepost import cli

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
DENY = '\n[[deny]]\nreverse_path = "*@x.example"\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    Path("gatepost.toml").write_text(CONFIG)
    Path("new.toml").write_text(CONFIG + DENY)
    place = Place(tmp_path / "data")
    now = time.time()
    place.keep(
        *(record([entry(at=now - 3600)], session(client="192.0.2.7")) for _ in range(3)),
        record([refused("00000099-1", at=now - 60)], session(99)),
        record([entry(at=now - 8 * 86400)], session()),
    )
    yield place
    place.close()


def test_what_would_change(place, capsys):
    assert cli.main(["replay", "--config", "new.toml"]) == 1
    out = capsys.readouterr().out
    assert re.match(r"4 verdicts since \S+ \S+ UTC decided again, from \S+/journal\.sqlite\n", out)
    assert "        3  newly refused\n" in out
    assert "        1  refused for another reason\n" in out
    assert (
        "newly refused: 192.0.2.0/24, x.example: accepted 3 times on one day and never refused, it would be refused\n"
        "  then admitted (g.toml:12); now denied (new.toml:15)\n"
    ) in out


def test_as_an_object_and_for_a_longer_time(place, capsys):
    assert cli.main(["replay", "--config", "new.toml", "--since", "30d", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["verdicts"], told["newly_refused"], told["refused_for_another_reason"]) == (5, 4, 1)
    assert [group["actor"] for group in told["groups"]] == ["192.0.2.0/24"]


def test_up_to_a_time_and_no_group_at_all(place, capsys):
    assert cli.main(["replay", "--config", "new.toml", "--since", "30d", "--until", "7d", "--limit", "0"]) == 1
    out = capsys.readouterr().out
    assert "1 verdict since " in out
    assert out.endswith("        1  newly refused\n\n1 group more; --limit shows them\n")


def test_against_another_configuration_and_not_what_was_decided(place, capsys):
    assert cli.main(["replay", "--config", "new.toml", "--against", "new.toml"]) == 0
    assert "4 verdicts" in capsys.readouterr().out
    assert cli.main(["replay", "--config", "gatepost.toml", "--against", "new.toml", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["newly_admitted"], told["newly_refused"], told["left_out"]) == (3, 0, 0)
    assert told["groups"][0]["then"] == "denied (new.toml:15)"


def test_what_has_become_a_pseudonym_is_said_to_be_left_out(place, capsys):
    with place.database().transaction() as connection:
        connection.exec_driver_sql("UPDATE entries SET pseudonymous = 1 WHERE verdict = 'refused'")
    assert cli.main(["replay", "--config", "new.toml"]) == 1
    out = capsys.readouterr().out
    assert "3 verdicts since " in out
    assert "1 verdict of that time cannot be decided again: of pseudonyms, or damaged\n" in out


def test_host_names_that_nobody_followed(place, capsys):
    Path("hosts.toml").write_text(CONFIG + '\n[[trust]]\nhost = "branch.example"\n')
    assert cli.main(["replay", "--config", "hosts.toml"]) == 0
    assert "where these are new, not: branch.example\n" in capsys.readouterr().out
    assert cli.main(["replay", "--config", "hosts.toml", "--journal-of", "hosts.toml"]) == 0
    assert "branch.example" not in capsys.readouterr().out


def test_nothing_would_change(place, capsys):
    assert cli.main(["replay", "--config", "gatepost.toml"]) == 0
    assert "nothing would be refused or admitted that was not\n" in capsys.readouterr().out
    assert cli.main(["replay", "--config", "new.toml", "--since", "1s"]) == 0
    assert "there is nothing in the journal of that time\n" in capsys.readouterr().out


def test_an_empty_journal_does_not_say_that_nothing_would_change(place, capsys):
    Path("other.toml").write_text(CONFIG.replace('"data"', '"never-used"'))
    said = "/never-used/journal/journal.sqlite is empty, so that nothing can be told; --journal-of names"
    assert cli.main(["replay", "--config", "new.toml", "--journal-of", "other.toml"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert cli.main(["replay", "--config", "new.toml", "--journal-of", "other.toml", "--json"]) == 2
    assert said in json.loads(capsys.readouterr().out)["problems"][0]
    assert not Path("never-used").exists()


def test_whose_journal_it_is(place, capsys, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert cli.main(["replay", "--config", "../new.toml"]) == 1, "the new file's own"
    assert cli.main(["replay", "--config", "../new.toml", "--journal-of", "../gatepost.toml"]) == 1
    assert "4 verdicts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing: the new configuration"),
        (["--config", "none.toml"], "none.toml: the configuration cannot be read"),
        (["--config", "bad.toml"], "bad.toml:1: "),
        (["--config", "open.toml"], "this would be an open relay"),
        (["--config", "new.toml", "--since", "soon"], '--since "soon": write how long ago, such as'),
    ],
)
def test_what_cannot_be_told(place, capsys, arguments, said):
    Path("bad.toml").write_text("[gates]\n")
    Path("open.toml").write_text(CONFIG + '\n[[trust]]\nnetwork = "0.0.0.0/0"\n')
    assert cli.main(["replay", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_bar_on_a_terminal_and_none_in_a_pipe(place):
    command = [sys.executable, "-m", "gatepost", "replay", "--config", "new.toml"]
    ours, theirs = pty.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=60)
    os.close(theirs)
    assert b"deciding again" in os.read(ours, 65536)
    os.close(ours)
    assert done.returncode == 1
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).stderr == b""
