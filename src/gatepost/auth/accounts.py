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
    A device's password is ours: 20 random letters, 90 bits.  To guess it is hopeless whatever a guess costs, so a keyed
    SHA-256 is enough, and the ten connections of a phone cost a file read each and not ten times 19 MiB.
    Salt and iteration count belong to the account and stay, because all its secrets share them (see ``auth.scram``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from gatepost.auth import Credentials, Denied, Outcome, Unavailable, Verified
from gatepost.auth.scram import KEY_OCTETS, ScramKeys, ScramRecord, derive
from gatepost.errors import StorageError
from gatepost.smtp.path import ForwardPath, Mailbox, Shape, exact_text, parse_forward_path
from gatepost.smtp.sasl import Password, prepare_secret

T = TypeVar("T")

SCHEMA = 1
NAME_OCTETS_MAX = 128
FILE_OCTETS_MAX = 64 << 10
DEVICES_MAX = 50
LABEL_OCTETS_MAX = 64
PASSWORD_CHARACTERS_MIN = 8
USED_EVERY_S = 3600  # a device's last use is as exact as that
READS_AT_ONCE = 2  # threads of one process
HASHES_AT_ONCE = 2  # ditto: of a worker, 19 MiB and a processor each
LOGINS_WAITING_MAX = 64  # a second or two of work for those threads

SCRAM_ITERATIONS = 600_000  # of a new account: an attacker with the file pays them at each guess
SALT_OCTETS = 16
DEVICE_LETTERS = "abcdefghjkmnpqrstuvwxyz"  # none that a printer's display shows like another
DEVICE_GROUPS, DEVICE_GROUP_LETTERS = 4, 5  # 20 letters: 90 bits

# What a file may ask of us; more is no hash of ours.
_HASH_MEMORY_KIB_CEILING = 256 << 10
_HASH_TIME_CEILING = 16
_HASH_LANES_CEILING = 16
_ITERATIONS = range(4096, 10_000_001)  # RFC 7677 §4 has the lower one
_SALT_LENGTHS = range(12, 65)
_SECONDS = range(253_402_300_800)  # up to the year 9999, which a calendar can show

_SUFFIX, _TEMPORARY, _KEY_FILE = ".json", ".tmp", ".key"
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9._+-]*[a-z0-9])?")
_HARMLESS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-+=.@")
_FILE_NAME_MAX = 200  # file systems allow 255 octets
_TYPED_AROUND = re.compile(r"[ -]")

HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 << 10, parallelism=1, type=Type.ID)


def account_name(text: str) -> str | None:
    """The one spelling of an account's name, or None for what cannot be one.

    An address without tricks, as ``smtp.path`` reads it and ``exact_text`` writes it, or a word of ASCII letters,
    digits and inner ".", "_", "+", "-"; in lower case, at most NAME_OCTETS_MAX octets.

    Args:
        text: hostile.
    """
    if "@" not in text:
        word = text.lower() if text.isascii() else ""
        return word if len(word) <= NAME_OCTETS_MAX and _WORD.fullmatch(word) else None
    try:
        path = parse_forward_path(f"<{text}>".encode(), smtputf8=True)
    except UnicodeEncodeError:
        return None
    if not isinstance(path, ForwardPath) or path.shape is not Shape.PLAIN or not isinstance(path.mailbox, Mailbox):
        return None
    name = exact_text(path.mailbox)
    return name if len(name.encode()) <= NAME_OCTETS_MAX and '"' not in name else None


def file_name(name: str) -> str:
    """Where an account stands in the directory: one place for each name, none that is hidden or means anything else."""
    octets = name.encode()
    text = "".join(chr(octet) if octet in _HARMLESS else f"%{octet:02X}" for octet in octets)
    if text.startswith("."):
        text = "%2E" + text[1:]
    if len(text) > _FILE_NAME_MAX:  # "~" stands in no other name
        text = f"{text[: _FILE_NAME_MAX // 2]}~{hashlib.blake2b(octets, digest_size=20).hexdigest()}"
    return text + _SUFFIX


