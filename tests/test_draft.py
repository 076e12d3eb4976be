"""The first configuration: what is seen of a backend, and a file that loads and opens nothing by itself."""

from __future__ import annotations

import contextlib
import socket
import threading
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost import config, draft
from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.errors import GatepostError

SEEN = draft.Sighting(True, 'it says "220 mail.example.com" and offers PIPELINING')
UNSEEN = draft.Sighting(False, "it cannot be reached: Connection refused")


class Backend:
    """Says its lines one by one, each after something was sent to it; keeps what it heard."""

    def __init__(self, *lines, path=None):
        self.heard = []
        self._lines = lines
        self._listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self._listener.bind(str(path) if path else ("127.0.0.1", 0))
        self._listener.listen()
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._listener.close()
        self._thread.join(5)

    def _serve(self):
        with contextlib.suppress(OSError):  # we may be left at any moment
            connection, _ = self._listener.accept()
            with connection:
                for line in self._lines:
                    connection.sendall(line)
                    heard = connection.recv(4096)
                    self.heard.append(heard)
                    if not heard:
                        return


def look_at(*lines):
    with Backend(*lines) as backend:
        return draft.look_at(SmtpAddress(*backend.address), "mx.example.com"), backend


# --- Looking at the backend -------------------------------------------------------------------------------------------


def test_what_a_backend_says_and_offers_is_told():
    seen, backend = look_at(
        b"220 mail.example.com ESMTP Postfix\r\n",
        b"250-mail.example.com\r\n250-PIPELINING\r\n250-SIZE 10485760\r\n250-STARTTLS\r\n250 8BITMIME\r\n",
    )
    assert seen.reached
    assert seen.words == (
        'it says "220 mail.example.com ESMTP Postfix" and offers 8BITMIME, PIPELINING, STARTTLS, messages up to 10 MiB'
    )
    assert backend.heard == [b"EHLO mx.example.com\r\n", b"QUIT\r\n"]


def test_a_backend_that_knows_no_ehlo_is_said_helo():
    seen, backend = look_at(b"220 old.example.com\r\n", b"500 What?\r\n", b"250 Hello\r\n")
    assert seen.reached
    assert seen.words == 'it says "220 old.example.com" and offers no extension'
    assert backend.heard == [b"EHLO mx.example.com\r\n", b"HELO mx.example.com\r\n", b"QUIT\r\n"]


def test_an_lmtp_backend_is_said_lhlo(tmp_path):
    with Backend(b"220 lmtp\r\n", b"250-lmtp\r\n250 PIPELINING\r\n", path=tmp_path / "lmtp.sock") as backend:
        seen = draft.look_at(LmtpSocket(str(tmp_path / "lmtp.sock")), "mx.example.com")
    assert seen.reached
    assert backend.heard[0] == b"LHLO mx.example.com\r\n"


def test_an_embedded_mailbox_needs_no_look():
    assert draft.look_at(EmbeddedMailboxes(""), "mx.example.com").reached


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b"554 No service\r\n"], "it answers, but does not greet: 554 No service"),
        (
            [b"220 hello\r\n", b"550 You are not welcome\r\n", b"550 Not at all\r\n"],
            "it greets, but refuses us: 550 Not at all",
        ),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "it cannot be reached: it does not speak SMTP:"),
        ([b"220-" + b"x" * 100_000], "it cannot be reached: it does not speak SMTP:"),
    ],
)
def test_a_backend_that_cannot_be_used_is_told(lines, said):
    seen, _ = look_at(*lines)
    assert not seen.reached
    assert seen.words.startswith(said)


def test_a_backend_that_hangs_up_is_told():
    with Backend() as backend:
        seen = draft.look_at(SmtpAddress(*backend.address), "mx.example.com")
    assert seen == draft.Sighting(False, "it cannot be reached: it closed the connection")


