"""From the backlog into the database, on SQLite and on PostgreSQL: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import func, select, text
from tests.store.places import NOON_S, Place, entry, record, refused, session, taken_over

from gatepost.errors import StorageError
from gatepost.facts import Identity
from gatepost.smtp.path import Mailbox
from gatepost.store import writer as writer_module
from gatepost.store.backlog import backlog_directory
from gatepost.store.database import Database, sqlite_path
from gatepost.store.journal import Query
from gatepost.store.record import DELIVERING, End, Record, encode
from gatepost.store.schema import BACKLOGS, ENTRIES, FACTS, METADATA, REVISIONS, SESSIONS
from gatepost.store.settings import DAY_S
from gatepost.store.writer import TIDY_ROWS
from gatepost.verdict import Finding, Result

PATIENCE_S = 30.0


def counted(place: Place) -> dict[str, int]:
    """Rows of each table."""
    with place.database().transaction() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (ENTRIES, SESSIONS, FACTS)
        }


def test_the_migrations_make_what_the_schema_says(place):
    database = place.database()
    database.prepare()
    database.prepare()  # nothing is left to do
    with database.transaction() as connection:
        made = sorted(
            (index["name"], tuple(index["column_names"]))
            for table in METADATA.tables
            for index in _indexes(connection, table)
        )
        columns = {table.name: connection.execute(select(table).limit(0)).keys() for table in METADATA.tables.values()}
    expected = sorted(index.name for table in METADATA.tables.values() for index in table.indexes if index.name)
    assert sorted({name for name, _ in made}) == expected
    assert {name: list(keys) for name, keys in columns.items()} == {
        table.name: [column.name for column in table.columns] for table in METADATA.tables.values()
    }
    assert database.check()


def _indexes(connection, table: str):
    if connection.dialect.name == "sqlite":
        found = connection.execute(text(f"PRAGMA index_list({table})")).all()
        return [{"name": row[1], "column_names": ()} for row in found if not row[1].startswith("sqlite_autoindex")]
    found = connection.execute(text(f"SELECT indexname FROM pg_indexes WHERE tablename = '{table}'")).all()  # noqa: S608
    return [{"name": row[0], "column_names": ()} for row in found if not row[0].endswith("_pkey")]


def test_everything_is_taken_over_once(place):
    place.wait(*(record([entry(message=f"K7Q2M9XD.{number}")], ended=True) for number in range(2500)))
    writer = place.writer()
    assert taken_over(writer) == 2500
    assert counted(place) == {"entries": 2500, "sessions": 2500, "facts": 1}
    assert taken_over(writer) == 0
    place.wait(record([refused("K7Q2M9XD-1")]))
    assert taken_over(place.writer()) == 1, "another process goes on where the one before was"
    assert counted(place)["entries"] == 2501


def test_facts_that_differ_are_kept_once_each_and_day(place):
    facts = [session(client=client, hello=hello) for client in ("192.0.2.1", "192.0.2.2") for hello in ("a", "b")]
    place.keep(*(record([entry(at=NOON_S + day * DAY_S)], of) for day in (0, 1) for of in facts for _ in range(3)))
    assert counted(place) == {"entries": 24, "sessions": 0, "facts": 8}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])  # as a worker writes it, and any other JSON
def test_a_line_that_is_not_what_it_should_be_costs_itself_alone(place, separators):
    place.wait(record([entry(message="K7Q2M9XD.1")]))
    good = json.loads(encode(record([entry()], ended=True)))
    lines = [b"", b"\0" * 100, b"{}", b"[" * 10_000]
    for part, wrong in ((good["session"], {}), (good["session"], [1]), (good["entries"][0], 5)):
        for key, right in list(part.items()):
            if wrong == 5 and key in ("at", "number", "size"):
                continue
            part[key] = wrong
            lines.append(json.dumps(good, separators=separators).encode())
            part[key] = right
    lines.append(b'{"schema":99}')
    with (backlog_directory(place.data) / "00000001.jsonl").open("ab") as file:
        file.write(b"\n".join([*lines, b""]))
    place.wait(record([entry(message="K7Q2M9XD.2")]))
    writer = place.writer()
    step = writer.step()
    assert (step.records, step.damaged, step.newer) == (2, len(lines) - 1, 1)
    assert counted(place) == {"entries": 2, "sessions": 0, "facts": 1}


@pytest.mark.parametrize(
    "hello", ["\0", "\ud800", "ü", "\U0001f4e8", "x" * 5000, "'; DROP TABLE entries; --", "%s %(x)s ?"]
)
def test_whatever_a_stranger_says_is_text(place, hello):
    place.keep(record([refused("K7Q2M9XD-1", detail=hello, reply=hello)], session(hello=hello), ended=True))
    assert counted(place) == {"entries": 1, "sessions": 1, "facts": 1}
    journal = place.journal()
    (kept,) = journal.search(Query(), 10)
    assert kept.session.hello == hello
    assert kept.entry.detail == hello[:600].encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def test_a_line_becomes_the_same_rows_however_its_json_is_written(sqlite_place):
    """A worker's own way is read on a way of its own."""
    line = encode(
        Record(
            session(
                identity=Identity("anna", "PLAIN", "accounts", "phone", ("anna@example.org",)), hosts=("a.example",)
            ),
            [entry(findings=(Finding("spf", Result.PASS, "mx"),)), refused("K7Q2M9XD-1"), entry(forward_path=None)],
            End(NOON_S, NOON_S + 1, "quit", logins=({"account": "anna", "mechanism": "PLAIN", "verdict": "verified"},)),
        )
    )
    told = json.loads(line)
    backwards = json.dumps(told | {"session": dict(reversed(told["session"].items()))})
    writer = sqlite_place.writer()
    rows, step = writer._rows([line, json.dumps(told).encode(), line.replace(b'"anna"', b'"\\u0061nna"'), line])
    assert step.records == 4
    assert rows.entries == rows.entries[:3] * 4
    assert rows.sessions == rows.sessions[:1] * 4
    assert len(rows.facts) == 1
    assert writer._rows([backwards.encode()])[0].sessions == rows.sessions[:1]


