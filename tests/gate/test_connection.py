"""One client's transport: who half-closes, does not read, vanishes, sends too much, or turns to TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256

import pytest
import pytest_asyncio
import trustme
from tests.gate.scripted_gate import PATIENCE_S, Peer, Trial

from gatepost.gate.connection import READ_HIGH_OCTETS
from gatepost.gate.server import LINGER_S
from gatepost.gate.settings import ListenSettings, Timeouts
from gatepost.policy.relay import TrustEntry
from gatepost.telemetry import REPLIES

BODY = b"Subject: x\r\n\r\nHello\r\n"
TLS = (ListenSettings("mx", (("127.0.0.1", 0),), tls="starttls"),)


@pytest_asyncio.fixture
async def trial(tmp_path, monkeypatch) -> AsyncIterator[Trial]:
    trial = Trial(tmp_path, monkeypatch)
    yield trial
    await trial.close()


# ---- who closes


async def test_commands_directly_before_the_end_are_answered(trial):
    await trial.apply()
    peer = await trial.greeted()
    peer.writer.write(b"MAIL FROM:<a@client.test>\r\nRCPT TO:<bob@example.com>\r\nRSET\r\nQUIT\r\n")
    peer.writer.write_eof()
    assert [line[:3] for line in (await peer.rest()).splitlines()] == ["250", "250", "250", "221"]
    (line,) = await trial.logged()
    assert line["end"] == "quit"


async def test_commands_before_an_end_without_quit_are_answered_too(trial):
    await trial.apply()
    trial.backend().answers_rcpt.clear()
    peer = await trial.greeted()
    peer.writer.write(b"MAIL FROM:<a@client.test>\r\nRCPT TO:<bob@example.com>\r\nNOOP\r\nNOOP")
    peer.writer.write_eof()
    session = trial.session(peer)
    await trial.backend().asked.wait()
    await trial.until(lambda: session.connection.ended.value == "client closed")
    trial.backend().answers_rcpt.set()
    assert [line[:3] for line in (await peer.rest()).splitlines()] == ["250", "250", "250"]
    (line,) = await trial.logged()
    assert line["end"] == "client closed"
    assert trial.backend().deliveries[0].aborted


async def test_an_end_behind_complete_content_does_not_lose_it(trial):
    await trial.apply()
    peer = await trial.in_content()
    peer.writer.write(BODY + b".\r\n")
    peer.writer.write_eof()
    assert await peer.rest() == "250 2.0.0 Taken as 4711\r\n"
    assert trial.backend().contents == [BODY]


@pytest.mark.parametrize("begun", [b"", BODY, BODY + b".", BODY + b".\r", BODY + b"\r\n."])
async def test_the_end_of_octets_is_no_end_of_content(trial, begun):
    await trial.apply()
    peer = await trial.in_content()
    peer.writer.write(begun)
    peer.writer.write_eof()
    await peer.over()
    (line,) = await trial.logged()
    assert line["end"] == "client closed"
    assert line["transactions"][0]["verdict"] == ""
    assert trial.backend().contents == []
    assert trial.backend().deliveries[0].aborted
    assert trial.server.memory.held_octets == 0


async def test_the_end_of_octets_is_no_end_of_a_chunk(trial):
    await trial.apply()
    peer = await trial.greeted()
    await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    peer.writer.write(b"BDAT %d LAST\r\n%s" % (len(BODY) + 1, BODY))
    peer.writer.write_eof()
    await peer.over()
    await trial.logged()
    assert trial.backend().contents == []
    assert trial.backend().deliveries[0].aborted


async def test_a_client_that_vanishes_after_its_content_is_logged_with_what_became_of_it(trial):
    await trial.apply()
    trial.backend().answers_content.clear()
    peer = await trial.in_content()
    session = trial.session(peer)
    await peer.say(BODY + b".\r\n")
    await trial.backend().delivering.wait()
    peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.hang_up()
    await trial.until(lambda: session.connection.ended.value in ("connection lost", "client closed"))
    trial.backend().answers_content.set()
    (line,) = await trial.logged()
    assert line["transactions"][0]["verdict"] == "accepted"
    assert not trial.backend().deliveries[0].aborted


# ---- who does not read


async def test_a_client_that_does_not_read_is_not_read_either_and_misses_nothing(trial):
    await trial.apply()
    trial.bound["mx"].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets inherit both
    trial.bound["mx"].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, trial.address())
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    peer = Peer(reader, writer)
    trial.peers.append(peer)
    await peer.reply()
    await peer.ask("EHLO client.test")
    session = trial.session(peer)
    connection, engine = session.connection, session.engine
    commands = 60_000
    writer.write(b"HELP\r\n" * commands)
    await trial.until(lambda: connection._paused)
    assert connection.waiting
    assert engine.unread_octets <= READ_HIGH_OCTETS + (1 << 18)  # what was allowed, and one read
    assert connection.transport.get_write_buffer_size() < 1 << 18
    heard = 0
    async with asyncio.timeout(PATIENCE_S):
        while heard < commands:
            heard += (await reader.readline()).startswith(b"214 ")
    assert (await peer.ask("QUIT")).startswith("221 ")
    await peer.over()


async def test_reading_stops_while_the_backend_thinks_and_goes_on_afterwards(trial):
    await trial.apply()
    wire = await trial.wired("client")
    trial.backend().answers_rcpt.clear()
    wire.connection.data_received(b"MAIL FROM:<a@client.test>\r\nRCPT TO:<bob@example.com>\r\n")
    await trial.backend().asked.wait()
    wire.connection.data_received(b"NOOP\r\n" * (READ_HIGH_OCTETS // 6))
    assert wire.reading
    wire.connection.data_received(b"NOOP\r\n")
    assert not wire.reading
    trial.backend().answers_rcpt.set()
    await trial.until(lambda: wire.reading)
    assert wire.heard.count(b"250 2.0.0 OK\r\n") == READ_HIGH_OCTETS // 6 + 1


async def test_a_peer_that_does_not_take_the_last_reply_is_cut_a_little_later(trial):
    await trial.apply()
    wire = await trial.wired("client")
    wire.unsent_octets = 20  # the goodbye is still in the transport
    wire.connection.data_received(b"QUIT\r\n")
    await trial.logged()
    assert wire.closing
    trial.sweep(LINGER_S - 0.5)
    assert not wire.aborted
    trial.sweep(0.5)
    assert wire.aborted
    assert not trial.server._lingering


async def test_a_peer_that_took_the_last_reply_is_not_remembered(trial):
    await trial.apply()
    wire = await trial.wired("client")
    wire.connection.data_received(b"QUIT\r\n")
    await trial.logged()
    assert wire.closing
    trial.sweep(2 * LINGER_S)
    assert not wire.aborted


async def test_a_peer_that_reads_nothing_at_all_is_cut_when_its_time_is_over(trial):
    await trial.apply(timeouts=Timeouts(command_s=300))
    wire = await trial.wired("client")
    wire.connection.pause_writing()
    wire.connection.data_received(b"QUIT\r\n")
    await trial.until(lambda: wire.connection.waiting and wire.connection._drained is not None)
    trial.sweep(300)
    assert not wire.aborted
    trial.sweep(1)
    assert wire.aborted
    wire.connection.connection_lost(None)
    (line,) = await trial.logged()
    assert line["end"] == "quit"
    assert trial.server.occupancy.sessions() == 0


# ---- TLS


# Where a rule names a certificate, TLS is another library's: all must hold for both.
CERTIFIED = TrustEntry("g.toml:9", certificate="ab" * 32)
either_way = pytest.mark.parametrize("rules", [{}, {"trust": (CERTIFIED,)}], ids=["loop", "asking"])


def trusting() -> ssl.SSLContext:
    """A client that takes any certificate, as mail servers do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def secured(peer: Peer) -> None:
    assert (await peer.ask("STARTTLS")) == "220 2.0.0 Go ahead"
    async with asyncio.timeout(PATIENCE_S):
        await peer.writer.start_tls(trusting())


