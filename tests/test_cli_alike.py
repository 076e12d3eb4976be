"""`gatepost allow` and `gatepost deny`: a row of the journal becomes an entry of the file, or it is said why not."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import smtplib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.gatehouse import Gate, free_port
from tests.store.places import Place, entry, record, refused, session
from tests.vectors.lenient import LenientBackend

from gatepost import cli, config, control
from gatepost.config import edit
from gatepost.control import Reloaded
from gatepost.smtp.path import Mailbox

PATIENCE_S = 30.0

CONFIG = """\
# Ours.
[gate]
name = "mx.example.com"   # as in DNS
data = "data"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:{port}"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[[trust]]
network = "10.1.0.0/16"
why = "office LAN"
owner = "it@example.com"

# Whom we had enough of.
[[deny]]
reverse_path = "*@spam.test"

[console]
address = "127.0.0.1:{console}"
"""
STRANGER = session(12, client="192.0.2.77")
TO_SPAM = Mailbox("x", "spam.test")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a configuration and a journal, where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    Path("gatepost.toml").write_text(CONFIG.format(port=2525, console=free_port()))
    now_s = time.time()
    place = Place(tmp_path / "data")
    place.keep(
        record(
            [
                refused("00000012-1", at=now_s - 60),
                refused("00000012-2", at=now_s - 50, reverse_path=TO_SPAM, reason="denied", by="gatepost.toml:24"),
                entry(at=now_s - 40, number=2, message="00000012.1"),
                entry(at=now_s - 30, number=3, verdict="refused", reason="backend", reply="550 5.1.1 \x1b[31mNo"),
            ],
            STRANGER,
        )
    )
    place.close()
    return tmp_path


def typed(capsys, *arguments):
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def file() -> str:
    return Path("gatepost.toml").read_text()


def test_in_a_pipe_it_shows_all_and_writes_nothing(here, capsys):
    before = file()
    code, out, err = typed(capsys, "allow", "[00000012-1]")
    assert (code, err) == (0, "")
    assert out.startswith("REFUSED 00000012-1 on ")
    assert "why     no rule lets it pass" in out
    assert (
        '  network = "192.0.2.77"\n  reverse_paths = ["a@x.example"]\n  forward_paths = ["victim@elsewhere.exampl'
        in out
    )
    assert "it would have let through 1 recipient\n" in out
    assert "PROVEN: nobody else may send elsewhere" in out
    assert "To be added at gatepost.toml:22" in out
    assert out.endswith("nothing is written; --write does\n")
    assert file() == before


def test_it_is_written_behind_the_last_of_its_kind_with_all_else_kept(here, capsys):
    before = file()
    code, out, err = typed(
        capsys, "allow", "00000012-1", "--owner", "it@example.com", "--expires", "2099-01-01", "--write"
    )
    assert (code, err) == (0, "")
    assert "written into gatepost.toml:22\nno gate was told: no gate runs here" in out
    entry_ = """\
