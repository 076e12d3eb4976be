"""A live gate in front of real servers, driven by the programs people send mail with.

What must hold is what a postmaster would look at: mail for us arrives as it was sent, a stranger's relay does not pass
whatever brings it, and each refusal can be found in the log.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.gatehouse import Gate
from tests.real.console import events, no_faults
from tests.real.programs import HELLO, PROGRAMS, Mail, by_chunks, by_hand, by_smtplib
from tests.real.wire import PATIENCE_S, Wire, stuffed, until
from tests.servers import Exim, OpenSmtpd, Postfix, Server, need

STRANGER = "127.0.0.9"
TRUSTED = "127.0.0.2"
OUTSIDE = "victim@elsewhere.test"

CONFIG = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"
tls = "starttls"

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{port}"

[[trust]]
network = "127.0.0.2"
why = "the trusted machine"
owner = "it@example.com"

[limits]
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:0"
"""

TRACE_FIELD = re.compile(
    rb"Received: from client\.test \(\[(?P<client>127\.0\.0\.\d+)\]\)\r\n"
    rb"\tby mx\.example\.com \(Gatepost\) with (?P<protocol>[A-Z0-9]+) id (?P<message>[0-9A-Z]{8}\.\d+)\r\n"
    rb"\t\(token [\w-]+\);\r\n"
    rb"\t(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000\r\n"
)


class Site:
    """A server with a gate in front of it."""

    def __init__(self, server: Server, gate: Gate) -> None:
        self.server = server
        self.gate = gate
        self.port = gate.port

    @contextmanager
    def expecting(self, *users: str) -> Iterator[list[bytes]]:
        """What arrives for these users from now on: after the block one message for each is in the list."""
        before = {user: self._count(user) for user in users}
        arrived: list[bytes] = []
        yield arrived
        for user in users:
            [new] = self.server.arrived(user, before[user] + 1, first=b"Received: from client.test ")[before[user] :]
            arrived.append(new)

    def _count(self, user: str) -> int:
        new = self.server.mailbox(user) / "new"
        return len(list(new.iterdir())) if new.is_dir() else 0

    def refusal(self, reference: str) -> tuple[dict[str, str], dict[str, str]]:
        """The log's session and recipient with this reference."""

        def names(session: dict) -> list[dict[str, str]]:
            return [
                recipient
                for transaction in session["transactions"]
                for recipient in transaction["recipients"]
                if recipient.get("reference") == reference
            ]

        session = self.gate.wait_for_session(lambda session: bool(names(session)))
        [recipient] = names(session)
        return session, recipient


def split(octets: bytes) -> tuple[re.Match[bytes], bytes]:
    """Our one field, and what stands under it."""
    field = TRACE_FIELD.match(octets)
    assert field is not None, octets[:600]
    return field, octets[field.end() :]


@contextmanager
def site_of(kind: type[Server], directory: Path) -> Iterator[Site]:
    with kind() as server, Gate(directory, CONFIG.format(port=server.port)) as gate:
        # What the backend can do is offered once it has said so.
        with Wire(gate.port) as wire:
            until(lambda: "8BITMIME" in wire.hello(), "the gate knows its backend")
        yield Site(server, gate)
        no_faults(gate)
        assert not events(gate, "worker_died")


@pytest.fixture(scope="module")
def postfix(tmp_path_factory) -> Iterator[Site]:
    with site_of(Postfix, tmp_path_factory.mktemp("postfix")) as site:
        yield site


@pytest.fixture(scope="module")
def exim(tmp_path_factory) -> Iterator[Site]:
    with site_of(Exim, tmp_path_factory.mktemp("exim")) as site:
        yield site


@pytest.fixture(scope="module")
def opensmtpd(tmp_path_factory) -> Iterator[Site]:
    with site_of(OpenSmtpd, tmp_path_factory.mktemp("opensmtpd")) as site:
        yield site


@pytest.fixture(params=PROGRAMS)
def program(request):
    return PROGRAMS[request.param]


def mail(subject: str, body: bytes = b"How do you do?\r\n") -> bytes:
    """A message complete enough that no server adds to it."""
    return (
        b"Date: Mon, 23 Nov 2026 07:00:00 +0000\r\nFrom: <sender@sender.test>\r\nTo: <bob@example.com>\r\n"
        b"Message-ID: <%b@sender.test>\r\nSubject: %b\r\n\r\n"
        % (subject.encode().replace(b" ", b"."), subject.encode())
    ) + body


# ---- who may send where, by every program


