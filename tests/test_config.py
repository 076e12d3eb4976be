"""The configuration as an administrator writes it: what it means, and what is said where it is wrong."""

from __future__ import annotations

import json
import textwrap
import tomllib
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from gatepost import config
from gatepost.auth.settings import LoginServer
from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.config import exposure, sentences, surroundings, values
from gatepost.config.document import shown
from gatepost.config.places import Places
from gatepost.errors import ConfigError
from gatepost.gate import interfaces
from gatepost.smtp.path import Pattern
from gatepost.smtp.reply import Reply

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()

# All the keys of the interface, in one file.  "sales" is there because a route names it.
FULL = """\
[gate]
name = "mx.example.com"            # greeting, EHLO, Received
data = "/var/lib/gatepost"
workers = 2
user = "gatepost"
public_trust = 65536

[[listen]]
name = "mx"
address = "0.0.0.0:25"
role = "mx"
tls = "starttls"
proxy_from = ["10.9.0.5"]
auth = "off"
auth_without_tls = false

[[listen]]
name = "inside"
address = ["10.1.0.1:25", "[2001:db8::1]:25"]
role = "inside"
bare_newlines = "normalise"

[tls]
certificate = "/etc/gatepost/tls.pem"
key = "/etc/gatepost/tls.key"
minimum = "1.2"

[domains]
local = ["example.com", "*.example.com"]

[backend.mail]
address = "10.0.0.5:25"
tls = "opportunistic"
connections = 100
when_down = "defer"
xclient = false

[backend.sales]
address = ["sales.example.com:25", "lmtp:/run/sales.sock"]

[[route]]
forward_paths = ["*@sales.example.com"]
backend = "sales"

[[trust]]
network = "10.1.0.0/16"
why = "office LAN"
owner = "it@example.com"
expires = 2027-06-30
reverse_paths = ["*@example.com"]
forward_paths = ["*"]
messages_per_hour = 600
recipients_per_hour = 2000
tls_minimum = "1.0"
bare_newlines = "refuse"

[[trust]]
accounts = ["*"]

[[deny]]
reverse_path = "*@spam.test"
reply = "550 5.7.1 Not from there"
why = "complaint of 12 May"
expires = 2027-01-01

[auth]
verify = ["accounts", "pop3"]

[auth.pop3]
address = "10.0.0.5:110"

[limits]
message_size = "50 MiB"
recipients_per_message = 100
sessions = 4000
sessions_per_client = 50
sessions_per_minute_per_client = 300
errors_per_session = 10
messages_per_hour_per_mailbox = 1000

[console]
address = "127.0.0.1:8025"

[store]
[counters]
"""

GATE = """\
[gate]
name = "mx.example.com"
[[listen]]
address = "127.0.0.1:2525"
[domains]
local = ["example.com"]
[backend.mail]
address = "10.0.0.5:25"
"""


def load(text, path="gatepost.toml"):
    return config.load(textwrap.dedent(text).encode(), path, now=NOW)


def problems(text, path="gatepost.toml"):
    with pytest.raises(ConfigError) as error:
        load(text, path)
    return error.value.problems


def with_gate(text):
    """The text behind a gate that is right; the text's first line is line 9."""
    return GATE + textwrap.dedent(text)


# --- What a file means ------------------------------------------------------------------------------------------------


def test_the_whole_interface_loads():
    loaded = load(FULL)
    gate = loaded.gate
    assert (gate.name, gate.data, gate.workers, loaded.user) == ("mx.example.com", "/var/lib/gatepost", 2, "gatepost")
    assert loaded.console_address == ("127.0.0.1", 8025)
    assert loaded.pid_path == "/var/lib/gatepost/gatepost.pid"
    mx, inside = gate.listens
    assert (mx.name, mx.addresses, mx.role, mx.tls, mx.auth) == ("mx", (("0.0.0.0", 25),), "mx", "starttls", "off")
    assert mx.proxy_from == ("10.9.0.5/32",)
    assert mx.where == "gatepost.toml:8"
    assert inside.addresses == (("10.1.0.1", 25), ("2001:db8::1", 25))
    assert (inside.tls, inside.auth, inside.bare_newlines) == ("none", "offered", "normalise")
    assert gate.own_addresses == (ip_address("10.1.0.1"), ip_address("2001:db8::1"))
    assert gate.tls.certificates == (("/etc/gatepost/tls.pem", "/etc/gatepost/tls.key"),)
    assert (mx.tls_minimum, mx.send_as, inside.send_as) == ("1.2", "log", "off")
    assert gate.auth.verify == ("accounts", "pop3")
    assert (gate.auth.accounts, gate.auth.cache_s) == ("/var/lib/gatepost/accounts", 60)
    assert gate.auth.pop3 == LoginServer("10.0.0.5", 110)
    mail, sales = gate.backends
    assert mail.addresses == (SmtpAddress("10.0.0.5", 25),)
    assert (mail.connections, mail.hello, mail.tls) == (50, "mx.example.com", "opportunistic")
    assert sales.addresses == (SmtpAddress("sales.example.com", 25), LmtpSocket("/run/sales.sock"))


def test_the_rules_of_the_whole_interface():
    rules = load(FULL).gate.rules
    assert [entry.pattern for entry in rules.local] == ["example.com", "*.example.com"]
    assert rules.local[0].where == "gatepost.toml:29"
    trust = rules.trust[0]
    assert trust.network == ip_network("10.1.0.0/16")
    assert (trust.why, trust.owner, trust.where) == ("office LAN", "it@example.com", "gatepost.toml:45")
    assert trust.expires_at == datetime(2027, 7, 1, tzinfo=UTC).timestamp()
    assert trust.reverse_paths == (Pattern.parse("*@example.com"),)
    assert trust.forward_paths == (Pattern.parse("*"),)
    assert (trust.messages_per_hour, trust.recipients_per_hour, trust.tls_minimum) == (600, 2000, "1.0")
    assert rules.trust[1].accounts == ("*",)
    deny = rules.deny[0]
    assert deny.reverse_path == Pattern.parse("*@spam.test")
    assert deny.reply == Reply(550, "Not from there", "5.7.1")
    assert deny.where == "gatepost.toml:60"
    route = rules.routes[0]
    assert (route.backend, route.local, route.where) == ("sales", False, "gatepost.toml:41")
    assert (rules.default_backend, rules.postmaster_domain, rules.recipients_max) == ("mail", "example.com", 100)


def test_what_has_no_effect_is_said():
    assert load(FULL).warnings == (
        "gatepost.toml:58: [[trust]] accounts: AUTH is offered by no listener, so the entry matches no client",
        "gatepost.toml:66: [auth]: AUTH is offered by no listener, so that nobody is asked",
    )


def test_a_small_file_has_the_defaults_of_the_interface(tmp_path):
    path = tmp_path / "gatepost.toml"
    loaded = load(GATE, str(path))
    gate = loaded.gate
    assert gate.data == str(tmp_path / "gatepost-data")
    assert gate.workers >= 1
    assert gate.listens[0].name == "mx"
    assert (gate.listens[0].role, gate.listens[0].tls, gate.listens[0].bare_newlines) == ("mx", "none", "refuse")
    limits = gate.limits
    assert (limits.message_size_octets, limits.recipients_per_message, limits.sessions) == (50 << 20, 100, 4000)
    assert (limits.sessions_per_client, limits.sessions_per_minute_per_client) == (50, 300)
    assert (limits.errors_per_session, limits.messages_per_hour_per_mailbox) == (10, 1000)
    assert gate.backends[0].tls == "opportunistic"
    assert loaded.console_address == ("127.0.0.1", 8025)
    assert gate.rules.trust == ()
    assert loaded.warnings == ()


