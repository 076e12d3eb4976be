"""The embedded mailboxes: one Maildir a local mailbox, for the default configuration and for trials.

Why: a newcomer sees mail arrive before any server stands behind the gate, and can read it with any mail client.
Trust: local-parts are chosen by strangers; a mailbox's place is an injective, harmless encoding of the address.  The
    disk may be full or broken at any moment.
Promise: a 250 is said when content and directory entries are on disk, for all recipients; an error leaves nothing in
    any mailbox.  The file is what was sent, octet for octet, behind our trace fields.  Mail is kept for local domains
    only, and strangers cannot make mailboxes without end.
Sources: RFC 5321 §4.4 (Return-Path at final delivery), §6.1 (responsibility), §2.4 (case of local-parts);
    Maildir as described by its author (tmp, new, cur; unique names; rename when complete).
    The local-part's ASCII letters are folded to lower case: nobody has ever wanted both Alice@ and alice@, and
    RFC 5321 §2.4 leaves that to the host that holds the mailbox.  Lines keep their CRLF: Maildir readers take either,
    and what was signed stays what was signed.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import time_ns
from typing import NamedTuple, TypeVar

from gatepost.backend.content import Content
from gatepost.backend.pool import Log, to_logging
from gatepost.backend.settings import BackendSettings, EmbeddedMailboxes
from gatepost.errors import StorageError
from gatepost.facts import Session
from gatepost.smtp.client import Capabilities
from gatepost.smtp.command import MailParameters, RcptParameters
from gatepost.smtp.path import Mailbox, ReversePath
from gatepost.smtp.reply import Reply
from gatepost.verdict import AdmittedRecipient, LocalDomain

T = TypeVar("T")

MAILBOXES_MAX = 10_000
THREADS = 4  # one fsync each; more only compete for the same disk
STALE_S = 36 * 3600  # Maildir: what lies in tmp longer than that was left by a crash

CAPABILITIES = Capabilities(frozenset({"8BITMIME", "SMTPUTF8", "PIPELINING", "SIZE", "ENHANCEDSTATUSCODES"}))

ACCEPTED = Reply(250, "Recipient ok", "2.1.5")
STORED = Reply(250, "Stored", "2.0.0")
NOT_OURS = Reply(550, "This server keeps mail for its own domains only", "5.1.2")
NO_MAILBOX = Reply(550, "No such mailbox here", "5.1.1")
NO_RECIPIENTS = Reply(554, "No valid recipients", "5.5.1")
ENDED = Reply(503, "The transaction has ended", "5.5.1")
DISK_FULL = Reply(452, "Not enough disk space, try again later", "4.3.1")
DISK_ERROR = Reply(451, "Local error, try again later", "4.3.0")

_NAME_MAX = 200  # file systems allow 255 octets
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_HARMLESS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-+=.")


def directory_name(text: str) -> str:
    """A local-part or domain as the name of a directory: one for each, and none that means anything else.

    ASCII letters, digits, "_", "-", "+", "=" and inner periods stand for themselves, every other octet is %XX: no "/",
    no "." or ".." or hidden name, no control character; no two addresses share a name.
    """
    octets = text.encode("utf-8").lower()  # bytes.lower() folds ASCII letters only: the Kelvin sign is no "k"
    name = "".join(chr(octet) if octet in _HARMLESS else f"%{octet:02X}" for octet in octets)
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _NAME_MAX:  # "~" stands in no other name
        name = f"{name[: _NAME_MAX // 2]}~{hashlib.blake2b(octets, digest_size=20).hexdigest()}"
    return name


def mailbox_directory(root: Path, mailbox: Mailbox) -> Path:
    """Where a mailbox's Maildir stands."""
    return root / directory_name(str(mailbox.domain)) / directory_name(mailbox.local_part)


class _Draft(NamedTuple):
    """A complete, synced file, and the name that makes it a delivered message."""

    temporary: Path
    final: Path


