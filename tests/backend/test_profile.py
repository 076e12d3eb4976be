"""What backends answered, kept and read again; a file that is none is told as such."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gatepost.backend import profile
from gatepost.backend.dialect import ENDS, QUESTIONS, Answer, Dialect, Heard
from gatepost.errors import StorageError

FOUND = Dialect(
    backend="mail",
    peer="10.0.0.5:25",
    at=1_795_650_000.0,
    tls="TLSv1.3",
    greeting='220 mail.example.com "ESMTP" \u202e',
    local_domain="example.com",
    elsewhere="elsewhere.invalid",
    keywords=("8BITMIME", "SIZE"),
    size_octets=1000,
    heard=tuple(
        Heard(form.id, form.fill("x", "example.com"), answer, "550 5.1.1 No")
        for form, answer in zip(QUESTIONS, list(Answer) * 7, strict=True)
    ),
    ends=tuple(Heard(name, "", Answer.REFUSED, "250 Ok") for name in ENDS),
)


@pytest.mark.parametrize("found", [FOUND, replace(FOUND, size_octets=None, ends=(), tls="")])
def test_what_is_kept_comes_back(tmp_path, found):
    path = profile.path_of(str(tmp_path), "mail")
    assert path == tmp_path / "dialect" / "mail.json"
    profile.keep(path, found)
    profile.keep(path, found)  # in the place of the one before
    assert profile.recall(path) == found
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_finds_date_greeting_and_answers(tmp_path):
    path = profile.path_of(str(tmp_path), "mail")
    profile.keep(path, FOUND)
    kept = json.loads(path.read_text())
    assert kept["at"] == "2026-11-25T23:40:00+00:00"
    assert kept["greeting"].startswith("220 mail.example.com")
    assert kept["accept_all"] == "refused"
    assert kept["heard"][1] == {
        "id": "unknown user, dotted", "asked": "<x.x@example.com>", "answer": "refused", "said": "550 5.1.1 No",
    }  # fmt: skip


def test_where_nothing_was_kept_there_is_nothing(tmp_path):
    assert profile.recall(profile.path_of(str(tmp_path), "mail")) is None


@pytest.mark.parametrize(
    "octets",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b"{" * 10,
        json.dumps({**profile.as_object(FOUND), "at": 5}).encode(),
        json.dumps({**profile.as_object(FOUND), "at": "yesterday"}).encode(),
        json.dumps({**profile.as_object(FOUND), "heard": "x"}).encode(),
        json.dumps({**profile.as_object(FOUND), "heard": [5]}).encode(),
        json.dumps({**profile.as_object(FOUND), "size_octets": "1"}).encode(),
        json.dumps({**profile.as_object(FOUND), "keywords": [1]}).encode(),
        json.dumps({**profile.as_object(FOUND), "ends": [{"id": "x", "asked": "", "answer": "maybe", "said": ""}]})
        .encode(),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_told(tmp_path, octets):
    path = tmp_path / "mail.json"
    path.write_bytes(octets)
    with pytest.raises(StorageError, match=r"mail\.json is no profile of a backend"):
        profile.recall(path)


@pytest.mark.parametrize("more", [0, 1])
def test_a_file_of_the_largest_size_is_read_and_no_larger_one(tmp_path, more):
    path = tmp_path / "mail.json"
    octets = json.dumps(profile.as_object(FOUND)).encode()
    path.write_bytes(octets + b" " * (profile.FILE_OCTETS_MAX - len(octets) + more))
    if more:
        with pytest.raises(StorageError):
            profile.recall(path)
    else:
        assert profile.recall(path) == FOUND


def test_lists_and_words_are_bounded(tmp_path):
    path = tmp_path / "mail.json"
    kept = profile.as_object(FOUND)
    kept["keywords"] = ["X"] * (profile.KEYWORDS_MAX + 1)
    kept["ends"] = [kept["heard"][0]] * (profile.HEARD_MAX + 1)
    kept["greeting"] = "x" * 10_000
    path.write_text(json.dumps(kept))
    found = profile.recall(path)
    assert found is not None
    assert (len(found.keywords), len(found.ends)) == (profile.KEYWORDS_MAX, profile.HEARD_MAX)
    assert len(found.greeting) < 1000


def test_what_cannot_be_written_or_read_is_told(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        profile.keep(tmp_path / "missing" / "dialect" / "mail.json", FOUND)
    (tmp_path / "dialect" / "mail.json").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be read"):
        profile.recall(tmp_path / "dialect" / "mail.json")
    with pytest.raises(StorageError, match="cannot be written"):
        profile.keep(tmp_path / "dialect" / "mail.json", FOUND)
    assert list((tmp_path / "dialect").iterdir()) == [tmp_path / "dialect" / "mail.json"]