def test_the_embedded_default_is_that_of_the_interface(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = config.embedded_default()
    gate = loaded.gate
    assert gate.listens[0].addresses == (("127.0.0.1", 2525),)
    assert loaded.console_address == ("127.0.0.1", 8025)
    assert [entry.pattern for entry in gate.rules.local] == ["example.com"]
    assert gate.backends[0].addresses == (EmbeddedMailboxes(str(tmp_path / "gatepost-data" / "mail")),)
    assert not gate.rules.trust
    assert not gate.rules.deny
    assert loaded.config_path == ""
    assert loaded.warnings == ()
    assert config.load(config.EMBEDDED_DEFAULT, "").gate == gate, "a worker reads the same from the octets"


def test_the_data_directory_is_below_var_for_a_file_below_etc():
    assert load(GATE, "/etc/gatepost/gatepost.toml").gate.data == "/var/lib/gatepost"


def test_paths_count_from_the_directory_of_the_file():
    text = with_gate('[tls]\ncertificate = "tls/cert.pem"\n').replace(
        'name = "mx.example.com"', 'name = "mx.example.com"\ndata = "state"'
    )
    gate = load(text.replace('"10.0.0.5:25"', '"embedded:boxes"'), "/srv/mail/gatepost.toml").gate
    assert gate.data == "/srv/mail/state"
    assert gate.tls.certificates == (("/srv/mail/tls/cert.pem", "/srv/mail/tls/cert.pem"),)
    assert gate.backends[0].addresses == (EmbeddedMailboxes("/srv/mail/boxes"),)


def test_a_file_from_windows_loads():
    assert config.load(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode(), "x.toml", now=NOW).gate.name == (
        "mx.example.com"
    )


def test_a_whole_name_is_asked_of_the_host_where_none_is_written(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Gate.Example.ORG")
    text = GATE.replace('name = "mx.example.com"\n', "")
    assert load(text).gate.name == "gate.example.org"
    monkeypatch.setattr("socket.gethostname", lambda: "gate")
    monkeypatch.setattr("socket.getfqdn", lambda name: name)
    loaded = load(text)
    assert loaded.gate.name == "gate"
    assert loaded.warnings == (
        (
            "gatepost.toml:1: [gate] name: the name is not set, and this host knows no full "
            "name of its own, so the gate "
            'calls itself "gate"; write name = "mx.example.com" in [gate]'
        ),
    )
    monkeypatch.setattr("socket.gethostname", lambda: "-bad host-")
    assert load(text).gate.name == "localhost"


def test_connections_are_shared_among_the_workers():
    for workers, connections, share in ((2, 100, 50), (3, 100, 33), (4, 2, 1)):
        text = GATE.replace("[gate]", f"[gate]\nworkers = {workers}") + f"connections = {connections}\n"
        assert load(text).gate.backends[0].connections == share


def test_limits_and_timeouts_are_read_with_their_units():
    gate = load(
        with_gate("""\
            [limits]
            message_size = "512 KiB"
            content_line = "2000 B"
            header_section = "1 MiB"
            memory = "1 MiB"
            sessions = 0
            [timeouts]
            command = "1m30s"
            content_total = "2h"
            busy = "5s"
        """)
    ).gate
    assert (gate.limits.message_size_octets, gate.limits.content_line_octets) == (512 << 10, 2000)
    assert (gate.limits.header_section_octets, gate.limits.memory_octets) == (1 << 20, 1 << 20)
    assert gate.limits.message_memory_octets == 1 << 20, "one message cannot have more memory than all"
    assert gate.limits.sessions == 0
    assert (gate.timeouts.command_s, gate.timeouts.content_total_s, gate.timeouts.busy_s) == (90, 7200, 5)
    assert load(with_gate("[limits]\nmessage_size = 0\n")).gate.limits.message_size_octets == 0


def test_the_first_backend_takes_what_no_route_takes():
    gate = load(
        with_gate("""\
            [backend.second]
            address = "embedded:"
            [[route]]
            forward_paths = ["local", "*@partner.example", "postmaster"]
            backend = "second"
        """)
    ).gate
    assert gate.rules.default_backend == "mail"
    assert gate.rules.routes[0].local
    assert gate.rules.routes[0].forward_paths == (Pattern.parse("*@partner.example"), Pattern.parse("postmaster"))
    assert gate.backends[1].tls == "off"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.com", "example.com"),
        ("*.example.com", "*.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[IPv6:2001:DB8::1]", "[2001:db8::1]"),
        ("[IPv6:::ffff:192.0.2.1]", "[192.0.2.1]"),
        ("*.test", "*.test"),
        ("localhost", "localhost"),
    ],
)
def test_local_domains_in_every_form(written, read):
    assert load(GATE.replace('"example.com"', json.dumps(written))).gate.rules.local[0].pattern == read


def test_postmaster_belongs_to_the_first_domain_without_a_star():
    text = GATE.replace('["example.com"]', '["[192.0.2.1]", "*.example.com", "example.org", "example.com"]')
    assert load(text).gate.rules.postmaster_domain == "example.org"
    assert load(GATE.replace('["example.com"]', '["*.example.com"]')).gate.rules.postmaster_domain == ""


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.0.0/255.255.0.0", "10.1.0.0/16"),
        ("10.1.0.0/255.255.255.255", "10.1.0.0/32"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("2001:DB8::7", "2001:db8::7/128"),
        ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::1", "::1/128"),
    ],
)
def test_networks_in_every_form(written, read):
    rules = load(with_gate(f'[[trust]]\nnetwork = "{written}"\n')).gate.rules
    assert rules.trust[0].network == ip_network(read)


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2027-06-30", datetime(2027, 7, 1, tzinfo=UTC)),
        ("2027-06-30T12:00:00Z", datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ("2027-06-30 12:00:00", datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ("2027-06-30T12:00:00+02:00", datetime(2027, 6, 30, 10, tzinfo=UTC)),
    ],
)
def test_expires_is_a_date_or_a_moment(written, moment):
    rules = load(with_gate(f'[[trust]]\nnetwork = "10.0.0.0/8"\nexpires = {written}\n')).gate.rules
    assert rules.trust[0].expires_at == moment.timestamp()


@pytest.mark.parametrize("written", ["0001-01-01", "9999-12-31", "0001-01-01T00:00:00+14:00"])
def test_the_ends_of_time_load(written):
    load(with_gate(f'[[deny]]\nnetwork = "10.0.0.0/8"\nexpires = {written}\n'))


def test_an_entry_holds_until_the_end_of_its_day_and_an_expired_one_loads_with_a_warning():
    today = with_gate('[[trust]]\nnetwork = "10.1.0.0/16"\nexpires = 2026-11-23\n')
    assert load(today).warnings == ()
    yesterday = with_gate('[[trust]]\nnetwork = "10.1.0.0/16"\nexpires = 2026-11-22\n')
    assert load(yesterday).warnings == (
        "gatepost.toml:11: [[trust]] expires: this entry has expired and matches nobody; renew or remove it",
    )
    denied = with_gate('[[deny]]\nhelo = "x.test"\nexpires = 2026-11-23T12:00:00Z\n')
    assert load(denied).warnings == (
        "gatepost.toml:11: [[deny]] expires: this entry has expired and matches nobody; renew or remove it",
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.0.0.5:25", SmtpAddress("10.0.0.5", 25)),
        ("[2001:db8::5]:2525", SmtpAddress("2001:db8::5", 2525)),
        ("Mail.Example.com:25", SmtpAddress("mail.example.com", 25)),
        ("localhost:25", SmtpAddress("localhost", 25)),
        ("lmtp:/run/lmtp.sock", LmtpSocket("/run/lmtp.sock")),
        ("lmtp:10.0.0.5:24", SmtpAddress("10.0.0.5", 24, lmtp=True)),
        ("lmtp:[::1]:24", SmtpAddress("::1", 24, lmtp=True)),
        ("lmtp:25", SmtpAddress("lmtp", 25)),
        ("embedded:/srv/boxes", EmbeddedMailboxes("/srv/boxes")),
    ],
)
def test_backend_addresses_in_every_form(written, read):
    assert load(GATE.replace("10.0.0.5:25", written)).gate.backends[0].addresses == (read,)
    assert values.backend_address(values.backend_address_text(read)) == read


