"""`gatepost account` as it is typed: what it asks, what it says, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from argon2.exceptions import VerifyMismatchError

from gatepost import cli, config
from gatepost.auth.accounts import AccountStore

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
name = "submission"
address = "127.0.0.1:2525"
role = "submission"

[domains]
local = ["example.com"]

[backend.mail]
address = "10.0.0.5:25"
"""

PASSWORD = "correct horse"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory with a configuration, where we are; passwords cost little."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    monkeypatch.setitem(AccountStore.__init__.__kwdefaults__, "iterations", 4096)
    Path("gatepost.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def typed(here, capsys, monkeypatch):
    """What a command says to standard output and error, and its exit code."""

    def run(*arguments, stdin=None):
        if stdin is not None:
            octets = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(octets), "utf-8"))
        code = cli.main(["account", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def add(typed, name="alice@example.com", password=PASSWORD):
    assert typed("add", name, "--password-stdin", stdin=password + "\n")[0] == 0


def store(here):
    return AccountStore(str(here / "data" / "accounts"))


def lets_in(here, name, password):
    account = store(here).read(name)
    assert account is not None
    try:
        return store(here).hasher.verify(account.password, password)
    except VerifyMismatchError:
        return False


# --- Accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nsecond line\n"])
def test_an_account_is_added_with_the_first_line_of_standard_input(typed, here, end):
    code, out, err = typed("add", "Alice@Example.com", "--password-stdin", stdin=PASSWORD + end)
    assert (code, out, err) == (0, "alice@example.com is added, and may log in at once\n", "")
    assert lets_in(here, "alice@example.com", PASSWORD)
    for path in (here / "data").rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()


def test_an_account_that_is_there_is_not_added_again(typed, here):
    add(typed)
    code, out, err = typed("add", "alice@example.com", "--password-stdin", stdin="battery staple\n")
    assert (code, out) == (2, "")
    assert err == (
        "gatepost: there is an account alice@example.com already; `gatepost account passwd` changes its password\n"
    )
    assert lets_in(here, "alice@example.com", PASSWORD)


@pytest.mark.parametrize(
    ("password", "said"),
    [
        (b"1234567\n", "shorter than 8 characters; take a longer one"),
        (b"\n", "shorter than 8"),
        (b"", "shorter than 8"),
        (b"Alice@Example.com\n", "the account's own name; take one that"),
        (b"\xff\xfe\xfd123456789\n", "not UTF-8"),
        (b"tab\tin the middle\n", "control characters"),
        (b"x" * 1025 + b"\n", "too long"),
        (b"x" * 5000 + b"\n", "too long"),
        ("padlock \U0001f512\n".encode(), "not every client can send; leave them out"),
    ],
)
def test_a_password_that_will_not_do_is_refused_with_what_to_do(typed, here, password, said):
    code, out, err = typed("add", "alice@example.com", "--password-stdin", stdin=password)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("gatepost: ")
    assert password.decode("utf-8", "replace").strip() not in err or not password.strip()
    assert store(here).names() == []


@pytest.mark.parametrize("name", ["", "al ice", "../alice", "a%b@example.com", "alice@", "x" * 129, "\x1b[2J"])
def test_a_name_that_cannot_be_one_is_refused(typed, here, name):
    code, out, err = typed("add", name, "--password-stdin", stdin=PASSWORD)
    assert (code, out) == (2, "")
    assert "cannot be an account's name: write an address" in err
    assert "\x1b" not in err
    assert not (here / "data" / "accounts").exists()


def test_a_password_is_never_an_argument(typed):
    code, _, err = typed("add", "alice@example.com", PASSWORD)
    assert code == 2
    assert "Traceback" not in err


def test_without_a_terminal_it_says_how_to_give_the_password(typed, here):
    code, out, err = typed("add", "alice@example.com", stdin="correct horse\ncorrect horse\n")
    assert (code, out) == (2, "")
    assert err == "gatepost: there is no terminal to ask for the password at; --password-stdin reads it\n"
    assert store(here).names() == []


def test_a_password_is_changed(typed, here):
    add(typed)
    code, out, _ = typed("passwd", "alice@example.com", "--password-stdin", stdin="battery staple\n")
    assert (code, out) == (0, "alice@example.com has a new password\n")
    assert lets_in(here, "alice@example.com", "battery staple")
    assert not lets_in(here, "alice@example.com", PASSWORD)
    code, _, err = typed("passwd", "alice@example.com", "--password-stdin", stdin="short\n")
    assert code == 2
    assert "nothing is changed" in err
    assert lets_in(here, "alice@example.com", "battery staple")


def test_an_account_is_locked_unlocked_and_removed(typed, here):
    add(typed)
    assert typed("lock", "ALICE@example.com")[:2] == (
        0,
        "alice@example.com is locked; sessions that are open stay open\n",
    )
    assert "\tlocked\t" in typed("list")[1]
    assert typed("unlock", "alice@example.com")[:2] == (0, "alice@example.com is unlocked\n")
    assert "\topen\t" in typed("list")[1]
    assert typed("remove", "alice@example.com")[:2] == (0, "alice@example.com is removed\n")
    assert typed("list") == (0, "", "")


@pytest.mark.parametrize("there_are_others", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        ("passwd", "bob@example.com", "--password-stdin"), ("lock", "bob@example.com"), ("unlock", "bob@example.com"),
        ("remove", "bob@example.com"), ("device", "add", "bob@example.com", "phone"),
        ("device", "remove", "bob@example.com", "phone"),
    ],
)  # fmt: skip
def test_what_is_not_found_is_exit_code_1(typed, arguments, there_are_others):
    if there_are_others:
        add(typed)
    code, out, err = typed(*arguments, stdin="battery staple\n")
    assert (code, out, err) == (1, "", "gatepost: there is no account bob@example.com\n")
    code, out, err = typed(*arguments, "--json", stdin="battery staple\n")
    assert (code, json.loads(out)) == (1, {"found": False, "problems": ["there is no account bob@example.com"]})


def test_a_bait_is_added_without_a_password(typed, here):
    code, out, _ = typed("add", "info", "--bait")
    assert (code, out) == (0, "info is added; whoever tries it is an attacker\n")
    account = store(here).read("info")
    assert account is not None
    assert account.bait
    code, _, err = typed("passwd", "info", "--password-stdin", stdin="battery staple\n")
    assert (code, err) == (2, "gatepost: info is a bait, which nobody may use; remove it first\n")
    assert typed("device", "add", "info", "phone")[0] == 2


# --- Devices ----------------------------------------------------------------------------------------------------------


def test_a_devices_password_is_shown_once(typed, here):
    add(typed)
    code, out, _ = typed("device", "add", "alice@example.com", "printer 2nd floor")
    assert code == 0
    match = re.fullmatch(
        r"printer 2nd floor logs in as alice@example\.com with the password\n"
        r"    ((?:[a-z]{5}-){3}[a-z]{5})\nwhich nobody can show again\n",
        out,
    )
    assert match
    assert match[1] not in (here / "data" / "accounts" / "alice@example.com.json").read_text()
    assert match[1] not in typed("list")[1] + typed("list", "--json")[1]


def test_a_device_is_removed(typed, here):
    add(typed)
    typed("device", "add", "alice@example.com", "phone")
    code, _, err = typed("device", "add", "alice@example.com", "phone")
    assert (code, "has a device phone already" in err) == (2, True)
    code, out, _ = typed("device", "remove", "alice@example.com", "phone")
    assert (code, out) == (0, "phone cannot log in as alice@example.com any more\n")
    code, _, err = typed("device", "remove", "alice@example.com", "phone")
    assert (code, err) == (1, "gatepost: alice@example.com has no device phone\n")


def test_a_label_that_steers_a_terminal_is_refused(typed):
    add(typed)
    code, out, err = typed("device", "add", "alice@example.com", "\x1b[2J")
    assert (code, "a label is printable text" in err, "\x1b" in out + err) == (2, True, False)


# --- Lists ------------------------------------------------------------------------------------------------------------


def test_in_a_pipe_a_list_is_lines_with_tabs(typed, here):
    add(typed, "bob")
    add(typed)
    typed("device", "add", "alice@example.com", "phone")
    typed("device", "add", "alice@example.com", "printer")
    store(here).used("alice@example.com", "phone")
    code, out, err = typed("list")
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    day = r"20\d\d-\d\d-\d\d"
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("alice@example.com", "open", ""),
        ("alice@example.com", "open", "phone"),
        ("alice@example.com", "open", "printer"),
        ("bob", "open", ""),
    ]
    assert all(re.fullmatch(day, row[2]) for row in rows)
    assert re.fullmatch(rf"{day} \d\d:00 UTC", rows[1][4])
    assert rows[2][4] == "never"


