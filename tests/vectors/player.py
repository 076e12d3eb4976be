"""Plays published attacks at a live server and judges by what arrived behind it.

Why: a 550 that comes too late and a 250 that delivers nothing are both beside the point; the one question is what the
    backend took, in any reading it may make of it.  Reply codes are remarks, what arrived is the verdict.
Trust: the server under test is ours and on loopback; every wait has an end.
Promise: cases run side by side, each from a source address of its own (127.9.0.0/16 strangers, 127.11.0.0/16 those
    who log in), so that what arrived can be told apart by the address in our own trace field; what no case explains
    is reported as well.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tests.vectors.lenient import LenientBackend, Recipient, Transaction
from tests.vectors.readings import domain_of

CASES = Path(__file__).with_name("cases.jsonl")
PASSWORD = "correct horse"
OUTSIDE = "elsewhere.test"

_PROBE = "From: <probe@sender.test>\r\nTo: <bob@example.com>\r\nSubject: {{id}}\r\n\r\nprobe {{id}} {{n}}\r\n.\r\n"
# Steps that stand in nearly every case have a name in cases.jsonl.
_NAMED_STEPS: dict[str, dict[str, Any]] = {
    "greeting": {"reply": "^220"},
    "hello": {"say": "EHLO probe.sender.test\r\n", "reply": "^250"},
    "mail": {"say": "MAIL FROM:<{{id}}@sender.test>\r\n", "reply": "^2"},
    "mail or not": {"say": "MAIL FROM:<{{id}}@sender.test>\r\n", "reply": "^[245]"},
    "rcpt": {"say": "RCPT TO:<bob@example.com>\r\n", "reply": "^2"},
    "rcpt outside": {"say": "RCPT TO:<victim@elsewhere.test>\r\n", "reply": "^[45]"},
    "data": {"say": "DATA\r\n", "reply": "^3"},
    "data if 2": {"say": "DATA\r\n", "reply": "^3", "after": "^2"},
    "probe if 3": {"say": _PROBE, "reply": "^[245]", "after": "^3"},
    "probe ok if 3": {"say": _PROBE, "reply": "^2", "after": "^3"},
    "quit": {"say": "QUIT\r\n", "reply": ""},
}

_PLACE = re.compile(r"\{\{(.+?)\}\}", re.DOTALL)
_REPLY = re.compile(rb"(?:[^\n]{3}-[^\n]*\n)*(?![^\n]{3}-)[^\n]*\n")
_TRACE_FIELD = re.compile(rb"Received:[^\r\n\0]*\r\n(?:[ \t][^\r\n\0]*\r\n)*")
_LITERAL = re.compile(rb"\[(127\.\d+\.\d+\.\d+)\]")


@dataclass(frozen=True)
class Case:
    """One published attack, or one piece of honest mail that must pass.

    Attributes:
        number: its place in the file; gives it a source address.
        family: the class of attack.
        client: "stranger", "trusted" or "authenticated".
        needs: what the server must offer for the case to make sense.
        transactions_max: no more messages than this may arrive, None for any number.
        never: what must not arrive: "domains", "reverse_path", "text", "command" (the last three are patterns).
        delivers: what must arrive: "to" and "texts"; None where nothing must.
    """

    number: int
    id: str
    family: str
    source: str
    client: str
    needs: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]
    transactions_max: int | None
    never: dict[str, Any]
    delivers: dict[str, list[str]] | None

    @property
    def address(self) -> str:
        """Where its connections come from."""
        network = {"stranger": 9, "authenticated": 11}.get(self.client)
        return f"127.{network}.{self.number // 250}.{self.number % 250 + 1}" if network else "127.0.0.2"


def load_cases(path: Path = CASES) -> list[Case]:
    cases = []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines()):
        raw = json.loads(line)
        steps = tuple(_NAMED_STEPS[step] if isinstance(step, str) else step for step in raw["steps"])
        cases.append(
            Case(
                number=number,
                id=raw["id"],
                family=raw["class"],
                source=raw["source"],
                client=raw.get("client", "stranger"),
                needs=tuple(raw.get("needs", ())),
                steps=steps,
                transactions_max=raw.get("transactions_max"),
                never=raw.get("never", {}),
                delivers=raw.get("delivers"),
            )
        )
    return cases


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        local: its local domains, as A-labels and U-labels.
        pids: its processes, for the cases that watch memory.
    """

    host: str
    port: int
    local: frozenset[str]
    pids: tuple[int, ...] = ()
    trusted: str = "127.0.0.2"
    bystander: str = "127.0.0.10"
    timeout_s: float = 5.0


