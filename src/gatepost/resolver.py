"""DNS as one deep module: a name to its addresses, with a budget of time, and with "unknown" as an answer.

Why: a grant to a DNS name is as good as the answer of this minute; and a server that takes silence for "no such name"
    refuses good mail, or for "still the same" lets a stranger in.
Trust: answers come from the network, through the host's own resolver.  Who can forge them can be a trusted host; a
    validating resolver on this host (DNSSEC) is the remedy.  They are bounded in number and in lifetime, and an answer
    that names this host itself (127.0.0.1, as dead dynamic names do) names nobody.
Promise: ``Answer`` is found, certainly none, or unknown; never an exception.  ``HostFollower.names`` asks nobody.
    While DNS is silent a trusted name keeps its last addresses for ``Following.keep_s`` beyond their lifetime, then it
    matches nobody; a denied name keeps them until DNS speaks again.
Sources: RFC 1035 §3.2.1 (TTL), RFC 2308 §2 (NXDOMAIN, NODATA), RFC 2181 §8 (TTL as a bound), RFC 8767 (stale answers),
    RFC 6761 §6.3 (localhost).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from heapq import heappop, heappush
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Literal, NamedTuple

import aiodns
import aiodns.error

Address = IPv4Address | IPv6Address
RecordType = Literal["A", "AAAA"]
Clock = Callable[[], float]

ADDRESSES_MAX = 256  # of one name; more is no host
TOGETHER = 64  # names that are asked for at the same time
HOSTS_FILE = "/etc/hosts"
HOSTS_FILE_OCTETS_MAX = 4 << 20

# RFC 2308: both are certain.  Everything else (SERVFAIL, REFUSED, no answer, a malformed one) is unknown.
_NONE = frozenset({aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA})


@unique
class Certainty(Enum):
    """What an answer is worth."""

    FOUND = "found"
    NONE = "none"
    UNKNOWN = "unknown"


class Answer(NamedTuple):
    """What is known of a name.

    Attributes:
        addresses: not empty if and only if the certainty is FOUND.
        ttl_s: how long this may be relied on.
        why: what DNS said, for people; "" where addresses were found.
    """

    certainty: Certainty
    addresses: tuple[Address, ...] = ()
    ttl_s: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long and how much.

    Attributes:
        try_s, tries: of one server, before the next is asked.
        budget_s: of one question, all servers together, waiting for a turn included.
        ttl_min_s, ttl_max_s: what an answer's lifetime is raised or cut to.
        none_s: how long "certainly none" is kept.
        questions: so many at once.
        names: so many answers are kept.
    """

    try_s: float = 1.5
    tries: int = 2
    budget_s: float = 5.0
    ttl_min_s: float = 5.0
    ttl_max_s: float = 3600.0
    none_s: float = 60.0
    questions: int = 64
    names: int = 10_000