def test_a_list_is_json_where_that_is_asked_for(typed, here):
    add(typed)
    typed("add", "info", "--bait")
    typed("device", "add", "alice@example.com", "phone")
    code, out, _ = typed("list", "--json")
    answer = json.loads(out)
    assert (code, answer["problems"]) == (0, [])
    alice, info = answer["accounts"]
    assert (alice["name"], alice["state"], info["name"], info["state"]) == ("alice@example.com", "open", "info", "bait")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", alice["created"])
    assert [(one["label"], one["last_used"]) for one in alice["devices"]] == [("phone", None)]
    assert set(alice["devices"][0]) == {"label", "created", "last_used"}


def test_a_damaged_account_is_named_and_the_others_are_listed(typed, here):
    add(typed)
    add(typed, "bob")
    path = here / "data" / "accounts" / "bob.json"
    path.write_bytes(path.read_bytes()[:50])
    code, out, err = typed("list")
    assert code == 1
    assert out.startswith("alice@example.com\t")
    assert err == f"gatepost: {path}: it is damaged: it is not JSON; restore it from a copy, or remove the account\n"
    code, out, _ = typed("list", "--json")
    assert (code, len(json.loads(out)["accounts"]), len(json.loads(out)["problems"])) == (1, 1, 1)
    code, _, err = typed("lock", "bob")
    assert (code, str(path) in err) == (2, True)
    assert typed("remove", "bob")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("add", "bob", "--password-stdin"), {"account": "bob", "added": True, "bait": False}),
        (("add", "info", "--bait"), {"account": "info", "added": True, "bait": True}),
        (("passwd", "alice", "--password-stdin"), {"account": "alice", "changed": True}),
        (("lock", "alice"), {"account": "alice", "locked": True}),
        (("unlock", "alice"), {"account": "alice", "locked": False}),
        (("remove", "alice"), {"account": "alice", "removed": True}),
        (("device", "remove", "alice", "phone"), {"account": "alice", "device": "phone", "removed": True}),
    ],
)
def test_what_was_done_is_json_where_that_is_asked_for(typed, arguments, answer):
    add(typed, "alice")
    typed("device", "add", "alice", "phone")
    code, out, err = typed(*arguments, "--json", stdin="battery staple\n")
    assert (code, json.loads(out), err) == (0, answer, "")


