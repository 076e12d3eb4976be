"""What a backend's answers mean, in words, under the rules of a configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gatepost import config
from gatepost.backend.dialect import (
    CONTROLS,
    ELSEWHERE,
    ENDS,
    FOREIGN,
    FORMS,
    NOBODY,
    POSTMASTER,
    QUESTIONS,
    Answer,
    Dialect,
    Heard,
)
from gatepost.config import dialects, settings
from gatepost.policy.relay import Reread

NOW = 1_795_650_000.0
HEAD = """\
[gate]
name = "mx.example.com"
[[listen]]
name = "mx"
address = "127.0.0.1:2525"
[domains]
local = ["*.example.com", "[192.0.2.1]", "example.com", "example.org"]
[backend.mail]
address = "127.0.0.1:25"
"""
LAN = '[[trust]]\nnetwork = "10.1.0.0/16"\nwhy = "office LAN"\n'


def rules(text=""):
    return config.load((HEAD + text).encode(), "gatepost.toml", now=NOW).gate.rules


def answered(taken=(), unknown=(), **changes) -> Dialect:
    """A backend that refuses all but what is named here."""

    def heard(form):
        if form.id in taken:
            return Heard(form.id, "", Answer.TAKEN, "250 Ok")
        if form.id in unknown:
            return Heard(form.id, "", Answer.UNKNOWN, "450 4.2.0 Greylisted.")
        return Heard(form.id, "", Answer.REFUSED, "550 No")

    found = Dialect(
        "mail", "10.0.0.5:25", NOW, "", "220 x", "example.com", ELSEWHERE,
        ("8BITMIME", "DSN", "PIPELINING", "SMTPUTF8", "STARTTLS"), 1 << 20, tuple(map(heard, QUESTIONS)),
    )  # fmt: skip
    return replace(found, **changes)


def told(found, text=""):
    return {finding.kind: finding for finding in dialects.findings(found, rules(text), NOW)}


EVERYBODY = {form.id for form in NOBODY}


def test_a_strict_backend_gets_no_warning():
    meant = told(answered({"postmaster"}), LAN)
    assert set(meant) == {"unknown-users-refused", "does-not-relay", "reads-as-written", "capability-size"}
    assert not any(finding.warning for finding in meant.values())
    assert meant["capability-size"].sentence == "It takes messages up to 1 MiB: the gate offers no more."


def test_accept_all_is_a_warning_that_says_what_happens_and_what_to_do():
    accept_all = told(answered(EVERYBODY))["accept-all"]
    assert accept_all.warning
    assert "backscatter" in accept_all.sentence
    assert "local_recipient_maps" in accept_all.sentence


def test_what_a_backend_that_takes_everybody_makes_of_plain_forms_is_said_to_be_unknown():
    sentence = told(answered({*EVERYBODY, "plus", "percent"}))["strangers-cannot-be-told"].sentence
    assert sentence.startswith("Whether it reads plus (<user+elsewhere@ours>) as another address cannot be told,")
    assert "strangers-cannot-be-told" not in told(answered({"plus"}))


def test_what_strangers_could_send_is_told_with_what_the_gate_refuses_for_it():
    meant = told(answered({"plus", "equals"}))
    assert "reads-as-written" not in meant
    assert 'the gate refuses strangers every local-part with "=" or "+" at its domains' in (
        meant["open-to-strangers"].sentence
    )


@pytest.mark.parametrize("listen", ['role = "mx"', 'role = "submission"', 'role = "mx"\ntls = "implicit"'])
def test_a_form_is_put_to_the_policy_as_a_stranger_by_whatever_listener_there_is(listen):
    text = HEAD.replace('name = "mx"\naddress', f'name = "mx"\n{listen}\naddress') + '[auth]\nverify = ["accounts"]\n'
    gate = config.load(text.encode(), "gatepost.toml", now=NOW).gate
    found = answered({"equals", "slash", "percent"})
    listeners = settings.smtp_listeners(gate.listens)
    open_ones = dialects.readings([found], gate.rules, listeners, NOW)
    assert [one.form for one in open_ones] == ["equals", "slash"], "the shapes that route are no news"
    assert {one.closed for one in open_ones} == {"submission" in listen}
    known = replace(gate.rules, reread=(Reread("mail", "=/"),))
    for one in dialects.readings([found], known, listeners, NOW):
        assert one.closed
        assert one.exchanges[-1].command in (
            "RCPT TO:<user=elsewhere.invalid@example.com>",
            "RCPT TO:<elsewhere.invalid/user@example.com>",
        )
        assert one.exchanges[-1].reply.startswith("5")


def test_what_was_not_answered_is_said_to_be_unknown():
    meant = told(answered(unknown={form.id for form in QUESTIONS}))
    assert meant["unknown-users-unknown"].sentence == (
        "Whether it refuses unknown users it did not tell: 450 4.2.0 Greylisted. Greylisting passes: ask again later."
    )
    assert meant["relaying-unknown"].sentence.endswith("it did not tell: 450 4.2.0 Greylisted.")
    assert "percent (<user%elsewhere@ours>)" in meant["unanswered"].sentence
    assert "reads-as-written" not in meant


def test_a_domain_that_cannot_exist_may_be_why_it_was_refused():
    assert "--elsewhere" in told(answered())["does-not-relay"].sentence
    assert "--elsewhere" not in told(answered(elsewhere="example.net"))["does-not-relay"].sentence


def test_a_backend_that_relays_for_the_gate_must_be_out_of_reach_for_others():
    assert "let nobody else reach it" in told(answered({FOREIGN.id}))["relays-for-the-gate"].sentence


def test_no_postmaster_is_told():
    assert told(answered())["no-postmaster"].sentence.startswith("It refuses postmaster@example.com,")
    assert "no-postmaster" not in told(answered({POSTMASTER.id}))


PERCENT = (
    "It reads percent (<user%elsewhere@ours>) as another address: that would be relayed if it came through. The gate"
    " refuses it to strangers by construction"
)


TOO = ". Who may send anywhere may send it, too: "


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", ", and no grant lets it pass."),
        (LAN, f"{TOO}network 10.1.0.0/16 (gatepost.toml:10)."),
        (
            LAN + '[[trust]]\nhost = "a.example"\n',
            f"{TOO}network 10.1.0.0/16 (gatepost.toml:10); host a.example (gatepost.toml:13).",
        ),
        (LAN + 'forward_paths = ["*@example.net"]\n', ", and no grant lets it pass."),
        (LAN + "expires = 2020-01-01\n", ", and no grant lets it pass."),
        (LAN + '[[deny]]\nforward_path = "*@example.net"\n', ", and no grant lets it pass."),
    ],
)
def test_who_may_send_a_form_that_would_be_relayed_is_named(text, end):
    finding = told(answered({"percent"}), text)["would-be-relayed"]
    assert (finding.sentence, finding.warning) == (PERCENT + end, False)


def test_what_the_gate_never_sends_is_told_apart():
    meant = told(answered({"source route", "two ats", "no domain"}))
    assert meant["never-sent"].sentence == (
        "It takes source route (<@ours:user@elsewhere>), two ats (<user@elsewhere@ours>) and no domain (<user>): the"
        " gate never sends these, for anybody."
    )
    assert "would-be-relayed" not in meant


def test_of_an_accept_all_backend_it_is_said_that_nobody_can_tell():
    meant = told(answered({form.id for form in QUESTIONS}))
    assert meant["cannot-be-told"].sentence.startswith("Whether it reads percent (<user%elsewhere@ours>), bang (")
    assert "open-to-strangers" not in meant
    assert "reads-as-written" not in meant


def test_what_strangers_may_send_and_is_read_in_another_way_is_the_first_thing_told():
    first = dialects.findings(answered({"slash"}), rules(), NOW)[0]
    assert (first.kind, first.warning) == ("open-to-strangers", True)
    assert "slash (<elsewhere/user@ours>)" in first.sentence


def test_what_is_not_offered_has_its_consequence():
    meant = told(answered(keywords=("CHUNKING",), size_octets=None))
    assert {kind for kind in meant if kind.startswith("capability-")} == {
        f"capability-{name}" for name in ("8bitmime", "smtputf8", "pipelining", "starttls", "dsn", "chunking", "size")
    }
    assert meant["capability-smtputf8"].sentence == (
        "It does not offer SMTPUTF8: addresses beyond ASCII are refused, 553 5.6.7."
    )
    assert meant["capability-size"].sentence.startswith("It names no SIZE")


def ends(**answers):
    return tuple(Heard(name, "", answers.get(name, Answer.REFUSED), "why") for name in ENDS)


def test_ends_of_content_are_told_where_they_were_asked():
    assert "ends" not in told(answered())
    strict = told(answered(ends=ends()))
    assert strict["ends"].sentence == "It takes nothing but CRLF . CRLF for the end of a message."
    lax = told(answered(ends=ends(**{"LF . LF": Answer.TAKEN, "CR . CR": Answer.UNKNOWN})))
    assert lax["ends"].sentence.startswith("It takes LF . LF for the end of a message, too:")
    assert "The gate never sends them" in lax["ends"].sentence
    assert lax["ends-unknown"].sentence == "Whether it takes CR . CR for the end did not come out: why."


def test_the_heading_says_who_and_when():
    assert dialects.heading(answered(tls="TLSv1.3")) == (
        "backend mail at 10.0.0.5:25, asked on 2026-11-25 23:40 UTC for example.com, over TLSv1.3"
    )
    assert dialects.short_heading(answered()) == "mail, asked on 2026-11-25"


def test_the_domain_to_ask_for_is_one_that_goes_to_the_backend():
    assert dialects.local_domain(rules(), "mail") == "example.com"
    routed = rules(
        '[backend.other]\naddress = "127.0.0.1:26"\n[[route]]\nforward_paths = ["*@example.com"]\nbackend = "other"\n'
        '[[route]]\nforward_paths = ["local"]\nbackend = "mail"\n'
    )
    assert dialects.local_domain(routed, "other") == "example.com"
    assert dialects.local_domain(routed, "mail") == "example.org"
    assert dialects.local_domain(routed, "third") == ""


def test_every_answer_that_can_be_given_has_a_sentence():
    everything = {finding.kind for finding in dialects.findings(answered(), rules(), NOW)}
    assert everything
    for taken in ((), *[(form.id,) for form in (*CONTROLS, *FORMS)]):
        assert all(finding.sentence.endswith(".") for finding in dialects.findings(answered(taken), rules(), NOW))
