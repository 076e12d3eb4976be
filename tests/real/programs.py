"""Client programs that people really send mail with, each told to deliver one message octet for octet.

Why: a gate is used through swaks, curl, nodemailer and libraries, not through our own idea of a client.
Promise: the content goes out as given, as far as the program lets it; what the server said comes back as the program
    shows it to its user.
"""

from __future__ import annotations

import json
import smtplib
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tests.real.wire import PATIENCE_S, Wire, stuffed
from tests.servers import need

HELLO = "client.test"


class Mail(NamedTuple):
    """One message and how to bring it.

    Attributes:
        octets: the content, ended with CRLF.
        source: the address to come from.
        tls: with STARTTLS; the certificate is not judged.
        utf8: with SMTPUTF8.
    """

    octets: bytes
    recipients: tuple[str, ...] = ("bob@example.com",)
    reverse_path: str = "sender@sender.test"
    source: str = "127.0.0.9"
    tls: bool = False
    utf8: bool = False


class Answer(NamedTuple):
    """What the user of the program learns.

    Attributes:
        sent: the program says that the message was sent, to some recipient at least.
        said: all that it shows of the server's replies.
    """

    sent: bool
    said: str


Program = Callable[[int, Mail], Answer]


def by_smtplib(port: int, mail: Mail) -> Answer:
    """Python's own client."""
    options = ["BODY=8BITMIME", *(["SMTPUTF8"] if mail.utf8 else [])]
    with smtplib.SMTP("127.0.0.1", port, HELLO, PATIENCE_S, source_address=(mail.source, 0)) as client:
        if mail.tls:
            client.starttls(context=unjudging())
        client.ehlo()
        try:
            refused = client.sendmail(mail.reverse_path, mail.recipients, mail.octets, options)
        except smtplib.SMTPRecipientsRefused as error:
            return Answer(False, _replies(error.recipients))
        except smtplib.SMTPResponseException as error:
            return Answer(False, _replies({"": (error.smtp_code, error.smtp_error)}))
    return Answer(True, _replies(refused))


def _replies(refused: Mapping[str, tuple[int, bytes | str]]) -> str:
    return "\n".join(
        f"{code} {text.decode('utf-8', 'replace') if isinstance(text, bytes) else text}"
        for code, text in refused.values()
    )


def unjudging() -> ssl.SSLContext:
    """A TLS client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def by_swaks(port: int, mail: Mail) -> Answer:
    """swaks, with its commands pipelined."""
    assert not mail.tls, "swaks needs Perl's Net::SSLeay for this"
    with tempfile.NamedTemporaryFile(suffix=".eml") as file:
        file.write(stuffed(mail.octets) + b".")  # it adds the last line end, and nothing else
        file.flush()
        return _run(
            [
                *(str(need("swaks")), "--server", "127.0.0.1", "--port", str(port), "--local-interface", mail.source),
                *("--ehlo", HELLO, "--from", mail.reverse_path, "--to", ",".join(mail.recipients), "--pipeline"),
                *("--timeout", str(int(PATIENCE_S)), "--no-data-fixup", "--data", f"@{file.name}"),
            ]
        )


def by_curl(port: int, mail: Mail) -> Answer:
    """curl's smtp; its transcript is its ``--verbose``."""
    with tempfile.NamedTemporaryFile(suffix=".eml") as file:
        file.write(mail.octets)
        file.flush()
        return _run(
            [
                *(str(need("curl")), "--silent", "--show-error", "--verbose", "--max-time", str(int(PATIENCE_S))),
                *("--interface", mail.source, f"smtp://127.0.0.1:{port}/{HELLO}", "--mail-from", mail.reverse_path),
                *(word for recipient in mail.recipients for word in ("--mail-rcpt", recipient)),
                *("--mail-rcpt-allowfails", "--upload-file", file.name),
                *(("--ssl-reqd", "--insecure") if mail.tls else ()),
            ]
        )


