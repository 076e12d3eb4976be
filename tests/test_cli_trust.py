"""``gatepost trust``: what an administrator types when strangers were seen behind a trusted address."""

from __future__ import annotations

import json
import smtplib
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.gatehouse import Gate
from tests.vectors.lenient import LenientBackend

from gatepost import cli, config
from gatepost.counters import EmbeddedStore, Source, Sources, Uses, state_directory
from gatepost.facts import Evidence
from gatepost.policy import relay

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
address = "127.0.0.1:2525"

[domains]
local = ["example.com"]

[[trust]]
network = "172.17.0.0/16"
owner = "it@example.com"
shared = {shared}

[[trust]]
accounts = ["*"]
{more}

[auth]
verify = ["accounts"]

[backend.mail]
address = "10.0.0.5:25"
"""
BRIDGE = ip_address("172.17.0.1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory with a configuration, where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    Path("gatepost.toml").write_text(CONFIG.format(shared="false", more=""))
    return tmp_path


def typed(capsys, *arguments):
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def suspend(*these: Source) -> None:
    store = EmbeddedStore(state_directory("data"))
    for source in these:
        Sources(store).note(source, Evidence(public_names=("a.net", "b\x1b[2J")), datetime.now(UTC).timestamp())
        Sources(store).suspend(source, ("strangers were there: b\x1b[2J", "twice"), datetime.now(UTC).timestamp())
    store.close()


def test_nothing_is_suspended_where_nothing_ran(here, capsys):
    assert typed(capsys, "trust", "list") == (0, "no trust is suspended\n", "")
    code, out, _ = typed(capsys, "trust", "list", "--json")
    assert (code, json.loads(out)) == (0, {"suspended": [], "uses": []})
    assert typed(capsys, "trust", "resume", "172.17.0.1")[:2] == (1, "the trust in 172.17.0.1 is not suspended\n")
    assert not (here / "data").exists(), "looking makes nothing"


def test_what_is_suspended_is_listed_with_its_evidence_and_resumed(here, capsys):
    suspend(BRIDGE, "inside")
    code, out, _ = typed(capsys, "trust", "list")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"172.17.0.1 since {datetime.now(UTC):%Y-}")
    assert lines[1:3] == ["  strangers were there: b?[2J", "  twice"], "and nobody steers a terminal"
    assert lines[3].startswith("inside since ")
    code, out, _ = typed(capsys, "trust", "list", "--json")
    assert [one["source"] for one in json.loads(out)["suspended"]] == ["172.17.0.1", "inside"]
    assert json.loads(out)["suspended"][0]["evidence"][1] == "twice"
    assert typed(capsys, "trust", "resume", "::ffff:172.17.0.1") == (0, "trusted again: 172.17.0.1\n", "")
    code, out, _ = typed(capsys, "trust", "resume", "inside", "--json")
    assert (code, json.loads(out)) == (0, {"resumed": True, "source": "inside"})
    code, out, _ = typed(capsys, "trust", "resume", "inside", "--json")
    assert (code, json.loads(out)) == (1, {"resumed": False, "source": "inside"})
    assert typed(capsys, "trust", "list") == (0, "no trust is suspended\n", "")


def test_check_tells_it(here, capsys):
    suspend(BRIDGE)
    code, out, _ = typed(capsys, "check", "--json")
    assert code == 0
    (warning,) = [one for one in json.loads(out)["warnings"] if "suspended" in one]
    assert "the trust in 172.17.0.1 is suspended since" in warning
    assert "gatepost trust resume 172.17.0.1" in warning


def test_check_goes_on_where_the_records_cannot_be_read(here, capsys):
    suspend(BRIDGE)
    (state_directory("data") / "data.mdb").write_bytes(b"rubbish" * 9999)
    code, out, _ = typed(capsys, "check", "--json")
    assert code == 0
    assert "whether any trust is suspended cannot be told" in " ".join(json.loads(out)["warnings"])
    code, out, err = typed(capsys, "trust", "list")
    assert (code, out) == (2, "")
    assert "are damaged" in err


def used(watched_days_ago, used_days_ago=None):
    """The grant to 172.17.0.0/16 was watched, and used, so many days ago."""
    now_s = datetime.now(UTC).timestamp()
    store = EmbeddedStore(state_directory("data"))
    (entry, _) = config.load_file("gatepost.toml").gate.rules.trust
    Uses(store).watch([relay.sense(entry)], now_s - watched_days_ago * 86_400)
    if used_days_ago is not None:
        Uses(store).used(relay.sense(entry), now_s - used_days_ago * 86_400)
    store.close()


def test_check_tells_what_nobody_uses(here, capsys):
    used(200, 95)
    (warning,) = [one for one in json.loads(typed(capsys, "check", "--json")[1])["warnings"] if "unused" in one]
    assert warning == (
        "gatepost.toml:11: [[trust]]: network 172.17.0.0/16 is unused for 95 days; remove it, or say when it expires"
    )
    used(200, 0)
    assert "unused" not in typed(capsys, "check", "--json")[1]


def test_when_grants_were_used_is_listed(here, capsys):
    used(1)
    code, out, _ = typed(capsys, "trust", "list")
    assert code == 0
    assert out.startswith(
        "no trust is suspended\n\nlast used, to within an hour\n  network 172.17.0.0/16 (gatepost.toml:11): not since 2"
    )
    (one,) = json.loads(typed(capsys, "trust", "list", "--json")[1])["uses"]
    assert (one["who"], one["where"], one["last_used"]) == ("network 172.17.0.0/16", "gatepost.toml:11", None)
    used(1, 0)
    assert "gatepost.toml:11): 2" in typed(capsys, "trust", "list")[1]
    (one,) = json.loads(typed(capsys, "trust", "list", "--json")[1])["uses"]
    assert one["last_used"] > one["watched_since"]


def test_a_gate_says_at_its_start_what_nobody_uses_and_learns_that_it_is_used(here, capsys):
    text = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[[trust]]
network = "127.0.0.1"
owner = "it@example.com"

[backend.mail]
address = "127.0.0.1:{port}"
tls = "off"

[console]
address = "127.0.0.1:0"
"""
    Path("gatepost.toml").write_text(text.format(port=25))
    used_of = relay.sense(config.load_file("gatepost.toml").gate.rules.trust[0])
    store = EmbeddedStore(state_directory("data"))
    Uses(store).watch([used_of], datetime.now(UTC).timestamp() - 91 * 86_400)
    store.close()
    with LenientBackend("strict") as backend, Gate(here, text.format(port=backend.port)) as gate:
        line = gate.wait_for_line(lambda line: "unused for 91 days" in line, 30)
        assert (
            "gatepost.toml:13: [[trust]]: network 127.0.0.1/32 is unused for 91 days, as long as it is watched" in line
        )
        with smtplib.SMTP("127.0.0.1", gate.port, timeout=30) as client:
            client.sendmail("a@example.com", ["bob@elsewhere.test"], "Subject: hello\r\n\r\n")
        assert "unused" not in typed(capsys, "check", "--json")[1]
        gate.reload()
        gate.wait_for_line(lambda line: "is in force" in line, 30)
        assert sum("unused for" in line for line in gate.output) == 1


def test_a_grant_may_be_known_to_be_shared(here):
    rules = config.load_file("gatepost.toml").gate.rules
    assert [entry.shared for entry in rules.trust] == [False, False]
    Path("gatepost.toml").write_text(CONFIG.format(shared="true", more="shared = true"))
    loaded = config.load_file("gatepost.toml")
    assert [entry.shared for entry in loaded.gate.rules.trust] == [True, True]
    (warning,) = [one for one in loaded.warnings if "shared" in one]
    assert warning.startswith("gatepost.toml:18: ")


@pytest.mark.parametrize("name", ["list", "resume"])
def test_each_documents_itself_and_its_exit_code(capsys, name):
    code, out, _ = typed(capsys, "trust", name, "--help")
    assert code == 0
    assert "Exit code: 0" in " ".join(out.split())
