"""TLS that asks for a certificate: who proves what, and what a hostile client gets out of it.

How: a real ``Connection`` behind a real socket, whose conversation is an echo; clients are Python's ssl, an ssl over
    octets that the test may change on their way, and ``openssl s_client``.
"""

from __future__ import annotations

import asyncio
import datetime
import hmac
import ssl
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import pytest_asyncio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from gatepost.gate import certificates
from gatepost.gate.certificates import AskingTransport
from gatepost.gate.connection import READ_HIGH_OCTETS, Connection, Ended
from gatepost.gate.settings import CertificateFiles, TlsSettings
from gatepost.gate.tls import AskingContext, Secured, Tls, TlsContext

PATIENCE_S = 20.0  # a test that waits for so long has failed
NAME, OTHER = "mx.example.com", "mail.example.org"
NOW = datetime.datetime.now(datetime.UTC)
ONE_READ_OCTETS = 1 << 18


class Pair(NamedTuple):
    """A certificate with its key, in one PEM file."""

    path: str
    der: bytes

    @property
    def fingerprint(self) -> str:
        return sha256(self.der).hexdigest()


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


def made(directory: Path, name: str, key: Any, *, days: int = 30) -> Pair:
    """A self-signed certificate; with negative days one that has expired."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(4711)
        .not_valid_before(NOW - datetime.timedelta(days=60))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .sign(key, digest)
    )
    path = directory / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return Pair(str(path), certificate.public_bytes(serialization.Encoding.DER))


def issued(directory: Path, name: str, *names: str) -> Pair:
    """As an authority that nobody here knows gives it to a server."""
    leaf = trustme.CA().issue_cert(*names)
    path = directory / f"{name}.pem"
    path.write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    return Pair(str(path), certificate.public_bytes(serialization.Encoding.DER))


@pytest.fixture(scope="session")
def presented(directory: Path) -> dict[str, Pair]:
    """What clients may come with."""
    return {
        "self-signed": made(directory, "self-signed", ec.generate_private_key(ec.SECP256R1())),
        "expired": made(directory, "expired", ec.generate_private_key(ec.SECP384R1()), days=-1),
        "rsa": made(directory, "rsa", rsa.generate_private_key(65537, 2048)),
        "ed25519": made(directory, "ed25519", ed25519.Ed25519PrivateKey.generate()),
        "of a mail server": issued(directory, "server", "mail.client.test"),
    }


@pytest.fixture(scope="session")
def ours(directory: Path) -> tuple[Pair, Pair]:
    return issued(directory, "ours", NAME), issued(directory, "ours-too", OTHER, "*.example.net")


@pytest.fixture(scope="session")
def tls(ours: tuple[Pair, Pair], directory: Path) -> Tls:
    files = tuple(CertificateFiles(pair.path, pair.path) for pair in ours)
    return Tls(TlsSettings(files), NAME, str(directory))


# ---- the gate's side


class Engine:
    """Keeps what came; takes nothing by itself."""

    def __init__(self) -> None:
        self.octets = b""

    @property
    def unread_octets(self) -> int:
        return len(self.octets)

    def receive(self, octets: bytes) -> None:
        self.octets += octets

    def taken(self) -> bytes:
        octets, self.octets = self.octets, b""
        return octets


class Gate:
    """A listener whose sessions are an echo behind TLS."""

    def __init__(self, context: TlsContext | AskingContext, timeout_s: float = PATIENCE_S) -> None:
        self.context, self.timeout_s = context, timeout_s
        self.loop = asyncio.get_running_loop()
        self.connections: list[Connection] = []
        self._clients: list[asyncio.StreamWriter] = []
        self.engine = Engine()
        self.secured: asyncio.Future[Secured] = self.loop.create_future()
        self.over: asyncio.Future[Ended] = self.loop.create_future()
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.heard = 0
        self._server: asyncio.Server

    async def open(self) -> Gate:
        self._server = await self.loop.create_server(lambda: Connection(cast("Any", self), self.loop), "127.0.0.1", 0)
        return self

    def accepted(self, connection: Connection) -> None:
        self.connections.append(connection)
        connection.keep(b"")  # as for implicit TLS
        connection.task = self.loop.create_task(self._converse(connection))

    async def _converse(self, connection: Connection) -> None:
        early = connection.take_kept(self.engine) or b""
        try:
            secured = await connection.start_tls(self.context, self.timeout_s, early)
        except OSError as error:
            self.secured.set_exception(error)
            self.over.set_result(connection.ended)
            connection.abort()
            return
        self.secured.set_result(secured)
        while True:
            await self.goes_on.wait()
            more = await connection.more() and connection.ended is Ended.NO
            octets = self.engine.taken()
            self.heard += len(octets)
            if octets and connection.send(octets):
                await connection.drained()
            if not more:
                break
        self.over.set_result(connection.ended)
        connection.close()

    @property
    def port(self) -> int:
        return cast("int", self._server.sockets[0].getsockname()[1])

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that ``close`` ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._clients.append(writer)
        return reader, writer

    async def gained(self) -> Secured:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.shield(self.secured)

    async def refused(self) -> str:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - which words it has is asserted by the caller
                await asyncio.shield(self.secured)
        assert self.engine.octets == b""
        assert self.heard == 0
        return str(caught.value)

    async def ended(self) -> Ended:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.shield(self.over)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the conditions are the gate's own, and it tells nobody
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        self._server.close()
        self.goes_on.set()
        for writer in self._clients:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
        for connection in self.connections:
            connection.abort()
            assert connection.task is not None
            async with asyncio.timeout(PATIENCE_S):
                await connection.task
        if self.secured.done():
            self.secured.exception()
        await self._server.wait_closed()


OpenGate = Callable[..., Any]


@pytest_asyncio.fixture
async def gates(tls: Tls) -> AsyncIterator[OpenGate]:
    opened: list[Gate] = []

    async def gate(context: TlsContext | AskingContext | None = None, **changes: Any) -> Gate:
        opened.append(await Gate(context or tls.asking("1.2"), **changes).open())
        return opened[-1]

    yield gate
    for one in opened:
        await one.close()


# ---- clients


def client(pair: Pair | None = None, version: str = "", ciphers: str = "DEFAULT:@SECLEVEL=0") -> ssl.SSLContext:
    """A client that takes any certificate, presents this one, and speaks this version alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(ciphers)
    if pair is not None:
        context.load_cert_chain(pair.path)
    if version:
        with warnings.catch_warnings(action="ignore"):  # that the old versions are old
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    return context