@pytest.mark.parametrize(
    ("written", "octets"),
    [
        ("550 5.7.1 Not from there", b"550 5.7.1 Not from there\r\n"),
        ("550 Not from there", b"550 5.7.1 Not from there\r\n"),
        ("450 4.7.0 Later", b"450 4.7.0 Later\r\n"),
    ],
)
def test_an_own_refusal(written, octets):
    rules = load(with_gate(f'[[deny]]\nhelo = "*.spam.test"\nreply = "{written}"\n')).gate.rules
    assert rules.deny[0].reply is not None
    assert rules.deny[0].reply.octets() == octets
    assert rules.deny[0].helo == "*.spam.test"


def test_every_who_key_of_trust_and_deny():
    rules = load(
        with_gate(f"""\
            [[trust]]
            host = "Dyn.Example.com"
            [[trust]]
            listen = "mx"
            [[trust]]
            accounts = "anna"
            [[trust]]
            certificate = "{"AB:" * 31}AB"
            [[trust]]
            pop3 = "30m"
            [[deny]]
            network = "192.0.2.0/24"
            [[deny]]
            host = "spam.example.com"
            [[deny]]
            helo = "USER"
            [[deny]]
            reverse_path = "<>"
            [[deny]]
            forward_path = "anna@example.com"
        """)
    ).gate.rules
    host, listen, accounts, certificate, pop3 = rules.trust
    assert (host.host, listen.listen, accounts.accounts) == ("dyn.example.com", "mx", ("anna",))
    assert (certificate.certificate, pop3.pop3_s) == ("ab" * 32, 1800)
    network, spam, helo, null, forward = rules.deny
    assert (network.network, spam.host, helo.helo) == (ip_network("192.0.2.0/24"), "spam.example.com", "user")
    assert (null.reverse_path, forward.forward_path) == (Pattern.parse("<>"), Pattern.parse("anna@example.com"))


# --- What is said where a file is wrong -------------------------------------------------------------------------------

WRONG = (Path(__file__).parent / "wrong-configurations.txt").read_text("utf-8").split("----\n")[1:-1]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.partition("#! ")[2][:70])
def test_what_is_wrong_is_said_with_file_line_and_mend(case):
    expected = []
    line = 0
    for number, text in enumerate(case.splitlines(), GATE.count("\n") + 1):
        if text.startswith("#! "):
            expected.append(f"gatepost.toml:{line}: {text[3:]}")
        else:
            line = number
    assert problems(GATE + case) == expected


LOCAL_WRONG = [
    ("*", "this would take mail for every domain and relay it: an open relay; name your own domains"),
    ("*.", "this would take mail for every domain and relay it: an open relay; name your own domains"),
    ("*.com", 'this would be an open relay: "*.com" is all of "com"; name your own domains'),
    ("user@example.com", 'a domain stands here, not an address; write "example.com"'),
    ("mail*.example.com", '"*" may stand only at the start, for all names below a domain; write "*.example.com"'),
    ("192.0.2.1", 'an address stands in brackets here; write "[192.0.2.1]"'),
    ("2001:db8::1", 'an address stands in brackets here; write "[IPv6:2001:db8::1]"'),
    ("[192.0.2]", 'this is not an address literal; write "[192.0.2.1]" or "[IPv6:2001:db8::1]"'),
    ("[2001:db8::1]", 'this is not an address literal; write "[192.0.2.1]" or "[IPv6:2001:db8::1]"'),
    ("[192.0.2.1", 'this is not an address literal; write "[192.0.2.1]" or "[IPv6:2001:db8::1]"'),
    ("exa mple.com", 'is not a label of a domain; write a name such as "mail.example.com"'),
    ("example.com.", 'the domain has an empty label; write a name such as "mail.example.com"'),
    ("", 'the domain is empty; write a name such as "mail.example.com"'),
]


@pytest.mark.parametrize(("written", "said"), LOCAL_WRONG)
def test_a_wrong_local_domain_is_said(written, said):
    (problem,) = problems(GATE.replace('"example.com"', f'"example.org",\n  {json.dumps(written)}'))
    assert problem.startswith("gatepost.toml:7: [domains] local")
    assert said in problem


def test_all_problems_of_a_file_are_told_at_once_in_its_order():
    found = problems("""\
        [gate]
        nme = "x"

        [listen]
        address = "0.0.0.0:25"

        [[trust]]
        network = "10.1.2.3/16"
        expires = "2027-06-30"

        [[trust]]
        listen = "nowhere"

        [domains]
        local = ["example.com", "*"]

        [backend.mail]
        adress = "10.0.0.5:25"
        when_down = "spool"

        [[route]]
        backend = "mial"
        forward_paths = "local"
    """)
    assert [problem.split(":")[1] for problem in found] == ["2", "4", "8", "9", "12", "15", "17", "18", "19", "22"]


def test_an_empty_file_says_what_a_gate_needs():
    assert problems("") == [
        'gatepost.toml: no [[listen]] table: nothing would listen; write [[listen]] and address = "host:port"',
        'gatepost.toml: no [backend.NAME] table: mail would go nowhere; write [backend.mail] and address = "host:25"',
    ]


def test_a_bad_table_does_not_make_others_look_lost():
    found = problems("""\
        [[listen]]
        name = "inside"
        address = "nonsense"
        [[trust]]
        listen = "inside"
        [backend.mail]
        address = "nonsense"
        [[route]]
        forward_paths = "local"
        backend = "mail"
    """)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a b", ':1: after a key stands "=" and a value; write key = "value"'),
        ("\n\n[x", ":3: the table's name does not end; write it as [table]"),
        ("[[x]", ":1: the table's name does not end; write it as [[table]], with two brackets on each side"),
        ("\nx=", ':2: this is no value; text stands in double quotes, as in "text", and true and false in lower case'),
        ("x = yes", ":1: this is no value;"),
        ("x = 'a", ":1: the text does not end; close it with the quote that opened it"),
        ('x = "a', ":1: the text does not end; close it with the quote that opened it"),
        ("x = [1,\n2", ':2: the list does not end; close it with "]", and put "," between its elements'),
        ("x = {a = 1", ':1: the inline table does not end; close it with "}", and put "," between its keys'),
        ("x = {a = 1, a = 2}", ":1: a key stands twice in this inline table; keep one"),
        ("[gate]\n[gate]", ":2: [gate] stands twice; write its keys in one place"),
        ("[a]\nb.c = 1\n[a.b]\n", ":3: [a.b] stands twice; write its keys in one place"),
        ("a = 1\na = 2", ":2: this key or table stands twice; keep one"),
        ("x = 2027-13-40", ":1: the value ends before the line does; write one key on a line, text in quotes, a date"),
        ("x = 1 y", ":1: the value ends before the line does;"),
        ('x = "\\q"', ":1: a backslash begins an escape; write it twice, or put the text in single quotes"),
        ("x = 1\x00", ":1: the value ends before the line does"),
        ("# \x01", ":1: a control character stands here; remove it"),
        ('x = "a\nb"', ":1: a control character stands here, or a text goes over the end of its line; remove it"),
        ("= 1", ":1: this is neither a table nor a key;"),
        ("x = " + "9" * 5000, ": a number has too many digits; write a smaller one"),
        ("x = " + "[" * 100_000, ": lists are nested too deep; a list here holds plain values"),
    ],
)
def test_what_is_not_toml_is_said_in_words(text, said):
    (problem,) = problems(text)
    assert problem.startswith("gatepost.toml" + said)


def test_every_message_of_the_toml_parser_becomes_a_sentence():
    for text in ("x = 0x", 'x = "\\ud800"', "x = [1 2]", "[a]]", "x.", "[]", 'x = """a', "x = 1e", "\ufeff\ufeffx = 1"):
        (problem,) = problems(text)
        assert problem.startswith("gatepost.toml:1: ")
        assert ";" in problem


def test_what_is_not_utf8_is_said_with_its_line():
    with pytest.raises(ConfigError) as error:
        config.load(b"[gate]\nname = '\xff'\n", "gatepost.toml")
    assert error.value.problems == ["gatepost.toml:2: this is not UTF-8; save the file as UTF-8 text"]


def test_a_file_that_is_far_too_large_is_not_even_parsed(monkeypatch):
    monkeypatch.setattr("gatepost.config.document.FILE_OCTETS_MAX", 1 << 20)
    with pytest.raises(ConfigError) as error:
        config.load(b"#" * ((1 << 20) + 1), "gatepost.toml")
    assert error.value.problems == ["gatepost.toml: the file is larger than 1 MiB; make it smaller"]


