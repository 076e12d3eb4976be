"""The commands as they are typed: what they print, and their exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import smtplib
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.gatehouse import Gate, free_port

from gatepost import __version__, cli, config
from gatepost.resolver import Answer, Certainty, Resolver

CONFIG = """\
[gate]
name = "mx.example.com"

[[listen]]
name = "mx"
address = "127.0.0.1:2525"

[[listen]]
name = "inside"
address = "127.0.0.1:2526"
role = "inside"

[domains]
local = ["example.com"]

[backend.mail]
address = "10.0.0.5:25"

[[trust]]
network = "10.1.0.0/16"
reverse_paths = ["*@example.com"]
why = "office LAN"
owner = "it@example.com"

[[deny]]
reverse_path = "*@spam.test"
reply = "550 5.7.1 Not from there"
why = "complaint of 12 May"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory with a configuration, where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml",))
    Path("gatepost.toml").write_text(CONFIG)
    return tmp_path


def gatepost(*arguments, stdin="", **environment):
    """The real command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gatepost", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


def typed(capsys, *arguments):
    """What the command says to standard output and error, and its exit code, without a process of its own."""
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


# --- What all have in common ------------------------------------------------------------------------------------------


def test_the_version_loads_nothing():
    started = gatepost("--version")
    assert (started.returncode, started.stdout) == (0, f"{__version__}\n")
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gatepost", "--version"], capture_output=True, text=True, check=True
    )
    modules = {line.rpartition("|")[2].strip() for line in loaded.stderr.splitlines()}
    assert not modules & {"cyclopts", "pydantic", "rich", "asyncio", "gatepost.config"}


def test_the_help_names_every_command(capsys):
    code, out, _ = typed(capsys, "--help")
    assert code == 0
    for name, _ in cli.COMMANDS:
        assert re.search(rf"^│ {name} ", out, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, _ in cli.COMMANDS])
def test_every_command_documents_itself_and_its_exit_code(capsys, name):
    code, out, _ = typed(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: gatepost {name}")
    assert "Exit code" in " ".join(out.split()) or name in ("completion", "version")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chekc"], 'Unknown command "chekc". Did you mean "check"?'),
        (["check", "--verbose"], 'Unknown option: "--verbose".'),
        (["check", "surplus"], "surplus"),
        (["check", "--config"], "--config"),
        (["explain", "--client", "192.0.2.1"], "--reverse-path"),
        (["completion", "tcsh"], "tcsh"),
        (["completion"], "SHELL"),
    ],
)
def test_bad_usage_is_exit_code_2_with_a_sentence(here, arguments, said):
    outcome = gatepost(*arguments)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert said.replace('"', "") in outcome.stderr.replace('"', "")
    assert all(line.startswith("gatepost: ") for line in outcome.stderr.splitlines())


@pytest.mark.parametrize("name", ["run", "check", "status", "reload"])
def test_a_bad_configuration_is_exit_code_2_with_all_its_problems(here, name):
    Path("gatepost.toml").write_text(CONFIG.replace("10.1.0.0/16", "10.1.2.3/16") + "[limits]\nsesions = 5\n")
    outcome = gatepost(name)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    first, second = outcome.stderr.removesuffix("\n").split("\n")
    assert "gatepost.toml:20: [[trust]] network" in first
    assert 'gatepost.toml:30: [limits] sesions: unknown key; did you mean "sessions"?' in second


def test_problems_are_json_where_that_is_asked_for(here, capsys):
    Path("gatepost.toml").write_text(CONFIG + "[limits]\nsesions = 5\n")
    code, out, err = typed(capsys, "check", "--json")
    problem = 'gatepost.toml:30: [limits] sesions: unknown key; did you mean "sessions"?'
    assert (code, json.loads(out)) == (2, {"valid": False, "problems": [problem]})
    assert err == f"gatepost: {problem}\n"


def test_a_configuration_that_is_not_there_is_said(here, capsys):
    code, out, err = typed(capsys, "check", "--config", "elsewhere.toml")
    assert (code, out) == (2, "")
    assert err == (
        "gatepost: elsewhere.toml: the configuration cannot be read: No such file or directory; "
        "gatepost init writes one\n"
    )


@pytest.mark.parametrize("before", [["--config", "other.toml"], ["--config=other.toml"]])
def test_the_configuration_may_be_named_before_the_command(here, capsys, before):
    Path("gatepost.toml").rename("other.toml")
    assert typed(capsys, *before, "check")[0] == 0


def test_whoever_reads_half_ends_the_command_quietly(here):
    process = subprocess.Popen(
        [sys.executable, "-m", "gatepost", "check", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 2
    assert said == b""


def test_arguments_of_any_octets_are_shown(here):
    outcome = subprocess.run(
        [
            *(sys.executable, "-m", "gatepost", "explain", "--client", b"\xff\x1b[31m"),
            *("--reverse-path", "", "--forward-path", "x"),
        ],
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert outcome.returncode == 2
    assert b"Traceback" not in outcome.stderr
    assert b"this is not an IP address" in outcome.stderr
    assert b"\x1b" not in outcome.stderr


def test_what_is_shown_cannot_steer_a_terminal(here, capsys):
    hostile = '"\x1b[2J\u202e"@example.com'
    code, out, err = explain(capsys, hostile, "--helo", "\x1b[2J")
    assert code == 1
    assert 'to "?[2J?"@example.com\n' in out
    assert "\x1b" not in out + err
    code, out, err = explain(capsys, hostile, "--json")
    assert json.loads(out)["forward_path"] == hostile
    assert out.isascii()


def test_a_key_that_interrupts_is_no_traceback(monkeypatch):
    def interrupted(tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["run"]) == 130


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_says_in_words_what_the_configuration_allows(here):
    outcome = gatepost("check")
    cpus = len(os.sched_getaffinity(0))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert re.sub(r"[0-9,]+ decisions", "N decisions", outcome.stdout) == (
        f"gatepost.toml is valid: mx.example.com, {cpus} workers, data in {here}/gatepost-data\n"
        "\n"
        "Listens\n"
        "  mx: 127.0.0.1:2525, mail for us from anybody, no TLS\n"
        "  inside: 127.0.0.1:2526, our own machines, no TLS\n"
        "\n"
        "Takes mail from anybody for\n"
        "  example.com\n"
        "\n"
        "May send elsewhere\n"
        "  10.1.0.0/16 may send anywhere as *@example.com: office LAN, it@example.com\n"
        "\n"
        "Refuses whatever else is allowed\n"
        "  mail from *@spam.test, with 550 5.7.1 Not from there: complaint of 12 May\n"
        "\n"
        "Hands mail on to\n"
        "  mail: 10.0.0.5:25, STARTTLS where offered; takes everything\n"
        "\n"
        "Metrics and health\n"
        "  http://127.0.0.1:8025/\n"
        "\n"
        "PROVEN: nobody else may send elsewhere; N decisions on every kind of client (2), reverse-path (5) and "
        "forward-path (22) that these rules can tell apart\n"
    ).replace("1 workers", "1 worker")


def test_check_in_json(here, capsys):
    code, out, _ = typed(capsys, "check", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["valid"], facts["problems"], facts["warnings"]) == (True, [], [])
    assert facts["trust"][0]["where"] == "gatepost.toml:19"
    proof = facts["proof"]
    assert (proof["proven"], proof["openings"], proof["dialogue"]) == (True, [], None)
    assert proof["decisions"] >= proof["forward_paths"] > proof["reverse_paths"] > proof["clients"] > 0


HALVES = """
[[trust]]
network = "0.0.0.0/1"
reverse_paths = ["*@example.com"]
owner = "it@example.com"

