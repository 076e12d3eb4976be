"""Our own accounts: files that are whole or not there, logins that tell nothing, changes that are in force at once."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import VerificationError
from scramp import ScramClient  # type: ignore[import-untyped]

from gatepost.auth import Denied, Unavailable, Verified, accounts
from gatepost.auth.account import (
    DEVICES_MAX,
    LABEL_OCTETS_MAX,
    NAME_OCTETS_MAX,
    Account,
    account_name,
    device_password,
    file_name,
    why_weak,
)
from gatepost.auth.accounts import FILE_OCTETS_MAX, AccountStore, AccountsVerifier
from gatepost.auth.scram import SCRAM, ScramExchange
from gatepost.errors import StorageError
from gatepost.smtp.sasl import Challenge, Password, Token

NOON = 1_795_608_000  # a full hour
ALICE = "alice@example.com"


class Hasher(PasswordHasher):
    """As cheap as can be; counts what it is asked to check, and may be held up."""

    def __init__(self):
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.checks = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def verify(self, hash, password):  # noqa: A002  the name is the library's
        self.checks += 1
        self.go_on.wait(30)
        return super().verify(hash, password)


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def hasher():
    return Hasher()


@pytest.fixture
def store(tmp_path, hasher, clock):
    return AccountStore(str(tmp_path / "accounts"), hasher=hasher, iterations=4096, now=clock)


@pytest.fixture
async def verifier(store):
    one = AccountsVerifier(store)
    yield one
    await one.close()


def path_of(store, name=ALICE):
    return Path(store._path, file_name(name))


def rewrite(store, edit, name=ALICE):
    """Change the file behind the store's back."""
    path = path_of(store, name)
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


async def until(true):
    while not true():  # noqa: ASYNC110  it happens in a thread
        await asyncio.sleep(0.001)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("alice", "alice"), ("Alice.B-c_d+e", "alice.b-c_d+e"), ("4711", "4711"), ("A", "a"),
        ("Alice@Example.COM", ALICE), ("jürgen@müller.example", "jürgen@xn--mller-kva.example"),
        ("ÄRGER@example.com", "ärger@example.com"), ("o'neil+x@example.com", "o'neil+x@example.com"),
        ("", None), (".", None), ("..", None), (".alice", None), ("alice.", None), ("../alice", None), ("a/b", None),
        ("al ice", None), ("alice\0", None), ("jürgen", None), ("\u212aelvin", None), ("DOMAIN\\alice", None),
        ("@", None), ("alice@", None), ("@example.com", None), ("a%b@example.com", None), ("a!b@example.com", None),
        ("a@b@c.com", None), ('"a b"@example.com', None), ("alice@[192.0.2.1]", None), ("<alice@example.com>", None),
        ("\ud800@example.com", None),
        ("a@example.com> <b@example.com", None),
    ],
)  # fmt: skip
def test_a_name_has_one_spelling_or_is_refused(typed, name):
    assert account_name(typed) == name
    if name is not None:
        assert account_name(name) == name


@pytest.mark.parametrize(
    ("octets", "taken"), [(NAME_OCTETS_MAX - 1, True), (NAME_OCTETS_MAX, True), (NAME_OCTETS_MAX + 1, False)]
)
def test_a_name_has_a_limit(octets, taken):
    address = "@example.com"
    assert (account_name("x" * octets) is not None) == taken
    assert (account_name("x" * (octets - len(address)) + address) is not None) == taken


def test_no_two_names_share_a_file_and_none_is_hidden():
    names = [
        "a",
        "a.b",
        "a+b",
        "a_b",
        "ä@example.com",
        "ö@example.com",
        *("ä" * n + "@example.com" for n in range(30, 58)),
    ]
    files = {file_name(name) for name in names}
    assert len(files) == len(names)
    for file in files:
        assert not file.startswith(".")
        assert "/" not in file
        assert file.isascii()
        assert len(file) < 255