def test_a_port_where_nothing_listens_is_told(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        seen = draft.look_at(SmtpAddress(*unused.getsockname()), "mx.example.com")
    assert seen == UNSEEN
    seen = draft.look_at(LmtpSocket(str(tmp_path / "missing.sock")), "mx.example.com")
    assert seen == draft.Sighting(False, "it cannot be reached: No such file or directory")


def test_a_silent_backend_is_left_when_the_time_is_up():
    times = iter([0.0, draft.LOOK_S])
    with Backend(b"") as backend:
        seen = draft.look_at(SmtpAddress(*backend.address), "mx.example.com", clock=lambda: next(times))
    assert seen == draft.Sighting(False, "it cannot be reached: no answer in time")


def test_a_hostile_greeting_stays_one_printable_line():
    seen, _ = look_at(b'220 "\x1b[31m\xe2\x80\xae\x00 x\ty\r\n', b"250 x\r\n")
    assert seen.words.isprintable()
    text = draft.text(draft.Answers("mx.example.com", ("127.0.0.1:25",), ("example.com",), "x:25"), seen, "2026-11-23")
    assert tomllib.loads(text)["backend"]["mail"] == {"address": "x:25", "tls": "opportunistic"}


# --- The file ---------------------------------------------------------------------------------------------------------


def answers(**changes):
    return draft.Answers(**{
        "name": "mx.example.com",
        "listen": ("0.0.0.0:25", "[::]:25"),
        "local": ("example.com", "*.example.com"),
        "backend": "10.0.0.5:25",
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize("sighting", [SEEN, UNSEEN])
@pytest.mark.parametrize("backend", ["10.0.0.5:25", "embedded:", "lmtp:/run/lmtp.sock", "lmtp:10.0.0.5:24"])
@pytest.mark.parametrize("trust", [(), ("10.1.0.0/16",), ("dyn.example.com", "2001:db8::/32", "192.0.2.1")])
@pytest.mark.parametrize("user", ["", "gatepost"])
def test_what_is_drafted_loads_without_a_warning(sighting, backend, trust, user):
    text = draft.text(answers(backend=backend, trust=trust, user=user), sighting, "2026-11-23")
    loaded = config.load(text.encode(), "gatepost.toml")
    assert loaded.warnings == ()
    assert loaded.gate.name == "mx.example.com"
    assert loaded.gate.listens[0].addresses == (("0.0.0.0", 25), ("::", 25))
    assert loaded.gate.listens[0].tls == "starttls"
    assert [entry.pattern for entry in loaded.gate.rules.local] == ["example.com", "*.example.com"]
    assert [entry.host or str(entry.network) for entry in loaded.gate.rules.trust] == [
        who if who != "192.0.2.1" else "192.0.2.1/32" for who in trust
    ]
    assert loaded.user == user
    assert sighting.words in text


def test_every_commented_example_in_the_draft_loads_when_its_mark_is_taken_off():
    lines = draft.text(answers(), SEEN, "2026-11-23").splitlines()
    uncommented = [
        line[2:] if line.startswith("# ") and (" = " in line or line.startswith("# [")) and "`" not in line else line
        for line in lines
    ]
    assert len([1 for old, new in zip(lines, uncommented, strict=True) if old != new]) >= 9
    loaded = config.load("\n".join(uncommented).encode(), "gatepost.toml")
    assert loaded.user == "gatepost"
    assert [entry.why for entry in loaded.gate.rules.trust] == ["office LAN", "our people"]
    assert [listen.role for listen in loaded.gate.listens] == ["mx", "submission"]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.text(st.characters(exclude_categories=["Cs"]))
)
def test_no_answer_can_write_beyond_its_value(data, words):
    printable = "".join(c for c in words if c.isprintable())
    text = draft.text(answers(data=data), draft.Sighting(True, printable), "2026-11-23")
    parsed = tomllib.loads(text)
    assert parsed["gate"]["data"] == data
    assert set(parsed) == {"gate", "listen", "domains", "backend", "console"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.0.0/255.255.0.0", "10.1.0.0/16"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("Dyn.example.com", "dyn.example.com"),
    ],
)
def test_who_may_be_trusted(written, read):
    assert draft.grantee(written) == read


@pytest.mark.parametrize("written", ["10.1.2.3/16", "10.1", "a b", "*.example.com", "10.1.0.0/99"])
def test_who_may_not(written):
    with pytest.raises(ValueError, match=";"):
        draft.grantee(written)


# --- Writing it -------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_directories(tmp_path):
    path = tmp_path / "etc" / "gatepost" / "gatepost.toml"
    draft.write(str(path), b"x", overwrite=False)
    assert path.read_bytes() == b"x"
    assert [entry.name for entry in path.parent.iterdir()] == ["gatepost.toml"]


def test_a_file_that_is_there_is_kept_unless_it_shall_go(tmp_path):
    path = tmp_path / "gatepost.toml"
    path.write_bytes(b"old")
    with pytest.raises(GatepostError, match="is there already; --force overwrites it, --output writes another"):
        draft.write(str(path), b"new", overwrite=False)
    assert path.read_bytes() == b"old"
    draft.write(str(path), b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["gatepost.toml"]


def test_a_link_is_not_followed_into_a_new_file(tmp_path):
    (tmp_path / "gatepost.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GatepostError):
        draft.write(str(tmp_path / "gatepost.toml"), b"x", overwrite=False)
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GatepostError, match=r"cannot be written: (Not a directory|File exists)|is there already"):
        draft.write(str(tmp_path / "file" / "gatepost.toml"), b"x", overwrite=False)
    with pytest.raises(GatepostError, match="cannot be written"):
        draft.write("/proc/gatepost.toml", b"x", overwrite=False)
