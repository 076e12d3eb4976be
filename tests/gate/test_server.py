"""What all sessions share: listeners, limits, what EHLO offers, timeouts, the reload and the drain."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network

import pytest
from tests.gate.scripted_gate import EVERYTHING, PATIENCE_S, TRUSTED, Peer, Trial, Wire, unlimited

from gatepost.backend.settings import BackendSettings, SmtpAddress
from gatepost.errors import ConfigError, StorageError
from gatepost.gate.connection import Connection
from gatepost.gate.settings import CertificateFiles, ListenSettings, Timeouts, TlsSettings
from gatepost.policy.relay import TrustEntry
from gatepost.smtp.client import Capabilities
from gatepost.telemetry import REPLIES, SESSIONS, SESSIONS_OPEN

BODY = b"Subject: x\r\n\r\nHello\r\n"
ENTRY = TrustEntry("g.toml:7", network=ip_network(f"{TRUSTED}/32"))
TWO = tuple(BackendSettings(name, (SmtpAddress("127.0.0.1", 25),)) for name in ("b", "other"))
TIMEOUT = "421 4.4.2 Timeout; closing\r\n"
DRAINED = "421 4.3.2 This server is going down, try again later\r\n"


async def may_relay(peer: Peer) -> bool:
    await peer.asked("RSET", "MAIL FROM:<a@client.test>")
    return (await peer.ask("RCPT TO:<one@far.example>")).startswith("250 ")


# ---- what EHLO offers


async def offered(trial: Trial) -> set[str]:
    peer = await trial.connect()
    await peer.reply()
    return {line[4:] for line in (await peer.ask("EHLO client.test")).split("\n")[1:]}


async def test_what_all_backends_can_is_offered(trial):
    await trial.apply(backends=TWO)
    assert {"8BITMIME", "SMTPUTF8", "DSN", "PIPELINING", "CHUNKING", "ENHANCEDSTATUSCODES"} <= await offered(trial)


@pytest.mark.parametrize("keyword", ["8BITMIME", "SMTPUTF8", "DSN"])
async def test_what_one_backend_cannot_is_not_offered(trial, keyword):
    trial.capabilities["other"] = Capabilities(EVERYTHING.keywords - {keyword})
    await trial.apply(backends=TWO)
    gone = {keyword} | ({"SMTPUTF8"} if keyword == "8BITMIME" else set())  # RFC 6531 §3.1
    assert {"8BITMIME", "SMTPUTF8", "DSN"} - await offered(trial) == gone
    peer = await trial.greeted()
    parameter = {"8BITMIME": "BODY=8BITMIME", "SMTPUTF8": "SMTPUTF8", "DSN": "RET=HDRS"}[keyword]
    assert (await peer.ask(f"MAIL FROM:<a@client.test> {parameter}")).startswith("555 ")


async def test_while_a_backend_was_never_reached_only_our_own_is_offered(trial):
    trial.capabilities["other"] = None
    await trial.apply(backends=TWO)
    assert not {"8BITMIME", "SMTPUTF8", "DSN"} & await offered(trial)
    trial.backend("other").capabilities = EVERYTHING  # and as soon as it was, at the next EHLO
    assert {"8BITMIME", "SMTPUTF8", "DSN"} <= await offered(trial)


@pytest.mark.parametrize(
    ("own", "first", "second", "size"),
    [
        (50_000, 100_000, None, 50_000),
        (50_000, 20_000, 30_000, 20_000 - 2048),
        (50_000, 50_000, None, 50_000 - 2048),  # our trace field comes on top
        (50_000, None, None, 50_000),
        (0, 20_000, None, 20_000 - 2048),
        (0, None, None, 0),
        (50_000, 2048, None, 1),  # 0 would mean that there is no limit
    ],
)
async def test_the_smallest_size_is_offered(trial, own, first, second, size):
    trial.capabilities = {"b": Capabilities(frozenset(), first), "other": Capabilities(frozenset(), second)}
    await trial.apply(backends=TWO, limits=unlimited(message_size_octets=own))
    assert f"SIZE {size}" in await offered(trial)


async def test_helo_is_answered_in_one_line(trial):
    await trial.apply()
    peer = await trial.connect()
    await peer.reply()
    assert await peer.ask("HELO client.test") == "250 mx.example.com"


# ---- timeouts


async def test_a_client_that_gives_no_command_is_told_so(trial):
    await trial.apply(timeouts=Timeouts(command_s=300))
    peer = await trial.greeted()
    trial.sweep(300)
    assert (await peer.ask("NOOP")).startswith("250 ")
    session = trial.session(peer)
    await trial.until(lambda: session.connection.waiting)
    trial.sweep(300)
    assert (await peer.ask("NOOP")).startswith("250 ")
    await trial.until(lambda: session.connection.waiting)
    trial.sweep(301)
    assert await peer.rest() == TIMEOUT
    (line,) = await trial.logged()
    assert line["end"] == "timeout"


async def test_octets_that_make_no_command_buy_no_time(trial):
    await trial.apply(timeouts=Timeouts(command_s=300))
    peer = await trial.greeted()
    session = trial.session(peer)
    for octet in b"NOO":
        trial.sweep(100)
        unread = session.engine.unread_octets
        await peer.say(bytes([octet]))
        await trial.until(lambda unread=unread: session.engine.unread_octets > unread and session.connection.waiting)
    trial.sweep(1)
    assert await peer.rest() == TIMEOUT


async def test_a_client_that_falls_silent_in_content_is_told_so(trial):
    await trial.apply(timeouts=Timeouts(content_block_s=180))
    peer = await trial.in_content()
    session = trial.session(peer)
    trial.clock_s += 180
    await peer.say(BODY)
    await trial.until(lambda: session.connection.since == trial.clock_s and session.connection.waiting)
    trial.sweep(180)
    assert session.connection.ended.value == "not ended"
    trial.sweep(1)
    assert await peer.rest() == TIMEOUT
    (line,) = await trial.logged()
    assert (line["end"], line["transactions"][0]["verdict"]) == ("timeout", "")
    assert trial.backend().deliveries[0].aborted
    assert trial.server.memory.held_octets == 0


async def test_refused_content_that_keeps_coming_has_its_time(trial):
    await trial.apply(timeouts=Timeouts(content_block_s=180))
    peer = await trial.in_content()
    session = trial.session(peer)
    for _ in range(5):
        trial.clock_s += 100
        await peer.say(b"x" * 2000 + b"\r\n")  # a line that is too long: there is nothing to keep
        await trial.until(lambda: session.connection.since == trial.clock_s and session.connection.waiting)
        trial.sweep()
    await peer.say(b".\r\n")
    assert (await peer.reply()).startswith("5")
    assert (await peer.ask("NOOP")).startswith("250 ")
    assert trial.backend().contents == []


async def test_content_has_a_time_for_all_of_it(trial):
    await trial.apply(timeouts=Timeouts(content_block_s=180, content_total_s=400))
    peer = await trial.in_content()
    session = trial.session(peer)
    for _ in range(4):
        trial.clock_s += 100
        await peer.say(b"Subject: x\r\n")
        await trial.until(lambda: session.connection.since == trial.clock_s and session.connection.waiting)
        trial.sweep()
    trial.sweep(1)
    assert await peer.rest() == TIMEOUT


@pytest.mark.parametrize("command", [b"DATA\r\n", b"BDAT 30\r\n"])
async def test_a_message_pipelined_behind_another_has_its_own_time(trial, command):
    await trial.apply(timeouts=Timeouts(content_block_s=180, content_total_s=400))
    peer = await trial.in_content()
    session = trial.session(peer)
    for _ in range(5):
        trial.clock_s += 100
        envelope = b"MAIL FROM:<a@client.test>\r\nRCPT TO:<bob@example.com>\r\n"
        if command == b"DATA\r\n":
            await peer.say(BODY + b".\r\n" + envelope + command)  # RFC 2920 §3.1 allows it
            wanted = ["250", "250", "250", "354"]
        else:
            await peer.say((b".\r\n" if not session.server.backends["b"].contents else b"BDAT 0 LAST\r\n") + envelope)
            await peer.say(command + b"Subject: thirty octets all\r\n\r\n")
            wanted = ["250", "250", "250", "250"]
        assert [(await peer.reply())[:3] for _ in wanted] == wanted
        await trial.until(lambda: session.connection.since == trial.clock_s and session.connection.waiting)
        trial.sweep()
    replies = await peer.asked("." if command == b"DATA\r\n" else "RSET", "NOOP")
    assert [reply[:3] for reply in replies] == ["250", "250"]


async def test_silence_is_tolerated_for_a_shorter_time_when_sessions_are_scarce(trial):
    await trial.apply(limits=unlimited(sessions=5), timeouts=Timeouts(busy_s=10))
    peers = [await trial.greeted() for _ in range(3)] + [await trial.in_content()]
    trial.sweep(11)  # four of five are not yet more than 80 %
    assert [await peer.ask("NOOP") for peer in peers[:3]] == ["250 2.0.0 OK"] * 3
    await peers[3].say(b"Subject: x\r\n")
    connections = [trial.session(peer).connection for peer in peers]
    await trial.until(lambda: all(c.since == trial.clock_s and c.waiting for c in connections))
    peers.append(await trial.greeted())
    trial.sweep(10)
    assert [connection.ended.value for connection in connections] == ["not ended"] * 4
    trial.sweep(1)
    assert [await peer.rest() for peer in peers] == [TIMEOUT] * 5


async def test_who_waits_for_us_is_not_late(trial):
    await trial.apply()
    trial.backend().answers_content.clear()
    peer = await trial.in_content()
    await peer.say(BODY + b".\r\n")
    await trial.backend().delivering.wait()
    trial.sweep(100_000)
    trial.backend().answers_content.set()
    assert await peer.reply() == "250 2.0.0 Taken as 4711"


# ---- how many


@pytest.mark.parametrize("limit", ["sessions", "sessions_per_client", "sessions_per_minute_per_client"])
async def test_as_many_sessions_as_allowed_and_not_one_more(trial, limit):
    await trial.apply(limits=unlimited(**{limit: 3}))
    peers = [await trial.greeted() for _ in range(3)]
    assert (await (await trial.connect()).rest()).startswith("421 4.")
    reason = "rate" if limit == "sessions_per_minute_per_client" else "busy"
    assert trial.counted(REPLIES, "connect", reason) == 1
    if limit != "sessions":
        await trial.greeted("127.0.0.5")  # another client has its own
    await peers[0].ask("QUIT")
    await trial.logged()
    if limit == "sessions_per_minute_per_client":
        assert (await (await trial.connect()).rest()).startswith("421 4.7.0 ")
    else:
        await trial.greeted()


async def test_sessions_are_counted_in_and_out(trial):
    await trial.apply()
    peers = [await trial.greeted() for _ in range(3)]
    assert (trial.counted(SESSIONS, "mx"), trial.counted(SESSIONS_OPEN, "mx")) == (3, 3)
    await peers[0].ask("QUIT")
    peers[1].hang_up()
    await trial.logged(count=2)
    assert (trial.counted(SESSIONS, "mx"), trial.counted(SESSIONS_OPEN, "mx")) == (3, 1)
    assert trial.server.occupancy.sessions() == 1


# ---- a proxy in front

PROXIED = (ListenSettings("mx", (("127.0.0.1", 0),), proxy_from=("127.0.0.1/32",)),)
NO_PROXY = "421 4.3.0 The PROXY header is missing or wrong; closing\r\n"


@pytest.mark.parametrize("cut", [0, 1, 20, 40])
async def test_a_listed_proxy_says_who_the_client_is(trial, cut):
    await trial.apply(listens=PROXIED, trust=(TrustEntry("g.toml:7", network=ip_network("192.0.2.7/32")),))
    peer = await trial.connect()
    header = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n"
    await peer.say(header[:cut])
    await peer.say(header[cut:])
    assert (await peer.reply()).startswith("220 ")
    await peer.ask("EHLO client.test")
    assert await may_relay(peer)
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert line["client"] == "192.0.2.7"


@pytest.mark.parametrize("said", [b"EHLO client.test\r\n", b"PROXY UNKNOWN\r\n", b"PROXY TCP4 1.2.3 4 5 6\r\n"])
async def test_a_proxy_that_does_not_say_who_the_client_is_is_refused(trial, said):
    await trial.apply(listens=PROXIED)
    peer = await trial.connect()
    await peer.say(said)
    assert await peer.rest() == NO_PROXY
    assert not trial.server.sessions


@pytest.mark.parametrize("said", [b"", b"PROXY TCP4 192.0.2.7"])
async def test_a_proxy_that_says_nothing_is_refused(trial, said):
    await trial.apply(listens=PROXIED, timeouts=Timeouts(proxy_header_s=0.02))
    peer = await trial.connect()
    await peer.say(said)
    assert await peer.rest() == NO_PROXY


async def test_a_stranger_cannot_say_it_is_a_proxy(trial):
    await trial.apply(listens=PROXIED)
    peer = await trial.connect(TRUSTED)
    assert (await peer.reply()).startswith("220 ")
    await peer.say(b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n")
    assert (await peer.rest()).startswith("554 ")
    (line,) = await trial.logged()
    assert line["client"] == TRUSTED


async def test_commands_behind_a_proxy_header_came_before_the_greeting(trial):
    await trial.apply(listens=PROXIED)
    peer = await trial.connect()
    await peer.say(b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\nEHLO client.test\r\n")
    assert (await peer.rest()).startswith("554 5.5.0 ")
    (line,) = await trial.logged()
    assert (line["client"], line["end"]) == ("192.0.2.7", "talked before the greeting")


# ---- reload


async def test_settings_that_cannot_be_used_leave_the_old_ones_in_force(trial, tmp_path):
    await trial.apply(trust=(ENTRY,))
    peer = await trial.greeted(TRUSTED)
    backend = trial.backend()
    (tmp_path / "file").write_text("not a directory")
    changed = (BackendSettings("b", (SmtpAddress("127.0.0.1", 26),)),)
    with pytest.raises(StorageError, match="trace key"):
        await trial.apply(data=str(tmp_path / "file" / "data"), backends=changed)
    listens = (ListenSettings("mx", (("127.0.0.1", 0),), tls="starttls"),)
    with pytest.raises(ConfigError):
        await trial.apply(
            listens=listens,
            tls=TlsSettings((CertificateFiles("/nowhere/tls.pem", "/nowhere/tls.key"),)),
            backends=changed,
        )
    (tmp_path / "halfway" / "keys").mkdir(parents=True)
    (tmp_path / "halfway" / "keys" / "trace.key").write_bytes(bytes(64))
    (tmp_path / "halfway" / "tmp").write_text("not a directory")
    with pytest.raises(StorageError, match="tmp"):
        await trial.apply(data=str(tmp_path / "halfway"), backends=changed)
    assert trial.backend() is backend
    assert not backend.closed
    assert await may_relay(peer)
    again = await trial.greeted(TRUSTED)
    assert await may_relay(again)


async def test_a_first_start_that_fails_can_be_repeated(trial, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError):
        await trial.apply(data=str(tmp_path / "file" / "data"))
    await trial.apply()
    await trial.greeted()


async def test_a_listener_that_is_not_named_any_more_is_closed_and_its_sessions_go_on(trial):
    listens = tuple(ListenSettings(name, (("127.0.0.1", 0),)) for name in ("mx", "second"))
    await trial.apply(listens=listens)
    peer, kept = await trial.greeted(listen="second"), await trial.greeted()
    address = trial.address("second")
    await trial.apply(listens=listens[:1])
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
    assert (await peer.ask("NOOP")).startswith("250 ")
    assert (await kept.ask("NOOP")).startswith("250 ")
    await trial.greeted()


async def test_a_listener_takes_new_settings_without_a_gap(trial):
    await trial.apply()
    running = await trial.greeted()
    await trial.apply(listens=(ListenSettings("mx", (("127.0.0.1", 0),), tls="starttls"),))
    assert "STARTTLS" in await offered(trial)
    assert "STARTTLS" in await running.ask("EHLO again.test")
    assert len(trial.server._listeners["mx"]._servers) == 1


async def test_a_backend_whose_table_did_not_change_keeps_its_connections(trial):
    await trial.apply(backends=TWO)
    first, second = trial.backend("b"), trial.backend("other")
    changed = BackendSettings("other", (SmtpAddress("127.0.0.1", 26),))
    await trial.apply(backends=(TWO[0], changed))
    assert trial.backend("b") is first
    assert trial.backend("other") is not second
    await trial.until(lambda: second.closed)
    assert not first.closed
    await trial.apply(backends=TWO[:1])
    assert list(trial.server.backends) == ["b"]
    assert trial.backend() is first


async def test_a_transaction_ends_at_the_backend_where_it_began(trial):
    await trial.apply()
    backend = trial.backend()
    peer = await trial.in_content()
    await trial.apply(backends=(BackendSettings("b", (SmtpAddress("127.0.0.1", 26),)),))
    assert trial.backend() is not backend
    await peer.say(BODY + b".\r\n")
    assert await peer.reply() == "250 2.0.0 Taken as 4711"
    assert backend.contents == [BODY]
    assert trial.backend().contents == []


# ---- drain


async def test_a_drain_ends_who_is_idle_and_cuts_nobody_in_content(trial):
    await trial.apply()
    idle, in_transaction, chunks = [await trial.greeted() for _ in range(3)]
    content = await trial.in_content()
    await in_transaction.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    await chunks.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    await chunks.say(b"BDAT %d\r\n%s" % (len(BODY), BODY))
    assert (await chunks.reply()).startswith("250 ")
    await trial.until(lambda: all(session.connection.waiting for session in trial.server.sessions))
    drain = asyncio.create_task(trial.server.drain())
    assert await idle.rest() == DRAINED
    assert await in_transaction.rest() == DRAINED
    trial.sweep()
    await content.say(BODY + b".\r\n")
    assert await content.reply() == "250 2.0.0 Taken as 4711"
    trial.sweep()
    assert not drain.done()
    await chunks.say(b"BDAT %d LAST\r\n%s" % (len(BODY), BODY))
    assert await chunks.reply() == "250 2.0.0 Taken as 4711"
    await trial.until(lambda: all(session.connection.waiting for session in trial.server.sessions))
    trial.sweep()
    assert await content.rest() == DRAINED
    assert await chunks.rest() == DRAINED
    async with asyncio.timeout(PATIENCE_S):
        await drain
    assert trial.backend().contents == [BODY, BODY + BODY]
    assert trial.backend().closed
    assert {line["end"] for line in await trial.logged(count=4)} == {"draining"}


async def test_a_drain_waits_for_the_backends_reply(trial):
    await trial.apply()
    trial.backend().answers_content.clear()
    peer = await trial.in_content()
    await peer.say(BODY + b".\r\nMAIL FROM:<a@client.test>\r\n")
    await trial.backend().delivering.wait()
    drain = asyncio.create_task(trial.server.drain())
    await asyncio.sleep(0)
    trial.sweep()
    assert not drain.done()
    trial.backend().answers_content.set()
    # No further message is begun, and the session that asked for one is over.
    assert await peer.rest() == "250 2.0.0 Taken as 4711\r\n" + DRAINED
    async with asyncio.timeout(PATIENCE_S):
        await drain


async def test_nobody_new_is_served_in_a_drain(trial):
    await trial.apply()
    peer = await trial.in_content()
    listener = trial.server._listeners["mx"]
    drain = asyncio.create_task(trial.server.drain())
    await trial.until(lambda: trial.server.draining)
    trial.bound.pop("mx").close()
    host, port = peer.writer.get_extra_info("peername")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, port)
    late = Wire("late", trial.journal)  # accepted just before
    Connection(listener, trial.server.loop).connection_made(late)
    assert late.heard == DRAINED.encode()
    assert late.closing
    await peer.say(BODY + b".\r\n")
    assert (await peer.reply()).startswith("250 ")
    await trial.until(lambda: trial.session(peer).connection.waiting)
    trial.sweep()
    await peer.rest()
    async with asyncio.timeout(PATIENCE_S):
        await drain
    assert len(await trial.logged()) == 1
