"""A first configuration: what was answered, and what the backend said when it was looked at, as a commented file.

Why: the file an administrator starts from decides what stays; so each line of it says what it is for, nothing in it
    relays for strangers, and it has been loaded before it is written.
Trust: answers come from the person at the keyboard; a backend's words are bounded and shown as printable text.
Promise: no file is overwritten unless that was asked for; what is written loads without problems.
Sources: RFC 5321 §3.1, §3.2 and RFC 2033 §4.1 (greeting, EHLO, LHLO).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gatepost.backend.settings import BackendAddress, EmbeddedMailboxes, LmtpSocket
from gatepost.config import values
from gatepost.errors import GatepostError
from gatepost.smtp.client import QUIT, Capabilities, ClientEngine, parse_ehlo
from gatepost.smtp.reply import Reply

LOOK_S = 10.0  # at the backend, all in all


@dataclass(frozen=True, slots=True)
class Answers:
    """What a first configuration needs to know, each as it is written in the file.

    Attributes:
        trust: networks and host names that may send anywhere.
        user: "" where the gate shall stay who it is.
    """

    name: str
    listen: tuple[str, ...]
    local: tuple[str, ...]
    backend: str
    trust: tuple[str, ...] = ()
    data: str = "gatepost-data"
    user: str = ""


class Sighting(NamedTuple):
    """What was seen of a backend.

    Attributes:
        reached: whether it greeted us and answered EHLO.
        words: a sentence: what it said, or why it could not be reached.
    """

    reached: bool
    words: str
    capabilities: Capabilities = Capabilities()


def look_at(address: BackendAddress, hello: str, *, clock: Callable[[], float] = time.monotonic) -> Sighting:
    """Connect to a backend, hear its greeting and what it offers, and leave.

    Args:
        hello: the name we say.
    """
    if isinstance(address, EmbeddedMailboxes):
        return Sighting(True, "the embedded mailbox: nothing to look at")
    end = clock() + LOOK_S
    try:
        with _connected(address) as sock:
            engine = ClientEngine()
            engine.expect(1)
            greeting = _reply(sock, engine, end, clock)
            if greeting.code != 220:
                return Sighting(False, f"it answers, but does not greet: {_first_line(greeting)}")
            lmtp = isinstance(address, LmtpSocket) or address.lmtp
            engine.expect(1)
            sock.sendall(f"{'LHLO' if lmtp else 'EHLO'} {hello}\r\n".encode())
            answer = _reply(sock, engine, end, clock)
            capabilities = parse_ehlo(answer)
            if not answer.positive and not lmtp:  # RFC 5321 §3.2: a server of the first generation
                engine.expect(1)
                sock.sendall(f"HELO {hello}\r\n".encode())
                answer, capabilities = _reply(sock, engine, end, clock), Capabilities()
            with contextlib.suppress(OSError):
                sock.sendall(QUIT)
            if not answer.positive:
                return Sighting(False, f"it greets, but refuses us: {_first_line(answer)}")
            return Sighting(True, _words(greeting, capabilities), capabilities)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "no answer in time"
        return Sighting(False, f"it cannot be reached: {why}")


@contextlib.contextmanager
def _connected(address: BackendAddress) -> Iterator[socket.socket]:
    if isinstance(address, LmtpSocket):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(LOOK_S / 2)
            sock.connect(address.path)
            yield sock
    elif not isinstance(address, EmbeddedMailboxes):
        with socket.create_connection((address.host, address.port), LOOK_S / 2) as sock:
            yield sock


def _reply(sock: socket.socket, engine: ClientEngine, end: float, clock: Callable[[], float]) -> Reply:
    while (reply := engine.next_reply()) is None:
        left_s = end - clock()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        octets = sock.recv(65536)
        if not octets:
            raise ValueError("it closed the connection")
        engine.receive(octets)
    if isinstance(reply, Reply):
        return reply
    raise ValueError(f"it does not speak SMTP: {reply.text}")


def _first_line(reply: Reply) -> str:
    line = reply.octets().decode("utf-8", "replace").splitlines()[0][:120].replace("-", " ", 1)
    return "".join(character if character.isprintable() else "?" for character in line)


def _words(greeting: Reply, capabilities: Capabilities) -> str:
    offers = sorted(capabilities.keywords - {"SIZE"})
    if capabilities.size_octets:
        offers.append(f"messages up to {values.size_text(capabilities.size_octets)}")
    return f'it says "{_first_line(greeting)}" and offers {", ".join(offers)[:400] or "no extension"}'


# --- The file ---------------------------------------------------------------------------------------------------------


def text(answers: Answers, sighting: Sighting, date: str, warnings: Iterable[str] = ()) -> str:
    """The file.

    Args:
        date: of today, for its first line.
        warnings: sentences about the backend.
    """
    reach = (
        ""
        if sighting.reached
        else "\n# WARNING: when this was written it could not be used; mail is deferred (451) until it can."
    )
    return f"""\