@dataclass(frozen=True, slots=True)
class Device:
    """A password that one device has.

    Attributes:
        label: unique in the account, for people.
        digest: of the password, keyed with the account's salt.
        created, last_used: seconds since the epoch; None for never used.
    """

    label: str
    digest: bytes = field(repr=False)
    scram: ScramKeys = field(repr=False)
    created: int
    last_used: int | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """One account, as its file has it.

    Attributes:
        created: seconds since the epoch.
        password: an argon2id hash in its usual notation.
        salt, iterations: of ``scram`` and of every device's keys.
        locked: nobody gets in, with whatever secret.
        bait: it belongs to nobody, so whoever tries it is an attacker.
    """

    name: str
    created: int
    password: str = field(repr=False)
    salt: bytes = field(repr=False)
    iterations: int
    scram: ScramKeys = field(repr=False)
    locked: bool = False
    bait: bool = False
    devices: tuple[Device, ...] = ()

    @property
    def refusal(self) -> str:
        """Why nobody gets in, "" where somebody may."""
        return "a bait account" if self.bait else "locked" if self.locked else ""


def why_weak(name: str, password: str) -> str:
    """What is wrong with a password that somebody chose, as a sentence that says what to do; "" for nothing."""
    if len(password) < PASSWORD_CHARACTERS_MIN:
        return f"the password is shorter than {PASSWORD_CHARACTERS_MIN} characters; take a longer one"
    if password.casefold() in (name, name.partition("@")[0]):
        return "the password is the account's own name; take one that nobody guesses first"
    if prepare_secret(password) is None:
        return "the password is too long or holds control characters; take another"
    return ""


def device_password() -> str:
    """A new password for a device: letters that are easy to read and to type, in groups."""
    letters = "".join(secrets.choice(DEVICE_LETTERS) for _ in range(DEVICE_GROUPS * DEVICE_GROUP_LETTERS))
    starts = range(0, len(letters), DEVICE_GROUP_LETTERS)
    return "-".join(letters[start : start + DEVICE_GROUP_LETTERS] for start in starts)


def _device_digest(salt: bytes, secret: str) -> bytes:
    """Of a device's password, however it was typed: with or without hyphens, in capitals."""
    return hmac.digest(salt, _TYPED_AROUND.sub("", secret).lower().encode(), "sha256")


# --- The files --------------------------------------------------------------------------------------------------------


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
                return sorted(entry for entry in entries if entry.endswith(_SUFFIX) and entry[0] != ".")

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
        if not _is_label(label):
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
                _device_digest(account.salt, password),
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
            account = _decoded(octets)
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
        self._write(directory, file_name(account.name), _encoded(account))

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


def _is_label(text: str) -> bool:
    return text.isprintable() and text == text.strip(" ") and 0 < len(text.encode()) <= LABEL_OCTETS_MAX


# --- A file's content -------------------------------------------------------------------------------------------------


def _encoded(account: Account) -> bytes:
    value = {
        "schema": SCHEMA,
        "name": account.name,
        "created": account.created,
        "locked": account.locked,
        "bait": account.bait,
        "password": account.password,
        "scram": {"salt": _base64(account.salt), "iterations": account.iterations, **_encoded_keys(account.scram)},
        "devices": [
            {
                "label": device.label,
                "digest": _base64(device.digest),
                **_encoded_keys(device.scram),
                "created": device.created,
                "last_used": device.last_used,
            }
            for device in account.devices
        ],
    }
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _encoded_keys(keys: ScramKeys) -> dict[str, str]:
    return {"stored_key": _base64(keys.stored_key), "server_key": _base64(keys.server_key)}


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")


def _decoded(octets: bytes) -> Account:
    """The account in a file.

    Raises:
        ValueError: a sentence that says what is wrong with it.
    """
    try:
        value = json.loads(octets)
    except (ValueError, RecursionError):
        raise ValueError("it is damaged: it is not JSON; restore it from a copy, or remove the account") from None
    if isinstance(value, dict) and type(value.get("schema")) is int and value["schema"] > SCHEMA:
        raise ValueError(f"a newer Gatepost wrote it (schema {value['schema']}, this one reads {SCHEMA}); upgrade")
    try:
        return _account(_Table(value, "the file"))
    except ValueError as error:
        raise ValueError(f"it is damaged: {error}; restore it from a copy, or remove the account") from None


