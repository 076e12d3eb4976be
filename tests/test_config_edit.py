"""An entry is added to a file, and nothing else of it changes."""

from __future__ import annotations

import os
import tomllib
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.config import edit
from gatepost.errors import GatepostError

ENTRY: dict[str, edit.Value] = {
    "network": "192.0.2.7",
    "forward_paths": ["*@partner.example"],
    "why": "asked for",
    "expires": date(2027, 2, 1),
}
WRITTEN = """\
[[trust]]
network = "192.0.2.7"
forward_paths = ["*@partner.example"]
why = "asked for"
expires = 2027-02-01
"""
FILE = """\
# Ours. Ask it@example.com before you change it.
[gate]
name = "mx.example.com"   # as in DNS

[[trust]]
network = "10.1.0.0/16"
why = "office LAN"
# owner = "nobody yet"

# The printers, by the book.
[[trust]]
  network = "10.2.0.0/16" # second floor
reverse_paths = [
    "*@example.com",   # all of us
    # and nobody else
]

# Whom we had enough of.
[[deny]]
reverse_path = "*@spam.test"
[domains]
local = ["example.com"]
"""


def around(old: str, table: str, entry: dict) -> tuple[str, str]:
    """What stands before and behind what was put in."""
    new = edit.added(old.encode(), table, entry).decode()
    for position in range(len(old) + 1):
        if new.startswith(old[:position]) and new.endswith(old[position:]) and len(new) >= len(old):
            return old[:position], old[position:]
    pytest.fail(f"the old file is not in the new one:\n{new}")


def test_it_stands_behind_the_last_of_its_kind():
    new = edit.added(FILE.encode(), "trust", ENTRY).decode()
    assert new == FILE.replace("\n# Whom we had", f"\n{WRITTEN}\n# Whom we had")


def test_it_stands_right_above_a_head_that_follows_without_an_empty_line():
    new = edit.added(FILE.encode(), "deny", {"network": "192.0.2.7"}).decode()
    assert new == FILE.replace("[domains]", '\n[[deny]]\nnetwork = "192.0.2.7"\n\n[domains]')


def test_the_first_of_its_kind_stands_at_the_end():
    new = edit.added(FILE.encode(), "send_as", {"accounts": ["anna"], "reverse_paths": ["boss@example.com"]}).decode()
    assert new == FILE + '\n[[send_as]]\naccounts = ["anna"]\nreverse_paths = ["boss@example.com"]\n'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", WRITTEN),
        ("# nothing yet", f"# nothing yet\n\n{WRITTEN}"),
        ("[gate]\r\nname = 'x.example'\r\n", f"[gate]\r\nname = 'x.example'\r\n\r\n{WRITTEN}".replace("\r\n", "\n")),
        ('[[trust]]\nnetwork = "::1"\n# its own\n', f'[[trust]]\nnetwork = "::1"\n# its own\n\n{WRITTEN}'),
        (
            '[[trust]]\nnetwork = "::1"\n\n\n# last words\n',
            f'[[trust]]\nnetwork = "::1"\n\n{WRITTEN}\n\n# last words\n',
        ),
        (
            '[[trust]]\nnetwork = "::1"\nwhy = """\n\n[deny]\n# no remark"""\n# one\n[gate]\n',
            f'[[trust]]\nnetwork = "::1"\nwhy = """\n\n[deny]\n# no remark"""\n# one\n[gate]\n\n{WRITTEN}',
        ),
    ],
    ids=["empty", "no line end", "CRLF", "a remark of its own", "a remark of the file", "what looks like a head"],
)
def test_where_the_file_is_peculiar(old, new):
    added = edit.added(old.encode(), "trust", ENTRY).decode()
    if "\r\n" in old:
        assert added.count("\r\n") == added.count("\n")
        assert added.startswith(old)
        added = added.replace("\r\n", "\n")
    assert tomllib.loads(added) == tomllib.loads(new)
    if "no remark" not in old:
        assert added == new


@pytest.mark.parametrize("old", ['trust = [{ network = "::1" }]\n', "trust = 1\n", "[trust]\nnetwork = 1\n", "[gate\n"])
def test_what_takes_no_table_is_left_alone(old):
    with pytest.raises(GatepostError, match=r"by hand|cannot be read as TOML"):
        edit.added(old.encode(), "trust", ENTRY)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)
