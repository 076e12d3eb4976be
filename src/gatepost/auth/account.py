"""What one account of ours is, how it is named, and what its file holds.

Why: names come from configurations, logins and questions; an account's file from a disk that others may have written.
Trust: names are a stranger's; a file's octets are hostile up to FILE_OCTETS_MAX, which the store that reads them holds.
Promise: pure.  One spelling of a name, one place for each; a file that is not as expected is ValueError, never half an
    account.
Sources: RFC 9106 (argon2id), RFC 5802 §3 (what SCRAM keeps).
    A device's password is ours: 20 random letters, 90 bits.  To guess it is hopeless whatever a guess costs, so a keyed
    SHA-256 is enough, and the ten connections of a phone cost a file read each and not ten times 19 MiB.
    Salt and iteration count belong to the account and stay, because all its secrets share them (see ``auth.scram``).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, TypeVar

from argon2 import Type, extract_parameters
from argon2.exceptions import InvalidHashError

from gatepost.auth.scram import KEY_OCTETS, ScramKeys
from gatepost.smtp.path import ForwardPath, Mailbox, Shape, exact_text, parse_forward_path
from gatepost.smtp.sasl import prepare_secret

T = TypeVar("T")

SCHEMA = 1
NAME_OCTETS_MAX = 128
DEVICES_MAX = 50
LABEL_OCTETS_MAX = 64
PASSWORD_CHARACTERS_MIN = 8
DEVICE_LETTERS = "abcdefghjkmnpqrstuvwxyz"  # none that a printer's display shows like another
DEVICE_GROUPS, DEVICE_GROUP_LETTERS = 4, 5  # 20 letters: 90 bits

# What a file may ask of us; more is no hash of ours.
_HASH_MEMORY_KIB_CEILING = 256 << 10
_HASH_TIME_CEILING = 16
_HASH_LANES_CEILING = 16
_ITERATIONS = range(4096, 10_000_001)  # RFC 7677 §4 has the lower one
_SALT_LENGTHS = range(12, 65)
_SECONDS = range(253_402_300_800)  # up to the year 9999, which a calendar can show

SUFFIX = ".json"
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9._+-]*[a-z0-9])?")
_HARMLESS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-+=.@")
_FILE_NAME_MAX = 200  # file systems allow 255 octets
_TYPED_AROUND = re.compile(r"[ -]")


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
    return text + SUFFIX


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


def device_digest(salt: bytes, secret: str) -> bytes:
    """Of a device's password, however it was typed: with or without hyphens, in capitals."""
    return hmac.digest(salt, _TYPED_AROUND.sub("", secret).lower().encode(), "sha256")


def is_label(text: str) -> bool:
    return text.isprintable() and text == text.strip(" ") and 0 < len(text.encode()) <= LABEL_OCTETS_MAX


# --- A file's content -------------------------------------------------------------------------------------------------


def encoded(account: Account) -> bytes:
    value = {
        "schema": SCHEMA,
        "name": account.name,
        "created": account.created,
        "locked": account.locked,
        "bait": account.bait,
        "password": account.password,
        "scram": {"salt": base64_text(account.salt), "iterations": account.iterations, **_encoded_keys(account.scram)},
        "devices": [
            {
                "label": device.label,
                "digest": base64_text(device.digest),
                **_encoded_keys(device.scram),
                "created": device.created,
                "last_used": device.last_used,
            }
            for device in account.devices
        ],
    }
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _encoded_keys(keys: ScramKeys) -> dict[str, str]:
    return {"stored_key": base64_text(keys.stored_key), "server_key": base64_text(keys.server_key)}


def base64_text(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")


def decoded(octets: bytes) -> Account:
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
    if not is_label(device.label):
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