# Gatepost, drafted by `gatepost init` on {date}.
#
# `gatepost check` says in words what this file allows, `gatepost explain` why one message would pass or not.
# A running gate sees a change by itself; a file that does not load leaves the one before it in force.

[gate]
# The name in the greeting, in EHLO and in the trace field.  It should be a name of this host in DNS.
name = {_quoted(answers.name)}
# What the gate keeps: keys, embedded mailboxes, content that does not fit into memory.
data = {_quoted(answers.data)}
{_user(answers.user)}
# Where clients come to.  Role mx: strangers, who bring mail for [domains] and nothing else.
[[listen]]
name = "mx"
address = {_list(answers.listen)}
role = "mx"
# Encryption for clients that want it.  Without [tls] the gate makes itself a certificate, which most servers take.
tls = "starttls"

# [tls]
# certificate = "/etc/gatepost/tls.pem"    # with its chain; read again when it is renewed
# key = "/etc/gatepost/tls.key"

[domains]
# Mail for these is taken from anybody.  For every other domain only [[trust]] opens the gate.
# "*.example.com" would be every name below example.com, and not example.com itself.
local = {_list(answers.local)}

# Where accepted mail goes.  An unknown user is refused in this server's own words, before any content is sent.
[backend.mail]
# When this was written: {sighting.words}{reach}{"".join(map(_warning, warnings))}
address = {_quoted(answers.backend)}
{_backend_tls(answers.backend)}
{_trust(answers.trust)}
# People who log in may send to other domains as well.  `gatepost account add NAME` makes an account; or the accounts
# stay where they are: [auth] names the servers that know them.
# [[listen]]
# name = "submission"
# address = "0.0.0.0:587"
# role = "submission"
# tls = "starttls"
# [[trust]]
# accounts = ["*"]
# why = "our people"
# owner = "it@example.com"

[console]
# /metrics, /healthz and /readyz, without a login: for this host alone.
address = "127.0.0.1:8025"
"""


def _warning(sentence: str) -> str:
    """Comment lines; the sentence may hold a backend's words."""
    printable = "".join(character if character.isprintable() else "?" for character in sentence)
    return "\n" + textwrap.fill(f"WARNING: {printable}", 116, initial_indent="# ", subsequent_indent="# ")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes, but for this one


def _list(items: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_quoted, items))}]"


def _user(user: str) -> str:
    if user:
        return f"# Started as root, the gate becomes this user once its ports are bound.\nuser = {_quoted(user)}\n"
    return (
        "# Started as root, the gate becomes this user once its ports are bound:\n"
        '# user = "gatepost"    # useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin gatepost\n'
    )


def _backend_tls(backend: str) -> str:
    if backend.startswith(("embedded:", "lmtp:/")):
        return ""
    return (
        '# STARTTLS where the server offers it; "required" hands nothing over without, and judges its certificate.\n'
        'tls = "opportunistic"\n'
    )


def _trust(trust: tuple[str, ...]) -> str:
    """The grants; without one, an example that grants nothing."""
    if not trust:
        return """\
# Who may send to other domains: nobody yet.  One table a grant, as narrow as it can be:
# [[trust]]
# network = "10.1.0.0/16"                 # or host = "a DNS name", or listen = "the name of a [[listen]]"
# why = "office LAN"
# owner = "it@example.com"
# expires = 2027-06-30
# reverse_paths = ["*@example.com"]       # only as these
"""
    out = ["# Who may send to other domains.  Narrow each grant with reverse_paths, forward_paths and expires.\n"]
    for who in trust:
        key = "network" if _is_network(who) else "host"
        out.append(f'[[trust]]\n{key} = {_quoted(who)}\nwhy = "given to gatepost init"\n# owner = "it@example.com"\n\n')
    return "".join(out).rstrip("\n") + "\n"


def _is_network(who: str) -> bool:
    try:
        values.network(who)
    except ValueError:
        return False
    return True


def grantee(who: str) -> str:
    """A network or a host name that may be trusted, as it is written in the file.

    Raises:
        ValueError: with a sentence, when it is neither.
    """
    if "/" in who or ":" in who or who.replace(".", "").isdigit():
        return str(values.network(who))
    return values.domain(who)


def write(path: str, octets: bytes, *, overwrite: bool) -> None:
    """Put the file there, whole or not at all.

    Raises:
        GatepostError: there is a file and it is not to be overwritten, or the directory does not let us.
    """
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{os.getpid()}") if overwrite else target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("xb") as file:
            try:
                file.write(octets)
                file.flush()
                os.fsync(file.fileno())
                fresh.replace(target)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise GatepostError(f"{path} is there already; --force overwrites it, --output writes another") from None
    except OSError as error:
        raise GatepostError(f"{path} cannot be written: {error.strerror}") from None
