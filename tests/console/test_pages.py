"""The pages, over real HTTP: who sees them, what they show, and what hostile text does in them."""

from __future__ import annotations

import asyncio
import html
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from gatepost.answers import proof
from gatepost.config import sentences
from gatepost.console import pages as pages_module
from gatepost.console.login import COOKIE_S, LINK_S, Login
from gatepost.console.pages import Answers
from gatepost.console.server import application, serve
from gatepost.errors import GatepostError, StorageError
from gatepost.gate.listeners import bind_one
from gatepost.telemetry import Metrics, StatusBoard

NOW_S = 1_800_000_000.0
HOSTILE = "<script>alert(1)</script>\"'&\u202e"
NOTHING_TRUSTED = b"""\
[gate]
name = "mx.example.com"
data = "data"
[[listen]]
name = "mx"
address = "127.0.0.1:25"
[domains]
local = ["example.com"]
[backend.mailbox]
address = "embedded:"
"""
EVERYBODY_TRUSTED = (
    NOTHING_TRUSTED
    + b"""
[[trust]]
network = "0.0.0.0/0"
why = "a trial"
owner = "it@example.com"
"""
)


def told(octets: bytes) -> dict[str, Any]:
    """What `gatepost check` says of this configuration."""
    return proof.answer(octets, "gatepost.toml").told


class Said(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


class Pages:
    """The console with answers that a test gives."""

    def __init__(self) -> None:
        self.login = Login(b"k" * 32)
        self.asked: list[Any] = []
        self.explained: dict[str, Any] = {"verdict": "refuse", "reply": f"550 {HOSTILE}"}
        self.proof = told(NOTHING_TRUSTED)
        self.proof["warnings"] = [HOSTILE]
        self.proof["trust"] = [{"sentence": HOSTILE, "where": "g:2"}]
        self.key_problem = ""
        self.began = threading.Event()
        self.held = threading.Event()
        self.held.set()
        answers = Answers(
            explain=self._explain,
            proof=lambda: self.proof,
            selftest=self._selftest,
            in_words=lambda told: [("client", told.get("reply", ""))],
            names=frozenset({"mx.example.com"}),
            tls_versions=("1.2", "1.3"),
            now_s=lambda: NOW_S,
        )
        memory = memoryview(bytearray(Metrics.size_octets(1)))
        Metrics.format(memory)
        board = memoryview(bytearray(StatusBoard.SIZE_OCTETS))
        StatusBoard(board).write(
            {"serving": True, "listeners": [{"name": "mx", "address": "127.0.0.1:25"}], "workers": []}
        )
        app = application(Metrics(memory, 0), StatusBoard(board), "1.2.3", answers, self._opened)
        sock = bind_one("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self._lifeline, theirs = socket.socketpair()
        self._thread = threading.Thread(target=lambda: asyncio.run(serve(app, sock, theirs)))
        self._sockets = (sock, theirs)
        self._thread.start()

    def _opened(self) -> Login:
        if self.key_problem:
            raise StorageError(self.key_problem)
        return self.login

    def _explain(self, asked: Any) -> dict[str, Any]:
        self.asked.append(dict(asked))
        self.began.set()
        assert self.held.wait(60)
        if asked.get("client") == "x":
            raise GatepostError('--client "x": this is not an IP address')
        return self.explained

    def _selftest(self, listeners: list[Any]) -> dict[str, Any]:
        self.asked.append(listeners)
        self.began.set()
        assert self.held.wait(60)
        one = {
            "listen": "mx",
            "address": "127.0.0.1:25",
            "outcome": "disagrees",
            "text": HOSTILE,
            "transcript": [HOSTILE],
        }
        return {"outcome": "disagrees", "listeners": [one]}

    def end(self) -> None:
        """As the supervisor does it: for another configuration, or for good."""
        self._lifeline.close()

    def close(self) -> None:
        self.held.set()
        self.end()
        self._thread.join(30)
        for sock in self._sockets:
            sock.close()
        assert not self._thread.is_alive()

    def ask(self, path: str, method: str = "GET", *, cookie: str | None = "", **headers: str) -> Said:
        """As a browser that came by a link; ``cookie`` None for one that did not."""
        if cookie is not None:
            headers["Cookie"] = f"gatepost={cookie or self.login.cookie(NOW_S)}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        said = Said(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return said


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


ALL = [
    "/",
    "/explain",
    "/explain?reference=x",
    "/proof",
    "/selftest",
    "/api/explain?reference=x",
    "/api/proof",
    "/api/selftest",
]


@pytest.mark.parametrize("path", ALL)
def test_nothing_without_a_link(pages, path):
    assert pages.ask(path).status == 200
    for cookie in (None, "x", pages.login.link_token(NOW_S), Login(b"x" * 32).cookie(NOW_S), "9" * 5000):
        said = pages.ask(path, cookie=cookie)
        assert said.status == 401
        assert "gatepost console" in said.text
    assert pages.ask(path, cookie=pages.login.cookie(NOW_S - COOKIE_S)).status == 401


@pytest.mark.parametrize(
    ("status", "method", "headers"),
    [(401, "GET", {"cookie": None}), (403, "POST", {}), (421, "GET", {"Host": "evil.example"})],
)
def test_what_is_refused_is_not_kept_either(pages, status, method, headers):
    said = pages.ask("/selftest", method, **headers)
    assert said.status == status
    assert said.headers["cache-control"] == "no-store"
    assert said.headers["x-content-type-options"] == "nosniff"
    assert "style-src 'self'" in said.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_health_needs_no_link(pages, path):
    assert pages.ask(path, cookie=None).status == 200
    assert pages.ask(path, cookie=None, Host="anything.example").status == 200


def test_a_link_brings_a_cookie(pages):
    said = pages.ask(f"/login?token={pages.login.link_token(NOW_S)}", cookie=None)
    assert (said.status, said.headers["location"]) == (303, "/")
    cookie = said.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={COOKIE_S}"} <= set(cookie.split("; "))
    assert pages.ask("/", cookie=cookie.partition(";")[0].partition("=")[2]).status == 200


@pytest.mark.parametrize("late", [0, LINK_S - 1, LINK_S])
def test_a_link_has_an_end(pages, late):
    said = pages.ask(f"/login?token={pages.login.link_token(NOW_S - late)}", cookie=None)
    assert said.status == (303 if late < LINK_S else 401)


def test_no_other_token_opens(pages):
    for token in ("", "x", pages.login.cookie(NOW_S), pages.login.link_token(NOW_S)[:-1], "1.2.3", "\u0661.x"):
        said = pages.ask(f"/login?token={token.encode('ascii', 'xmlcharrefreplace').decode()}", cookie=None)
        assert said.status == 401
        assert "set-cookie" not in said.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8025", 200),
        ("[::1]:8025", 200),
        ("localhost:8025", 200),
        ("mx.example.com", 200),
        ("MX.example.com:8025", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8025", 421),
        ("127.0.0.1.evil.example", 421),
        ("user@localhost", 421),
        ("[", 421),
        ("]", 421),
        ("[x]", 421),
    ],
)
def test_a_name_that_is_not_ours_is_refused(pages, host, status):
    assert pages.ask("/proof", Host=host).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Origin": "http://127.0.0.1:{port}"}, 403),
    ],
)
def test_a_self_test_is_asked_for_by_our_own_pages_alone(pages, headers, status):
    sent = {name: value.format(port=pages.port) for name, value in headers.items()}
    for path in ("/selftest", "/api/selftest"):
        assert pages.ask(path, "POST", **sent).status == status
    assert len(pages.asked) == (2 if status == 200 else 0)