def test_mail_for_us_arrives_as_it_was_sent(program, postfix):
    octets = mail("for us", b"A line\r\n.\r\n..\r\n.a dot\r\n8-bit: \xff\xe4\xc3\xa4\r\n  \t\r\n\r\nlast\r\n\r\n")
    with postfix.expecting("bob", "alice") as arrived:
        answer = program(postfix.port, Mail(octets, recipients=("bob@example.com", "alice@example.com")))
        assert answer.sent, answer.said
    for text in arrived:
        field, content = split(text)
        assert content == octets
        assert field["client"] == STRANGER.encode()
        assert field["protocol"] == b"ESMTP"
    # The id in the field is the one in the log.
    session = postfix.gate.wait_for_session(
        lambda session: any(t.get("message") == field["message"].decode() for t in session["transactions"])
    )
    assert (session["client"], session["hello"]) == (STRANGER, HELLO)
    assert session["transactions"][-1]["verdict"] == "accepted"


def test_a_strangers_relay_is_refused_with_a_reference_that_the_log_knows(program, postfix):
    answer = program(postfix.port, Mail(mail("relay"), recipients=(OUTSIDE,)))
    assert not answer.sent
    refusal = re.search(r"550[ -]5\.7\.1 Relaying is prohibited \[([0-9A-Z]{8}-\d+)\]", answer.said)
    assert refusal is not None, answer.said
    session, recipient = postfix.refusal(refusal[1])
    assert session["client"] == STRANGER
    assert recipient == {
        "forward_path": OUTSIDE,
        "verdict": "refused",
        "reason": "relaying",
        "reference": refusal[1],
        "reply": refusal[0],
    }
    assert "victim" not in postfix.server.log


def test_one_refused_recipient_does_not_cost_the_other_its_mail(program, postfix):
    with postfix.expecting("bob") as arrived:
        answer = program(postfix.port, Mail(mail("mixed"), recipients=(OUTSIDE, "bob@example.com")))
        assert answer.sent, answer.said
        assert "5.7.1 Relaying is prohibited [" in answer.said
    assert split(arrived[0])[1] == mail("mixed")


def test_an_unknown_user_is_refused_in_the_servers_own_words(program, postfix):
    answer = program(postfix.port, Mail(mail("unknown"), recipients=("nobody@example.com",)))
    assert not answer.sent
    words = "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown in virtual mailbox table"
    assert words in answer.said


def test_a_trusted_address_relays(program, postfix):
    """Postfix discards it, as it is told to do with mail for elsewhere, and says so in its log."""
    recipient = f"friend-of-{re.sub('[^a-z]', '-', program.__name__)}@elsewhere.test"
    answer = program(postfix.port, Mail(mail("relayed"), recipients=(recipient,), source=TRUSTED))
    assert answer.sent, answer.said
    sent = re.compile(f"to=<{recipient}>, .*status=sent")
    until(lambda: sent.search(postfix.server.log), "Postfix sends it on")


@pytest.mark.parametrize("name", ["exim", "opensmtpd"])
def test_the_same_before_other_servers(name, request):
    site: Site = request.getfixturevalue(name)
    with site.expecting("bob") as arrived:
        answer = by_smtplib(site.port, Mail(mail("for us"), recipients=(OUTSIDE, "bob@example.com")))
        assert answer.sent, answer.said
    assert split(arrived[0])[1] == mail("for us")
    refusal = re.fullmatch(r"550 5\.7\.1 Relaying is prohibited \[([0-9A-Z]{8}-\d+)\]", answer.said)
    assert refusal is not None, answer.said
    assert site.refusal(refusal[1])[1]["forward_path"] == OUTSIDE
    answer = by_smtplib(site.port, Mail(mail("unknown"), recipients=("nobody@example.com",)))
    assert {"exim": "550 no such user here", "opensmtpd": "550 Invalid recipient"}[name] in answer.said


def test_a_trusted_address_relays_before_exim(exim):
    answer = by_hand(exim.port, Mail(mail("relayed"), recipients=("friend@elsewhere.test",), source=TRUSTED))
    assert answer.sent, answer.said
    sent = re.compile(r"=> \S+ <friend@elsewhere\.test>")
    until(lambda: sent.search(exim.server.log), "Exim sends it on")


# ---- byte for byte