# --- Open relays ------------------------------------------------------------------------------------------------------


def trusting(*networks, **gate):
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in gate.items())
    text = "".join(f'[[trust]]\nnetwork = "{network}"\n' for network in networks)
    return GATE.replace('name = "mx.example.com"\n', f'name = "mx.example.com"\n{keys}') + text


@pytest.mark.parametrize(
    ("networks", "held"),
    [
        (["0.0.0.0/0"], "3,702,258,688 public addresses"),
        (["8.0.0.0/15"], "131,072 public addresses"),
        (["2000::/3"], "35,184,372,023,296 public IPv6 sites (/48)"),
        (["::/0"], "35,184,372,023,296 public IPv6 sites (/48)"),
        (["2a00::/31"], "131,072 public IPv6 sites (/48)"),
    ],
)
def test_a_network_of_strangers_does_not_load(networks, held):
    (problem,) = problems(trusting(*networks))
    assert problem == (
        f"gatepost.toml:10: [[trust]] network: this would be an open relay: {networks[0]} holds {held}, whose users "
        "may send anywhere; name your own networks ([gate] public_trust allows 65,536)"
    )


def test_many_networks_of_strangers_together_do_not_load():
    halves = ["8.0.0.0/17", "9.0.0.0/16", "11.0.0.0/17"]
    (problem,) = problems(trusting(*halves))
    assert "gatepost.toml:12: [[trust]] network" in problem
    assert "the networks in [[trust]] hold 131,072 public addresses together" in problem
    assert len(problems(trusting(*(f"{n}.0.0.0/16" for n in (20, 21))))) == 1


@pytest.mark.parametrize(
    "networks",
    [
        ["8.0.0.0/16"],
        ["8.0.0.0/17", "8.0.128.0/17"],
        ["8.0.0.0/16", "8.0.0.0/16", "8.0.1.0/24"],
        ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"],
        ["fc00::/7", "fe80::/10", "::1", "2001:db8::/32"],
        ["2a00::/32"],
    ],
)
def test_ones_own_networks_load(networks):
    load(trusting(*networks))


def test_public_trust_moves_the_bound():
    assert load(trusting("8.0.0.0/8", public_trust=1 << 24))
    assert len(problems(trusting("8.0.0.0/24", public_trust=255))) == 1
    assert load(trusting("8.0.0.0/24", public_trust=256))
    assert len(problems(trusting("8.8.8.8", public_trust=0))) == 1


def test_what_has_expired_or_leads_to_named_domains_only_is_no_open_relay():
    load(trusting("0.0.0.0/0") + "expires = 2026-01-01\n")
    load(trusting("0.0.0.0/0") + 'forward_paths = ["*@partner.example.net", "*@*.partner.example.net", "<>"]\n')
    for pattern in ("*", "*@com", "*@*.com", "anna@*"):
        assert len(problems(trusting("0.0.0.0/0") + f'forward_paths = ["*@partner.example.net", "{pattern}"]\n')) == 1
    assert len(problems(trusting("0.0.0.0/0") + 'reverse_paths = ["*@example.com"]\n')) == 1, "anybody can claim one"


def test_an_open_relay_loads_only_under_the_gates_own_name():
    loaded = load(trusting("0.0.0.0/0", open_relay="MX.example.com"))
    assert loaded.warnings == (
        (
            "gatepost.toml:11: [[trust]] network: OPEN RELAY, as [gate] open_relay wishes: "
            "0.0.0.0/0 holds 3,702,258,688 "
            "public addresses, whose users may send anywhere; name your own networks ([gate] "
            "public_trust allows 65,536)"
        ),
    )
    found = problems(trusting("0.0.0.0/0", open_relay="yes"))
    assert found[0] == (
        'gatepost.toml:3: [gate] open_relay = "yes": an open relay is confirmed with this gate\'s own name; write '
        '"mx.example.com", or better remove the key'
    )
    assert len(found) == 2
    assert load(trusting(open_relay="mx.example.com")).warnings == (
        "gatepost.toml:3: [gate] open_relay: nothing here is an open relay; remove the key",
    )


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ('address = "0.0.0.0:25"', "strangers reach the listener"),
        ('address = "[::]:25"', "strangers reach the listener"),
        ('address = "10.1.0.1:25"', "strangers reach the listener"),
        ('address = "127.0.0.1:25"\nproxy_from = "127.0.0.1"', "strangers reach the listener"),
        ('address = "8.8.8.8:25"\nrole = "inside"', "strangers reach the listener"),
        ('address = "127.0.0.1:25"', ""),
        ('address = "10.1.0.1:25"\nrole = "inside"', ""),
        ('address = "[fd00::1]:25"\nrole = "inside"\nproxy_from = "10.0.0.1"', ""),
        ('address = "8.8.8.8:25"\nrole = "submission"\ntls = "starttls"', ""),
        ('address = "8.8.8.8:25"\nauth = "required"\ntls = "implicit"', ""),
    ],
)
def test_a_listener_that_strangers_reach_cannot_be_trusted(listen, said):
    text = with_gate(f'[[trust]]\nlisten = "in"\n[[listen]]\nname = "in"\n{listen}\n')
    if said:
        (problem,) = problems(text)
        assert problem == (
            'gatepost.toml:10: [[trust]] listen: this would be an open relay: strangers reach the listener "in" at '
            'gatepost.toml:11; trust a listener of role "inside" at an inside address, or networks'
        )
    else:
        load(text)


def test_a_trusted_listener_on_every_interface_is_warned_of():
    text = with_gate('[[trust]]\nlisten = "in"\n[[listen]]\nname = "in"\naddress = "0.0.0.0:25"\nrole = "inside"\n')
    assert load(text).warnings == (
        (
            "gatepost.toml:10: [[trust]] listen: all clients of this listener may send "
            "anywhere, and it listens on every "
            "interface here; give it an inside address, or let a firewall keep strangers out"
        ),
    )


WIDE = "all of which may send; name those that are yours"
BLOCK = "holds a whole block of private addresses, and VPNs, containers and NAT use such, too; name the networks that"


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("8.8.8.0/23", f"8.8.8.0/23 holds 512 public addresses, {WIDE}"),
        ("8.8.8.0/24", ""),
        ("8.8.8.8", ""),
        ("10.0.0.0/8", f"10.0.0.0/8 {BLOCK}"),
        ("172.16.0.0/12", f"172.16.0.0/12 {BLOCK}"),
        ("192.168.0.0/16", ""),
        ("10.0.0.0/9", ""),
        ("127.0.0.0/8", ""),
        ("2a00::/48", "2a00::/48 holds 65,536 networks of /64, all of which may send; name the /64 that is meant"),
        ("2a00::/49", ""),
        ("2a00::/64", ""),
        ("fd00::/8", ""),
    ],
)
def test_a_grant_that_is_wider_than_usual_is_warned_of(network, said):
    warned = load(trusting(network)).warnings
    assert len(warned) == bool(said)
    assert all(warning.startswith(f"gatepost.toml:10: [[trust]] network: {said}") for warning in warned)
    assert load(trusting(network) + 'forward_paths = "*@partner.test"\n').warnings == (), "it leads to one domain only"


