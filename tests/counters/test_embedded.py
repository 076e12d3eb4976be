"""The file that processes share: two at once, one killed, full, torn, damaged, in the wrong hands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import lmdb
import pytest
from tests.counters.conftest import NOW

from gatepost.counters import Digests, EmbeddedStore, embedded, state_directory
from gatepost.counters.store import (
    ACCOUNT_BAN,
    BAN,
    EVIDENCE,
    KINDS,
    LENGTHS,
    LOGIN,
    PAIR,
    PREFIX,
    RECORDS_MAX,
    RESUMED,
    SUSPENSION,
    USER,
)
from gatepost.errors import StorageError

WRITER = f"""
import sys
from pathlib import Path
from gatepost.counters import EmbeddedStore
store = EmbeddedStore(Path(sys.argv[1]), lambda sentence: print(sentence, flush=True))
print("here", flush=True)
sys.stdin.readline()
number = 0
while number < int(sys.argv[2]):
    store.update(b"p" + sys.argv[3].encode(), {NOW}, lambda old: (b"%d" % (int(old or 0) + 1), 3600.0))
    store.update(b"c%d" % (number % 5000), {NOW} + number / 1000, lambda old: (b"x" * 100, 3600.0))
    number += 1
    if number == 50:
        print("under way", flush=True)
print("done", flush=True)
"""


def writer(stack: ExitStack, directory: Path, count: int, key: str = "together") -> subprocess.Popen[str]:
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory), str(count), key],
            stdin=PIPE,
            stdout=PIPE,
            text=True,
            bufsize=1,
        )
    )
    assert said(process) == "here"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")


def put(store, key, value, ttl_s=60.0, now_s=NOW):
    store.update(key, now_s, lambda _: (value, ttl_s))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "counters" / "state"


def test_it_lies_below_the_data_directory():
    assert state_directory("/var/lib/gatepost") == Path("/var/lib/gatepost/counters/state")


def test_processes_at_once_lose_no_update(directory):
    with ExitStack() as stack:
        processes = [writer(stack, directory, 2000) for _ in range(2)]
        store = EmbeddedStore(directory)
        for process in processes:
            go(process)
        for _ in range(1000):
            put(store, PAIR + b"here", b"v")
            assert store.read((PAIR + b"here",), NOW) == [b"v"]
        for process in processes:
            assert [said(process), said(process)] == ["under way", "done"]
        assert store.read((PAIR + b"together",), NOW) == [b"4000"]
        store.close()


@pytest.mark.parametrize("number", range(5))
def test_a_writer_that_is_killed_holds_nobody_up_and_breaks_nothing(directory, number):
    with ExitStack() as stack:
        process = writer(stack, directory, 10**9)
        store = EmbeddedStore(directory)
        go(process)
        assert said(process) == "under way"
        for _ in range(100 * (number + 1)):
            put(store, PAIR + b"here", b"v")
        process.send_signal(signal.SIGKILL)
        process.wait()
        put(store, PAIR + b"after", b"v")
        counted = int(store.read((PAIR + b"together",), NOW)[0] or 0)
        assert counted >= 50
        store.close()
    complaints: list[str] = []
    store = EmbeddedStore(directory, complaints.append)  # which looks through the file, for nobody else has it
    assert store.read((PAIR + b"after", PAIR + b"together"), NOW) == [b"v", b"%d" % counted]
    assert not complaints
    store.close()


HOLDER = f"""
import sys
from pathlib import Path
from gatepost.counters import EmbeddedStore
store = EmbeddedStore(Path(sys.argv[1]))

def change(old):
    print("inside", flush=True)
    sys.stdin.readline()

