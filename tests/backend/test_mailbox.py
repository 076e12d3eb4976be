"""The embedded mailboxes: nothing is lost, nothing escapes, nothing is half there."""

from __future__ import annotations

import asyncio
import errno
import mailbox as maildirs
import os
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.backend.parts import LOCAL, SENDER, SESSION, TEXT, TRACE, Notes, content_of, recipient, settings

from gatepost.backend import make_backend
from gatepost.backend.content import Content, Memory
from gatepost.backend.mailbox import MailboxBackend, directory_name, mailbox_directory
from gatepost.backend.settings import EmbeddedMailboxes, SmtpAddress
from gatepost.errors import StorageError
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS
from gatepost.smtp.path import NULL_REVERSE_PATH, POSTMASTER, AddressLiteral, ForwardPath, Mailbox, ReversePath, Shape
from gatepost.smtp.reply import Reply
from gatepost.verdict import AdmittedRecipient, Trust

HEAD = b"Return-Path: <sender@elsewhere.test>\r\n" + TRACE


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def backend(tmp_path, notes) -> Iterator[MailboxBackend]:
    made = MailboxBackend(settings(addresses=(EmbeddedMailboxes(str(tmp_path / "mailboxes")),)), log=notes.log)
    yield made
    if made._executor is not None:
        made._executor.shutdown()


async def send(
    backend: MailboxBackend,
    octets: bytes | Content = TEXT,
    *recipients: AdmittedRecipient,
    reverse_path: ReversePath = SENDER,
) -> Reply:
    delivery = backend.begin(reverse_path, NO_MAIL_PARAMETERS, SESSION)
    for one in recipients or (recipient(),):
        reply = await delivery.rcpt(one, NO_RCPT_PARAMETERS)
        if not reply.positive:
            return reply
    return await delivery.deliver(octets if isinstance(octets, Content) else content_of(octets), TRACE)


def found(backend: MailboxBackend, path: str = "example.com/alice") -> list[bytes]:
    return sorted(file.read_bytes() for file in (backend._root / path / "new").iterdir())


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


# ---- arrival


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        TEXT,
        b".\r\n..\r\nFrom me\r\n",
        bytes(range(128, 256)) + b"\r\n",
        b"x" * 998 + b"\r\n",
        (b"y" * 76 + b"\r\n") * 350_000,
    ],
    ids=["empty", "text", "dots", "8-bit", "long line", "25 MiB"],
)
async def test_a_message_is_what_was_sent_behind_our_trace_fields(backend, octets):
    assert (await send(backend, octets)).octets() == b"250 2.0.0 Stored\r\n"
    assert found(backend) == [HEAD + octets]
    assert backend.healthy


async def test_a_last_line_without_end_gets_one(backend):
    await send(backend, b"no end of line")
    assert found(backend) == [HEAD + b"no end of line\r\n"]


async def test_content_comes_from_a_file_too(backend, tmp_path):
    octets = (b"z" * 76 + b"\r\n") * 10_000
    content = content_of(octets, block=5000, memory=Memory(1000, 1000, str(tmp_path)))
    assert (await send(backend, content)).code == 250
    content.close()
    assert found(backend) == [HEAD + octets]


async def test_the_null_reverse_path(backend):
    await send(backend, TEXT, reverse_path=NULL_REVERSE_PATH)
    assert found(backend) == [b"Return-Path: <>\r\n" + TRACE + TEXT]


async def test_a_mail_client_can_read_it(backend):
    await send(backend)
    box = maildirs.Maildir(backend._root / "example.com" / "alice", create=False)
    (message,) = box
    assert message["Subject"] == "hello"
    assert message["Return-Path"] == "<sender@elsewhere.test>"


async def test_each_recipient_gets_it_once(backend):
    reply = await send(backend, TEXT, recipient("alice"), recipient("Bob"), recipient("ALICE"), recipient("carol"))
    assert reply.code == 250
    for name in ("alice", "bob", "carol"):
        assert found(backend, f"example.com/{name}") == [HEAD + TEXT]


async def test_many_messages_at_once(backend):
    replies = await asyncio.gather(*(send(backend, b"%d\r\n" % n) for n in range(60)))
    assert {reply.code for reply in replies} == {250}
    assert found(backend) == sorted(HEAD + b"%d\r\n" % n for n in range(60))


async def test_mail_is_private(backend):
    await send(backend)
    paths = [backend._root, *backend._root.rglob("*")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths)


# ---- whose mail


