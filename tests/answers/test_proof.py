"""What a configuration allows, as an object: the same for `gatepost check` and for the console."""

from __future__ import annotations

import json

import pytest

from gatepost import config
from gatepost.answers import proof
from gatepost.errors import ConfigError

CLOSED = """\
[gate]
name = "mx.example.com"
data = "{data}"
{gate}
[[listen]]
name = "mx"
address = "127.0.0.1:25"
[domains]
local = ["example.com"]
[backend.mailbox]
address = "embedded:"
{more}
"""
EVERYBODY = '[[trust]]\nnetwork = "0.0.0.0/0"\nwhy = "a trial"\nowner = "it@example.com"'


def octets(tmp_path, gate: str = "", more: str = "") -> bytes:
    return CLOSED.format(data=tmp_path / "data", gate=gate, more=more).encode()


def test_closed(tmp_path):
    answer = proof.answer(octets(tmp_path), "gatepost.toml")
    assert answer.well
    assert (answer.told["valid"], answer.told["proof"]["proven"]) == (True, True)
    assert json.loads(json.dumps(answer.told)) == answer.told
    assert not (tmp_path / "data").exists(), "a question changes nothing"


def test_open_is_told_with_the_dialogue(tmp_path):
    answer = proof.answer(octets(tmp_path, more=EVERYBODY), "gatepost.toml")
    assert not answer.well
    assert answer.told["valid"] is False
    assert any("gatepost.toml:" in problem for problem in answer.told["problems"])
    assert answer.told["proof"]["dialogue"]["exchanges"][-1]["reply"].startswith("250 ")


def test_open_as_the_file_says_is_well(tmp_path):
    answer = proof.answer(octets(tmp_path, 'open_relay = "mx.example.com"', EVERYBODY), "gatepost.toml")
    assert answer.well
    assert answer.told["valid"]
    assert not answer.told["proof"]["proven"]


def test_what_does_not_load_is_no_answer(tmp_path):
    with pytest.raises(ConfigError, match=r"gatepost\.toml:4"):
        proof.answer(octets(tmp_path, "wrokers = 2", EVERYBODY), "gatepost.toml")


def test_the_embedded_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = proof.answer(config.EMBEDDED_DEFAULT, "")
    assert answer.well
    assert answer.told["name"]
