"""The server's engine: its table, its questions, its framing; whole, octet by octet and with a tail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import cycle

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gatepost.smtp import server
from gatepost.smtp.command import (
    AUTH_OCTETS_MAX,
    COMMAND_OCTETS_MAX,
    Auth,
    Hello,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Rset,
    StartTls,
    Xclient,
)
from gatepost.smtp.content import ContentLimits, Defect
from gatepost.smtp.reply import Reply
from gatepost.smtp.server import (
    FLOOD_OCTETS,
    NEED_DATA,
    PAUSED,
    AuthResponse,
    ChunkEnded,
    ContentChunk,
    ContentEnded,
    Event,
    Refused,
    ServerEngine,
    Signal,
    State,
)

OFFERED = frozenset({"PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "CHUNKING", "STARTTLS", "AUTH", "EXPN", "XCLIENT"})
LIMITS = ContentLimits(message_size_octets=1000, content_line_octets=100, header_section_octets=500, received_fields=3)
NORMALISE = LIMITS._replace(normalise=True)

OK = Reply(250, "OK", "2.0.0")
GO_AHEAD = Reply(354, "Go ahead")
CHALLENGE = Reply(334, "")
NO = Reply(550, "No", "5.7.1")
LATER = Reply(451, "Later", "4.3.0")

HELLO = b"EHLO client.test\r\n"
MAIL = b"MAIL FROM:<a@sender.test>\r\n"
RCPT = b"RCPT TO:<bob@example.com>\r\n"
TRANSACTION = HELLO + MAIL + RCPT


def codes(octets: bytes) -> list[int]:
    """The code of each reply."""
    return [int(code) for code in re.findall(rb"^(\d{3})(?: |\r)", octets, re.MULTILINE)]


def converse(engine: ServerEngine, pieces: Iterable[bytes], answers: Iterator[Reply]) -> tuple[list[Event], bytes]:
    """All events of these octets, each question answered at once, and all that was said."""
    events: list[Event] = []
    said = b""
    for piece in pieces:
        engine.receive(piece)
        while (event := engine.next_event()) is not NEED_DATA:
            assert not isinstance(event, Signal), "every question was answered"
            events.append(event)
            if isinstance(event, ContentChunk | Refused):
                assert engine.question is None
            else:
                assert engine.question is event
                assert engine.next_event() is PAUSED
                engine.respond(next(answers))
        said += engine.data_to_send()
    return events, said


def splits(octets: bytes) -> dict[str, list[bytes]]:
    """Whole, octet by octet, in pieces, and with a tail that comes later."""
    return {
        "whole": [octets],
        "octet by octet": [octets[at : at + 1] for at in range(len(octets))],
        "in sevens": [octets[at : at + 7] for at in range(0, len(octets), 7)],
        "with a tail": [octets[:-3], octets[-3:]],
    }


DEFECTS = {defect.reply for defect in Defect}
_DEFECTS = re.compile(b"|".join(re.escape(reply.octets()) for reply in DEFECTS))


def joined(events: list[Event]) -> list[object]:
    """The events as far as they do not depend on how the octets came; an event equal to another has its type beside."""
    out: list[object] = []
    content = b""
    for event in events:
        match event:
            case ContentChunk(octets):
                content += octets
                continue
            case ContentEnded() | ChunkEnded():
                out += [type(event), "has a defect"] if event.defect else [type(event), content, event]
            case Refused(reply, fatal) if reply in DEFECTS:
                out += [Refused, "has a defect", fatal]
            case _:
                out += [type(event), event]
        content = b""
    return out


def dialogue(
    octets: bytes, *, limits: ContentLimits = LIMITS, answers: Iterable[Reply] = (OK,)
) -> tuple[ServerEngine, list[Event], bytes]:
    """The octets in every split: the same events, replies and state; those of the whole are returned."""
    first: tuple[ServerEngine, list[Event], bytes] | None = None
    for name, pieces in splits(octets).items():
        engine = ServerEngine(OFFERED, limits)
        events, said = converse(engine, pieces, cycle(answers))
        if first is None:
            first = engine, events, said
        assert joined(events) == joined(first[1]), name
        assert _DEFECTS.sub(b"(defect)", said) == _DEFECTS.sub(b"(defect)", first[2]), name
        assert engine.state is first[0].state, name
    assert first is not None
    return first


def engine_in(state: State, limits: ContentLimits = LIMITS) -> ServerEngine:
    """An engine that was led there by a dialogue."""
    ways = {
        State.START: b"",
        State.READY: HELLO,
        State.MAIL: HELLO + MAIL,
        State.RCPT: TRANSACTION,
        State.CONTENT: TRANSACTION + b"DATA\r\n",
        State.CHUNK: TRANSACTION + b"BDAT 5\r\n",
        State.CHUNKED: TRANSACTION + b"BDAT 5\r\na:b\r\n",
        State.AUTH: HELLO + b"AUTH PLAIN\r\n",
        State.XCLIENT: b"XCLIENT ADDR=192.0.2.1\r\n",
        State.TLS: HELLO + b"STARTTLS\r\n",
        State.CLOSED: b"QUIT\r\n",
    }
    engine = ServerEngine(OFFERED, limits)
    converse(engine, [ways[state]], cycle([OK, CHALLENGE] if state is State.AUTH else [OK]))
    assert engine.state is state
    return engine


# ---- the table.  RFC 5321 §4.1.4

# In which state which command: digits are the engine's own refusal; "=" is asked and stays; a state is asked, and
# reached by a positive answer.
TABLE = """
                                        START   READY   MAIL    RCPT    CHUNKED