@dataclass
class Outcome:
    """What came of one case.  ``harms`` fail it; ``remarks`` are replies other than expected."""

    case: Case
    harms: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    transcript: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.case.id} ({self.case.family}; {self.case.source})"]
        lines += [f"  HARM   {harm}" for harm in self.harms] + [f"  remark {remark}" for remark in self.remarks]
        return "\n".join(lines + [f"    {line}" for line in self.transcript])


class _Over(Exception):
    """The case ends here, as its steps say."""


def shown(octets: bytes, most: int = 200) -> str:
    text = octets[:most].decode("latin-1").encode("unicode_escape").decode("ascii")
    return text + (f"... ({len(octets)} octets)" if len(octets) > most else "")


# ------------------------------------------------------------------------------------------------ one connection


class _TlsLayer:
    """TLS over a socket that stays our own: a peer that resets in the handshake leaves nothing unclosed.

    (SSLSocket loses its descriptor when the connection is reset while it is made.)
    """

    def __init__(self, connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname="gate.test")
        while True:
            try:
                self._object.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._exchange()
        self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())

    def _exchange(self) -> None:
        self._flush()
        octets = self._socket.recv(65536)
        if not octets:
            raise ConnectionError("hung up")
        self._incoming.write(octets)

    def sendall(self, octets: bytes) -> None:
        self._object.write(octets)
        self._flush()

    def recv(self, size: int) -> bytes:
        while True:
            try:
                return self._object.read(size)
            except ssl.SSLWantReadError:
                self._exchange()
            except ssl.SSLZeroReturnError:
                return b""


