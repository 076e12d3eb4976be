"""What a complaint carries that can be verified: files as people send them, and hostile ones."""

from __future__ import annotations

import base64
import itertools
from datetime import UTC, datetime
from email.utils import format_datetime
from ipaddress import ip_address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.complaints.parts import CLIENT, KEY, NAME, OTHER, SECONDS, SESSION, STRANGER, TOKEN, complaint

from gatepost import complaint as module
from gatepost.complaint import (
    CANDIDATES_MAX,
    COMPLAINT_OCTETS_MAX,
    FIELDS_MAX,
    IDS_MAX,
    LETTERS_MAX,
    LETTERS_MIN,
    TRIALS_EACH,
    TRIALS_MAX,
    Candidate,
    Complaint,
    Judged,
    Mark,
    Trials,
    date_seconds,
    judge,
    read_complaint,
)
from gatepost.facts import Identity
from gatepost.gate.trace import trace_field, trace_head


def judged(octets: bytes | str, kind: str = "") -> Judged:
    return judge(read_complaint(octets.encode() if isinstance(octets, str) else octets), KEY.read, NAME, kind)


def marks(found: Judged) -> list[Mark]:
    return [line.mark for line in found.lines]


FIELD = trace_field(trace_head(SESSION, NAME, utf8=False), "K7Q2M9XA.1", TOKEN, "Thu, 26 Nov 2026 10:15:12 +0000")


# ---- what people send

OURS = [
    "message.eml", "outlook-attached.eml", "outlook-pasted.html", "outlook-inline.eml", "gmail-original.txt",
    "gmail-forward.eml", "apple-mail-forward.eml", "pasted-headers.txt", "arf.eml", "quoted.txt", "screenshot.txt",
    "six-forged.eml", "copied.eml",
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_the_session_is_named_however_the_complaint_was_sent(name: str) -> None:
    found = judged(complaint(name))
    (seal,) = found.seals
    record = seal.record
    assert (record.reference, record.account, record.client) == ("K7Q2M9XA", "anna", CLIENT)
    assert record.seconds == SECONDS
    assert seal.token == TOKEN
    assert not found.loose
    (ours,) = [line for line in found.lines if line.mark is Mark.OURS]
    assert (ours.received.client, ours.received.id) == (CLIENT, "K7Q2M9XA.1") or name == "screenshot.txt"
    assert (seal.repaired > 0) == (name == "screenshot.txt")


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("quoted.txt", "screenshot.txt")])
def test_what_the_message_calls_itself_is_told_apart_from_what_the_complaint_does(name: str) -> None:
    found = judged(complaint(name))
    inner = {"six-forged.eml": "<urgent@bank.example>", "copied.eml": "<made-up@evil.test>"}
    assert found.section.fields["message-id"] == inner.get(name, "<20261126.4711@laptop.example.com>")
    enclosed = {"outlook-attached.eml", "outlook-inline.eml", "gmail-forward.eml", "apple-mail-forward.eml", "arf.eml"}
    if name in enclosed:
        assert found.enclosing is not None
        assert "carol@" in found.enclosing.fields["from"] or "abusedesk@" in found.enclosing.fields["from"]
    else:
        assert found.enclosing is None


@pytest.mark.parametrize(
    "name", ["message.eml", "outlook-attached.eml", "gmail-forward.eml", "pasted-headers.txt", "arf.eml"]
)
def test_what_stands_above_ours_was_added_after_us(name: str) -> None:
    found = marks(judged(complaint(name)))
    assert found[-1] is Mark.OURS
    assert set(found[:-1]) == {Mark.AFTER}


def test_six_forged_lines_change_nothing_and_are_marked() -> None:
    found = judged(complaint("six-forged.eml"))
    assert [(line.mark, line.received.client and str(line.received.client)) for line in found.lines] == [
        (Mark.AFTER, "203.0.113.25"),
        (Mark.OURS, "198.51.100.23"),
        (Mark.BEFORE, "192.0.2.80"),
        (Mark.FORGED, "192.0.2.80"),
        (Mark.FORGED, "192.0.2.81"),
        (Mark.BEFORE, "127.0.0.1"),
        (Mark.FORGED, "10.0.0.9"),
        (Mark.BEFORE, None),
    ]
    copied, made_up, without = [line for line in found.lines if line.mark is Mark.FORGED]
    assert copied.why == (
        "it shows the client 192.0.2.80, and its token says 198.51.100.99",
        "it shows the session K7Q2M9XB, and its token says M3N4P5R6",
        "its date is not that of its token, which was sealed at 2026-11-25 10:15:12 UTC",
    )
    assert made_up.why == (
        "it claims to be ours, and no key of ours sealed its token: made up, or damaged beyond repair",
    )
    assert without.why == ("it claims to be ours, and has no token",)


