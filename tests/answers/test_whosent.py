"""Who sent it: by the token, by the journal, by both, and where they contradict each other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.complaints.parts import CLIENT, KEY, KEY_BYTES, OTHER, SECONDS, SESSION, STRANGER, TOKEN, complaint
from tests.store.places import Place, entry, record, refused

from gatepost import config
from gatepost.answers import whosent
from gatepost.answers.whosent import BY_JOURNAL, IN_DOUBT, NOT_OURS, OURS
from gatepost.config import Config
from gatepost.errors import GatepostError, StorageError
from gatepost.facts import Session
from gatepost.gate.trace import TraceKey
from gatepost.smtp.path import ForwardPath, Mailbox, Shape
from gatepost.store import Entry
from gatepost.store.journal import Query

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"

[[listen]]
name = "submission"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[[trust]]
accounts = ["anna"]
why = "staff"
owner = "it@example.com"

[[trust]]
network = "198.51.100.0/24"
forward_paths = ["*@partner.example"]
why = "the branch office"
owner = "branch@example.com"

[backend.mailbox]
address = "embedded:"
"""
TRUST_LINE = CONFIG.split("\n").index("[[trust]]") + 1
NOW_S = SECONDS + 3600.0
MESSAGE_ID = "<20261126.4711@laptop.example.com>"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "gatepost.toml").write_text(CONFIG)
    (tmp_path / "data" / "keys").mkdir(parents=True)
    (tmp_path / "data" / "keys" / "trace.key").write_bytes(KEY_BYTES)
    place = Place(tmp_path / "data")
    yield place
    place.close()


def loaded(place: Place, text: str = CONFIG) -> Config:
    path = place.directory.parent / "gatepost.toml"
    return config.load(text.encode(), str(path))


@pytest.fixture
def ask(place: Place) -> Callable[..., dict[str, Any]]:
    def asked(name: str | bytes, text: str = CONFIG, kind: str = "") -> dict[str, Any]:
        octets = name if isinstance(name, bytes) else complaint(name)
        told = whosent.answer(loaded(place, text), octets, NOW_S, kind)
        json.dumps(told)  # it is made of JSON's own types
        return told

    return asked


def to(address: str) -> ForwardPath:
    local, _, domain = address.partition("@")
    return ForwardPath(Mailbox(local, domain), Shape.PLAIN)


def sent(message: str = "K7Q2M9XA.1", address: str = "carol@victim.example", **changes: Any) -> Entry:
    base = entry(
        at=SECONDS + 1.0, message=message, message_id=MESSAGE_ID, forward_path=to(address), by="gatepost.toml:12",
        reverse_path=Mailbox("anna", "example.com"),
    )  # fmt: skip
    return base._replace(**changes)


# ---- the token alone


@pytest.mark.parametrize("name", ["message.eml", "outlook-attached.eml", "arf.eml", "screenshot.txt", "six-forged.eml"])
def test_the_token_answers_where_the_journal_has_nothing(ask, name) -> None:
    told = ask(name)
    assert (told["verdict"], told["account"], told["client"]) == (OURS, "anna", str(CLIENT))
    assert (told["time"], told["session"], told["message"]) == (
        "2026-11-26T10:15:12.000Z", "K7Q2M9XA", "K7Q2M9XA.1",
    )  # fmt: skip
    assert told["proof"]["token"] == TOKEN
    assert told["proof"]["key"] == "trace.key"
    assert told["proof"]["in_received"]
    assert any("is empty: the token alone answers" in note for note in told["notes"])
    assert told["day"] is None


def test_who_lets_it_through_and_who_owns_that_is_told(ask) -> None:
    trust = ask("message.eml")["trust"]
    assert [(one["verdict"], one["rule"], one["why"], one["owner"]) for one in trust] == [
        ("may", "[[trust]] accounts anna", "staff", "it@example.com"),
        ("may", "[[trust]] network 198.51.100.0/24", "the branch office", "branch@example.com"),
    ]
    assert trust[0]["where"].endswith(f"gatepost.toml:{TRUST_LINE}")


