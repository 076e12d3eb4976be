"""Entries that are only watched: no verdict of the gate changes by them, and what they would change is told."""

from __future__ import annotations

import json
import smtplib
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from tests.gatehouse import Gate
from tests.store.places import session

from gatepost import cli, config
from gatepost.facts import Transaction
from gatepost.policy import relay
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, TrustEntry
from gatepost.smtp.path import ForwardPath, Mailbox, Pattern, Shape
from gatepost.store import JournalSettings
from gatepost.store.journal import Journal, Query
from gatepost.verdict import Finding, Result

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[console]
address = "127.0.0.1:0"

[[trust]]
network = "10.1.0.0/16"
why = "office"
owner = "it@example.com"

[[deny]]
reverse_path = "*@spam.test"
"""
SHADOWS = """
[[trust]]
network = "127.0.0.1"
why = "trial"
owner = "it@example.com"
shadow = true

[[deny]]
forward_path = "carol@example.com"
shadow = true

[[deny]]
reverse_path = "*@noisy.test"
shadow = true
"""
LOCAL = (LocalPattern("example.com", "g.toml:1"),)
IN_FORCE = RelayRules(
    local=LOCAL, trust=(TrustEntry("g.toml:2", network=ip_network("10.1.0.0/16")),), default_backend="b"
)
GRANT = TrustEntry("g.toml:3", network=ip_network("192.0.2.0/24"))
DENIAL = DenyEntry("g.toml:4", reverse_path=Pattern.parse("*@noisy.test"))
SHADOWED = RelayRules(local=LOCAL, trust=(*IN_FORCE.trust, GRANT), deny=(DENIAL,), default_backend="b")


@pytest.mark.parametrize(
    ("client", "reverse", "forward", "told"),
    [
        ("192.0.2.1", "a@x.test", "b@elsewhere.test", "admit: network 192.0.2.0/24 (g.toml:3)"),
        ("192.0.2.1", "a@noisy.test", "b@elsewhere.test", "refuse: denied (g.toml:4)"),
        ("192.0.2.1", "a@noisy.test", "bob@example.com", "refuse: denied (g.toml:4)"),
        ("10.1.0.1", "a@noisy.test", "b@elsewhere.test", "refuse: denied (g.toml:4)"),
        ("10.1.0.1", "a@x.test", "b@elsewhere.test", ""),
        ("192.0.2.1", "a@x.test", "bob@example.com", ""),
        ("198.51.100.1", "a@x.test", "b@elsewhere.test", ""),
        ("198.51.100.1", "a@noisy.test", None, "refuse: denied (g.toml:4)"),
        ("198.51.100.1", "a@x.test", None, ""),
    ],
)
def test_what_would_be(client, reverse, forward, told):
    of = session(1)._replace(client=session(1).client._replace(address=ip_address(client)))
    transaction = Transaction(of, Mailbox(*reverse.split("@")), 0, 1000.0)
    path = None if forward is None else ForwardPath(Mailbox(*forward.split("@")), Shape.PLAIN)
    assert relay.would(IN_FORCE, SHADOWED, transaction, path) == told
    assert relay.would(IN_FORCE, IN_FORCE, transaction, path) == ""


def test_a_rate_that_is_used_up_is_no_difference():
    of = session(1)._replace(client=session(1).client._replace(address=ip_address("10.1.0.1")))
    full = [Finding(relay.rate_check("g.toml:2"), Result.FAIL, "60 messages")]
    path = ForwardPath(Mailbox("b", "elsewhere.test"), Shape.PLAIN)
    assert relay.would(IN_FORCE, SHADOWED, Transaction(of, Mailbox("a", "x.test"), 0, 1.0), path, full) == ""


def test_the_rules_in_force_hold_nothing_of_them():
    loaded = config.load((CONFIG + SHADOWS).encode(), "gatepost.toml")
    plain = config.load(CONFIG.encode(), "gatepost.toml")
    assert loaded.gate.rules == plain.gate.rules
    assert plain.gate.shadowed is None
    assert loaded.gate.shadowed is not None
    assert len(loaded.gate.shadowed.trust) == len(loaded.gate.shadowed.deny) - 1 == 2


def test_one_that_would_be_an_open_relay_loads_with_a_warning_and_the_proof_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("gatepost.toml").write_text(CONFIG + '\n[[trust]]\nnetwork = "0.0.0.0/0"\nshadow = true\n')
    assert cli.main(["check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proof"]["proven"]
    assert len(told["trust"]) == 1
    (watched,) = told["watched"]
    assert watched["where"] == "gatepost.toml:27"
    (warning,) = [text for text in told["warnings"] if "acted on" in text]
    assert warning.startswith("gatepost.toml:27: ")
    assert warning.endswith("; it is only watched")
    assert cli.main(["check"]) == 0
    assert "Only watched, and not acted on\n" in capsys.readouterr().out


def test_entries_of_one_line_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = 'trust = [{network = "10.1.0.0/16"}, {network = "0.0.0.0/0", shadow = true}]\n'
    Path("gatepost.toml").write_text(entries + CONFIG.partition("[[trust]]")[0])
    assert cli.main(["check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proof"]["proven"]
    assert [one["sentence"].partition(" ")[0] for one in (*told["trust"], *told["watched"])] == [
        "10.1.0.0/16",
        "0.0.0.0/0",
    ]
    assert [text for text in told["warnings"] if "acted on, this would be an open relay" in text]


def test_an_entry_that_would_see_nothing_is_warned_of():
    pop3 = '[[listen]]\nname = "pop3"\nrole = "pop3"\naddress = "127.0.0.1:0"\nserver = "127.0.0.1:1110"\n'
    certificate = f'\n[[trust]]\ncertificate = "{"ab" * 32}"\n'
    grant = '\n[[trust]]\npop3 = "30m"\n'
    watched = "".join(f"{text}shadow = true\n" for text in (certificate, grant))
    texts = config.load((CONFIG + pop3 + watched).encode(), "gatepost.toml").warnings
    sees_none = [text for text in texts if "which is only watched, sees none" in text]
    assert [text.partition(": no ")[2].partition(" until")[0] for text in sees_none] == [
        "client is asked for its certificate",
        "login to the mailbox server is kept",
    ]
    texts = config.load((CONFIG + pop3 + watched + certificate.replace("ab", "cd") + grant).encode(), "g.toml").warnings
    assert not [text for text in texts if "sees none" in text]


def test_decided_and_journalled_and_not_acted_on(tmp_path, capsys):
    with Gate(tmp_path, CONFIG + SHADOWS) as gate:
        with smtplib.SMTP("127.0.0.1", gate.port, timeout=30) as client:
            client.ehlo("client.test")
            client.mail("a@noisy.test")
            assert client.rcpt("carol@example.com")[0] == 250
            assert client.rcpt("bob@example.com")[0] == 250
            assert client.rcpt("victim@elsewhere.test")[0] == 550
            assert client.data(b"Subject: x\r\n\r\nx\r\n")[0] == 250
            client.mail("a@x.test")
            assert client.rcpt("victim@elsewhere.test")[0] == 550
        line = gate.wait_for_session(lambda line: line["end"] == "quit")
        assert gate.stop() == 0
        first, second = json.loads(json.dumps(line["transactions"]).replace(f"{tmp_path}/", ""))
        assert first["would"] == "refuse: denied (gatepost.toml:37)"
        assert [one.get("would") for one in first["recipients"]] == [
            "refuse: denied (gatepost.toml:37)",  # the reverse-path is looked at first
            "refuse: denied (gatepost.toml:37)",
            "refuse: denied (gatepost.toml:37)",
        ]
        assert [one.get("would") for one in second["recipients"]] == ["admit: network 127.0.0.1/32 (gatepost.toml:27)"]
        journal = Journal(str(tmp_path / "data"), JournalSettings())
        kept = {str(one.entry.forward_path): one.entry for one in journal.search(Query(), 10)[::-1]}
        journal.close()
        assert kept["carol@example.com"].verdict == "accepted"
        assert kept["carol@example.com"].would == f"refuse: denied ({tmp_path}/gatepost.toml:37)"
        assert kept["victim@elsewhere.test"].would == f"admit: network 127.0.0.1/32 ({tmp_path}/gatepost.toml:27)"
        message = ["--client", "127.0.0.1", "--reverse-path", "a@x.test", "--forward-path", "victim@elsewhere.test"]
        assert cli.main(["explain", *message, "--config", str(tmp_path / "gatepost.toml")]) == 1
        assert (
            "watched with the entries of shadow = true acted on: admit: network 127.0.0.1/32" in capsys.readouterr().out
        )