# --- Passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("password", "weak"),
    [("1234567", True), ("12345678", False), ("Alice@Example.com", True), ("alice", True), ("correct horse", False)],
)
def test_a_weak_password_is_told(password, weak):
    assert bool(why_weak(ALICE, password)) == weak
    assert password not in why_weak(ALICE, password)


def test_the_local_part_alone_is_weak():
    assert "name" in why_weak("alice.liddell@example.com", "Alice.Liddell")


def test_a_devices_password_is_long_and_easy_to_read():
    passwords = {device_password() for _ in range(100)}
    assert len(passwords) == 100
    for password in passwords:
        assert len(password.replace("-", "")) == 20
        assert not set(password) & set("ilo01IO")


def test_the_real_hash_costs_what_it_should(tmp_path):
    store = AccountStore(str(tmp_path / "accounts"))
    account = store.add("alice", "correct horse")
    parameters = extract_parameters(account.password)
    assert (parameters.type, parameters.memory_cost, parameters.time_cost, parameters.parallelism) == (
        Type.ID,
        19456,
        2,
        1,
    )
    assert account.iterations == 600_000


@pytest.mark.parametrize("password", ["", "x\ny\tz12345", "x" * 1025, "padlock \U0001f512"])
def test_a_password_that_cannot_be_compared_is_refused(store, password):
    with pytest.raises(ValueError, match="password"):
        store.add(ALICE, password)
    assert store.names() == []


# --- Files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(store):
    written = store.add(ALICE, "correct horse")
    assert store.read(ALICE) == written
    assert (written.name, written.created, written.locked, written.bait) == (ALICE, NOON, False, False)
    assert path_of(store).stat().st_mode & 0o777 == 0o600
    assert path_of(store).parent.stat().st_mode & 0o777 == 0o700
    assert store.names() == ["alice@example.com.json"]
    assert store.read_file("alice@example.com.json") == written


def test_where_there_is_nothing_nobody_is_found(store):
    assert store.read(ALICE) is None
    assert store.names() == []
    assert store.read_file("alice.json") is None
    for change in (
        store.remove,
        lambda name: store.set_locked(name, locked=True),
        lambda name: store.add_device(name, "phone"),
    ):
        with pytest.raises(LookupError):
            change(ALICE)


def test_an_account_is_added_once(store):
    store.add(ALICE, "correct horse")
    with pytest.raises(ValueError, match="already"):
        store.add(ALICE, "battery staple")
    assert store.hasher.verify(store.read(ALICE).password, "correct horse")


def test_an_account_is_changed_and_removed(store):
    before = store.add(ALICE, "correct horse")
    assert store.set_password(ALICE, "battery staple").password != before.password
    assert store.set_locked(ALICE, locked=True).locked
    assert store.read(ALICE).locked
    assert not store.set_locked(ALICE, locked=False).locked
    store.remove(ALICE)
    assert store.read(ALICE) is None
    with pytest.raises(LookupError, match=ALICE):
        store.set_password(ALICE, "battery staple")


def test_a_bait_gets_no_passwords(store):
    store.add("trap", bait=True)
    with pytest.raises(ValueError, match="bait"):
        store.set_password("trap", "correct horse")
    with pytest.raises(ValueError, match="bait"):
        store.add_device("trap", "phone")


def test_devices_come_and_go(store):
    store.add(ALICE, "correct horse")
    store.add_device(ALICE, "phone")
    with pytest.raises(ValueError, match="phone already"):
        store.add_device(ALICE, "phone")
    store.add_device(ALICE, "printer")
    assert [device.label for device in store.remove_device(ALICE, "phone").devices] == ["printer"]
    with pytest.raises(LookupError, match="no device phone"):
        store.remove_device(ALICE, "phone")


@pytest.mark.parametrize("label", ["", " x", "x\ny", "x\x1b[2J", "x" * (LABEL_OCTETS_MAX + 1), "\udcff"])
def test_a_label_that_cannot_be_shown_is_refused(store, label):
    store.add(ALICE, "correct horse")
    with pytest.raises(ValueError, match="label"):
        store.add_device(ALICE, label)