def test_what_was_being_delivered_gives_way_to_what_became_of_it(place):
    of = session(7)
    before = entry(verdict="admitted", reason=DELIVERING, message="00000007.1", reply="")
    place.wait(record([before], of), record([before._replace(message="00000007.2")], of))
    place.wait(record([entry(message="00000007.1", settles=True)], of))
    taken_over(place.writer())
    found = place.journal().search(Query(session="00000007"), 10)
    assert sorted((kept.entry.message, kept.entry.verdict, kept.entry.reason) for kept in found) == [
        ("00000007.1", "accepted", ""),
        ("00000007.2", "admitted", DELIVERING),
    ]


def test_a_clock_that_goes_back_is_said_and_nothing_is_lost(place):
    times = [NOON_S, NOON_S + 1, NOON_S - 3600, NOON_S - 3599, NOON_S + 2]
    place.wait(*(record([entry(at=at, message=f"K7Q2M9XD.{number}")]) for number, at in enumerate(times)))
    step = place.writer().step()
    assert step.records == 5
    assert step.clock_back_s == pytest.approx(3601)
    found = [kept.entry.at for kept in place.journal().search(Query(), 10)]
    assert found == sorted(times, reverse=True)
    assert [kept.entry.at for kept in place.journal().after(0, Query(), 10)] == times, "as they came in"


def test_another_database_begins_with_what_is_still_there(place, tmp_path):
    place.keep(record([entry(message="K7Q2M9XD.1")]))
    if place.url:  # the gate moves from PostgreSQL to SQLite
        place.url = ""
    else:
        sqlite_path(place.data).rename(tmp_path / "away")
    assert taken_over(place.writer()) == 1


def test_the_backlog_of_another_gate_in_the_same_database_has_its_own_position(place, tmp_path):
    place.keep(*(record([entry()]) for _ in range(5)))
    other = Place(tmp_path / "other", place.url, place.opened)
    other.wait(record([entry()]))
    assert taken_over(other.writer()) == 1
    if place.url:
        with place.database().transaction() as connection:
            assert connection.execute(select(func.count()).select_from(BACKLOGS)).scalar_one() == 2
        assert counted(place)["entries"] == 6


# --- A database that is not as it should be ---------------------------------------------------------------------------