class Connection:
    """A client's socket that keeps what it was told even when the server hangs up on it."""

    def __init__(self, target: Target, source: str) -> None:
        self._timeout_s = target.timeout_s
        self._socket = socket.create_connection((target.host, target.port), target.timeout_s, (source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._layer: socket.socket | _TlsLayer = self._socket
        self.buffer = b""
        self.ended = False
        self.tls = False

    def send(self, octets: bytes, segment_octets: int = 0, pause_s: float = 0.0) -> bool:
        if self.ended:
            return False
        try:
            self._socket.settimeout(self._timeout_s)
            if segment_octets:
                for at in range(0, len(octets), segment_octets):
                    self._layer.sendall(octets[at : at + segment_octets])
                    time.sleep(pause_s)
            else:
                self._layer.sendall(octets)
        except OSError:
            while self.receive(0.3):
                pass
            self.ended = True
            return False
        return True

    def receive(self, timeout_s: float) -> bool:
        """Take what comes within the time; False when nothing came or the server hung up (then ``ended``)."""
        if self.ended:
            return False
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            octets = self._layer.recv(65536)
        except TimeoutError:
            return False
        except OSError:
            octets = b""
        self.buffer += octets
        self.ended = not octets
        return bool(octets)

    def reply(self, timeout_s: float | None = None) -> bytes | None:
        """One whole reply; what is left when the server hung up; None when none came in time."""
        end = time.monotonic() + (timeout_s or self._timeout_s)
        while True:
            match = _REPLY.match(self.buffer)
            if match:
                self.buffer = self.buffer[match.end() :]
                return match[0]
            if self.ended:
                rest, self.buffer = self.buffer, b""
                return rest
            if time.monotonic() > end:
                return None
            self.receive(end - time.monotonic())

    def listen(self, seconds: float, quiet_s: float | None = None) -> bytes:
        """All that comes within the time, or until it has been quiet for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.ended:
            if not self.receive(min(left, quiet_s or left)) and quiet_s:
                break
        heard, self.buffer = self.buffer, b""
        return heard

    def start_tls(self) -> None:
        self._socket.settimeout(self._timeout_s)
        self._layer = _TlsLayer(self._socket)
        self.tls = True

    def close(self, how: str = "fin") -> None:
        try:
            if how == "half":
                self._socket.shutdown(socket.SHUT_WR)
                return
            if how == "rst":
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._socket.close()
        except OSError:
            pass
        self.ended = True


# ------------------------------------------------------------------------------------------------------ one case


class Play:
    """One case, played step by step."""

    def __init__(self, case: Case, target: Target, offered: frozenset[str]) -> None:
        self._case = case
        self._target = target
        self._offered = offered
        self._last = b""
        self._connection: Connection | None = None
        self.outcome = Outcome(case)

    def run(self) -> Outcome:
        try:
            for step in self._case.steps:
                self._step(step)
            if self._connection is not None:
                self._connection.listen(1.5, quiet_s=0.2)  # closing early would hide what the server still does
        except _Over:
            pass
        except OSError as error:
            self.outcome.remarks.append(f"connection: {error}")
        finally:
            if self._connection is not None:
                self._connection.close()
        return self.outcome

    def fill(self, template: str) -> bytes:
        """Octets of a template: code points are octets, {{...}} are places."""
        return b"".join(
            part.encode("latin-1") if index % 2 == 0 else self._place(part)
            for index, part in enumerate(_PLACE.split(template))
        )

    def _place(self, place: str) -> bytes:
        name, _, value = place.partition(":")
        octets = value.encode("latin-1")
        if name == "rep":
            text, _, times = octets.rpartition(b":")
            return text * int(times)
        if name == "plain":  # authorization identity : user : password.  RFC 4616
            return base64.b64encode(b"\0".join(octets.split(b":", 2)))
        return {
            "id": self._case.id.encode(),
            "n": str(self._case.number).encode(),
            "b64": base64.b64encode(octets),
            "user": base64.b64encode(octets),
            "trusted": self._target.trusted.encode(),
            "trusted4": socket.inet_aton(self._target.trusted),
            "gateip": self._target.host.encode(),
        }[name]

    def _note(self, line: str) -> None:
        self.outcome.transcript.append(line)

    def _step(self, step: dict[str, Any]) -> None:
        if "load" in step:
            getattr(self, f"_load_{step['load']}")(step)
            return
        if "pause_s" in step:
            time.sleep(step["pause_s"])
            return
        if self._connection is None:
            self._connection = Connection(self._target, self._case.address)
        connection = self._connection
        if "after" in step and not re.search(step["after"].encode(), self._last):
            self._note(f"   (left out: {shown(step['say'].encode('latin-1'), 60)})")
        elif "auth" in step:
            self._authenticate(connection, step["auth"])
        elif "stop_unless" in step:
            if not re.search(step["stop_unless"].encode(), self._last):
                raise _Over
        elif "listen_s" in step:
            self._last = connection.listen(step["listen_s"])
            self._note(f"S: {shown(self._last)}")
        elif "silence_s" in step:
            heard = connection.listen(step["silence_s"])
            self._note(f"S: {shown(heard)}")
            if heard.strip():
                self.outcome.harms.append(f"unasked for reply {shown(heard)}")
        elif "tls" in step:
            self._start_tls(connection, must=step["tls"] == "must")
        elif "close" in step:
            connection.close(step["close"])
        else:
            self._say(connection, step)

    def _say(self, connection: Connection, step: dict[str, Any]) -> None:
        said = self.fill(step.get("say", ""))
        if said:
            sent = connection.send(said, step.get("segment_octets", 0), step.get("segment_pause_s", 0.0))
            self._note(f"{'C:' if sent else 'C! (hung up on)'} {shown(said)}")
        if "reply" not in step:
            return
        reply = connection.reply(step.get("timeout_s"))
        self._last = reply or b""
        self._note("S: (nothing in time)" if reply is None else f"S: {shown(reply)}" if reply else "S: (hung up)")
        if reply is None:
            self.outcome.remarks.append(f"no reply in time to {shown(said, 60)}")
        elif not re.search(step["reply"].encode(), reply):
            if not reply and self._case.delivers is None:
                return  # to hang up is a fair answer to an attack
            self.outcome.remarks.append(f"{shown(reply, 80)} to {shown(said, 60)}, expected /{step['reply']}/")

    def _start_tls(self, connection: Connection, *, must: bool) -> None:
        try:
            connection.start_tls()
            self._note("   (TLS)")
        except (OSError, ValueError) as error:
            connection.close()
            self._note(f"   (no TLS: {error})")
            if must:
                self.outcome.remarks.append(f"no TLS: {error}")

    def _authenticate(self, connection: Connection, user: str) -> None:
        """STARTTLS where AUTH is offered under TLS only; then a login, if a user is named."""
        if not connection.tls and "AUTH" not in self._offered and "TLS:AUTH" in self._offered:
            connection.send(b"STARTTLS\r\n")
            connection.reply()
            connection.start_tls()
            connection.send(b"EHLO probe.sender.test\r\n")
            connection.reply()
        if user:
            connection.send(b"AUTH PLAIN " + self._place(f"plain::{user}:{PASSWORD}") + b"\r\n")
            self._last = connection.reply() or b""
            self._note(f"S: {shown(self._last)}   (AUTH PLAIN as {user})")
            if not self._last.startswith(b"235"):
                self.outcome.harms.append(f"{user} could not log in: {shown(self._last, 80)}")
                raise _Over

    # ---- load: many connections, slow ones, endless octets; others must be served meanwhile

    def _bystander_delivers(self) -> float | None:
        """Seconds that a plain delivery from another address takes; None when it failed."""
        began = time.monotonic()
        try:
            connection = Connection(self._target, self._target.bystander)
            expected = (
                (b"", b"220"),
                (b"EHLO bystander.test\r\n", b"250"),
                (b"MAIL FROM:<%b-bystander@sender.test>\r\n" % self._case.id.encode(), b"250"),
                (b"RCPT TO:<bob@example.com>\r\n", b"250"),
                (b"DATA\r\n", b"354"),
                (b"Subject: bystander\r\n\r\nhello\r\n.\r\n", b"250"),
                (b"QUIT\r\n", b"221"),
            )
            for said, wanted in expected:
                if said:
                    connection.send(said)
                reply = connection.reply(10.0)
                if not reply or not reply.startswith(wanted):
                    self._note(f"   (bystander: {shown(reply or b'nothing')} to {shown(said)})")
                    return None
            connection.close()
        except OSError as error:
            self._note(f"   (bystander: {error})")
            return None
        return time.monotonic() - began

    def _expect_bystander_served(self, within_s: float = 5.0) -> None:
        took_s = self._bystander_delivers()
        if took_s is None:
            self.outcome.harms.append("a bystander could not deliver meanwhile")
        elif took_s > within_s:
            self.outcome.remarks.append(f"a bystander needed {took_s:.1f} s")

    def _open_many(self, count: int) -> list[Connection]:
        opened = []
        for _ in range(count):
            try:
                opened.append(Connection(self._target, self._case.address))
            except OSError:
                break
        self._note(f"   ({len(opened)} of {count} connections opened)")
        return opened

    def _load_flood(self, step: dict[str, Any]) -> None:
        opened = self._open_many(step["connections"])
        for connection in opened:
            if "say" in step:
                connection.send(self.fill(step["say"]))
        time.sleep(step["hold_s"])
        self._expect_bystander_served()
        for connection in opened:
            connection.close()

    def _load_slow(self, step: dict[str, Any]) -> None:
        opened = self._open_many(step["connections"])
        for octet in self.fill(step["say"])[: step["octets"]]:
            for connection in opened:
                connection.send(bytes([octet]))
            time.sleep(step["segment_pause_s"])
        self._expect_bystander_served()
        for connection in opened:
            connection.close()

    def _load_bulk(self, step: dict[str, Any]) -> None:
        before_kib = resident_kib(self._target.pids)
        connection = Connection(self._target, self._case.address)
        connection.reply()
        for said in step.get("first", ()):
            connection.send(self.fill(said))
            connection.reply()
        block = self.fill(step["say"])
        sent = 0
        while sent < step["total_octets"] and connection.send(block):
            sent += len(block)
            if step["say"].count("EHLO") == 0:  # that case never reads its replies
                connection.receive(0.0)
        grown_kib = resident_kib(self._target.pids) - before_kib
        self._expect_bystander_served()
        last = connection.listen(2.0, quiet_s=0.5)
        self._note(f"   ({sent} octets sent, grown by {grown_kib} KiB, last heard {shown(last[-80:])})")
        connection.close()
        if self._target.pids and grown_kib > step.get("growth_kib_max", 65536):
            self.outcome.harms.append(f"the gate grew by {grown_kib} KiB while {sent} octets came")
        if step.get("refused") and not connection.ended and not re.match(rb"[45]", last):
            self.outcome.remarks.append(f"took {sent} octets without a refusal")


def resident_kib(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+)", status)
        total += int(match[1]) if match else 0
    return total


# ------------------------------------------------------------------------------------------------------- judging


def foreign(readings: Iterable[bytes], local: frozenset[str]) -> list[tuple[bytes, str]]:
    """The readings that lie outside the local domains; one without a domain is the server's own mailbox."""
    pairs = ((address, domain_of(address)) for address in readings)
    return [(address, domain) for address, domain in pairs if domain and domain not in local]


def text_differs(octets: bytes, wanted: bytes) -> str | None:
    """None when the content is the wanted text after at most one well-formed trace field; else what is wrong."""
    trace = _TRACE_FIELD.match(octets)
    for text in (octets, octets[trace.end() :] if trace else octets):
        if text == wanted:
            return None
    return f"content is {shown(octets[:120])} ... {shown(octets[-60:])}, wanted {shown(wanted, 60)}"


def judge(outcome: Outcome, play: Play, arrived: list[Transaction], target: Target) -> None:
    """Add the harms that what arrived for this case amounts to."""
    case, harms = outcome.case, outcome.harms
    never = case.never
    for transaction in arrived:
        for recipient in transaction.recipients:
            outside = foreign(recipient.readings, target.local)
            barred = [domain for _, domain in outside if _within(domain, never.get("domains", ()))]
            if case.client == "stranger" and outside:
                address, _ = outside[0]
                how = " > ".join(recipient.readings[address]) or "as it stands"
                harms.append(f"RELAYED to {shown(address)} (read {how}) from RCPT TO:{shown(recipient.argument)}")
            elif barred:
                harms.append(f"delivered to {barred[0]} from RCPT TO:{shown(recipient.argument)}")
        if "reverse_path" in never and re.search(never["reverse_path"].encode(), transaction.reverse_path):
            harms.append(f"SMUGGLED message from {shown(transaction.reverse_path)}")
        if "text" in never and re.search(never["text"].encode("latin-1"), transaction.octets):
            harms.append(f"forbidden text /{never['text']}/ in {shown(transaction.octets)}")
    if case.transactions_max is not None and len(arrived) > case.transactions_max:
        harms.append(f"{len(arrived)} messages arrived, at most {case.transactions_max} may")
    if case.delivers is not None:
        _judge_delivery(case.delivers, play, arrived, harms)


def _within(domain: str, barred: Iterable[str]) -> bool:
    return any(domain == name or domain.endswith(f".{name}") for name in barred)


def _judge_delivery(delivers: dict[str, list[str]], play: Play, arrived: list[Transaction], harms: list[str]) -> None:
    if not arrived:
        harms.append("NOT DELIVERED")
        return
    plainly = {
        address.lower() for t in arrived for r in t.recipients for address, chain in r.readings.items() if not chain
    }
    for mailbox in delivers.get("to", ()):
        wanted = mailbox.encode().lower()
        if wanted not in plainly and not (wanted.startswith(b"postmaster@") and b"postmaster" in plainly):
            harms.append(f"NOT DELIVERED to {mailbox}")
    rest = list(arrived)
    for template in delivers.get("texts", ()):
        wanted = play.fill(template)
        differences = [(transaction, text_differs(transaction.octets, wanted)) for transaction in rest]
        same = [transaction for transaction, difference in differences if difference is None]
        if same:
            rest.remove(same[0])
        else:
            harms.append(f"ALTERED: {differences[0][1] if differences else 'no message left for this text'}")


def sender_of(transaction: Transaction, previous: str) -> str:
    """The address of the client whose octets made this message.

    Without a gate that is the peer.  Behind one our trace field names it; a message without that field was smuggled
    behind another one on the same connection and belongs to the same client.
    """
    if not transaction.peer.startswith("127.0.0.") or transaction.peer == "127.0.0.2":
        return transaction.peer
    trace = _TRACE_FIELD.match(transaction.octets)
    literals = _LITERAL.findall(trace[0]) if trace else []
    return literals[0].decode() if literals else previous


# ------------------------------------------------------------------------------------------------- many cases


@dataclass
class Played:
    """All outcomes of one run, by case id, and what no case explains."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    not_offered: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        families: dict[str, list[int]] = {}
        for outcome in self.outcomes.values():
            tally = families.setdefault(outcome.case.family, [0, 0, 0])
            tally[0 if not outcome.harms and not outcome.remarks else 2 if outcome.harms else 1] += 1
        lines = [f"{'class':12} {'pass':>5} {'remark':>6} {'HARM':>5}"]
        lines += [f"{name:12} {a:5} {b:6} {c:5}" for name, (a, b, c) in sorted(families.items())]
        return "\n".join([*lines, f"not offered here: {len(self.not_offered)}"])


def offered_by(target: Target) -> frozenset[str]:
    """EHLO keywords, those under TLS with a "TLS:" before them."""
    connection = Connection(target, "127.9.255.9")
    try:
        connection.reply()
        connection.send(b"EHLO probe.sender.test\r\n")
        keywords = _keywords(connection.reply() or b"")
        if "STARTTLS" in keywords:
            connection.send(b"STARTTLS\r\n")
            if (connection.reply() or b"").startswith(b"220"):
                connection.start_tls()
                connection.send(b"EHLO probe.sender.test\r\n")
                keywords |= {f"TLS:{keyword}" for keyword in _keywords(connection.reply() or b"")}
    finally:
        connection.close()
    return frozenset(keywords)


def _keywords(reply: bytes) -> set[str]:
    return {line[4:].split()[0].decode("latin-1").upper() for line in reply.splitlines()[1:] if len(line) > 4}


def why_not_offered(case: Case, offered: frozenset[str]) -> str:
    """The first need of a case that the server does not meet, "" when it can be played."""
    met = {need for need in case.needs if need in offered or f"TLS:{need}" in offered}
    met |= {"idn", "login"}  # the configuration of these tests has an IDN; LOGIN comes with AUTH
    if case.client == "stranger":
        met.add("AUTH")  # a stranger who tries to log in where nobody can must stay a stranger
    return next((need for need in case.needs if need not in met), "")


def play_all(
    cases: Iterable[Case],
    target: Target,
    backend: LenientBackend,
    *,
    at_once: int = 48,
) -> Played:
    """Play cases and judge them.

    Strangers come first, side by side: while no one else is there, any outside recipient at the backend is a relay.
    """
    offered = offered_by(target)
    played = Played()
    plays: list[Play] = []
    for case in cases:
        lacking = why_not_offered(case, offered)
        if lacking:
            played.not_offered[case.id] = lacking
        else:
            plays.append(Play(case, target, offered))

    batches: dict[_Batch, list[Play]] = {batch: [] for batch in _Batch}
    for play in plays:
        batches[_batch_of(play.outcome.case)].append(play)
    for batch, members in batches.items():
        if not members:
            continue
        since = len(backend.journal)
        with ThreadPoolExecutor(1 if batch is _Batch.LOADS else at_once) as pool:
            list(pool.map(Play.run, sorted(members, key=_slowest_first)))
        backend.wait_quiet(0.3, 10.0)
        _judge_batch(members, target, backend, since, played)
    return played


class _Batch(Enum):
    """Cases that may be played side by side, in this order."""

    STRANGERS = "any outside recipient at the backend is a relay"
    WORDS = "the same; and a word that the backend must not hear is not said by another case's right"
    OTHERS = "those who may send outside"
    LOADS = "one by one"


def _batch_of(case: Case) -> _Batch:
    if any("load" in step for step in case.steps):
        return _Batch.LOADS
    if case.client != "stranger":
        return _Batch.OTHERS
    return _Batch.WORDS if "command" in case.never else _Batch.STRANGERS


def _slowest_first(play: Play) -> float:
    steps = play.outcome.case.steps
    waits = sum(step.get("listen_s", 0) + step.get("pause_s", 0) + step.get("silence_s", 0) for step in steps)
    return -waits - 5 * any("segment_octets" in step for step in steps)


def _judge_batch(batch: list[Play], target: Target, backend: LenientBackend, since: int, played: Played) -> None:
    by_address: dict[str, list[Transaction]] = {}
    last_on: dict[int, str] = {}
    transactions = backend.transactions(since)
    for transaction in transactions:
        sender = sender_of(transaction, last_on.get(transaction.session, ""))
        last_on[transaction.session] = sender
        by_address.setdefault(sender, []).append(transaction)
    heard = backend.heard(since)
    for play in batch:
        case = play.outcome.case
        arrived = by_address.get(case.address, [])
        if case.client == "trusted" and sum(other.outcome.case.client == "trusted" for other in batch) > 1:
            # one address for all of these: told apart by the reverse-path
            arrived = [t for t in arrived if case.id.encode() in t.reverse_path]
        judge(play.outcome, play, arrived, target)
        if "command" in case.never:
            pattern = re.compile(play.fill(case.never["command"]))
            seen = next((command.line for command in heard if pattern.search(command.line)), None)
            if seen is not None:
                play.outcome.harms.append(f"the backend heard {shown(seen)}")
        played.outcomes[case.id] = play.outcome
    known = {play.outcome.case.address for play in batch} | {target.bystander}
    played.unexplained += [
        f"a message that no case explains, from {shown(t.reverse_path)} to {[shown(r.argument) for r in t.recipients]}"
        for sender, arrived in by_address.items()
        if sender not in known
        for t in arrived
    ]
    if all(play.outcome.case.client == "stranger" for play in batch):
        messages = {id(recipient) for transaction in transactions for recipient in transaction.recipients}
        played.unexplained += [
            f"an outside RCPT reached the backend: {shown(recipient.argument)} from {shown(recipient.reverse_path)}"
            for recipient in backend.recipients(since)
            if id(recipient) not in messages and _is_outside(recipient, target)
        ]


def _is_outside(recipient: Recipient, target: Target) -> bool:
    return bool(foreign(recipient.readings, target.local))