def test_devices_have_a_limit_and_so_many_fit_the_file(store):
    store.add(ALICE, "correct horse")
    for number in range(DEVICES_MAX):
        store.add_device(ALICE, f"{number:02}" + "x" * (LABEL_OCTETS_MAX - 2))
        store.used(ALICE, f"{number:02}" + "x" * (LABEL_OCTETS_MAX - 2))
    with pytest.raises(ValueError, match="the most"):
        store.add_device(ALICE, "one more")
    assert len(store.read(ALICE).devices) == DEVICES_MAX
    assert path_of(store).stat().st_size <= FILE_OCTETS_MAX


def test_a_power_cut_leaves_the_account_as_it_was_and_its_rest_is_swept(store):
    store.add(ALICE, "correct horse")
    left_over = path_of(store).with_name(".0123456789abcdef.tmp")
    left_over.write_bytes(path_of(store).read_bytes()[:100])
    assert store.names() == ["alice@example.com.json"]
    assert store.read(ALICE) is not None
    store.set_locked(ALICE, locked=True)
    assert not left_over.exists()
    assert store.read(ALICE).locked


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_changes_nothing_and_is_told(store, monkeypatch, call, number):
    before = store.add(ALICE, "correct horse")
    real = getattr(os, call)

    def full(*arguments, **more):
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **more)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=os.strerror(number)):
        store.set_password(ALICE, "battery staple")
    with pytest.raises(StorageError, match="accounts"):
        store.add("bob", "battery staple")
    monkeypatch.undo()
    assert store.read(ALICE) == before
    assert store.read("bob") is None
    assert list(path_of(store).parent.iterdir()) == [path_of(store)]


def test_a_write_is_on_disk_before_it_takes_the_place_of_the_old_one(store, monkeypatch):
    store.add(ALICE, "correct horse")
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def noted(*arguments, real=real, name=name, **more):
            calls.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, noted)
    store.set_locked(ALICE, locked=True)
    assert calls == ["fsync", "rename", "fsync"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_owner_of_the_data(tmp_path, hasher):
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, 65534, 65534)
    store = AccountStore(str(data / "accounts"), hasher=hasher, iterations=4096)
    store.add(ALICE, "correct horse")
    store.key()
    store.set_locked(ALICE, locked=True)
    for path in (data / "accounts", *(data / "accounts").iterdir()):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_plain_file_is_not_opened(store, tmp_path, kind):
    store.add("bob", "correct horse")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(path_of(store, "bob").read_bytes())
    elsewhere.chmod(0o600)
    path = path_of(store)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StorageError, match=str(path)):
        store.read(ALICE)
    with pytest.raises(ValueError, match="already"):
        store.add(ALICE, "correct horse")


def test_a_directory_that_is_a_link_is_not_followed(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "accounts").symlink_to("elsewhere")
    with pytest.raises(StorageError):
        store.read(ALICE)
    with pytest.raises(StorageError):
        store.add(ALICE, "correct horse")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def _with(key, value):
    return lambda account: account.update({key: value})


def _within(table, key, value):
    return lambda account: account[table].update({key: value})


DAMAGE = [
    ("a key too many", _with("admin", True)),
    ("a key too few", lambda account: account.pop("locked")),
    ("another name", _with("name", "bob@example.com")),
    ("another spelling", _with("name", "Alice@example.com")),
    ("no name", _with("name", 5)),
    ("locked by a number", _with("locked", 0)),
    ("locked by a word", _with("locked", "false")),
    ("an old schema", _with("schema", 0)),
    ("a schema of a kind", _with("schema", True)),
    ("no hash", _with("password", "")),
    ("plain text", _with("password", "correct horse")),
    ("argon2i", _with("password", "$argon2i$v=19$m=8,t=1,p=1$c29tZXNhbHRzYWx0$" + "a" * 43)),
    ("a hash of a terabyte", _with("password", "$argon2id$v=19$m=1073741824,t=1,p=1$c29tZXNhbHRzYWx0$" + "a" * 43)),
    ("a hash of a year", _with("password", "$argon2id$v=19$m=8,t=4000000,p=1$c29tZXNhbHRzYWx0$" + "a" * 43)),
    ("no salt", _within("scram", "salt", "")),
    ("a salt that is no base64", _within("scram", "salt", "****")),
    ("few iterations", _within("scram", "iterations", 4095)),
    ("many iterations", _within("scram", "iterations", 10_000_001)),
    ("half a key", _within("scram", "stored_key", "AAAA")),
    ("another key", _within("scram", "other", "AAAA")),
    ("scram is a list", _with("scram", [])),
    ("devices is a table", _with("devices", {})),
    ("a device that is a word", _with("devices", ["phone"])),
    ("a device twice", lambda account: account["devices"].append(account["devices"][0])),
    ("a label that moves the cursor", lambda account: account["devices"][0].update(label="\x1b[2J")),
    ("a far future", _with("created", 1 << 60)),
    ("a list", None),
]  # fmt: skip


