"""Plays every transcript at the bare engine, split in three ways, and at a live gate in front of a strict backend."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tests.dialogues.engine import TRUSTED, EnginePeer
from tests.dialogues.transcript import Dialogue, Disagreement, Player, Step, load, load_all
from tests.gatehouse import Gate, free_port
from tests.vectors.lenient import LenientBackend

DIALOGUES = {dialogue.name: dialogue for dialogue in load_all()}
ON_ENGINE = [name for name, dialogue in DIALOGUES.items() if not dialogue.only]
TIMEOUT_S = 5.0
ACCOUNT, SECRET = "alice@example.com", "correct horse"


@pytest.mark.parametrize("piece_octets", [0, 1, 7], ids=["whole", "octet by octet", "by sevens"])
@pytest.mark.parametrize("name", ON_ENGINE)
def test_on_the_engine(name, piece_octets):
    dialogue = DIALOGUES[name]
    peer = EnginePeer(
        trusted=dialogue.client == TRUSTED,
        tls=dialogue.listen == "tls",
        normalise=dialogue.listen == "inside",
        piece_octets=piece_octets,
    )
    Player(dialogue, peer).play()


def test_the_engine_alone_is_excused_for_a_reason():
    assert all(dialogue.only.startswith("gate - ") for dialogue in DIALOGUES.values() if dialogue.only)
    assert len(ON_ENGINE) >= 25


class SocketPeer:
    """A client's socket at a live gate."""

    def __init__(self, address: tuple[str, int], source: str, backend: LenientBackend, piece_octets: int = 0) -> None:
        self._socket = socket.create_connection(address, TIMEOUT_S, (source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._backend = backend
        self._since = len(backend.journal)
        self._piece_octets = piece_octets

    def send(self, octets: bytes) -> None:
        step = self._piece_octets or max(len(octets), 1)
        for at in range(0, len(octets), step):
            try:
                self._socket.sendall(octets[at : at + step])
            except ConnectionError:
                return  # hung up on: what it said before that is still to be read

    def receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""

    def silent(self) -> bytes:
        self._socket.settimeout(0.1)
        try:
            return self._socket.recv(65536)
        except TimeoutError:
            return b""
        finally:
            self._socket.settimeout(TIMEOUT_S)

    def start_tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._socket = context.wrap_socket(self._socket)

    def close(self) -> None:
        self._socket.close()

    def heard(self) -> list[bytes]:
        return [command.line for command in self._backend.heard(self._since)]

    def messages(self) -> list[bytes]:
        if self._socket.fileno() < 0:
            self._backend.wait_quiet(0.3, 2.0)  # the client is gone; the gate may still be at work
        return [transaction.octets for transaction in self._backend.transactions(self._since)]


@pytest.fixture(scope="module")
def backend() -> Iterator[LenientBackend]:
    with LenientBackend("strict") as backend:
        yield backend


@pytest.fixture(scope="module")
def gate(tmp_path_factory, backend) -> Iterator[Gate]:
    listeners = {
        "mx": 'role = "mx"',
        "tls": 'role = "mx"\ntls = "starttls"',
        "inside": 'role = "inside"\nbare_newlines = "normalise"',
        "submission": 'role = "submission"\ntls = "starttls"',
        "submissions": 'role = "submission"\ntls = "implicit"',
    }
    ports = {name: free_port() for name in listeners}
    listens = "".join(
        f'[[listen]]\nname = "{name}"\naddress = "127.0.0.1:{ports[name]}"\n{keys}\n'
        for name, keys in listeners.items()
    )
    config = f"""
[gate]
name = "mx.example.com"
workers = 1

{listens}
[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{backend.port}"
tls = "off"

[[trust]]
network = "{TRUSTED}"
why = "the printer"
owner = "postmaster@example.com"

[[trust]]
accounts = ["{ACCOUNT}"]
why = "who logs in"

[console]
address = "127.0.0.1:{free_port()}"
"""
    gate = Gate(tmp_path_factory.mktemp("gate"), config)
    add_account(gate)
    with gate:
        wait_for_keywords(gate)
        yield gate


def add_account(gate: Gate) -> None:
    """The one account of the transcripts, as an administrator adds it."""
    subprocess.run(
        [sys.executable, "-m", "gatepost", "account", "add", ACCOUNT, "--password-stdin", "--config", gate.config],
        input=f"{SECRET}\n".encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def wait_for_keywords(gate: Gate) -> None:
    """The gate offers what its backend can carry as soon as it has heard so from it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", gate.port), TIMEOUT_S) as client:
            client.recv(1000)
            client.sendall(b"EHLO client.test\r\n")
            if b"8BITMIME" in client.recv(1000):
                return
        time.sleep(0.05)
    raise AssertionError("the gate does not offer 8BITMIME\n" + gate.said())


@pytest.mark.parametrize("piece_octets", [0, 1], ids=["whole", "octet by octet"])
@pytest.mark.parametrize("name", DIALOGUES)
def test_on_a_live_gate(name, piece_octets, gate, backend):
    dialogue = DIALOGUES[name]
    together = dialogue.only and not dialogue.only.endswith("accounts")
    if piece_octets and (together or name == "long-lines"):
        piece_octets = 4096  # these are about what arrives together, or about a great many octets
    peer = SocketPeer(("127.0.0.1", gate.ports[dialogue.listen]), dialogue.client, backend, piece_octets)
    try:
        Player(dialogue, peer).play()
    finally:
        peer.close()


# ---- the instrument itself


def test_a_transcript_that_is_not_understood_is_an_error(tmp_path):
    path = tmp_path / "bad.smtp"
    path.write_text("S 250 without a colon\n")
    with pytest.raises(ValueError, match=r"bad\.smtp:1"):
        load(path)
    path.write_text("@ colour blue\n")
    with pytest.raises(ValueError, match="unknown directive colour"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("S:", "250 9.9.9"),
        ("S+", "WINGS"),
        ("S-", "SIZE"),
        ("S;", "closed"),
        ("B:", "DATA"),
        ("B=", "x"),
        ("B!", "MAIL"),
    ],
)
def test_a_disagreement_is_noticed(kind, text):
    steps = [
        Step(1, "S:", "220"),
        Step(2, "C:", "EHLO x"),
        Step(3, "S:", "250"),
        Step(4, "C:", "MAIL FROM:<a@sender.test>"),
    ]
    if kind in ("S+", "S-"):
        steps.insert(3, Step(5, kind, text))
    else:
        steps += [Step(5, "S:", "250 2.1.0"), Step(6, "C:", "NOOP"), Step(7, kind, text)]
    with pytest.raises(Disagreement):
        Player(Dialogue("x", steps=steps), EnginePeer()).play()
