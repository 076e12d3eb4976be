"""What must be done before the gate serves: its user, its data directory, the proof that no other gate uses it.

Why: ports below 1024 need root, and nothing else does.  What parses strangers' octets must not be root.
Trust: the data directory belongs to the gate's user, who may one day be whoever took a worker over: what is done there
    is done as that user, so that a link planted there leads root nowhere.
Promise: after ``drop`` no way leads back; one data directory serves one gate.
Sources: setuid(2), initgroups(3), flock(2).
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pwd
import resource
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import watchfiles

from gatepost.errors import ConfigError

PID_FILE = "gatepost.pid"
_LOCK_TRIES = 5  # `gatepost status` looks at the lock by taking it for a moment
_LOCK_WAIT_S = 0.05


class Account(NamedTuple):
    """The user that the gate becomes."""

    name: str
    uid: int
    gid: int


def account_of(user: str, where: str) -> Account | None:
    """The account of this user; None where the gate stays who it is (no user named, or not started as root).

    Raises:
        ConfigError: there is no such user.
    """
    if not user or os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        mend = f"`useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin {user}` makes it"
        raise ConfigError([f"{where}: [gate] user = {user!r}: there is no such user on this host; {mend}"]) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def warning_about(user: str) -> str:
    """What a careful administrator should hear about who the gate runs as; "" for nothing."""
    if os.geteuid() == 0 and not user:
        return (
            "running as root: whoever finds a hole in this program owns this host; "
            'write [gate] user = "gatepost", to which privileges are dropped once the ports are bound'
        )
    if user and os.geteuid() != 0:
        with contextlib.suppress(KeyError):
            if pwd.getpwnam(user).pw_uid == os.geteuid():
                return ""
        return f"[gate] user = {user!r} has no effect: only root can become somebody else"
    return ""


@contextlib.contextmanager
def acting_as(account: Account | None) -> Iterator[None]:
    """Do a few things as the account, then be root again.

    Python's own library may lie where the account cannot read it (below /root): what is loaded late is loaded before.
    """
    if account is None:
        yield
        return
    for encoding in ("ascii", "idna", "latin-1"):
        codecs.lookup(encoding)
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def prepare_data(data: str, account: Account | None, where: str) -> None:
    """Make the data directory, or see that it can be used.

    Raises:
        ConfigError: it cannot.
    """
    path = Path(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        try:
            path.mkdir(mode=0o750)
            made = True
        except FileExistsError:
            made = False
        if account is not None:
            status = path.stat(follow_symlinks=True)
            if made or (status.st_uid == 0 and stat.S_ISDIR(status.st_mode) and not any(path.iterdir())):
                os.chown(path, account.uid, account.gid)
        reached = usable = is_directory = False
        with acting_as(account), contextlib.suppress(PermissionError):
            is_directory = stat.S_ISDIR(path.stat().st_mode)  # Path.is_dir() of newer Pythons hides what forbids it
            reached = True
            usable = is_directory and os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
    except OSError as error:
        raise ConfigError([f"{where}: [gate] data = {data!r}: {error.strerror}; write another directory"]) from error
    if not usable:
        user = account.name if account else pwd.getpwuid(os.geteuid()).pw_name
        if not reached:
            mend = f"the directories above it must let that user pass, `namei -l {data}` shows them"
        elif is_directory:
            mend = f"`chown -R {user}: {data}` mends it"
        else:
            mend = "it is no directory; write another path"
        raise ConfigError([f"{where}: [gate] data = {data!r} cannot be written by the user {user}; {mend}"])


def check_programs(account: Account | None, where: str) -> None:
    """See that the account may run this very program: below /root, as an example, it may not.

    Raises:
        ConfigError: it may not.
    """
    needed = (sys.executable, os.__file__, __file__, watchfiles.__file__)  # interpreter, its library, ours, others'
    with acting_as(account):
        closed = [path for path in needed if not os.access(path, os.R_OK, effective_ids=True)]
    if account is not None and closed:
        mend = "install Gatepost where every user can read it, such as below /opt"
        raise ConfigError(
            [f"{where}: [gate] user = {account.name!r}: that user cannot read {closed[0]}, a part of this gate; {mend}"]
        )


class Instance:
    """The right to be the one gate on a data directory, held as long as this process lives.

    A lock on the file, not the number in it, is the right: it ends with the process, however that ends.

    Raises:
        ConfigError: another gate holds it.
    """

    def __init__(self, data: str, account: Account | None, where: str) -> None:
        self._path = Path(data, PID_FILE)
        with acting_as(account):
            self._descriptor = self._take(data, where)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _take(self, data: str, where: str) -> int:
        tries = 0
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise ConfigError([f"{where}: {self._path}: {error.strerror}; remove it"]) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                number = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                tries += 1
                if tries < _LOCK_TRIES:
                    time.sleep(_LOCK_WAIT_S)
                    continue
                who = f"another gate (process {number or 'unknown'}) runs on {data}"
                mend = "stop it, or give this one another directory as [gate] data"
                raise ConfigError([f"{where}: {who}; {mend}"]) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._path.lstat()):
                    return descriptor
            os.close(descriptor)  # its owner removed the file while we waited for it: once more

    def release(self) -> None:
        """Another gate may start."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)


def drop(account: Account) -> None:
    """Become the account, with its groups and no way back.

    Raises:
        ConfigError: that did not work; nothing may be served.
    """
    os.initgroups(account.name, account.gid)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    if account.uid != 0:
        with contextlib.suppress(PermissionError):
            os.setuid(0)
            raise ConfigError([f"privileges were not dropped to {account.name}: root can be had back; not serving"])


def raise_open_files(sessions: int) -> str:
    """As many open files as the system lets us have.

    Args:
        sessions: how many one worker may hold; 0 for no limit.

    Returns:
        A warning where they do not suffice, else "".
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sessions * 2 + 200  # a client and a backend connection each, and what else is open
    if soft != resource.RLIM_INFINITY and soft < needed:
        return (
            f"{sessions} sessions may need {needed} open files, and this process may have {soft}; "
            "raise it (LimitNOFILE= in the systemd unit, `ulimit -n` in a shell), or lower [limits] sessions"
        )
    return ""


def owner_of(data: str) -> Account | None:
    """Whom root acts as in a data directory; None for itself, and for who is not root."""
    if os.geteuid() != 0 or not Path(data).exists():
        return None
    status = Path(data).stat()
    return None if status.st_uid == 0 else Account("", status.st_uid, status.st_gid)
