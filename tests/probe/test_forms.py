"""The forms: which there are, and that nothing but a relay says yes to them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.vectors.readings import ALL_RULES, domain_of, every_reading, plain

from gatepost.probe.forms import FORMS, Names, questions

NAMES = Names("victim", "elsewhere.test", "example.com", "[127.0.0.1]", "mx.example.com", "nobody-7")
CASES = Path(__file__).parent.parent / "vectors" / "cases.jsonl"
QUESTIONS = list(questions(NAMES))


def test_every_form_has_a_name_and_a_reason_of_its_own():
    assert len(QUESTIONS) == len(FORMS) > 50
    assert len({form.id for form in FORMS}) == len(FORMS)
    assert all(form.why and form.source for form in FORMS)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_a_form_leads_a_stranger_outside_in_some_reading(question):
    """Else a yes to it would be no proof; and what leads nowhere else at least leads to nobody here."""
    argument = question.rcpt.partition(" ORCPT=")[0].encode()
    readings = [plain(argument), *every_reading(argument, ALL_RULES)]
    domains = {domain_of(reading) for reading in readings}
    assert domains - {"", "example.com", "[127.0.0.1]", "mx.example.com", "localhost"}, readings
    assert not {b"alice@example.com", b"postmaster@example.com"} & set(readings)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_a_form_is_one_line(question):
    for text in (question.mail, question.rcpt, question.hello, question.first):
        assert all(character.isprintable() or character == "\t" for character in text)
        assert "{" not in text


def test_forms_that_name_the_local_domain_are_asked_for_each():
    several = list(questions(NAMES, ("example.org",)))
    more = [question for question in several if question.id.endswith(":example.org")]
    assert len(several) == len(QUESTIONS) + len(more)
    assert "percent-ours:example.org" in {question.id for question in more}
    assert all("example.org" in f"{question.mail} {question.rcpt} {question.hello}" or question.form.first
               or question.form.id == "look-alike" for question in more)  # fmt: skip


def test_nothing_is_asked_twice_where_names_are_the_same():
    bare = list(questions(NAMES._replace(ours="[127.0.0.1]", server="[127.0.0.1]")))
    asked = [(q.mail, q.form.verb, q.rcpt, q.hello, q.first, q.form.together) for q in bare]
    assert len(set(asked)) == len(asked) < len(QUESTIONS)
    assert "look-alike" not in {question.id for question in bare}


def published():
    """The RCPT of each classic case, as the gate is attacked with it."""
    for line in CASES.read_text().splitlines():
        case = json.loads(line)
        if case["class"] != "relay-basic":
            continue
        for step in case["steps"]:
            if isinstance(step, dict) and str(step.get("say", "")).startswith("RCPT TO:"):
                yield case["id"], step["say"].removeprefix("RCPT TO:").strip().replace("{{gateip}}", "127.0.0.1")


@pytest.mark.parametrize(("case", "rcpt"), list(published()))
def test_every_classic_forward_path_of_the_vectors_is_asked(case, rcpt):
    asked = {question.rcpt for question in QUESTIONS}
    local = re.fullmatch(r"<(alice|bob|victim)@(example\.com|\[127\.0\.0\.1\])>", rcpt)
    assert rcpt in asked or local, f"{case}: {rcpt}"