_NODEMAILER = """
const [directory, options] = [process.argv[1], JSON.parse(process.argv[2])];
const fs = require('fs');
const transport = require(directory).createTransport(options.transport);
transport.sendMail({envelope: options.envelope, raw: fs.readFileSync(options.file)}).then(
    (info) => console.log(JSON.stringify({
        sent: true, said: [info.response, ...(info.rejectedErrors || []).map((error) => error.response)]})),
    (error) => console.log(JSON.stringify({
        sent: false, said: [error.response, ...(error.rejectedErrors || []).map((each) => each.response)]})),
).finally(() => transport.close());
"""


def by_nodemailer(port: int, mail: Mail) -> Answer:
    """Node's usual library."""
    directory = need("nodemailer")
    with tempfile.NamedTemporaryFile(suffix=".eml") as file:
        file.write(mail.octets)
        file.flush()
        options = {
            "transport": {
                "host": "127.0.0.1",
                "port": port,
                "name": HELLO,
                "localAddress": mail.source,
                "secure": False,
                "ignoreTLS": not mail.tls,
                "requireTLS": mail.tls,
                "tls": {"rejectUnauthorized": False},
            },
            "envelope": {"from": mail.reverse_path, "to": list(mail.recipients)},
            "file": file.name,
        }
        done = _run([str(need("node")), "-e", _NODEMAILER, str(directory), json.dumps(options)])
    assert done.sent, done.said
    told = json.loads(done.said)
    return Answer(told["sent"], "\n".join(line for line in told["said"] if line))


def by_hand(port: int, mail: Mail) -> Answer:
    """DATA, as a person would do it who knows where dots go."""
    with Wire(port, source=mail.source) as wire:
        replies = _begun(wire, mail)
        if not any(reply.startswith("250") for reply in replies):
            return Answer(False, "\n".join(replies))
        replies.append(wire.content(mail.octets))
        wire.say("QUIT")
        return Answer(replies[-1].startswith("250"), "\n".join(replies))


def by_chunks(port: int, mail: Mail) -> Answer:
    """BDAT, in chunks that end wherever they like.  RFC 3030."""
    with Wire(port, source=mail.source) as wire:
        replies = _begun(wire, mail)
        if not any(reply.startswith("250") for reply in replies):
            return Answer(False, "\n".join(replies))
        at = 0
        for size in (1, 2, 3, 5, 8, 1000, 70_001):
            chunk = mail.octets[at : at + size]
            wire.send(b"BDAT %d\r\n" % len(chunk) + chunk)
            assert wire.reply().startswith("250"), wire.said
            at += size
        wire.send(b"BDAT %d LAST\r\n" % len(mail.octets[at:]) + mail.octets[at:])
        replies.append(wire.reply())
        wire.say("QUIT")
        return Answer(replies[-1].startswith("250"), "\n".join(replies))


def _begun(wire: Wire, mail: Mail) -> list[str]:
    """EHLO, STARTTLS, MAIL and RCPTs; the replies to RCPT."""
    wire.hello(HELLO)
    if mail.tls:
        wire.start_tls()
        wire.hello(HELLO)
    parameters = " BODY=8BITMIME SMTPUTF8" if mail.utf8 else " BODY=8BITMIME"
    reply = wire.say(f"MAIL FROM:<{mail.reverse_path}>{parameters}")
    assert reply.startswith("250"), wire.said
    return [wire.say(f"RCPT TO:<{recipient}>") for recipient in mail.recipients]


def _run(command: Sequence[str]) -> Answer:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    return Answer(done.returncode == 0, done.stdout.decode("utf-8", "replace"))


PROGRAMS: dict[str, Program] = {
    "smtplib": by_smtplib,
    "swaks": by_swaks,
    "curl": by_curl,
    "nodemailer": by_nodemailer,
    "by hand": by_hand,
    "BDAT": by_chunks,
}