@pytest.mark.parametrize(
    ("name", "mark", "why"),
    [
        ("another-gate.eml", Mark.OTHER_GATE, "the gate mx.neighbour.example may know it"),
        ("cut-short.txt", Mark.DAMAGED, "it was cut short"),
        ("forged.eml", Mark.FORGED, "no key of ours sealed its token"),
    ],
)
def test_what_is_not_ours_is_said_with_its_reason(name: str, mark: Mark, why: str) -> None:
    found = judged(complaint(name))
    assert found.seals == ()
    (line,) = [line for line in found.lines if line.mark is not Mark.UNKNOWN]
    assert line.mark is mark
    assert why in line.why[0]


def test_where_nothing_of_ours_stands_nothing_is_found() -> None:
    found = judged(complaint("no-trace.txt"))
    assert (found.seals, found.lines, found.trials) == ((), (), 0)


def test_the_token_of_the_complaint_itself_is_not_that_of_what_it_complains_of() -> None:
    found = judged(complaint("through-us.eml"))
    assert found.seals == ()
    assert [line.mark for line in found.around] == [Mark.OURS]
    assert found.section.fields["subject"] == "Your invoice 4711"


# ---- what happens to a token on its way

DAMAGE = {
    "as it was": TOKEN,
    "broken": f"{TOKEN[:20]}\r\n\t{TOKEN[20:]}",
    "broken three times": f"{TOKEN[:20]}\n{TOKEN[20:40]}\n  {TOKEN[40:60]}\n{TOKEN[60:]}",
    "quoted": f"{TOKEN[:20]}\n> {TOKEN[20:]}",
    "quoted by a bar": f"{TOKEN[:20]}\n| {TOKEN[20:]}",
    "quoted thrice": f"{TOKEN[:20]}\n> > >{TOKEN[20:]}",
    "a no-break space": f"{TOKEN[:20]}\u00a0{TOKEN[20:]}",
    "zero width": "\u200b".join((TOKEN[:20], TOKEN[20:40], TOKEN[40:])),
    "soft hyphens": "\u00ad".join(TOKEN),
    "blanks": " ".join(TOKEN),
    "quoted-printable": f"{TOKEN[:20]}=\r\n{TOKEN[20:]}",
    "HTML": f"{TOKEN[:20]}&shy;<wbr>{TOKEN[20:]}",
    "HTML numbers": f"{TOKEN[:20]}&#8203;{TOKEN[20:]}<br>",
    "HTML comments": f"{TOKEN[:20]}<!-- of a mail program -->{TOKEN[20:]}<br>",
    "Outlook's conditions": f"<p>{TOKEN[:20]}<![if !mso]>{TOKEN[20:40]}<!--[endif]-->{TOKEN[40:]}",
    "bold": f"<b>{TOKEN[:20]}</b>{TOKEN[20:]}<br/>",
    "a dash from a word processor": TOKEN.replace("-", "\u2010").replace("_", "_"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("end", [")", " )", "\n)", ""])
def test_a_token_is_read_whatever_was_done_to_it(damage: str, end: str) -> None:
    (seal,) = judged(f"They wrote (token {DAMAGE[damage]}{end}").seals
    assert seal.token == TOKEN


@pytest.mark.parametrize("before", ["token", "Token:", "TOKEN = ", "(token", "t0ken ", "(token\n> "])
def test_the_word_before_it(before: str) -> None:
    found = judged(f"{before} {TOKEN})")
    assert [seal.token for seal in found.seals] == [TOKEN]
    assert found.loose


def test_a_token_without_the_word() -> None:
    found = judged(f"Is this yours?\n\n{TOKEN}\n")
    assert [seal.token for seal in found.seals] == [TOKEN]
    assert found.loose


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "latin-1"])
def test_character_sets(encoding: str) -> None:
    (seal,) = judged(f"Grüße\n\n(token {TOKEN[:30]}\n{TOKEN[30:]})\n".encode(encoding)).seals
    assert seal.token == TOKEN


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("start", ["", "\n", "Hello,\n\n", "From - Thu Nov 26 10:15:12 2026\n"])
def test_line_ends(end: str, start: str) -> None:
    text = start + FIELD.decode().replace("\r\n", "\n") + "Subject: x\n\nbody\n"
    found = judged(text.replace("\n", end))
    assert marks(found) == [Mark.OURS]
    assert found.section.fields["subject"] == "x"