@either_way
async def test_behind_starttls_nothing_is_known_and_it_is_not_offered_again(trial, rules):
    await trial.apply(listens=TLS, **rules)
    peer = await trial.connect()
    await peer.reply()
    assert "250-STARTTLS" in await peer.ask("EHLO client.test")
    await secured(peer)
    assert (await peer.ask("MAIL FROM:<a@client.test>")).startswith("503 ")  # RFC 3207 §4.2
    assert "STARTTLS" not in await peer.ask("EHLO inside.test")
    assert (await peer.ask("STARTTLS")).startswith("502 ")
    replies = await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>", "DATA")
    assert [reply[:3] for reply in replies] == ["250", "250", "354"]
    await peer.say(BODY + b".\r\n")
    assert await peer.reply() == "250 2.0.0 Taken as 4711"
    assert (await peer.ask("QUIT")).startswith("221 ")
    (line,) = await trial.logged()
    assert line["tls"] == "TLSv1.3"
    assert line["hello"] == "inside.test"
    assert b"(Gatepost) with ESMTPS id" in trial.backend().deliveries[0].trace_field


async def test_starttls_is_offered_only_where_it_is_configured(trial):
    plain = ListenSettings("plain", (("127.0.0.1", 0),))
    await trial.apply(listens=(*TLS, plain))
    peer = await trial.connect(listen="plain")
    await peer.reply()
    assert "STARTTLS" not in await peer.ask("EHLO client.test")
    assert (await peer.ask("STARTTLS")).startswith("502 ")
    assert (await peer.ask("NOOP")).startswith("250 ")