CONTENTS = {
    "an empty body": mail("empty body", b""),
    "a header section without the empty line": b"Subject: only a header\r\n",
    "blank lines only": b"\r\n\r\n\r\n\r\n",
    "blank lines after the body": mail("blank lines", b"\r\n\r\nx\r\n\r\n\r\n\r\n"),
    "every octet but CR, LF and NUL": mail("octets", bytes(set(range(1, 256)) - {10, 13}) + b"\r\n"),
    "Latin-1 in the header": b"From: <a@sender.test>\r\nSubject: gr\xfc\xdfe\r\n\r\n\xe4\r\n",
    "lines of 998 octets": mail("long", (b"x" * 998 + b"\r\n") * 3 + b"." * 998 + b"\r\n." + b"\xff" * 997 + b"\r\n"),
    "dot lines": mail("dots", b".\r\n..\r\n...\r\n.x\r\n\r\n.\r\nMAIL FROM:<a@b.test>\r\n.\r\n. \r\n.\t\r\n"),
    "From lines": mail("from", b"From me to you\r\n>From you to me\r\nfrom us\r\n"),
    "white space at line ends": mail("blanks", b"no  \t\r\n \r\n\t\r\n  x  \r\n"),
    "folded and odd header fields": (
        b"Subject: a\r\n\tb\r\n  c\r\nX:\r\nX-Empty: \r\nReceived: from x by y; never\r\n\r\nz\r\n"
    ),
    "many short lines": mail("short", b"\r\n".join(b"%d" % number for number in range(20_000)) + b"\r\n"),
}


@pytest.mark.parametrize("deliver", [by_hand, by_chunks], ids=["DATA", "BDAT"])
@pytest.mark.parametrize("name", CONTENTS)
def test_content_arrives_octet_for_octet(name, deliver, postfix):
    with postfix.expecting("bob") as arrived:
        answer = deliver(postfix.port, Mail(CONTENTS[name]))
        assert answer.sent, answer.said
    assert split(arrived[0])[1] == CONTENTS[name]


@pytest.mark.parametrize("kind", ["exim", "opensmtpd"])
@pytest.mark.parametrize(
    "name", ["every octet but CR, LF and NUL", "lines of 998 octets", "dot lines", "blank lines after the body"]
)
def test_content_arrives_octet_for_octet_before_other_servers(name, kind, request):
    site: Site = request.getfixturevalue(kind)
    with site.expecting("bob") as arrived:
        answer = by_hand(site.port, Mail(CONTENTS[name]))
        assert answer.sent, answer.said
    assert split(arrived[0])[1] == CONTENTS[name]


def test_no_content_at_all(postfix):
    """The end of content at once: what arrives is our field and nothing else."""
    with postfix.expecting("alice") as arrived:
        answer = by_hand(postfix.port, Mail(b"", recipients=("alice@example.com",)))
        assert answer.sent, answer.said
    assert split(arrived[0])[1] in (b"", b"\r\n")  # Postfix ends the header section