@pytest.mark.parametrize("account", ["", "a", "anna@example.com", "a" * 63, "a" * 64, "a" * 200, "é" * 40])
def test_a_token_of_any_account_and_of_none(account: str) -> None:
    one = SESSION._replace(identity=Identity(account, "PLAIN") if account else None)
    token = KEY.seal(one, SECONDS)
    for text in (one_of_ours(token=token), f"(token {token[:30]}\n> {token[30:]})", token, f"{token}\n"):
        assert [seal.token for seal in judged(text).seals] == [token]
    wrong = swapped(token, *often_confused(token)[:1])
    assert [(seal.token, seal.repaired) for seal in judged(one_of_ours(token=wrong)).seals] == [(token, 1)]


def test_the_lengths_of_tokens() -> None:
    assert len(KEY.seal(SESSION._replace(identity=None), SECONDS)) == LETTERS_MIN
    assert len(KEY.seal(SESSION._replace(identity=Identity("a" * 300, "PLAIN")), SECONDS)) == LETTERS_MAX


# ---- which lines are true


def one_of_ours(**changes: str) -> str:
    parts = {
        "client": "[198.51.100.23]", "by": NAME, "gate": "(Gatepost)", "id": "K7Q2M9XA.1", "token": TOKEN,
        "date": "Thu, 26 Nov 2026 10:15:12 +0000",
    } | changes  # fmt: skip
    return (
        f"Received: from laptop.example.com ({parts['client']})\n\tby {parts['by']} {parts['gate']} with ESMTPSA id "
        f"{parts['id']}\n\t(token {parts['token']});\n\t{parts['date']}\n"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client": "[IPv6:::ffff:198.51.100.23]"},
        {"id": "K7Q2M9XA.12"},
        {"id": "k7q2m9xa.1"},
        {"date": "Thu, 26 Nov 2026 11:15:12 +0100"},
        {"date": "Thu, 26 Nov 2026 10:16:12 +0000"},
        {"date": "no date at all"},
    ],
)
def test_a_line_that_agrees_with_its_token_is_ours(changes: dict[str, str]) -> None:
    (line,) = judged(one_of_ours(**changes)).lines
    assert (line.mark, line.why) == (Mark.OURS, ())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"client": "[192.0.2.1]"}, "it shows the client 192.0.2.1, and its token says 198.51.100.23"),
        ({"id": "K7Q2M9XB.1"}, "it shows the session K7Q2M9XB, and its token says K7Q2M9XA"),
        ({"id": "4Xq7Zt1Lw9"}, "its id 4Xq7Zt1Lw9 is none of ours, and its token says K7Q2M9XA"),
        ({"date": "Thu, 26 Nov 2026 10:18:00 +0000"}, "its date is not that of its token"),
        ({"date": "Thu, 26 Nov 2026 10:15:00 +0000"}, "its date is not that of its token"),
    ],
)
def test_a_line_that_contradicts_its_token_is_forged(changes: dict[str, str], why: str) -> None:
    found = judged(one_of_ours(**changes))
    (line,) = found.lines
    assert line.mark is Mark.FORGED
    assert why in line.why[0]
    assert found.seals == (), "and its token says nothing of this message"


def test_a_gate_that_was_renamed_says_so() -> None:
    (line,) = judged(one_of_ours(by="old.example.com")).lines
    assert line.mark is Mark.OURS
    assert line.why == ("it names old.example.com, and this gate is mx.example.com",)


def test_a_line_of_another_program_on_this_host_is_not_taken_for_a_claim() -> None:
    line = "Received: from a.test ([192.0.2.1]) by mx.example.com (Postfix) id 7; Thu, 26 Nov 2026 10:15:12 +0000\n"
    assert marks(judged(line)) == [Mark.UNKNOWN]
    assert marks(judged(FIELD.decode() + line)) == [Mark.OURS, Mark.BEFORE]
    assert marks(judged(line + FIELD.decode())) == [Mark.AFTER, Mark.OURS]