[[trust]]
network = "128.0.0.0/1"
owner = "it@example.com"
"""


def test_check_shows_how_a_stranger_relays_and_run_refuses_to(here, capsys):
    Path("gatepost.toml").write_text(CONFIG.replace('"127.0.0.1:2525"', '"0.0.0.0:2525"\ntls = "starttls"') + HALVES)
    code, out, err = typed(capsys, "check")
    assert (code, err) == (1, "")
    problems = [line for line in out.splitlines() if "this would be an open relay: " in line]
    assert [problem.split(": ")[0] for problem in problems] == ["  gatepost.toml:32", "  gatepost.toml:37"]
    assert out.startswith("gatepost.toml does not load\n\nProblems\n")
    assert out.endswith(
        "OPEN RELAY: a stranger at 128.0.0.1 sends anywhere through the listener mx (gatepost.toml:4):\n"
        "\n"
        "  C: EHLO stranger.invalid\n"
        "  S: 250 Hello\n"
        "  C: MAIL FROM:<>\n"
        "  S: 250 2.1.0 Sender OK\n"
        "  C: RCPT TO:<user@elsewhere.invalid>\n"
        "  S: 250 2.1.5 Recipient OK\n"
    )
    code, out, err = typed(capsys, "check", "--json")
    facts = json.loads(out)
    assert (code, err, facts["valid"], len(facts["problems"])) == (1, "", False, 2)
    assert [opening["where"] for opening in facts["proof"]["openings"]] == ["gatepost.toml:31", "gatepost.toml:36"]
    assert facts["proof"]["dialogue"]["exchanges"][-1] == {
        "command": "RCPT TO:<user@elsewhere.invalid>",
        "reply": "250 2.1.5 Recipient OK",
    }
    refused = gatepost("run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("this would be an open relay: ") == 2


def test_check_of_an_open_relay_that_means_to_be_one(here, capsys):
    text = CONFIG + HALVES
    Path("gatepost.toml").write_text(text.replace("[gate]\n", '[gate]\nopen_relay = "mx.example.com"\n'))
    code, out, err = typed(capsys, "check")
    assert (code, err) == (0, "")
    assert out.count("OPEN RELAY, as [gate] open_relay wishes: ") == 2
    assert "PROVEN" not in out
    assert out.endswith("  C: RCPT TO:<user@elsewhere.invalid>\n  S: 250 2.1.5 Recipient OK\n")
    code, out, _ = typed(capsys, "check", "--json")
    assert (code, json.loads(out)["valid"], json.loads(out)["proof"]["proven"]) == (0, True, False)
    # Another name is no confirmation: it is open, and that comes first.
    Path("gatepost.toml").write_text(text.replace("[gate]\n", '[gate]\nopen_relay = "mx.example.org"\n'))
    code, out, _ = typed(capsys, "check")
    assert code == 1
    assert "gatepost.toml:2: [gate] open_relay" in out


@pytest.mark.parametrize("broken", ["sesions = 5", 'open_relay = "mx.example.org"'])
def test_check_of_what_does_not_load_for_other_reasons(here, capsys, broken):
    text = CONFIG + HALVES if "sesions" in broken else CONFIG
    Path("gatepost.toml").write_text(text.replace("[gate]\n", f"[gate]\n{broken}\n"))
    code, out, err = typed(capsys, "check")
    assert (code, out) == (2, "")
    assert "gatepost.toml:2: [gate] " in err
    assert err.count("this would be an open relay: ") == (2 if "sesions" in broken else 0), "all is told at once"


def test_check_names_grants_without_owner_in_one_line(here, capsys):
    Path("gatepost.toml").write_text(CONFIG.replace('owner = "it@example.com"\n', ""))
    code, out, _ = typed(capsys, "check", "--json")
    assert code == 0
    (warning,) = json.loads(out)["warnings"]
    asked = 'write owner = "it@example.com", so that somebody can be asked'
    assert warning == f"gatepost.toml:19: [[trust]]: the entry names no owner; {asked}"


def test_check_without_a_configuration_speaks_of_the_embedded_default(here, capsys):
    Path("gatepost.toml").unlink()
    code, out, _ = typed(capsys, "check")
    assert code == 0
    assert out.startswith("The embedded default is valid: ")


# --- explain ----------------------------------------------------------------------------------------------------------


def explain(capsys, forward_path, *more, client="203.0.113.9", reverse_path="a@stranger.example"):
    return typed(
        capsys, "explain", "--client", client, "--reverse-path", reverse_path, "--forward-path", forward_path, *more
    )


def test_explain_a_relay_that_is_refused(here):
    outcome = gatepost(
        "explain", "--client", "203.0.113.9", "--reverse-path", "a@x.example", "--forward-path", "b@y.example"
    )
    assert (outcome.returncode, outcome.stderr) == (1, "")
    assert outcome.stdout == (
        "REFUSED with 550 5.7.1 Relaying is prohibited\n"
        "client  203.0.113.9 at listener mx\n"
        "mail    from a@x.example to b@y.example\n"
        "rule    none lets it pass, and what no rule lets pass is refused\n"
        "admitted if the forward-path were at a local domain, such as example.com (gatepost.toml:14)\n"
        "            the client were in 10.1.0.0/16 and the reverse-path were *@example.com (gatepost.toml:19)\n"
    )


def test_explain_mail_for_us(here, capsys):
    code, out, _ = explain(capsys, "b@example.com")
    assert code == 0
    assert out == (
        "ADMITTED, and handed to the backend mail, whose reply the client sees\n"
        "client  203.0.113.9 at listener mx\n"
        "mail    from a@stranger.example to b@example.com\n"
        "rule    [domains] local example.com (gatepost.toml:14)\n"
        "refused if  the forward-path were not at example.com (gatepost.toml:14)\n"
        "            the local-part held routing characters\n"
    )


def test_explain_a_trusted_client(here, capsys):
    code, out, _ = explain(capsys, "b@y.example", client="::ffff:10.1.2.3", reverse_path="a@example.com")
    assert code == 0
    assert "client  10.1.2.3 at listener mx\n" in out
    assert "rule    [[trust]] network 10.1.0.0/16 (gatepost.toml:19): office LAN, it@example.com\n" in out
    assert "refused if  the client were not in 10.1.0.0/16 (gatepost.toml:19)\n" in out


def test_explain_a_narrowed_grant(here, capsys):
    code, out, _ = explain(capsys, "b@y.example", client="10.1.2.3")
    assert code == 1
    assert "office LAN, it@example.com; it is narrowed by reverse_paths\n" in out
    assert "admitted if the reverse-path were *@example.com (gatepost.toml:19)\n" in out


def test_explain_an_expired_grant(here, capsys):
    Path("gatepost.toml").write_text(CONFIG.replace('why = "office', 'expires = 2026-01-01\nwhy = "office'))
    code, out, _ = explain(capsys, "b@y.example", client="10.1.2.3", reverse_path="a@example.com")
    assert code == 1
    assert out.startswith("REFUSED with 550 5.7.1 Relaying is prohibited: the permission has expired\n")
    assert "; it has expired\n" in out


def test_explain_a_denial(here, capsys):
    code, out, _ = explain(capsys, "b@example.com", reverse_path="a@spam.test")
    assert code == 1
    assert out.startswith("REFUSED with 550 5.7.1 Not from there\n")
    assert "rule    [[deny]] reverse_path *@spam.test (gatepost.toml:25): complaint of 12 May\n" in out


def test_explain_routing_characters(here, capsys):
    code, out, _ = explain(capsys, "victim%y.example@example.com", reverse_path="<>")
    assert code == 1
    assert "rule    a backend may read the local-part as another address (percent): never from strangers\n" in out


def test_explain_tls_helo_account_and_listener(here, capsys):
    Path("gatepost.toml").write_text(
        CONFIG.replace('why = "office', 'tls_minimum = "1.2"\nwhy = "office').replace(
            'address = "127.0.0.1:2525"', 'address = "127.0.0.1:2525"\nsend_as = "enforce"'
        )
        + '[[deny]]\nhelo = "bad.test"\n[[trust]]\naccounts = ["anna"]\n[[trust]]\nlisten = "inside"\n'
        + f'[[trust]]\ncertificate = "{"ab" * 32}"\n[[trust]]\npop3 = "30m"\n'
    )
    who = {"client": "10.1.2.3", "reverse_path": "a@example.com"}
    assert explain(capsys, "b@y.example", **who)[0] == 1
    assert explain(capsys, "b@y.example", "--tls", "1.1", **who)[0] == 1
    assert explain(capsys, "b@y.example", "--tls", "1.3", **who)[0] == 0
    assert explain(capsys, "b@y.example", "--tls", "1.3", "--helo", "BAD.test", **who)[0] == 1
    assert explain(capsys, "b@y.example", "--account", "Anna", reverse_path="anna@example.com")[0] == 0
    assert explain(capsys, "b@y.example", "--account", "ben", reverse_path="ben@example.com")[0] == 1
    code, out, _ = explain(capsys, "b@y.example", "--account", "anna", reverse_path="ben@example.com")
    assert code == 1
    assert "REFUSED with 550 5.7.1 Sending as this address is prohibited: expected anna@example.com\n" in out
    assert explain(capsys, "b@y.example", "--certificate", ":".join(["AB"] * 32))[0] == 0
    assert explain(capsys, "b@y.example", "--certificate", "abcd")[0] == 2
    assert explain(capsys, "b@y.example", "--mailbox-login", "29m")[0] == 0
    assert explain(capsys, "b@y.example", "--mailbox-login", "30m")[0] == 1
    assert explain(capsys, "b@y.example", "--mailbox-login", "soon")[0] == 2
    assert explain(capsys, "b@y.example", "--listen", "inside")[0] == 0


def test_explain_what_is_no_address(here, capsys):
    code, out, _ = explain(capsys, "b@@example.com", "--json")
    answer = json.loads(out)
    assert code == 1
    assert (answer["verdict"], answer["reason"], answer["rule"]) == ("refuse", "syntax", None)
    assert answer["reply"].startswith("501 5.1.3 ")
    code, out, _ = explain(capsys, "b@example.com", reverse_path="a@exa mple")
    assert code == 1
    assert out.startswith("REFUSED with 501 5.1.7 ")
    assert "rule    the reverse-path cannot be parsed, whoever sends it\n" in out


def test_explain_in_json(here, capsys):
    code, out, _ = explain(capsys, "b@y.example", "--json")
    assert code == 1
    assert json.loads(out) == {
        "client": "203.0.113.9",
        "listen": "mx",
        "reverse_path": "a@stranger.example",
        "forward_path": "b@y.example",
        "verdict": "refuse",
        "reason": "relaying",
        "reply": "550 5.7.1 Relaying is prohibited",
        "rule": None,
        "detail": "",
        "backend": None,
        "changes": [
            {"condition": "the forward-path were at a local domain, such as example.com", "where": "gatepost.toml:14"},
            {
                "condition": "the client were in 10.1.0.0/16 and the reverse-path were *@example.com",
                "where": "gatepost.toml:19",
            },
        ],
        "shadow": None,
        "notes": [],
    }
    code, out, _ = explain(capsys, "b@example.com", "--json")
    answer = json.loads(out)
    assert (code, answer["verdict"], answer["backend"], answer["reply"]) == (0, "admit", "mail", None)
    assert answer["rule"] == {
        "rule": "[domains] local example.com",
        "where": "gatepost.toml:14",
        "why": "",
        "owner": "",
    }


def test_explain_looks_host_names_up(here, capsys, monkeypatch):
    known = {"dyn.example.com": "192.0.2.7"}

    async def addresses(self, host):
        if host in known:
            return Answer(Certainty.FOUND, (ip_address(known[host]),), 60.0)
        return Answer(Certainty.UNKNOWN, why="Timeout while contacting DNS servers")

    monkeypatch.setattr(Resolver, "addresses", addresses)
    Path("gatepost.toml").write_text(
        CONFIG + '[[trust]]\nhost = "dyn.example.com"\n[[trust]]\nhost = "silent.example.com"\n'
    )
    code, out, _ = explain(capsys, "b@y.example", client="192.0.2.7")
    assert code == 0
    assert "rule    [[trust]] host dyn.example.com (gatepost.toml:29)\n" in out
    assert (
        "note    DNS does not answer for silent.example.com (Timeout while contacting DNS servers); a gate that has "
        "run for a while may still know it\n" in out
    )
    code, out, _ = explain(capsys, "b@y.example", client="192.0.2.8")
    assert code == 1
    assert "the client were dyn.example.com (gatepost.toml:29)\n" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--client", "office"], 'gatepost: --client "office": this is not an IP address; write it as 192.0.2.1\n'),
        (
            ["--client", "192.0.2.1", "--listen", "mxx"],
            'gatepost: --listen "mxx": there is no such listener; the configuration has mx, inside\n',
        ),
    ],
)
def test_a_question_that_cannot_be_asked(here, capsys, more, said):
    code, out, err = typed(capsys, "explain", *more, "--reverse-path", "a@x.example", "--forward-path", "b@y.example")
    assert (code, out, err) == (2, "", said)


# --- init -------------------------------------------------------------------------------------------------------------


def test_init_takes_options_and_asks_nothing(tmp_path):
    path = tmp_path / "made" / "gatepost.toml"
    outcome = gatepost(
        "init", "--name", "mx.example.com", "--listen", "127.0.0.1:2525", "--listen", "[::1]:2525",
        "--local-domain", "example.com", "--local-domain", "bücher.example", "--backend", "127.0.0.1:1",
        "--trust", "10.1.0.0/255.255.0.0", "--trust", "dyn.example.com", "--data", "state", "--output", str(path),
    )  # fmt: skip
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout == (
        "backend 127.0.0.1:1: it cannot be reached: Connection refused\n"
        f"{path} is written. `gatepost check` says what it allows, `gatepost run` starts the gate.\n"
    )
    gate = config.load_file(str(path)).gate
    assert gate.name == "mx.example.com"
    assert gate.data == str(path.parent / "state")
    assert gate.listens[0].addresses == (("127.0.0.1", 2525), ("::1", 2525))
    assert [entry.pattern for entry in gate.rules.local] == ["example.com", "xn--bcher-kva.example"]
    assert [entry.host or str(entry.network) for entry in gate.rules.trust] == ["10.1.0.0/16", "dyn.example.com"]


def test_init_never_overwrites_unless_forced(here, capsys):
    wanted = ["--name", "mx.example.org", "--local-domain", "example.org", "--backend", "embedded:"]
    code, out, err = typed(capsys, "init", *wanted)
    assert (code, out) == (2, "")
    assert err == "gatepost: gatepost.toml is there already; --force overwrites it, --output writes another\n"
    assert Path("gatepost.toml").read_text() == CONFIG
    assert typed(capsys, "init", *wanted, "--force")[0] == 0
    assert config.load_file("gatepost.toml").gate.name == "mx.example.org"


def test_init_writes_where_config_says(here, capsys):
    code, _, _ = typed(
        capsys, "init", "--config", "other.toml", "--name", "a.example", "--local-domain", "a.example",
        "--backend", "embedded:", "--non-interactive",
    )  # fmt: skip
    assert code == 0
    assert config.load_file("other.toml").gate.name == "a.example"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "embedded:"], "--local-domain: whose mail is ours is not said"),
        (["--local-domain", "example.com"], "--backend: where accepted mail goes is not said"),
        (["--local-domain", "*", "--backend", "embedded:"], "--local-domain: this would take mail for every domain"),
        (["--local-domain", "a.example", "--backend", "10.0.0.5"], "--backend: port is missing; write host:port"),
        (
            ["--local-domain", "a.example", "--backend", "embedded:", "--listen", "0.0.0.0"],
            '--listen: port is missing; write host:port, such as "0.0.0.0:25"',
        ),
        (
            ["--local-domain", "a.example", "--backend", "embedded:", "--trust", "10.1.2.3/16"],
            '--trust: the address has bits beyond its mask; the network is "10.1.0.0/16"',
        ),
        (
            ["--local-domain", "a.example", "--backend", "embedded:", "--trust", "0.0.0.0/0"],
            "[[trust]] network: this would be an open relay",
        ),
        (
            ["--local-domain", "a.example", "--backend", "127.0.0.1:25", "--listen", "0.0.0.0:25"],
            "this is the gate's own listener",
        ),
    ],
)
def test_init_writes_nothing_that_is_wrong(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(capsys, "init", "--name", "mx.example.com", "--non-interactive", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_init_needs_a_name_where_the_host_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    code, _, err = typed(capsys, "init", "--local-domain", "example.com", "--backend", "embedded:")
    assert code == 2
    assert err == "gatepost: --name: the gate's name in DNS, which this host does not know itself, is not said\n"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, directory, *arguments):
        self.said = ""
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gatepost", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "200"},
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def expect(self, words):
        for _ in range(600):
            if words in self.said:
                return
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    octets = os.read(self._master, 65536)
                    self.said += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", octets.decode())
        pytest.fail(f"{words!r} was not said, but\n{self.said}")

    def type(self, words):
        os.write(self._master, f"{words}\n".encode())

    def code(self):
        return self._process.wait(30)


def test_init_asks_on_a_terminal_and_asks_again_where_an_answer_is_wrong(tmp_path):
    with Terminal(tmp_path, "init", "--name", "mx.example.com") as terminal:
        for question, answer in (
            ("Listen on, address:port (0.0.0.0:25):", "127.0.0.1"),
            ("port is missing", "127.0.0.1:2525"),
            ("Domains whose mail is ours:", ""),
            ("whose mail is ours is not said", "example.com, example.org"),
            ('The mail server, host:port, or "embedded:" for a trial:', "10.0.0.5:25, 10.0.0.6:25"),
            ("write one; more can be added to the file", "embedded:"),
            ("Networks or hosts that may send anywhere (Enter for none):", ""),
        ):
            terminal.expect(question)
            terminal.type(answer)
        terminal.expect("gatepost.toml is written.")
        assert terminal.code() == 0
    gate = config.load_file(str(tmp_path / "gatepost.toml")).gate
    assert gate.listens[0].addresses == (("127.0.0.1", 2525),)
    assert [entry.pattern for entry in gate.rules.local] == ["example.com", "example.org"]
    assert gate.rules.trust == ()


def test_init_asks_nothing_on_a_terminal_where_options_say_enough(tmp_path):
    enough = ["--name", "mx.example.com", "--local-domain", "example.com", "--backend", "embedded:"]
    with Terminal(tmp_path, "init", *enough) as terminal:
        terminal.expect("gatepost.toml is written.")
        assert terminal.code() == 0


def test_init_writes_nothing_where_the_answers_end(tmp_path):
    with Terminal(tmp_path, "init", "--name", "mx.example.com") as terminal:
        terminal.expect("Listen on")
        terminal.type("\x04")  # end of file
        terminal.expect("the answers ended before the questions; nothing is written")
        assert terminal.code() == 2
    assert list(tmp_path.iterdir()) == []


# --- completion, version ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_its_options(capsys, shell):
    code, out, _ = typed(capsys, "completion", shell)
    assert code == 0
    for name, _ in cli.COMMANDS:
        assert name in out
    assert "forward-path" in out


def test_bash_completes_with_it(tmp_path):
    script = tmp_path / "gatepost.bash"
    script.write_text(gatepost("completion", "bash").stdout)
    complete = (
        f"source {script}; COMP_WORDS=(gatepost ex); COMP_CWORD=1; "
        "function=$(complete -p gatepost | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); "
        '$function gatepost ex gatepost; echo "${COMPREPLY[@]}"'
    )
    completed = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == ["explain"]


def test_version_in_json(capsys):
    assert json.loads(typed(capsys, "version", "--json")[1]) == {"version": __version__}
    assert typed(capsys, "version", "--config", "x")[:2] == (0, f"{__version__}\n")


# --- The gate that runs -----------------------------------------------------------------------------------------------


def live_config(console):
    return f"""\