@pytest.mark.parametrize("edit", [edit for _, edit in DAMAGE], ids=[words for words, _ in DAMAGE])
async def test_a_damaged_file_lets_nobody_in_and_is_named(store, verifier, hasher, edit):
    store.add(ALICE, "correct horse")
    device = store.add_device(ALICE, "phone")
    if edit is None:
        path_of(store).write_text("[]")
    else:
        rewrite(store, edit)
    for secret in ("correct horse", device):
        outcome = await verifier.verify(Password(ALICE, secret))
        assert isinstance(outcome, Unavailable)
        assert str(path_of(store)) in outcome.why
    assert isinstance(await verifier.scram(ALICE), Unavailable)
    assert hasher.checks == 0
    with pytest.raises(StorageError, match="damaged"):
        store.set_locked(ALICE, locked=True)


@pytest.mark.parametrize(
    "octets",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[" * FILE_OCTETS_MAX, b" " * (FILE_OCTETS_MAX + 1), b'{"schema": 1}',
        b'{"schema": ' + b"9" * 5000,
    ],
)  # fmt: skip
def test_octets_that_are_no_account_are_told(store, octets):
    store.add(ALICE, "correct horse")
    path_of(store).write_bytes(octets)
    with pytest.raises(StorageError, match="damaged"):
        store.read(ALICE)


def test_a_file_is_read_in_every_length_or_told(store):
    store.add(ALICE, "correct horse")
    whole = path_of(store).read_bytes()
    for length in range(len(whole.rstrip())):
        path_of(store).write_bytes(whole[:length])
        with pytest.raises(StorageError, match="damaged"):
            store.read(ALICE)


@pytest.mark.parametrize(("surplus", "taken"), [(-1, True), (0, True), (1, False)])
def test_a_file_has_a_limit(store, surplus, taken):
    written = store.add(ALICE, "correct horse")
    octets = path_of(store).read_bytes()
    path_of(store).write_bytes(octets + b" " * (FILE_OCTETS_MAX - len(octets) + surplus))
    if taken:
        assert store.read(ALICE) == written
    else:
        with pytest.raises(StorageError, match="longer than"):
            store.read(ALICE)


async def test_a_newer_schema_lets_nobody_in_and_says_so(store, verifier):
    store.add(ALICE, "correct horse")
    rewrite(store, _with("schema", 2))
    outcome = await verifier.verify(Password(ALICE, "correct horse"))
    assert isinstance(outcome, Unavailable)
    assert "newer" in outcome.why
    with pytest.raises(StorageError, match="newer"):
        store.set_locked(ALICE, locked=False)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
async def test_a_file_that_others_may_write_lets_nobody_in(store, verifier, mode):
    store.add(ALICE, "correct horse")
    path_of(store).chmod(mode)
    outcome = await verifier.verify(Password(ALICE, "correct horse"))
    assert isinstance(outcome, Unavailable)
    assert "chmod 600" in outcome.why


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_a_file_that_may_not_be_read_is_named(store, tmp_path):
    store.add(ALICE, "correct horse")
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    path_of(store).parent.chmod(0o755)
    program = (
        "import os, sys\n"
        "from gatepost.auth.accounts import AccountStore\n"
        "from gatepost.errors import StorageError\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try:\n    AccountStore(sys.argv[1]).read('alice@example.com')\n"
        "except StorageError as error:\n    print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(path_of(store).parent)], capture_output=True, text=True, check=True
    ).stdout
    assert said == f"{path_of(store)}: it cannot be read: Permission denied\n"