def test_a_hello_cannot_claim_to_be_the_host_that_received() -> None:
    line = one_of_ours().replace("from laptop.example.com", "from by", 1)
    assert marks(judged(line)) == [Mark.OURS]


def test_of_two_passes_the_last_is_told_first() -> None:
    earlier = one_of_ours(
        token=OTHER, client="[198.51.100.99]", id="M3N4P5R6.1", date="Wed, 25 Nov 2026 10:15:12 +0000"
    )
    found = judged(FIELD.decode() + earlier)
    assert [seal.record.account for seal in found.seals] == ["anna", "bert"]
    assert marks(found) == [Mark.OURS, Mark.OURS]
    assert "an earlier pass" in found.lines[1].why[0]


def test_a_valid_token_in_the_body_does_not_outweigh_the_field() -> None:
    found = judged(FIELD.decode() + f"Subject: x\n\n(token {OTHER})\n")
    assert [seal.record.account for seal in found.seals] == ["anna"]


COPY = one_of_ours(token=OTHER, client="[198.51.100.99]", id="M3N4P5R6.1", date="Wed, 25 Nov 2026 10:15:12 +0000")


@pytest.mark.parametrize("between", ["", "Subject: x\n\nbody\n\n"])
def test_a_copy_below_a_line_that_was_misread_does_not_take_its_place(between: str) -> None:
    misread = one_of_ours(token=swapped(TOKEN, *often_confused(TOKEN)[:1]))
    found = judged(misread + between + COPY)
    assert (found.seals[0].record.account, found.overshadowed) == ("anna", False)
    for top in (one_of_ours(token=TOKEN[:30]), one_of_ours(token=STRANGER), one_of_ours(client="[192.0.2.1]")):
        found = judged(top + between + COPY)
        assert (found.seals[0].record.account, found.overshadowed) == ("bert", True)
    assert not judged(COPY + misread).overshadowed


def test_a_header_section_within_a_message_that_did_not_pass_here() -> None:
    outer = complaint("no-trace.txt").decode() + "\nReceived: from a by b\nSubject: x\nFrom: a\n\nbody\n\n"
    found = judged(outer + COPY)
    assert (found.seals[0].record.account, found.nested) == ("bert", True)
    assert not judged(COPY + outer).nested


def test_a_message_is_told_from_a_complaint_where_somebody_says_which_it_is() -> None:
    """Its sender may write into it what looks like a message that was forwarded."""
    text = FIELD.decode() + "From: a\nTo: b\n\nbody\n\n" + COPY + "Subject: x\n"
    assert [judged(text, kind).seals[0].record.account for kind in ("", "complaint", "message")] == [
        "bert", "bert", "anna",
    ]  # fmt: skip
    plain = FIELD.decode() + "Subject: x\n\nbody\n"
    assert [len(judged(plain, kind).seals) for kind in ("", "complaint", "message")] == [1, 0, 1]
    assert judged("hello", "complaint").seals == judged("hello", "message").seals == ()


def test_a_misread_line_outweighs_a_token_in_the_body() -> None:
    found = judged(one_of_ours(token=swapped(TOKEN, *often_confused(TOKEN)[:1])) + f"\n\n(token {OTHER})\n")
    assert [seal.record.account for seal in found.seals] == ["anna"]


# ---- repair


def swapped(token: str, *places: tuple[int, str]) -> str:
    for at, letter in places:
        token = token[:at] + letter + token[at + 1 :]
    return token


def often_confused(token: str) -> list[tuple[int, str]]:
    pairs = {"0": "O", "O": "0", "1": "l", "l": "1", "I": "l", "5": "S", "S": "5", "8": "B", "B": "8", "2": "Z"}
    return [(at, pairs[letter]) for at, letter in enumerate(token) if letter in pairs]


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_letters_that_are_often_confused_are_put_right(wrong: int) -> None:
    places = often_confused(TOKEN)[:wrong]
    assert len(places) == wrong
    found = judged(one_of_ours(token=swapped(TOKEN, *places)))
    assert [(seal.token, seal.repaired) for seal in found.seals] == [(TOKEN, wrong)]
    assert 0 < found.trials <= TRIALS_EACH


