"""The resolver against a scripted DNS server on loopback: what is found, what is not, and what is unknown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import uvloop

from gatepost.resolver import Answer, Bounds, Certainty, Following, HostFollower, Resolver

QUICK = Bounds(try_s=0.2, tries=1, budget_s=1.0, ttl_min_s=0.0, none_s=0.0)
SILENT = "silent"
GARBAGE = "garbage"


class Nameserver(asyncio.DatagramProtocol):
    """Answers as ``script`` says: (name, type) to records "TTL TYPE DATA", to an rcode, or to SILENT or GARBAGE."""

    def __init__(self):
        self.script = {}
        self.asked = []
        self.address = ""
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport):
        self._transport = transport
        host, port = transport.get_extra_info("sockname")
        self.address = f"{host}:{port}"

    def datagram_received(self, data, addr):
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text().lower().rstrip(".")
        kind = dns.rdatatype.to_text(query.question[0].rdtype)
        self.asked.append((name, kind))
        answer = self.script.get((name, kind), [])
        if answer == SILENT:
            return
        if answer == GARBAGE:
            self._transport.sendto(data[:2] + b"\xff" * 40, addr)
            return
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if isinstance(answer, str):
            response.set_rcode(dns.rcode.from_text(answer))
        else:
            for line in answer:
                owner, ttl, of_kind, data = line.split()
                response.answer.append(dns.rrset.from_text(owner + ".", int(ttl), "IN", of_kind, data))
        self._transport.sendto(response.to_wire(max_size=60000), addr)


@contextlib.asynccontextmanager
async def nameserver():
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(Nameserver, local_addr=("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def asking(server, bounds=QUICK, **options):
    resolver = Resolver(nameservers=[server.address], bounds=bounds, hosts_file="", **options)
    try:
        yield resolver
    finally:
        await resolver.close()


def addresses(*texts):
    return tuple(map(ip_address, texts))


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come to pass")


# --- One question -----------------------------------------------------------------------------------------------------


async def test_both_kinds_are_found_ipv4_first():
    async with nameserver() as server, asking(server) as resolver:
        server.script["mail.example.com", "A"] = [
            "mail.example.com 300 A 192.0.2.1",
            "mail.example.com 300 A 192.0.2.2",
        ]
        server.script["mail.example.com", "AAAA"] = ["mail.example.com 60 AAAA 2001:db8::1"]
        answer = await resolver.addresses("mail.example.com")
    assert answer.certainty is Certainty.FOUND
    assert set(answer.addresses[:2]) == set(addresses("192.0.2.1", "192.0.2.2"))
    assert answer.addresses[2:] == addresses("2001:db8::1")
    assert answer.ttl_s == 60


@pytest.mark.parametrize("rcode", ["NXDOMAIN", []])
async def test_no_such_name_and_no_such_record_are_certain(rcode):
    async with nameserver() as server, asking(server) as resolver:
        server.script["gone.example.com", "A"] = rcode
        server.script["gone.example.com", "AAAA"] = rcode
        answer = await resolver.addresses("gone.example.com")
    assert answer.certainty is Certainty.NONE
    assert answer.addresses == ()


@pytest.mark.parametrize("failure", ["SERVFAIL", "REFUSED", "NOTIMP", "FORMERR", SILENT, GARBAGE])
async def test_every_failure_is_unknown_never_none(failure):
    async with nameserver() as server, asking(server) as resolver:
        server.script["mail.example.com", "A"] = failure
        server.script["mail.example.com", "AAAA"] = failure
        answer = await resolver.addresses("mail.example.com")
    assert answer.certainty is Certainty.UNKNOWN
    assert answer.why


async def test_one_kind_found_and_the_other_unknown_is_found():
    async with nameserver() as server, asking(server) as resolver:
        server.script["mail.example.com", "A"] = ["mail.example.com 300 A 192.0.2.1"]
        server.script["mail.example.com", "AAAA"] = "SERVFAIL"
        assert (await resolver.addresses("mail.example.com")).addresses == addresses("192.0.2.1")


async def test_one_kind_none_and_the_other_unknown_is_unknown():
    async with nameserver() as server, asking(server) as resolver:
        server.script["mail.example.com", "AAAA"] = "SERVFAIL"
        assert (await resolver.addresses("mail.example.com")).certainty is Certainty.UNKNOWN


async def test_a_server_that_does_not_exist_is_unknown():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    resolver = Resolver(nameservers=[address], bounds=QUICK, hosts_file="")
    try:
        assert (await resolver.addresses("mail.example.com")).certainty is Certainty.UNKNOWN
    finally:
        await resolver.close()


async def test_an_alias_leads_to_addresses_and_its_lifetime_counts():
    async with nameserver() as server, asking(server) as resolver:
        server.script["www.example.com", "A"] = [
            "www.example.com 7 CNAME host.example.net.",
            "host.example.net 900 A 192.0.2.7",
        ]
        answer = await resolver.lookup("www.example.com", "A")
    assert answer.addresses == addresses("192.0.2.7")
    assert answer.ttl_s == 7


async def test_an_alias_that_leads_nowhere_is_certainly_none():
    async with nameserver() as server, asking(server) as resolver:
        server.script["www.example.com", "A"] = ["www.example.com 7 CNAME host.example.net."]
        assert (await resolver.lookup("www.example.com", "A")).certainty is Certainty.NONE


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("A", "127.0.0.1"),
        ("A", "0.0.0.0"),
        ("A", "224.0.0.1"),
        ("AAAA", "::1"),
        ("AAAA", "::"),
        ("AAAA", "::ffff:127.0.0.1"),
    ],
)
async def test_an_answer_that_names_this_host_itself_names_nobody(kind, data):
    """A dynamic name whose owner is away often points to 127.0.0.1, where a local proxy may bring strangers from."""
    async with nameserver() as server, asking(server) as resolver:
        server.script["dyn.example.com", kind] = [f"dyn.example.com 60 {kind} {data}"]
        assert (await resolver.lookup("dyn.example.com", kind)).certainty is Certainty.NONE


async def test_a_mapped_address_is_the_ipv4_address():
    async with nameserver() as server, asking(server) as resolver:
        server.script["six.example.com", "AAAA"] = ["six.example.com 60 AAAA ::ffff:192.0.2.9"]
        assert (await resolver.lookup("six.example.com", "AAAA")).addresses == addresses("192.0.2.9")


async def test_addresses_are_bounded_in_number():
    async with nameserver() as server, asking(server) as resolver:
        many = [f"many.example.com 60 A 198.18.{n // 250}.{n % 250 + 1}" for n in range(400)]
        server.script["many.example.com", "A"] = many
        answer = await resolver.lookup("many.example.com", "A")
    assert len(answer.addresses) == 256


async def test_lifetimes_are_bounded():
    async with nameserver() as server:
        server.script["short.example.com", "A"] = ["short.example.com 0 A 192.0.2.1"]
        server.script["long.example.com", "A"] = ["long.example.com 999999 A 192.0.2.1"]
        async with asking(server, Bounds(try_s=0.2, tries=1, ttl_min_s=5, ttl_max_s=3600)) as resolver:
            assert (await resolver.lookup("short.example.com", "A")).ttl_s == 5
            assert (await resolver.lookup("long.example.com", "A")).ttl_s == 3600


async def test_answers_are_kept_for_their_lifetime_and_no_longer():
    clock = Clock()
    async with nameserver() as server:
        server.script["a.example.com", "A"] = ["a.example.com 0 A 192.0.2.1"]
        async with asking(server, Bounds(try_s=0.2, tries=1, ttl_min_s=10), clock=clock) as resolver:
            assert (await resolver.lookup("a.example.com", "A")).addresses == addresses("192.0.2.1")
            server.script["a.example.com", "A"] = ["a.example.com 0 A 192.0.2.2"]
            clock.now += 9.0
            kept = await resolver.lookup("a.example.com", "A")
            assert kept == Answer(Certainty.FOUND, addresses("192.0.2.1"), 1.0)
            assert len(server.asked) == 1
            clock.now += 1.0
            assert (await resolver.lookup("a.example.com", "A")).addresses == addresses("192.0.2.2")


async def test_unknown_is_not_kept():
    async with nameserver() as server, asking(server) as resolver:
        server.script["a.example.com", "A"] = "SERVFAIL"
        assert (await resolver.lookup("a.example.com", "A")).certainty is Certainty.UNKNOWN
        server.script["a.example.com", "A"] = ["a.example.com 60 A 192.0.2.1"]
        assert (await resolver.lookup("a.example.com", "A")).certainty is Certainty.FOUND


async def test_the_number_of_answers_kept_is_bounded():
    async with nameserver() as server, asking(server, Bounds(try_s=0.2, tries=1, names=3)) as resolver:
        for n in range(5):
            server.script[f"n{n}.example.com", "A"] = [f"n{n}.example.com 60 A 192.0.2.{n + 1}"]
            await resolver.lookup(f"n{n}.example.com", "A")
        assert len(resolver._answers) == 3


async def test_questions_at_once_are_bounded_and_waiting_counts_as_time():
    async with nameserver() as server:
        bounds = Bounds(try_s=5, tries=1, budget_s=2, questions=2)
        async with asking(server, bounds) as resolver:
            for n in range(4):
                server.script[f"n{n}.example.com", "A"] = SILENT
            answers = asyncio.gather(*(resolver.lookup(f"n{n}.example.com", "A") for n in range(4)))
            for _ in range(1000):
                if len(server.asked) >= 2:
                    break
                await asyncio.sleep(0.01)
            for _ in range(100):  # the other two would have been asked long before
                await asyncio.sleep(0)
            assert len(server.asked) == 2
            assert [answer.certainty for answer in await answers] == [Certainty.UNKNOWN] * 4


async def test_whoever_waits_when_the_resolver_closes_gets_unknown():
    async with nameserver() as server:
        server.script["a.example.com", "A"] = SILENT
        resolver = Resolver(nameservers=[server.address], bounds=Bounds(try_s=5, tries=1), hosts_file="")
        waiting = asyncio.ensure_future(resolver.lookup("a.example.com", "A"))
        await until(lambda: server.asked)
        await resolver.close()
        assert (await waiting).certainty is Certainty.UNKNOWN
        assert (await resolver.lookup("a.example.com", "A")).certainty is Certainty.UNKNOWN


async def test_an_address_needs_no_question():
    async with nameserver() as server, asking(server) as resolver:
        assert (await resolver.addresses("192.0.2.1")).addresses == addresses("192.0.2.1")
        assert (await resolver.addresses("2001:db8::1")).addresses == addresses("2001:db8::1")
        assert server.asked == []


async def test_localhost_needs_no_question():
    async with nameserver() as server, asking(server) as resolver:
        assert (await resolver.addresses("localhost")).addresses == addresses("127.0.0.1", "::1")
        assert server.asked == []


async def test_the_hosts_file_comes_first_and_is_read_again_when_it_changes(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.5 Partner.example.com partner # the partner\n\nnonsense\n::1%lo loop\n")
    async with nameserver() as server:
        resolver = Resolver(nameservers=[server.address], bounds=QUICK, hosts_file=str(hosts))
        assert (await resolver.addresses("partner.example.com")).addresses == addresses("127.0.0.5")
        assert (await resolver.addresses("loop")).addresses == addresses("::1")
        hosts.write_text("192.0.2.55 partner.example.com another.example.com\n")
        assert (await resolver.addresses("partner.example.com")).addresses == addresses("192.0.2.55")
        hosts.unlink()
        assert (await resolver.addresses("partner.example.com")).addresses == addresses("192.0.2.55")
        await resolver.close()
        assert server.asked == []


def test_it_works_on_uvloop():
    async def ask():
        async with nameserver() as server, asking(server) as resolver:
            server.script["a.example.com", "A"] = ["a.example.com 60 A 192.0.2.1"]
            server.script["b.example.com", "A"] = SILENT
            await resolver.lookup("b.example.com", "A")
            return await resolver.lookup("a.example.com", "A")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()).addresses == addresses("192.0.2.1")


# --- Following names --------------------------------------------------------------------------------------------------

HERE, THERE = ip_address("192.0.2.1"), ip_address("192.0.2.2")
AT_ONCE = Following(refresh_min_s=0.01, refresh_max_s=0.05, retry_s=0.01, keep_s=1000, first_s=2)


@contextlib.asynccontextmanager
async def following(server, trusted=(), times=AT_ONCE, **options):
    async with asking(server) as resolver:
        follower = HostFollower(trusted, resolver=resolver, times=times, **options)
        await follower.start()
        try:
            yield follower
        finally:
            await follower.close()


def points(server, name, *texts):
    for kind, version in (("A", 4), ("AAAA", 6)):
        server.script[name, kind] = [f"{name} 0 {kind} {t}" for t in texts if ip_address(t).version == version]


def fails(server, name, how="SERVFAIL"):
    server.script[name, "A"] = server.script[name, "AAAA"] = how


async def test_start_waits_for_the_first_answers():
    async with nameserver() as server:
        points(server, "dyn.example.com", "192.0.2.1", "2001:db8::1")
        async with following(server, ["dyn.example.com"]) as follower:
            assert follower.names(HERE) == ("dyn.example.com",)
            assert follower.names(ip_address("2001:db8::1")) == ("dyn.example.com",)
            assert follower.names(THERE) == ()


async def test_a_name_is_followed_as_it_moves():
    async with nameserver() as server:
        points(server, "dyn.example.com", "192.0.2.1")
        async with following(server, ["dyn.example.com"]) as follower:
            points(server, "dyn.example.com", "192.0.2.2")
            await until(lambda: follower.names(THERE))
            assert follower.names(HERE) == ()


async def test_several_names_at_one_address_are_all_named():
    async with nameserver() as server:
        points(server, "a.example.com", "192.0.2.1")
        points(server, "b.example.com", "192.0.2.1")
        async with following(server, ["b.example.com", "a.example.com"]) as follower:
            assert follower.names(HERE) == ("a.example.com", "b.example.com")
            points(server, "a.example.com", "192.0.2.2")
            await until(lambda: follower.names(THERE))
            assert follower.names(HERE) == ("b.example.com",)


async def test_a_name_that_is_gone_matches_nobody_at_once():
    async with nameserver() as server:
        points(server, "dyn.example.com", "192.0.2.1")
        async with following(server, ["dyn.example.com"]) as follower:
            fails(server, "dyn.example.com", "NXDOMAIN")
            await until(lambda: follower.names(HERE) == ())


async def test_while_dns_fails_a_trusted_name_keeps_its_addresses_for_a_bounded_time():
    clock = Clock()
    async with nameserver() as server:
        points(server, "dyn.example.com", "192.0.2.1")
        times = Following(refresh_min_s=30, keep_s=3600, first_s=2)
        async with following(server, ["dyn.example.com"], times=times, clock=clock) as follower:
            clock.now += 30 + 3600 - 0.1
            assert follower.names(HERE) == ("dyn.example.com",)
            clock.now += 0.1
            assert follower.names(HERE) == ()


async def test_a_name_is_asked_for_again_after_a_failure_and_keeps_its_addresses_meanwhile():
    async with nameserver() as server:
        points(server, "dyn.example.com", "192.0.2.1")
        async with following(server, ["dyn.example.com"]) as follower:
            fails(server, "dyn.example.com")
            asked = len(server.asked)
            await until(lambda: len(server.asked) > asked + 4)
            assert follower.names(HERE) == ("dyn.example.com",)
            points(server, "dyn.example.com", "192.0.2.2")
            await until(lambda: follower.names(THERE))


async def test_a_denied_name_keeps_its_addresses_until_dns_speaks():
    clock = Clock()
    async with nameserver() as server:
        points(server, "spam.example.com", "192.0.2.1")
        async with following(
            server, (), denied=["spam.example.com"], clock=clock, times=Following(first_s=2)
        ) as follower:
            clock.now += 10**9
            assert follower.names(HERE) == ("spam.example.com",)


async def test_a_name_that_never_answered_matches_nobody_and_start_returns():
    async with nameserver() as server:
        fails(server, "dyn.example.com", SILENT)
        times = Following(first_s=0.05)
        async with following(server, ["dyn.example.com"], times=times) as follower:
            assert follower.names(HERE) == ()


async def test_new_names_are_followed_and_those_known_stay_known():
    async with nameserver() as server:
        points(server, "a.example.com", "192.0.2.1")
        points(server, "b.example.com", "192.0.2.2")
        async with following(server, ["a.example.com"]) as follower:
            fails(server, "a.example.com")
            await follower.follow(["a.example.com", "b.example.com"])
            assert follower.names(HERE) == ("a.example.com",)
            assert follower.names(THERE) == ("b.example.com",)
            await follower.follow(["b.example.com"])
            assert follower.names(HERE) == ()
            assert follower.names(THERE) == ("b.example.com",)


async def test_a_name_dropped_and_taken_back_is_asked_for_once_in_its_time():
    async with nameserver() as server:
        points(server, "a.example.com", "192.0.2.1")
        times = Following(refresh_min_s=1000, first_s=2)
        async with following(server, ["a.example.com"], times=times) as follower:
            for _ in range(5):
                await follower.follow([])
                assert follower.names(HERE) == ()
                await follower.follow(["a.example.com"])
                assert follower.names(HERE) == ("a.example.com",)
            valid = [due for due, name in follower._due if follower._names[name].due == due]
            assert len(valid) == 1


async def test_many_names_are_followed_with_bounded_questions():
    async with nameserver() as server:
        names = [f"n{n}.example.com" for n in range(200)]
        for n, name in enumerate(names):
            points(server, name, f"198.18.0.{n + 1}")
        async with following(server, names, times=Following(first_s=10)) as follower:
            for n, name in enumerate(names):
                assert follower.names(ip_address(f"198.18.0.{n + 1}")) == (name,)


async def test_a_fault_of_ours_is_heard():
    class Broken(Resolver):
        async def lookup(self, host, record_type):
            raise ZeroDivisionError(host)

    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context["message"]))
    follower = HostFollower(["a.example.com"], resolver=Broken(hosts_file=""), times=Following(first_s=0.05))
    await follower.start()
    await follower.close()
    assert heard == ["host names are no longer followed"]


async def test_a_follower_without_a_resolver_makes_and_closes_its_own():
    follower = HostFollower([])
    await follower.start()
    assert follower.names(HERE) == ()
    await follower.close()