class _Table:
    """A JSON object of which each key is taken once, and none is left over; ValueError where it is not as expected."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{what} is no object")  # noqa: TRY004  a wrong type is a wrong value
        self._value: dict[str, Any] = dict(value)
        self._what = what

    def take(self, key: str, kind: type[T]) -> T:
        value = self._value.pop(key, None)
        if type(value) is not kind:  # a bool is no number here
            raise ValueError(f"{key} of {self._what} is missing or of a wrong kind")
        return value

    def number(self, key: str, allowed: range) -> int:
        number = self.take(key, int)
        if number not in allowed:
            raise ValueError(f"{key} of {self._what} is out of range")
        return number

    def number_or_none(self, key: str, allowed: range) -> int | None:
        if self._value.get(key, 0) is None:
            del self._value[key]
            return None
        return self.number(key, allowed)

    def octets(self, key: str, lengths: range = range(KEY_OCTETS, KEY_OCTETS + 1)) -> bytes:
        try:
            octets = base64.b64decode(self.take(key, str), validate=True)
        except binascii.Error:
            raise ValueError(f"{key} of {self._what} is not base64") from None
        if len(octets) not in lengths:
            raise ValueError(f"{key} of {self._what} is of a wrong length")
        return octets

    def keys(self) -> ScramKeys:
        return ScramKeys(self.octets("stored_key"), self.octets("server_key"))

    def end(self) -> None:
        if self._value:
            raise ValueError(f"{self._what} has more than is known of it")


def _account(table: _Table) -> Account:
    table.number("schema", range(SCHEMA, SCHEMA + 1))
    scram = _Table(table.take("scram", dict), "scram")
    account = Account(
        name=table.take("name", str),
        created=table.number("created", _SECONDS),
        password=_hash(table.take("password", str)),
        salt=scram.octets("salt", _SALT_LENGTHS),
        iterations=scram.number("iterations", _ITERATIONS),
        scram=scram.keys(),
        locked=table.take("locked", bool),
        bait=table.take("bait", bool),
        devices=tuple(_device(_Table(device, "a device")) for device in table.take("devices", list)),
    )
    scram.end()
    table.end()
    if account_name(account.name) != account.name:
        raise ValueError("its name cannot be one")
    labels = [device.label for device in account.devices]
    if len(set(labels)) != len(labels) or len(labels) > DEVICES_MAX:
        raise ValueError("it has a device twice, or too many")
    return account


def _device(table: _Table) -> Device:
    device = Device(
        label=table.take("label", str),
        digest=table.octets("digest"),
        scram=table.keys(),
        created=table.number("created", _SECONDS),
        last_used=table.number_or_none("last_used", _SECONDS),
    )
    table.end()
    if not _is_label(device.label):
        raise ValueError("a device has no label that can be shown")
    return device


def _hash(text: str) -> str:
    """An argon2id hash whose check we can afford."""
    try:
        parameters = extract_parameters(text)
    except InvalidHashError:
        raise ValueError("password is no argon2 hash") from None
    if (
        parameters.type is not Type.ID
        or parameters.memory_cost > _HASH_MEMORY_KIB_CEILING
        or parameters.time_cost > _HASH_TIME_CEILING
        or parameters.parallelism > _HASH_LANES_CEILING
    ):
        raise ValueError("password is no argon2id hash of ours")
    return text


def _decoy(hasher: PasswordHasher) -> str:
    """A hash of nothing, which costs as much to check as any: what a secret without an account is held against."""
    salt, tag = (_base64(secrets.token_bytes(octets)).rstrip("=") for octets in (hasher.salt_len, hasher.hash_len))
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
        digest = _device_digest(account.salt, credentials.secret)
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