async def test_mail_for_others_is_refused(backend):
    trust = Trust("network 10.0.0.0/8", "", "", "gatepost.toml:9")
    reply = await send(backend, TEXT, recipient("victim", "elsewhere.test", trust))
    assert reply.octets().startswith(b"550 5.1.2 ")
    assert not backend._root.exists()


async def test_postmaster_without_a_domain_is_not_guessed(backend):
    reply = await send(backend, TEXT, AdmittedRecipient(ForwardPath(POSTMASTER, Shape.NO_DOMAIN), LOCAL, "mail"))
    assert reply.code == 550


async def test_mailboxes_do_not_come_into_being_without_end(backend):
    backend.mailboxes_max = 3
    for name in ("alice", "bob", "carol"):
        assert (await send(backend, TEXT, recipient(name))).code == 250
    assert (await send(backend, TEXT, recipient("dave"))).octets().startswith(b"550 5.1.1 ")
    assert (await send(backend, TEXT, recipient("alice"), recipient("dave"))).code == 550
    assert (await send(backend, TEXT, recipient("alice"))).code == 250
    assert len(found(backend)) == 2, "and nobody got the message that was refused"
    again = MailboxBackend(backend.settings, mailboxes_max=3)
    assert (await send(again, TEXT, recipient("erin"))).code == 550
    assert (await send(again, TEXT, recipient("bob"))).code == 250
    await again.close()


# ---- names


@pytest.mark.parametrize(
    ("local_part", "name"),
    [
        ("alice", "alice"),
        ("Alice.B-C_d+e=f", "alice.b-c_d+e=f"),
        (".", "%2E"),
        ("..", "%2E."),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        (".hidden", "%2Ehidden"),
        ("a/b", "a%2Fb"),
        ("a\\b", "a%5Cb"),
        ("a%2Fb", "a%252fb"),
        ("a b\x01\x7f", "a%20b%01%7F"),
        ("jürgen", "j%C3%BCrgen"),
        ("Jürgen", "j%C3%BCrgen"),
        ("\N{KELVIN SIGN}", "%E2%84%AA"),
        ("[192.0.2.1]", "%5B192.0.2.1%5D"),
    ],
)
def test_the_name_of_a_directory(local_part, name):
    assert directory_name(local_part) == name


@given(st.text(min_size=1, max_size=64), st.text(min_size=1, max_size=64))
def test_no_address_escapes_and_no_two_collide(one, other):
    try:
        names = [directory_name(text) for text in (one, other)]
    except UnicodeEncodeError:
        return  # lone surrogates; no parser gives them
    for name in names:
        assert name.isascii()
        assert name.isprintable()
        assert "/" not in name
        assert not name.startswith((".", "-/"))
        assert Path(name).name == name
    folded = [text.encode().lower() for text in (one, other)]
    assert (names[0] == names[1]) == (folded[0] == folded[1])


def test_the_longest_address_fits_into_a_name():
    assert len(directory_name("\N{GRINNING FACE}" * 16)) <= 255
    assert len(directory_name("é" * 32)) <= 255


def test_an_address_literal_has_a_place(tmp_path):
    place = mailbox_directory(tmp_path, Mailbox("a", AddressLiteral(ip_address("2001:db8::1"))))
    assert place == tmp_path / "%5Bipv6%3A2001%3Adb8%3A%3A1%5D" / "a"


async def test_hostile_local_parts_stay_inside(backend, tmp_path):
    names = ["..", "../../../x", "/etc/passwd", "a/../../b", "tmp", "new", "cur", "\x00", "a\nb", "x" * 64]
    for name in names:
        assert (await send(backend, TEXT, recipient(name))).code == 250
    assert {path.name for path in tmp_path.iterdir()} == {"mailboxes"}
    assert {path.name for path in backend._root.iterdir()} == {"example.com"}
    assert len(list((backend._root / "example.com").iterdir())) == len(names)


# ---- trouble