[[trust]]
network = "192.0.2.77"
reverse_paths = ["a@x.example"]
forward_paths = ["victim@elsewhere.example"]
why = "allowed like 00000012-1 of DAY"
owner = "it@example.com"
expires = 2099-01-01
"""
    expected = before.replace("\n# Whom we had", f"\n{entry_}\n# Whom we had")
    assert re.sub(r"20[0-9-]{8}\"", 'DAY"', file()) == expected
    code, out, _ = typed(capsys, "allow", "00000012-1")
    assert code == 1
    assert "no      the same passes now, by [[trust]] network 192.0.2.77/32 (gatepost.toml:22)" in out


def test_an_allow_does_not_overrule_a_deny(here, capsys):
    code, out, _ = typed(capsys, "allow", "00000012-2", "--write")
    assert code == 1
    assert "no      [[deny]] reverse_path *@spam.test at gatepost.toml:23 refuses it, and no [[trust]] overrules" in out


def test_what_the_backend_said_is_shown_as_text(here, capsys):
    code, out, _ = typed(capsys, "trace", "192.0.2.77", "--reason", "backend")
    row = json.loads(out)
    code, out, _ = typed(capsys, "allow", "--id", str(row["id"]))
    assert code == 1
    assert "the backend refused it, and not the gate: 550 5.1.1 ?[31mNo" in out
    assert "\x1b" not in out


def test_a_deny_shows_what_each_way_would_have_hit(here, capsys):
    code, out, err = typed(capsys, "deny", "00000012.1", "--write")
    assert (code, err) == (0, "")
    assert " * network       192.0.2.77: 3 messages, 1 of them accepted\n" in out
    assert "   reverse_path  a@x.example: 3 messages, 1 of them accepted\n" in out
    assert file().index('network = "192.0.2.77"') > file().index("*@spam.test")
    code, out, _ = typed(capsys, "deny", "00000012.1")
    assert code == 1
    assert (
        "no      there is nothing to deny: [[deny]] network 192.0.2.77/32 at gatepost.toml:26 refuses it already" in out
    )


def test_by_another_key(here, capsys):
    assert typed(capsys, "deny", "00000012.1", "--by", "helo", "--write")[0] == 0
    assert 'helo = "client.test"' in file()


def test_for_a_program(here, capsys):
    code, out, _ = typed(capsys, "allow", "00000012-1", "--json")
    told = json.loads(out)
    assert (code, told["decision"], told["advisable"], told["written"]) == (0, "allow", True, False)
    assert told["entry"]["network"] == "192.0.2.77"
    assert told["proof"]["proven"]
    assert told["row"]["reference"] == "00000012-1"
    assert told["replay"]["newly_admitted"] == 1
    code, out, _ = typed(capsys, "allow", "00000012-1", "--json", "--write")
    told = json.loads(out)
    assert (code, told["written"], told["reload"]["taken"]) == (0, True, None)
    code, out, _ = typed(capsys, "allow", "00000012-9", "--json")
    assert (code, json.loads(out)["advisable"]) == (1, False)


def test_an_open_file_is_shown_with_the_dialogue_and_not_written(here, capsys):
    before = file()
    wide = ("--network", "0.0.0.0/0", "--any-forward-path", "--any-reverse-path")
    code, out, _ = typed(capsys, "allow", "00000012-1", *wide, "--write")
    assert code == 1
    assert "OPEN RELAY: a stranger at" in out
    assert "RCPT TO:<" in out
    assert "it is not written" in out
    assert file() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("allow",), 2, "say which: the reference in a refusal"),
        (("allow", "00000012-9"), 1, "not found: the journal in "),
        (("allow", "--id", "99"), 1, "not found: the journal in "),
        (("deny", "printer"), 2, "holds no reference"),
        (("deny", "00000012-1", "--by", "colour"), 2, "write one of network"),
        (("deny", "00000012-1", "--by", "helo", "--network", "192.0.2.0/24"), 2, "leave --by out"),
        (("allow", "00000012-1", "--write", "--dry-run"), 2, "exclude each other"),
        (("allow", "00000012-1", "--why", "two\nlines"), 2, "[[trust]] why"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(here, capsys, arguments, code, said):
    before = file()
    told = typed(capsys, *arguments)
    assert told[0] == code
    assert said in told[1] + told[2]
    assert file() == before


def test_without_a_file_there_is_nothing_to_write_into(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    code, _, err = typed(capsys, "allow", "00000012-1")
    assert code == 2
    assert "gatepost init writes one" in err


def test_a_file_that_the_gate_refuses_is_put_back(here, capsys, monkeypatch):
    """As where a certificate went away since the start."""
    before = file()
    monkeypatch.setattr(control, "reload", lambda pid_path, console: Reloaded(4711, False, ("gatepost.toml:1: no",)))
    code, out, _ = typed(capsys, "allow", "00000012-1", "--write")
    assert code == 2
    assert "the gate refused gatepost.toml, and the old file is back in its place\n  gatepost.toml:1: no" in out
    assert file() == before


def test_a_file_that_somebody_changed_while_we_thought_is_left_alone(here, capsys, monkeypatch):
    write = edit.write

    def late(path, old, new):
        Path(path).write_text(file() + "# theirs\n")
        write(path, old, new)

    monkeypatch.setattr(edit, "write", late)
    code, _, err = typed(capsys, "allow", "00000012-1", "--write")
    assert code == 2
    assert "changed by somebody else" in err
    assert file().endswith("# theirs\n")


def on_a_terminal(directory: Path, answer: str, *arguments: str) -> tuple[int, str]:
    """What is said to who answers."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gatepost", *arguments],
        stdin=slave, stdout=slave, stderr=slave, cwd=directory, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    said, end = "", time.monotonic() + PATIENCE_S
    answered = False
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    said += os.read(master, 65536).decode()
                except OSError:  # it has ended
                    break
            if not answered and "?" in said and "[y/n]" in said:
                os.write(master, f"{answer}\n".encode())
                answered = True
        return process.wait(PATIENCE_S), said.replace("\r", "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize(("answer", "code", "said"), [("y", 0, "written into"), ("", 1, "nothing is written")])
def test_on_a_terminal_it_asks(here, answer, code, said):
    before = file()
    told = on_a_terminal(here, answer, "allow", "00000012-1")
    assert "Write this into gatepost.toml?" in told[1]
    assert (told[0], said in told[1]) == (code, True), told[1]
    assert (file() == before) is (answer == "")


# --- A live gate ------------------------------------------------------------------------------------------------------


def relayed(gate: Gate) -> tuple[int, str]:
    """What a client is told who sends elsewhere; 250 where the message went to the backend."""
    with smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S, source_address=("127.0.0.2", 0)) as client:
        try:
            client.sendmail("printer@example.com", ["bob@partner.test"], "Subject: scan\r\n\r\n")
        except smtplib.SMTPRecipientsRefused as error:
            code, reply = error.recipients["bob@partner.test"]
            return code, reply.decode()
    return 250, ""