@either_way
async def test_commands_behind_starttls_are_executed_neither_outside_nor_inside(trial, rules):
    await trial.apply(listens=TLS, **rules)
    peer = await trial.greeted()
    await peer.say(b"STARTTLS\r\nMAIL FROM:<mallory@client.test>\r\n")
    assert (await peer.rest()).startswith("554 5.5.0 ")
    (line,) = await trial.logged()
    assert line["transactions"] == []
    assert line["end"] == "octets behind STARTTLS"


@either_way
async def test_plain_text_where_the_handshake_belongs_ends_the_session(trial, rules):
    await trial.apply(listens=TLS, **rules)
    peer = await trial.greeted()
    assert (await peer.ask("STARTTLS")).startswith("220 ")
    await peer.say(b"EHLO again.test\r\nMAIL FROM:<a@client.test>\r\n")
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionResetError):
            assert b"250" not in await peer.reader.read()  # an alert, perhaps
    (line,) = await trial.logged()
    assert line["end"].startswith("TLS handshake failed")
    assert line["tls"] == ""
    assert line["transactions"] == []
    assert trial.counted(REPLIES, "tls", "error") == 1
    assert trial.lines("fault") == []


@either_way
async def test_a_handshake_that_does_not_come_ends_the_session(trial, rules):
    await trial.apply(listens=TLS, timeouts=Timeouts(tls_handshake_s=0.05), **rules)
    peer = await trial.greeted()
    assert (await peer.ask("STARTTLS")).startswith("220 ")
    await peer.over()
    (line,) = await trial.logged()
    assert line["end"].startswith("TLS handshake failed")
    assert trial.lines("fault") == []


@either_way
async def test_implicit_tls_speaks_first_behind_the_handshake(trial, rules):
    listen = ListenSettings("mx", (("127.0.0.1", 0),), tls="implicit")
    await trial.apply(listens=(listen,), **rules)
    reader, writer = await asyncio.open_connection(*trial.address(), ssl=trusting())
    peer = Peer(reader, writer)
    trial.peers.append(peer)
    assert (await peer.reply()).startswith("220 mx.example.com ")
    assert "STARTTLS" not in await peer.ask("EHLO client.test")
    assert (await peer.ask("QUIT")).startswith("221 ")
    (line,) = await trial.logged()
    assert line["tls"] == "TLSv1.3"


@pytest.mark.parametrize("cut", [0, 1, 100, 1000])
@pytest.mark.parametrize("proxied", [False, True])
@either_way
async def test_a_client_hello_that_is_there_already_is_not_lost(trial, rules, proxied, cut):
    networks = ("127.0.0.1/32",) if proxied else ()
    await trial.apply(
        listens=(ListenSettings("mx", (("127.0.0.1", 0),), tls="implicit", proxy_from=networks),), **rules
    )
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    peer = await trial.connect()
    session_begins = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 465\r\n" if proxied else b""
    await peer.say(session_begins + hello[:cut])
    if proxied or cut:
        await trial.until(lambda: trial.server.sessions)
    await peer.say(hello[cut:])
    greeting = b""
    async with asyncio.timeout(PATIENCE_S):
        while not greeting:
            incoming.write(await peer.reader.read(65536))
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                greeting = client.read()
            peer.writer.write(outgoing.read())
    assert greeting.startswith(b"220 mx.example.com ")
    peer.hang_up()
    (line,) = await trial.logged()
    assert line["tls"] == "TLSv1.3"
    assert line["client"] == ("192.0.2.7" if proxied else "127.0.0.1")


@either_way
async def test_plain_text_to_implicit_tls_hears_no_smtp(trial, rules):
    listen = ListenSettings("mx", (("127.0.0.1", 0),), tls="implicit")
    await trial.apply(listens=(listen,), **rules)
    peer = await trial.connect()
    await peer.say(b"EHLO client.test\r\n")
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionResetError):
            assert b"220" not in await peer.reader.read()
    (line,) = await trial.logged()
    assert line["end"].startswith("TLS handshake failed")


async def test_a_certificate_of_a_rule_opens_what_it_grants_and_another_does_not(trial):
    known, unknown = (trustme.CA().issue_cert("printer.test") for _ in range(2))
    der = ssl.PEM_cert_to_DER_cert(known.cert_chain_pems[0].bytes().decode())
    await trial.apply(listens=TLS, trust=(TrustEntry("g.toml:9", certificate=sha256(der).hexdigest()),))
    for certificate, answer in ((known, "250 "), (unknown, "550 "), (None, "550 ")):
        peer = await trial.greeted()
        context = trusting()
        if certificate is not None:
            certificate.configure_cert(context)
        assert (await peer.ask("STARTTLS")).startswith("220 ")
        async with asyncio.timeout(PATIENCE_S):
            await peer.writer.start_tls(context)
        replies = await peer.asked("EHLO printer.test", "MAIL FROM:<scan@example.com>", "RCPT TO:<a@elsewhere.test>")
        assert replies[2].startswith(answer), replies
        assert (await peer.ask("QUIT")).startswith("221 ")