words = st.text(st.characters(codec="utf-8", min_codepoint=32, exclude_characters="\x7f"), max_size=20)
remarks = st.lists(
    st.one_of(
        st.just(""),
        st.text(st.characters(codec="utf-8", min_codepoint=32, exclude_characters="\x7f"), max_size=20).map(
            "# {}".format
        ),
    ),
    max_size=3,
)
quoted = texts.map(lambda text: edit.entry_text("x", {"why": text}).partition("\n")[2].rstrip("\n"))
tables = st.tuples(st.sampled_from(["[[trust]]", "[[deny]]", "[[listen]]"]), remarks, quoted, remarks)


@given(
    st.lists(tables, max_size=5),
    remarks,
    st.sampled_from(["trust", "deny"]),
    st.fixed_dictionaries({"network": texts}, optional={"why": texts, "reverse_paths": st.lists(texts, min_size=1)}),
)
def test_whatever_is_added_keeps_every_octet_of_the_file(parts, end, table, entry):
    lines = [line for head, *between in parts for line in (head, *between[0], between[1], *between[2])]
    old = "\n".join([*lines, *end])
    before, behind = around(old, table, entry)
    new = edit.added(old.encode(), table, entry).decode()
    assert before + behind == old
    parsed, was = tomllib.loads(new), tomllib.loads(old)
    assert parsed[table] == [*was.get(table, []), entry]
    assert {name: value for name, value in parsed.items() if name != table} == {
        name: value for name, value in was.items() if name != table
    }


# --- On the disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gatepost.toml"
    path.write_bytes(b"old")
    path.chmod(0o640)
    return path


def test_a_file_is_replaced_with_its_mode_kept_and_nothing_left_beside_it(file):
    inode = file.stat().st_ino
    edit.write(str(file), b"old", b"new")
    assert (file.read_bytes(), file.stat().st_mode & 0o7777) == (b"new", 0o640)
    assert file.stat().st_ino != inode, "it is a new file, put in the place of the old one"
    assert list(file.parent.iterdir()) == [file]


def test_a_link_stays_a_link(file, tmp_path):
    link = tmp_path / "etc" / "gatepost.toml"
    link.parent.mkdir()
    link.symlink_to(file)
    edit.write(str(link), b"old", b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"


def test_a_file_that_somebody_changed_is_left_alone(file):
    file.write_bytes(b"theirs")
    with pytest.raises(GatepostError, match="changed by somebody else"):
        edit.write(str(file), b"old", b"new")
    assert file.read_bytes() == b"theirs"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_goes_away_is_said(file):
    file.unlink()
    with pytest.raises(GatepostError, match="No such file"):
        edit.write(str(file), b"old", b"new")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's file needs root")
def test_the_owner_stays(file):
    os.chown(file, 12345, 12346)
    edit.write(str(file), b"old", b"new")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize(("owner", "mode"), [(0, 0o644), (65534, 0o444), (65534, 0o644)])
def test_what_may_not_be_written_is_said(file, owner, mode):
    """Not theirs; theirs but read-only; theirs in a directory that is not."""
    os.chown(file, owner, owner)
    file.chmod(mode)
    for directory in (file.parent, *file.parent.parents[:2]):  # those that are pytest's
        directory.chmod(directory.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        with pytest.raises(GatepostError, match="cannot be written"):
            edit.write(str(file), b"old", b"new")
    finally:
        os.seteuid(0)
    assert file.read_bytes() == b"old"


def test_a_disk_that_fails_leaves_the_old_file(file, monkeypatch):
    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(GatepostError, match="No space left"):
        edit.write(str(file), b"old", b"new")
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_the_difference_is_told_as_diff_tells_it():
    new = edit.added(FILE.encode(), "trust", ENTRY)
    told = edit.difference(FILE.encode(), new, "gatepost.toml").splitlines()
    assert told[:2] == ["--- gatepost.toml", "+++ gatepost.toml (new)"]
    assert [line for line in told[2:] if line.startswith(("+", "-"))] == [
        f"+{line}" for line in [*WRITTEN.splitlines(), ""]
    ]
