"""``gatepost check --backend`` and ``gatepost init`` before lenient, scripted and missing backends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import smtplib
import socket
import threading
from pathlib import Path

import pytest
from tests.backend.scripted import Scripted
from tests.gatehouse import Gate
from tests.vectors.lenient import LenientBackend

from gatepost import cli, config
from gatepost.config import settings
from gatepost.policy.relay import Reread

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
[[listen]]
name = "mx"
address = "127.0.0.1:2525"
[domains]
local = ["example.com"]
[backend.mail]
address = "{}"
[[trust]]
network = "10.1.0.0/16"
why = "office LAN"
owner = "it@example.com"
"""
FORMS = 21


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    return tmp_path


def configure(*ports, more=""):
    """[backend.mail], and [backend.b2] and so on."""
    first, *others = (f"127.0.0.1:{port}" for port in ports)
    text = CONFIG.format(first)
    for number, address in enumerate(others, 2):
        text += f'[backend.b{number}]\naddress = "{address}"\n'
        text += f'[[route]]\nforward_paths = ["*@{number}.example.com"]\nbackend = "b{number}"\n'
    if others:
        text += '[[route]]\nforward_paths = ["*"]\nbackend = "mail"\n'
        named = ", ".join(f'"{number}.example.com"' for number in range(2, len(ports) + 1))
        text = text.replace('local = ["example.com"]', f'local = ["example.com", {named}]')
    Path("gatepost.toml").write_text(text + more)


def typed(capsys, *arguments):
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@contextlib.contextmanager
def scripted(rcpt):
    """A server in a thread of its own; ``rcpt`` answers RCPT, told its argument."""
    started = threading.Event()
    ports = []
    ends: list[asyncio.Event] = []

    async def serve():
        ends.append(ended := asyncio.Event())
        async with Scripted() as server:
            server.on["RCPT"] = lambda _session, argument: rcpt(argument)
            ports.append(server.port)
            started.set()
            await ended.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(20)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(ends[0].set)
        thread.join()
        loop.close()


def strict(argument):
    return b"250 2.1.5 Ok" if b"<postmaster@example.com>" in argument else b"550 5.1.1 No such user"


def percent_hack(argument):
    return b"250 2.1.5 Ok" if b"%" in argument and argument.endswith(b"@example.com>") else strict(argument)


def verp(argument):
    return b"250 2.1.5 Ok" if b"=" in argument else strict(argument)


# --- check --backend --------------------------------------------------------------------------------------------------


def test_a_strict_backend_is_told_as_a_table_with_sentences_and_kept(here, capsys):
    with scripted(strict) as port:
        configure(port)
        code, out, err = typed(capsys, "check", "--backend")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"backend mail at 127.0.0.1:{port}, asked on 20")
    assert lines[1] == "it greets with 220 scripted ESMTP"
    table = [line.split("  ") for line in lines if line.startswith("  ")]
    assert len(table) == FORMS
    assert next(line for line in lines if line.startswith("  percent ")).split()[1] == "refused"
    assert "- It refuses unknown users at RCPT. So does the gate, in its words, and nobody is owed a bounce." in lines
    kept = here / "data" / "dialect" / "mail.json"
    assert f"Kept as {kept}." in lines
    assert json.loads(kept.read_text())["greeting"] == "220 scripted ESMTP"
    assert typed(capsys, "check")[1].count("What backends answered") == 0


def test_an_accept_all_backend_is_bad_news_and_later_checks_say_so(here, capsys):
    with LenientBackend("strict") as backend:
        configure(backend.port)
        code, out, _ = typed(capsys, "check", "--backend", "mail")
    assert code == 1
    assert "- It is accept-all: it takes users that nobody is" in out
    code, out, _ = typed(capsys, "check")
    assert code == 0
    assert "\nWhat backends answered\n  mail, asked on 20" in out
    assert "accept-all" in out
    facts = json.loads(typed(capsys, "check", "--json")[1])
    assert [one["name"] for one in facts["dialects"]] == ["mail"]
    assert any("accept-all" in sentence for sentence in facts["dialects"][0]["sentences"])


