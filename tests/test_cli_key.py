"""``gatepost key``: what an administrator types, with and without a gate that runs on the same data."""

from __future__ import annotations

import json
import os
import re
import shutil
import smtplib
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.gatehouse import Gate, free_port

from gatepost import cli, config
from gatepost.gate.trace import KEY_OCTETS, TraceReader

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


def test_where_nothing_ran_there_is_no_key_and_looking_makes_none(here, capsys):
    code, out, err = typed(capsys, "key", "list")
    assert (code, err) == (0, "")
    assert out == f"there is no key in {here}/data/keys yet; the gate makes one when it starts\n"
    code, out, _ = typed(capsys, "key", "list", "--json")
    assert (code, json.loads(out)) == (0, {"directory": f"{here}/data/keys", "keys": []})
    assert not Path("data").exists()


def test_keys_are_made_and_listed_and_never_shown(here, capsys):
    code, out, _ = typed(capsys, "key", "rotate")
    assert code == 0
    assert out == f"made: {here}/data/keys/trace.key\nno gate runs on this data; the next start takes it\n"
    code, out, _ = typed(capsys, "key", "rotate")
    assert out.splitlines()[2] == "still read, until the file is removed: trace.key"
    code, out, _ = typed(capsys, "key", "rotate", "--json")
    assert json.loads(out) == {
        "made": f"{here}/data/keys/trace-3.key",
        "older": ["trace-2.key", "trace.key"],
        "pid": None,
        "taken": None,
        "problems": [],
    }
    for path in Path("data/keys").iterdir():
        assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, KEY_OCTETS)
    code, out, _ = typed(capsys, "key", "list")
    assert code == 0
    moment = r"made \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    assert re.fullmatch(
        rf"trace-3\.key +{moment} +seals and reads\n"
        rf"trace-2\.key +{moment} +reads what it sealed\n"
        rf"trace\.key +{moment} +reads what it sealed\n",
        out,
    )
    code, out, _ = typed(capsys, "key", "list", "--json")
    keys = json.loads(out)["keys"]
    assert [(key["file"], key["seals"], key["reads"]) for key in keys] == [
        ("trace-3.key", True, True),
        ("trace-2.key", False, True),
        ("trace.key", False, True),
    ]


def test_a_key_that_cannot_be_used_is_bad_news(here, capsys):
    typed(capsys, "key", "rotate")
    typed(capsys, "key", "rotate")
    Path("data/keys/trace.key").write_bytes(b"short")
    code, out, _ = typed(capsys, "key", "list")
    assert code == 1
    assert "CANNOT BE USED: it is no file of 64 octets" in out.splitlines()[1]
    assert len(out.splitlines()) == 2, "the newest is good"
    Path("data/keys/trace-2.key").write_bytes(b"")
    code, out, _ = typed(capsys, "key", "list")
    assert out.splitlines()[2].startswith("no gate starts without a key to seal with")
    code, out, _ = typed(capsys, "key", "list", "--json")
    assert code == 1
    assert [key["reads"] for key in json.loads(out)["keys"]] == [False, False]
    assert typed(capsys, "key", "rotate")[0] == 0, "another mends it"
    assert "trace-3.key" in typed(capsys, "key", "list")[1]


def test_what_cannot_be_done_is_said(here, capsys):
    Path("data").mkdir()
    Path("data/keys").write_text("no directory")
    for command in ("list", "rotate"):
        code, out, err = typed(capsys, "key", command)
        assert (code, out) == (2, "")
        assert err.startswith(f"gatepost: cannot use the trace keys in {here}/data/keys: ")
    Path("gatepost.toml").write_text("[gate\n")
    assert typed(capsys, "key", "rotate")[0] == 2


@pytest.mark.skipif(not AM_ROOT, reason="only root acts as others")
def test_what_root_makes_is_the_gates(capsys):
    # Below /tmp: pytest's own directories are closed to the user that the gate's data belongs to.
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        directory.chmod(0o755)
        (directory / "gatepost.toml").write_text(CONFIG)
        (directory / "data").mkdir(mode=0o750)
        os.chown(directory / "data", 65534, 65534)
        code = subprocess.run(
            [sys.executable, "-m", "gatepost", "key", "rotate", "--config", str(directory / "gatepost.toml")],
            check=False,
        ).returncode
        assert code == 0
        status = (directory / "data" / "keys" / "trace.key").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (65534, 65534, 0o600)
    finally:
        shutil.rmtree(directory)


def test_a_gate_that_runs_seals_with_the_new_key_and_what_the_old_one_sealed_is_read(tmp_path, capsys):
    port = free_port()
    text = f"""
        [gate]
        name = "mx.example.com"
        data = "{tmp_path}/data"
        workers = 2
        [[listen]]
        address = "127.0.0.1:0"
        [domains]
        local = ["example.com"]
        [console]
        address = "127.0.0.1:{port}"
        [backend.mail]
        address = "embedded:"
    """
    with Gate(tmp_path, text) as gate:
        for number in range(2):
            if number:
                code, out, _ = typed(capsys, "key", "rotate", "--config", str(tmp_path / "gatepost.toml"))
                assert code == 0
                assert "seals with it; sessions that are open do within a minute" in out
            with smtplib.SMTP("127.0.0.1", gate.port) as client:
                client.sendmail("a@sender.test", ["bob@example.com"], f"Subject: {number}\r\n\r\nx\r\n")
    read = {}
    reader = TraceReader.in_data(str(tmp_path / "data"))
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file() and (found := re.search(rb"\(token (\S+)\);", path.read_bytes())):
            record = reader.read(found[1].decode())
            assert record is not None
            read[record.key] = str(record.client)
    assert read == {"trace.key": "127.0.0.1", "trace-2.key": "127.0.0.1"}
