"""The conversation: what a client is answered, and what of it the operator finds in the log."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network

import pytest
from tests.gate.scripted_gate import HOUR_S, PATIENCE_S, TRUSTED, Peer, Trial, unlimited

from gatepost.backend.settings import BackendSettings, SmtpAddress
from gatepost.facts import IPAddress, Transaction
from gatepost.gate import server as server_module
from gatepost.gate.session import REPLIES_UNSENT, TRANSACTIONS_LOGGED
from gatepost.policy import relay
from gatepost.policy.relay import DenyEntry, LocalPattern, Route, TrustEntry
from gatepost.smtp.path import ForwardPath, Mailbox, Pattern, Shape
from gatepost.smtp.reply import Reply
from gatepost.store import Refusal, backlog_directory, reference_of, refusal_of, waiting
from gatepost.telemetry import JOURNAL_DROPPED, MESSAGES, REPLIES
from gatepost.verdict import Reason, Refuse

ENTRY = TrustEntry("g.toml:7", why="the printer", network=ip_network(f"{TRUSTED}/32"))
BODY = b"Subject: x\r\n\r\nHello\r\n"


def limited(**rates: int) -> TrustEntry:
    return TrustEntry("g.toml:7", network=ip_network(f"{TRUSTED}/32"), **rates)  # type: ignore[arg-type]


async def relay_attempt(peer: Peer, *forward_paths: str) -> list[str]:
    """One transaction, given up at its end: the replies to its recipients."""
    assert (await peer.ask("MAIL FROM:<a@client.test>")).startswith("250 ")
    replies = await peer.asked(*(f"RCPT TO:<{path}>" for path in forward_paths))
    assert (await peer.ask("RSET")).startswith("250 ")
    return replies


async def send(peer: Peer, content: bytes = BODY) -> str:
    """One message to bob: the reply to its content."""
    replies = await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>", "DATA")
    assert [reply[:3] for reply in replies] == ["250", "250", "354"]
    await peer.say(content + b".\r\n")
    return await peer.reply()


# ---- one message


async def test_a_message_goes_to_the_backend_and_its_reply_to_the_client(trial):
    await trial.apply()
    peer = await trial.greeted()
    assert await send(peer, b"Subject: x\r\n\r\n..dots\r\n") == "250 2.0.0 Taken as 4711"
    assert await peer.ask("QUIT") == "221 2.0.0 mx.example.com closing"
    await peer.over()
    (line,) = await trial.logged()
    (delivery,) = trial.backend().deliveries
    assert delivery.content == b"Subject: x\r\n\r\n.dots\r\n"
    assert delivery.recipients == ["bob@example.com"]
    assert not delivery.aborted
    assert delivery.trace_field.startswith(
        b"Received: from client.test ([127.0.0.1])\r\n\tby mx.example.com (Gatepost)"
    )
    assert f"with ESMTP id {line['reference']}.1\r\n".encode() in delivery.trace_field
    assert (line["end"], line["hello"], line["client"], line["listen"]) == ("quit", "client.test", "127.0.0.1", "mx")
    assert (line["errors"], line["tls"]) == (0, "")
    (transaction,) = line["transactions"]
    assert transaction == {
        "reverse_path": "a@client.test",
        "recipients": [{"forward_path": "bob@example.com", "verdict": "admitted", "by": "g.toml:1"}],
        "size": len(delivery.content),
        "verdict": "accepted",
        "reply": "250 2.0.0 Taken as 4711",
        "message": f"{line['reference']}.1",
    }
    assert trial.counted(MESSAGES, "accepted") == 1


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [(Reply(451, "Not now", "4.3.0"), "deferred"), (Reply(554, "No spam", "5.7.1"), "refused")],
)
async def test_the_backends_refusal_of_content_is_the_clients(trial, reply, verdict):
    await trial.apply()
    trial.backend().content_reply = reply
    peer = await trial.greeted()
    assert await send(peer) == reply.line
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    (transaction,) = line["transactions"]
    assert (transaction["verdict"], transaction["reason"], transaction["reply"]) == (verdict, "backend", reply.line)
    assert trial.counted(MESSAGES, verdict) == 1
    assert trial.counted(MESSAGES, "accepted") == 0


async def test_the_backends_refusal_of_a_recipient_is_the_clients_and_leaves_no_valid_one(trial):
    await trial.apply()
    trial.backend().rcpt_reply = Reply(550, "Who?", "5.1.1")
    peer = await trial.greeted()
    replies = await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>", "DATA", "RSET", "QUIT")
    assert replies[1] == "550 5.1.1 Who?"
    assert replies[2].startswith("554 ")
    (line,) = await trial.logged()
    (recipient,) = line["transactions"][0]["recipients"]
    assert (recipient["verdict"], recipient["reply"]) == ("refused", "550 5.1.1 Who?")
    (delivery,) = trial.backend().deliveries
    assert delivery.aborted
    assert delivery.content is None


# ---- who shares the loop


async def test_who_pipelines_thousands_of_commands_does_not_starve_another_session(trial):
    await trial.apply()
    greedy, modest = await trial.wired("greedy"), await trial.wired("modest")
    del trial.journal[:]
    greedy.connection.data_received(b"NOOP\r\n" * 10_000)
    modest.connection.data_received(b"NOOP\r\n")
    await trial.until(lambda: greedy.heard.count(b"250 ") == 10_000)
    names = [name for name, _ in trial.journal]
    before = b"".join(octets for _, octets in trial.journal[: names.index("modest")])
    assert before.count(b"250 ") <= 2 * REPLIES_UNSENT
    assert modest.heard == b"250 2.0.0 OK\r\n"


async def test_replies_to_a_long_pipeline_do_not_gather_without_bound(trial):
    await trial.apply()
    wire = await trial.wired("greedy")
    wire.connection.pause_writing()  # the peer reads nothing
    wire.connection.data_received(b"NOOP\r\n" * 10_000)
    before = len(wire.heard)
    await trial.until(lambda: wire.connection._drained is not None)
    assert wire.heard[before:].count(b"250 ") <= REPLIES_UNSENT
    wire.connection.resume_writing()
    await trial.until(lambda: wire.heard[before:].count(b"250 ") == 10_000)


async def test_refused_mails_do_not_gather_in_memory(trial):
    own = Reply(450, "Come back when you are well", "4.7.1")
    deny = DenyEntry("g.toml:9", reverse_path=Pattern.parse("*@spam.example"), reply=own)
    await trial.apply(rules={"deny": (deny,)}, limits=unlimited(errors_per_session=3))
    peer = await trial.greeted()
    mails = 2 * TRANSACTIONS_LOGGED + 50
    await peer.say(b"MAIL FROM:<a@spam.example>\r\n" * mails)
    assert {await peer.reply() for _ in range(mails)} == {"450 4.7.1 Come back when you are well"}
    lines = await trial.logged(count=2)
    assert len(trial.session(peer)._transactions) == 50
    await peer.ask("QUIT")
    lines = await trial.logged(count=3)
    assert [len(line["transactions"]) for line in lines] == [TRANSACTIONS_LOGGED, TRANSACTIONS_LOGGED, 50]
    assert len({line["reference"] for line in lines}) == 1
    refusals = [transaction for line in lines for transaction in line["transactions"]]
    assert len({refusal["reference"] for refusal in refusals}) == mails
    assert {(refusal["verdict"], refusal["reason"], refusal["by"]) for refusal in refusals} == {
        ("deferred", "denied", "g.toml:9")
    }


# ---- rates


async def test_messages_of_an_entry_are_counted_once_each_also_behind_a_local_recipient(trial):
    await trial.apply(trust=(limited(messages_per_hour=2),))
    peer = await trial.greeted(TRUSTED)
    for _ in range(2):
        replies = await relay_attempt(
            peer, "bob@example.com", "one@far.example", "two@far.example", "three@far.example"
        )
        assert [reply[:3] for reply in replies] == ["250"] * 4
    local, relayed = await relay_attempt(peer, "bob@example.com", "one@far.example")
    assert local.startswith("250 ")
    assert relayed.startswith("450 4.7.1 ")
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    deferred = line["transactions"][2]["recipients"][1]
    assert (deferred["verdict"], deferred["reason"], deferred["by"]) == ("deferred", "rate", "g.toml:7")
    assert f"[{deferred['reference']}]" in relayed


async def test_local_recipients_use_up_nothing_of_an_entry(trial):
    await trial.apply(trust=(limited(messages_per_hour=1, recipients_per_hour=1),))
    peer = await trial.greeted(TRUSTED)
    for _ in range(3):
        assert (await relay_attempt(peer, "bob@example.com"))[0].startswith("250 ")
    assert (await relay_attempt(peer, "one@far.example"))[0].startswith("250 ")


async def test_recipients_of_an_entry_are_counted_each(trial):
    await trial.apply(trust=(limited(recipients_per_hour=3),))
    peer = await trial.greeted(TRUSTED)
    assert [reply[:9] for reply in await relay_attempt(peer, "a@far.example", "b@far.example")] == ["250 2.1.5"] * 2
    replies = await relay_attempt(peer, "c@far.example", "d@far.example", "bob@example.com")
    assert [reply[:9] for reply in replies] == ["250 2.1.5", "450 4.7.1", "250 2.1.5"]


async def test_what_the_backend_refused_is_not_counted(trial):
    await trial.apply(trust=(limited(messages_per_hour=1, recipients_per_hour=1),))
    trial.backend().rcpt_reply = Reply(450, "Greylisted", "4.7.1")
    peer = await trial.greeted(TRUSTED)
    assert await relay_attempt(peer, "one@far.example") == ["450 4.7.1 Greylisted"]
    trial.backend().rcpt_reply = Reply(250, "OK", "2.1.5")
    assert await relay_attempt(peer, "one@far.example") == ["250 2.1.5 OK"]


async def test_an_hour_later_there_is_room_again(trial):
    await trial.apply(trust=(limited(messages_per_hour=1),))
    peer = await trial.greeted(TRUSTED)
    assert (await relay_attempt(peer, "one@far.example"))[0].startswith("250 ")
    assert (await relay_attempt(peer, "one@far.example"))[0].startswith("450 ")
    trial.now_s += 2 * HOUR_S
    assert (await relay_attempt(peer, "one@far.example"))[0].startswith("250 ")


async def test_messages_to_one_mailbox_are_limited_whoever_sends_them(trial):
    await trial.apply(limits=unlimited(messages_per_hour_per_mailbox=2))
    other, peer = await trial.greeted("127.0.0.4"), await trial.greeted()
    assert (await relay_attempt(other, "bob@example.com"))[0].startswith("250 ")
    assert (await relay_attempt(peer, "bob@example.com"))[0].startswith("250 ")
    replies = await relay_attempt(peer, "BOB@Example.COM", "carol@example.com")
    assert replies[0].startswith("450 4.7.1 ")
    assert replies[1].startswith("250 ")
    await peer.ask("QUIT")
    line = (await trial.logged())[0]
    recipient = line["transactions"][1]["recipients"][0]
    assert (recipient["reason"], recipient["by"]) == ("rate", "g.toml:1")


# ---- what changes between two commands


async def test_an_entry_that_expires_after_mail_grants_nothing_at_rcpt(trial):
    entry = TrustEntry("g.toml:7", network=ip_network(f"{TRUSTED}/32"), expires_at=trial.now_s + 10)
    await trial.apply(trust=(entry,))
    peer = await trial.greeted(TRUSTED)
    await peer.ask("MAIL FROM:<a@client.test>")
    trial.now_s += 9
    assert (await peer.ask("RCPT TO:<one@far.example>")).startswith("250 ")
    trial.now_s += 1
    refusal = await peer.ask("RCPT TO:<two@far.example>")
    assert refusal.startswith("550 5.7.1 Relaying is prohibited: the permission has expired [")
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    recipient = line["transactions"][0]["recipients"][1]
    assert (recipient["reason"], recipient["by"]) == ("expired_trust", "g.toml:7")


class Hosts:
    """Names and their addresses, as DNS would have them."""

    def __init__(self, trusted: set[str], *, denied: set[str]) -> None:
        self.followed = (trusted, denied)

    known: dict[IPAddress, tuple[str, ...]]

    async def start(self) -> None:
        self.known = {}

    async def follow(self, trusted: set[str], *, denied: set[str]) -> None:
        self.followed = (trusted, denied)

    def names(self, address: IPAddress) -> tuple[str, ...]:
        return self.known.get(address, ())

    async def close(self) -> None:
        pass


async def test_a_host_name_that_moves_is_seen_at_the_next_recipient(trial, monkeypatch):
    monkeypatch.setattr(server_module, "HostFollower", Hosts)
    await trial.apply(trust=(TrustEntry("g.toml:7", host="branch.example.net"),))
    hosts = trial.server._hosts
    assert hosts.followed == ({"branch.example.net"}, set())
    peer = await trial.greeted(TRUSTED)
    await peer.ask("MAIL FROM:<a@client.test>")
    assert (await peer.ask("RCPT TO:<one@far.example>")).startswith("550 5.7.1 ")
    hosts.known = {ip_address(TRUSTED): ("branch.example.net",)}
    assert (await peer.ask("RCPT TO:<one@far.example>")).startswith("250 ")
    hosts.known = {ip_address("127.0.0.9"): ("branch.example.net",)}
    assert (await peer.ask("RCPT TO:<two@far.example>")).startswith("550 5.7.1 ")


async def test_a_denied_host_name_is_seen_at_the_next_mail(trial, monkeypatch):
    monkeypatch.setattr(server_module, "HostFollower", Hosts)
    await trial.apply(rules={"deny": (DenyEntry("g.toml:9", host="bad.example.net"),)})
    peer = await trial.greeted()
    assert (await relay_attempt(peer, "bob@example.com"))[0].startswith("250 ")
    trial.server._hosts.known = {ip_address("127.0.0.1"): ("bad.example.net",)}
    assert (await peer.ask("MAIL FROM:<a@client.test>")).startswith("550 5.7.1 ")


async def test_a_reload_holds_for_the_next_command_of_a_running_session(trial):
    await trial.apply()
    peer = await trial.greeted(TRUSTED)
    await peer.ask("MAIL FROM:<a@client.test>")
    assert (await peer.ask("RCPT TO:<one@far.example>")).startswith("550 5.7.1 ")
    await trial.apply(trust=(ENTRY,))
    assert (await peer.ask("RCPT TO:<one@far.example>")).startswith("250 ")
    await trial.apply()
    assert (await peer.ask("RCPT TO:<two@far.example>")).startswith("550 5.7.1 ")


# ---- refusals and the log


async def test_the_reference_in_a_refusal_leads_to_its_evidence(trial):
    deny = DenyEntry("g.toml:9", reverse_path=Pattern.parse("*@spam.example"))
    await trial.apply(rules={"deny": (deny,)})
    peer = await trial.greeted()
    replies = await peer.asked(
        "MAIL FROM:<x@spam.example>",
        "MAIL FROM:<a@client.test>",
        "RCPT TO:<victim@far.example>",
        "RCPT TO:<victim%far.example@example.com>",
        "QUIT",
    )
    (line,) = await trial.logged()
    denied, opened = line["transactions"]
    relaying, routing = opened["recipients"]
    assert [denied["reference"], relaying["reference"], routing["reference"]] == [
        f"{line['reference']}-{number}" for number in (1, 2, 3)
    ]
    assert replies[0] == f"550 5.7.1 Refused by the administrator of this server [{denied['reference']}]"
    assert replies[2] == f"550 5.7.1 Relaying is prohibited [{relaying['reference']}]"
    assert replies[3].endswith(f"routing characters [{routing['reference']}]")
    assert (denied["verdict"], denied["reason"], denied["by"]) == ("refused", "denied", "g.toml:9")
    assert [(r["verdict"], r["reason"]) for r in (relaying, routing)] == [
        ("refused", "relaying"),
        ("refused", "routing"),
    ]
    assert (denied["reply"], relaying["reply"], routing["reply"]) == (replies[0], replies[2], replies[3])
    assert line["errors"] == 3
    assert not trial.backend().deliveries


def kept(trial: Trial, reply: str) -> Refusal | None:
    """What was kept of the refusal whose reference is in this reply."""
    reference = reference_of(reply)
    assert reference is not None, reply
    found = waiting(backlog_directory(str(trial.data)), reference)
    return None if found is None else refusal_of(*found)


async def test_a_refusal_is_kept_with_all_that_it_was_decided_on(trial):
    await trial.apply(trust=(limited(messages_per_hour=1),), rules={"recipients_max": 2})
    peer = await trial.greeted(TRUSTED)
    await relay_attempt(peer, "one@far.example")
    facts = trial.session(peer).facts
    local, rate, routing = await relay_attempt(peer, "bob@example.com", "two@far.example", "a%b.example@example.com")
    assert local.startswith("250 ")
    await trial.until(lambda: kept(trial, routing))
    for reply, reason, path, findings in (
        (rate, Reason.RATE, ForwardPath(Mailbox("two", "far.example"), Shape.PLAIN), 1),
        (routing, Reason.RATE, ForwardPath(Mailbox("a%b.example", "example.com"), Shape.PERCENT), 1),
    ):
        refusal = kept(trial, reply)
        assert refusal is not None
        assert (refusal.stage, refusal.verdict.reason, refusal.reply) == ("rcpt", reason, reply)
        assert refusal.verdict.where == "g.toml:7"
        assert refusal.transaction == Transaction(facts, Mailbox("a", "client.test"), 1, trial.now_s)
        assert (refusal.forward_path, refusal.backend, len(refusal.findings)) == (path, "b", findings)
        assert refusal.findings[0].check == "rate g.toml:7"


async def test_a_refusal_of_the_whole_transaction_is_kept(trial):
    await trial.apply(
        rules={"deny": (DenyEntry("g.toml:9", why="spam", reverse_path=Pattern.parse("*@spam.example")),)}
    )
    peer = await trial.greeted()
    reply = await peer.ask("MAIL FROM:<x@spam.example>")
    await trial.until(lambda: kept(trial, reply))
    refusal = kept(trial, reply)
    assert refusal is not None
    assert (refusal.stage, refusal.forward_path, refusal.backend) == ("mail", None, "")
    assert refusal.verdict == Refuse(Reason.DENIED, "g.toml:9", "spam")
    assert refusal.transaction.reverse_path == Mailbox("x", "spam.example")


async def test_a_refusal_in_the_administrators_words_is_kept_under_the_reference_in_the_log(trial):
    own = Reply(550, "Not from there", "5.7.1")
    deny = DenyEntry("g.toml:9", reverse_path=Pattern.parse("*@spam.example"), reply=own)
    await trial.apply(rules={"deny": (deny,)})
    peer = await trial.greeted()
    assert await peer.asked("MAIL FROM:<x@spam.example>", "QUIT")
    (line,) = await trial.logged()
    reference = line["transactions"][0]["reference"]
    await trial.until(lambda: kept(trial, reference))
    refusal = kept(trial, reference)
    assert refusal is not None
    assert refusal.reply == "550 5.7.1 Not from there"


async def test_where_the_journal_cannot_be_kept_the_session_goes_on_and_the_operator_is_told(trial):
    (trial.data / "journal").write_bytes(b"")  # no directory can be made there
    await trial.apply()
    peer = await trial.greeted()

    async def refused() -> bool:
        (reply,) = await relay_attempt(peer, "one@far.example")
        assert reply.startswith("550 5.7.1 Relaying is prohibited [")
        return bool(trial.lines("journal"))

    async with asyncio.timeout(PATIENCE_S):
        while not await refused():  # noqa: ASYNC110 - whoever is refused next tells of the one that was lost
            await asyncio.sleep(0.001)
    (event,) = await trial.logged("journal")
    assert event["level"] == "warning"
    assert "the journal cannot be written in" in event["text"]
    assert trial.counted(JOURNAL_DROPPED) >= 1


async def test_what_was_refused_before_a_drain_is_kept(trial):
    await trial.apply()
    peer = await trial.greeted()
    replies = [(await relay_attempt(peer, "one@far.example"))[0] for _ in range(20)]
    peer.hang_up()
    await trial.server.drain()
    assert all(kept(trial, reply) for reply in replies)


async def test_who_is_trusted_is_named_in_the_line(trial):
    await trial.apply(trust=(ENTRY,))
    peer = await trial.greeted(TRUSTED)
    await relay_attempt(peer, "one@far.example", "bob@example.com")
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    assert [recipient["by"] for recipient in line["transactions"][0]["recipients"]] == ["g.toml:7", "g.toml:1"]


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_the_nth_error_ends_the_session_and_no_earlier_one(trial, limit):
    await trial.apply(limits=unlimited(errors_per_session=limit))
    peer = await trial.greeted()
    commands = ["WHAT", "RCPT TO:<bob@example.com>", "MAIL FROM:<", "EXPN all", "DATA"]
    for command in commands[: limit - 1]:
        assert (await peer.ask(command)).startswith("5")
        assert (await peer.ask("NOOP")).startswith("250 ")
    assert (await peer.ask(commands[limit - 1])).startswith("5")
    assert await peer.rest() == "421 4.7.0 Too many errors; closing\r\n"
    (line,) = await trial.logged()
    assert (line["errors"], line["end"]) == (limit, "too many errors")


async def test_what_was_pipelined_behind_the_last_error_is_not_executed(trial):
    await trial.apply(limits=unlimited(errors_per_session=1))
    peer = await trial.greeted()
    await peer.say(b"WHAT\r\nMAIL FROM:<a@client.test>\r\nRCPT TO:<bob@example.com>\r\n")
    replies = (await peer.rest()).splitlines()
    assert [reply[:3] for reply in replies] == ["500", "421"]
    assert not trial.backend().deliveries


async def test_two_routes_do_not_meet_in_one_transaction(trial):
    backends = tuple(BackendSettings(name, (SmtpAddress("127.0.0.1", 25),)) for name in ("b", "other"))
    local = (LocalPattern("example.com", "g.toml:1"), LocalPattern("example.org", "g.toml:2"))
    route = Route("g.toml:5", "other", (Pattern.parse("*@example.org"),))
    await trial.apply(backends=backends, rules={"local": local, "routes": (route,)})
    peer = await trial.greeted()
    first, second, third = await relay_attempt(peer, "bob@example.com", "eve@example.org", "carol@example.com")
    assert first.startswith("250 ")
    assert second.startswith("452 4.5.3 ")
    assert third.startswith("250 ")
    assert trial.backend().deliveries[0].recipients == ["bob@example.com", "carol@example.com"]
    assert not trial.backend("other").deliveries
    assert (await relay_attempt(peer, "eve@example.org"))[0].startswith("250 ")
    assert trial.backend("other").deliveries[0].recipients == ["eve@example.org"]


@pytest.mark.parametrize(("recipients", "limit"), [(2, 3), (3, 3), (4, 3)])
async def test_recipients_beyond_the_limit_are_deferred(trial, recipients, limit):
    await trial.apply(rules={"recipients_max": limit})
    peer = await trial.greeted()
    replies = await relay_attempt(peer, *(f"user{number}@example.com" for number in range(recipients)))
    assert [reply[:9] for reply in replies] == (["250 2.1.5"] * limit + ["452 4.5.3"] * recipients)[:recipients]


async def test_a_message_that_says_it_is_too_large_is_refused_at_mail(trial):
    await trial.apply(limits=unlimited(message_size_octets=5000))
    peer = await trial.greeted()
    assert (await peer.ask("MAIL FROM:<a@client.test> SIZE=5001")).startswith("552 5.3.4 ")
    assert (await peer.ask("MAIL FROM:<a@client.test> SIZE=5000")).startswith("250 ")


# ---- the world's faults and our own


async def test_content_that_cannot_be_kept_is_deferred_and_the_next_message_passes(trial):
    await trial.apply(limits=unlimited(message_memory_octets=0))
    temporary = trial.data / "tmp"
    peer = await trial.greeted()
    temporary.rmdir()
    assert (await send(peer)).startswith("452 4.3.1 ")
    assert await send(peer, b"") == "250 2.0.0 Taken as 4711"  # it needs no room
    temporary.mkdir()
    assert await send(peer) == "250 2.0.0 Taken as 4711"
    await peer.ask("QUIT")
    (line,) = await trial.logged()
    (event,) = await trial.logged("storage")
    assert event["level"] == "error"
    told = [(transaction["verdict"], transaction["reply"][:3]) for transaction in line["transactions"]]
    assert told == [("deferred", "452"), ("accepted", "250"), ("accepted", "250")]
    assert line["transactions"][0]["reason"] == "storage"
    assert trial.backend().contents == [b"", BODY]
    assert trial.backend().deliveries[0].aborted


async def test_a_chunk_that_cannot_be_kept_is_deferred_at_once(trial):
    await trial.apply(limits=unlimited(message_memory_octets=0))
    peer = await trial.greeted()
    (trial.data / "tmp").rmdir()
    await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    await peer.say(b"BDAT %d\r\n%s" % (len(BODY), BODY))
    assert (await peer.reply()).startswith("452 4.3.1 ")
    assert (await peer.ask("MAIL FROM:<a@client.test>")).startswith("250 ")
    assert not trial.backend().contents


async def test_a_fault_of_ours_ends_one_session_and_is_in_the_log_alone(trial, monkeypatch):
    await trial.apply()
    peer, other = await trial.greeted(), await trial.greeted()
    await peer.ask("MAIL FROM:<a@client.test>")
    with monkeypatch.context() as patch:

        def decide(*_: object) -> None:
            raise LookupError("the innermost secret")

        patch.setattr(relay, "decide", decide)
        await peer.say(b"RCPT TO:<bob@example.com>\r\n")
        heard = await peer.rest()
    assert heard == "421 4.3.0 Internal error; closing, try again later\r\n"
    (fault,) = await trial.logged("fault")
    (line,) = await trial.logged()
    assert fault["level"] == "error"
    assert fault["reference"] == line["reference"]
    assert fault["text"].startswith("Traceback ")
    assert "the innermost secret" in fault["text"]
    assert line["end"] == "internal error"
    assert trial.counted(REPLIES, "session", "error") == 1
    assert await send(other) == "250 2.0.0 Taken as 4711"
    assert await send(await trial.greeted()) == "250 2.0.0 Taken as 4711"


@pytest.mark.parametrize("last", ["RSET", "QUIT", "EHLO again.test"])
async def test_a_backend_that_fails_when_it_is_let_go_leaves_no_connection_open(trial, last):
    await trial.apply()
    trial.backend().abort_error = LookupError("the innermost secret")
    peer = await trial.greeted()
    await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    await peer.say(last.encode() + b"\r\n")
    assert "secret" not in await peer.rest()
    (fault,) = await trial.logged("fault")
    assert "the innermost secret" in fault["text"]
    await trial.logged()
    assert not trial.server.sessions
    assert await send(await trial.greeted()) == "250 2.0.0 Taken as 4711"


async def test_nobody_talks_before_the_greeting_or_behind_ehlo(trial):
    await trial.apply()
    peer = await trial.connect()
    assert (await peer.reply()).startswith("220 ")
    await peer.say(b"EHLO client.test\r\nMAIL FROM:<a@client.test>\r\n")
    assert (await peer.rest()).startswith("554 5.5.0 ")
    (line,) = await trial.logged()
    assert line["end"] == "unsynchronised"


async def test_content_sent_before_354_ends_the_session(trial):
    await trial.apply()
    peer = await trial.greeted()
    await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>")
    await peer.say(b"DATA\r\nSubject: x\r\n\r\nx\r\n.\r\n")
    assert (await peer.rest()).startswith("554 5.5.0 ")
    assert not trial.backend().contents