@pytest.mark.parametrize(
    ("first", "second", "idle"),
    [
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"', 2),
        ('network = "10.1.2.0/24"', 'network = "10.1.0.0/16"', 1),
        ('network = "10.1.2.0/24"', 'network = "10.1.2.0/24"', 2),
        ('network = "10.1.2.0/24"', 'network = "10.1.3.0/24"', 0),
        ('network = "10.1.2.0/24"', 'network = "2001:db8::/64"', 0),
        ('host = "a.test"', 'host = "a.test"', 2),
        ('host = "a.test"', 'host = "b.test"', 0),
        ('listen = "mx"', 'listen = "mx"', 2),
        (f'certificate = "{"ab" * 32}"', f'certificate = "{"ab" * 32}"', 2),
        ('accounts = "*"', 'accounts = "alice"', 2),
        ('accounts = ["alice", "bob"]', 'accounts = "bob"', 2),
        ('accounts = "bob"', 'accounts = ["alice", "bob"]', 1),
        ('accounts = "bob"', 'accounts = "alice"', 0),
        ('pop3 = "30m"', 'pop3 = "10m"', 2),
        ('pop3 = "10m"', 'pop3 = "30m"', 1),
        ('network = "10.1.0.0/16"\nmessages_per_hour = 5', 'network = "10.1.2.0/24"', 0),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\nmessages_per_hour = 5', 2),
        ('network = "10.1.0.0/16"\nexpires = 2027-01-01', 'network = "10.1.2.0/24"', 0),
        ('network = "10.1.0.0/16"\nexpires = 2027-01-01', 'network = "10.1.2.0/24"\nexpires = 2027-01-01', 2),
        ('network = "10.1.0.0/16"\ntls_minimum = "1.2"', 'network = "10.1.2.0/24"', 0),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\ntls_minimum = "1.2"', 2),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\ntls_minimum = "1.0"', 0),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\nbare_newlines = "normalise"', 0),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\nshared = true', 0),
        ('network = "10.1.0.0/16"', 'network = "10.1.2.0/24"\nreverse_paths = "a@b.test"', 2),
        ('network = "10.1.0.0/16"\nreverse_paths = "a@b.test"', 'network = "10.1.2.0/24"', 0),
        ('network = "10.1.0.0/16"\nreverse_paths = "a@b.test"', 'network = "10.1.2.0/24"\nreverse_paths = "*"', 0),
        (
            'network = "10.1.0.0/16"\nreverse_paths = "*@b.test"',
            'network = "10.1.2.0/24"\nreverse_paths = "a@b.test"',
            2,
        ),
        ('network = "10.1.0.0/16"\nreverse_paths = "a@*"', 'network = "10.1.2.0/24"\nreverse_paths = "a@b.test"', 2),
        ('network = "10.1.0.0/16"\nreverse_paths = "a@*"', 'network = "10.1.2.0/24"\nreverse_paths = "<>"', 0),
        (
            'network = "10.1.0.0/16"\nforward_paths = "*@*.b.test"',
            'network = "10.1.2.0/24"\nforward_paths = ["*@c.b.test", "x@*.b.test", "y@*.d.b.test"]',
            2,
        ),
        (
            'network = "10.1.0.0/16"\nforward_paths = "*@*.b.test"',
            'network = "10.1.2.0/24"\nforward_paths = "*@b.test"',
            0,
        ),
        (
            'network = "10.1.0.0/16"\nforward_paths = "*@b.test"',
            'network = "10.1.2.0/24"\nforward_paths = "*@*.b.test"',
            0,
        ),
        (
            'network = "10.1.0.0/16"\nforward_paths = "*@[192.0.2.1]"',
            'network = "10.1.2.0/24"\nforward_paths = "x@[192.0.2.1]"',
            2,
        ),
    ],
)
def test_an_entry_that_another_one_makes_idle_is_warned_of(first, second, idle):
    text = with_gate(f"[[trust]]\n{first}\n[[trust]]\n{second}\n")
    warned = [warning for warning in load(text).warnings if "remove one of the two" in warning]
    lines = {1: 9, 2: 10 + len(first.splitlines())}
    if not idle:
        assert warned == []
        return
    (warning,) = warned
    other = f"the entry at gatepost.toml:{lines[3 - idle]} grants all of this already; remove one of the two"
    assert warning == f"gatepost.toml:{lines[idle]}: [[trust]]: {other}"


def test_a_grant_that_is_denied_as_a_whole_is_warned_of():
    said = (
        "gatepost.toml:9: [[trust]]: the [[deny]] entry at gatepost.toml:11 refuses all of its clients; remove one of"
    )
    denied = '[[deny]]\nnetwork = "10.1.0.0/16"\n'
    (warning,) = load(trusting("10.1.2.0/24") + denied).warnings
    assert warning.startswith(said)
    assert load(trusting("10.0.0.0/15") + denied).warnings == ()
    assert load(trusting("10.1.2.0/24") + denied + "expires = 2027-01-01\n").warnings == (), "it is used after that"


def test_a_domain_that_another_one_takes_in_is_warned_of():
    text = GATE.replace('"example.com"', '"example.com",\n"*.example.com",\n"mail.example.com",\n"*.lab.example.com"')
    taken = '"*.example.com" at gatepost.toml:7 takes it in already; remove one of the two'
    assert load(text).warnings == (
        f"gatepost.toml:8: [domains] local: {taken}",
        f"gatepost.toml:9: [domains] local: {taken}",
    )
    only = GATE.replace('"example.com"', '"*.example.com", "mail.example.com"')
    assert load(only).warnings == (), "bare postmaster is that of the first domain without *"


def test_grants_to_machines_that_nobody_answers_for_are_told_in_one_line():
    def told(text):
        return exposure.without_owner(load(text).gate.rules, NOW)

    assert told(GATE) == []
    assert told(trusting("10.1.0.0/16") + 'owner = "it@example.com"\n') == []
    assert told(with_gate('[[trust]]\naccounts = "*"\n[[trust]]\npop3 = "30m"\n')) == [], "who logs in answers for it"
    assert told(trusting("10.1.0.0/16") + "expires = 2026-01-01\n") == []
    asked = 'no owner; write owner = "it@example.com", so that somebody can be asked'
    assert told(trusting("10.1.0.0/16")) == [f"gatepost.toml:9: [[trust]]: the entry names {asked}"]
    assert told(trusting("10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16")) == [
        f"gatepost.toml:9: [[trust]]: 3 entries (lines 9, 11 and 13) name {asked}"
    ]
    (many,) = told(trusting(*(f"10.{n}.0.0/16" for n in range(20))))
    assert "20 entries (lines 9, 11, 13, 15, 17, 19, 21, 23 and others) name" in many


def test_an_opening_is_told_at_its_own_line_behind_entries_that_are_wrong():
    found = problems(with_gate('[[trust]]\nhost = "-"\n[[trust]]\nnetwork = "0.0.0.0/0"\n'))
    assert [problem.split(":")[1] for problem in found] == ["10", "12"]


# --- Warnings ---------------------------------------------------------------------------------------------------------


NO_LOGIN = "AUTH is offered under TLS only, which this listener does not speak, so that nobody can log in; write tls = "
AS_IT_IS = "passwords cross the network as they are"


