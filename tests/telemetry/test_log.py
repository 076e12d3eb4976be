"""The log: what programs read, what people read, and what strangers cannot write into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.telemetry import Level, SessionLog, SessionRecord, Style, create_memory, rfc3339
from gatepost.telemetry.log import human_event, human_session, printable

NOON_S = 1_800_000_000.25


def record(**changes: Any) -> SessionRecord:
    base: dict[str, Any] = {
        "time": "2026-11-23T12:00:01.500Z",
        "event": "session",
        "reference": "K7Q2ABCD",
        "listen": "mx",
        "client": "203.0.113.9",
        "hello": "mail.example.net",
        "tls": "TLSv1.3",
        "seconds": 0.012,
        "transactions": [
            {
                "reverse_path": "a@b.example",
                "recipients": [
                    {
                        "forward_path": "joe@example.com",
                        "verdict": "admitted",
                        "by": "local example.com (gatepost.toml:12)",
                    }
                ],
                "size": 4096,
                "verdict": "accepted",
                "reply": "250 2.0.0 OK",
            }
        ],
        "errors": 0,
        "end": "quit",
    }
    return {**base, **changes}  # type: ignore[typeddict-item]


def refused(**changes: Any) -> SessionRecord:
    recipient = {
        "forward_path": "victim@elsewhere.test",
        "verdict": "refused",
        "reason": "relaying",
        "reply": "550 5.7.1 Relaying is prohibited [K7Q2ABCD-1]",
        "by": "default",
    }
    transaction = {"reverse_path": "x@y.test", "recipients": [recipient], "size": 0, "verdict": "", "reply": ""}
    return record(transactions=[transaction], **changes)


class Pipe:
    """A pipe with everything that was written to it."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def log(self, **options: Any) -> SessionLog:
        return SessionLog(self.writing, Style(), now=lambda: NOON_S, **options)

    def lines(self) -> list[str]:
        self.end()
        return self.read()

    def end(self) -> None:
        os.close(self.writing)
        self.writing = -1

    def read(self) -> list[str]:
        with os.fdopen(os.dup(self.reading)) as file:
            return file.read().splitlines()

    def close(self) -> None:
        for descriptor in (self.reading, self.writing):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_rfc3339_is_utc_with_milliseconds():
    assert rfc3339(NOON_S) == "2027-01-15T08:00:00.250Z"
    assert rfc3339(NOON_S + 0.7499) == "2027-01-15T08:00:00.999Z"
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"


def test_a_session_is_one_json_line_in_a_pipe(pipe):
    log = pipe.log()
    log.session(record())
    log.session(refused())
    log.close()
    first, second = (json.loads(line) for line in pipe.lines())
    assert first == record()
    assert second["transactions"][0]["recipients"][0]["reason"] == "relaying"


def test_events_carry_time_name_level_text_and_fields(pipe):
    log = pipe.log()
    log.event("worker_died", "worker 1 ended", Level.ERROR, worker=1)
    log.line("ready: mx 127.0.0.1:2525")
    log.close()
    event, line = pipe.lines()
    assert json.loads(event) == {
        "time": "2027-01-15T08:00:00.250Z",
        "event": "worker_died",
        "level": "error",
        "text": "worker 1 ended",
        "worker": 1,
    }
    assert line == "ready: mx 127.0.0.1:2525"


@given(st.text(max_size=50))
def test_json_lines_hold_printable_ascii_whatever_a_stranger_says(text):
    pipe = Pipe()
    try:
        log = pipe.log()
        log.session(record(hello=text + "\x7f\x1b[2J\u202e\ud800\n"))
        log.close()
        (line,) = pipe.lines()
        assert re.fullmatch("[\x20-\x7e]+", line)
        assert json.loads(line)["hello"].startswith(text)
    finally:
        pipe.close()


def test_what_was_logged_before_close_is_written(pipe):
    log = pipe.log()
    drained: list[str] = []
    reader = threading.Thread(target=lambda: drained.extend(pipe.read()))
    reader.start()
    for number in range(5000):
        log.session(record(errors=number))
    log.close(30.0)
    pipe.end()
    reader.join()
    assert [json.loads(line)["errors"] for line in drained] == list(range(5000))


def test_a_reader_that_does_not_read_costs_lines_and_not_the_gate(pipe):
    dropped: list[int] = []
    log = pipe.log(dropped=dropped.append, queue_octets_max=20_000)
    for _ in range(2000):  # half a mebibyte: more than the pipe and the queue hold
        log.session(record())
    assert sum(dropped) > 500
    log.close(0.1)  # gives up
    os.set_blocking(pipe.reading, False)
    lines = b""
    while len(os.read(pipe.reading, 1 << 20)) or lines:  # the reader is back
        try:
            lines = os.read(pipe.reading, 1 << 20)
        except BlockingIOError:
            break


