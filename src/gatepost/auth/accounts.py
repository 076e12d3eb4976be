"""Our own accounts: one file each, and the verifier that reads it at every login.

Why: a gate in front of a server without AUTH, or of a printer's only way out, needs accounts of its own; and a phone, a
    printer or a script should have a password of its own, which can be taken from it without changing anybody else's.
Trust: names and secrets are a stranger's, prepared by ``smtp.sasl``.  The directory belongs to the gate's user, who may
    one day be whoever took a worker over: root follows no link in it and opens nothing but plain files.
Promise: what is written is whole and on disk, or not there at all; a change is in force at the next login, in every
    process.  Two processes that change one account wait for each other.  A file that is damaged, too large, writable by
    others or of a newer schema is ``StorageError`` with its name, and ``Unavailable`` at a login: never a yes.
    Every no costs exactly one argon2 verification, whether there is no such account, it is locked, a bait, or the
    secret is wrong; every secret is compared in constant time.
Sources: RFC 9106 (argon2id), RFC 5802 §3 (what SCRAM keeps), RFC 8265 §4 (preparation, done in ``smtp.sasl``).
    The account's own password is kept as argon2id: people choose it, so each guess at a stolen file must be dear.  The
    keys of SCRAM beside it are made with many iterations for the same reason; the client pays them at each login.
    Why a device's password is cheaper to check: ``auth.account``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import VerificationError, VerifyMismatchError

from gatepost.auth import Credentials, Denied, Outcome, Unavailable, Verified
from gatepost.auth.account import (
    DEVICES_MAX,
    LABEL_OCTETS_MAX,
    SUFFIX,
    Account,
    Device,
    account_name,
    base64_text,
    decoded,
    device_digest,
    device_password,
    encoded,
    file_name,
    is_label,
)
from gatepost.auth.scram import KEY_OCTETS, ScramKeys, ScramRecord, derive
from gatepost.errors import StorageError
from gatepost.smtp.sasl import Password, prepare_secret

T = TypeVar("T")

FILE_OCTETS_MAX = 64 << 10
USED_EVERY_S = 3600  # a device's last use is as exact as that
READS_AT_ONCE = 2  # threads of one process
HASHES_AT_ONCE = 2  # ditto: of a worker, 19 MiB and a processor each
LOGINS_WAITING_MAX = 64  # a second or two of work for those threads

SCRAM_ITERATIONS = 600_000  # of a new account: an attacker with the file pays them at each guess
SALT_OCTETS = 16

_TEMPORARY, _KEY_FILE = ".tmp", ".key"

HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 << 10, parallelism=1, type=Type.ID)


class AccountStore:
    """The directory of accounts.  All of it blocks: for threads, and for the command line.

    Args:
        directory: made with the first account; of root's making, it and its files belong to whoever owns what is above.
        hasher: makes and checks the hashes of passwords.
        iterations: of SCRAM, for a new account.
        now: seconds since the epoch.
    """

    __slots__ = ("_now", "_path", "hasher", "iterations")

    def __init__(
        self,
        directory: str,
        *,
        hasher: PasswordHasher = HASHER,
        iterations: int = SCRAM_ITERATIONS,
        now: Callable[[], float] = lambda: datetime.now(UTC).timestamp(),
    ) -> None:
        self._path = Path(directory)
        self.hasher = hasher
        self.iterations = iterations
        self._now = now

    def read(self, name: str) -> Account | None:
        """The account of this name; None where there is none.

        Args:
            name: from ``account_name``.

        Raises:
            StorageError: there is a file, and it does not tell.
        """
        with self._directory() as directory:
            return None if directory is None else self._load(directory, file_name(name), name)

    def names(self) -> list[str]:
        """The files of all accounts, in order; ``read_file`` reads one.

        Raises:
            StorageError: the directory cannot be read.
        """
        with self._directory() as directory:
            if directory is None:
                return []
            with self._failing("cannot be read"):
                entries = os.listdir(directory)  # noqa: PTH208  what is open, not what stands there now
                return sorted(entry for entry in entries if entry.endswith(SUFFIX) and entry[0] != ".")

    def read_file(self, file: str) -> Account | None:
        """The account in a file that ``names`` gave; None where it was removed since.

        Raises:
            StorageError: it does not tell.
        """
        with self._directory() as directory:
            return None if directory is None else self._load(directory, file)

    def add(self, name: str, password: str = "", *, bait: bool = False) -> Account:
        """A new account.

        Args:
            name: from ``account_name``.
            password: as typed; of a bait nobody knows one.

        Raises:
            ValueError: a sentence: there is one already, or the password cannot be taken.
            StorageError: it was not written.
        """
        account = Account(
            name=name,
            created=int(self._now()),
            password="",
            salt=secrets.token_bytes(SALT_OCTETS),
            iterations=self.iterations,
            scram=ScramKeys(b"", b""),
            bait=bait,
        )
        account = self._with_password(account, device_password() if bait else password)
        with self._locked() as directory:
            if self._exists(directory, file_name(name)):
                raise ValueError(f"there is an account {name} already; `gatepost account passwd` changes its password")
            self._save(directory, account)
        return account

    def set_password(self, name: str, password: str) -> Account:
        """Give an account a new password; its devices keep theirs.

        Raises:
            LookupError: there is no such account.
            ValueError: a sentence: the password cannot be taken.
            StorageError: it was not written.
        """

        def with_password(account: Account) -> Account:
            if account.bait:
                raise ValueError(_is_bait(name))
            return self._with_password(account, password)

        return self._change(name, with_password)

    def set_locked(self, name: str, *, locked: bool) -> Account:
        """Lock an account, or let it be used again.

        Raises:
            LookupError, StorageError: as ``set_password``.
        """
        return self._change(name, lambda account: replace(account, locked=locked))

    def add_device(self, name: str, label: str) -> str:
        """A new password for a device of the account; it is shown once, and nobody can tell it later.

        Raises:
            LookupError: there is no such account.
            ValueError: a sentence: the label is taken or cannot be one, or there are too many devices.
            StorageError: it was not written.
        """
        if not is_label(label):
            raise ValueError(f"a label is printable text of 1 to {LABEL_OCTETS_MAX} octets without outer spaces")
        password = device_password()

        def with_device(account: Account) -> Account:
            if account.bait:
                raise ValueError(_is_bait(name))
            if any(device.label == label for device in account.devices):
                raise ValueError(f"{name} has a device {label} already; remove it first, or take another label")
            if len(account.devices) >= DEVICES_MAX:
                raise ValueError(f"{name} has {DEVICES_MAX} devices, which is the most; remove one")
            device = Device(
                label,
                device_digest(account.salt, password),
                derive(password, account.salt, account.iterations),
                int(self._now()),
            )
            return replace(account, devices=(*account.devices, device))

        self._change(name, with_device)
        return password

    def remove_device(self, name: str, label: str) -> Account:
        """Take a device's password from it.

        Raises:
            LookupError: there is no such account, or no such device.
            StorageError: it was not written.
        """

        def without_device(account: Account) -> Account:
            devices = tuple(device for device in account.devices if device.label != label)
            if devices == account.devices:
                raise LookupError(f"{account.name} has no device {label}")
            return replace(account, devices=devices)

        return self._change(name, without_device)

    def remove(self, name: str) -> None:
        """Remove an account for good.

        Raises:
            LookupError: there is no such account.
            StorageError: it could not be removed.
        """
        with self._locked(name) as directory, self._failing("cannot be changed"):
            try:
                os.unlink(file_name(name), dir_fd=directory)
            except FileNotFoundError:
                raise LookupError(_no_account(name)) from None
            os.fsync(directory)

    def used(self, name: str, label: str) -> None:
        """Note that a device has just logged in, to the hour, so that it is written once in an hour.

        A login does not depend on it: what cannot be written, or is being changed by another, is noted the next time.
        """
        now = int(self._now())
        hour = now - now % USED_EVERY_S

        def with_use(account: Account) -> Account:
            return replace(
                account,
                devices=tuple(
                    replace(device, last_used=hour) if device.label == label else device for device in account.devices
                ),
            )

        with contextlib.suppress(StorageError, LookupError):
            account = self.read(name)
            if account is not None and with_use(account) != account:
                self._change(name, with_use, wait=False)

    def key(self) -> bytes:
        """The secret of this directory, for likenesses of accounts that do not exist; made when it is missing.

        Raises:
            StorageError: it can neither be read nor made.
        """
        with self._directory() as directory:
            if directory is not None and self._exists(directory, _KEY_FILE):
                return self._read_key(directory)
        with self._locked() as directory:
            if not self._exists(directory, _KEY_FILE):
                self._write(directory, _KEY_FILE, secrets.token_bytes(KEY_OCTETS))
            return self._read_key(directory)

    # ---- one file

    def _change(self, name: str, edit: Callable[[Account], Account], *, wait: bool = True) -> Account:
        with self._locked(name, wait=wait) as directory:
            account = self._load(directory, file_name(name), name)
            if account is None:
                raise LookupError(_no_account(name))
            changed = edit(account)
            if changed != account:
                self._save(directory, changed)
        return changed

    def _with_password(self, account: Account, password: str) -> Account:
        prepared = prepare_secret(password)
        if prepared is None:
            raise ValueError("the password is empty, too long or holds control characters; take another")
        try:
            scram = derive(prepared, account.salt, account.iterations)
        except ValueError as error:
            raise ValueError(f"the password cannot be taken: {error}; leave them out") from None
        return replace(account, password=self.hasher.hash(prepared), scram=scram)

    def _load(self, directory: int, file: str, name: str | None = None) -> Account | None:
        """The account in a file; that of another name, where one is asked for, is damage."""
        octets = self._octets(directory, file)
        if octets is None:
            return None
        try:
            account = decoded(octets)
        except ValueError as error:
            raise StorageError(f"{self._path / file}: {error}") from None
        if name not in (None, account.name) or file_name(account.name) != file:
            raise StorageError(f"{self._path / file}: it is damaged: it holds the account {account.name}")
        return account

    def _octets(self, directory: int, file: str) -> bytes | None:
        """A plain file, of which nobody else could have written a part; None where there is none."""
        path = self._path / file
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(file, flags, dir_fd=directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: it cannot be read: {error.strerror}") from None
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise StorageError(f"{path}: it is not a plain file")
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StorageError(f"{path}: others may write to it; `chmod 600` mends that")
            with self._failing("cannot be read"), os.fdopen(descriptor, "rb", closefd=False) as opened:
                octets = opened.read(FILE_OCTETS_MAX + 1)
        finally:
            os.close(descriptor)
        if len(octets) > FILE_OCTETS_MAX:
            raise StorageError(f"{path}: it is damaged: it is longer than {FILE_OCTETS_MAX} octets")
        return octets

    def _read_key(self, directory: int) -> bytes:
        octets = self._octets(directory, _KEY_FILE)
        if octets is None or len(octets) != KEY_OCTETS:
            raise StorageError(f"{self._path / _KEY_FILE}: it is damaged; remove it, and another is made")
        return octets

    def _save(self, directory: int, account: Account) -> None:
        self._write(directory, file_name(account.name), encoded(account))

    def _write(self, directory: int, file: str, octets: bytes) -> None:
        """Replace a file, whole and on disk, or leave it.  The caller holds the lock."""
        temporary = f".{secrets.token_hex(8)}{_TEMPORARY}"
        with self._failing("cannot be written"):
            # We hold the lock: whoever began one of these is gone, by a crash or a power cut.
            for left_over in os.listdir(directory):
                if left_over.startswith(".") and left_over.endswith(_TEMPORARY):
                    os.unlink(left_over, dir_fd=directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
            try:
                with os.fdopen(descriptor, "wb") as opened:
                    _give_away(descriptor, os.fstat(directory))
                    opened.write(octets)
                    opened.flush()
                    os.fsync(descriptor)
                os.rename(temporary, file, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
            os.fsync(directory)

    # ---- the directory

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int | None]:
        """The directory, opened; None where there is none."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise StorageError(f"{self._path}: the accounts cannot be read: {error.strerror}") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self, account: str | None = None, *, wait: bool = True) -> Iterator[int]:
        """The directory, opened and locked against everybody else who would change it.

        Args:
            account: the one that is to be changed: without a directory there is none.  None: make the directory.
            wait: for whoever holds it; else StorageError.
        """
        if account is None:
            self._make()
        with self._directory() as directory:
            if directory is None and account is not None:
                raise LookupError(_no_account(account))
            if directory is None:
                raise StorageError(f"{self._path}: somebody removed it while it was needed")
            with self._failing("cannot be locked"):
                fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield directory

    def _make(self) -> None:
        with self._failing("cannot be made"):
            try:
                self._path.mkdir(mode=0o700)
            except FileExistsError:
                return
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _give_away(descriptor, self._path.parent.stat())
            finally:
                os.close(descriptor)
            above = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(above)
            finally:
                os.close(above)

    def _exists(self, directory: int, file: str) -> bool:
        """Whatever it is; a link that leads nowhere is there as well."""
        with self._failing("cannot be read"):
            try:
                os.stat(file, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return True

    @contextlib.contextmanager
    def _failing(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"the accounts in {self._path} {how}: {error.strerror}") from None


def _no_account(name: str) -> str:
    return f"there is no account {name}"


def _is_bait(name: str) -> str:
    return f"{name} is a bait, which nobody may use; remove it first"


def _give_away(descriptor: int, holder: os.stat_result) -> None:
    """What root makes in somebody's directory is theirs: else the gate could not read it."""
    if os.geteuid() == 0 and holder.st_uid != 0:
        os.fchown(descriptor, holder.st_uid, holder.st_gid)


def _decoy(hasher: PasswordHasher) -> str:
    """A hash of nothing, which costs as much to check as any: what a secret without an account is held against."""
    salt, tag = (base64_text(secrets.token_bytes(octets)).rstrip("=") for octets in (hasher.salt_len, hasher.hash_len))
    costs = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    return f"$argon2id$v=19${costs}${salt}${tag}"


# --- The verifier -----------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What a look at an account's file gave."""

    account: Account | None
    device: str = ""


class AccountsVerifier:
    """Logins to our own accounts.

    Args:
        store: where they stand.
        waiting_max: so many checks of passwords wait for a thread; further ones are Unavailable.
    """

    __slots__ = ("_decoy", "_hashing", "_reading", "_store", "_waiting", "_waiting_max")

    name = "accounts"

    def __init__(self, store: AccountStore, *, waiting_max: int = LOGINS_WAITING_MAX) -> None:
        self._store = store
        self._waiting = 0
        self._waiting_max = waiting_max
        self._decoy = _decoy(store.hasher)
        # Two kinds of threads: a flood of wrong passwords must not stand before a device, whose check is cheap.
        self._reading: ThreadPoolExecutor | None = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="accounts")
        self._hashing: ThreadPoolExecutor | None = ThreadPoolExecutor(HASHES_AT_ONCE, thread_name_prefix="passwords")

    async def verify(self, credentials: Credentials) -> Outcome:
        """Look at the account's file and hold the secret against its devices and its password."""
        if not isinstance(credentials, Password):
            return Denied("accounts take no tokens")
        try:
            seen = await self._in_thread(self._reading, self._look, credentials)
        except StorageError as error:
            return Unavailable(str(error))
        account = seen.account
        if account is not None and seen.device and not account.refusal:
            return Verified(account.name, device=seen.device)
        right = await self._check(self._decoy if account is None else account.password, credentials.secret)
        if isinstance(right, Unavailable):
            return right
        if account is None:
            return Denied("no such account")
        if account.refusal:
            return Denied(account.refusal)
        return Verified(account.name) if right else Denied("wrong password")

    async def is_bait(self, user: str) -> bool:
        """Whether this name is a bait, so that whoever tries it is an attacker.  False where nobody can tell."""
        name = account_name(user)
        if name is None:
            return False
        try:
            account = await self._in_thread(self._reading, self._store.read, name)
        except StorageError:
            return False
        return account is not None and account.bait

    async def scram(self, user: str) -> ScramRecord | Unavailable:
        """What a SCRAM exchange needs to know; for a name that nobody has, a likeness that is always the same."""
        try:
            return await self._in_thread(self._reading, self._scram, user)
        except StorageError as error:
            return Unavailable(str(error))

    async def used(self, account: str, device: str) -> None:
        """Note a device's login by SCRAM."""
        await self._in_thread(self._reading, self._store.used, account, device)

    async def close(self) -> None:
        """Let the threads end, when what they have to do is done."""
        pools = self._reading, self._hashing
        self._reading = self._hashing = None
        loop = asyncio.get_running_loop()
        for pool in pools:
            if pool is not None:
                await loop.run_in_executor(None, pool.shutdown)

    async def _check(self, password: str, secret: str) -> bool | Unavailable:
        if self._waiting >= self._waiting_max:
            return Unavailable("too many logins at once")
        self._waiting += 1
        try:
            return await self._in_thread(self._hashing, self._matches, password, secret)
        except VerificationError as error:
            return Unavailable(f"a password could not be checked: {error}")
        finally:
            self._waiting -= 1

    def _in_thread(
        self, pool: ThreadPoolExecutor | None, work: Callable[..., T], *arguments: object
    ) -> asyncio.Future[T]:
        """Run what blocks; for a login that a reload overtook in one of the loop's own threads."""
        return asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    # ---- in a thread

    def _look(self, credentials: Password) -> _Seen:
        name = account_name(credentials.user)
        account = None if name is None else self._store.read(name)
        if account is None:
            return _Seen(None)
        digest = device_digest(account.salt, credentials.secret)
        found: Device | None = None
        for device in account.devices:  # all of them: which one it was is not to be told by the time it takes
            if hmac.compare_digest(device.digest, digest):
                found = device
        if found is None:
            return _Seen(account)
        if not account.refusal:
            self._store.used(account.name, found.label)
        return _Seen(account, found.label)

    def _matches(self, password: str, secret: str) -> bool:
        try:
            return self._store.hasher.verify(password, secret)
        except VerifyMismatchError:
            return False

    def _scram(self, user: str) -> ScramRecord:
        key = self._store.key()  # before anything else: where it is missing, nobody may see who exists
        name = account_name(user)
        account = None if name is None else self._store.read(name)
        if account is not None:
            devices = ((device.label, device.scram) for device in account.devices)
            keys = (("", account.scram), *devices)
            return ScramRecord(account.name, account.salt, account.iterations, keys, account.refusal)
        likeness = (name or user).encode()
        salt = hmac.digest(key, b"salt " + likeness, "sha256")[:SALT_OCTETS]
        keys_of_nobody = ScramKeys(secrets.token_bytes(KEY_OCTETS), secrets.token_bytes(KEY_OCTETS))
        return ScramRecord("", salt, self._store.iterations, (("", keys_of_nobody),), "no such account")