class Resolver:
    """Names to addresses.  Belongs to the event loop in which it is first asked.

    Args:
        nameservers: "address" or "address:port"; empty for the host's own, followed as /etc/resolv.conf changes.
        hosts_file: looked into first, as every program of the host does; "" for none.
    """

    def __init__(
        self,
        *,
        nameservers: Sequence[str] = (),
        bounds: Bounds | None = None,
        clock: Clock = time.monotonic,
        hosts_file: str = HOSTS_FILE,
    ) -> None:
        self._bounds = bounds if bounds is not None else Bounds()
        self._nameservers = list(nameservers)
        self._clock = clock
        self._hosts_file = _HostsFile(hosts_file)
        self._turns = asyncio.Semaphore(self._bounds.questions)
        self._answers: OrderedDict[tuple[str, RecordType], tuple[float, Answer]] = OrderedDict()
        self._library: aiodns.DNSResolver | None = None
        self._closed = False

    async def addresses(self, host: str) -> Answer:
        """All addresses of a name, IPv4 before IPv6.

        Args:
            host: a canonical domain name or an IP address.
        """
        both = await asyncio.gather(self.lookup(host, "A"), self.lookup(host, "AAAA"))
        return _joined(both)

    async def lookup(self, host: str, record_type: RecordType) -> Answer:
        """The addresses of one kind."""
        local = self._local(host, record_type)
        if local is not None:
            return local
        key = (host, record_type)
        kept = self._answers.get(key)
        if kept is not None and self._clock() < kept[0]:
            self._answers.move_to_end(key)
            return kept[1]._replace(ttl_s=kept[0] - self._clock())
        answer = await self._ask(host, record_type)
        if answer.certainty is not Certainty.UNKNOWN:
            self._answers[key] = (self._clock() + answer.ttl_s, answer)
            self._answers.move_to_end(key)
            while len(self._answers) > self._bounds.names:
                self._answers.popitem(last=False)
        return answer

    async def close(self) -> None:
        """End all questions; whoever still waits for one gets "unknown"."""
        self._closed = True
        library, self._library = self._library, None
        if library is not None:
            await library.close()

    def _local(self, host: str, record_type: RecordType) -> Answer | None:
        """What needs no DNS: an address, a name of the hosts file, localhost."""
        with contextlib.suppress(ValueError):
            return self._of_kind([ip_address(host)], record_type)
        listed = self._hosts_file.addresses(host)
        if listed:
            return self._of_kind(listed, record_type)
        if host == "localhost" or host.endswith(".localhost"):
            return self._of_kind([IPv4Address("127.0.0.1"), IPv6Address("::1")], record_type)
        return None

    def _of_kind(self, addresses: Iterable[Address], record_type: RecordType) -> Answer:
        version = 4 if record_type == "A" else 6
        found = tuple(address for address in addresses if address.version == version)
        if found:
            return Answer(Certainty.FOUND, found, self._bounds.none_s)
        return Answer(Certainty.NONE, (), self._bounds.none_s, f"no {record_type} address")

    async def _ask(self, host: str, record_type: RecordType) -> Answer:
        try:
            async with asyncio.timeout(self._bounds.budget_s), self._turns:
                if self._closed:
                    return Answer(Certainty.UNKNOWN, why="the gate is closing")
                result = await self._in_loop().query_dns(host, record_type)
        except TimeoutError:
            return Answer(Certainty.UNKNOWN, why=f"no answer within {self._bounds.budget_s:g} s")
        except aiodns.error.DNSError as error:
            code, text = (*error.args, "", "")[:2]
            if code in _NONE:
                return Answer(Certainty.NONE, (), self._bounds.none_s, str(text))
            return Answer(Certainty.UNKNOWN, why=str(text))
        except (UnicodeError, RuntimeError) as error:  # a name that DNS cannot carry; a closed channel
            return Answer(Certainty.UNKNOWN, why=str(error))
        found: dict[Address, None] = {}
        ttl_s = self._bounds.ttl_max_s
        for record in result.answer:
            # Aliases stand before the addresses they lead to; the shortest lifetime on the way counts.
            ttl_s = min(ttl_s, float(record.ttl))
            address = _believable(getattr(record.data, "addr", ""))
            if address is not None and len(found) < ADDRESSES_MAX:
                found[address] = None
        if not found:
            return Answer(Certainty.NONE, (), self._bounds.none_s, f"no usable {record_type} record")
        return Answer(Certainty.FOUND, tuple(found), max(ttl_s, self._bounds.ttl_min_s))

    def _in_loop(self) -> aiodns.DNSResolver:
        if self._library is None:
            self._library = aiodns.DNSResolver(
                self._nameservers or None,
                loop=asyncio.get_running_loop(),
                timeout=self._bounds.try_s,
                tries=self._bounds.tries,
            )
        return self._library


def _joined(answers: Sequence[Answer]) -> Answer:
    found = tuple(address for answer in answers for address in answer.addresses)
    if found:
        return Answer(Certainty.FOUND, found, min(answer.ttl_s for answer in answers if answer.addresses))
    for answer in answers:
        if answer.certainty is Certainty.UNKNOWN:
            return answer
    return answers[0]


def _believable(text: str) -> Address | None:
    """An address from DNS that can be another host's; an IPv4-mapped one is the IPv4 one (RFC 4291 §2.5.5.2)."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        return None
    return address


class _HostsFile:
    """hosts(5), read again when it changes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: object = None
        self._names: dict[str, list[Address]] = {}

    def addresses(self, host: str) -> Sequence[Address]:
        if self._path:
            self._refresh()
        return self._names.get(host, ())

    def _refresh(self) -> None:
        try:
            status = Path(self._path).stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            with Path(self._path).open("rb") as file:
                text = file.read(HOSTS_FILE_OCTETS_MAX).decode("utf-8", "replace")
        except OSError:
            return  # what was read before serves
        self._stamp = stamp
        self._names = {}
        for line in text.splitlines():
            written, *names = line.partition("#")[0].split() or [""]
            with contextlib.suppress(ValueError):
                address = ip_address(written.partition("%")[0])
                for name in names:
                    self._names.setdefault(name.lower().rstrip("."), []).append(address)


# --- Following names ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Following:
    """How names are followed, in seconds.

    Attributes:
        refresh_min_s, refresh_max_s: a name is asked for again when its answer's lifetime ends, within these bounds.
        retry_s: after an answer that was unknown.
        keep_s: how long a trusted name keeps its addresses beyond their lifetime while DNS is silent.
        first_s: how long ``start`` and ``follow`` wait for the first answers.
    """

    refresh_min_s: float = 30.0
    refresh_max_s: float = 3600.0
    retry_s: float = 15.0
    keep_s: float = 3600.0
    first_s: float = 3.0


def _report(task: asyncio.Task[None]) -> None:
    """A fault of ours ends the following; trusted names then match nobody when their time is up.  Let it be heard."""
    if not task.cancelled() and task.exception() is not None:
        task.get_loop().call_exception_handler(
            {"message": "host names are no longer followed", "exception": task.exception(), "task": task}
        )