def test_an_entry_that_has_expired_is_told_as_one(ask) -> None:
    text = CONFIG.replace('why = "staff"', 'why = "staff"\nexpires = 2026-11-01')
    assert [one["verdict"] for one in ask("message.eml", text)["trust"]] == ["expired", "may"]


def test_a_journal_that_cannot_be_read_is_a_note(ask, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr("gatepost.answers.records.Journal", broken)
    told = ask("message.eml")
    assert told["verdict"] == OURS
    assert "the journal was not asked: the disk is gone" in told["notes"]
    assert ask("forged.eml")["verdict"] == NOT_OURS


def test_a_journal_that_breaks_in_the_middle_is_a_note(ask, place, monkeypatch) -> None:
    place.keep(record([sent()], SESSION))

    def broken(*_: object) -> None:
        raise StorageError("the database went away")

    monkeypatch.setattr("gatepost.store.journal.Journal.count", broken)
    told = ask("message.eml")
    assert (told["verdict"], told["day"]) == (OURS, None)
    assert "the journal was not asked: the database went away" in told["notes"]


def test_old_keys_still_read(ask, place) -> None:
    (place.directory / "keys" / "trace-2.key").write_bytes(bytes(64))
    told = ask("message.eml")
    assert told["verdict"] == OURS
    assert told["proof"]["key"] == "trace.key"
    assert told["proof"]["key_retired"] is not None


@pytest.mark.parametrize(("after_s", "verdict"), [(-86_401, IN_DOUBT), (-86_400, OURS), (0, OURS), (86_400, OURS)])
def test_a_token_of_a_key_that_was_out_of_use_by_then_may_be_that_of_a_thief(ask, place, after_s, verdict) -> None:
    """A day is for a gate that was not reloaded at once."""
    newer = place.directory / "keys" / "trace-2.key"
    newer.write_bytes(bytes(64))
    os.utime(newer, (SECONDS + after_s, SECONDS + after_s))
    told = ask("message.eml")
    assert told["verdict"] == verdict
    if verdict == IN_DOUBT:
        assert told["doubts"][0].startswith("its key trace.key had been replaced on 2026-11-25 ")
        assert told["why"] == "the token was sealed with a key of this gate that was out of use by then"
        place.keep(record([sent()], SESSION))
        assert ask("message.eml")["verdict"] == OURS, "the journal knows better"


def test_a_key_that_cannot_be_used_is_a_note(ask, place) -> None:
    (place.directory / "keys" / "trace-2.key").write_bytes(b"short")
    told = ask("message.eml")
    assert told["verdict"] == OURS
    assert any(note.startswith("the key trace-2.key cannot be used: ") for note in told["notes"])


def test_without_any_key_nobody_can_tell(ask, place) -> None:
    (place.directory / "keys" / "trace.key").unlink()
    with pytest.raises(GatepostError, match=r"there is no key that can be used in .*, so that nobody can tell"):
        ask("message.eml")


def test_without_any_key_the_journal_may_still_know(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    (place.directory / "keys" / "trace.key").unlink()
    assert ask("message.eml")["verdict"] == BY_JOURNAL


def test_a_token_outside_of_a_field_is_told_as_one(ask) -> None:
    told = ask(f"Is this yours? (token {TOKEN})".encode())
    assert (told["verdict"], told["message"]) == (OURS, None)
    assert not told["proof"]["in_received"]
    assert told["doubts"] == ["the token stands in no Received field: whoever has seen one may have put it there"]


def test_a_token_in_the_body_under_a_header_section_without_our_field_is_no_yes(ask) -> None:
    header = b"Received: from evil.test by mail.victim.example; Thu, 26 Nov 2026 10:15:14 +0000\nSubject: x\n\n"
    told = ask(header + f"(token {TOKEN})".encode())
    assert (told["verdict"], told["account"]) == (IN_DOUBT, "anna")


def test_a_true_line_below_one_that_cannot_be_verified_is_no_yes(ask) -> None:
    ours = b"Received: " + complaint("message.eml").partition(b"Received: ")[2].partition(b"Received: ")[2]
    claims = (
        b"Received: from a.test by mx.example.com (Gatepost) with ESMTP id K7Q2M9XA.1; 26 Nov 2026 10:15:12 +0000\n"
    )
    assert ask(ours)["verdict"] == OURS
    told = ask(claims + ours)
    assert (told["verdict"], told["account"]) == (IN_DOUBT, "anna")
    assert told["doubts"] == ["a line above it claims to be ours, and cannot be verified: the token may be copied"]


def test_a_complaint_that_a_stranger_sent_through_this_gate(ask) -> None:
    told = ask("through-us.eml")
    assert (told["verdict"], told["reason"]) == (NOT_OURS, "complaint_only")
    assert "sent by the client 192.0.2.44; if it is the message complained of, say so: --kind message" in str(told)
    told = ask("through-us.eml", kind="message")
    assert (told["verdict"], told["account"], told["client"]) == (OURS, None, "192.0.2.44")
    inner = complaint("through-us.eml") + b"\n" + complaint("message.eml")
    assert (ask(inner)["verdict"], ask(inner)["account"]) == (OURS, "anna")


@pytest.mark.parametrize("client", ["", "198.51.100.7"])
def test_a_message_of_ours_with_another_in_it_may_be_a_complaint(ask, client) -> None:
    """Whoever may send elsewhere can write what looks like a forwarded message into its mail."""
    sender = SESSION if not client else session(client)
    outer = complaint("through-us.eml").decode().replace("7ABCDEFG", "K7Q2M9XA")
    outer = re.sub(r"\(token \S+\)", f"(token {KEY.seal(sender, SECONDS + 3600)})", outer)
    outer = outer.replace("192.0.2.44", str(sender.client.address))
    told = ask(outer.encode())
    assert (told["verdict"], told["account"], told["client"]) == (
        IN_DOUBT, None if client else "anna", str(sender.client.address),
    )  # fmt: skip
    assert "it is taken for the message complained of" in told["doubts"][0]
    assert ask(outer.encode(), kind="message")["verdict"] == OURS
    assert ask(outer.encode(), kind="complaint")["verdict"] == NOT_OURS
    copied = outer + "\n\n" + complaint("message.eml").decode().replace(TOKEN, KEY.seal(SESSION, SECONDS))
    told = ask(copied.encode())
    assert (told["verdict"], told["account"]) == (IN_DOUBT, "anna")
    assert "say which it is: --kind complaint or --kind message" in told["doubts"][0]
    assert ask(copied.encode(), kind="complaint")["verdict"] == OURS


def test_a_copy_within_a_message_that_did_not_pass_here_is_no_yes(ask) -> None:
    outer = b"From: Carol <carol@victim.example>\nSubject: Fwd: x\n\nLook:\n\n"
    evil = b"Received: from evil.test by mail.victim.example\nFrom: evil@evil.test\nSubject: x\n\nbody\n\n"
    told = ask(outer + evil + complaint("message.eml"))
    assert (told["verdict"], told["account"]) == (IN_DOUBT, "anna")
    assert told["doubts"] == ["it stands within another message, which has no field of ours: give the true one alone"]


def test_a_repair_is_told(ask) -> None:
    told = ask("screenshot.txt")
    assert told["proof"]["repaired"] == 1
    assert told["proof"]["trials"] > 0
    assert "the token was misread in 1 place and was repaired; what it says is proven all the same" in told["notes"]


def test_an_earlier_pass_is_told_behind_the_last(ask) -> None:
    earlier = complaint("message.eml").decode().partition("Received: from laptop")[2].partition("From:")[0]
    earlier = f"Received: from laptop{earlier}".replace(TOKEN, OTHER).replace(str(CLIENT), "198.51.100.99")
    earlier = earlier.replace("K7Q2M9XA.1", "M3N4P5R6.1").replace("26 Nov", "25 Nov")
    whole = complaint("message.eml").decode().replace("From: ", earlier + "From: ", 1)
    told = ask(whole.encode())
    assert told["account"] == "anna"
    assert [(one["session"], one["account"]) for one in told["passes"]] == [("M3N4P5R6", "bert")]


# ---- with the journal


def test_the_journal_adds_the_listener_the_device_and_the_recipients(ask, place) -> None:
    place.keep(record([sent(), sent(address="dave@victim.example")], SESSION, ended=True))
    told = ask("message.eml")
    assert (told["verdict"], told["doubts"], told["notes"]) == (OURS, [], [])
    assert {name: told[name] for name in ("listen", "role", "helo", "tls", "device", "mechanism", "message_id")} == {
        "listen": "submission", "role": "submission", "helo": "laptop.example.com", "tls": "TLSv1.3",
        "device": "laptop", "mechanism": "PLAIN", "message_id": MESSAGE_ID,
    }  # fmt: skip
    assert sorted(one["forward_path"] for one in told["deliveries"]) == ["carol@victim.example", "dave@victim.example"]
    assert told["trust_then"] == ["gatepost.toml:12"]
    assert [(one["verdict"], one["rule"]) for one in told["trust"]] == [("admit", "[[trust]] accounts anna")]


def test_what_would_no_longer_pass_says_so(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    told = ask("message.eml", CONFIG.replace('["anna"]', '["bert"]'))
    assert [(one["verdict"], one["reason"]) for one in told["trust"]] == [("refuse", "narrowed")]


def test_mail_for_us_needed_no_trust(ask, place) -> None:
    stranger = SESSION._replace(identity=None, listen="mx", role="mx")
    place.keep(record([sent(address="bob@example.com")], stranger))
    octets = complaint("message.eml").decode().replace(TOKEN, KEY.seal(stranger, SECONDS)).encode()
    told = ask(octets)
    assert (told["account"], told["client"]) == (None, str(CLIENT))
    assert [(one["verdict"], one["rule"]) for one in told["trust"]] == [("admit", "[domains] local example.com")]
    assert "It came to us from elsewhere" in told["reply"]


def test_what_else_was_sent_that_day(ask, place) -> None:
    day = SECONDS // 86400 * 86400
    others = [
        sent(f"K7Q2M9XA.{number}", f"r{number}@victim.example", at=SECONDS + number, message_id=f"<{number}@x.test>")
        for number in range(2, 62)
    ]
    many = [sent("K7Q2M9XA.99", f"m{number}@victim.example", at=SECONDS + 99.0) for number in range(12)]
    elsewhere = SESSION._replace(reference="B2B2B2B2", client=SESSION.client._replace(address=ip_address("192.0.2.9")))
    place.keep(
        record([sent(), *others, *many], SESSION),
        record([sent("B2B2B2B2.1", at=day + 1.0)], elsewhere),
        record([sent("B2B2B2B2.2", at=day - 1.0), sent("B2B2B2B2.3", at=day + 86400.0)], elsewhere),
        record([refused("K7Q2M9XA-1", at=SECONDS + 5.0)], SESSION),
        record([sent("C3C3C3C3.1")], SESSION._replace(reference="C3C3C3C3", identity=None)),
    )
    day_told = ask("message.eml")["day"]
    assert {name: day_told[name] for name in ("by", "date", "messages", "more", "recipients", "refused")} == {
        "by": "account", "date": "2026-11-26", "messages": 62, "more": False, "recipients": 73, "refused": 1,
    }  # fmt: skip
    assert len(day_told["shown"]) == whosent.SHOWN_MAX
    newest = day_told["shown"][0]
    assert (newest["message"], newest["recipients"], len(newest["forward_paths"])) == ("K7Q2M9XA.99", 12, 10)


def test_the_day_of_a_client_without_a_login(ask, place) -> None:
    stranger = SESSION._replace(identity=None)
    again = stranger._replace(reference="B2B2B2B2")
    place.keep(record([sent()], stranger), record([sent("B2B2B2B2.1")], again))
    octets = complaint("message.eml").decode().replace(TOKEN, KEY.seal(stranger, SECONDS)).encode()
    day = ask(octets)["day"]
    assert (day["by"], day["messages"], day["shown"][0]["message"]) == ("client", 1, "B2B2B2B2.1")


def test_a_day_before_the_journal_begins_is_not_told(ask, place) -> None:
    place.keep(record([sent("B2B2B2B2.1", at=SECONDS + 86400.0)], SESSION._replace(reference="B2B2B2B2")))
    told = ask("message.eml")
    assert told["day"] is None
    assert any("after the message: the token alone answers" in note for note in told["notes"])


def test_a_copied_token_is_found_out_by_the_message_id(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    told = ask("copied.eml")
    assert told["verdict"] == IN_DOUBT
    assert told["account"] == "anna", "whose message the token was copied from"
    assert told["doubts"] == [
        f"its Message-ID is <made-up@evil.test>, and that of the message K7Q2M9XA.1 was {MESSAGE_ID}",
        (
            "it names dave@victim.example, and the message K7Q2M9XA.1 went to carol@victim.example: it was forwarded, "
            "or the token is copied"
        ),
    ]
    assert "parts of it do not agree with what we know" in told["reply"]


def test_a_copied_token_cannot_be_found_out_without_the_journal(ask) -> None:
    assert ask("copied.eml")["verdict"] == OURS


def test_another_recipient_is_a_doubt_and_no_more(ask, place) -> None:
    place.keep(record([sent(address="list@lists.example")], SESSION))
    told = ask("message.eml")
    assert told["verdict"] == OURS
    assert [doubt.partition(",")[0] for doubt in told["doubts"]] == ["it names carol@victim.example"]


def test_an_id_that_the_session_never_had_is_a_doubt(ask, place) -> None:
    place.keep(record([sent("K7Q2M9XA.2"), sent("K7Q2M9XA.3")], SESSION))
    told = ask("message.eml")
    assert (told["verdict"], told["message"]) == (OURS, None)
    assert told["doubts"] == [
        "the journal has no message K7Q2M9XA.1 in this session, but K7Q2M9XA.2, K7Q2M9XA.3: the id may be made up"
    ]


def test_a_session_with_one_message_needs_no_id(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    assert ask(f"(token {TOKEN})".encode())["message"] == "K7Q2M9XA.1"


def test_another_session_under_the_same_reference_is_left_out(ask, place) -> None:
    elsewhere = SESSION._replace(client=SESSION.client._replace(address=ip_address("192.0.2.9")), identity=None)
    place.keep(record([sent()], elsewhere))
    told = ask("message.eml")
    assert (told["verdict"], told["account"], told["deliveries"]) == (OURS, "anna", [])
    assert any("another session under the reference K7Q2M9XA" in note for note in told["notes"])


def test_pseudonyms_of_old_entries_do_not_hide_what_the_token_says(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    writer = place.writer(now_s=SECONDS + 86400.0 * 60, keep_s=86400.0)
    while writer.tidy():
        pass
    (kept,) = place.journal().search(Query(session="K7Q2M9XA"), 5)
    assert kept.pseudonymous
    told = ask("message.eml")
    assert (told["verdict"], told["account"], told["client"], told["doubts"]) == (OURS, "anna", str(CLIENT), [])
    assert ask("copied.eml")["verdict"] == IN_DOUBT
    only = ask(complaint("cut-short.txt"))
    assert only["verdict"] == BY_JOURNAL
    assert only["account"] != "anna"
    assert only["client"].startswith("p-")


def test_a_long_account_is_told_whole_where_the_journal_knows_it(ask, place) -> None:
    assert SESSION.identity is not None
    name = "a" * 70 + "@example.com"
    long = SESSION._replace(identity=SESSION.identity._replace(account=name))
    place.keep(record([sent()], long))
    octets = complaint("message.eml").decode().replace(TOKEN, KEY.seal(long, SECONDS)).encode()
    assert ask(octets)["account"] == name


# ---- by the journal only


def test_a_token_cut_short_is_made_up_for_by_the_journal(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    told = ask("cut-short.txt")
    assert (told["verdict"], told["account"], told["message"], told["proof"]) == (
        BY_JOURNAL, "anna", "K7Q2M9XA.1", None,
    )  # fmt: skip
    assert told["why"] == "what is written beside the id agrees with the journal"


def test_the_id_and_the_message_id_together(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    told = ask(f"Your id K7Q2M9XA.1\n\nFrom: anna@example.com\nMessage-ID: {MESSAGE_ID}\n".encode())
    assert told["verdict"] == BY_JOURNAL
    assert told["why"] == "its id and its Message-ID are those of one message in the journal"


def test_the_message_id_alone(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    octets = f"From: anna@example.com\nTo: carol@victim.example\nMessage-ID: {MESSAGE_ID}\n\nhello".encode()
    told = ask(octets)
    assert told["verdict"] == BY_JOURNAL
    assert told["doubts"] == ["no token proves it: whoever has seen the message may have written its Message-ID"]
    elsewhere = b"Received: from a.test by b.test; Thu, 26 Nov 2026 10:15:12 +0000\n"
    assert ask(elsewhere + octets)["verdict"] == IN_DOUBT, "a whole header section without our field"


def test_an_id_alone_proves_nothing(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    assert ask(b"Look at K7Q2M9XA.1, it is yours!")["verdict"] == IN_DOUBT
    assert ask(b"Look at K7Q2M9XA.2, it is yours!")["verdict"] == NOT_OURS


def test_a_made_up_token_beside_an_id_that_is_true_is_no_yes(ask, place) -> None:
    place.keep(record([sent()], SESSION))
    assert ask("forged.eml")["verdict"] == IN_DOUBT
    wrong_client = complaint("forged.eml").replace(str(CLIENT).encode(), b"192.0.2.1")
    assert ask(wrong_client)["verdict"] == NOT_OURS
    wrong_date = complaint("forged.eml").replace(b"10:15:12", b"12:15:12")
    assert ask(wrong_date)["verdict"] == NOT_OURS


# ---- not ours


@pytest.mark.parametrize(
    ("name", "reason", "why"),
    [
        ("forged.eml", "forged", "a Received field claims to be ours, and is not; a token whose key was removed"),
        ("cut-short.txt", "damaged", "its token is not all there: ask for all header fields"),
        ("another-gate.eml", "other_gate", "it passed another gate, mx.neighbour.example, whose operator can tell"),
        ("no-trace.txt", "no_header", "it holds no Received field: ask for the message"),
        ("through-us.eml", "complaint_only", "the only token of ours in it is that of the complaint itself"),
        (b"(token abcdefghijkl)", "damaged", "something like a token"),
        (b"Received: from a by b; 26 Nov 2026 10:15:12\n", "no_token", "its only Received field is not by mx.example"),
        (b"Received: from a by b\nReceived: from c by d\n", "no_token", "none of its 2 Received fields is by mx."),
        (b"", "no_header", "it holds no Received field"),
    ],
)  # fmt: skip
def test_not_ours_has_a_reason(ask, name, reason, why) -> None:
    told = ask(name)
    assert (told["verdict"], told["reason"]) == (NOT_OURS, reason)
    assert why in told["why"]
    assert (told["account"], told["client"], told["trust"], told["day"]) == (None, None, [], None)


def test_what_was_refused_here_did_not_leave(ask, place) -> None:
    place.keep(record([refused("K7Q2M9XA-1", at=SECONDS + 5.0)], SESSION))
    told = ask(b"I got this: 550 5.7.1 Relaying is prohibited [K7Q2M9XA-1]")
    assert (told["verdict"], told["reason"]) == (NOT_OURS, "refused")
    assert "gatepost explain K7Q2M9XA-1" in told["why"]
    assert ask(b"I got this: 550 5.7.1 Relaying is prohibited [K7Q2M9XA-2]")["reason"] == "no_header"


def test_both_objects_have_the_same_members(ask) -> None:
    assert ask("message.eml").keys() == ask("no-trace.txt").keys()


# ---- the reply


def session(client: str) -> Session:
    return SESSION._replace(identity=None, client=SESSION.client._replace(address=ip_address(client)))


@pytest.mark.parametrize(
    "name",
    ["message.eml", "arf.eml", "gmail-forward.eml", "copied.eml", "forged.eml", "cut-short.txt", "through-us.eml"],
)
@pytest.mark.parametrize("known", [False, True])
def test_the_draft_tells_nothing_of_ours(ask, place, name, known) -> None:
    if known:
        place.keep(record([sent()], SESSION))
    told = ask(name)
    reply = told["reply"]
    assert "anna" not in reply
    assert str(CLIENT) not in reply
    assert "it@example.com" not in reply
    assert TOKEN not in reply
    assert "laptop" not in reply
    assert max(map(len, reply.split("\n"))) <= 80
    if told["verdict"] == OURS:
        assert "Our reference: K7Q2M9XA.1" in reply
        assert "2026-11-26 10:15:12 UTC" in reply


def test_the_draft_is_addressed_to_whoever_complained(ask) -> None:
    assert ask("gmail-forward.eml")["reply"].startswith(
        "To: carol@victim.example\nSubject: Re: Fwd: Your invoice 4711\n\nHello,\n"
    )
    assert ask("arf.eml")["reply"].startswith("To: abusedesk@provider.example\n")
    assert ask("screenshot.txt")["reply"].startswith("To: (whoever complained)\nSubject: Re: Your complaint\n")


def test_a_hostile_subject_stays_one_printable_line(ask) -> None:
    octets = complaint("arf.eml").replace(b"Subject: FW: Your", "Subject: \x1b[31m\u202e FW: Your".encode())
    subject = ask(octets)["reply"].split("\n")[1]
    assert subject.isprintable()
    assert "\\x1b[31m" in subject


def test_a_client_with_trust_is_told_from_a_stranger(ask) -> None:
    network = CONFIG.replace("[[trust]]\naccounts", '[[trust]]\nnetwork = "10.1.0.0/16"\n#').replace(
        "198.51.100.0/24", "10.2.0.0/16"
    )
    inside = complaint("message.eml").decode().replace(str(CLIENT), "10.1.0.5")
    octets = inside.replace(TOKEN, KEY.seal(session("10.1.0.5"), SECONDS)).encode()
    assert "It was sent by a computer that may send through us" in ask(octets, network)["reply"]
    outside = complaint("message.eml").decode().replace(TOKEN, KEY.seal(session(str(CLIENT)), SECONDS)).encode()
    assert "It came to us from elsewhere" in ask(outside, network)["reply"]


# ---- hostile


@pytest.mark.parametrize(
    "octets",
    [
        b"\xff" * 100, b"\0" * 100, complaint("message.eml") * 300, b"[K7Q2M9XD-1] " * 5000, b"K7Q2M9XA.1 " * 5000,
        f"Message-ID: <{'a' * 400}\0@x>\n\nhello".encode(), f"(token {STRANGER})\n".encode() * 500,
    ],
)  # fmt: skip
def test_hostile_octets_are_answered(ask, place, octets) -> None:
    place.keep(record([sent()], SESSION))
    assert ask(octets)["verdict"] in (OURS, NOT_OURS, IN_DOUBT)


def test_what_lies_behind_the_limit_is_not_looked_at_and_that_is_said(ask, monkeypatch) -> None:
    monkeypatch.setattr(whosent, "COMPLAINT_OCTETS_MAX", 1 << 20)
    assert "only the first 1 MiB were looked at" in ask(b" " * (1 << 20) + b"x")["notes"]
    assert ask(b" " * (1 << 20))["notes"] == []


def test_another_gates_key_is_not_ours(ask) -> None:
    token = TraceKey(b"x" * 64).seal(SESSION, SECONDS)
    assert ask(complaint("message.eml").replace(TOKEN.encode(), token.encode()))["reason"] == "forged"