class Wire:
    """A client whose every octet the test may see, keep, change or repeat."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: ssl.SSLObject

    @classmethod
    async def to(cls, gate: Gate, context: ssl.SSLContext | None = None, name: str | None = None) -> Wire:
        wire = cls(*await gate.client())
        wire.tls = (context or client()).wrap_bio(wire.incoming, wire.outgoing, server_hostname=name)
        return wire

    async def step(self) -> None:
        """Read something."""
        async with asyncio.timeout(PATIENCE_S):
            octets = await self.reader.read(65536)
        if octets:
            self.incoming.write(octets)
        else:
            self.incoming.write_eof()

    async def shake(self, change: Callable[[bytes], bytes] = bytes) -> None:
        """The handshake; ``change`` is given each flight.  The last one is left for ``flush``."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.writer.write(change(self.outgoing.read()))
                await self.step()
            else:
                return

    def flush(self, change: Callable[[bytes], bytes] = bytes) -> None:
        self.writer.write(change(self.outgoing.read()))

    async def connected(self) -> Wire:
        await self.shake()
        self.flush()
        return self

    def say(self, octets: bytes) -> None:
        self.tls.write(octets)
        self.flush()

    async def hear(self, size: int) -> bytes:
        """So many octets, or fewer where the gate ends."""
        heard = b""
        while len(heard) < size:
            try:
                octets = self.tls.read(size - len(heard))
            except ssl.SSLWantReadError:
                await self.step()
                continue
            if not octets:
                break
            heard += octets
        return heard

    async def gone(self) -> bool:
        """The gate closes."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionResetError):
                while await self.reader.read(65536):
                    pass
        return True


@pytest.fixture
def each_context(tls: Tls) -> dict[str, TlsContext | AskingContext]:
    return {"loop": tls.context("1.2"), "asking": tls.asking("1.2")}


VERSIONS = {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}
each_version = pytest.mark.parametrize("version", VERSIONS)
either_way = pytest.mark.parametrize("way", ["loop", "asking"])


# ---- who proves what


@each_version
@pytest.mark.parametrize("kind", ["self-signed", "expired", "rsa", "ed25519", "of a mail server"])
async def test_any_certificate_is_known_by_its_sha_256(gates, presented, kind, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(presented[kind], version))).connected()
    secured = await gate.gained()
    assert secured.certificate == presented[kind].fingerprint
    assert secured.version == VERSIONS[version]
    assert secured.cipher == wire.tls.cipher()[0]  # type: ignore[index]
    wire.say(b"EHLO client.test\r\n")
    assert await wire.hear(18) == b"EHLO client.test\r\n"


@each_version
async def test_a_client_without_certificate_is_served_all_the_same(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    assert (await gate.gained()).certificate == ""
    wire.say(b"NOOP\r\n")
    assert await wire.hear(6) == b"NOOP\r\n"


async def test_where_no_rule_names_a_certificate_none_is_asked_for(gates, presented, tls):
    gate = await gates(tls.context("1.2"))
    await (await Wire.to(gate, client(presented["rsa"]))).connected()
    assert (await gate.gained()).certificate == ""


def records(octets: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each record."""
    while octets:
        size = int.from_bytes(octets[3:5], "big")
        yield octets[0], octets[5 : 5 + size]
        octets = octets[5 + size :]