# --- Two at once ------------------------------------------------------------------------------------------------------


def test_changes_from_two_threads_are_all_kept(store):
    store.add(ALICE, "correct horse")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.add_device(ALICE, f"device {number}"), range(20)))
    assert len(store.read(ALICE).devices) == 20


def test_changes_from_two_processes_are_all_kept(store):
    store.add(ALICE, "correct horse")
    program = (
        "import sys\n"
        "from gatepost.auth.accounts import AccountStore\n"
        "for number in range(10):\n"
        "    AccountStore(sys.argv[1]).add_device('alice@example.com', sys.argv[2] + str(number))\n"
    )
    directory = str(path_of(store).parent)
    processes = [subprocess.Popen([sys.executable, "-c", program, directory, who]) for who in ("left ", "right ")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(store.read(ALICE).devices) == 20


def test_one_of_two_that_add_the_same_account_is_told(store):
    def add(_):
        try:
            store.add(ALICE, "correct horse")
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(add, range(4))) == [False, False, False, True]


def test_the_key_is_made_once(store):
    with ThreadPoolExecutor(4) as pool:
        keys = set(pool.map(lambda _: store.key(), range(8)))
    assert len(keys) == 1
    assert len(keys.pop()) == 32
    path = path_of(store).with_name(".key")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        store.key()


# --- Logins -----------------------------------------------------------------------------------------------------------


async def test_the_right_password_gets_in_however_the_name_is_typed(store, verifier):
    store.add(ALICE, "correct horse")
    for typed in (ALICE, "Alice@EXAMPLE.com"):
        assert await verifier.verify(Password(typed, "correct horse")) == Verified(ALICE)
    assert verifier.name == "accounts"


async def test_a_device_gets_in_by_its_own_password_however_it_is_typed(store, verifier, hasher):
    store.add(ALICE, "correct horse")
    phone, printer = store.add_device(ALICE, "phone"), store.add_device(ALICE, "printer")
    for typed in (printer, printer.replace("-", ""), printer.upper(), printer.replace("-", " ")):
        assert await verifier.verify(Password(ALICE, typed)) == Verified(ALICE, device="printer")
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
    assert hasher.checks == 0  # cheap for a phone that opens ten connections
    store.remove_device(ALICE, "phone")
    assert await verifier.verify(Password(ALICE, phone)) == Denied("wrong password")
    assert await verifier.verify(Password(ALICE, printer)) == Verified(ALICE, device="printer")


async def test_a_device_of_another_account_does_not_get_in(store, verifier):
    store.add(ALICE, "correct horse")
    store.add("bob", "battery staple")
    phone = store.add_device(ALICE, "phone")
    assert await verifier.verify(Password("bob", phone)) == Denied("wrong password")


async def test_a_change_is_in_force_at_once(store, verifier):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    store.set_password(ALICE, "battery staple")
    assert await verifier.verify(Password(ALICE, "correct horse")) == Denied("wrong password")
    assert await verifier.verify(Password(ALICE, "battery staple")) == Verified(ALICE)
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
    store.set_locked(ALICE, locked=True)
    assert await verifier.verify(Password(ALICE, "battery staple")) == Denied("locked")
    assert await verifier.verify(Password(ALICE, phone)) == Denied("locked")
    store.set_locked(ALICE, locked=False)
    assert await verifier.verify(Password(ALICE, "battery staple")) == Verified(ALICE)
    store.remove(ALICE)
    assert await verifier.verify(Password(ALICE, "battery staple")) == Denied("no such account")