def test_drops_are_said_once_there_is_room(pipe):
    log = pipe.log(queue_octets_max=3000)
    for _ in range(20):
        log.session(record())
    log.close()
    lines = [json.loads(line) for line in pipe.lines()]
    notices = [line for line in lines if line["event"] == "log_dropped"]
    assert len(notices) == 1
    assert len(lines) - 1 + notices[0]["lines"] == 20


def test_a_reader_that_is_gone_is_counted_and_does_not_raise(pipe):
    dropped: list[int] = []
    log = pipe.log(dropped=dropped.append)
    os.close(pipe.reading)
    pipe.reading = -1
    log.session(record())
    log.close()
    assert dropped == []  # nobody was there to count it
    log.session(record())
    assert dropped == [1]


def test_a_pipe_that_somebody_made_non_blocking_loses_nothing(pipe):
    os.set_blocking(pipe.writing, False)
    log = pipe.log()
    got: list[str] = []
    for number in range(3000):
        log.session(record(errors=number))
    reader = threading.Thread(target=lambda: got.extend(pipe.read()))
    reader.start()
    log.close(30.0)
    pipe.end()
    reader.join()
    assert len(got) == 3000


WRITER = """
import sys
from gatepost.telemetry import SessionLog, Style
log = SessionLog(1, Style(), lock=int(sys.argv[1]))
for number in range(3000):
    log.event("test", sys.argv[2] * 200, number=number)
log.close(60)
"""


def test_lines_of_several_processes_stay_whole():
    lock = create_memory("lock", 8)
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(lock), letter], stdout=writing, pass_fds=(lock,))
        for letter in "abc"
    ]
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    assert [process.wait() for process in processes] == [0, 0, 0]
    os.close(lock)
    assert len(lines) == 9000
    for letter in "abc":
        numbers = [json.loads(line)["number"] for line in lines if f'"{letter * 200}"' in line]
        assert numbers == list(range(3000))


def test_the_lock_ends_with_the_process_that_held_it():
    lock = create_memory("lock", 8)
    program = f"import fcntl, os; fcntl.lockf({lock}, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program], pass_fds=(lock,), check=False).returncode == -9
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


# ---- on a terminal


def test_style_of_a_pipe_is_json_and_no_color_and_dumb_terminals_are_obeyed(pipe):
    assert Style.of(pipe.writing, {"TERM": "xterm"}) == Style(terminal=False, colour=False)
    main, terminal = pty.openpty()
    assert Style.of(terminal, {"TERM": "xterm"}) == Style(terminal=True, colour=True)
    assert Style.of(terminal, {"TERM": "xterm", "NO_COLOR": ""}).colour  # no-color.org: "not an empty string"
    assert not Style.of(terminal, {"TERM": "xterm", "NO_COLOR": "1"}).colour
    assert not Style.of(terminal, {"TERM": "dumb"}).colour
    assert not Style.of(terminal, {}).colour
    os.close(main)
    os.close(terminal)


def test_a_terminal_gets_one_calm_line_a_session():
    main, terminal = pty.openpty()
    log = SessionLog(terminal, Style(terminal=True), now=lambda: NOON_S)
    log.session(record())
    log.event("drain", "draining")
    log.close()
    text = os.read(main, 10_000).decode()
    os.close(main)
    os.close(terminal)
    first, second, rest = text.split("\r\n")
    assert first.split() == [
        *("12:00:01", "203.0.113.9", "<a@b.example>", "<joe@example.com>", "accepted"),
        *("local", "example.com", "(gatepost.toml:12)"),
    ]
    assert second == "08:00:00 draining"
    assert rest == ""


def human(session: SessionRecord, columns: int = 120) -> str:
    return human_session(session, columns, colour=False)


def test_a_refusal_says_why():
    assert human(refused()).split("refused", 1)[1].strip() == "550 5.7.1 Relaying is prohibited [K7Q2ABCD-1] (default)"


def test_columns_are_aligned():
    lines = [human(record()), human(refused()), human(record(transactions=[], client="192.0.2.1", end="timeout"))]
    assert {line.index(word) for line, word in zip(lines, ("accepted", "refused", "no mail"), strict=True)} == {
        lines[0].index("accepted")
    }
    assert lines[2].endswith("timed out")


