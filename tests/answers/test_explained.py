"""Questions by names, as the console's form and programs ask them."""

from __future__ import annotations

import pytest

from gatepost import config
from gatepost.answers import explained
from gatepost.config import Config
from gatepost.errors import GatepostError

MESSAGE = {"client": "192.0.2.1", "reverse_path": "a@stranger.test", "forward_path": "b@elsewhere.test"}


@pytest.fixture
def loaded(tmp_path) -> Config:
    path = tmp_path / "gatepost.toml"
    path.write_text(f"""\
[gate]
name = "mx.example.com"
data = "{tmp_path}/data"
[[listen]]
name = "mx"
address = "127.0.0.1:25"
[domains]
local = ["example.com"]
[backend.mailbox]
address = "embedded:"
[[trust]]
network = "10.0.0.0/8"
tls_minimum = "1.2"
why = "office"
owner = "it@example.com"
""")
    return config.load_file(str(path))


def test_a_message_described(loaded):
    told = explained.answer(loaded, MESSAGE)
    assert (told["verdict"], told["reason"], told["listen"]) == ("refuse", "relaying", "mx")
    assert ("client", "192.0.2.1 at listener mx") in explained.lines(told)
    told = explained.answer(loaded, MESSAGE | {"client": "10.1.2.3", "tls": "1.3"})
    assert told["verdict"] == "admit"
    assert explained.lines(told)[0] == ("passes", "to the backend mailbox, whose reply the client sees")


def test_a_reference_that_nobody_knows(loaded):
    told = explained.answer(loaded, {"reference": "550 5.7.1 Relaying is prohibited [K7Q2M9XD-1]"})
    assert (told["reference"], told["found"]) == ("K7Q2M9XD-1", False)
    assert told["reasons"]
    assert explained.lines(told) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "client, reverse_path and forward_path are missing"),
        ({"client": "10.1.2.3", "reverse_path": "<>"}, "forward_path is missing"),
        ({"reference": "K7Q2M9XD-1", "client": "10.1.2.3"}, "a reference says it all: leave client out"),
        ({"reference": "<script>"}, '"<script>" holds no reference'),
        (MESSAGE | {"lsten": "mx"}, '"lsten" is nothing to ask by; there is reference, client, '),
        (MESSAGE | {"tls": "1.4"}, '--tls "1.4": there is no such version; write one of 1.0, 1.1, 1.2, 1.3'),
        (MESSAGE | {"tls": "TLSv1.2"}, "there is no such version"),
        (MESSAGE | {"client": "x\0"}, "this is not an IP address"),
        (MESSAGE | {"listen": "\u202e"}, "there is no such listener"),
        (MESSAGE | {"certificate": "zz"}, "this is not a SHA-256 fingerprint"),
        (MESSAGE | {"mailbox_login": "-1"}, "this is not a time"),
    ],
)
def test_a_question_that_cannot_be_asked(loaded, asked, said):
    with pytest.raises(GatepostError) as caught:
        explained.answer(loaded, asked)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["", "a", "<", "a@b@c", "\udcff@b.test", "x" * 5000, "a@b.test> SIZE=1", "\r\n"])
@pytest.mark.parametrize("which", ["reverse_path", "forward_path"])
def test_whatever_is_written_as_a_path_is_decided(loaded, which, path):
    told = explained.answer(loaded, MESSAGE | {which: path})
    assert told["verdict"] in ("refuse", "defer")
    assert told[which] == path
    assert all(isinstance(text, str) for line in explained.lines(told) for text in line)
