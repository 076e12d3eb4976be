"""Content between client and backend: bounded in memory, whole on disk, gone when it is closed."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatepost.backend.content import OVERHEAD_OCTETS, READ_OCTETS, Content, Memory
from gatepost.errors import StorageError


def block(octets: int) -> bytes:
    """A line of so many octets, its CRLF included."""
    return b"x" * (octets - 2) + b"\r\n"


def is_whole(chunks: list[bytes]) -> bool:
    return all(chunk.endswith(b"\r\n") for chunk in chunks[:-1])


def open_files(directory: Path) -> int:
    """How many of this process's open files lie below a directory, their names gone or not."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists the directory
            count += str(descriptor.readlink()).startswith(str(directory))
    return count


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every temporary file is on a disk without room."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir, buffering: Path("/dev/full").open("w+b"))  # noqa: A006, SIM115


def test_an_empty_message_is_content_too(tmp_path: Path) -> None:
    content = Content(Memory(0, 0, str(tmp_path)))
    assert (content.size_octets, list(content.chunks())) == (0, [])
    content.close()


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_one_message_holds_no_more_in_memory_than_allowed(surplus: int, tmp_path: Path) -> None:
    memory = Memory(1 << 20, 1000, str(tmp_path))
    content = Content(memory)
    blocks = [block(300), block(1000 - 2 * OVERHEAD_OCTETS - 300 + surplus)]
    for octets in blocks:
        content.add(octets)
    assert open_files(tmp_path) == (surplus > 0)
    assert memory.held_octets == (0 if surplus > 0 else 1000 + surplus)
    for octets in (block(50), block(5000)):
        content.add(octets)
        blocks.append(octets)
    assert (open_files(tmp_path), memory.held_octets) == (1, 0)
    for _ in range(3):
        assert b"".join(content.chunks()) == b"".join(blocks)
    assert content.size_octets == sum(map(len, blocks))
    content.close()
    assert (open_files(tmp_path), memory.held_octets) == (0, 0)


def test_all_messages_together_hold_no_more_in_memory_than_allowed(tmp_path: Path) -> None:
    memory = Memory(10_000, 4_000, str(tmp_path))
    contents = [Content(memory) for _ in range(20)]
    for _ in range(10):
        for content in contents:
            content.add(block(300))
            assert memory.held_octets <= 10_000
    for content in contents:
        assert b"".join(content.chunks()) == block(300) * 10
        content.close()
        content.close()
    assert (memory.held_octets, open_files(tmp_path)) == (0, 0)


def test_tiny_blocks_cost_what_they_cost(tmp_path: Path) -> None:
    """A client that sends a line in each packet must not hold many times its message's size."""
    memory = Memory(1 << 20, 1 << 16, str(tmp_path))
    content = Content(memory)
    for _ in range(1000):
        content.add(b"\r\n")
    assert open_files(tmp_path) == 1, "1000 blocks are more than 64 KiB, whatever is in them"
    assert b"".join(content.chunks()) == b"\r\n" * 1000
    content.close()


def test_a_temporary_file_has_no_name(tmp_path: Path) -> None:
    content = Content(Memory(0, 0, str(tmp_path)))
    content.add(block(100))
    assert open_files(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is left when the process dies"
    content.close()


@pytest.mark.parametrize("end", [b"", b"\r\n"])
@pytest.mark.parametrize("longest", [10, READ_OCTETS - 1, READ_OCTETS, READ_OCTETS + 1, 3 * READ_OCTETS])
def test_chunks_are_whole_lines(longest: int, end: bytes, tmp_path: Path) -> None:
    content = Content(Memory(0, 0, str(tmp_path)))
    octets = block(7) * 40_000 + block(longest) + block(3) * 10 + b"the last line" + end
    content.add(octets[: -len(b"the last line" + end)])
    content.add(b"the last line" + end)
    for _ in range(2):
        chunks = list(content.chunks())
        assert b"".join(chunks) == octets
        assert is_whole(chunks)
    first = next(content.chunks())
    assert octets.startswith(first)
    assert b"".join(content.chunks()) == octets, "from the beginning again, though the reader before gave up"
    content.close()


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("first", [10, 20_000])
def test_a_full_disk_is_said_and_never_hides_a_part(first: int, tmp_path: Path) -> None:
    memory = Memory(100, 100, str(tmp_path))
    content = Content(memory)
    content.add(block(20))
    with pytest.raises(StorageError, match="No space left"):  # noqa: PT012 - whichever step needs the disk
        content.add(block(first))
        content.add(block(20_000))
        list(content.chunks())
    with pytest.raises(StorageError):
        list(content.chunks())
    content.close()
    assert memory.held_octets == 0


@pytest.mark.usefixtures("full_disk")
def test_the_last_octets_that_do_not_fit_are_noticed_before_anything_is_read(tmp_path: Path) -> None:
    content = Content(Memory(0, 0, str(tmp_path)))
    content.add(block(20))  # still in the file's buffer
    with pytest.raises(StorageError, match="No space left"):
        next(content.chunks())
    content.close()


def test_a_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    memory = Memory(0, 0, str(tmp_path / "gone"))
    content = Content(memory)
    with pytest.raises(StorageError, match="cannot make a temporary file"):
        content.add(block(10))
    content.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(2, 400)), max_size=40), st.integers(0, 2000), st.integers(0, 3000)
)
def test_whatever_is_added_comes_back(
    tmp_path: Path, adds: list[tuple[int, int]], message_octets: int, total_octets: int
) -> None:
    memory = Memory(total_octets, message_octets, str(tmp_path))
    contents = [Content(memory) for _ in range(4)]
    expected = [b""] * 4
    for number, length in adds:
        contents[number].add(block(length))
        expected[number] += block(length)
        assert memory.held_octets <= total_octets
    for content, octets in zip(contents, expected, strict=True):
        assert b"".join(content.chunks()) == octets
        assert content.size_octets == len(octets)
        content.close()
    assert (memory.held_octets, open_files(tmp_path)) == (0, 0)