class MailboxBackend:
    """A backend that is a directory.

    Args:
        mailboxes_max: so many mailboxes come into being by themselves, of all domains together.
        log: told what an operator should know.
    """

    __slots__ = (
        "_executor",
        "_host",
        "_log",
        "_mailboxes",
        "_making",
        "_numbers",
        "_root",
        "healthy",
        "mailboxes_max",
        "name",
        "settings",
    )

    def __init__(
        self,
        settings: BackendSettings,
        *,
        mailboxes_max: int = MAILBOXES_MAX,
        log: Log | None = None,
    ) -> None:
        if len(settings.addresses) != 1 or not isinstance(settings.addresses[0], EmbeddedMailboxes):
            raise ValueError(f"backend {settings.name}: embedded mailboxes stand alone")
        self.settings = settings
        self.name = settings.name
        self.mailboxes_max = mailboxes_max
        self._root = Path(settings.addresses[0].directory)
        there = next((path for path in (self._root, *self._root.absolute().parents) if path.exists()), self._root)
        self.healthy = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        self._log: Log = log or to_logging
        self._executor: ThreadPoolExecutor | None = ThreadPoolExecutor(THREADS, thread_name_prefix="mailbox")
        self._numbers = count(1)
        self._mailboxes = -1  # counted when the first one is to be made
        self._making = threading.Lock()
        # Maildir: a host name in a file name holds neither "/" nor ":".
        self._host = socket.gethostname().replace("/", "\\057").replace(":", "\\072") or "localhost"

    @property
    def capabilities(self) -> Capabilities | None:
        """What can be stored: anything that is lines."""
        return CAPABILITIES

    def begin(self, reverse_path: ReversePath, parameters: MailParameters, session: Session) -> MailboxDelivery:
        """A transaction."""
        del parameters  # SIZE is no promise, and a file takes 8-bit content and UTF-8 as they are
        return MailboxDelivery(self, reverse_path)

    async def probe(self) -> None:
        """Whether the directory can be written; ``healthy`` tells.  Removes what crashes have left.  Does not raise."""
        await self.in_thread(self._look)

    async def close(self, grace_s: float | None = None) -> None:
        """End the threads when deliveries under way are complete."""
        del grace_s
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.get_running_loop().run_in_executor(None, executor.shutdown)

    def in_thread(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Run what blocks; after ``close`` in one of the loop's own threads."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    # ---- in a thread

    def _look(self) -> None:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            self.healthy = os.access(self._root, os.W_OK | os.X_OK)
            if not self.healthy:
                self._log(f"backend {self.name}: {self._root} cannot be written", up=False)
        except OSError as error:
            self.healthy = False
            self._log(f"backend {self.name}: {self._root}: {error.strerror}", up=False)

    def _sweep(self) -> None:
        """Remove temporary files that nobody will finish."""
        before_s = time_ns() / 1e9 - STALE_S
        for temporary in self._root.glob("*/*/tmp/*"):
            with suppress(FileNotFoundError):
                if temporary.stat(follow_symlinks=False).st_mtime < before_s:
                    temporary.unlink()

    def store(self, recipients: list[Mailbox], head: bytes, content: Content, given_up: threading.Event) -> Reply:
        """Keep one message for all recipients, or for none.  Blocks; called in a thread.

        Args:
            head: trace fields.
            given_up: set when nobody waits for the answer any more.
        """
        drafts: list[_Draft] = []
        delivered: list[Path] = []
        complete = False
        try:
            # Everything that can fail for want of space happens before the first message becomes visible.
            for mailbox in recipients:
                directory = self._maildir(mailbox)
                if directory is None:
                    return NO_MAILBOX
                drafts.append(self._draft(directory, drafts, head, content))
            if given_up.is_set():
                return DISK_ERROR
            for draft in drafts:
                draft.temporary.rename(draft.final)
                delivered.append(draft.final)
            for draft in drafts:
                _sync_directory(draft.final.parent)
            complete = True
        except OSError as error:
            self.healthy = False
            self._log(f"backend {self.name}: {error}", up=False)
            return DISK_FULL if error.errno in _FULL else DISK_ERROR
        except StorageError as error:
            self._log(f"backend {self.name}: {error}", up=False)
            return DISK_ERROR
        finally:
            if not complete:
                for path in [*delivered, *(draft.temporary for draft in drafts)]:
                    with suppress(OSError):
                        path.unlink()
        self.healthy = True
        return STORED

    def _maildir(self, mailbox: Mailbox) -> Path | None:
        """The mailbox's Maildir, made when it is not there; None when there are too many."""
        directory = mailbox_directory(self._root, mailbox)
        if (directory / "cur").is_dir():  # made last
            return directory
        with self._making:
            if not directory.is_dir():
                if self._mailboxes < 0:
                    self._mailboxes = sum(1 for _ in self._root.glob("*/*"))
                if self._mailboxes >= self.mailboxes_max:
                    return None
                self._mailboxes += 1
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for made in (directory.parent, directory, *(directory / part for part in ("tmp", "new", "cur"))):
                made.mkdir(mode=0o700, exist_ok=True)
            for holder in (directory, directory.parent, self._root, self._root.parent):
                _sync_directory(holder)
        return directory

    def _draft(self, directory: Path, drafts: list[_Draft], head: bytes, content: Content) -> _Draft:
        """The message in a mailbox's tmp, complete and on disk."""
        nanoseconds = time_ns()
        name = f"{nanoseconds // 10**9}.M{nanoseconds // 1000 % 10**6}P{os.getpid()}Q{next(self._numbers)}.{self._host}"
        draft = _Draft(directory / "tmp" / name, directory / "new" / name)
        if drafts:
            # The same octets for every recipient: one file with several names, as Maildir servers copy themselves.
            with suppress(OSError):
                os.link(drafts[0].temporary, draft.temporary)
                return draft
        try:
            descriptor = os.open(draft.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(_file_octets(head, content))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                draft.temporary.unlink()
            raise
        return draft


class MailboxDelivery:
    """One transaction."""

    __slots__ = ("_backend", "_ended", "_recipients", "_reverse_path")

    def __init__(self, backend: MailboxBackend, reverse_path: ReversePath) -> None:
        self._backend = backend
        self._reverse_path = reverse_path
        self._recipients: dict[str, Mailbox] = {}
        self._ended = False

    async def rcpt(self, recipient: AdmittedRecipient, parameters: RcptParameters) -> Reply:
        """A recipient: any mailbox of a local domain; it comes into being with its first message."""
        del parameters
        if self._ended:
            return ENDED
        mailbox = recipient.forward_path.mailbox
        if not isinstance(recipient.authority, LocalDomain) or not isinstance(mailbox, Mailbox):
            return NOT_OURS
        # The same mailbox twice is one message.
        self._recipients[f"{directory_name(str(mailbox.domain))}/{directory_name(mailbox.local_part)}"] = mailbox
        return ACCEPTED

    async def deliver(self, content: Content, trace_field: bytes) -> Reply:
        """Store the message in every recipient's mailbox; the answer comes when it is on disk."""
        if self._ended:
            return ENDED
        self._ended = True
        if not self._recipients:
            return NO_RECIPIENTS
        # RFC 5321 §4.4: final delivery puts the reverse-path on top.
        head = b"Return-Path: <%b>\r\n%b" % (self._reverse_path.octets, trace_field)
        given_up = threading.Event()
        backend = self._backend
        work = backend.in_thread(backend.store, list(self._recipients.values()), head, content, given_up)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            given_up.set()
            await asyncio.wait({work})  # it reads the content, which its owner is about to close
            raise

    def abort(self) -> None:
        """The transaction is over without a message."""
        self._ended = True

    def park(self) -> bool:
        """There is nothing to lend."""
        return False


def _file_octets(head: bytes, content: Content) -> Iterator[bytes]:
    yield head
    last = b"\r\n"
    for chunk in content.chunks():
        yield chunk
        last = chunk
    if not last.endswith(b"\r\n"):
        yield b"\r\n"  # as it would have arrived by DATA


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
