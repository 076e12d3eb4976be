"""``gatepost whosent``: what an administrator types, pastes and reads."""

from __future__ import annotations

import io
import json
import os
import pty
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.complaints.parts import KEY_BYTES, SECONDS, SESSION, TOKEN, complaint
from tests.gatehouse import Gate
from tests.store.places import Place, entry, record, refused

from gatepost import cli, config
from gatepost.cli import whosent as module
from gatepost.smtp.path import ForwardPath, Mailbox, Shape

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
name = "submission"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[[trust]]
accounts = ["anna"]
why = "staff"
owner = "it@example.com"

[backend.mailbox]
address = "embedded:"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    Path("gatepost.toml").write_text(CONFIG)
    Path("data/keys").mkdir(parents=True)
    Path("data/keys/trace.key").write_bytes(KEY_BYTES)
    place = Place(tmp_path / "data")
    yield place
    place.close()


def typed(capsys, name: str, *arguments: str) -> tuple[int, str, str]:
    Path("complaint").write_bytes(complaint(name))
    code = cli.main(["whosent", *arguments, "complaint"])
    said = capsys.readouterr()
    return code, said.out, said.err


def keep(place: Place, number: int = 3) -> None:
    def sent(one: int, address: str):
        local, _, domain = address.partition("@")
        return entry(
            at=SECONDS + one, message=f"K7Q2M9XA.{one}", message_id="<20261126.4711@laptop.example.com>",
            forward_path=ForwardPath(Mailbox(local, domain), Shape.PLAIN), by="gatepost.toml:12",
            reverse_path=Mailbox("anna", "example.com"),
        )  # fmt: skip

    entries = [sent(one, f"r{one}@victim.example") for one in range(2, number)]
    place.keep(
        record([sent(1, "carol@victim.example"), sent(1, "dave@victim.example"), *entries], SESSION, ended=True),
        record([refused("K7Q2M9XA-1", at=SECONDS + 5.0)], SESSION),
    )


