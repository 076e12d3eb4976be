"""Verdicts: every reason has one public reply, which holds no evidence."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from gatepost.smtp.path import ForwardPath, Mailbox, Shape
from gatepost.verdict import (
    Admit,
    AdmittedRecipient,
    Defer,
    LocalDomain,
    Reason,
    Refuse,
    RelayAuthority,
    RelayVerdict,
    Result,
    Trust,
)

REFERENCE = "K7Q2M9XA-1"


def test_the_relay_refusal_reads_as_promised() -> None:
    assert Reason.RELAYING.reply(REFERENCE).octets() == b"550 5.7.1 Relaying is prohibited [K7Q2M9XA-1]\r\n"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name.lower())
def test_each_reason_has_a_well_formed_reply(reason: Reason) -> None:
    for reply in (reason.reply(), reason.reply(REFERENCE)):
        assert re.fullmatch(rb"[45]\d\d [45]\.\d\.\d{1,2} [ -~]{10,150}\r\n", reply.octets())
        code, status, _ = reply.octets().split(b" ", 2)
        assert code[:1] == status[:1], "RFC 3463 §2: the class is that of the reply code"
        assert not reply.positive
    assert reason.reply(REFERENCE).octets().endswith(b" [K7Q2M9XA-1]\r\n")
    assert b"[" not in reason.reply().octets()


def test_what_may_pass_later_is_told_as_such() -> None:
    """A 5yz makes the client give up: it must not be said of what a later try may find otherwise."""
    transient = {reason for reason in Reason if reason.reply().transient}
    assert transient == {Reason.RATE, Reason.TOO_MANY_RECIPIENTS, Reason.OTHER_ROUTE}


def test_reasons_that_refuse_relaying_begin_alike() -> None:
    for reason in (Reason.RELAYING, Reason.ROUTING, Reason.EXPIRED_TRUST, Reason.NARROWED):
        assert reason.reply().octets().startswith(b"550 5.7.1 Relaying is prohibited")


def test_only_an_admission_carries_a_recipient() -> None:
    """A forgotten decision is a type error: nothing else leads to a backend."""
    path = ForwardPath(Mailbox("bob", "example.com"), Shape.PLAIN)
    admitted = Admit(AdmittedRecipient(path, LocalDomain("example.com", "gatepost.toml:3"), "mail"))
    assert admitted.recipient.authority.where == "gatepost.toml:3"
    assert set(get_args(RelayVerdict)) == {Admit, Defer, Refuse}
    assert set(get_args(RelayAuthority)) == {LocalDomain, Trust}
    for kind in (Defer, Refuse):
        assert "recipient" not in kind._fields


def test_results_are_those_of_rfc_8601() -> None:
    assert {result.value for result in Result} == {
        "none", "pass", "neutral", "softfail", "fail", "temperror", "permerror",
    }  # fmt: skip
