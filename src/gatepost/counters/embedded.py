"""The store that the workers of one machine share: a file that all of them map (LMDB).

Why: a record is read in about a microsecond and changed in about ten, by any process, with no server beside the gate.
Trust: the directory is the gate's own.  A file may be damaged all the same: nothing is synced, so a power cut may tear
    it.  The library maps the file and follows what stands there, so it is checked in full before it is opened, by
    whoever opens it first, without the library's engine.
Promise: at the start a file that cannot be used is a StorageError that says what to do; but after the whole system went
    down, what is left is read into a new file, or begun anew where it is torn, and that is said.  When the store fails
    at run time, this process goes on in its own memory, until it is started again, and that is said once: bans and
    counts of before are gone for it, so nobody is locked out, and it bans again by what it sees itself, so a guesser is
    let in at most as often as there are workers more.  A write takes away up to ``SWEEP_RECORDS`` of its kind that are
    over, and, where a kind has its greatest number, the one that would be over next.  A process that is killed while it
    writes leaves nothing half written, and no lock.
    A store is opened once in a process, and no process forks after that.
Sources: lmdb.h (MDB_NOSYNC, MDB_NOMETASYNC; robust mutexes), flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import lmdb.verify

from gatepost.counters.store import (
    KEY_OCTETS_MAX,
    KINDS,
    RECORDS_MAX,
    SWEEP_RECORDS,
    VALUE_OCTETS_MAX,
    Change,
    Item,
    MemoryStore,
    checked,
    holds,
)
from gatepost.errors import StorageError

MAP_OCTETS_MAX = 640 << 20  # what the greatest numbers of all kinds need, and a third more; a file with holes
READERS_MAX = 512  # processes that read at the same time
_BRIM = 0.75  # of the file's pages: beyond it each new record drives out _BRIM_RECORDS; a removal needs free pages, too
_BRIM_RECORDS = 8

_HEAD = struct.Struct(">dd")  # when a record was written, and when it is over
_END = struct.Struct(">d")  # positive ones sort as octets
_ENDS = b".ends"  # behind a kind: the database of its keys in the order of their ends
_DATABASES = 2 * len(KINDS)

# The binding lets an error through as SystemError where a cursor removes what lies on a damaged page.
_FAILURES = (lmdb.Error, SystemError)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def state_directory(data: str) -> Path:
    """Where the store lies, below the gate's data directory."""
    return Path(data) / "counters" / "state"