store.update(b"pa", {NOW}, change)
"""


def test_a_process_that_is_killed_inside_an_update_holds_nobody_up(directory):
    store = EmbeddedStore(directory)
    put(store, PAIR + b"a", b"v")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdin=PIPE, stdout=PIPE, text=True) as holder:
        assert said(holder) == "inside"
        assert store.read((PAIR + b"a",), NOW) == [b"v"], "who reads never waits"
        holder.kill()
        holder.wait()
    put(store, PAIR + b"b", b"w")
    assert store.read((PAIR + b"a", PAIR + b"b"), NOW) == [b"v", b"w"]
    store.close()


def test_what_is_kept_outlives_its_process(directory):
    store = EmbeddedStore(directory)
    put(store, BAN + b"a", b"v")
    store.close()
    store = EmbeddedStore(directory)
    assert store.read((BAN + b"a",), NOW) == [b"v"]
    store.close()


def test_everything_there_is_its_owners_alone(directory):
    store = EmbeddedStore(directory)
    Digests.in_directory(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(
        ("boot", "data.mdb", "guard", "key", "lock.mdb"), 0o600
    )
    store.close()


# ---- full


def test_a_full_file_lets_the_oldest_go(directory):
    said: list[str] = []
    store = EmbeddedStore(directory, said.append, map_octets=512 << 10)
    for number in range(5000):
        put(store, PAIR + b"%05d" % number, bytes(1000), 3600.0, NOW + number / 100)
        assert store.read((PAIR + b"%05d" % number,), NOW + 60)[0] is not None
    kept = [item.key for item in store.items(PAIR, NOW + 60, 9999)]
    assert len(kept) > 50
    assert kept == [PAIR + b"%05d" % number for number in range(5000 - len(kept), 5000)], "the latest, without a gap"
    assert not said
    store.close()


def test_a_full_file_of_large_records(directory):
    said: list[str] = []
    store = EmbeddedStore(directory, said.append, map_octets=1 << 20)
    for number in range(3000):
        put(store, BAN + b"%05d" % number, bytes(4000), 3600.0, NOW + number / 100)
    assert store.read((BAN + b"02999",), NOW + 60)[0] is not None
    assert not said
    store.close()


def test_a_reader_that_was_stopped_ends_no_session(directory):
    """It keeps every page from being used again: the file is full, and cannot be made emptier."""
    said: list[str] = []
    store = EmbeddedStore(directory, said.append, map_octets=512 << 10)
    put(store, PAIR + b"a", b"v")
    with store._env.begin() as stopped:
        stopped.get(b"p")
        for number in range(5000):
            put(store, PAIR + b"%05d" % number, bytes(1000), 3600.0, NOW + number / 100)
            assert store.read((PAIR + b"%05d" % number,), NOW + 60)[0] is not None
            if said:
                break
    assert len(said) == 1
    assert "counts for itself" in said[0]
    store.close()


def test_the_file_holds_the_greatest_number_of_every_kind():
    """Full sets of 32 members; bans and logins with names and reasons of usual length; pages filled to 60 percent."""
    octets = {PAIR: 100, USER: 280, PREFIX: 280, BAN: 300, ACCOUNT_BAN: 300, LENGTHS: 0, LOGIN: 330}
    octets |= {EVIDENCE: 300, SUSPENSION: 600, RESUMED: 300}
    in_trees = sum(RECORDS_MAX * (octets.get(kind, 60) + 90) / 0.6 for kind in KINDS)
    assert in_trees < embedded.MAP_OCTETS_MAX * 0.75


def test_a_hundred_thousand_strangers_leave_room(directory):
    said: list[str] = []
    store = EmbeddedStore(directory, said.append)
    put(store, BAN + b"ours", b"v", 1e6)
    for number in range(100_000):
        put(store, PAIR + os.urandom(16), b"\0" * 8, 3600.0, NOW + number / 100)
    assert len(store.items(PAIR, NOW + 1000, 10**6)) == RECORDS_MAX
    assert store.read((BAN + b"ours",), NOW) == [b"v"]
    assert (directory / "data.mdb").stat().st_size < embedded.MAP_OCTETS_MAX / 4
    assert not said
    store.close()


# ---- broken


def test_a_failure_at_run_time_is_said_once_and_this_process_goes_on(directory, monkeypatch):
    said: list[str] = []
    store = EmbeddedStore(directory, said.append)
    put(store, BAN + b"a", b"v")

    class Broken:
        def begin(self, **_):
            raise lmdb.CorruptedError("mdb_txn_begin")

        def close(self):
            pass

    whole = store._env
    monkeypatch.setattr(store, "_env", Broken())
    assert store.read((BAN + b"a",), NOW) == [None], "nobody is locked out by what cannot be read"
    whole.close()
    store.update(BAN + b"b", NOW, lambda _: (b"w", 60.0))
    assert store.read((BAN + b"b",), NOW + 59) == [b"w"], "and who guesses is counted again"
    assert [item.key for item in store.items(BAN, NOW, 9)] == [BAN + b"b"]
    assert store.remove(BAN + b"b", NOW)
    assert len(said) == 1
    assert "failed" in said[0]
    assert "counts for itself until it is started again" in said[0]
    store.close()


@pytest.mark.parametrize("operation", ["update", "remove", "items", "read"])
def test_whatever_meets_the_failure_is_done_in_memory(directory, operation):
    store = EmbeddedStore(directory, lambda _: None)
    store._env.close()  # as good as broken: everything raises from here on
    if operation == "update":
        put(store, PAIR + b"a", b"v")
        assert store.read((PAIR + b"a",), NOW) == [b"v"]
    elif operation == "remove":
        assert store.remove(PAIR + b"a", NOW) is False
    elif operation == "read":
        assert store.read((PAIR + b"a",), NOW) == [None]
    else:
        assert store.items(PAIR, NOW, 9) == []
    store.close()


def filled(directory: Path) -> Path:
    store = EmbeddedStore(directory)
    for number in range(2000):
        put(store, PAIR + b"%05d" % number, bytes(200))
    store.close()
    return directory / "data.mdb"


def tear(data: Path, how: str) -> None:
    octets = bytearray(data.read_bytes())
    if how == "cut":
        del octets[len(octets) // 2 :]
    elif how == "rubbish":
        octets[:] = os.urandom(len(octets))
    elif how == "text":
        octets[:] = b"this is no such file\n"
    else:
        octets[8192:] = bytes(len(octets) - 8192)
    data.write_bytes(octets)


@pytest.mark.parametrize("how", ["cut", "rubbish", "text", "zeros"])
def test_a_damaged_file_is_said_at_the_start_with_what_to_do(directory, how):
    tear(filled(directory), how)
    with pytest.raises(StorageError, match=r"are damaged \(.*\); stop the gate, `rm -r .*state`, start it again"):
        EmbeddedStore(directory)
    with pytest.raises(StorageError, match="are damaged"):
        EmbeddedStore(directory)


def test_what_is_to_be_done_mends_it(directory):
    tear(filled(directory), "cut")
    with pytest.raises(StorageError):
        EmbeddedStore(directory)
    subprocess.run(["rm", "-r", directory], check=True)
    EmbeddedStore(directory).close()


def test_what_a_power_cut_tore_begins_anew(directory):
    """A gate whose host comes up again by itself must come up as well."""
    tear(filled(directory), "cut")
    (directory / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
    said: list[str] = []
    store = EmbeddedStore(directory, said.append)
    assert store.items(PAIR, NOW, 9) == []
    assert len(said) == 1
    assert "torn when this system went down" in said[0]
    put(store, PAIR + b"a", b"v")
    store.close()
    EmbeddedStore(directory, said.append).close()
    assert len(said) == 1


def test_what_a_reboot_left_whole_is_kept(directory):
    filled(directory)
    (directory / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
    said: list[str] = []
    store = EmbeddedStore(directory, said.append)
    assert store.read((PAIR + b"00007",), NOW) == [bytes(200)]
    assert not said
    store.close()


def test_what_a_power_cut_left_half_in_a_page_is_never_written_to(directory):
    """The length of one key is another than its page has room for, which the check of the whole file does not see."""
    data = filled(directory)
    octets = bytearray(data.read_bytes())
    at = octets.find(b"\x06\0" + PAIR + b"00007")  # its length stands before the key, in the file's own order
    assert at > 0
    octets[at : at + 2] = (200).to_bytes(2, "little")
    data.write_bytes(octets)
    (directory / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
    store = EmbeddedStore(directory)
    found = store.items(PAIR, NOW, 9999)
    assert [item.key for item in found] == [PAIR + b"%05d" % number for number in range(2000) if number != 7]
    for item in found:
        assert store.remove(item.key, NOW)
    put(store, PAIR + b"00007", b"v")
    assert [item.key for item in store.items(PAIR, NOW, 9999)] == [PAIR + b"00007"]
    assert not (directory / "anew").exists()
    store.close()


def test_a_kind_that_the_version_before_did_not_know_is_no_damage(directory, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(embedded, "KINDS", tuple(kind for kind in KINDS if kind != LOGIN))
        filled(directory)
    (directory / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
    store = EmbeddedStore(directory)
    assert store.read((PAIR + b"00007", LOGIN + b"a"), NOW) == [bytes(200), None]
    store.close()


def test_a_damaged_lock_file_is_made_anew(directory):
    filled(directory)
    (directory / "lock.mdb").write_bytes(os.urandom(5000))
    store = EmbeddedStore(directory)
    assert store.read((PAIR + b"00007",), NOW) == [bytes(200)]
    store.close()


def test_a_file_that_was_begun_only_is_no_damage(directory):
    directory.mkdir(parents=True)
    (directory / "data.mdb").touch()
    EmbeddedStore(directory).close()


def test_a_place_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot use the shared counters in .*: Not a directory"):
        EmbeddedStore(tmp_path / "file" / "state")
    (tmp_path / "state" / "data.mdb").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot use the shared counters in"):
        EmbeddedStore(tmp_path / "state")


def test_a_refused_start_keeps_no_guard(directory):
    """Else the next one, in this process, would not look through the file."""
    tear(filled(directory), "cut")
    for _ in range(3):
        with pytest.raises(StorageError, match="are damaged"):
            EmbeddedStore(directory)


def test_the_key_is_one_for_all_and_cannot_be_planted(directory):
    directory.mkdir(parents=True)
    one, other = Digests.in_directory(directory), Digests.in_directory(directory)
    assert one.name("a") == other.name("A")
    assert one.mark_key == other.mark_key
    assert one.secret("a", "s") == other.secret("a", "s") != one.secret("b", "s")
    assert len(one.secret("a", "s")) == 4
    (directory / "key").unlink()
    assert Digests.in_directory(directory).name("a") != one.name("a")
    (directory / "key").unlink()
    (directory / "key").symlink_to("/etc/passwd")
    with pytest.raises(StorageError, match="cannot use the key"):
        Digests.in_directory(directory)