def test_a_new_devices_password_is_json_where_that_is_asked_for(typed):
    add(typed, "alice")
    code, out, _ = typed("device", "add", "alice", "phone", "--json")
    answer = json.loads(out)
    assert (code, answer["account"], answer["device"], len(answer["password"])) == (0, "alice", "phone", 23)


# --- Where --------------------------------------------------------------------------------------------------------


def test_the_configuration_may_be_named(typed, here):
    (here / "other.toml").write_text(CONFIG.replace('"data"', '"elsewhere"'))
    assert typed("add", "alice", "--password-stdin", "--config", "other.toml", stdin=PASSWORD)[0] == 0
    assert (here / "elsewhere" / "accounts" / "alice.json").is_file()
    assert typed("list") == (0, "", "")


def test_a_bad_configuration_changes_nothing(typed, here):
    (here / "gatepost.toml").write_text(CONFIG + "\n[limits]\nsesions = 5\n")
    for arguments in (("add", "alice", "--bait"), ("list",), ("lock", "alice"), ("device", "add", "alice", "phone")):
        code, _, err = typed(*arguments)
        assert code == 2
        assert "sesions" in err
    assert not (here / "data").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes the gate's user")
def test_what_root_makes_belongs_to_the_gates_user(typed, here):
    (here / "gatepost.toml").write_text(CONFIG.replace('data = "data"', 'data = "data"\nuser = "nobody"'))
    for above in (here, *here.parents):
        if above != Path("/") and above.stat().st_mode & 0o011 != 0o011:
            above.chmod(above.stat().st_mode | 0o011)
    add(typed)
    for path in (here / "data", *(here / "data").rglob("*")):
        assert path.stat().st_uid == 65534, path
    # What the gate's user plants leads root nowhere.
    (here / "target").write_text("root's own")
    (here / "data" / "accounts" / "bob.json").symlink_to(here / "target")
    assert typed("add", "bob", "--password-stdin", stdin=PASSWORD)[0] == 2
    assert typed("remove", "bob")[0] == 0
    assert (here / "target").read_text() == "root's own"
    assert os.geteuid() == 0