async def test_every_no_costs_one_check_and_so_does_a_password(store, verifier, hasher):
    store.add(ALICE, "correct horse")
    store.add("locked", "correct horse")
    phone = store.add_device("locked", "phone")
    store.set_locked("locked", locked=True)
    store.add("trap", bait=True)
    for user, secret, outcome in (
        (ALICE, "correct horse", Verified(ALICE)),
        (ALICE, "wrong", Denied("wrong password")),
        ("locked", "correct horse", Denied("locked")),
        ("locked", "wrong", Denied("locked")),
        ("locked", phone, Denied("locked")),
        ("trap", "wrong", Denied("a bait account")),
        ("nobody", "wrong", Denied("no such account")),
        ("no name at all", "wrong", Denied("no such account")),
    ):
        hasher.checks = 0
        assert await verifier.verify(Password(user, secret)) == outcome
        assert hasher.checks == 1


def test_nobodys_hash_costs_what_a_real_one_costs(tmp_path):
    store = AccountStore(str(tmp_path / "accounts"))
    decoy = AccountsVerifier(store)._decoy
    assert extract_parameters(decoy) == extract_parameters(store.hasher.hash("anything"))


async def test_tokens_are_not_for_accounts(verifier):
    assert isinstance(await verifier.verify(Token("alice", "token")), Denied)


async def test_a_bait_is_known_by_its_name(store, verifier):
    store.add("trap", bait=True)
    store.add(ALICE, "correct horse")
    assert await verifier.is_bait("Trap")
    assert not await verifier.is_bait(ALICE)
    assert not await verifier.is_bait("nobody")
    assert not await verifier.is_bait("no name at all")
    path_of(store, "trap").write_bytes(b"")
    assert not await verifier.is_bait("trap")


async def test_too_many_at_once_are_told_so_and_are_no_guesses(store, hasher):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    verifier = AccountsVerifier(store, waiting_max=3)
    hasher.go_on.clear()
    waiting = [asyncio.ensure_future(verifier.verify(Password(ALICE, "correct horse"))) for _ in range(3)]
    await until(lambda: verifier._waiting == 3)
    assert await verifier.verify(Password(ALICE, "correct horse")) == Unavailable("too many logins at once")
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")  # it need not wait
    hasher.go_on.set()
    assert await asyncio.gather(*waiting) == [Verified(ALICE)] * 3
    assert await verifier.verify(Password(ALICE, "correct horse")) == Verified(ALICE)
    await verifier.close()


async def test_a_client_that_leaves_gives_its_place_back(store, hasher):
    store.add(ALICE, "correct horse")
    verifier = AccountsVerifier(store, waiting_max=1)
    hasher.go_on.clear()
    leaving = asyncio.ensure_future(verifier.verify(Password(ALICE, "correct horse")))
    await until(lambda: verifier._waiting == 1)
    leaving.cancel()
    await asyncio.wait({leaving})
    hasher.go_on.set()
    assert await verifier.verify(Password(ALICE, "correct horse")) == Verified(ALICE)
    await verifier.close()


async def test_a_login_that_a_reload_overtakes_is_still_answered(store, hasher):
    store.add(ALICE, "correct horse")
    verifier = AccountsVerifier(store)
    hasher.go_on.clear()
    logins = [asyncio.ensure_future(verifier.verify(Password(ALICE, "correct horse"))) for _ in range(10)]
    await until(lambda: verifier._waiting == 10)
    closing = asyncio.ensure_future(verifier.close())
    await asyncio.sleep(0)
    hasher.go_on.set()
    await closing
    assert await asyncio.gather(*logins) == [Verified(ALICE)] * 10
    assert await verifier.verify(Password(ALICE, "correct horse")) == Verified(ALICE)
    await verifier.close()


async def test_a_check_that_finds_no_memory_is_unknown(store, verifier, hasher, monkeypatch):
    store.add(ALICE, "correct horse")

    def fails(*_):
        raise VerificationError("Memory allocation error")

    monkeypatch.setattr(hasher, "verify", fails)
    outcome = await verifier.verify(Password(ALICE, "correct horse"))
    assert isinstance(outcome, Unavailable)
    assert "Memory" in outcome.why


