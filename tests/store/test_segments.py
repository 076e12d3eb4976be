"""Files of bounded size that several processes append to: whole batches, and the oldest file goes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gatepost.store.segments import Position, Segments

OCTETS, FILES = 100, 3


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "lines"


@pytest.fixture
def segments(directory: Path) -> Segments:
    return Segments(directory, octets_max=OCTETS, files_max=FILES)


def line(number: int, octets: int = 10) -> bytes:
    return f"{number:0{octets - 1}}\n".encode()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.jsonl"))


def everything(directory: Path) -> bytes:
    return b"".join((directory / name).read_bytes() for name in files(directory))


@pytest.mark.parametrize(("lines", "names"), [(9, ["00000001.jsonl"]), (10, ["00000001.jsonl"])])
def test_a_file_takes_what_it_may_have(directory, segments, lines, names):
    for number in range(lines):
        segments.append(line(number))
    assert files(directory) == names
    assert everything(directory) == b"".join(map(line, range(lines)))


def test_one_octet_more_begins_another_file(directory, segments):
    segments.append(line(0, OCTETS - 10))
    segments.append(line(1, 11))
    assert files(directory) == ["00000001.jsonl", "00000002.jsonl"]
    assert (directory / "00000002.jsonl").read_bytes() == line(1, 11)


def test_beyond_as_many_files_as_there_may_be_nothing_is_taken_and_nothing_goes(directory, segments):
    for number in range(FILES):
        segments.append(line(number, OCTETS))
    with pytest.raises(OSError, match="it has as many files as it may have") as full:
        segments.append(line(FILES, OCTETS))
    assert full.value.errno == errno.ENOSPC
    assert everything(directory) == b"".join(line(number, OCTETS) for number in range(FILES))
    segments.forget_before(Position(2, 0))
    segments.append(line(FILES, OCTETS))
    assert files(directory) == [f"{number:08}.jsonl" for number in range(2, FILES + 2)]


def test_some_files_are_kept_for_what_matters_more(segments):
    for number in range(FILES - 1):
        segments.append(line(number, OCTETS), spare_files=1)
    with pytest.raises(OSError, match="as many files"):
        segments.append(line(7, OCTETS), spare_files=1)
    segments.append(line(8, OCTETS), durable=True)


def test_what_is_no_file_of_ours_is_let_be(directory, segments):
    directory.mkdir()
    for name in ("notes.txt", "1.jsonl", "00000001.jsonl.bak", "9999999999999999999.jsonl"):
        (directory / name).write_bytes(b"x\n")
    segments.append(line(1))
    assert (directory / "00000001.jsonl").read_bytes() == line(1)
    assert len(list(directory.iterdir())) == 6  # with the lock


def test_a_directory_that_is_removed_is_made_again(directory, segments):
    segments.append(line(1))
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    segments.append(line(2))
    assert everything(directory) == line(2)


def test_a_half_line_costs_no_other(directory, segments):
    segments.append(line(1))
    with (directory / "00000001.jsonl").open("ab") as file:
        file.write(b'{"half')
    segments.append(line(2))
    assert everything(directory) == line(1) + b'{"half\n' + line(2)


def test_a_half_line_at_the_end_of_a_full_file_stays_behind(directory, segments):
    directory.mkdir()
    (directory / "00000001.jsonl").write_bytes(b"x" * OCTETS)
    segments.append(line(2))
    assert (directory / "00000001.jsonl").read_bytes() == b"x" * OCTETS
    assert (directory / "00000002.jsonl").read_bytes() == line(2)


def test_a_link_is_not_followed(directory, segments, tmp_path):
    directory.mkdir()
    (tmp_path / "other").write_bytes(b"")
    (directory / "00000001.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"):
        segments.append(line(1))
    assert (tmp_path / "other").read_bytes() == b""
    with pytest.raises(OSError, match="symbolic"):
        list(segments.lines_with(b"1"))


def test_a_pipe_is_not_read(directory, segments):
    directory.mkdir()
    os.mkfifo(directory / "00000001.jsonl")
    assert list(segments.lines_with(b"1")) == []


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_the_newest_comes_first(segments):
    for number in range(25):
        segments.append(line(number))
    assert list(segments.lines_with(b"1\n")) == [line(21)[:-1], line(11)[:-1], line(1)[:-1]]


def test_a_line_is_told_once_however_often_it_matches(segments):
    segments.append(b"aaaa\nbbbb\naaaa\n")
    assert list(segments.lines_with(b"a")) == [b"aaaa", b"aaaa"]


def test_a_line_without_its_end_is_told(segments, directory):
    directory.mkdir()
    (directory / "00000001.jsonl").write_bytes(b"one\ntwo")
    assert list(segments.lines_with(b"two")) == [b"two"]


def test_nothing_is_made_by_reading(segments, directory):
    assert list(segments.lines_with(b"x")) == []
    assert segments.numbers() == []
    assert segments.octets_after(Position()) == 0
    assert segments.read(Position(), 100) == ([], Position())
    assert not directory.exists()


# --- Reading on -------------------------------------------------------------------------------------------------------


def read_all(segments: Segments, position: Position, octets_max: int) -> tuple[list[bytes], Position]:
    lines: list[bytes] = []
    while True:
        more, behind = segments.read(position, octets_max)
        if behind == position:
            return lines, position
        lines, position = lines + more, behind


@pytest.mark.parametrize("octets_max", [20, 21, 50, 10_000])
def test_reading_goes_on_where_it_was(segments, octets_max):
    written = [b"%019d" % number for number in range(20)]
    position = Position()
    got: list[bytes] = []
    for one in written:
        segments.append(one + b"\n")
        more, position = read_all(segments, position, octets_max)
        got += more
        segments.forget_before(position)
    assert got == written
    assert segments.octets_after(position) == 0
    again, _ = read_all(segments, Position(), octets_max)
    assert again == written[15:]


def test_a_line_beyond_all_measure_is_passed_over(segments, directory):
    directory.mkdir()
    (directory / "00000001.jsonl").write_bytes(b"x" * 1000 + b"\none\n")
    lines, _ = read_all(segments, Position(), 100)
    assert lines[-1] == b"one"


def test_a_line_that_is_being_written_is_waited_for_and_one_that_never_will_be_is_passed_over(segments, directory):
    directory.mkdir()
    (directory / "00000001.jsonl").write_bytes(b"one\ntwo")
    lines, position = read_all(segments, Position(), 1000)
    assert (lines, position) == ([b"one"], Position(1, 4))
    (directory / "00000002.jsonl").write_bytes(b"three\n")
    assert read_all(segments, position, 1000) == ([b"three"], Position(2, 6))


def test_other_files_than_when_it_was_last_read_are_read_from_their_beginning(segments):
    segments.append(b"one\n")
    assert read_all(segments, Position(57, 1000), 1000)[0] == [b"one"]


def test_what_was_read_goes_but_for_the_file_that_may_be_written(segments, directory):
    for number in range(FILES):
        segments.append(line(number, OCTETS))
    _, position = read_all(segments, Position(), OCTETS)
    segments.forget_before(position)
    assert files(directory) == [f"{FILES:08}.jsonl"]
    segments.append(b"x\n")
    assert read_all(segments, position, OCTETS)[0] == [b"x"]


# --- Several processes, and their end ---------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from gatepost.store.segments import Segments
segments = Segments(Path(sys.argv[1]), octets_max=20_000, files_max=1000)
for number in range(400):
    segments.append(b"".join(b"%s %06d %d\\n" % (sys.argv[2].encode() * 50, number, part) for part in range(3)))
"""