def record(kind: int, body: bytes) -> bytes:
    return bytes((kind, 3, 3)) + len(body).to_bytes(2, "big") + body


def handshake_message(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


def sized(octets: bytes) -> bytes:
    return len(octets).to_bytes(3, "big") + octets


async def test_a_certificate_without_its_key_opens_nothing(gates, presented):
    """A copy of the certificate is public knowledge; the thief signs with a key of his own."""
    stolen = presented["self-signed"]
    thief = presented["expired"]
    swapped = []

    def change(flight: bytes) -> bytes:
        changed = b""
        for kind, body in records(flight):
            # One handshake message a record; 11 is Certificate (RFC 5246 §7.4).
            if kind == 22 and body[0] == 11:
                size = 4 + int.from_bytes(body[1:4], "big")
                swapped.append(size)
                body = handshake_message(11, sized(sized(stolen.der))) + body[size:]  # noqa: PLW2901
            changed += record(kind, body)
        return changed

    gate = await gates()
    wire = await Wire.to(gate, client(thief, "TLSv1_2"))
    with pytest.raises(ssl.SSLError):
        await wire.shake(change)
    assert swapped
    assert "signature" in await gate.refused()


# ---- version and name


@either_way
@pytest.mark.parametrize("name", [None, NAME, OTHER, "unknown.test", "any.example.net"])
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
async def test_no_name_makes_an_older_version_possible(gates, each_context, way, name, version):
    gate = await gates(each_context[way])
    wire = await Wire.to(gate, client(None, version), name)
    with pytest.raises(ssl.SSLError):
        await wire.shake()
    assert await gate.refused()


@either_way
@pytest.mark.parametrize("name", [NAME, OTHER])
@pytest.mark.parametrize(("version", "spoken"), [("TLSv1", "TLSv1"), ("TLSv1_1", "TLSv1.1"), ("TLSv1_3", "TLSv1.3")])
async def test_an_old_device_is_spoken_to_where_its_minimum_allows_it(
    gates, tls, presented, way, name, version, spoken
):
    gate = await gates({"loop": tls.context, "asking": tls.asking}[way]("1.0"))
    wire = await (await Wire.to(gate, client(presented["rsa"], version), name)).connected()
    secured = await gate.gained()
    assert secured.version == spoken
    assert secured.certificate == (presented["rsa"].fingerprint if way == "asking" else "")
    wire.say(b"NOOP\r\n")
    assert await wire.hear(6) == b"NOOP\r\n"


@either_way
@each_version
@pytest.mark.parametrize(
    ("name", "index"),
    [(None, 0), (NAME, 0), (OTHER, 1), (OTHER.upper(), 1), ("a.example.net", 1), ("unknown.test", 0), ("x" * 63, 0)],
)
async def test_the_certificate_is_that_of_the_name(gates, each_context, ours, way, version, name, index):
    gate = await gates(each_context[way])
    wire = await (await Wire.to(gate, client(None, version), name)).connected()
    secured = await gate.gained()
    assert wire.tls.getpeercert(binary_form=True) == ours[index].der
    assert secured.bindings["tls-server-end-point"] == sha256(ours[index].der).digest()


# ---- channel bindings


@either_way
async def test_tls_unique_is_the_same_at_both_ends_and_not_there_in_tls_1_3(gates, each_context, way):
    gate = await gates(each_context[way])
    wire = await (await Wire.to(gate, client(None, "TLSv1_2"))).connected()
    assert (await gate.gained()).bindings["tls-unique"] == wire.tls.get_channel_binding("tls-unique")
    assert "tls-exporter" not in (await gate.gained()).bindings
    newer = await gates(each_context[way])
    wire = await (await Wire.to(newer, client(None, "TLSv1_3"))).connected()
    assert "tls-unique" not in (await newer.gained()).bindings


async def shake_hands(other: SSL.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As the client, over memory; its last octets are left for the caller to send."""
    other.set_connect_state()
    while True:
        try:
            other.do_handshake()
            break
        except SSL.WantReadError:
            writer.write(other.bio_read(65536))
            other.bio_write(await reader.read(65536))


async def test_tls_exporter_is_the_same_at_both_ends(gates):
    gate = await gates()
    reader, writer = await gate.client()
    other = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    await shake_hands(other, reader, writer)
    writer.write(other.bio_read(65536))
    theirs = other.export_keying_material(b"EXPORTER-Channel-Binding", 32, b"")
    assert (await gate.gained()).bindings["tls-exporter"] == theirs


# ---- what an attacker may try


async def test_plain_text_in_place_of_the_handshake_is_never_passed_up(gates):
    gate = await gates()
    wire = await Wire.to(gate)
    wire.writer.write(b"MAIL FROM:<mallory@client.test>\r\n")
    assert await gate.refused()
    assert await wire.gone()


async def test_plain_text_behind_the_handshake_is_never_passed_up(gates):
    gate = await gates()
    wire = await Wire.to(gate)
    await wire.shake()
    wire.flush(lambda flight: flight + b"MAIL FROM:<mallory@client.test>\r\n")
    await gate.gained()
    assert await gate.ended() is Ended.LOST
    assert gate.heard == 0
    assert await wire.gone()


async def test_plain_text_before_the_end_of_the_handshake_is_never_passed_up(gates):
    gate = await gates()
    wire = await Wire.to(gate)
    await wire.shake()
    wire.flush(lambda flight: record(23, b"MAIL FROM:<mallory@client.test>\r\n") + flight)
    assert await gate.refused()
    assert await wire.gone()


@each_version
async def test_what_comes_with_the_last_flight_is_heard(gates, presented, version):
    gate = await gates()
    wire = await Wire.to(gate, client(presented["rsa"], version))
    await wire.shake()
    if version == "TLSv1_3":
        wire.tls.write(b"EHLO client.test\r\n")  # in one segment with Certificate and Finished
        wire.flush()
    else:
        wire.flush()
        wire.say(b"EHLO client.test\r\n")
    assert await wire.hear(18) == b"EHLO client.test\r\n"


def protocol_of(gate: Gate) -> asyncio.BaseProtocol:
    return gate.connections[0].transport.get_protocol()


@each_version
async def test_octet_by_octet_is_the_same(gates, presented, version):
    gate = await gates()
    wire = await Wire.to(gate, client(presented["rsa"], version))

    def dribble(flight: bytes) -> bytes:
        """As the socket would give it; TCP itself may join what a client sends apart."""
        for octet in flight:
            protocol.data_received(bytes((octet,)))
        return b""

    await gate.until(lambda: gate.connections and isinstance(protocol_of(gate), AskingTransport))
    protocol = cast("AskingTransport", protocol_of(gate))
    await wire.shake(dribble)
    wire.flush(dribble)
    assert (await gate.gained()).certificate == presented["rsa"].fingerprint
    wire.say(b"NOOP\r\n")
    assert await wire.hear(6) == b"NOOP\r\n"


async def test_a_handshake_that_does_not_come_takes_no_longer_than_it_may(gates):
    gate = await gates(timeout_s=0.05)
    wire = await Wire.to(gate)
    assert await gate.refused() == "TLS handshake took too long"
    assert await wire.gone()


async def test_a_handshake_that_comes_slowly_takes_no_longer_than_it_may(gates):
    gate = await gates(timeout_s=0.2)
    wire = await Wire.to(gate)
    with pytest.raises(ssl.SSLWantReadError):
        wire.tls.do_handshake()
    for octet in wire.outgoing.read()[:-1]:
        wire.writer.write(bytes((octet,)))
        await asyncio.sleep(0.002)
        if gate.secured.done():
            break
    assert await gate.refused() == "TLS handshake took too long"


@pytest.mark.parametrize("size", [(1 << 14) + 256 + 1, 0xFFFF])
@pytest.mark.parametrize("when", ["before", "behind"])
async def test_a_huge_record_is_refused_at_its_header(gates, size, when):
    gate = await gates()
    wire = await Wire.to(gate)
    if when == "behind":
        await wire.connected()
        await gate.gained()
    wire.writer.write(bytes((22 if when == "before" else 23, 3, 3)) + size.to_bytes(2, "big") + b"\0" * 64)
    if when == "before":
        assert await gate.refused()
    else:
        assert await gate.ended() is Ended.LOST
    assert await wire.gone()
    assert gate.heard == 0


async def test_a_certificate_list_that_does_not_end_is_refused(gates, presented):
    def change(flight: bytes) -> bytes:
        changed = b""
        for kind, body in records(flight):
            if kind == 22 and body[0] == 11:
                return changed + record(22, b"\x0b\x02\x00\x00" + sized(b"")) + record(22, b"\0" * (1 << 14)) * 8
            changed += record(kind, body)
        return changed

    gate = await gates()
    wire = await Wire.to(gate, client(presented["rsa"], "TLSv1_2"))
    with suppress(ssl.SSLError, ConnectionError):
        await wire.shake(change)
    assert "excessive message size" in await gate.refused()


async def test_a_flood_of_change_cipher_spec_ends_the_handshake(gates):
    """TLS 1.3 drops them (RFC 8446 §5), but not for ever."""
    gate = await gates()
    wire = await Wire.to(gate, client(None, "TLSv1_3"))
    await wire.shake()
    wire.flush(lambda _: record(20, b"\1") * 1000)
    assert await gate.refused()
    assert await wire.gone()


def empty_records(wire: SSL.Connection, count: int) -> bytes:
    """What no library sends: records of TLS 1.2 without content, well encrypted.  RFC 5246 §6.3, RFC 5288 §3."""
    master, server, client_ = wire.master_key(), wire.server_random(), wire.client_random()
    assert master
    assert server
    assert client_
    label = b"key expansion" + server + client_
    block, seed = b"", label
    while len(block) < 40:
        seed = hmac.digest(master, seed, "sha256")
        block += hmac.digest(master, seed + label, "sha256")
    key, fixed = AESGCM(block[:16]), block[32:36]
    made = b""
    for number in range(1, count + 1):  # 0 was Finished
        explicit = number.to_bytes(8, "big")
        made += record(23, explicit + key.encrypt(fixed + explicit, b"", explicit + bytes((23, 3, 3, 0, 0))))
    return made


@pytest.mark.parametrize("count", [1, 30, 1000])
async def test_a_flood_of_empty_records_ends_the_connection(gates, count):
    """An empty record costs us a decryption and brings nothing."""
    gate = await gates()
    reader, writer = await gate.client()
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(b"ECDHE+AES128+AESGCM")
    other = SSL.Connection(context, None)
    await shake_hands(other, reader, writer)
    writer.write(empty_records(other, count))
    if count < 32:
        await gate.gained()
        await asyncio.sleep(0.05)
        assert not gate.over.done()
    else:
        assert await gate.ended() is Ended.LOST
    assert gate.heard == 0


@each_version
async def test_a_changed_record_ends_the_connection_and_nothing_of_it_is_believed(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    wire.say(b"NOOP\r\n")
    assert await wire.hear(6) == b"NOOP\r\n"
    wire.tls.write(b"MAIL FROM:<a@client.test>\r\n")
    wire.flush(lambda octets: octets[:-1] + bytes((octets[-1] ^ 1,)))
    wire.say(b"RCPT TO:<b@example.com>\r\n")
    assert await gate.ended() is Ended.LOST
    assert gate.heard == 6


@each_version
async def test_a_record_repeated_ends_the_connection(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    wire.tls.write(b"NOOP\r\n")
    wire.flush(lambda octets: octets + octets)
    assert await gate.ended() is Ended.LOST
    assert gate.heard <= 6


@either_way
@each_version
async def test_a_cut_connection_is_an_end_of_octets(gates, each_context, way, version):
    gate = await gates(each_context[way])
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    wire.say(b"DATA\r\n")
    assert await wire.hear(6) == b"DATA\r\n"
    wire.writer.write_eof()  # of TCP; no close_notify
    assert await gate.ended() in (Ended.EOF, Ended.LOST)
    assert gate.heard == 6


@each_version
async def test_who_said_close_notify_still_hears_the_replies(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    gate.goes_on.clear()
    wire.tls.write(b"QUIT\r\n")
    with suppress(ssl.SSLWantReadError):
        wire.tls.unwrap()
    closing = wire.outgoing.read()
    wire.writer.write(closing)
    await gate.until(lambda: gate.connections[0].ended is not Ended.NO)
    gate.goes_on.set()
    assert await gate.ended() is Ended.EOF
    assert await wire.gone()
    assert gate.heard == 6


@either_way
@each_version
async def test_who_says_close_notify_and_closes_is_let_go(gates, each_context, way, version):
    gate = await gates(each_context[way])
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    wire.say(b"NOOP\r\n")
    assert await wire.hear(6) == b"NOOP\r\n"
    with suppress(ssl.SSLWantReadError):
        wire.tls.unwrap()
    wire.flush()
    wire.writer.close()
    assert await gate.ended() in (Ended.EOF, Ended.LOST)
    task = gate.connections[0].task
    assert task is not None
    async with asyncio.timeout(PATIENCE_S):
        await task


@each_version
async def test_nothing_behind_close_notify_is_passed_up(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    gate.goes_on.clear()
    with suppress(ssl.SSLWantReadError):
        wire.tls.unwrap()
    wire.flush(lambda octets: octets + record(23, b"MAIL FROM:<mallory@client.test>\r\n") * 3 + b"MAIL FROM:<>\r\n")
    await gate.until(lambda: gate.connections[0].ended is not Ended.NO)
    wire.writer.write(b"MAIL FROM:<>\r\n" * 1000)
    gate.goes_on.set()
    assert await gate.ended() is Ended.EOF
    assert gate.heard == 0
    assert await wire.gone()


async def test_a_client_that_vanishes_in_the_handshake_is_an_error(gates):
    gate = await gates()
    wire = await Wire.to(gate)
    with pytest.raises(ssl.SSLWantReadError):
        wire.tls.do_handshake()
    wire.flush(lambda flight: flight[:50])
    await gate.until(lambda: gate.connections)
    wire.writer.write_eof()
    assert await gate.refused() == "the client closed in the TLS handshake"


async def test_a_connection_that_is_lost_in_the_handshake_is_an_error(gates):
    gate = await gates()
    await Wire.to(gate)
    await gate.until(lambda: gate.connections)
    gate.connections[0].transport.abort()
    assert "connection lost" in await gate.refused()


# ---- back-pressure


@each_version
async def test_reading_stops_with_octets_in_the_library_and_none_is_lost(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    gate.goes_on.clear()
    sent = bytes(range(256)) * (1 << 14)  # 4 MiB
    for start in range(0, len(sent), 1 << 14):
        wire.say(sent[start : start + (1 << 14)])
    connection = gate.connections[0]
    await gate.until(lambda: connection._paused)
    await asyncio.sleep(0.05)
    assert gate.engine.unread_octets <= READ_HIGH_OCTETS + certificates.RECORD_OCTETS
    hears = asyncio.get_running_loop().create_task(wire.hear(len(sent)))
    gate.goes_on.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await hears == sent


@each_version
async def test_who_does_not_read_is_not_read_either(gates, version):
    gate = await gates()
    wire = await (await Wire.to(gate, client(None, version))).connected()
    await gate.gained()
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    transport = gate.connections[0].transport
    assert isinstance(transport, AskingTransport)
    block = b"x" * (1 << 14)

    sent = 0

    async with asyncio.timeout(PATIENCE_S):
        while not transport._blocked:
            wire.say(block)
            sent += len(block)
            await asyncio.sleep(0)
    assert not transport._reading
    heard = gate.heard
    for _ in range(64):
        wire.say(block)
        sent += len(block)
    await asyncio.sleep(0.05)
    assert gate.heard <= heard + READ_HIGH_OCTETS
    assert transport.get_write_buffer_size() < 4 * ONE_READ_OCTETS
    wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert await wire.hear(sent) == b"x" * sent


# ---- openssl's own client


async def s_client(gate: Gate, *arguments: str, say: bytes = b"NOOP\r\n", updates: int = 0) -> str:
    """What it printed until its line came back; so many key updates are sent, each with the wish for one, before it."""
    process = await asyncio.create_subprocess_exec(
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{gate.port}",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    heard = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(updates):
                process.stdin.write(b"K\n")  # a command only where nothing else is read with it
                while b"KEYUPDATE" not in heard:
                    heard += await process.stdout.read(65536)
                heard = heard.replace(b"KEYUPDATE", b"")
            process.stdin.write(say)
            while octets := await process.stdout.read(65536):
                heard += octets
                if b"NOOP\r\n" in heard and b"Verify return code" in heard:
                    break
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return heard.decode("latin-1")


@pytest.mark.parametrize("extra", [(), ("-tls1_2",), ("-tls1_3",), ("-no_ticket",)])
async def test_openssl_proves_its_certificate(gates, presented, extra):
    pair = presented["rsa"]
    gate = await gates()
    said = await s_client(gate, "-cert", pair.path, "-key", pair.path, "-servername", OTHER, *extra)
    assert "NOOP" in said
    assert (await gate.gained()).certificate == pair.fingerprint


async def test_openssl_is_told_nothing_about_which_certificates_are_known(gates):
    gate = await gates()
    assert "No client certificate CA names sent" in await s_client(gate)


async def test_key_updates_are_answered(gates):
    gate = await gates()
    said = await s_client(gate, "-tls1_3", updates=3)
    assert "NOOP" in said
    assert gate.heard == 6


async def test_renegotiation_is_refused(gates, presented):
    gate = await gates()
    said = await s_client(gate, "-tls1_2", say=b"R\n")
    assert "no renegotiation" in said


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@either_way
async def test_no_ticket_is_given_that_anything_could_be_read_from(gates, each_context, way, version):
    """A ticket of state is that state under a key that lives as long as the process: no forward secrecy."""
    gate = await gates(each_context[way])
    assert "TLS session ticket:" not in await s_client(gate, version)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_a_certificate_is_proved_anew_in_each_connection(gates, directory, presented, version):
    session, pair = directory / f"session{version}", presented["rsa"]
    assert "NOOP" in await s_client(
        await gates(), version, "-cert", pair.path, "-key", pair.path, "-sess_out", str(session)
    )
    second = await gates()
    said = await s_client(second, version, *(["-sess_in", str(session)] if session in directory.iterdir() else []))
    assert "NOOP" in said
    assert "Reused, " not in said
    assert (await second.gained()).certificate == ""