OFFERED = '[[listen]]\nname = "b"\naddress = "127.0.0.1:1"\ntls = "starttls"\nauth = "offered"\n'
ACCOUNTS = '[[trust]]\naccounts = "*"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f'[[trust]]\ncertificate = "{"0" * 64}"\n',
            "10: [[trust]] certificate: no listener speaks TLS, so the entry matches no client",
        ),
        (
            '[[trust]]\npop3 = "30m"\n',
            '10: [[trust]] pop3: no listener has role "pop3" or "imap", so the entry matches no client',
        ),
        (
            '[[trust]]\naccounts = "alice"\n',
            "10: [[trust]] accounts: AUTH is offered by no listener, so the entry matches no client",
        ),
        (
            '[tls]\nminimum = "1.1"\n',
            (
                '10: [tls] minimum = "1.1": TLS 1.0 and 1.1 are broken (RFC 8996); write "1.2", and tls_minimum into '
                "the [[trust]] entry of the one device that needs less"
            ),
        ),
        (
            '[console]\naddress = "0.0.0.0:8025"\n',
            (
                '10: [console] address = "0.0.0.0:8025": the console asks for no login, whoever '
                "reaches this address reads "
                "it; let a firewall keep strangers out"
            ),
        ),
        (
            '[[listen]]\naddress = "127.0.0.1:1"\nrole = "submission"\n',
            f'11: [[listen]] role: {NO_LOGIN}"starttls"',
        ),
        (
            '[[listen]]\nname = "b"\naddress = "127.0.0.1:1"\nauth = "required"\n',
            f'12: [[listen]] auth: {NO_LOGIN}"starttls"',
        ),
        (
            '[[listen]]\nname = "b"\naddress = "127.0.0.1:1"\nauth = "offered"\n',
            f'12: [[listen]] auth: {NO_LOGIN}"starttls"',
        ),
        (
            '[[listen]]\naddress = "127.0.0.1:1"\nrole = "submission"\ntls = "implicit"\n',
            (
                "11: [[listen]] role: who logs in here may send to the local domains only: no [[trust]] entry has "
                'accounts; write [[trust]] and accounts = ["*"]'
            ),
        ),
        (
            f'[[listen]]\naddress = "10.1.0.1:1"\nrole = "submission"\nauth_without_tls = true\n{ACCOUNTS}',
            f"12: [[listen]] auth_without_tls: {AS_IT_IS}, for everybody to read",
        ),
        (
            '[[listen]]\nname = "b"\naddress = "127.0.0.1:1"\ntls = "starttls"\ntls_minimum = "1.0"\n',
            (
                '13: [[listen]] tls_minimum = "1.0": TLS 1.0 and 1.1 are broken (RFC 8996), and every client of this '
                "listener may be talked down to them; write it into the [[trust]] entry of the one device that needs it"
            ),
        ),
        (
            f'{OFFERED}[[trust]]\naccounts = "alice"\ntls_minimum = "1.0"\n',
            (
                '16: [[trust]] tls_minimum = "1.0": who a client is shows after the TLS handshake here, so that none '
                "below the listener's minimum is spoken; an entry by network or host can have less"
            ),
        ),
        (
            f'{OFFERED}[auth]\n[auth.imap]\naddress = "10.0.0.5:143"\n',
            '15: [auth.imap]: nobody is asked here: "imap" is not in [auth] verify',
        ),
        (
            f'{OFFERED}[auth]\nverify = "imap"\n[auth.imap]\naddress = "10.0.0.5:143"\ntls = "off"\n',
            f"18: [auth.imap] tls: {AS_IT_IS}; write a tls that the server can do",
        ),
        (
            f'{OFFERED}[auth]\nverify = "ldap"\n[auth.ldap]\naddress = "ldap://dc"\nbind = "{{user}}"\ntls = "off"\n',
            f'19: [auth.ldap] tls: {AS_IT_IS}; write "starttls", or an ldaps address',
        ),
        (
            f'{OFFERED}[auth]\nverify = "dovecot"\n[auth.dovecot]\naddress = "10.0.0.5:12345"\n',
            "17: [auth.dovecot] address: Dovecot's protocol has no TLS: passwords cross the network",
        ),
        (
            f'{OFFERED}[auth]\nverify = "oauth"\n[auth.oauth]\njwks = "https://idp.example/keys"\n',
            "16: [auth.oauth]: a token that was made for another program is taken here, too; write audience",
        ),
        (
            '[[send_as]]\naccounts = "alice"\nreverse_paths = "sales@example.com"\nexpires = 2026-01-01\n',
            "12: [[send_as]] expires: this entry has expired and matches nobody; renew or remove it",
        ),
        (
            '[[route]]\nforward_paths = "*"\nbackend = "mail"\n[[route]]\nforward_paths = "local"\nbackend = "mail"\n',
            '12: [[route]]: this route is never reached: "*" at gatepost.toml:9 takes everything before it',
        ),
        (
            '[backend.b]\naddress = "x:25"\n',
            "9: [backend.b]: no [[route]] leads to this backend, and it is not the first one",
        ),
    ],
)
def test_what_loads_and_should_be_known(text, said):
    (warning,) = load(with_gate(text)).warnings
    assert warning == f"gatepost.toml:{said}"


def test_a_domain_that_stands_twice_is_warned_of():
    assert load(GATE.replace('"example.com"', '"example.com",\n"EXAMPLE.COM"')).warnings == (
        'gatepost.toml:7: [domains] local = "example.com": this domain stands at gatepost.toml:6, too',
    )


def test_a_gate_without_domains_is_warned_of():
    text = GATE.replace('[domains]\nlocal = ["example.com"]\n', "")
    assert load(text).warnings == (
        (
            "gatepost.toml: no [domains] table: the gate takes mail from trusted clients only; "
            'write local = ["example.com"]'
        ),
    )


# --- Secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("GATEPOST_TEST_SECRET", "hunter2")
    assert values.secret("x${GATEPOST_TEST_SECRET}y${GATEPOST_TEST_SECRET}").reveal() == "xhunter2yhunter2"
    assert values.secret("plain $ {text}").reveal() == "plain $ {text}"
    file = tmp_path / "secret"
    file.write_text("hunter3\n")
    assert values.secret({"file": str(file)}).reveal() == "hunter3"
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        values.secret({"file": str(file)})
    file.write_bytes(b"x" * (values.SECRET_OCTETS_MAX + 1))
    with pytest.raises(ValueError, match="is larger than 64 KiB"):
        values.secret({"file": str(file)})


def test_a_secret_shows_itself_to_nobody():
    secret = values.secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"
    assert secret == values.secret("hunter2")
    assert secret != values.secret("hunter3")
    assert len({secret, values.secret("hunter2")}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[counters]\nurl = 'valkey://:hunter2@x'\n",
        "[backend.b]\naddress = 'x:25'\nauth = { password = 'hunter2' }\n",
        "[backend.b]\naddress = 'x:25'\nauth = 'hunter2'\n",
        "[store]\nurl = 'x${hunter2 }'\n",
        "[store]\nurl = ['hunter2']\n",
        "[store]\nulr = 'hunter2'\n",
        "[storage]\nurl = 'hunter2'\n",
        "[auth]\npassword = 'hunter2'\n",
        "[auth]\nldap = 'hunter2'\n",
        "[auth.ldap]\npassword = 'hunter2\n",
    ],
)
def test_no_message_shows_what_may_be_a_secret(text):
    for problem in problems(with_gate(text)):
        assert "hunter2" not in problem


# --- Finding and reading the file -------------------------------------------------------------------------------------


def test_the_file_is_looked_for_in_the_interfaces_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("elsewhere.toml") == "elsewhere.toml"
    assert config.SEARCHED == ("gatepost.toml", "/etc/gatepost/gatepost.toml")
    monkeypatch.setattr(config, "SEARCHED", ("gatepost.toml", str(tmp_path / "etc.toml")))
    assert config.find() is None
    (tmp_path / "etc.toml").write_text(GATE)
    assert config.find() == str(tmp_path / "etc.toml")
    (tmp_path / "gatepost.toml").write_text(GATE)
    assert config.find() == "gatepost.toml"
    assert config.load_file("gatepost.toml").gate.name == "mx.example.com"
    assert config.load_file(None).config_path == ""


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError) as error:
        config.read(str(tmp_path / "missing.toml"))
    assert error.value.problems == [
        (
            f"{tmp_path}/missing.toml: the configuration cannot be read: No such file or directory; "
            "gatepost init writes one"
        )
    ]
    with pytest.raises(ConfigError, match="Is a directory; see its path and permissions"):
        config.read(str(tmp_path))


# --- Size -------------------------------------------------------------------------------------------------------------


def test_ten_thousand_grants_and_domains_load_and_know_their_lines():
    text = GATE.replace(
        '["example.com"]', "[\n" + "".join(f'  "d{n}.example.com",\n' for n in range(10_000)) + "]"
    ) + "".join(
        f'[[trust]]\nnetwork = "10.{n // 256}.{n % 256}.0/24"\nwhy = "office {n}"\nexpires = 2027-06-30\n'
        f'reverse_paths = ["*@d{n}.example.com"]\n'
        for n in range(10_000)
    )
    loaded = load(text)
    assert len(loaded.gate.rules.trust) == len(loaded.gate.rules.local) == 10_000
    assert loaded.gate.rules.local[-1].where == "gatepost.toml:10006"
    assert loaded.gate.rules.trust[-1].where == "gatepost.toml:60005"
    assert len(problems(text.replace("expires = ", "expires = 1 # "))) == 10_000


# --- Where things stand -----------------------------------------------------------------------------------------------