class EmbeddedStore:
    """One process's access to the file.

    Args:
        directory: made where it is missing.
        said: takes one sentence for the log, when something went wrong and the gate goes on.
        map_octets: what the file may grow to; the same in all processes.

    Raises:
        StorageError: the file cannot be used; its text says what to do.
    """

    def __init__(
        self, directory: Path, said: Callable[[str], None] = lambda _: None, *, map_octets: int = MAP_OCTETS_MAX
    ) -> None:
        self._directory = directory
        self._said = said
        self._map_octets = map_octets
        self._memory: MemoryStore | None = None
        self._guard = -1
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._guard = os.open(directory / "guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            # Whoever uses the file holds the guard together with others; who gets it alone may look through the file.
            if _alone(self._guard):
                self._look_through()
            fcntl.flock(self._guard, fcntl.LOCK_SH)
            self._env = lmdb.open(
                str(directory),
                map_size=map_octets,
                mode=0o600,
                sync=False,
                metasync=False,
                max_readers=READERS_MAX,
                max_dbs=_DATABASES,
                max_spare_txns=1,
            )
            self._env.reader_check()  # one that was killed would keep old pages from being used again
            self._brim_pages = _BRIM * map_octets / self._env.stat()["psize"]
            with self._env.begin(write=True) as txn:
                self._records = {kind: self._env.open_db(kind, txn=txn) for kind in KINDS}
                self._ends = {kind: self._env.open_db(kind + _ENDS, txn=txn) for kind in KINDS}
        except (OSError, lmdb.Error) as error:
            self._let_go_of_guard()
            number, why = (
                (error.errno, error.strerror or str(error)) if isinstance(error, OSError) else (error.code, str(error))
            )
            mend = (
                f"they are for the gate's user and root; `chown -R` gives {directory} back"
                if number in (errno.EACCES, errno.EPERM)
                else _mend(directory)
            )
            raise StorageError(f"cannot use the shared counters in {directory}: {why}; {mend}") from error
        except StorageError:
            self._let_go_of_guard()
            raise

    def _look_through(self) -> None:
        """Nobody else has the file: see that it is whole, and forget what dead processes left in the lock's file.

        Raises:
            StorageError: it is damaged, though the system has not gone down since.
        """
        data, boot = self._directory / "data.mdb", self._directory / "boot"
        now_up = _BOOT_ID.read_text("ascii")
        then_up = boot.read_text("utf-8", "replace") if boot.exists() else now_up
        (self._directory / "lock.mdb").unlink(missing_ok=True)
        if data.exists() and data.stat().st_size:
            problem = _damage(data)
            if not problem and then_up != now_up:
                problem = self._copy_anew(data)
            if problem and then_up == now_up:
                raise StorageError(f"the shared counters {data} are damaged ({problem}); {_mend(self._directory)}")
            if problem:
                data.unlink()
                self._said(
                    f"the shared counters {data} were torn when this system went down ({problem}), and begin anew: "
                    "bans and counts of before are forgotten"
                )
        boot.write_text(now_up, "ascii")
        boot.chmod(0o600)

    def _copy_anew(self, data: Path) -> str:
        """The system has gone down: read what is left into a new file.

        The check finds a tear between pages, not one between two halves of a page.  To read such a page is harmless, to
        change it is not; so nothing is ever changed in it.

        Returns:
            Why that cannot be done, "" where it was.
        """
        fresh = self._directory / "anew"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with (
                lmdb.open(
                    str(self._directory), map_size=self._map_octets, readonly=True, lock=False, max_dbs=_DATABASES
                ) as old,
                lmdb.open(
                    str(fresh), map_size=self._map_octets, mode=0o600, sync=False, lock=False, max_dbs=_DATABASES
                ) as new,
                old.begin() as source,
                new.begin(write=True) as target,
            ):
                kept = old.dbs(source)
                for kind in KINDS:
                    if kind not in kept:
                        continue  # this version knows a kind that the one before did not
                    records, ends = new.open_db(kind, txn=target), new.open_db(kind + _ENDS, txn=target)
                    for key, octets in source.cursor(old.open_db(kind, txn=source, create=False)):
                        whole = len(octets) - _HEAD.size in range(VALUE_OCTETS_MAX + 1)
                        if whole and key[:1] == kind and len(key) <= KEY_OCTETS_MAX:
                            target.put(key, octets, db=records)
                            target.put(_end_key(key, octets), b"", db=ends)
        except _FAILURES as error:
            return str(error)
        (fresh / data.name).replace(data)
        shutil.rmtree(fresh)
        return ""

    # ---- the primitives of Store

    def read(self, keys: Sequence[bytes], now_s: float) -> list[bytes | None]:
        if self._memory is not None:
            return self._memory.read(keys, now_s)
        try:
            with self._env.begin() as txn:
                return [_live(txn.get(key, db=self._records[key[:1]]), now_s) for key in keys]
        except _FAILURES as error:
            return self._lost(error).read(keys, now_s)

    def update(self, key: bytes, now_s: float, change: Change) -> None:
        if self._memory is not None:
            self._memory.update(key, now_s, change)
            return
        try:
            try:
                self._write(key, now_s, change)
            except lmdb.MapFullError:  # somebody reads since long ago, so that old pages cannot be used again
                self._env.reader_check()
                self._write(key, now_s, change)
        except _FAILURES as error:
            self._lost(error).update(key, now_s, change)

    def remove(self, key: bytes, now_s: float) -> bool:
        if self._memory is not None:
            return self._memory.remove(key, now_s)
        try:
            with self._env.begin(write=True) as txn:
                octets = txn.get(key, db=self._records[key[:1]])
                if octets is not None:
                    self._take(txn, key, octets)
                return _live(octets, now_s) is not None
        except _FAILURES as error:
            return self._lost(error).remove(key, now_s)

    def items(self, kind: bytes, now_s: float, limit: int) -> list[Item]:
        if self._memory is not None:
            return self._memory.items(kind, now_s, limit)
        found: list[Item] = []
        try:
            with self._env.begin() as txn, txn.cursor(self._records[kind]) as cursor:
                for key, octets in cursor:
                    if len(found) >= limit:
                        break
                    value = _live(octets, now_s)
                    if value is not None:
                        found.append(Item(key, value, _HEAD.unpack_from(octets)[1]))
        except _FAILURES as error:
            return self._lost(error).items(kind, now_s, limit)
        return found

    def close(self) -> None:
        self._env.close()
        self._let_go_of_guard()

    # ---- how

    def _write(self, key: bytes, now_s: float, change: Change) -> None:
        kind = key[:1]
        records, ends = self._records[kind], self._ends[kind]
        with self._env.begin(write=True) as txn:
            old = txn.get(key, db=records)
            made = change(_live(old, now_s))
            if made is None:
                return
            value, until_s = checked(key, made[0]), now_s + made[1]
            if old is not None:
                self._take(txn, key, old)
            self._sweep(txn, kind, now_s)
            if old is None:
                self._make_room(txn, kind)
            octets = _HEAD.pack(now_s, until_s) + value
            txn.put(key, octets, db=records)
            txn.put(_end_key(key, octets), b"", db=ends)

    def _take(self, txn: lmdb.Transaction[bytes], key: bytes, octets: bytes) -> None:
        """Remove a record of these octets, and its end."""
        txn.delete(key, db=self._records[key[:1]])
        txn.delete(_end_key(key, octets), db=self._ends[key[:1]])

    def _sweep(self, txn: lmdb.Transaction[bytes], kind: bytes, now_s: float) -> None:
        """Remove a few that are over."""
        now = _END.pack(max(now_s, 0.0))
        with txn.cursor(self._ends[kind]) as cursor:
            for _ in range(SWEEP_RECORDS):
                if not cursor.first() or cursor.key()[: _END.size] > now:
                    return
                txn.delete(cursor.key()[_END.size :], db=self._records[kind])
                cursor.delete()

    def _take_first(self, txn: lmdb.Transaction[bytes], kind: bytes, count: int) -> None:
        """Remove those that are over, or would be over next."""
        with txn.cursor(self._ends[kind]) as cursor:
            while count and cursor.first():
                txn.delete(cursor.key()[_END.size :], db=self._records[kind])
                cursor.delete()
                count -= 1

    def _make_room(self, txn: lmdb.Transaction[bytes], kind: bytes) -> None:
        """A new record of this kind comes: keep below the greatest number, and away from the end of the file."""
        if txn.stat(self._records[kind])["entries"] >= RECORDS_MAX:
            self._take_first(txn, kind, 1)
        if self._env.info()["last_pgno"] > self._brim_pages:  # the file never shrinks; is it as full as it is long?
            used = {kind: _pages(txn, self._records[kind]) + _pages(txn, self._ends[kind]) for kind in KINDS}
            if sum(used.values()) > self._brim_pages:
                self._take_first(txn, max(used, key=used.__getitem__), _BRIM_RECORDS)

    def _lost(self, error: Exception) -> MemoryStore:
        """The file failed: go on without it."""
        self._memory = MemoryStore()
        self.close()
        self._said(
            f"the shared counters in {self._directory} failed ({error}): bans and counts of before are forgotten, and "
            "this process counts for itself until it is started again"
        )
        return self._memory

    def _let_go_of_guard(self) -> None:
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1


def _alone(guard: int) -> bool:
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_key(key: bytes, octets: bytes) -> bytes:
    """A record's key in the order of ends."""
    return _END.pack(max(_HEAD.unpack_from(octets)[1], 0.0)) + key


def _pages(txn: lmdb.Transaction[bytes], database: lmdb._Database) -> int:
    stat = txn.stat(database)
    return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


def _live(octets: bytes | None, now_s: float) -> bytes | None:
    """The value in a record, where it holds."""
    if octets is None or len(octets) < _HEAD.size:
        return None
    written_s, until_s = _HEAD.unpack_from(octets)
    return octets[_HEAD.size :] if holds(written_s, until_s, now_s) else None


def _damage(data: Path) -> str:
    """What is wrong with the file, "" for nothing."""
    try:
        problems: list[str] = lmdb.verify.verify(str(data))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return str(error)
    return problems[0] if problems else ""


def _mend(directory: Path) -> str:
    return f"stop the gate, `rm -r {directory}`, start it again: bans and counts of failed logins are forgotten by that"