def test_a_form_that_would_be_relayed_is_named_with_the_grant_that_lets_it_pass(here, capsys):
    with scripted(percent_hack) as port:
        configure(port)
        code, out, _ = typed(capsys, "check", "--backend")
    assert code == 0
    sentence = (
        'It reads percent (<user%elsewhere@ours>) and quoted percent (<"user%elsewhere"@ours>) as another address:'
        " that would be relayed if it came through. The gate refuses it to strangers by construction. Who may send"
        " anywhere may send it, too: network 10.1.0.0/16 (gatepost.toml:11)."
    )  # fmt: skip
    assert f"- {sentence}" in out.splitlines()
    assert sentence in typed(capsys, "check")[1]


def test_what_strangers_may_send_and_is_read_in_another_way_is_bad_news(here, capsys):
    with scripted(verp) as port:
        configure(port)
        code, out, _ = typed(capsys, "check", "--backend")
    assert code == 1
    assert "- It takes equals (<user=elsewhere@ours>) for users that nobody is" in out
    assert ".json. A running gate heeds it after: gatepost reload\n" in out


def test_what_a_backend_reads_as_another_address_is_closed_at_the_gate_and_shown_by_the_proof(here, capsys):
    with scripted(verp) as port:
        configure(port)
        typed(capsys, "check", "--backend")
        assert "gatepost reload" not in typed(capsys, "check", "--backend")[1], "the rules know it already"
    code, out, _ = typed(capsys, "check")
    assert code == 0
    shown = out[out.index("The form equals") :]
    assert shown.startswith("The form equals: closed at the gate, open at the backend mail:\n")
    assert "  C: RCPT TO:<user=elsewhere.invalid@example.com>\n  S: 550 5.7.1 Relaying is prohibited" in shown
    assert "  the backend to the gate: 250 2.1.5 Ok\n" in shown
    assert "  who may send it: network 10.1.0.0/16 (gatepost.toml:11)\n" in shown
    assert "\nPROVEN: nobody else may send elsewhere;" in shown
    assert 'gatepost.toml:9: [backend.mail]: it was found to read local-parts with "=" as another address' in out
    proof = json.loads(typed(capsys, "check", "--json")[1])["proof"]
    assert proof["proven"]
    assert [(one["form"], one["closed"]) for one in proof["backends"]] == [("equals", True)]
    said = ("--client", "198.51.100.7", "--reverse-path", "a@x.test", "--forward-path", "v=e.test@example.com")
    code, out, _ = typed(capsys, "explain", *said)
    assert code == 1
    assert "a backend may read the local-part as another address (reread)" in out


def test_a_gate_that_let_it_through_would_not_be_proven(here, capsys, monkeypatch):
    with scripted(verp) as port:
        configure(port)
        typed(capsys, "check", "--backend")
    monkeypatch.setattr(settings, "_reread", lambda *_: ())
    code, out, _ = typed(capsys, "check")
    assert code == 1
    assert "The form equals: OPEN AT THE GATE, open at the backend mail:\n" in out
    assert "  S: 250 2.1.5 Recipient OK\n" in out
    assert out.endswith("NOT PROVEN: strangers may send what a backend reads as another address\n")
    assert "PROVEN: nobody" not in out


def test_answers_that_cannot_be_read_are_taken_for_the_worst(here, capsys):
    with scripted(strict) as port:
        configure(port)
        typed(capsys, "check", "--backend")
    assert config.load_file("gatepost.toml").gate.rules.reread == ()
    (here / "data" / "dialect" / "mail.json").write_text("{")
    loaded = config.load_file("gatepost.toml")
    assert loaded.gate.rules.reread == (Reread("mail", "=+/"),)
    assert any("strangers' local-parts with one of = + / are refused" in warning for warning in loaded.warnings)
    assert typed(capsys, "check")[0] == 0


def test_a_backend_that_mended_its_ways_is_served_again(here, capsys):
    with scripted(verp) as port:
        configure(port)
        typed(capsys, "check", "--backend")
    assert config.load_file("gatepost.toml").gate.rules.reread == (Reread("mail", "="),)
    with scripted(strict) as port:
        configure(port)
        assert "gatepost reload" in typed(capsys, "check", "--backend")[1]
    assert config.load_file("gatepost.toml").gate.rules.reread == ()