def to_backend(text: str, port: int) -> str:
    return text.replace('address = "embedded:"', f'address = "127.0.0.1:{port}"\ntls = "off"')


def gatepost(gate: Gate, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatepost", *arguments, "--config", str(gate.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def until(wanted: Any) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := wanted()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_refused_message_is_allowed_and_passes_and_is_denied_again(tmp_path):
    text = CONFIG.format(port=0, console=free_port())
    with LenientBackend("strict") as backend, Gate(tmp_path, to_backend(text, backend.port)) as gate:
        follower = subprocess.Popen(
            [sys.executable, "-m", "gatepost", "trace", "-f", "--config", str(gate.config)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            code, reply = relayed(gate)
            assert code == 550
            reference = re.findall(r"\[(.*)\]", reply)[0]
            assert follower.stdout is not None
            row = json.loads(follower.stdout.readline())
            assert (row["reference"], row["verdict"], row["client"]) == (reference, "refused", "127.0.0.2")
            allowed = until(lambda: (said := gatepost(gate, "allow", reference, "--write")).returncode == 0 and said)
            assert re.search(r"the gate \(process [0-9]+\) runs on it", allowed.stdout), allowed.stdout + allowed.stderr
            assert relayed(gate) == (250, "")
            row = json.loads(follower.stdout.readline())
            assert (row["forward_path"], row["verdict"]) == ("bob@partner.test", "accepted")
            denied = gatepost(gate, "deny", "--id", str(row["id"]), "--by", "forward_path", "--write")
            assert denied.returncode == 0, denied.stdout + denied.stderr
            code, reply = relayed(gate)
            assert (code, "Refused by the administrator" in reply) == (550, True)
        finally:
            follower.kill()
            follower.communicate()
