"""``gatepost ban``: what an administrator types, with and without a gate that runs on the same data."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from gatepost import cli, config
from gatepost.counters import Ban, Bans, Digests, EmbeddedStore, Guesses, GuessLimits, state_directory

AM_ROOT = os.geteuid() == 0  # CI is

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
address = "127.0.0.1:2525"

[domains]
local = ["example.com"]

[backend.mail]
address = "10.0.0.5:25"
"""

# What a worker does: opens the store once, and asks it with each connection.
WORKER = """
import sys
from ipaddress import ip_address
from pathlib import Path
from gatepost.counters import Bans, Digests, EmbeddedStore
directory = Path(sys.argv[1])
store = EmbeddedStore(directory, lambda sentence: print(sentence, flush=True))
bans = Bans(store, Digests.in_directory(directory))
print("ready", flush=True)
for line in sys.stdin:
    address, account, now_s = line.strip().split(",")
    print(bans.account(ip_address(address), account, float(now_s)) is not None, flush=True)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory with a configuration, where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    Path("gatepost.toml").write_text(CONFIG)
    return tmp_path


def typed(capsys, *arguments):
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def now_s() -> float:
    return datetime.now(UTC).timestamp()


def test_nobody_is_banned_where_nothing_ran(here, capsys):
    assert typed(capsys, "ban", "list") == (0, "nobody is banned\n", "")
    code, out, _ = typed(capsys, "ban", "list", "--json")
    assert (code, json.loads(out)) == (0, {"bans": []})
    assert typed(capsys, "ban", "remove", "192.0.2.7")[:2] == (1, "there is no ban of 192.0.2.7\n")
    assert not (here / "data").exists(), "looking makes nothing"


def test_a_client_is_banned_listed_and_let_in_again(here, capsys):
    code, out, err = typed(capsys, "ban", "add", "192.0.2.7", "--why", "scans us")
    assert (code, out, err) == (0, "banned: 192.0.2.7, until removed\n", "")
    user = pwd.getpwuid(os.getuid()).pw_name
    code, out, _ = typed(capsys, "ban", "list")
    assert code == 0
    head, row = (re.split(r" {2,}", line) for line in out.splitlines())
    assert head == ["client", "account", "until", "made by", "why"]
    assert row == ["192.0.2.7", "any", "no end", user, "scans us"]
    assert typed(capsys, "ban", "remove", "192.0.2.7") == (0, "no longer banned: 192.0.2.7\n", "")
    assert typed(capsys, "ban", "remove", "192.0.2.7") == (1, "there is no ban of 192.0.2.7\n", "")
    assert typed(capsys, "ban", "list")[1] == "nobody is banned\n"


def test_a_ban_with_one_account_and_an_end(here, capsys):
    before = datetime.now(UTC).replace(microsecond=0)
    code, out, _ = typed(capsys, "ban", "add", "10.1.0.0/255.255.0.0", "--account", "bob", "--for", "2h", "--json")
    assert code == 0
    made = json.loads(out)["ban"]
    assert (made["client"], made["account"], made["why"]) == ("10.1.0.0/16", "bob", "")
    assert (
        before + timedelta(hours=2) <= datetime.fromisoformat(made["until"]) <= datetime.now(UTC) + timedelta(hours=2)
    )
    assert json.loads(typed(capsys, "ban", "list", "--json")[1]) == {"bans": [made]}
    assert re.search(r"10\.1\.0\.0/16 +bob +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC ", typed(capsys, "ban", "list")[1])
    assert typed(capsys, "ban", "remove", "10.1.0.0/16")[0] == 1, "of every account there is none"
    code, out, _ = typed(capsys, "ban", "remove", "10.1.0.0/16", "--account", "BOB", "--json")
    assert (code, json.loads(out)["removed"]) == (0, True)
    code, out, _ = typed(capsys, "ban", "remove", "10.1.0.0/16", "--account", "bob", "--json")
    assert (code, json.loads(out)["removed"]) == (1, False)


def test_an_ipv6_client_is_its_network(here, capsys):
    assert typed(capsys, "ban", "add", "2001:db8::5")[1] == "banned: 2001:db8::/64, until removed\n"
    assert typed(capsys, "ban", "remove", "2001:db8::/64")[0] == 0


def test_a_mapped_address_is_the_ipv4_address(here, capsys):
    assert typed(capsys, "ban", "add", "::ffff:192.0.2.7")[1] == "banned: 192.0.2.7, until removed\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add"], "CLIENT"),
        (["add", "nonsense"], '"nonsense": this is not a network'),
        (["add", "10.1.0.5/16"], "bits beyond its mask"),
        (["add", "192.0.2.7", "--for", "2"], '--for "2": this is not a time'),
        (["add", "192.0.2.7", "--for", "0"], '--for "0"'),
        (["add", "192.0.2.7", "--for", "0s"], "no time at all"),
        (["remove", "nonsense"], "this is not a network"),
        (["lift", "192.0.2.7"], "lift"),
        (["list", "--config", "elsewhere.toml"], "cannot be read"),
    ],
)
def test_bad_usage_is_exit_code_2_with_a_sentence(here, capsys, arguments, said):
    code, out, err = typed(capsys, "ban", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not (here / "data").exists()


def test_a_bare_ban_tells_what_there_is(here, capsys):
    code, out, _ = typed(capsys, "ban")
    assert code == 0
    assert all(re.search(rf"^│ {name} ", out, re.MULTILINE) for name in ("list", "add", "remove"))


@pytest.mark.parametrize("name", ["list", "add", "remove"])
def test_each_documents_itself_and_its_exit_code(capsys, name):
    code, out, _ = typed(capsys, "ban", name, "--help")
    assert code == 0
    assert "Exit code: 0" in " ".join(out.split())


def test_the_gates_own_bans_are_listed_with_why(here, capsys):
    directory = state_directory("data")
    store = EmbeddedStore(directory)
    digests = Digests.in_directory(directory)
    guesses = Guesses(store, digests, Bans(store, digests), GuessLimits())
    for number in range(10):
        guesses.wrong("bob\x1b[2J", ip_address("192.0.2.7"), f"s{number}", now_s())
    store.close()
    code, out, _ = typed(capsys, "ban", "list")
    assert code == 0
    assert re.split(r" {2,}", out.splitlines()[1])[::3] == ["192.0.2.0/24", "the gate"]
    assert "bob?[2J" in out, "what a stranger typed cannot steer a terminal"
    assert "\x1b" not in out
    assert "10 wrong secrets for this account" in out
    (one,) = json.loads(typed(capsys, "ban", "list", "--json")[1])["bans"]
    assert (one["account"], one["made_by"]) == ("bob\x1b[2J", "the gate")


def test_a_running_worker_heeds_it_at_once(here, capsys):
    """And what it shares is not held up by who lists it."""
    directory = state_directory(str(here / "data"))
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as worker:
        assert worker.stdin
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"

        def banned(address: str, account: str = "bob") -> bool:
            assert worker.stdin
            assert worker.stdout
            worker.stdin.write(f"{address},{account},{now_s()}\n")
            return {"True\n": True, "False\n": False}[worker.stdout.readline()]

        assert not banned("192.0.2.7")
        assert typed(capsys, "ban", "add", "192.0.2.0/24", "--for", "1h")[0] == 0
        assert banned("192.0.2.7")
        assert not banned("192.0.3.7")
        assert typed(capsys, "ban", "add", "203.0.113.0/24", "--account", "bob")[0] == 0
        assert banned("203.0.113.9")
        assert not banned("203.0.113.9", "alice")
        assert len(json.loads(typed(capsys, "ban", "list", "--json")[1])["bans"]) == 2
        assert typed(capsys, "ban", "remove", "192.0.2.0/24")[0] == 0
        assert not banned("192.0.2.7")
        worker.stdin.close()


def test_a_damaged_file_is_said_with_what_to_do(here, capsys):
    typed(capsys, "ban", "add", "192.0.2.7")
    (state_directory("data") / "data.mdb").write_bytes(b"rubbish" * 9999)
    for arguments in (["list"], ["add", "192.0.2.8"], ["remove", "192.0.2.7"]):
        code, out, err = typed(capsys, "ban", *arguments)
        assert (code, out) == (2, "")
        assert "are damaged" in err
        assert "rm -r" in err


@pytest.fixture
def elsewhere():
    """A directory that everybody may pass, with a configuration and the data directory of another user than root.

    Who is not root is that user: what is promised holds as well.
    """
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    (directory / "gatepost.toml").write_text(CONFIG)
    (directory / "data").mkdir(mode=0o750)
    if AM_ROOT:
        nobody = pwd.getpwnam("nobody")
        os.chown(directory / "data", nobody.pw_uid, nobody.pw_gid)
    yield directory
    shutil.rmtree(directory)


def test_what_root_makes_is_the_owners(elsewhere, capsys):
    data, file = elsewhere / "data", str(elsewhere / "gatepost.toml")
    assert typed(capsys, "ban", "add", "192.0.2.7", "--config", file)[0] == 0
    made = list(data.rglob("*"))
    assert {path.name for path in made} >= {"counters", "state", "data.mdb", "lock.mdb", "key", "guard", "boot"}
    assert {path.owner() for path in made} == {data.owner()}
    code, out, _ = typed(capsys, "ban", "list", "--config", file)
    assert (code, "192.0.2.7" in out) == (0, True)
    assert (os.geteuid() == 0) == AM_ROOT


@pytest.mark.parametrize("arguments", [["list"], ["remove", "192.0.2.7"], ["add", "192.0.2.8"]])
def test_whose_it_is_not_may_not_even_look(elsewhere, capsys, arguments):
    """And is not told that nobody is banned."""
    file = str(elsewhere / "gatepost.toml")
    assert typed(capsys, "ban", "add", "192.0.2.7", "--config", file)[0] == 0
    state = elsewhere / "data" / "counters" / "state"
    if AM_ROOT:
        for path in (state, *state.iterdir()):
            os.chown(path, 0, 0)
    state.chmod(0o700 if AM_ROOT else 0)
    code, out, err = typed(capsys, "ban", *arguments, "--config", file)
    state.chmod(0o700)
    assert (code, out) == (2, "")
    assert "Permission denied" in err
    assert "`chown -R`" in err


def test_a_link_that_was_planted_leads_root_nowhere(elsewhere, capsys):
    roots = elsewhere / "roots"
    roots.mkdir()
    (elsewhere / "data" / "counters").symlink_to(roots)
    roots.chmod(0o755 if AM_ROOT else 0o555)
    code, _, err = typed(capsys, "ban", "add", "192.0.2.7", "--config", str(elsewhere / "gatepost.toml"))
    assert code == 2
    assert "Permission denied" in err
    assert list(roots.iterdir()) == []


def test_a_ban_as_it_is_kept_is_the_ban_as_it_is_listed(here):
    directory = state_directory("data")
    store = EmbeddedStore(directory)
    bans = Bans(store, Digests.in_directory(directory))
    kept = bans.add(Ban(ip_network("192.0.2.0/24"), "bob", now_s() + 60, "why", "me"), now_s())
    assert bans.all(now_s()) == [kept]
    store.close()