[gate]
name = "mx.example.com"
workers = 1
[[listen]]
address = "127.0.0.1:0"
[domains]
local = ["example.com"]
[backend.mail]
address = "embedded:"
[console]
address = "127.0.0.1:{console}"
"""


def test_status_and_reload_of_a_gate_that_runs(tmp_path):
    console = free_port()
    with Gate(tmp_path, live_config(console)) as gate:
        named = ["--config", str(gate.config)]
        status = gatepost("status", *named)
        assert (status.returncode, status.stderr) == (0, "")
        assert status.stdout.startswith(
            f"ready\nlisteners  mx at 127.0.0.1:{gate.port}\nworkers    1\nsessions   0 now,"
        )
        facts = json.loads(gatepost("status", *named, "--json").stdout)
        assert facts["ready"] is True
        assert facts["sessions_open"] == 0

        gate.config.write_text(live_config(console) + "[limits]\nsessions = 5\n")
        reload = gatepost("reload", *named)
        assert (reload.returncode, reload.stderr) == (0, "")
        assert reload.stdout == f"the gate (process {gate.pid}) runs on {gate.config} as it is now\n"
        facts = json.loads(gatepost("reload", *named, "--json").stdout)
        assert facts == {"pid": gate.pid, "config": str(gate.config), "taken": True, "problems": []}

        gate.config.write_text("nonsense")
        reload = gatepost("reload", *named)
        assert (reload.returncode, reload.stdout) == (2, "")
        gate.config.write_text(live_config(console))
    for command in ("status", "reload"):
        outcome = gatepost(command, *named)
        assert outcome.returncode == 2
        assert outcome.stderr.startswith("gatepost: no gate")


def test_a_reload_refuses_an_open_relay_and_says_each_time_that_one_is_meant(tmp_path):
    closed = live_config(free_port())
    opened = closed + HALVES.replace('reverse_paths = ["*@example.com"]\n', "")
    meant = opened.replace("[gate]\n", '[gate]\nopen_relay = "mx.example.com"\n')
    with Gate(tmp_path, closed) as gate:
        named = ["--config", str(gate.config)]
        gate.config.write_text(opened)
        refused = gatepost("reload", *named)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.count("this would be an open relay: ") == 2
        with smtplib.SMTP("127.0.0.1", gate.port) as client:
            client.ehlo("a.test")
            client.mail("a@a.test")
            assert client.rcpt("b@elsewhere.test")[0] == 550, "it runs on as it was"
        gate.config.write_text(meant)
        assert gatepost("reload", *named).returncode == 0
        gate.wait_for_line(lambda line: "OPEN RELAY, as [gate] open_relay wishes" in line)
    again = tmp_path / "again"
    again.mkdir()
    with Gate(again, meant) as gate:
        gate.wait_for_line(lambda line: "OPEN RELAY, as [gate] open_relay wishes" in line)
        # What the proof says of a stranger, the gate does: played by hand at its own listener.
        shown = json.loads(gatepost("check", "--config", str(gate.config), "--json").stdout)["proof"]["dialogue"]
        with smtplib.SMTP("127.0.0.1", gate.port) as client:
            replies = [client.docmd(exchange["command"]) for exchange in shown["exchanges"]]
        assert [code for code, _ in replies[:-1]] == [250, 250]
        assert b"This server keeps mail for its own domains only" in replies[-1][1], (
            "so the backend says, which was asked"
        )


def test_the_embedded_default_cannot_be_reloaded(here, capsys):
    Path("gatepost.toml").unlink()
    code, _, err = typed(capsys, "reload")
    assert code == 2
    assert err == ("gatepost: there is no configuration to reload: the embedded default never changes; see --config\n")