def test_what_a_stranger_said_is_text(pages):
    pages.ask("/selftest", "POST", Sec_Fetch_Site="same-origin")
    for path in ("/explain?reference=x", "/explain?reference=%3Cscript%3Ealert(1)", "/proof", "/selftest", "/"):
        said = pages.ask(path)
        assert "<script" not in said.text.lower(), path
    assert "&lt;script&gt;alert(1)" in pages.ask("/explain?reference=x").text


@pytest.mark.parametrize("path", ["/", "/explain", "/proof", "/selftest"])
def test_nothing_is_loaded_from_elsewhere_kept_or_framed(pages, path):
    said = pages.ask(path)
    policy = said.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert said.headers["cache-control"] == "no-store"
    # With "no-referrer" a browser says "Origin: null" where our own form is sent.
    assert said.headers["referrer-policy"] == "same-origin"
    assert not re.search(r"(?:src|href)=\"(?!/)", said.text)
    assert pages.ask("/style.css", cookie=None).headers["content-type"].startswith("text/css")


def test_explain_asks_what_was_typed_and_shows_it_again(pages):
    said = pages.ask("/explain?client=192.0.2.1&reverse_path=%3C%3E&forward_path=b@x.example&account=")
    assert pages.asked == [{"client": "192.0.2.1", "reverse_path": "<>", "forward_path": "b@x.example"}]
    assert 'value="192.0.2.1"' in said.text
    assert 'value="&lt;&gt;"' in said.text
    assert "REFUSED with 550" in said.text
    said = pages.ask("/explain?client=x")
    assert "this is not an IP address" in said.text
    assert json.loads(pages.ask("/api/explain?client=x").text) == {
        "problems": ['--client "x": this is not an IP address']
    }
    assert json.loads(pages.ask("/api/explain?reference=x").text) == pages.explained
    pages.explained = {"reference": "K7Q2M9XD-1", "found": False, "reasons": ["it may be another gate's"]}
    assert "Not found: K7Q2M9XD-1" in pages.ask("/explain?reference=x").text
    assert pages.ask(f"/explain?reference={'x' * 9000}").status == 414