def test_a_running_gate_closes_what_its_backend_was_found_to_read(tmp_path, capsys):
    with scripted(verp) as port:
        text = CONFIG.format(f"127.0.0.1:{port}").replace("127.0.0.1:2525", "127.0.0.1:0")
        with Gate(tmp_path, text + '[console]\naddress = "127.0.0.1:0"\n') as gate:

            def reply_to(recipient):
                with smtplib.SMTP("127.0.0.1", gate.port, timeout=30) as client:
                    client.ehlo("stranger.test")
                    client.mail("a@stranger.test")
                    code, said = client.rcpt(recipient)
                    return code, said.decode()

            assert reply_to("victim=elsewhere.test@example.com")[0] == 250, "as long as nobody has asked"
            assert typed(capsys, "check", "--backend", "--config", str(gate.config))[0] == 1
            gate.reload()
            gate.wait_for_line(lambda line: "is in force" in line, 30)
            code, said = reply_to("victim=elsewhere.test@example.com")
            assert code == 550
            assert said.startswith("5.7.1 Relaying is prohibited: the address holds routing characters")
            assert reply_to("postmaster@example.com")[0] == 250


def test_json_has_the_profile_and_what_it_means(here, capsys):
    with LenientBackend("strict") as backend:
        configure(backend.port)
        code, out, err = typed(capsys, "check", "--backend", "--json")
    assert (code, err) == (1, "")
    (one,) = json.loads(out)["backends"]
    assert (one["name"], one["problem"]) == ("mail", "")
    assert one["kept"] == str(here / "data" / "dialect" / "mail.json")
    assert one["profile"] == json.loads(Path(one["kept"]).read_text())
    assert one["profile"]["accept_all"] == "taken"
    assert {heard["answer"] for heard in one["profile"]["heard"]} == {"taken"}
    assert next((found["kind"], found["warning"]) for found in one["findings"]) == ("accept-all", True)


def test_all_backends_are_asked_or_those_that_are_named(here, capsys):
    with scripted(strict) as port, LenientBackend("strict") as lenient:
        configure(port, lenient.port)
        assert [one["name"] for one in asked(capsys)] == ["mail", "b2"]
        assert [one["name"] for one in asked(capsys, "b2")] == ["b2"]
        assert [one["profile"]["local_domain"] for one in asked(capsys, "b2", "mail", "b2")] == [
            "2.example.com", "example.com",
        ]  # fmt: skip


def asked(capsys, *names):
    return json.loads(typed(capsys, "check", "--json", "--backend", *names)[1])["backends"]


def test_a_backend_that_cannot_be_reached_is_exit_code_2_and_the_others_are_asked(here, capsys):
    with socket.socket() as unused, scripted(strict) as port:
        unused.bind(("127.0.0.1", 0))
        configure(unused.getsockname()[1], port)
        code, out, _ = typed(capsys, "check", "--backend")
        assert code == 2
        assert "backend mail could not be asked: 127.0.0.1:" in out
        assert "backend b2 at 127.0.0.1:" in out
        assert not (here / "data" / "dialect" / "mail.json").exists()
        (first, second) = asked(capsys)
        assert (first["profile"], first["findings"]) == (None, [])
        assert "Connect" in first["problem"]
        assert second["problem"] == ""


def test_embedded_mailboxes_need_no_asking(here, capsys):
    code, out, _ = typed(capsys, "check", "--backend")  # the embedded default
    assert (code, out) == (
        0,
        "backend mailbox: The gate's own mailboxes give no local-part a second meaning: there is nothing to ask.\n",
    )