def test_several_transactions_show_the_worst_and_count_all():
    mixed = record(transactions=[*record()["transactions"] * 3, *refused()["transactions"]], end="lost")
    line = human(mixed)
    assert " refused  3 accepted, 1 refused; 550 5.7.1" in line
    assert "+3" in line
    assert line.endswith("; connection lost")


def test_a_long_path_is_cut_before_the_number_of_the_others():
    many = record()
    many["transactions"][0]["recipients"] = [
        {"forward_path": "a-rather-long-local-part@sub.example.com", "verdict": "admitted", "by": "x"}
    ] * 12
    assert re.search(r" <a-rather-lon[a-z-]*… \+11 +accepted ", human(many, 80))


def test_deferred_content_and_a_refused_mail_command():
    deferred = record()
    deferred["transactions"][0]["verdict"] = "deferred"
    deferred["transactions"][0]["reply"] = "451 4.4.1 Backend out of reach"
    assert "deferred 451 4.4.1 Backend out of reach" in human(deferred)
    mail = {"reverse_path": "spam@spam.test", "recipients": [], "size": 0, "verdict": "", "reply": "550 5.7.1 No"}
    assert re.search(r"<spam@spam.test> +- +refused +550 5.7.1 No$", human(record(transactions=[mail])))


def test_a_session_refused_at_its_start():
    line = human(record(transactions=[], end="refused", reply="421 4.7.0 Too many sessions"))
    assert re.search(r" refused +421 4.7.0 Too many sessions$", line)


@pytest.mark.parametrize("columns", [1, 20, 80, 200])
def test_any_width_gives_one_line(columns):
    for session in (record(), refused(), record(client="2001:db8:1234:5678:9abc:def0:1234:5678")):
        assert "\n" not in human(session, columns)


def test_colour_is_on_the_verdict_only_where_wanted():
    assert "\x1b[32maccepted\x1b[0m" in human_session(record(), 120, colour=True)
    assert "\x1b[31mrefused " in human_session(refused(), 120, colour=True)
    assert "\x1b" not in human(record())


hostile = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x1b\x9b\x07\r\n\x00\x7f\u202e\u2066\u2029\u200b\ufeff\U000e0001\ud800\u0301世"),
    ),
    max_size=60,
)


@given(hostile)
def test_nothing_unprintable_reaches_a_terminal(text):
    safe = printable(text)
    assert safe.isprintable()
    if text.isprintable():
        assert safe == text
    for session in (
        record(hello=text, client=text or "?"),
        record(end=text),
        record(
            transactions=[
                {
                    "reverse_path": text,
                    "recipients": [{"forward_path": text, "verdict": "refused", "reply": text, "by": text}],
                    "size": 0,
                    "verdict": "",
                    "reply": text,
                }
            ]
        ),
    ):
        assert human(session).isprintable()
    assert all(line.isprintable() for line in human_event(0.0, text, Level.NOTE, colour=False).split("\n"))


def test_an_events_further_lines_cannot_be_taken_for_lines_of_the_log():
    lines = human_event(NOON_S, "Traceback\n12:00:01 forged\n", Level.ERROR, colour=False).split("\n")
    assert lines == ["08:00:00 error: Traceback", "         12:00:01 forged"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("\U000e0001", "\\U000e0001"),
        ("grüße", "grüße"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_escapes_are_readable(text, shown):
    assert printable(text) == shown


def columns_of(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@pytest.mark.parametrize("path", ["世" * 50 + "@example.com", "a\u0301" * 80, "x" * 300, "é@b.example"])
def test_wide_and_combining_characters_keep_the_columns(path):
    session = record()
    session["transactions"][0]["reverse_path"] = path
    line, plain = human(session), human(record())
    assert columns_of(line[: line.index("<joe")]) == plain.index("<joe")


def test_closing_a_log_that_never_wrote_is_nothing(pipe):
    log = pipe.log()
    log.close()
    assert pipe.lines() == []


def test_output_to_a_file_is_appended_in_order(tmp_path: Path):
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    log = SessionLog(descriptor, Style())
    for number in range(100):
        log.event("test", "", number=number)
    log.close()
    os.close(descriptor)
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == list(range(100))


def test_a_full_disk_is_counted():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        os.write(descriptor, b"x")
    dropped: list[int] = []
    log = SessionLog(descriptor, Style(), dropped=dropped.append)
    log.line("x")
    log.close()
    log.line("y")  # whoever comes next counts what was lost
    os.close(descriptor)
    assert dropped == [1]