def test_places_of_everything_toml_has():
    text = textwrap.dedent('''\
        # a remark with [brackets] and = signs
        top = 1
        [gate]
        "quoted key" = "# no remark"
        a.b."c d" = [1,
          2, # two
          { x = 1, y = [3,
          4] } ]
        text = """
        [not] = "a table"
        """"
        literal = \'\'\'
        'quoted' = 1\'\'\'
        moment = 2027-06-30 12:00:00
        [[listen]]
        n = 1
        [[ listen ]] # with spaces
        n = 2
          [listen.sub]
        q = 3
        [[listen.deep]]
        z = 1
        [[listen.deep]]
        z = 2
        [ "backend" . 'mail' ]
        k = true
    ''')
    tomllib.loads(text)
    places = Places("x.toml", text)
    assert places.paths() == {
        ("top",): 2,
        ("gate",): 3,
        ("gate", "quoted key"): 4,
        ("gate", "a"): 5,
        ("gate", "a", "b"): 5,
        ("gate", "a", "b", "c d"): 5,
        ("gate", "a", "b", "c d", 0): 5,
        ("gate", "a", "b", "c d", 1): 6,
        ("gate", "a", "b", "c d", 2): 7,
        ("gate", "a", "b", "c d", 2, "x"): 7,
        ("gate", "a", "b", "c d", 2, "y"): 7,
        ("gate", "a", "b", "c d", 2, "y", 0): 7,
        ("gate", "a", "b", "c d", 2, "y", 1): 8,
        ("gate", "text"): 9,
        ("gate", "literal"): 12,
        ("gate", "moment"): 14,
        ("listen",): 15,
        ("listen", 0): 15,
        ("listen", 0, "n"): 16,
        ("listen", 1): 17,
        ("listen", 1, "n"): 18,
        ("listen", 1, "sub"): 19,
        ("listen", 1, "sub", "q"): 20,
        ("listen", 1, "deep"): 21,
        ("listen", 1, "deep", 0): 21,
        ("listen", 1, "deep", 0, "z"): 22,
        ("listen", 1, "deep", 1): 23,
        ("listen", 1, "deep", 1, "z"): 24,
        ("backend",): 25,
        ("backend", "mail"): 25,
        ("backend", "mail", "k"): 26,
    }
    assert places.at(("gate", "a", "b", "c d", 1)) == "x.toml:6"
    assert places.at(("gate", "missing", "deeper")) == "x.toml:3"
    assert places.at(("missing",)) == "x.toml"
    assert ("gate",) in places


SCALARS = (
    st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)
    | st.dates()
    | st.datetimes()
)
DOCUMENTS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=4),
    st.recursive(
        SCALARS | st.lists(SCALARS, max_size=3),
        lambda inner: (
            st.dictionaries(st.text("ab c.#", min_size=1, max_size=3), inner, max_size=3)
            | st.lists(
                st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=2), max_size=3
            )
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def every_path(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from every_path(inner, (*path, key))


@given(DOCUMENTS)
def test_every_path_of_any_document_has_a_place(document):
    text = tomlkit.dumps(document)
    parsed = tomllib.loads(text)
    places = Places("x.toml", text)
    assert set(places.paths()) == set(every_path(parsed))
    count = text.count("\n") + 1
    assert all(1 <= line <= count for line in places.paths().values())


def problems_if_any(octets):
    try:
        config.load(octets, "x.toml", now=NOW)
    except ConfigError as error:
        return error.problems or ["an error without a problem"]
    return []


@given(st.text(max_size=200))
def test_any_text_at_all_ends_in_a_config_or_a_config_error(text):
    found = problems_if_any(text.encode("utf-8", "surrogatepass"))
    assert all(problem.startswith("x.toml") for problem in found)


def test_no_message_can_steer_a_terminal():
    hostile = json.dumps("a\x1b[2J\u202e\n")
    found = problems(
        f"[gate]\nname = {hostile}\n[{hostile}]\n[backend.{hostile}]\naddress = {hostile}\n"
        f"[[listen]]\naddress = {hostile}\n[domains]\nlocal = {hostile}\n"
        f"[[trust]]\nnetwork = {hostile}\nreverse_paths = {hostile}\nwhy = {hostile}\n"
    )
    assert len(found) >= 8
    assert all(problem.isprintable() for problem in found)


JUNK = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text("abc", max_size=2), SCALARS, max_size=2)


@given(
    st.dictionaries(
        st.sampled_from(
            ["gate", "tls", "domains", "auth", "limits", "timeouts", "console", "store", "counters", "backend"]
        )
        | st.sampled_from(["listen", "route", "trust", "deny", "other"]),
        JUNK
        | st.dictionaries(
            st.sampled_from(["name", "address", "local", "mail", "url", "data", "workers"]), JUNK, max_size=4
        )
        | st.lists(
            st.dictionaries(
                st.sampled_from(["name", "address", "network", "host", "listen", "expires", "reply", "backend"]),
                JUNK,
                max_size=4,
            ),
            max_size=3,
        ),
        max_size=6,
    )
)
def test_any_tables_at_all_end_in_a_config_or_a_config_error(document):
    for problem in problems_if_any(tomlkit.dumps(document).encode()):
        assert "\n" not in problem
        assert "\x1b" not in problem


def test_offending_values_are_shown_as_toml_on_one_line_and_bounded():
    assert shown('a"b\n\x1b[31m\u202e') == '"a\\"b\\n\\u001b[31m?"'
    assert shown("x" * 200) == '"' + "x" * 76 + "..."
    assert shown([1, "a", True, 2.5, 6]) == '[1, "a", true, 2.5, ...]'
    assert shown({"password": "x"}) == "{...}"
    assert shown(datetime(2027, 1, 2, tzinfo=UTC)) == "2027-01-02T00:00:00+00:00"


# --- In words ---------------------------------------------------------------------------------------------------------


def trust_sentence(text):
    return sentences.trust_sentence(load(with_gate(f"[[trust]]\n{text}\n")).gate.rules.trust[0], NOW)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            (
                'network = "10.1.0.0/16"\nreverse_paths = "*@example.com"\nexpires = 2027-06-30\nwhy = "office LAN"\n'
                'owner = "it@example.com"'
            ),
            "10.1.0.0/16 may send anywhere as *@example.com, until 2027-06-30: office LAN, it@example.com",
        ),
        ('network = "10.1.2.3"', "10.1.2.3 may send anywhere"),
        ('host = "dyn.example.com"\nforward_paths = "*@a.example"', "the host dyn.example.com may send to *@a.example"),
        ('listen = "mx"\nwhy = "x"', "whoever comes to the listener mx may send anywhere: x"),
        ('accounts = "*"', "whoever logged in may send anywhere"),
        ('accounts = ["a", "b"]', "the accounts a, b may send anywhere"),
        (f'certificate = "{"ab" * 32}"', "the client with the certificate abababababababab... may send anywhere"),
        ('pop3 = "30m"', "whoever logged in to a mailbox from the same address in the last 30m may send anywhere"),
        (
            (
                'network = "10.0.0.0/8"\nmessages_per_hour = 6\nrecipients_per_hour = 20\ntls_minimum = "1.2"\n'
                'bare_newlines = "normalise"'
            ),
            (
                "10.0.0.0/8 may send anywhere over TLS 1.2 or newer, bare newlines normalised, "
                "at most 6 messages and 20 "
                "recipients an hour"
            ),
        ),
        ('network = "10.0.0.0/8"\nexpires = 2026-01-01', "10.0.0.0/8 may send anywhere, EXPIRED 2026-01-01"),
        (
            'network = "10.0.0.0/8"\nexpires = 2027-01-01T12:30:00Z',
            "10.0.0.0/8 may send anywhere, until 2027-01-01 12:30:00 UTC",
        ),
    ],
)
def test_a_grant_in_one_sentence(text, said):
    assert trust_sentence(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'reverse_path = "*@spam.test"\nreply = "550 5.7.1 No"\nwhy = "a complaint"\nexpires = 2027-01-01',
            "mail from *@spam.test, with 550 5.7.1 No, until 2027-01-01: a complaint",
        ),
        ('network = "192.0.2.0/24"', "clients in 192.0.2.0/24"),
        ('host = "spam.test"', "the host spam.test"),
        ('helo = "*.spam.test"', "clients that call themselves *.spam.test"),
        ('forward_path = "trap@example.com"', "mail to trap@example.com"),
    ],
)
def test_a_denial_in_one_sentence(text, said):
    rules = load(with_gate(f"[[deny]]\n{text}\n")).gate.rules
    assert sentences.deny_sentence(rules.deny[0], NOW) == said