def test_six_forged_lines_and_still_the_true_account(place, capsys):
    code, out, err = typed(capsys, "six-forged.eml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "OURS: the account anna; the token in its Received field was sealed by this gate"
    assert lines[1:5] == [
        "when    2026-11-26 10:15:12 UTC",
        "client  198.51.100.23",
        "account anna",
        "mail    session K7Q2M9XA, message K7Q2M9XA.1",
    ]
    assert lines[5] == f"proof   token {TOKEN}, sealed with trace.key"
    assert lines[6].startswith("trust   [[trust]] accounts anna (")
    assert lines[6].endswith("gatepost.toml:12): staff, owner it@example.com")
    marks = [
        line[2:17].strip() for line in lines if (line.startswith("  ") and " from " in line) or "SMTP id q12" in line
    ]
    assert marks == ["after us", "OURS", "not ours", "FORGED", "FORGED", "not ours", "FORGED", "not ours"]
    assert "                 it shows the client 192.0.2.80, and its token says 198.51.100.99" in lines
    assert "whoever sent it may have forged them" in out
    assert "(token tbP7mzVF...)" in out, "a token is shown whole once"


def test_all_that_the_journal_knows(place, capsys):
    keep(place)
    code, out, _ = typed(capsys, "message.eml")
    assert code == 0
    for line in (
        (
            "client  198.51.100.23 at listener submission (role submission), "
            "which called itself laptop.example.com, TLSv1.3"
        ),
        "account anna (PLAIN, verified by accounts, device laptop)",
        "mail    session K7Q2M9XA, message K7Q2M9XA.1, Message-ID <20261126.4711@laptop.example.com>",
        "went    from anna@example.com to dave@victim.example, backend mail",
        "        from anna@example.com to carol@victim.example, backend mail",
        "then    it was let through by gatepost.toml:12",
        "1 other message of anna on 2026-11-26 (UTC)",
        "  10:15:14  K7Q2M9XA.2  from anna@example.com to r2@victim.example",
        "  1 recipient was refused on that day",
    ):
        assert line in out.splitlines()
    assert "trust   let through now by [[trust]] accounts anna (" in out


def test_many_messages_are_counted_and_fifty_shown(place, capsys):
    keep(place, 80)
    _, out, _ = typed(capsys, "message.eml")
    assert "78 other messages of anna on 2026-11-26 (UTC)" in out
    assert "  and 28 more: gatepost trace --account anna" in out
    assert len([line for line in out.splitlines() if line.startswith("  10:1")]) == 50


def test_json_has_all_of_it(place, capsys):
    keep(place)
    code, out, err = typed(capsys, "six-forged.eml", "--json")
    assert (code, err) == (1, ""), "the journal knows another Message-ID for it"
    told = json.loads(out)
    assert (told["verdict"], told["account"], told["client"]) == ("in doubt", "anna", "198.51.100.23")
    assert [line["mark"] for line in told["received"]].count("forged") == 3
    assert TOKEN in told["received"][1]["text"]


@pytest.mark.parametrize(
    ("name", "code", "headline"),
    [
        ("arf.eml", 0, "OURS: the account anna; "),
        ("screenshot.txt", 0, "OURS: the account anna; "),
        ("forged.eml", 1, "NOT OURS: a Received field claims to be ours, and is not"),
        ("another-gate.eml", 1, "NOT OURS: it passed another gate, mx.neighbour.example, whose operator can tell"),
        ("cut-short.txt", 1, "NOT OURS, as far as can be told: a Received field names this gate, and its token is not"),
        ("no-trace.txt", 1, "NOT OURS, as far as can be told: it holds no Received field: ask for the message with"),
    ],
)
def test_the_exit_code_and_the_first_line(place, capsys, name, code, headline):
    told = typed(capsys, name)
    assert told[0] == code
    assert told[1].startswith(headline)


def test_what_is_in_doubt_is_no_yes(place, capsys):
    keep(place)
    code, out, _ = typed(capsys, "copied.eml")
    assert code == 1
    assert out.startswith("IN DOUBT: perhaps the account anna; the journal contradicts it")
    assert "doubt   its Message-ID is <made-up@evil.test>" in out


def test_what_the_file_is_can_be_said(place, capsys):
    assert typed(capsys, "through-us.eml")[0] == 1
    code, out, _ = typed(capsys, "through-us.eml", "--kind", "message")
    assert code == 0
    assert out.startswith("OURS: the client 192.0.2.44, without a login; ")
    code, out, _ = typed(capsys, "outlook-attached.eml", "--kind=complaint")
    assert code == 0
    assert out.splitlines()[1] == "asked   by Carol Reader <carol@victim.example>: FW: Your invoice 4711"
    assert typed(capsys, "message.eml", "--kind", "else")[0] == 2


def test_by_the_journal_only(place, capsys):
    keep(place)
    code, out, _ = typed(capsys, "cut-short.txt")
    assert code == 0
    assert out.startswith("OURS, BY THE JOURNAL ONLY: the account anna; what is written beside the id agrees")
    assert "\nproof " not in out


def test_a_repair_is_said(place, capsys):
    _, out, _ = typed(capsys, "screenshot.txt")
    assert ", sealed with trace.key; repaired in 1 place\n" in out


def test_a_key_that_was_replaced_is_said(place, capsys):
    assert cli.main(["key", "rotate"]) == 0
    capsys.readouterr()
    code, out, _ = typed(capsys, "message.eml")
    assert code == 0
    assert ", sealed with trace.key, which was replaced on 20" in out


def test_hostile_text_is_shown_as_text(place, capsys):
    octets = complaint("forged.eml").replace(b"from evil.test", "from \x1b]0;x\x07\u202eevil.test".encode())
    Path("hostile").write_bytes(octets.replace(b"dave", b"\x9b31m"))
    assert cli.main(["whosent", "hostile"]) == 1
    out = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    for number in range(0x20):
        Path("hostile").write_bytes(bytes([number]).join([b"Subject", b": ", b"Received: from", b" a\n"]) * 5)
        assert cli.main(["whosent", "hostile"]) == 1
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize("name", ["missing", ".", "\0"])
def test_a_file_that_cannot_be_read(place, capsys, name):
    assert cli.main(["whosent", name]) == 2
    assert capsys.readouterr().err.startswith("gatepost: cannot read the complaint ")
    assert cli.main(["whosent"]) == 2
    assert cli.main(["whosent", "--jsn"]) == 2


def test_without_a_key_nobody_can_tell(place, capsys):
    Path("data/keys/trace.key").unlink()
    code, out, err = typed(capsys, "message.eml")
    assert (code, out) == (2, "")
    assert "there is no key that can be used in" in err
    assert typed(capsys, "message.eml", "--json")[0] == 2
    assert not list(Path("data/keys").iterdir()), "and none is made"


def test_standard_input(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(complaint("message.eml"))))
    assert cli.main(["whosent", "-"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("OURS: the account anna")
    assert said.err == ""


def test_no_more_is_read_than_is_looked_at(place, capsys, monkeypatch):
    monkeypatch.setattr(module, "COMPLAINT_OCTETS_MAX", 100)
    Path("long").write_bytes(b" " * 1000 + complaint("message.eml"))
    assert cli.main(["whosent", "long"]) == 1


def test_a_terminal_is_told_what_is_waited_for(place):
    """Pasted into the terminal: text, Return, Ctrl-D."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "gatepost", "whosent", "-"],
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            assert process.stdout is not None
            waiting = process.stderr.readline()
            assert waiting == "waiting for the complaint: paste it, then press Return and Ctrl-D\n"
            os.write(ours, complaint("quoted.txt") + b"\n\x04")
            out = process.stdout.read()
        assert process.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)
    assert out.startswith("OURS: the account anna")


def test_a_message_that_a_gate_passed_on(tmp_path, capsys):
    """From the gate's own mailbox back to its operator, with the journal that it kept."""
    text = f"""
        [gate]
        name = "mx.example.com"
        data = "{tmp_path}/data"
        workers = 1
        [[listen]]
        name = "mx"
        address = "127.0.0.1:0"
        [domains]
        local = ["example.com"]
        [backend.mail]
        address = "embedded:"
    """
    arguments = ["--config", str(tmp_path / "gatepost.toml"), "--json"]
    with Gate(tmp_path, text) as gate:
        with smtplib.SMTP("127.0.0.1", gate.port, local_hostname="client.test") as client:
            content = "From: a@sender.test\r\nMessage-ID: <1@sender.test>\r\nSubject: x\r\n\r\nx\r\n"
            client.sendmail("a@sender.test", ["bob@example.com"], content)
        (mail,) = [
            path for path in (tmp_path / "data").rglob("*") if path.is_file() and b"\t(token " in path.read_bytes()
        ]
        told: dict[str, Any] = {}
        for _ in range(100):
            assert cli.main(["whosent", str(mail), *arguments]) == 0
            told = json.loads(capsys.readouterr().out)
            if told["deliveries"]:
                break
            time.sleep(0.1)
    assert (told["verdict"], told["account"], told["client"], told["listen"]) == ("ours", None, "127.0.0.1", "mx")
    assert (told["message_id"], told["doubts"]) == ("<1@sender.test>", [])
    assert [one["forward_path"] for one in told["deliveries"]] == ["bob@example.com"]
    assert [one["rule"] for one in told["trust"]] == ["[domains] local example.com"]
    mail.write_bytes(mail.read_bytes().replace(b"<1@sender.test>", b"<2@sender.test>"))
    assert cli.main(["whosent", str(mail), *arguments]) == 1, "after the gate ended, the journal still contradicts"