# --- On a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        self.said = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gatepost", "account", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"},
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def until(self, words):
        while words not in self.said:
            assert select.select([self._master], [], [], 60)[0], self.said
            try:
                octets = os.read(self._master, 4096)
            except OSError:  # Linux: the other end is closed
                octets = b""
            assert octets, self.said
            self.said += octets.decode().replace("\r\n", "\n")

    def type(self, text):
        os.write(self._master, text.encode())

    def end(self):
        while True:
            try:
                octets = os.read(self._master, 4096)
            except OSError:
                break
            if not octets:
                break
            self.said += octets.decode().replace("\r\n", "\n")
        return self._process.wait(timeout=60)


def test_a_terminal_is_asked_twice_and_shows_nothing_of_it(here):
    with Terminal("add", "alice@example.com") as terminal:
        terminal.until("Password for alice@example.com: ")
        terminal.type(PASSWORD + "\n")
        terminal.until("The same again: ")
        terminal.type(PASSWORD + "\n")
        assert terminal.end() == 0
    assert "alice@example.com is added" in terminal.said
    assert PASSWORD not in terminal.said
    assert lets_in(here, "alice@example.com", PASSWORD)


def test_two_passwords_that_differ_change_nothing(here):
    with Terminal("add", "alice@example.com") as terminal:
        terminal.until("Password for")
        terminal.type(PASSWORD + "\n")
        terminal.until("again: ")
        terminal.type("battery staple\n")
        assert terminal.end() == 2
    assert "the two passwords are not the same; nothing is changed" in terminal.said
    assert store(here).names() == []


def test_the_end_of_input_changes_nothing(here):
    with Terminal("add", "alice@example.com") as terminal:
        terminal.until("Password for")
        terminal.type("\x04")
        assert terminal.end() == 2
    assert "no password was typed; nothing is changed" in terminal.said
    assert "Traceback" not in terminal.said


def test_on_a_terminal_a_list_is_a_table(typed, here):
    with Terminal("list") as terminal:
        assert terminal.end() == 0
    assert "there are no accounts; `gatepost account add NAME` makes one" in terminal.said
    add(typed)
    store(here).add_device("alice@example.com", "a [bold]phone[/bold]")
    with Terminal("list") as terminal:
        assert terminal.end() == 0
    head, first, second = re.sub(r"\x1b\[\d*m", "", terminal.said).rstrip().splitlines()
    assert head.split() == ["account", "state", "since", "device", "last", "use"]
    assert first.split()[:2] == ["alice@example.com", "open"]
    assert "a [bold]phone[/bold]" in second
    assert "never" in second
    assert "alice" not in second


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("add",),
        ("passwd",),
        ("list",),
        ("lock",),
        ("unlock",),
        ("remove",),
        ("device", "add"),
        ("device", "remove"),
        (),
    ],
)
def test_every_command_documents_itself_its_options_and_its_exit_codes(typed, command):
    code, out, _ = typed(*command, "--help")
    assert code == 0
    assert out.startswith(" ".join(("Usage: gatepost account", *command)))
    assert "Exit code" in " ".join(out.split())
    if command:
        assert "--config" in out
        assert "--json" in out
        assert "--no-" not in out