def test_batches_of_several_processes_stay_whole_and_none_is_lost(directory):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(directory), letter]) for letter in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert all((directory / name).stat().st_size <= 20_000 for name in files(directory))
    lines = everything(directory).decode().splitlines()
    for letter in "abc":
        mine = [text.split()[1:] for text in lines if text.startswith(letter * 50 + " ")]
        assert mine == [[f"{number:06}", str(part)] for number in range(400) for part in range(3)]
    assert len(lines) == 3 * 400 * 3
    starts = range(0, len(lines), 3)
    assert all(len({text.rpartition(" ")[0] for text in lines[at : at + 3]}) == 1 for at in starts), "batches are whole"


KILLED = """
import fcntl, os, sys
from pathlib import Path
from gatepost.store import segments
write = os.write
def half(descriptor, octets):
    write(descriptor, octets[: len(octets) // 2])
    os.kill(os.getpid(), 9)
segments.os.write = half
segments.Segments(Path(sys.argv[1]), octets_max=100, files_max=3).append(b"a" * 40 + b"\\n")
"""


def test_a_process_that_is_killed_in_the_middle_costs_its_own_batch_alone(directory, segments):
    segments.append(line(1))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(directory)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    segments.append(line(2))  # the lock went with the process
    assert everything(directory) == line(1) + b"a" * 20 + b"\n" + line(2)


# --- A full disk ------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, signal, sys
from pathlib import Path
from gatepost.store.segments import Segments
segments = Segments(Path(sys.argv[1]), octets_max=100_000, files_max=3)
segments.append(b"a" * 99 + b"\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))  # Python ignores SIGXFSZ
try:
    segments.append(b"b" * 99 + b"\\n")
except OSError as error:
    print(error.errno)
segments.append(b"c" * 49 + b"\\n")
"""


def test_what_does_not_fit_whole_is_not_written_at_all(directory):
    """The limit of a file's size cuts a write in the middle, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(directory)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "27"  # EFBIG
    assert everything(directory) == b"a" * 99 + b"\n" + b"c" * 49 + b"\n"