def test_a_backend_without_local_domain_cannot_be_asked(here, capsys):
    configure(1)
    Path("gatepost.toml").write_text(Path("gatepost.toml").read_text().replace('"example.com"]', '"*.example.com"]'))
    code, out, _ = typed(capsys, "check", "--backend")
    assert code == 2
    assert "no local domain that is known by name goes to it" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "male"], '--backend "male": there is no such backend; there is mail'),
        (["--elsewhere", "x.example"], "--elsewhere and --end-of-data go with --backend"),
        (["--end-of-data", "you@example.com"], "--elsewhere and --end-of-data go with --backend"),
        (["--backend", "--elsewhere", "a b"], '--elsewhere "a b":'),
        (["--backend", "--end-of-data", "you"], '--end-of-data "you": write one address of your own'),
        (["--backend", "--end-of-data", "a%b@example.com"], "write one address of your own"),
        (["--backend", "--end-of-data", "a@example.com> x"], "write one address of your own"),
    ],
)
def test_what_is_wrongly_asked_is_said_before_anything_is_sent(here, capsys, arguments, said):
    configure(1)
    code, out, err = typed(capsys, "check", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_end_of_data_is_asked_of_one_backend_alone(here, capsys):
    configure(1, 2)
    code, _, err = typed(capsys, "check", "--backend", "--end-of-data", "you@example.com")
    assert (code, err) == (2, "gatepost: --end-of-data: name one backend, as in --backend mail\n")


def test_the_ends_that_a_backend_takes_are_told_only_when_asked_for(here, capsys):
    with LenientBackend("lf-dot-lf") as backend:
        configure(backend.port)
        out = typed(capsys, "check", "--backend")[1]
        assert "as the end of a message" not in out
        assert backend.transactions() == []
        out = typed(capsys, "check", "--backend", "mail", "--end-of-data", "you@example.com")[1]
        assert {r.argument for m in backend.transactions() for r in m.recipients} == {b"<you@example.com>"}
    assert "  LF . LF                 taken    as the end of a message" in out
    assert "- It takes LF . LF and CRLF . LF for the end of a message, too: whoever reaches it" in out
    kept = json.loads((here / "data" / "dialect" / "mail.json").read_text())
    assert [end["id"] for end in kept["ends"] if end["answer"] == "taken"] == ["LF . LF", "CRLF . LF"]


def test_words_of_a_backend_cannot_move_the_terminal(here, capsys):
    with scripted(lambda _: b"550 5.1.1 \x1b[31m\xe2\x80\xaeNo") as port:
        configure(port)
        out = typed(capsys, "check", "--backend")[1]
    assert all(character.isprintable() for line in out.splitlines() for character in line)


def test_answers_that_cannot_be_kept_are_told_all_the_same(here, capsys):
    (here / "data").write_text("")
    with scripted(strict) as port:
        configure(port)
        code, out, _ = typed(capsys, "check", "--backend")
        assert code == 0
        assert "The answers are not kept: gatepost.toml: [gate] data" in out
        assert asked(capsys)[0]["kept"] == ""


def test_a_profile_that_is_none_is_told_by_check(here, capsys):
    configure(1)
    (here / "data" / "dialect").mkdir(parents=True)
    (here / "data" / "dialect" / "mail.json").write_text("{}")
    code, out, _ = typed(capsys, "check")
    assert code == 0
    assert "mail.json is no profile of a backend; `gatepost check --backend` writes a new one" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_root_keeps_belongs_to_the_user_of_the_gate(here, capsys):
    here.chmod(0o755)
    for above in here.parents:
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    with scripted(strict) as port:
        configure(port)
        text = Path("gatepost.toml").read_text().replace('data = "data"', 'data = "data"\nuser = "nobody"')
        Path("gatepost.toml").write_text(text)
        (one,) = asked(capsys)
    assert Path(one["kept"]).stat().st_uid == pwd.getpwnam("nobody").pw_uid


# --- init -------------------------------------------------------------------------------------------------------------

WANTED = ("init", "--name", "mx.example.com", "--listen", "127.0.0.1:2525", "--local-domain", "example.com")


def test_init_warns_of_an_accept_all_backend_in_the_file_that_it_writes(here, capsys):
    with LenientBackend("strict") as backend:
        code, out, _ = typed(capsys, *WANTED, "--backend", f"127.0.0.1:{backend.port}")
        assert backend.transactions() == []
    assert code == 0
    assert "- It is accept-all" in out
    text = Path("gatepost.toml").read_text()
    assert "# WARNING: It is accept-all: it takes users that nobody is" in text
    assert max(len(line) for line in text.splitlines() if "When this was written" not in line) <= 128
    assert config.load_file("gatepost.toml").gate.backends[0].name == "mail"
    assert (here / "gatepost-data" / "dialect" / "mail.json").exists()


def test_init_has_no_warning_for_a_strict_backend(here, capsys):
    with scripted(strict) as port:
        code, out, _ = typed(capsys, *WANTED, "--backend", f"127.0.0.1:{port}")
    assert code == 0
    assert "- It refuses unknown users at RCPT." in out
    assert "WARNING" not in Path("gatepost.toml").read_text()


def test_init_does_not_wait_for_a_backend_that_answers_nothing_to_rcpt(here, capsys, monkeypatch):
    monkeypatch.setattr("gatepost.cli.dialect.INIT_ASK_S", 0.3)
    with scripted(lambda _: None) as port:
        code, out, _ = typed(capsys, *WANTED, "--backend", f"127.0.0.1:{port}")
    assert code == 0
    assert "Whether it refuses unknown users it did not tell: no answer in time." in out