def test_a_repair_is_the_same_each_time() -> None:
    text = one_of_ours(token=swapped(TOKEN, *often_confused(TOKEN)[:2]))
    assert judged(text) == judged(text)


def test_joined_letters() -> None:
    tokens = (KEY.seal(SESSION, seconds) for seconds in itertools.count(SECONDS))
    token = next(token for token in tokens if "m" in token)
    found = judged(f"(token {token.replace('m', 'rn', 1)})")
    assert [(seal.token, seal.repaired) for seal in found.seals] == [(token, 1)]


def test_in_a_repaired_line_what_disagrees_may_be_misread_as_well() -> None:
    found = judged(one_of_ours(token=swapped(TOKEN, *often_confused(TOKEN)[:1]), client="[198.51.100.28]"))
    (line,) = found.lines
    assert line.mark is Mark.OURS
    assert line.why == ("it shows the client 198.51.100.28, and its token says 198.51.100.23: misread, or forged",)


def test_nothing_is_repaired_where_a_token_verifies() -> None:
    damaged = one_of_ours(token=swapped(OTHER, *often_confused(OTHER)[:1]))
    assert judged(FIELD.decode() + damaged).trials == 0


def test_trials_end() -> None:
    """Many tokens of another gate: nothing verifies, and it is not tried for ever."""
    tried: list[str] = []

    def read(letters: str) -> None:
        tried.append(letters)

    each = [STRANGER[:40] + f"{number:06}" + STRANGER[46:] for number in range(100)]
    found = judge(read_complaint("".join(f"(token {one})\n" for one in each).encode()), read, NAME)
    assert found.seals == ()
    assert found.trials <= TRIALS_MAX
    assert len(tried) <= TRIALS_MAX + 10 * CANDIDATES_MAX
    trials = Trials(read)
    assert trials.repair(Candidate(STRANGER, (STRANGER,))) is None
    assert trials.used <= TRIALS_EACH


# ---- what else is told


def test_ids_references_and_the_words_of_a_forward() -> None:
    found = read_complaint(b"id K7Q2M9XA.1, id K7Q2M9XA.1 and K7Q2M9XB.12; 550 5.7.1 no [K7Q2M9XD-1] K7Q2M9XU.1")
    assert found.ids == ("K7Q2M9XA.1", "K7Q2M9XB.12")
    assert found.references == ("K7Q2M9XD-1",)
    assert not found.forwarded
    for words in ("---------- Forwarded message ---------", "Begin forwarded message:", "-----Original Message-----"):
        assert read_complaint(f"Hello\n> {words}\nFrom: a\n".encode()).forwarded


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Thu, 26 Nov 2026 10:15:12 +0000", SECONDS),
        ("Thu, 26 Nov 2026 02:15:12 -0800 (PST)", SECONDS),
        ("26 November 2026 10:15:12", SECONDS),
        ("26 Nov 2026 10:15", SECONDS - 12),
        ("30 Feb 2026 10:15:12 +0000", None),
        ("26 Foo 2026 10:15:12 +0000", None),
        ("1 Jan 0001 00:00:00 +9959", None),
        ("26 Nov 2026 25:15:12 +0000", None),
        ("", None),
    ],
)
def test_dates(text: str, seconds: int | None) -> None:
    assert date_seconds(text) == seconds


@given(st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31)))  # noqa: DTZ001
def test_a_date_is_read_as_it_was_written(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC, microsecond=0)
    assert date_seconds(format_datetime(aware)) == int(aware.timestamp())


# ---- hostile


def kept(found: Complaint) -> None:
    """Nothing that is kept exceeds its bound."""
    received = [one for section in found.sections for one in section.received]
    assert len(received) <= FIELDS_MAX
    assert len(found.loose) <= CANDIDATES_MAX
    assert max(len(found.ids), len(found.references)) <= IDS_MAX
    assert all(len(one.text) <= module.RECEIVED_MAX for one in received)