class FailingOs:
    """The os module, with one function that fails at a chosen call."""

    def __init__(self, name: str, error: OSError, at: int = 1) -> None:
        self._name, self._error, self._at = name, error, at
        self.calls = 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name != self._name:
            return real

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self._at:
                raise self._error
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, b"452 4.3.1 "), (errno.EDQUOT, b"452 4.3.1 "), (errno.EIO, b"451 4.3.0 ")],
)
@pytest.mark.parametrize("function", ["fsync", "open", "fdopen"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8, 9])
async def test_trouble_with_the_disk_defers_and_leaves_nothing(
    backend, monkeypatch, notes, number, expected, function, at
):
    failing = FailingOs(function, OSError(number, "trouble"), at)
    monkeypatch.setattr("gatepost.backend.mailbox.os", failing)
    reply = await send(backend, TEXT, recipient("alice"), recipient("bob"))
    if failing.calls < at:
        assert reply.code == 250
        return
    assert reply.octets().startswith(expected)
    assert files(backend._root) == []
    assert not backend.healthy
    assert len(notes.lines) == 1
    monkeypatch.undo()
    assert (await send(backend)).code == 250
    assert backend.healthy


async def test_a_second_mailbox_that_cannot_be_delivered_to_takes_the_message_from_the_first(backend, monkeypatch):
    renames = 0
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == 2:
            raise OSError(errno.EIO, "trouble")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert (await send(backend, TEXT, recipient("alice"), recipient("bob"))).code == 451
    assert files(backend._root) == []


async def test_where_files_cannot_be_linked_they_are_copied(backend, monkeypatch):
    monkeypatch.setattr("gatepost.backend.mailbox.os", FailingOs("link", OSError(errno.EXDEV, "other device")))
    assert (await send(backend, TEXT, recipient("alice"), recipient("bob"))).code == 250
    assert found(backend, "example.com/bob") == [HEAD + TEXT]


class Unreadable(Content):
    def chunks(self) -> Iterator[bytes]:
        yield b"half\r\n"
        raise StorageError("cannot read content back")


async def test_content_that_cannot_be_read_back_defers_and_leaves_nothing(backend, notes):
    assert (await send(backend, Unreadable(Memory(1, 1)))).octets().startswith(b"451 4.3.0 ")
    assert files(backend._root) == []
    assert notes.lines == ["- backend mail: cannot read content back"]


async def test_a_session_that_is_cancelled_leaves_no_message(backend):
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(Content):
        def chunks(self) -> Iterator[bytes]:
            loop.call_soon_threadsafe(reached.set)
            time.sleep(0.1)
            yield TEXT

    task = loop.create_task(send(backend, Slow(Memory(1, 1))))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(backend._root) == []


async def test_the_ends_of_a_transaction(backend):
    delivery = backend.begin(SENDER, NO_MAIL_PARAMETERS, SESSION)
    assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 554
    assert (await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 503
    delivery = backend.begin(SENDER, NO_MAIL_PARAMETERS, SESSION)
    await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
    assert not delivery.park()
    delivery.abort()
    assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 503
    assert not backend._root.exists()


# ---- health


async def test_a_probe_says_whether_the_directory_can_be_written(backend, notes):
    await backend.probe()
    assert backend.healthy
    assert backend.capabilities is not None
    assert {"8BITMIME", "SMTPUTF8"} <= backend.capabilities.keywords
    (backend._root).rmdir()
    backend._root.write_text("in the way")
    await backend.probe()
    assert not backend.healthy
    assert len(notes.lines) == 1
    assert not MailboxBackend(backend.settings).healthy


async def test_a_probe_removes_what_a_crash_has_left(backend):
    await send(backend)
    temporary = backend._root / "example.com" / "alice" / "tmp"
    old, young = temporary / "1.old", temporary / "2.young"
    old.touch()
    young.touch()
    long_ago = time.time() - 37 * 3600
    os.utime(old, (long_ago, long_ago))
    await backend.probe()
    assert [path.name for path in temporary.iterdir()] == ["2.young"]
    assert len(found(backend)) == 1


async def test_a_transaction_may_end_after_the_backend_was_closed(backend):
    delivery = backend.begin(SENDER, NO_MAIL_PARAMETERS, SESSION)
    await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
    await backend.close()
    await backend.close()
    assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
    assert found(backend) == [HEAD + TEXT]


async def test_the_settings_make_the_kind_of_backend(tmp_path):
    mailboxes = make_backend(settings(addresses=(EmbeddedMailboxes(str(tmp_path)),)))
    assert isinstance(mailboxes, MailboxBackend)
    await mailboxes.close()
    assert mailboxes.name == "mail"
    assert make_backend(settings(25)).settings.addresses == (SmtpAddress("127.0.0.1", 25),)
    with pytest.raises(ValueError, match="stand alone"):
        make_backend(settings(addresses=(EmbeddedMailboxes(str(tmp_path)), SmtpAddress("127.0.0.1", 25))))