def test_the_summary_of_the_whole_interface():
    facts = sentences.summary(load(FULL), NOW)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["valid"] is True
    assert [at["name"] for at in facts["listeners"]] == ["mx", "inside"]
    assert facts["trust"][0]["expires"] == "2027-06-30"
    text = sentences.text(facts)
    for line in (
        "gatepost.toml is valid: mx.example.com, 2 workers, data in /var/lib/gatepost, as user gatepost",
        "  mx: 0.0.0.0:25, mail for us from anybody, STARTTLS, PROXY header from 10.9.0.5/32",
        "  inside: 10.1.0.1:25, [2001:db8::1]:25, our own machines, no TLS, bare newlines normalised",
        "  *.example.com",
        "  mail: 10.0.0.5:25, STARTTLS where offered; takes everything else",
        "  sales: sales.example.com:25, lmtp:/run/sales.sock, STARTTLS where offered; takes *@sales.example.com",
        "  mail from *@spam.test, with 550 5.7.1 Not from there, until 2027-01-01: complaint of 12 May",
        "  http://127.0.0.1:8025/",
    ):
        assert line in text.splitlines()


def test_a_summary_of_many_grants_stays_readable():
    text = sentences.text(sentences.summary(load(trusting(*(f"10.0.{n}.0/24" for n in range(60)))), NOW))
    assert "  and 10 more; --json shows them all" in text.splitlines()
    assert "  10.0.49.0/24 may send anywhere" in text.splitlines()
    assert "10.0.50.0/24" not in text


def test_what_a_host_lacks_is_warned_of(tmp_path):
    certificate = tmp_path / "cert.pem"
    text = FULL.replace("/etc/gatepost/tls.pem", str(certificate)).replace("/etc/gatepost/tls.key", str(certificate))
    missing = surroundings.look(load(text.replace('"gatepost"', '"no-such-user-here"')))
    assert missing == [
        (
            'gatepost.toml:5: [gate] user = "no-such-user-here": this host has no such user; '
            "make it before the gate starts"
        ),
        f"gatepost.toml:24: [tls] {certificate}: No such file or directory on this host",
        "gatepost.toml:39: [backend.sales] address: this host has no socket /run/sales.sock now",
    ]
    certificate.write_text("nonsense")
    assert "these are no certificate in PEM and its key" in surroundings.look(load(text))[-2]
    assert surroundings.look(load(GATE)) == []
    assert surroundings.look(load(GATE.replace('"127.0.0.1:2525"', '"127.0.0.1:2525"\ntls = "starttls"'))) == [
        "gatepost.toml: no [tls] certificate: the gate makes a self-signed one, which strict clients refuse"
    ]


def test_a_right_certificate_is_not_warned_of(tmp_path):
    trustme = pytest.importorskip("trustme")
    issued = trustme.CA().issue_cert("mx.example.com")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    text = with_gate(f'[tls]\ncertificate = "{tmp_path}/both.pem"\n')
    assert surroundings.look(load(text)) == []


def test_a_mailbox_directory_that_is_a_file_is_warned_of(tmp_path):
    Path(tmp_path, "boxes").write_text("")
    text = GATE.replace("10.0.0.5:25", f"embedded:{tmp_path}/boxes")
    assert surroundings.look(load(text)) == [
        f"gatepost.toml:8: [backend.mail] address: {tmp_path}/boxes is a file, no directory"
    ]


# --- What stands around a host ----------------------------------------------------------------------------------------

NEIGHBOURS = (
    (ip_address("10.1.0.9"), "the address of this host's interface eth0"),
    (ip_address("192.168.7.1"), "the address of this host's bridge br-lan"),
    (ip_address("172.17.0.1"), "the address of this host's bridge docker0"),
    (ip_address("172.18.0.1"), "the address of this host's bridge br-0123456789ab"),
    (ip_address("fd00:17::1"), "the address of this host's bridge cni0"),
    (ip_address("10.88.0.1"), "the address of this host's bridge podman0"),
    (ip_address("10.1.0.1"), "this host's default route"),
    (ip_address("fd00:1::1"), "this host's default route"),
)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("10.1.0.0/16", "10.1.0.0/16 holds 10.1.0.1, this host's default route. Where source addresses are rewritten"),
        ("10.1.0.1", "10.1.0.1/32 holds 10.1.0.1, this host's default route. "),
        ("fd00:1::/64", "fd00:1::/64 holds fd00:1::1, this host's default route. "),
        ("172.17.0.0/16", "172.17.0.0/16 holds 172.17.0.1, the address of this host's bridge docker0. Where source"),
        ("172.18.0.0/15", "172.18.0.0/15 holds 172.18.0.1, the address of this host's bridge br-0123456789ab. "),
        ("fd00:17::/64", "fd00:17::/64 holds fd00:17::1, the address of this host's bridge cni0. "),
        ("10.88.0.0/16", "10.88.0.0/16 holds 10.88.0.1, the address of this host's bridge podman0. "),
        ("10.1.0.9", ""),
        ("192.168.7.0/24", ""),
        ("fd00:18::/64", ""),
    ],
)
def test_a_trusted_network_that_others_may_come_to_share_is_warned_of(network, said):
    warned = surroundings.around(load(trusting(network)), NEIGHBOURS, NOW)
    assert len(warned) == bool(said)
    assert all(warning.startswith(f"gatepost.toml:9: [[trust]] network: {said}") for warning in warned)
    for mend in ("host networking", "PROXY protocol", "externalTrafficPolicy"):
        assert all(mend in warning for warning in warned)
    assert surroundings.around(load(trusting(network) + "expires = 2026-01-01\n"), NEIGHBOURS, NOW) == []
    assert surroundings.around(load(trusting(network)), (), NOW) == []


def test_what_the_kernel_says_of_its_neighbours_becomes_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(interfaces, "_PROC", tmp_path)
    monkeypatch.setattr(interfaces, "_SYS", tmp_path)
    (tmp_path / "docker0" / "bridge").mkdir(parents=True)
    (tmp_path / "if_inet6").write_text("fd000017000000000000000000000001 02 40 00 80  docker0\n")
    router = f"{int(ip_address('fd00:1::1')):032x}"
    (tmp_path / "ipv6_route").write_text(f"{'0' * 32} 00 {'0' * 32} 00 {router} 00000400 00000002 0 00000003 eth0\n")
    warned = surroundings.around(load(trusting("fd00:17::/64", "fd00:1::/64")), interfaces.look(), NOW)
    assert [warning.split(". ")[0] for warning in warned] == [
        "gatepost.toml:9: [[trust]] network: fd00:17::/64 holds fd00:17::1, the address of this host's bridge docker0",
        "gatepost.toml:11: [[trust]] network: fd00:1::/64 holds fd00:1::1, this host's default route",
    ]


def test_a_listed_proxy_that_is_trusted_itself_is_warned_of():
    listens = '[[listen]]\nname = "proxied"\naddress = "127.0.0.1:1"\nproxy_from = "10.9.0.5"\n'
    text = trusting("10.9.0.0/24") + listens
    (warning,) = surroundings.around(load(text), (), NOW)
    assert warning == (
        "gatepost.toml:9: [[trust]] network: 10.9.0.0/24 holds the proxy 10.9.0.5/32 of the listener proxied. What it "
        "forwards to the listener mx passes as its own; name it in proxy_from there, too, or leave 10.9.0.5/32 out"
    )
    everywhere = text.replace('"127.0.0.1:2525"', '"127.0.0.1:2525"\nproxy_from = "10.9.0.5"')
    assert surroundings.around(load(everywhere), (), NOW) == []
    assert surroundings.around(load(trusting("10.8.0.0/24") + listens), (), NOW) == []