def test_25_mib_arrive_octet_for_octet(postfix):
    octets = mail("large", b"".join(b"%076d\r\n" % number for number in range((25 << 20) // 78)))
    for program in ("curl", "BDAT"):
        with postfix.expecting("alice") as arrived:
            answer = PROGRAMS[program](postfix.port, Mail(octets, recipients=("alice@example.com",)))
            assert answer.sent, answer.said[-2000:]
        assert split(arrived[0])[1] == octets, program


UTF8 = "From: Jörg <jörg@bücher.test>\r\nTo: <bob@example.com>\r\nSubject: Grüße, 世界\r\n\r\nÄ\r\n.\r\nÖ\r\n".encode()


@pytest.mark.parametrize("name", ["smtplib", "nodemailer", "by hand", "BDAT"])
def test_international_mail_arrives_octet_for_octet(name, postfix):
    """RFC 6531: a UTF-8 reverse-path and header section."""
    with postfix.expecting("bob") as arrived:
        answer = PROGRAMS[name](postfix.port, Mail(UTF8, reverse_path="jörg@bücher.test", utf8=True))
        assert answer.sent, answer.said
    field, content = split(arrived[0])
    assert content == UTF8
    assert field["protocol"] == b"UTF8SMTP"


def test_an_international_recipient_is_asked_of_the_server(postfix):
    answer = by_smtplib(postfix.port, Mail(UTF8, recipients=("jürgen@example.com",), utf8=True))
    assert not answer.sent
    assert re.match(r"550 5\.1\.1 <jürgen@example\.com>: Recipient address rejected", answer.said), answer.said
    answer = by_smtplib(postfix.port, Mail(UTF8, recipients=("victim@bücher.test",), utf8=True))
    assert "550 5.7.1 Relaying is prohibited [" in answer.said


# ---- TLS


@pytest.mark.parametrize("name", ["smtplib", "curl", "nodemailer", "by hand", "BDAT"])
def test_mail_arrives_over_starttls(name, postfix):
    with postfix.expecting("bob") as arrived:
        answer = PROGRAMS[name](postfix.port, Mail(mail("over TLS", b".\r\n\xff\r\n"), tls=True))
        assert answer.sent, answer.said
    field, content = split(arrived[0])
    assert content == mail("over TLS", b".\r\n\xff\r\n")
    assert field["protocol"] == b"ESMTPS"
    answer = PROGRAMS[name](postfix.port, Mail(mail("relay over TLS"), recipients=(OUTSIDE,), tls=True))
    assert "550 5.7.1 Relaying is prohibited [" in answer.said
    postfix.gate.wait_for_session(lambda session: session["tls"] == "TLSv1.3" and session["end"] == "quit")


def test_mail_arrives_through_openssl(postfix):
    """openssl s_client, for those who type: it says EHLO and STARTTLS by itself."""
    octets = mail("typed into openssl")
    dialogue = [
        b"EHLO client.test\r\n",
        b"MAIL FROM:<sender@sender.test>\r\n",
        b"rcpt to:<victim@elsewhere.test>\r\n",
        b"rcpt to:<bob@example.com>\r\n",
        b"DATA\r\n",
        stuffed(octets) + b".\r\n",
        b"QUIT\r\n",
    ]
    with (
        postfix.expecting("bob") as arrived,
        subprocess.Popen(
            ["openssl", "s_client", "-starttls", "smtp", "-quiet", "-connect", f"127.0.0.1:{postfix.port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as client,
    ):
        assert client.stdin is not None
        assert client.stdout is not None
        replies: list[str] = []
        for part in dialogue:
            client.stdin.write(part)
            client.stdin.flush()
            while True:
                replies.append(client.stdout.readline().decode())
                # Some versions show the end of what was said before TLS; our own reply to EHLO has a first line.
                if replies[-1][3:4] != "-" and "250-mx.example.com\r\n" in replies:
                    break
    assert any(reply.startswith("550 5.7.1 Relaying is prohibited [") for reply in replies), replies
    assert replies[-1].startswith("221 "), replies
    field, content = split(arrived[0])
    assert content == octets
    assert field["protocol"] == b"ESMTPS"


def test_what_was_said_before_tls_is_forgotten(postfix):
    """RFC 3207 §4.2; and MAIL behind STARTTLS in one packet is neither executed nor remembered."""
    with Wire(postfix.port, source=STRANGER) as wire:
        assert "\n250-STARTTLS\n" in wire.hello()
        assert wire.start_tls() == "TLSv1.3"
        assert wire.say("MAIL FROM:<sender@sender.test>").startswith("503 ")
        assert "STARTTLS" not in wire.hello()
        assert wire.say("STARTTLS").startswith("502 ")
        assert wire.envelope("bob@example.com").startswith("250")
    with Wire(postfix.port, source=STRANGER) as wire:
        assert wire.rcpt("bob@example.com").startswith("250")
        assert wire.say("STARTTLS").startswith("503 ")  # not in the middle of a transaction
        assert wire.say("RSET").startswith("250")
        assert wire.start_tls() == "TLSv1.3"
    with Wire(postfix.port, source=STRANGER) as wire:
        wire.hello()
        wire.send(b"STARTTLS\r\nMAIL FROM:<injected@sender.test>\r\n")
        assert wire.reply().startswith("554 ")
        assert wire.end() == b""


# ---- typed


def test_a_dialogue_typed_octet_by_octet(postfix):
    """Verbs in any case, HELO enough, every octet in a packet of its own; the content, too."""
    octets = mail("typed", b"a line\r\n.\r\n..two dots\r\n")
    with postfix.expecting("bob") as arrived, Wire(postfix.port, source=STRANGER) as wire:
        assert re.fullmatch(r"220 mx\.example\.com ESMTP Gatepost", wire.greeting)
        assert wire.type("noop").startswith("250 ")
        assert wire.type("MAIL FROM:<early@sender.test>").startswith("503 ")
        assert wire.type("helo client.test") == "250 mx.example.com"
        assert wire.type("Help").startswith("214 ")
        assert wire.type("vrfy bob").startswith("252 ")
        assert wire.type("expn list").startswith("502 ")
        assert wire.type("turn").startswith("50")
        assert wire.type("rcpt to:<bob@example.com>").startswith("503 ")
        assert wire.type("mAiL fRoM: <sender@sender.test>").startswith("250 ")
        assert wire.type("data").startswith("554 ")
        assert wire.type("Rcpt To:<victim@elsewhere.test>").startswith("550 5.7.1 Relaying is prohibited [")
        assert wire.type("RCPT TO:<bob@EXAMPLE.com>").startswith("250 ")
        assert wire.type("rset").startswith("250 ")
        assert wire.type("rcpt to:<bob@example.com>").startswith("503 ")
        assert wire.type("MAIL FROM:<>").startswith("250 ")
        assert wire.type("RCPT TO:<bob@example.com>").startswith("250 ")
        assert wire.type("data").startswith("354 ")
        reply = wire.type(stuffed(octets).decode() + ".")
        assert reply.startswith("250 "), reply
        assert wire.type("quit").startswith("221 ")
        assert wire.end() == b""
    field, content = split(arrived[0])
    assert content == octets
    assert field["protocol"] == b"SMTP"


def test_a_second_message_in_one_session_and_pipelined(postfix):
    """RFC 2920: a whole transaction in one packet, then another; each reply in its place."""
    with postfix.expecting("bob") as arrived, Wire(postfix.port, source=STRANGER) as wire:
        wire.hello(HELLO)
        wire.send(
            b"MAIL FROM:<sender@sender.test>\r\nRCPT TO:<nobody@example.com>\r\nRCPT TO:<victim@elsewhere.test>\r\n"
            b"RCPT TO:<bob@example.com>\r\nDATA\r\n"
        )
        codes = [wire.reply()[:9] for _ in range(5)]
        assert codes == ["250 2.1.0", "550 5.1.1", "550 5.7.1", "250 2.1.5", "354 End t"]
        wire.send(stuffed(mail("pipelined")) + b".\r\nMAIL FROM:<sender@sender.test>\r\nRSET\r\nNOOP\r\nQUIT\r\n")
        codes = [wire.reply()[:3] for _ in range(5)]
        assert codes == ["250", "250", "250", "250", "221"]
        assert wire.end() == b""
    assert split(arrived[0])[1] == mail("pipelined")


def test_what_no_client_may_send_reaches_no_server(postfix):
    """Bare line ends from a stranger: refused after the end of content, and nothing of it arrives."""
    for wrong in (b"a\nb\r\n", b"a\rb\r\n", b"a\0b\r\n", b"x" * 999 + b"\r\n"):
        with Wire(postfix.port, source=STRANGER) as wire:
            wire.hello(HELLO)
            assert wire.envelope("bob@example.com").startswith("250")
            assert wire.say("DATA").startswith("354")
            wire.send(mail("wrong inside", wrong) + b".\r\n")
            assert wire.reply().startswith(("550 ", "500 ", "554 ")), wire.said
    with postfix.expecting("bob") as arrived:
        assert by_hand(postfix.port, Mail(mail("right"))).sent
    assert split(arrived[0])[1] == mail("right")
    assert "wrong.inside" not in postfix.server.log


# ---- a mail server as the client

SENDING_EXIM = """\
primary_hostname = client.test
exim_path = {program}
exim_user = Debian-exim
exim_group = Debian-exim
never_users =
keep_environment =
deliver_drop_privilege = true
spool_directory = {directory}/spool
log_file_path = {directory}/log/%slog
message_size_limit = 60M
log_selector = +all
begin routers
gate:
  driver = manualroute
  route_data = 127.0.0.1
  transport = smtp
  self = send
begin transports
smtp:
  driver = smtp
  port = {port}
  interface = 127.0.0.9
  allow_localhost
  helo_data = client.test
  hosts_try_chunking = *
  hosts_require_tls = {tls}
  hosts_avoid_tls = {plain}
"""


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_mail_server_delivers_to_us_with_pipelining_and_bdat(tls, postfix, tmp_path_factory):
    """Exim as the client: it pipelines, and hands content over in chunks where CHUNKING is offered."""
    program = need("exim")
    with Exim() as place:  # for a directory that it may use
        config = place.directory / "sending.conf"
        config.write_text(
            SENDING_EXIM.format(
                program=program,
                directory=place.directory,
                port=postfix.port,
                tls="*" if tls else "",
                plain="" if tls else "*",
            )
        )
        octets = mail("from Exim", b"x\r\n.\r\n..\r\n\xff\r\n" + b"y" * 900 + b"\r\n")
        with postfix.expecting("bob") as arrived:
            done = subprocess.run(
                [program, "-C", config, "-odi", "-oi", "-f", "sender@sender.test", "bob@example.com"],
                input=octets.replace(b"\r\n", b"\n"),
                capture_output=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            log = (place.directory / "log" / "mainlog").read_text()
            assert re.search(r"=> bob@example\.com .* K ", log), log  # K: by BDAT
    field, content = split(arrived[0])
    assert content.endswith(octets)
    assert field["protocol"] == (b"ESMTPS" if tls else b"ESMTP")