class _Name:
    """One name that is followed."""

    __slots__ = ("denied", "due", "good", "known")

    def __init__(self) -> None:
        self.denied = False
        self.due = 0.0
        self.known: dict[RecordType, tuple[Address, ...]] = {}
        self.good: dict[RecordType, float] = {}  # until when, by our clock

    def matches(self, address: Address, now: float) -> bool:
        record_type: RecordType = "A" if address.version == 4 else "AAAA"
        return address in self.known.get(record_type, ()) and (self.denied or now < self.good[record_type])


class HostFollower:
    """Which of some DNS names an address has now.

    Args:
        trusted: names whose addresses are believed for a bounded time without DNS.
        denied: names whose addresses are believed until DNS says otherwise.
        resolver: asked for them; None for one of its own.
    """

    def __init__(
        self,
        trusted: Iterable[str],
        *,
        denied: Iterable[str] = (),
        resolver: Resolver | None = None,
        times: Following | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._owns_resolver = resolver is None
        self._resolver = resolver if resolver is not None else Resolver(clock=clock)
        self._times = times if times is not None else Following()
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._at: dict[Address, tuple[str, ...]] = {}
        self._due: list[tuple[float, str]] = []
        self._untried: set[str] = set()
        self._news = asyncio.Event()
        self._all_tried = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._adopt(trusted, denied)

    async def start(self) -> None:
        """Begin to follow; returns when every name was asked for, or ``Following.first_s`` later."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="follow-hosts")
            self._task.add_done_callback(_report)
        await self._first_answers()

    async def follow(self, trusted: Iterable[str], *, denied: Iterable[str] = ()) -> None:
        """Follow these names from now on; what is known of those followed before stays known."""
        self._adopt(trusted, denied)
        await self._first_answers()

    def names(self, address: Address) -> tuple[str, ...]:
        """The followed names that resolve to this address now.  Asks nobody."""
        candidates = self._at.get(address)
        if candidates is None:
            return ()
        now = self._clock()
        return tuple(name for name in candidates if self._names[name].matches(address, now))

    async def close(self) -> None:
        """Follow no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._owns_resolver:
            await self._resolver.close()

    def _adopt(self, trusted: Iterable[str], denied: Iterable[str]) -> None:
        trusted, denied = frozenset(trusted), frozenset(denied)
        for name in self._names.keys() - (trusted | denied):
            self._learn(name, {})
            del self._names[name]
            self._untried.discard(name)
        for name in sorted(trusted | denied):
            followed = self._names.get(name)
            if followed is None:
                followed = self._names[name] = _Name()
                self._untried.add(name)
                self._schedule(name, followed, self._clock())
            followed.denied = name in denied
        if self._untried:
            self._all_tried.clear()
        else:
            self._all_tried.set()
        self._news.set()

    async def _first_answers(self) -> None:
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._times.first_s):
                    await self._all_tried.wait()

    def _schedule(self, name: str, followed: _Name, due: float) -> None:
        followed.due = due
        heappush(self._due, (due, name))

    async def _run(self) -> None:
        while True:
            now = self._clock()
            names: list[str] = []
            while self._due and self._due[0][0] <= now and len(names) < TOGETHER:
                due, name = heappop(self._due)
                if name in self._names and self._names[name].due == due:  # else it was scheduled anew, or dropped
                    names.append(name)
            if names:
                await asyncio.gather(*map(self._refresh, names))
                continue
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._due[0][0] - now if self._due else None):
                    await self._news.wait()

    async def _refresh(self, name: str) -> None:
        a, aaaa = await asyncio.gather(self._resolver.lookup(name, "A"), self._resolver.lookup(name, "AAAA"))
        followed = self._names.get(name)
        if followed is None:
            return  # no longer followed
        now, times = self._clock(), self._times
        known = dict(followed.known)
        wait_s = times.refresh_max_s
        answers: tuple[tuple[RecordType, Answer], ...] = (("A", a), ("AAAA", aaaa))
        for record_type, answer in answers:
            if answer.certainty is Certainty.UNKNOWN:
                wait_s = min(wait_s, times.retry_s)
                continue
            known[record_type] = answer.addresses
            lifetime_s = min(max(answer.ttl_s, times.refresh_min_s), times.refresh_max_s)
            followed.good[record_type] = now + lifetime_s + times.keep_s
            wait_s = min(wait_s, lifetime_s)
        self._learn(name, known)
        self._schedule(name, followed, now + wait_s)
        self._untried.discard(name)
        if not self._untried:
            self._all_tried.set()

    def _learn(self, name: str, known: dict[RecordType, tuple[Address, ...]]) -> None:
        """Let the name have these addresses and no others."""
        followed = self._names[name]
        before = {address for addresses in followed.known.values() for address in addresses}
        after = {address for addresses in known.values() for address in addresses}
        for address in before - after:
            others = tuple(other for other in self._at[address] if other != name)
            if others:
                self._at[address] = others
            else:
                del self._at[address]
        for address in after - before:
            self._at[address] = tuple(sorted({*self._at.get(address, ()), name}))
        followed.known = known