def test_a_newer_schema_is_refused_and_left_alone(place):
    place.keep(record([entry()]))
    with place.database().transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for attempt in (place.writer, place.journal):
        with pytest.raises(
            StorageError, match=r"made by a newer version of Gatepost \(its schema is 9999, this version"
        ):
            attempt()
    assert counted(place)["entries"] == 1


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 1000] = os.urandom(1000)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damaged, lambda path: path.write_bytes(b"no database " * 1000)])
def test_a_damaged_file_is_said_with_the_mend_and_the_mend_works(sqlite_place, damage: Callable[[Path], object]):
    place = sqlite_place
    place.keep(*(record([entry(message=f"K7Q2M9XD.{number}")]) for number in range(500)))
    place.close()
    path = sqlite_path(place.data)
    for tail in ("-wal", "-shm"):
        Path(f"{path}{tail}").unlink(missing_ok=True)
    damage(path)
    place.wait(record([entry(message="K7Q2M9XD.500")]))
    with pytest.raises(
        StorageError, match=r"is damaged \(.*\). What comes is kept in the backlog .* Move it away: mv "
    ) as said:
        taken_over(place.writer())
    commands = str(said.value).partition("Move it away: ")[2].partition("; a new one")[0]
    subprocess.run(["sh", "-c", commands], check=True, timeout=PATIENCE_S)
    taken_over(place.writer())
    assert place.journal().search(Query(session="", message_id="", message="K7Q2M9XD.500"), 5) == []  # by session
    assert "K7Q2M9XD.500" in [kept.entry.message for kept in place.journal().search(Query(), 1000)]


def test_a_directory_that_cannot_be_made_is_said(sqlite_place):
    (sqlite_place.directory / "journal").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot "):
        sqlite_place.writer()


def test_a_server_that_is_not_there_is_said_without_the_password(sqlite_place):
    place = sqlite_place
    place.url = "postgresql://gatepost:hunter2@127.0.0.1:1/none"
    with pytest.raises(StorageError, match=r"PostgreSQL at 127.0.0.1:1/none does not answer as it should: ") as said:
        place.writer()
    assert "hunter2" not in str(said.value)
    with pytest.raises(StorageError, match='write "postgresql://user:password@host:5432/database"') as said:
        Database(place.data, "hunter2")
    assert "hunter2" not in str(said.value)


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
def test_a_server_that_goes_away_in_mid_flight_costs_nothing_and_doubles_nothing(place, postgresql, monkeypatch):
    monkeypatch.setattr(writer_module, "READ_OCTETS", 2 << 20)
    place.wait(*(record([entry(message=f"K7Q2M9XD.{number}")]) for number in range(10_000)))
    writer = place.writer()
    assert writer.step().records
    with psycopg.connect(postgresql.url("postgres"), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gatepost'")
    postgresql.stop()
    with pytest.raises(StorageError, match="does not answer as it should"):
        writer.step()
    postgresql.start()
    end = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < end
        try:
            taken_over(writer)
        except StorageError:
            time.sleep(0.1)
        else:
            break
    found = [kept.entry.message for kept in place.journal().search(Query(), 20_000)]
    assert len(found) == len(set(found)) == 10_000


KILLED = """
import sys
from pathlib import Path
from tests.store.places import Place
writer = Place(Path(sys.argv[1]), sys.argv[2]).writer()
print("there", flush=True)
while True:
    writer.step()
"""


def test_a_writer_that_is_killed_loses_nothing_and_doubles_nothing(place):
    place.database().prepare()
    root = Path(__file__).parent.parent.parent
    wanted = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, place.data, place.url], cwd=root, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            place.wait(*(record([entry(message=f"K7Q2M9XD.{wanted + number}")]) for number in range(3000)))
            wanted += 3000
            process.send_signal(signal.SIGKILL)
    taken_over(place.writer())
    found = [kept.entry.message for kept in place.journal().search(Query(), 20_000)]
    assert sorted(found) == sorted(f"K7Q2M9XD.{number}" for number in range(wanted))


# --- Retention --------------------------------------------------------------------------------------------------------


def tidied(place: Place, now_s: float) -> int:
    writer = place.writer(now_s, keep_s=30 * DAY_S, pseudonyms_s=60 * DAY_S)
    rows = 0
    while done := writer.tidy():
        rows += done
    return rows


