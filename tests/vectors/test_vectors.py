"""Every published attack against a live gate, in front of a backend that misreads in every way known.

One gate for each family of careless backends (mode); all classes of attack in front of the plain and the most careless
one, in front of the narrower ones the classes that they could misread.  What arrived is judged (see player.py).
"""

from __future__ import annotations

import smtplib
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from tests.gatehouse import Gate, free_port
from tests.vectors.lenient import MODES, LenientBackend
from tests.vectors.player import PASSWORD, Case, Played, Target, load_cases, play_all

from gatepost.auth.accounts import AccountStore

pytestmark = pytest.mark.slow
CASES = load_cases()
USERS = ("alice", "bob")
LOCAL = frozenset({"example.com", "xn--bcher-kva.example", "bücher.example"})

EVERYTHING = frozenset(case.family for case in CASES)
FRAMING = frozenset({"eod", "framing", "bdat", "pipe", "trace", "params"})
ADDRESSES = frozenset({"relay-basic", "addr", "addr-utf8"})
FAMILIES = {
    "strict": EVERYTHING,
    "all": EVERYTHING,
    "c-string": FRAMING,
    "linesplit": FRAMING,
    "7bit": FRAMING,
    "chunking": FRAMING,
    "chunking-broken": FRAMING,
    "xclient": FRAMING,
    "old-unix": FRAMING | ADDRESSES,
    "lf-dot-lf": FRAMING,
    "lf-dot-crlf": FRAMING,
    "crlf-dot-lf": FRAMING,
    "cr-dot-cr": FRAMING,
    "crcrlf": FRAMING,
    "nul": FRAMING,
    "percent-hack": ADDRESSES,
    "source-route": ADDRESSES,
}
# Modes of the backend without a run of their own.
ELSEWHERE = {
    "resp-inject": "test_replies_injected_before_tls_are_not_believed",
    "beyond": "breaks on text that is legal in a message; docs/threat-model.md says so",
}

# Replies that are right although the case would like another one; nothing arrives in any of them.
REMARKS = {
    "pipe-early-talker": "our greeting may be under way before the client's octets come; the session ends either way",
    "pipe-early-talker-local": "likewise",
}


AT_ONCE = 3  # runs; each mostly waits


def applies(mode: str, case: Case) -> bool:
    return case.family in FAMILIES[mode]


def configuration(backend_port: int, tls: str = "off") -> str:
    return f"""
[gate]
name = "mx.example.com"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:{free_port()}"
role = "mx"
tls = "starttls"
auth = "offered"
send_as = "off"

[domains]
local = ["example.com", "bücher.example"]

[backend.lenient]
address = "127.0.0.1:{backend_port}"
tls = "{tls}"

[[trust]]
network = "127.0.0.2"
why = "the one address that may relay in these tests"
owner = "postmaster@example.com"

[[trust]]
accounts = ["*"]
why = "who logs in may relay, and nobody else"
owner = "postmaster@example.com"

[limits]
sessions_per_client = 0
sessions_per_minute_per_client = 0
messages_per_hour_per_mailbox = 0

[console]
address = "127.0.0.1:{free_port()}"
"""


def wait_until_learned(gate: Gate, keyword: bytes) -> None:
    """The gate offers what its backend can carry once it has heard so from it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", gate.port), 5) as client:
            client.recv(1000)
            client.sendall(b"EHLO test\r\n")
            if keyword in client.recv(1000):
                return
        time.sleep(0.05)
    raise AssertionError(f"the gate does not offer {keyword.decode()}\n{gate.said()}")


def play(mode: str, directory: Path) -> Played:
    cases = [case for case in CASES if case.family in FAMILIES[mode]]
    data = directory / "gatepost-data"
    data.mkdir()
    accounts = AccountStore(str(data / "accounts"))
    for user in USERS:
        accounts.add(user, PASSWORD)
    with LenientBackend(mode) as backend, Gate(directory, configuration(backend.port)) as gate:
        wait_until_learned(gate, b"DSN")
        target = Target("127.0.0.1", gate.port, LOCAL, tuple(gate.processes()))
        played = play_all(cases, target, backend)
        faults = [record for record in gate.log() if record.get("event") == "fault"]
        played.unexplained += [f"the gate logged a fault: {fault}" for fault in faults]
    print(f"{mode}\n{played.summary()}")
    return played


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory) -> Iterator[dict[str, Future[Played]]]:
    """The runs of all modes that some collected test asks for: started at once, a few at a time."""
    asked = {item.callspec.params["played"] for item in request.session.items if "played" in item.fixturenames}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {mode: pool.submit(play, mode, tmp_path_factory.mktemp(mode)) for mode in FAMILIES if mode in asked}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def played(request, runs) -> Played:
    """What came of one mode's run."""
    return runs[request.param].result()


EACH_CASE = [
    pytest.param(mode, case.id, id=f"{mode}-{case.id}") for mode in FAMILIES for case in CASES if applies(mode, case)
]
EACH_MODE = [pytest.param(mode, mode, id=mode) for mode in FAMILIES]


@pytest.mark.parametrize(("played", "name"), EACH_CASE, indirect=["played"])
def test_attack(played, name):
    outcome = played.outcomes[name]
    assert not outcome.harms, f"\n{outcome}"
    if name not in REMARKS:
        assert not outcome.remarks, f"\n{outcome}"


@pytest.mark.parametrize(("played", "mode"), EACH_MODE, indirect=["played"])
def test_nothing_arrived_that_no_case_explains(played, mode):
    assert played.unexplained == []


@pytest.mark.parametrize(("played", "mode"), EACH_MODE, indirect=["played"])
def test_no_case_is_left_out(played, mode):
    assert played.not_offered == {}
    assert set(played.outcomes) == {case.id for case in CASES if applies(mode, case)}


def test_every_mode_and_every_case_has_its_place():
    assert set(FAMILIES) | set(ELSEWHERE) == set(MODES)
    assert {case.id for case in CASES if applies("all", case)} == {case.id for case in CASES}
    assert set(REMARKS) <= {case.id for case in CASES}


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
def test_replies_injected_before_tls_are_not_believed(tls, tmp_path):
    """NO STARTTLS (USENIX Security 21): replies in plain text behind the backend's 220 are not used inside TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with (
        LenientBackend("resp-inject", context) as backend,
        Gate(tmp_path, configuration(backend.port, tls)) as gate,
        smtplib.SMTP("127.0.0.1", gate.port, timeout=10) as client,
    ):
        client.ehlo("client.test")
        assert client.mail("a@sender.test")[0] == 250
        client.rcpt("bob@example.com")
        assert backend.happened("opened")
        assert [command.line for command in backend.heard() if command.line.startswith((b"AUTH", b"XCLIENT"))] == []
        assert backend.happened("believed injected replies") == []
