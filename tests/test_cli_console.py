"""``gatepost console`` and the pages of a live gate: the same answers as on the command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import smtplib
import time
from typing import Any
from urllib.parse import urlsplit

from tests.gatehouse import Gate, free_port

from gatepost import cli

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[console]
address = "127.0.0.1:{port}"
"""


class Browser:
    """Keeps the cookie that a link brought."""

    def __init__(self, link: str) -> None:
        self.at = urlsplit(link).netloc
        self._cookie = ""
        status, headers, _ = self._ask("GET", link.partition(self.at)[2])
        assert status == 303
        self._cookie = headers["set-cookie"].partition(";")[0]

    def _ask(self, method: str, path: str) -> tuple[int, dict[str, str], str]:
        """As a person does: again, where a console that is being replaced asks for that, or hung up."""
        for _ in range(300):
            with contextlib.suppress(ConnectionError):
                status, headers, text = self._once(method, path)
                if status != 503 or "ask again in a moment" not in text:
                    return status, headers, text
            time.sleep(0.1)
        raise AssertionError(f"{path}: no console answers")

    def _once(self, method: str, path: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection(self.at, timeout=120)
        connection.request(method, path, headers={"Cookie": self._cookie, "Origin": f"http://{self.at}"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, text

    def text(self, path: str) -> str:
        status, _, text = self._ask("GET", path)
        assert status == 200
        return text

    def json(self, path: str, method: str = "GET") -> Any:
        status, _, text = self._ask(method, path)
        assert status == 200, text
        return json.loads(text)


def test_the_console_answers_what_the_commands_answer(tmp_path, capsys):
    port = free_port()
    with Gate(tmp_path, CONFIG.format(port=port)) as gate:
        at = ["--config", str(tmp_path / "gatepost.toml")]
        assert cli.main(["console", *at]) == 0
        browser = Browser(capsys.readouterr().out.strip())

        with smtplib.SMTP("127.0.0.1", gate.port, timeout=30) as client:
            client.ehlo("client.test")
            client.mail("a@stranger.test")
            _, reply = client.rcpt("victim@elsewhere.test")
        (reference,) = re.findall(r"\[(.*)\]$", reply.decode())
        gate.wait_for_session(lambda line: line["end"] == "quit")

        assert cli.main(["explain", reference, "--json", *at]) == 1
        told = json.loads(capsys.readouterr().out)
        shown = browser.json(f"/api/explain?reference={reference}")
        assert shown == told
        page = browser.text(f"/explain?reference={reference}")
        assert f"REFUSED with {told['reply']}" in page
        assert "no rule lets it pass, and what no rule lets pass is refused" in page

        message = {"client": "192.0.2.1", "reverse_path": "a@x.test", "forward_path": "b@elsewhere.test"}
        options = [word for name, value in message.items() for word in (f"--{name.replace('_', '-')}", value)]
        assert cli.main(["explain", *options, "--json", *at]) == 1
        described = json.loads(capsys.readouterr().out)
        assert browser.json("/api/explain?" + "&".join(f"{k}={v}" for k, v in message.items())) == described

        assert cli.main(["check", "--json", *at]) == 0
        proof = json.loads(capsys.readouterr().out)
        assert browser.json("/api/proof")["proof"] == proof["proof"]
        assert "PROVEN: nobody else may send elsewhere" in browser.text("/proof")

        tested = browser.json("/api/selftest", "POST")
        assert tested["outcome"] == "closed"
        assert [one["listen"] for one in tested["listeners"]] == ["mx"]
        assert "CLOSED, as the rules say" in browser.text("/selftest")
        assert "Ready" in browser.text("/")


def test_after_a_reload_it_answers_for_the_new_configuration(tmp_path, capsys):
    config = CONFIG.format(port=free_port())
    with Gate(tmp_path, config) as gate:
        assert cli.main(["console", "--json", "--config", str(tmp_path / "gatepost.toml")]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["good_for_s"] == 600
        browser = Browser(told["link"])
        assert "[[deny]]" not in browser.text("/proof")
        gate.reload(config + '\n[[deny]]\nhelo = "evil.test"\n')
        gate.wait_for_line(lambda line: '"generation":2' in line)
        told = browser.json("/api/proof")
        while not told["deny"]:
            told = browser.json("/api/proof")
        assert len(told["deny"]) == 1, "and the browser is still known"


def test_where_no_gate_runs(tmp_path, capsys):
    (tmp_path / "gatepost.toml").write_text(CONFIG.format(port=free_port()))
    assert cli.main(["console", "--config", str(tmp_path / "gatepost.toml")]) == 2
    assert "no gate's console answers at 127.0.0.1" in capsys.readouterr().err