HOSTILE = st.one_of(
    st.binary(max_size=400),
    st.text(max_size=400).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from(
            [
                b"Received:", b"from ", b"by ", NAME.encode(), b" (Gatepost) ", b"id ", b"K7Q2M9XA.1", b"(token ",
                TOKEN.encode(), TOKEN[:40].encode(), b");", b"\r\n", b"\n\t", b"\n", b"\n\n", b"> ", b"| ", b"=\n",
                b"=3D", b"&lt;", b"<br>", b"<", b"--", b"Content-Type: message/rfc822", b"From: a", b"\0", b"\xff\xfe",
                b"Thu, 26 Nov 2026 10:15:12 +0000", "\u200b".encode(), b"[IPv6:", b"[1.2.3.4]", b" ",
                b"QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVpBQkNERUZHSElKS0xNTk9QUVJTVFVWV1hZWg==\n",
            ]
        ),
        max_size=60,
    ).map(b"".join),
)  # fmt: skip


@given(HOSTILE)
@example(b"")
@example(b"\xff\xfe\x00")
@settings(max_examples=300)
def test_no_octets_raise(octets: bytes) -> None:
    found = read_complaint(octets)
    kept(found)
    for seal in judge(found, KEY.read, NAME).seals:
        assert KEY.read(seal.token) == seal.record


REPEATED = {
    "token": b"(token ",
    "token with letters": b"(token " + b"0O1l" * 30 + b") ",
    "Received": b"Received: ",
    "Received lines": b"Received: from a by b\n",
    "Received and empty lines": b"Received:\n\n\n",
    "sections": b"From: a\n\n",
    "letters": b"A",
    "base64": b"A" * 76 + b"\n",
    "quote marks": b"> ",
    "soft line ends": b"=\n",
    "angle brackets": b"<",
    "tags": b"<a ",
    "comments": b"<!-- ",
    "entities": b"&#",
    "escaped octets": b"=3D",
    "hyphens": b"----",
    "blanks": b" ",
    "line ends": b"\n",
    "ids": b"K7Q2M9XA.1 ",
    "references": b"[K7Q2M9XD-1] ",
    "dates": b"26 Nov 2026 ",
    "addresses": b"[1.",
    "zero width": "\u200b".encode(),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repetition_costs_no_more_than_its_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is looked at and called, not by time: twice the octets are at most about twice the work."""
    unit = REPEATED[name]

    def work(octets: int) -> int:
        calls = 0

        def counted(name: str) -> None:
            inner = getattr(module, name)

            def outer(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                return inner(*arguments, **options)

            patch.setattr(module, name, outer)

        with pytest.MonkeyPatch.context() as patch:
            for function in ("_candidate", "_received_extent", "_received", "_value", "_text", "_shown", "_begins"):
                counted(function)
            found = read_complaint(unit * (octets // len(unit)))
            judge(found, KEY.read, NAME)
        kept(found)
        assert found.characters <= octets + 10
        return calls

    half, whole = work(1 << 19), work(1 << 20)
    assert whole <= 2 * half + 10
    assert whole <= 2 * FIELDS_MAX + 2 * CANDIDATES_MAX + 1000


def test_base64_within_base64_ends() -> None:
    octets = f"(token {TOKEN})\nReceived: token gatepost".encode()
    for _ in range(module.DEPTH_MAX + 4):
        octets = b"Received:\n\n" + base64.encodebytes(octets)
    found = judged(octets)
    assert found.seals == (), "it lies too deep"


def test_many_attachments_end() -> None:
    one = complaint("outlook-attached.eml").partition(b"base64\n")[2].partition(b"--_004")[0]
    found = read_complaint(b"\n--x--\n".join([one] * (module.DOCUMENTS_MAX * 2)))
    kept(found)


def test_a_complaint_longer_than_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPLAINT_OCTETS_MAX", len(FIELD))
    assert marks(judged(FIELD + b"Subject: x\n")) == [Mark.OURS]
    assert judged(b" " * len(FIELD) + FIELD).lines == ()
    assert COMPLAINT_OCTETS_MAX == 50 << 20


def test_another_client_in_the_field_of_an_ipv6_session() -> None:
    one = SESSION._replace(client=SESSION.client._replace(address=ip_address("2001:db8::7")))
    field = trace_field(
        trace_head(one, NAME, utf8=False), "K7Q2M9XA.1", KEY.seal(one, SECONDS), "Thu, 26 Nov 2026 10:15:12 +0000"
    )
    found = judged(field)
    assert marks(found) == [Mark.OURS]
    assert found.seals[0].record.client == ip_address("2001:db8::7")