# --- A device's last use ----------------------------------------------------------------------------------------------


async def test_the_last_use_is_kept_to_the_hour_and_written_once_in_it(store, verifier, clock):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    written = []
    for minutes, hour in ((0, 0), (10, 0), (59, 0), (60, 1), (61, 1)):
        clock.now = NOON + minutes * 60
        assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
        assert store.read(ALICE).devices[0].last_used == NOON + hour * 3600
        written.append(path_of(store).stat().st_ino)
    assert written[0] == written[1] == written[2] != written[3] == written[4]


async def test_a_login_does_not_depend_on_writing_its_time_down(store, verifier, monkeypatch):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
    assert store.read(ALICE).devices[0].last_used is None


async def test_a_login_does_not_wait_for_a_long_change(store, verifier):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    holder = os.open(path_of(store).parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
    os.close(holder)
    assert store.read(ALICE).devices[0].last_used is None
    assert await verifier.verify(Password(ALICE, phone)) == Verified(ALICE, device="phone")
    assert store.read(ALICE).devices[0].last_used == NOON


# --- SCRAM ------------------------------------------------------------------------------------------------------------


async def scram(verifier, user, secret):
    client = ScramClient([SCRAM], user, secret)
    server = ScramExchange(SCRAM, verifier, {}, "nonce")
    first = await server.step(client.get_client_first().encode())
    assert isinstance(first, Challenge)
    client.set_server_first(first.octets.decode())
    answer = await server.step(client.get_client_final().encode())
    if not isinstance(answer, Challenge):
        return answer
    client.set_server_final(answer.octets.decode())
    return await server.step(b"")


async def test_scram_takes_the_password_and_those_of_devices(store, verifier):
    store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    assert await scram(verifier, ALICE, "correct horse") == Verified(ALICE)
    assert await scram(verifier, ALICE, phone) == Verified(ALICE, device="phone")
    assert store.read(ALICE).devices[0].last_used == NOON
    store.set_password(ALICE, "battery staple")
    assert await scram(verifier, ALICE, "correct horse") == Denied("wrong password")
    assert await scram(verifier, ALICE, "battery staple") == Verified(ALICE)
    assert await scram(verifier, ALICE, phone) == Verified(ALICE, device="phone")
    store.set_locked(ALICE, locked=True)
    assert await scram(verifier, ALICE, phone) == Denied("locked")


async def salt_of(verifier, user):
    record = await verifier.scram(user)
    return record.salt


async def test_who_is_not_there_looks_like_who_is(store, verifier):
    store.add(ALICE, "correct horse")
    there, nobody = [await verifier.scram(user) for user in (ALICE, "Nobody")]
    assert (len(there.salt), there.iterations) == (len(nobody.salt), nobody.iterations)
    assert await salt_of(verifier, "nobody") == nobody.salt  # always the same for a name
    assert await salt_of(verifier, "somebody") != nobody.salt
    other = AccountsVerifier(AccountStore(str(store._path), hasher=store.hasher, iterations=4096))
    assert await salt_of(other, "nobody") == nobody.salt  # in another worker, too
    await other.close()
    assert await scram(verifier, "nobody", "anything") == Denied("no such account")


async def test_without_its_key_scram_tells_nothing_of_anybody(store, verifier):
    store.add(ALICE, "correct horse")
    path_of(store).with_name(".key").write_bytes(b"")
    for user in (ALICE, "nobody"):
        assert isinstance(await verifier.scram(user), Unavailable)


# --- Secrets stay secret ----------------------------------------------------------------------------------------------


def test_nothing_that_shows_an_account_shows_a_secret(store):
    account = store.add(ALICE, "correct horse")
    phone = store.add_device(ALICE, "phone")
    for text in (repr(account), repr(store.read(ALICE)), path_of(store).read_text()):
        assert "correct horse" not in text
        assert phone not in text
    assert "$argon2" not in repr(account)
    assert isinstance(account, Account)
    assert accounts.HASHER.time_cost == 2