def test_a_link_to_an_answer_can_be_sent_to_a_colleague(pages):
    """Where a page of another site leads here no cookie comes along, and our own page leads on."""
    said = pages.ask("/explain?reference=K7Q2M9XD-1&x=%22%3E%3Cb%3E", cookie=None)
    assert said.status == 401
    assert '<a href="/explain?reference=K7Q2M9XD-1&amp;x=%22%3E%3Cb%3E">show the page</a>' in said.text
    assert "show the page" not in pages.ask("//evil.example/", cookie=None).text


def test_what_is_not_there(pages):
    said = pages.ask("/nothing")
    assert said.status == 404
    assert "<h1>Not Found</h1>" in said.text
    assert pages.ask("/nothing", cookie=None).status == 401
    said = pages.ask("/api/nothing")
    assert (said.status, json.loads(said.text)) == (404, {"problems": ["there is nothing here"]})
    said = pages.ask("/proof", "POST", Sec_Fetch_Site="same-origin")
    assert (said.status, set(said.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


def test_the_proof_or_the_dialogue(pages):
    assert "PROVEN: nobody else may send elsewhere" in pages.ask("/proof").text
    pages.proof = told(EVERYBODY_TRUSTED)
    said = pages.ask("/proof").text
    assert "OPEN RELAY" in said
    assert "gatepost.toml does not load" in said
    (transcript,) = re.findall(r"<pre>(.*?)</pre>", said, re.DOTALL)
    assert re.match(r"C: EHLO .*\nS: 250.*\nC: MAIL FROM:.*\nS: 250.*\nC: RCPT TO:&lt;.*&gt;\nS: 250.*\n$", transcript)
    assert "OPEN RELAY" in pages.ask("/").text
    assert json.loads(pages.ask("/api/proof").text) == pages.proof


def test_the_proof_says_all_that_check_says(pages):
    pages.proof = told(
        NOTHING_TRUSTED
        + b"""
[[listen]]
name = "submission"
role = "submission"
address = "127.0.0.1:587"
[[send_as]]
accounts = ["alice"]
reverse_paths = ["sales@example.com"]
why = "shared mailbox"
[[deny]]
helo = "evil.test"
shadow = true
"""
    )
    pages.proof["dialects"] = [{"name": "mailbox", "heading": "mailbox, asked today", "sentences": ["reads a%b as b"]}]
    said = re.sub(r"<[^>]+>", "", pages.ask("/proof").text)
    for words in (
        "gatepost.toml is valid: mx.example.com",
        "submission: 127.0.0.1:587, AUTH required",
        "the accounts alice may send as sales@example.com: shared mailbox",
        "refuses clients that call themselves evil.test",
        "mailbox: embedded:",
        "takes everything",
        "mailbox, asked today: reads a%b as b",
        *pages.proof["warnings"],
    ):
        assert html.escape(words, quote=False).replace("'", "&#39;").replace('"', "&#34;") in said
        assert words in sentences.text(pages.proof) or "asked today" in words or "is valid" in words


def test_what_a_backend_reads_otherwise_is_no_proof(pages):
    form = {
        "backend": "mailbox",
        "form": "percent",
        "closed": False,
        "asked": "<a%b@example.com>",
        "said": "250 OK",
        "passing": ["10.0.0.0/8"],
        "exchanges": [{"command": "RCPT TO:<a%b@example.com>", "reply": "250 OK"}],
    }
    pages.proof["proof"] |= {"proven": False, "backends": [form]}
    for path in ("/", "/proof"):
        assert "NOT PROVEN: strangers may send what a backend reads as another address" in pages.ask(path).text
    said = pages.ask("/proof").text
    assert "The form percent: OPEN AT THE GATE, open at the backend mailbox" in said
    assert "C: RCPT TO:&lt;a%b@example.com&gt;\nS: 250 OK\n" in said
    assert "Who may send it: 10.0.0.0/8" in said


def test_a_self_test_is_told(pages):
    assert json.loads(pages.ask("/api/selftest").text) == {"state": "unknown", "last": None, "last_at": None}
    assert "none has told anything yet" in pages.ask("/").text
    said = pages.ask("/selftest", "POST", Sec_Fetch_Site="same-origin")
    assert "ALARM: the gate does not do what its rules say" in said.text
    assert pages.asked == [[{"name": "mx", "address": "127.0.0.1:25"}]]
    kept = json.loads(pages.ask("/api/selftest").text)
    assert (kept["last"]["outcome"], kept["last_at"]) == ("disagrees", "2027-01-15T08:00:00Z")
    for path in ("/", "/selftest"):
        said = pages.ask(path)
        assert "ALARM" in said.text
        assert "2027-01-15 08:00:00 UTC" in said.text


def test_a_question_that_hangs_stops_nothing_else(monkeypatch):
    monkeypatch.setattr(pages_module, "EXPLANATIONS_MAX", 1)
    monkeypatch.setattr(pages_module, "ANSWER_S", 0.2)
    pages = Pages()
    try:
        pages.held.clear()
        said = pages.ask("/api/explain?reference=x")
        assert (said.status, json.loads(said.text)) == (422, {"problems": ["an explanation takes longer than 0.2 s"]})
        said = pages.ask("/api/explain?reference=y")
        assert said.status == 503
        assert "is being asked for by others just now" in said.text
        assert pages.ask("/metrics").status == 200
        pages.held.set()
        while pages.ask("/api/explain?reference=z").status != 200:  # as soon as the one that hung is over
            pass
        assert {"reference": "y"} not in pages.asked, "nobody waits for it any more"
    finally:
        pages.close()


def test_others_are_answered_while_one_waits(pages):
    pages.held.clear()
    with ThreadPoolExecutor(2) as browsers:
        first = browsers.submit(pages.ask, "/api/explain?reference=x")
        assert pages.began.wait(60)
        assert pages.ask("/proof").status == pages.ask("/metrics").status == pages.ask("/selftest").status == 200
        second = browsers.submit(pages.ask, "/api/explain?reference=y")
        pages.held.set()
        assert first.result(60).status == second.result(60).status == 200


def test_one_self_test_at_a_time(pages):
    pages.held.clear()
    with ThreadPoolExecutor(1) as browser:
        first = browser.submit(pages.ask, "/api/selftest", "POST", Sec_Fetch_Site="same-origin")
        assert pages.began.wait(60)
        assert pages.ask("/api/selftest", "POST", Sec_Fetch_Site="same-origin").status == 503
        said = pages.ask("/selftest", "POST", Sec_Fetch_Site="same-origin")
        assert "a self-test runs just now" in said.text
        pages.held.set()
        assert first.result(60).status == 200
    assert len(pages.asked) == 1


def test_who_waits_is_told_when_the_console_ends(pages):
    pages.held.clear()
    with ThreadPoolExecutor(1) as browser:
        waiting = browser.submit(pages.ask, "/api/explain?reference=x")
        assert pages.began.wait(60)
        pages.end()
        said = waiting.result(60)
    assert (said.status, json.loads(said.text)) == (
        503,
        {"problems": ["the gate has another configuration or ends; ask again in a moment"]},
    )


# --- The key ----------------------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_used_closes_the_pages_alone(pages):
    pages.key_problem = "cannot use the console's key console.key: it has not 32 octets; remove it"
    for path in ("/", "/login?token=x"):
        said = pages.ask(path)
        assert said.status == 503
        assert "it has not 32 octets; remove it" in said.text
    assert pages.ask("/metrics").status == pages.ask("/healthz").status == pages.ask("/readyz").status == 200
    pages.key_problem = ""
    assert pages.ask("/").status == 200


def test_another_key_ends_all_cookies_at_once(pages):
    cookie = pages.login.cookie(NOW_S)
    assert pages.ask("/", cookie=cookie).status == 200
    pages.login = Login(b"x" * 32)
    assert pages.ask("/", cookie=cookie).status == 401


def test_the_key_is_made_once_for_its_owner_alone(tmp_path):
    first = Login.in_data(str(tmp_path))
    assert Login.in_data(str(tmp_path)).knows(first.cookie(NOW_S), NOW_S)
    path = tmp_path / "keys" / "console.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(StorageError, match=r"cannot use the console's key .*: it has not 32 octets; remove it"):
        Login.in_data(str(tmp_path))
    path.unlink()
    os.mkfifo(path)  # whose reader would wait for ever
    with pytest.raises(StorageError, match="it has not 32 octets"):
        Login.in_data(str(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot use the console's key"):
        Login.in_data(str(tmp_path))