def test_after_some_weeks_names_become_pseudonyms_and_after_some_months_rows_go(place):
    anna = session(1, account="anna", client="192.0.2.9", hello="annas-laptop")
    place.keep(
        record([entry(message="00000001.1", message_id="<m@x.example>", detail="anna@x.example")], anna, ended=True),
        record([entry(at=NOON_S + 40 * DAY_S)], session(2, account="anna"), ended=True),
    )
    assert tidied(place, NOON_S + 29 * DAY_S) == 0
    assert tidied(place, NOON_S + 31 * DAY_S) >= 2
    journal = place.journal()
    newer, older = journal.search(Query(account="anna"), 10)
    assert (newer.pseudonymous, older.pseudonymous) == (False, True)
    assert older.session.identity is not None
    assert older.session.identity.account.startswith("p-")
    assert str(older.session.client.address).startswith("100::")
    assert str(older.entry.reverse_path).endswith("@x.example")
    told = repr(older) + repr(journal.sessions(Query(account="anna"), 10)[-1])
    for name in ("'anna'", "anna@", "192.0.2.9", "bob@", "<m@x", "a@x.example"):
        assert name not in told, name
    with place.database().transaction() as connection:
        raw = repr(connection.execute(select(FACTS)).all()) + repr(connection.execute(select(ENTRIES)).first())
    assert "annas-laptop" not in raw
    for query in (
        Query(message_id="<m@x.example>"),
        Query(reverse_path="a@x.example", until=NOON_S + 1),
        Query(client=anna.client.address),
        Query(session="00000001"),
    ):
        assert [kept.id for kept in place.journal().search(query, 10)] == [older.id], query
    assert tidied(place, NOON_S + 31 * DAY_S) == 0
    assert tidied(place, NOON_S + 91 * DAY_S) >= 2
    assert [kept.id for kept in place.journal().search(Query(), 10)] == [newer.id]


@pytest.mark.parametrize(("more", "gone"), [(-1, 0), (0, 0), (1, 1), (50, 50)])
def test_there_are_no_more_rows_than_there_may_be_and_the_oldest_go(place, more, gone):
    numbers = range(1000 + more)
    place.wait(*(record([entry(message=f"K7Q2M9XD.{number}")], ended=True) for number in numbers))
    step = place.writer(entries_max=1000).step()
    assert step.crowded_out == 2 * gone
    assert counted(place)["entries"] == counted(place)["sessions"] == 1000 + more - gone
    found = [kept.entry.message for kept in place.journal().search(Query(), 2000)]
    assert set(found) == {f"K7Q2M9XD.{number}" for number in numbers[gone:]}


def test_a_flood_of_facts_has_an_end(place):
    for start in range(0, 3000, 100):
        place.wait(*(record([entry()], session(hello=f"bot{number}")) for number in range(start, start + 100)))
    writer = place.writer(entries_max=500)
    taken_over(writer)
    place.wait(record([entry()], session(hello="last")))
    taken_over(writer)
    assert counted(place)["facts"] <= 625
    assert {kept.session.hello for kept in place.journal().search(Query(), 2000)} >= {"last", "bot2999"}


def test_retention_goes_on_in_pieces(place):
    many = TIDY_ROWS + 10
    place.keep(
        *(record([entry(at=NOON_S + number / 1000)], session(account="anna"), ended=True) for number in range(many))
    )
    tidied(place, NOON_S + 31 * DAY_S)
    assert {kept.pseudonymous for kept in place.journal().search(Query(), many)} == {True}
    tidied(place, NOON_S + 91 * DAY_S)
    assert counted(place) == {"entries": 0, "sessions": 0, "facts": 0}


def test_a_session_without_mail_is_kept(place):
    end = End(NOON_S, NOON_S + 1, "lost", logins=({"account": "root", "mechanism": "PLAIN", "verdict": "denied"},))
    place.keep(Record(session(3), (), end))
    (found,) = place.journal().sessions(Query(session="00000003"), 10)
    assert (found.how, found.started, found.ended, found.logins[0]["account"]) == ("lost", NOON_S, NOON_S + 1, "root")


def test_a_path_without_a_domain_is_kept(place):
    place.keep(record([entry(reverse_path=Mailbox("a", "x.example"))]))
    assert len(place.journal().search(Query(domain="x.example"), 5)) == 1


def test_the_revisions_are_those_of_the_migrations():
    config = Config()
    config.set_main_option("script_location", "gatepost:store/migrations")
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert tuple(script.revision for script in reversed(list(scripts.walk_revisions()))) == REVISIONS
