"""The report to hand on: what it says, and that nothing of the server's does anything in it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from ipaddress import ip_address

import pytest
from tests.probe.parts import QUICK, Scripted, closed

from gatepost.probe import Attempt, Delivery, Outcome, Report, Round, Target, Verdict, probe
from gatepost.probe.evidence import Circumstances, evidence_object, evidence_page, not_tested

WHEN = Circumstances(datetime(2026, 11, 25, 23, 59, 58, tzinfo=UTC), "1.2.3")
EVIL = """</pre><script>alert(1)</script><img src=x onerror=alert(2)>"'&lt;"""
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def attempt(name: str, outcome: Outcome, reply: str, note: str = "") -> Attempt:
    lines = ("C: MAIL FROM:<>", "S: 250 Ok", "C: RCPT TO:<x@y.invalid>", f"S: {reply}")
    return Attempt(name, "why not", "RFC 976", "<>", "<x@y.invalid>", outcome, reply, note, lines)


def made(*attempts: Attempt, verdict: Verdict, delivery: Delivery | None = None, planned: int = 2) -> Report:
    opening = ("S: 220 mx.example.com", "C: EHLO [192.0.2.9]", "S: 250 Ok", "C: MAIL FROM:<>", "S: 250 Ok")
    one = Round(
        ip_address("192.0.2.1"), 25, False, "", "220 mx.example.com", ("example.com",), verdict, ("Why.",),
        opening, False, planned, attempts, "192.0.2.9",
    )  # fmt: skip
    return Report(Target("mx.example.com"), "x@y.invalid", verdict, ("IPv4: Why.",), (one,), delivery, 5.0)


OPEN = made(
    attempt("null-sender", Outcome.REFUSED, "550 No"),
    attempt("bang-bare", Outcome.ACCEPTED, "250 Ok"),
    verdict=Verdict.OPEN,
)


def test_a_page_says_what_was_asked_when_and_from_where():
    text = Page(evidence_page(OPEN, WHEN)).text
    for words in (
        "mx.example.com:25", "OPEN RELAY", "it takes mail from strangers for strangers", "192.0.2.1 port 25, in plain",
        "192.0.2.9", "2026-11-25 23:59:58 to 2026-11-26 00:00:03 UTC", "gatepost 1.2.3", "x@y.invalid", "example.com",
        "2 of 2", "IPv4: Why.",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("S: 250 Ok") == 8
    assert text.index("S: 220 mx.example.com\nC: EHLO [192.0.2.9]\nS: 250 Ok\nC: MAIL") < text.index("Every form")


def test_an_object_says_the_same():
    answer = evidence_object(OPEN, WHEN)
    assert (answer["begun"], answer["ended"]) == ("2026-11-25T23:59:58Z", "2026-11-26T00:00:03Z")
    assert answer["version"] == "gatepost 1.2.3"
    assert answer["sentence"] == "mx.example.com:25: it takes mail from strangers for strangers"
    assert answer["rounds"][0]["from"] == "192.0.2.9"
    assert answer["not_tested"] == list(not_tested(OPEN))


@pytest.mark.parametrize("verdict", Verdict)
def test_whatever_the_server_says_stays_text(verdict):
    hostile = made(attempt(EVIL, Outcome.ACCEPTED, f"250 {EVIL}", EVIL), verdict=verdict)
    one = replace(hostile.rounds[0], greeting=EVIL, local_domains=(EVIL,), opening=(f"S: {EVIL}",), tls_version=EVIL)
    delivery = Delivery("f00", EVIL, EVIL, taken=True, reply=EVIL, transcript=(EVIL,), arrived=True, inbox=EVIL)
    hostile = replace(hostile, rounds=(one,), why=(EVIL,), outside=EVIL, target=Target(EVIL), delivery=delivery)
    page = Page(evidence_page(hostile, replace(WHEN, version=EVIL)))
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "span", "table",
        "thead", "tbody", "tr", "th", "td", "br", "ul", "li", "pre", "code", "section", "a", "footer", "b",
    }  # fmt: skip
    assert EVIL in page.text
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "style")}
        assert (attributes.get("href") or "#").startswith("#")


def test_a_page_needs_nothing_and_forbids_everything():
    page = evidence_page(OPEN, WHEN)
    policies = [
        a for tag, a in Page(page).elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert [policy["content"] for policy in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in page
    assert "@import" not in page
    assert "://" not in page


def test_each_cell_leads_to_its_dialogue():
    elements = Page(evidence_page(OPEN, WHEN)).elements
    places = {attributes["id"] for _, attributes in elements if "id" in attributes}
    assert {attributes["href"] for tag, attributes in elements if tag == "a"} == {f"#{place}" for place in places}
    assert places == {"r0-null-sender", "r0-bang-bare"}


def test_a_page_says_how_strong_it_is():
    sent = Delivery("f00", "me@x.test", "null-sender", taken=True, reply="250 Ok", transcript=(), inbox="mail.x.test")
    for delivery, words in (
        (None, "the server's replies to RCPT"),
        (replace(sent, taken=False), "the server's replies to RCPT"),
        (sent, "a message that the server took to hand on"),
        (replace(sent, arrived=True), "a message that arrived: proof"),
    ):
        report = replace(OPEN, delivery=delivery)
        text = Page(evidence_page(report, WHEN)).text
        assert words in text
        assert words in evidence_object(report, WHEN)["rests_on"]
        assert ("the mark was found in the inbox at mail.x.test" in text) is bool(delivery and delivery.arrived)
        assert ("it was not in the inbox at mail.x.test" in text) is (delivery == sent)


def told(report: Report, words: str) -> bool:
    return any(words in sentence for sentence in not_tested(report))


def test_what_was_not_tested_is_said():
    assert told(OPEN, "IPv6: no address")
    assert not told(OPEN, "IPv4: no address")
    assert told(OPEN, "192.0.2.1 under TLS: not asked, or not offered")
    assert told(OPEN, "no message was sent")
    assert told(OPEN, "users who log in")
    assert not told(OPEN, "forms were not asked")
    assert told(replace(OPEN, rounds=(replace(OPEN.rounds[0], planned=57),)), "55 of 57 forms were not asked")
    both = (OPEN.rounds[0], replace(OPEN.rounds[0], tls=True, address=ip_address("192.0.2.1")))
    assert not told(replace(OPEN, rounds=both), "under TLS")
    delivery = Delivery("f00", "me@x.test", "null-sender", taken=True, reply="250 Ok", transcript=())
    assert told(replace(OPEN, delivery=delivery), "that it arrived was not seen")
    assert not told(replace(OPEN, delivery=replace(delivery, arrived=True)), "Delivery")


async def test_a_closed_server_and_nobody_at_all():
    async with Scripted(rcpt=closed) as server:
        report = await probe(server.target, QUICK)
    page = Page(evidence_page(report, WHEN))
    assert "CLOSED: it refused every form of relaying." in page.text
    assert "The dialogue that shows it" not in page.text
    assert report.rounds[0].own_address == "127.0.0.1"
    nobody = await probe(server.target, QUICK)
    text = Page(evidence_page(nobody, WHEN)).text
    assert "UNKNOWN: it cannot be told" in text
    assert "Every form" not in text