EHLO client.test                        READY   READY   READY   READY   READY
HELO client.test                        READY   READY   READY   READY   READY
MAIL FROM:<>                            503     MAIL    503     503     503
RCPT TO:<bob@example.com>               503     503     RCPT    =       503
DATA                                    503     503     554     CONTENT 503
BDAT 0                                  503     503     554     CHUNKED CHUNKED
BDAT 0 LAST                             503     503     554     READY   READY
RSET                                    =       =       READY   READY   READY
NOOP                                    =       =       =       =       =
HELP                                    =       =       =       =       =
VRFY bob                                =       =       =       =       =
EXPN list                               =       =       =       =       =
STARTTLS                                503     TLS     503     503     503
AUTH PLAIN                              503     =       503     503     503
QUIT                                    CLOSED  CLOSED  CLOSED  CLOSED  CLOSED
BOGUS                                   500     500     500     500     500
MAIL FROM:nobody@@x                     501     501     501     501     501
RCPT TO:<>                              501     501     501     501     501
XCLIENT ADDR=1.2.3.4                    XCLIENT XCLIENT 503     503     503
XCLIENT ADDR=1.2.3                      501     501     501     501     501
XFORWARD ADDR=1.2.3.4                   502     502     502     502     502
"""


def cells() -> Iterator[tuple[State, str, str]]:
    heading, *rows = [line for line in TABLE.splitlines() if line]
    states = [State[name] for name in heading.split()]
    for row in rows:
        command = row[:40].strip()
        yield from zip(states, [command] * len(states), row[40:].split(), strict=True)


@pytest.mark.parametrize(
    ("state", "command", "cell"), list(cells()), ids=lambda value: getattr(value, "name", str(value))
)
def test_each_command_in_each_state(state: State, command: str, cell: str) -> None:
    octets = command.encode() + b"\r\n"
    engine = engine_in(state)
    engine.receive(octets)
    event = engine.next_event()
    if cell.isdigit():
        assert isinstance(event, Refused)
        assert (event.reply.code, event.fatal) == (int(cell), False)
        assert engine.question is None
        assert engine.state is state
        assert codes(engine.data_to_send()) == [int(cell)]
        return
    assert engine.data_to_send() == b"", "no answer before ours"
    if command.startswith("BDAT"):
        assert isinstance(event, ContentEnded if "LAST" in command else ChunkEnded)
        assert engine.state is State.CHUNK
    else:
        assert engine.state is state, "a question changes nothing"
    engine.respond(OK)
    assert engine.state is (state if cell == "=" else State[cell])
    assert codes(engine.data_to_send()) == [250]


@pytest.mark.parametrize("reply", [NO, LATER, Reply(421, "bye", "4.3.0")], ids=["550", "451", "421"])
@pytest.mark.parametrize(
    ("state", "command"), [(s, c) for s, c, cell in cells() if not cell.isdigit() and not c.startswith("BDAT")]
)
def test_only_a_positive_reply_moves_the_state(state: State, command: str, reply: Reply) -> None:
    engine = engine_in(state)
    engine.receive(command.encode() + b"\r\n")
    engine.next_event()
    engine.respond(reply)
    assert engine.state is state
    assert engine.next_event() is NEED_DATA
    assert engine.data_to_send() == reply.octets()


def test_the_refusal_says_what_was_missing() -> None:
    for octets, text in (
        (MAIL, b"503 5.5.1 Say EHLO or HELO first"),
        (HELLO + RCPT, b"503 5.5.1 MAIL first"),
        (HELLO + b"DATA\r\n", b"503 5.5.1 MAIL first"),
        (HELLO + MAIL + b"DATA\r\n", b"554 5.5.1 No valid recipients"),
        (HELLO + MAIL + MAIL, b"503 5.5.1 Not now: a transaction is open"),
    ):
        assert dialogue(octets)[2].rstrip(b"\r\n").endswith(text)


@pytest.mark.parametrize("reply", [OK, NO, LATER])
@pytest.mark.parametrize("octets", [b"DATA\r\nx\r\n.\r\n", b"BDAT 3 LAST\r\nx\r\n", b"BDAT 3\r\nx\r\nBDAT 0 LAST\r\n"])
def test_after_content_the_transaction_is_over_whatever_the_answer(octets: bytes, reply: Reply) -> None:
    chunk_answers = [OK] * octets.count(b"BDAT 3\r\n")
    data_answers = [GO_AHEAD] * octets.count(b"DATA")
    engine, events, _ = dialogue(TRANSACTION + octets, answers=[OK, OK, OK, *chunk_answers, *data_answers, reply])
    assert isinstance(events[-1], ContentEnded)
    assert engine.state is State.READY


def test_a_new_hello_forgets_the_transaction_and_its_chunks() -> None:
    for octets in (b"", b"BDAT 3\r\nA\r\n"):
        for again in (HELLO, b"RSET\r\n"):
            _, _, said = dialogue(TRANSACTION + octets + again + b"BDAT 3 LAST\r\nB\r\nDATA\r\n" + RCPT)
            assert codes(said)[-3:] == [503, 503, 503]


# ---- one question at a time


def test_nothing_is_said_or_read_while_a_question_is_open() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    engine.receive(HELLO + b"NOOP\r\nQUIT\r\n")
    first = engine.next_event()
    assert isinstance(first, Hello)
    for _ in range(3):
        assert engine.next_event() is PAUSED
    engine.receive(b"NOOP\r\n")
    assert engine.next_event() is PAUSED
    assert engine.unread_octets == len(b"NOOP\r\nQUIT\r\nNOOP\r\n")
    assert engine.data_to_send() == b""
    engine.respond(OK)
    assert isinstance(engine.next_event(), Noop)
    assert engine.next_event() is PAUSED
    engine.respond(OK)
    assert isinstance(engine.next_event(), Quit)


@pytest.mark.parametrize("state", list(State))
def test_an_answer_without_a_question_is_a_fault_of_ours(state: State) -> None:
    with pytest.raises(RuntimeError):
        engine_in(state).respond(OK)


def test_replies_come_in_the_order_of_the_commands() -> None:
    answers = [Reply(code, str(number)) for number, code in enumerate([250, 250, 550, 250, 450, 354, 250, 221])]
    engine, events, said = dialogue(
        HELLO + MAIL + RCPT + b"BOGUS\r\n" + RCPT + RCPT + b"DATA\r\nx\r\n.\r\nMAIL\r\nQUIT\r\nNOOP\r\n",
        answers=answers,
    )
    assert codes(said) == [250, 250, 550, 500, 250, 450, 354, 250, 501, 221]
    kinds = [Hello, Mail, Rcpt, Refused, Rcpt, Rcpt, type(events[6]), ContentChunk, ContentEnded, Refused, Quit]
    assert [type(event) for event in events] == kinds
    assert engine.state is State.CLOSED


def test_the_replies_of_a_group_go_out_together() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    engine.say(Reply(220, "mx"))
    _, said = converse(engine, [HELLO + MAIL + RCPT], cycle([OK]))
    assert codes(said) == [220, 250, 250, 250]
    assert engine.data_to_send() == b""


def test_closing_keeps_the_open_question() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    engine.receive(HELLO + b"NOOP\r\n")
    engine.next_event()
    engine.close()
    assert engine.next_event() is PAUSED
    engine.respond(NO)
    assert (engine.state, engine.next_event(), engine.unread_octets) == (State.CLOSED, NEED_DATA, 0)
    engine.receive(b"NOOP\r\n")
    assert (engine.next_event(), engine.unread_octets) == (NEED_DATA, 0)
    engine.say(Reply(421, "closing", "4.3.2"))
    assert codes(engine.data_to_send()) == [550, 421]


@pytest.mark.parametrize("state", [State.MAIL, State.RCPT, State.CONTENT, State.CHUNK, State.CHUNKED])
def test_nothing_is_heard_once_closed(state: State) -> None:
    engine = engine_in(state)
    engine.receive(b"x")
    engine.close()
    engine.receive(b"\r\n.\r\nNOOP\r\nQUIT\r\n")
    assert (engine.next_event(), engine.unread_octets, engine.data_to_send()) == (NEED_DATA, 0, b"")


def test_what_follows_quit_is_not_read() -> None:
    engine, events, said = dialogue(HELLO + b"QUIT\r\n" + MAIL + RCPT)
    assert isinstance(events[-1], Quit)
    assert codes(said) == [250, 250]
    assert engine.unread_octets == 0


# ---- STARTTLS.  RFC 3207 §4.2


def test_octets_behind_starttls_are_seen_and_dropped() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    converse(engine, [HELLO], cycle([OK]))
    engine.receive(b"STARTTLS\r\n" + MAIL)
    assert isinstance(engine.next_event(), StartTls)
    assert engine.unread_octets == len(MAIL), "so that the gate can refuse"
    engine.respond(Reply(220, "Go ahead", "2.0.0"))
    engine.receive(RCPT + b"QUIT\r\n")
    assert (engine.state, engine.unread_octets, engine.next_event()) == (State.TLS, 0, NEED_DATA)
    assert codes(engine.data_to_send()) == [220]


def test_after_a_refused_starttls_the_dialogue_goes_on_in_plain_text() -> None:
    _, events, said = dialogue(HELLO + b"STARTTLS\r\n" + MAIL, answers=[OK, Reply(454, "no", "4.7.0"), OK])
    assert isinstance(events[-1], Mail)
    assert codes(said) == [250, 454, 250]


# ---- XCLIENT


def test_octets_behind_xclient_are_seen_and_dropped() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    engine.receive(b"XCLIENT ADDR=192.0.2.1\r\n" + HELLO)
    assert isinstance(engine.next_event(), Xclient)
    assert engine.unread_octets == len(HELLO), "so that the gate can refuse"
    engine.respond(Reply(220, "mx"))
    engine.receive(MAIL + b"QUIT\r\n")
    assert (engine.state, engine.unread_octets, engine.next_event()) == (State.XCLIENT, 0, NEED_DATA)
    assert codes(engine.data_to_send()) == [220]


def test_after_a_refused_xclient_the_dialogue_goes_on_with_the_same_client() -> None:
    _, events, said = dialogue(HELLO + b"XCLIENT ADDR=192.0.2.1\r\n" + MAIL, answers=[OK, NO, OK])
    assert [type(event) for event in events] == [Hello, Xclient, Mail]
    assert codes(said) == [250, 550, 250]


def test_where_xclient_is_not_offered_it_is_only_an_unknown_command() -> None:
    engine = ServerEngine(OFFERED - {"XCLIENT"}, LIMITS)
    events, said = converse(engine, [b"XCLIENT ADDR=192.0.2.1\r\n" + HELLO], cycle([OK]))
    assert [type(event) for event in events] == [Refused, Hello]
    assert codes(said) == [502, 250]


# ---- AUTH.  RFC 4954 §4

DONE = Reply(235, "Welcome", "2.7.0")
WRONG = Reply(535, "Wrong", "5.7.8")


def test_an_exchange_is_a_challenge_and_a_response_until_another_reply() -> None:
    octets = HELLO + b"AUTH LOGIN\r\nYWxpY2U=\r\nc2VjcmV0\r\n" + MAIL
    engine, events, said = dialogue(octets, answers=[OK, CHALLENGE, CHALLENGE, DONE, OK])
    assert events[1:4] == [Auth("LOGIN", None), AuthResponse(b"YWxpY2U="), AuthResponse(b"c2VjcmV0")]
    assert isinstance(events[4], Mail)
    assert codes(said) == [250, 334, 334, 235, 250]
    assert engine.state is State.MAIL


@pytest.mark.parametrize("reply", [DONE, WRONG, Reply(454, "Later", "4.7.0"), Reply(501, "Cancelled", "5.7.0"), OK])
@pytest.mark.parametrize("answers", [[], [CHALLENGE], [CHALLENGE, CHALLENGE]])
def test_any_reply_but_334_ends_the_exchange(answers: list[Reply], reply: Reply) -> None:
    octets = HELLO + b"AUTH LOGIN\r\n" + b"YQ==\r\n" * len(answers) + b"NOOP\r\n"
    engine, events, _ = dialogue(octets, answers=[OK, *answers, reply, OK])
    assert isinstance(events[-1], Noop)
    assert engine.state is State.READY


@pytest.mark.parametrize(
    "line",
    [b"", b"*", b"=", b" ", b"QUIT", b"RSET", b"EHLO x", b"MAIL FROM:<a@b.test>", b"STARTTLS", b"BDAT 5", b"BDAT x",
     b"GET / HTTP/1.1", b"PROXY TCP4", b"AUTH PLAIN", b"XCLIENT ADDR=192.0.2.1", b"\xff\x80", b"!!!!"],
)  # fmt: skip
def test_in_an_exchange_no_line_is_a_command(line: bytes) -> None:
    octets = HELLO + b"AUTH PLAIN\r\n" + line + b"\r\nNOOP\r\n"
    engine, events, said = dialogue(octets, answers=[OK, CHALLENGE, WRONG, OK])
    assert events[2:] == [AuthResponse(line), Noop()]
    assert codes(said) == [250, 334, 535, 250]
    assert engine.state is State.READY


@pytest.mark.parametrize("length", [AUTH_OCTETS_MAX - 1, AUTH_OCTETS_MAX, AUTH_OCTETS_MAX + 1])
@pytest.mark.parametrize("limits", [LIMITS, NORMALISE])
def test_a_response_has_a_limit_and_breaking_it_ends_the_exchange(length: int, limits: ContentLimits) -> None:
    response = b"A" * (length - 2)
    octets = HELLO + b"AUTH PLAIN\r\n" + response + b"\r\nNOOP\r\n"
    fits = length <= AUTH_OCTETS_MAX
    answers = [OK, CHALLENGE, WRONG, OK] if fits else [OK, CHALLENGE, OK]
    engine, events, said = dialogue(octets, limits=limits, answers=answers)
    assert isinstance(events[-1], Noop)
    assert engine.state is State.READY
    if fits:
        assert events[2] == AuthResponse(response)
        assert codes(said) == [250, 334, 535, 250]
    else:
        assert isinstance(events[2], Refused)
        assert events[2].reply.octets().startswith(b"500 5.5.6 ")
        assert codes(said) == [250, 334, 500, 250]


def test_the_rest_of_an_over_long_response_is_no_line() -> None:
    for at in (AUTH_OCTETS_MAX - 1, AUTH_OCTETS_MAX, AUTH_OCTETS_MAX + 1, 3 * AUTH_OCTETS_MAX):
        octets = HELLO + b"AUTH PLAIN\r\n" + b"A" * at + b"QUIT\r\nNOOP\r\n"
        engine, events, said = dialogue(octets, answers=[OK, CHALLENGE, OK])
        assert codes(said) == [250, 334, 500, 250]
        assert isinstance(events[-1], Noop)
        assert engine.state is State.READY


@pytest.mark.parametrize("line", [b"YQ==\r", b"Y\rQ==", b"\0", b"YQ==\0", b"*\r", b"BDAT 5\0"])
@pytest.mark.parametrize("limits", [LIMITS, NORMALISE])
def test_a_response_with_a_bare_cr_or_nul_ends_the_exchange(line: bytes, limits: ContentLimits) -> None:
    octets = HELLO + b"AUTH PLAIN\r\n" + line + b"\r\nNOOP\r\n"
    engine, events, said = dialogue(octets, limits=limits, answers=[OK, CHALLENGE, OK])
    assert [type(event) for event in events] == [Hello, Auth, Refused, Noop]
    assert codes(said) == [250, 334, 500, 250]
    assert engine.state is State.READY


def test_a_bare_lf_in_an_exchange_ends_the_session_unless_it_is_normalised() -> None:
    octets = HELLO + b"AUTH PLAIN\r\nYQ==\nNOOP\r\n"
    engine, events, said = dialogue(octets, answers=[OK, CHALLENGE, OK])
    assert isinstance(events[-1], Refused)
    assert events[-1].fatal
    assert (codes(said), engine.state) == ([250, 334, 500], State.CLOSED)
    engine, events, said = dialogue(octets, limits=NORMALISE, answers=[OK, CHALLENGE, WRONG, OK])
    assert events[2:] == [AuthResponse(b"YQ=="), Noop()]


@pytest.mark.parametrize("length", [FLOOD_OCTETS - 1, FLOOD_OCTETS, FLOOD_OCTETS + 1])
def test_a_response_without_end_ends_the_session(length: int) -> None:
    octets = b"A" * length
    for size in (length, 1000):
        engine = engine_in(State.AUTH)
        pieces = [octets[at : at + size] for at in range(0, length, size)]
        events, said = converse(engine, pieces, cycle([OK]))
        assert engine.unread_octets == 0
        if length > FLOOD_OCTETS:
            assert [type(event) for event in events] == [Refused]
            assert (codes(said), engine.state) == ([500], State.CLOSED)
        else:
            assert (events, said, engine.state) == ([], b"", State.AUTH)


@pytest.mark.parametrize("length", [AUTH_OCTETS_MAX - 2, AUTH_OCTETS_MAX - 1, AUTH_OCTETS_MAX, AUTH_OCTETS_MAX + 1])
def test_an_initial_response_may_be_as_long_as_any(length: int) -> None:
    initial = b"A" * ((length - len(b"auth plain \r\n")) // 4 * 4)
    line = b"auth plain " + initial
    line += b" " * (length - len(line) - 2) + b"\r\n"
    assert len(line) == length
    fits = length <= AUTH_OCTETS_MAX
    engine, events, said = dialogue(HELLO + line + b"NOOP\r\n", answers=[OK, DONE, OK] if fits else [OK, OK])
    assert codes(said) == [250, 235 if fits else 500, 250]
    assert isinstance(events[-1], Noop)
    assert events[1] == Auth("PLAIN", initial) if fits else isinstance(events[1], Refused)
    assert engine.state is State.READY


@pytest.mark.parametrize("verb", [b"NOOP ", b"AUTHX ", b"AUT ", b" AUTH ", b"MAIL FROM:<a@b.test> AUTH "])
def test_no_other_command_may_be_as_long_as_an_initial_response(verb: bytes) -> None:
    line = verb + b"A" * (COMMAND_OCTETS_MAX - 1 - len(verb)) + b"\r\n"
    assert len(line) == COMMAND_OCTETS_MAX + 1
    _, events, said = dialogue(HELLO + line + b"NOOP\r\n")
    assert codes(said) == [250, 500, 250]
    assert b"Line too long" in said
    assert isinstance(events[-1], Noop)


def test_where_auth_is_not_offered_its_line_has_the_limit_of_others() -> None:
    engine = ServerEngine(OFFERED - {"AUTH"}, LIMITS)
    line = b"AUTH PLAIN " + b"A" * COMMAND_OCTETS_MAX
    assert converse(engine, [line], cycle([OK])) == ([], b"")
    assert engine.unread_octets == 0, "nothing of it is kept"
    assert codes(converse(engine, [b"\r\n" + HELLO], cycle([OK]))[1]) == [500, 250]


def test_closing_in_an_exchange_answers_what_is_open_and_hears_nothing_more() -> None:
    engine = engine_in(State.AUTH)
    engine.receive(b"YQ==\r\nYg==\r\n")
    assert engine.next_event() == AuthResponse(b"YQ==")
    assert engine.next_event() is PAUSED
    engine.close()
    engine.respond(CHALLENGE)
    assert (engine.state, engine.next_event(), engine.unread_octets) == (State.CLOSED, NEED_DATA, 0)


def test_what_a_client_says_of_itself_in_an_exchange_is_not_in_a_repr() -> None:
    _, events, _ = dialogue(HELLO + b"AUTH PLAIN c2VjcmV0\r\nc2VjcmV0\r\n", answers=[OK, CHALLENGE, WRONG])
    assert "c2VjcmV0" not in repr(events)


# ---- lines.  RFC 5321 §2.3.8, §4.5.3.1.4


@pytest.mark.parametrize("octets", [COMMAND_OCTETS_MAX - 1, COMMAND_OCTETS_MAX, COMMAND_OCTETS_MAX + 1])
@pytest.mark.parametrize("limits", [LIMITS, NORMALISE])
def test_a_command_line_has_a_limit(octets: int, limits: ContentLimits) -> None:
    line = b"NOOP " + b"x" * (octets - 7) + b"\r\n"
    assert len(line) == octets
    _, events, said = dialogue(line + b"RSET\r\n", limits=limits)
    assert codes(said) == [250 if octets <= COMMAND_OCTETS_MAX else 500, 250]
    assert isinstance(events[-1], Rset)


def test_the_rest_of_an_over_long_line_is_no_line() -> None:
    for at in (COMMAND_OCTETS_MAX - 1, COMMAND_OCTETS_MAX, COMMAND_OCTETS_MAX + 1, 3 * COMMAND_OCTETS_MAX):
        line = b"x" * at + b"QUIT\r\n"
        _, events, said = dialogue(line + b"NOOP\r\n")
        assert codes(said) == [500, 250]
        assert isinstance(events[-1], Noop)
    # A CR at the end of what was dropped may be the one before the LF, or not.
    long = b"x" * (COMMAND_OCTETS_MAX + 1)
    for pieces, said_codes in (
        ([long + b"\r", b"\nNOOP\r\n"], [500, 250]),
        ([long + b"\r", b"QUIT\r\n", b"NOOP\r\n"], [500, 250]),
        ([long, b"\r", b"\r", b"\nNOOP\r\n"], [500, 250]),
    ):
        assert codes(converse(ServerEngine(OFFERED, LIMITS), pieces, cycle([OK]))[1]) == said_codes


@pytest.mark.parametrize("length", [FLOOD_OCTETS - 1, FLOOD_OCTETS, FLOOD_OCTETS + 1])
@pytest.mark.parametrize("end", [b"\r\n", b"\n", b""])
def test_a_line_without_end_ends_the_session(length: int, end: bytes) -> None:
    octets = b"x" * length + end + b"NOOP\r\n" * bool(end)
    results = []
    for size in (len(octets), 1000):
        pieces = [octets[at : at + size] for at in range(0, len(octets), size)]
        engine = ServerEngine(OFFERED, LIMITS)
        _, said = converse(engine, pieces, cycle([OK]))
        assert engine.unread_octets <= 1, "nothing of it is kept"
        results.append((said, engine.state))
    assert results[0] == results[1]
    said, state = results[0]
    if length > FLOOD_OCTETS:
        assert (codes(said), state) == ([500], State.CLOSED)
        assert b"Line too long" in said
    elif end == b"\r\n":
        assert (codes(said), state) == ([500, 250], State.START)
    elif end:
        assert (codes(said), state) == ([500], State.CLOSED)
        assert b"bare LF" in said
    else:
        assert (said, state) == (b"", State.START)


@pytest.mark.parametrize("line", [b"NOOP\n", b"\n", b"NOOP x\ny\r\n", b"NOOP\r\0\n", b"EHLO a\n" + MAIL])
def test_a_bare_lf_in_a_command_ends_the_session(line: bytes) -> None:
    engine, events, said = dialogue(HELLO + line + b"NOOP\r\n")
    assert codes(said) == [250, 500]
    assert isinstance(events[-1], Refused)
    assert events[-1].fatal
    assert engine.state is State.CLOSED


@pytest.mark.parametrize(
    "line",
    [b"NOOP\r\r\n", b"NOOP \rQUIT\r\n", b"\rNOOP\r\n", b"NOOP\0\r\n", b"NO\0OP\r\n", b"MAIL FROM:<a@b.test\r>\r\n"],
)
@pytest.mark.parametrize("limits", [LIMITS, NORMALISE])
def test_a_line_with_a_bare_cr_or_nul_does_nothing(line: bytes, limits: ContentLimits) -> None:
    engine, events, said = dialogue(HELLO + line + b"NOOP\r\n", limits=limits)
    assert codes(said) == [250, 500, 250]
    assert [type(event) for event in events] == [Hello, Refused, Noop]
    assert engine.state is State.READY


def test_where_bare_newlines_are_normalised_a_bare_lf_ends_a_line() -> None:
    _, events, said = dialogue(HELLO[:-2] + b"\nNOOP\n\nRSET\r\n", limits=NORMALISE)
    assert codes(said) == [250, 250, 500, 250]
    assert [type(event) for event in events] == [Hello, Noop, Refused, Rset]


def test_whoever_speaks_another_protocol_is_hung_up_on() -> None:
    for line in (b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n"):
        engine, events, said = dialogue(line + b"Host: x\r\n" + HELLO + MAIL)
        assert codes(said) == [554]
        assert len(events) == 1
        assert engine.state is State.CLOSED


# ---- content after DATA

DATA = TRANSACTION + b"DATA\r\n"


def test_content_is_one_message_and_what_follows_are_commands() -> None:
    engine, events, said = dialogue(DATA + b"A: b\r\n\r\n..x\r\nRSET\r\n.\r\nNOOP\r\n")
    assert b"".join(event.octets for event in events if isinstance(event, ContentChunk)) == (
        b"A: b\r\n\r\n.x\r\nRSET\r\n"
    )
    assert isinstance(events[-1], Noop)
    assert codes(said) == [250] * 6
    assert engine.state is State.READY


@pytest.mark.parametrize(
    ("content", "ended"),
    [
        (b"", ContentEnded(0, None, eight_bit=False, dotted=False)),
        (b"x\r\n", ContentEnded(3, None, eight_bit=False, dotted=False)),
        (b"..\r\n", ContentEnded(3, None, eight_bit=False, dotted=True)),
        (b".x\r\n", ContentEnded(3, None, eight_bit=False, dotted=False)),
        (b"a\r\n..b\xff\r\n", ContentEnded(8, None, eight_bit=True, dotted=True)),
        (b"\xc3\xa9\r\n", ContentEnded(4, None, eight_bit=True, dotted=False)),
    ],
)
def test_the_end_says_what_the_content_was(content: bytes, ended: ContentEnded) -> None:
    _, events, _ = dialogue(DATA + content + b".\r\n")
    assert events[-1] == ended


def test_a_defect_is_told_at_the_real_end_and_says_nothing_before() -> None:
    for body in (b"a\n.\nQUIT\r\n", b"a\r\n.\rQUIT\r\n", b"\0\r\n", b"x" * 101 + b"\r\n", b"a\r\n" * 400):
        engine, events, said = dialogue(
            DATA + body + b"NOOP\r\nQUIT\r\n.\r\nNOOP\r\n", answers=[OK, OK, OK, OK, NO, OK]
        )
        ends = [event for event in events if isinstance(event, ContentEnded)]
        assert len(ends) == 1
        assert ends[0].defect is not None
        assert codes(said) == [250, 250, 250, 250, 550, 250]
        assert isinstance(events[-1], Noop)
        assert engine.state is State.READY


def test_flags_and_defects_of_one_message_do_not_reach_the_next() -> None:
    answers = [OK, OK, OK, GO_AHEAD, OK, OK, OK, GO_AHEAD, OK]
    for first in (b"..\xff\r\n", b"a\nb\r\n", b"x" * 101 + b"\r\n"):
        _, events, _ = dialogue(DATA + first + b".\r\n" + MAIL + RCPT + b"DATA\r\nx\r\n.\r\n", answers=answers)
        assert events[-1] == ContentEnded(3, None, eight_bit=False, dotted=False)


def test_a_message_that_goes_on_far_beyond_its_limit_is_cut_off() -> None:
    most = 2 * LIMITS.message_size_octets + FLOOD_OCTETS
    line = b"y" * 48 + b"\r\n"
    for surplus in (-1, 0, 1):
        body = b"\r\n" + line * ((most + surplus) // 50 - 3)
        body += b"z" * (most + surplus - len(body) - 5) + b"\r\n"
        octets = body + b".\r\n"
        assert len(octets) == most + surplus
        for size in (len(octets), 7):
            engine = ServerEngine(OFFERED, LIMITS)
            converse(engine, [DATA], cycle([OK]))
            pieces = [octets[at : at + size] for at in range(0, len(octets), size)]
            events, said = converse(engine, pieces, cycle([NO]))
            assert len(codes(said)) == 1
            if surplus > 0:
                assert events[-1] == Refused(Defect.TOO_LARGE.reply, fatal=True) or (
                    isinstance(events[-1], Refused) and events[-1].fatal
                )
                assert engine.state is State.CLOSED
            else:
                assert isinstance(events[-1], ContentEnded)
                assert engine.state is State.READY


def test_a_client_that_hangs_up_in_content_leaves_no_message() -> None:
    for octets in (DATA + b"a\r\n", DATA + b"a\r\n.", DATA + b"a\r\n.\r", TRANSACTION + b"BDAT 9 LAST\r\nA: b\r\n"):
        engine, events, _ = dialogue(octets)
        assert not any(isinstance(event, ContentEnded) for event in events)
        assert engine.next_event() is NEED_DATA


# ---- BDAT.  RFC 3030


def test_chunks_make_one_message() -> None:
    _, events, said = dialogue(
        TRANSACTION + b"BDAT 7\r\nA: b\r\n\rBDAT 0\r\nbdat 6\r\n\n.\r\nQUBDAT 4 last\r\nIT\r\nNOOP\r\n"
    )
    content = b"".join(event.octets for event in events if isinstance(event, ContentChunk))
    assert content == b"A: b\r\n\r\n.\r\nQUIT\r\n"
    questions = [event for event in events if isinstance(event, ChunkEnded | ContentEnded)]
    assert [type(event) for event in questions] == [ChunkEnded, ChunkEnded, ChunkEnded, ContentEnded]
    assert questions[-1] == ContentEnded(len(content), None, eight_bit=False, dotted=True)
    assert isinstance(events[-1], Noop)
    assert codes(said) == [250] * 8


@pytest.mark.parametrize("before", [b"", HELLO, HELLO + MAIL])
@pytest.mark.parametrize("last", [b"", b" LAST"])
def test_a_chunk_out_of_order_is_swallowed_then_refused(before: bytes, last: bytes) -> None:
    inside = b"QUIT\r\n" + TRANSACTION + b"DATA\r\n.\r\n\0\n"
    octets = before + b"BDAT %d%b\r\n" % (len(inside), last) + inside + b"NOOP\r\n"
    _, events, said = dialogue(octets)
    assert codes(said)[-2:] == [554 if before.endswith(MAIL) else 503, 250]
    assert isinstance(events[-1], Noop)
    assert len(events) == octets.count(b"EHLO") - 1 + before.count(b"MAIL") + 2


def test_no_reply_before_a_swallowed_chunk_has_come() -> None:
    engine = ServerEngine(OFFERED, LIMITS)
    converse(engine, [HELLO], cycle([OK]))
    for octets in (b"BDAT 12\r\n", b"NOOP\r\n", b"NOOP\r"):
        assert converse(engine, [octets], cycle([OK])) == ([], b"")
    assert codes(converse(engine, [b"\n"], cycle([OK]))[1]) == [503]


def test_a_refused_chunk_ends_the_transaction_and_those_behind_it_are_swallowed() -> None:
    octets = TRANSACTION + b"BDAT 6\r\nA: b\r\nBDAT 6\r\nQUIT\r\nBDAT 0 LAST\r\nDATA\r\nNOOP\r\n"
    engine, events, said = dialogue(octets, answers=[OK, OK, OK, NO, OK])
    assert codes(said) == [250, 250, 250, 550, 503, 503, 503, 250]
    assert not any(isinstance(event, ContentEnded) for event in events)
    assert engine.state is State.READY


def test_after_refused_recipients_pipelined_chunks_are_swallowed() -> None:
    octets = HELLO + MAIL + RCPT + b"BDAT 8\r\nQUIT\r\n\r\nBDAT 6 LAST\r\nNOOP\r\nRSET\r\n"
    _, events, said = dialogue(octets, answers=[OK, OK, NO, OK])
    assert codes(said) == [250, 250, 550, 554, 554, 250]
    assert isinstance(events[-1], Rset)


def test_a_defect_in_one_chunk_spoils_the_message() -> None:
    octets = TRANSACTION + b"BDAT 4\r\na\nb\nBDAT 3 LAST\r\nc\r\nNOOP\r\n"
    _, events, _ = dialogue(octets)
    ends = [event for event in events if isinstance(event, ChunkEnded | ContentEnded)]
    assert [end.defect for end in ends] == [Defect.BARE_LF, Defect.BARE_LF]
    assert isinstance(events[-1], Noop)


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_the_sum_of_the_chunks_has_the_size_limit(surplus: int) -> None:
    parts = [b"\r\n" + b"x" * 98 + b"\r\n"] * 9
    parts.append(b"y" * (LIMITS.message_size_octets + surplus - sum(map(len, parts)) - 2) + b"\r\n")
    octets = b"".join(b"BDAT %d\r\n%b" % (len(part), part) for part in parts) + b"BDAT 0 LAST\r\nNOOP\r\n"
    _, events, _ = dialogue(TRANSACTION + octets)
    end = events[-2]
    assert isinstance(end, ContentEnded)
    assert end.defect is (Defect.TOO_LARGE if surplus > 0 else None)
    assert isinstance(events[-1], Noop)


@pytest.mark.parametrize("surplus", [-1, 0, 1])
@pytest.mark.parametrize("before", [HELLO, TRANSACTION])
def test_a_chunk_far_too_large_to_swallow_ends_the_session(surplus: int, before: bytes) -> None:
    most = 2 * LIMITS.message_size_octets + FLOOD_OCTETS
    engine, _, said = dialogue(before + b"BDAT %d\r\n" % (most + surplus))
    assert (codes(said)[-1] == 552) == (surplus > 0)
    assert (engine.state is State.CLOSED) == (surplus > 0)


@pytest.mark.parametrize(
    "line",
    [b"BDAT", b"BDAT x", b"BDAT -1", b"BDAT 1_0 LAST", b"BDAT +5", b"BDAT 5 LASTX", b"BDAT 5 5", b"BDAT\t5",
     b"BDAT 9999999999999999999", b"bdat 0x10", b"BDAT 5\0", b"BDAT 5\r LAST", b"BDAT " + b"5" * 30],
)  # fmt: skip
def test_a_bdat_that_is_not_understood_ends_the_session(line: bytes) -> None:
    engine, events, said = dialogue(TRANSACTION + line + b"\r\nQUIT\r\n" + b"DATA\r\n")
    assert codes(said)[:3] == [250, 250, 250]
    assert codes(said)[3] in (500, 501)
    assert isinstance(events[-1], Refused)
    assert events[-1].fatal
    assert engine.state is State.CLOSED


def test_where_chunking_is_not_offered_bdat_is_only_an_unknown_command() -> None:
    engine = ServerEngine(frozenset(), LIMITS)
    _, said = converse(engine, [HELLO + b"BDAT 5\r\nNOOP\r\n"], cycle([OK]))
    assert codes(said) == [250, 502, 250]


# ---- whatever comes

FRAGMENTS = [
    HELLO, MAIL, RCPT, b"DATA\r\n", b".\r\n", b"\r\n.\r\n", b"RSET\r\n", b"NOOP\r\n", b"STARTTLS\r\n",
    b"AUTH PLAIN\r\n", b"AUTH PLAIN " + b"A" * 3000, b"A" * 5000, b"*\r\n", b"XCLIENT ADDR=192.0.2.1\r\n",
    b"BDAT 4\r\n", b"BDAT 4 LAST\r\n", b"BDAT 0 LAST\r\n", b"BDAT 0\r\n", b"BDAT 2000\r\n", b"BDAT x\r\n",
    b"QUIT\r\n", b"GET / HTTP/1.1\r\n", b"A: b\r\n", b"Received: x\r\n", b"..\r\n", b"x" * 100,
    b"." + b"x" * 100 + b"\r\n", b"y" * COMMAND_OCTETS_MAX, b"\r", b"\n", b".", b"\0", b"\xff", b"abcd",
]  # fmt: skip
octets_of_all_kinds = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=12)), max_size=25).map(b"".join)
openings = st.sampled_from([b"", HELLO, TRANSACTION, DATA, TRANSACTION + b"BDAT 4\r\nA: b", HELLO + b"AUTH PLAIN\r\n"])
some_answers = st.lists(st.sampled_from([OK, OK, OK, CHALLENGE, NO, LATER]), min_size=1, max_size=6)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(openings, octets_of_all_kinds, some_answers, st.booleans())
@example(DATA, b"." + b"x" * 100 + b"\r\n.\r\n", [OK], False)
@example(DATA, b"a\rb" * 60 + b"\r\n.\r\n", [OK], True)
@example(DATA, b"\r" * 200 + b"\r\n.\r\n", [OK], True)
@example(TRANSACTION, b"BDAT 120 LAST\r\n" + b"\r" * 120, [OK], True)
@example(b"", b"x" * (FLOOD_OCTETS + 1) + b"\n", [OK], False)
@example(HELLO, b"AUTH PLAIN\r\n" + b"A" * AUTH_OCTETS_MAX + b"\r\nNOOP\r\n", [OK, CHALLENGE], False)
def test_the_same_however_it_is_split_and_whatever_is_answered(
    opening: bytes, octets: bytes, answers: list[Reply], normalise: bool
) -> None:
    limits = NORMALISE if normalise else LIMITS
    engine, events, said = dialogue(opening + octets, limits=limits, answers=answers)
    # One reply for each question and each refusal, and nothing else.
    assert len(codes(said)) == sum(not isinstance(event, ContentChunk) for event in events)
    assert engine.data_to_send() == b""
    for event in events:
        if isinstance(event, ContentChunk):
            assert event.octets
            assert event.octets.count(b"\r\n") == event.octets.count(b"\r") == event.octets.count(b"\n")
            assert b"\0" not in event.octets


@pytest.mark.parametrize("join_octets", [0, 3, 1 << 12])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(openings, octets_of_all_kinds, some_answers, st.booleans(), st.integers(1, 60), st.integers(0, 60))
@example(DATA, b"x\r\n.\r\n" + MAIL + RCPT * 5, [OK], False, 25, 30)
def test_octets_may_come_while_a_question_is_open(
    monkeypatch: pytest.MonkeyPatch,
    join_octets: int,
    opening: bytes,
    octets: bytes,
    answers: list[Reply],
    normalise: bool,
    idle: int,
    busy: int,
) -> None:
    """So many octets come when the engine wants more, so many before each answer: all the same as at once."""
    monkeypatch.setattr(server, "JOIN_OCTETS", join_octets)
    limits = NORMALISE if normalise else LIMITS
    whole = ServerEngine(OFFERED, limits)
    expected, expected_said = converse(whole, [opening + octets], cycle(answers))
    engine = ServerEngine(OFFERED, limits)
    left, said, answer = opening + octets, b"", cycle(answers)
    events: list[Event] = []
    while True:
        event = engine.next_event()
        if event is PAUSED:
            engine.receive(left[:busy])
            left = left[busy:]
            engine.respond(next(answer))
            said += engine.data_to_send()
        elif not isinstance(event, Signal):
            events.append(event)
        elif left:
            engine.receive(left[:idle])
            left = left[idle:]
        else:
            break
    said += engine.data_to_send()
    assert joined(events) == joined(expected)
    assert _DEFECTS.sub(b"(defect)", said) == _DEFECTS.sub(b"(defect)", expected_said)
    assert engine.state is whole.state


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(openings, octets_of_all_kinds, st.booleans())
def test_what_is_kept_between_two_reads_is_bounded(opening: bytes, octets: bytes, normalise: bool) -> None:
    limits = NORMALISE if normalise else LIMITS
    engine = ServerEngine(OFFERED - {"AUTH"}, limits)
    for at in range(0, len(opening + octets), 5):
        converse(engine, [(opening + octets)[at : at + 5]], cycle([OK]))
        assert engine.unread_octets <= max(COMMAND_OCTETS_MAX, limits.content_line_octets + 2)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(octets_of_all_kinds, some_answers, st.booleans())
def test_what_is_kept_in_an_exchange_is_bounded(octets: bytes, answers: list[Reply], normalise: bool) -> None:
    engine = engine_in(State.AUTH, NORMALISE if normalise else LIMITS)
    replies = cycle([*answers, CHALLENGE])
    for at in range(0, len(octets), 100):
        converse(engine, [octets[at : at + 100]], replies)
        assert engine.unread_octets <= AUTH_OCTETS_MAX
