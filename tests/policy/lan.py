"""An hour of a busy LAN, as its gate hears it: 200 devices, and what stands behind single addresses of branch offices.

    for said in record(): ...           # or: python -m tests.policy.lan, which prints it

Why: what tells strangers from our own machines must be silent where there are only our own, and those are strange
    enough: printers that say "localhost", telephone systems with the name of their maker, a smarthost that forwards the
    mail of half the world, two consultants who had the same address after each other.
How it is made: from one number, so that the recording is the same each time and no file of it is kept.  Each kind of
    device has its habits: how often it sends, how it says EHLO, how it speaks TLS, as whom and to whom.  They are
    modelled on what such devices commonly do; no network of anybody was listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address
from random import Random
from typing import NamedTuple

from gatepost.facts import IPAddress

HOUR_S = 3600
DEVICES = 200
OURS = "example.com"  # the local domain of the gate
FROM_OUTSIDE = (
    "gmail.com",
    "gmx.de",
    "outlook.com",
    "yahoo.co.jp",
    "web.de",
    "orange.fr",
    "bt.co.uk",
    "qq.com",
    "uol.com.br",
)
TLS = ("TLSv1.3/TLS_AES_256_GCM_SHA384", "TLSv1.2/ECDHE-RSA-AES128-GCM-SHA256", "TLSv1.2/AES256-SHA", "")
MAKERS = ("BRW", "EPSON", "KM", "HP", "RNP", "XRX", "CANON")


class Said(NamedTuple):
    """One transaction, as far as it matters.

    Attributes:
        at_s: seconds from the beginning; reverse_path: "" for the null one; forward_path: one of its recipients.
    """

    at_s: float
    address: IPAddress
    hello: str
    fingerprint: str
    reverse_path: str
    forward_path: str


Habit = Callable[[Random], tuple[str, str, str, str]]
"""Hello name, fingerprint, reverse-path and forward-path of the next transaction."""


def record(seed: int = 1) -> list[Said]:
    """All that is said in the hour, in the order of time."""
    random = Random(seed)
    said: list[Said] = []
    for number, (habit, each_s) in enumerate(_devices(random)):
        address = address_of(number)
        at_s = random.uniform(0, each_s)
        while at_s < HOUR_S:
            said.append(Said(at_s, address, *habit(random)))
            at_s += random.expovariate(1 / each_s)
    # Guests come and go: three addresses of the wireless network are given to one after the other.
    for last, guests in enumerate(
        (("maria-laptop", "[10.1.9.1]"), ("laptop.consulting-a.com", "ws7.consulting-b.co.uk"), ("x", "y"))
    ):
        for turn, hello in enumerate(guests):
            organisation = hello.partition(".")[2] if "." in hello and hello[0] != "[" else "gmx.de"
            for _ in range(5):
                at_s = random.uniform(turn, turn + 1) * HOUR_S / len(guests)
                forward = random.choice((f"office@{OURS}", f"a@{organisation}", "b@gmail.com"))
                address = ip_address(f"10.1.9.{1 + last}")
                said.append(Said(at_s, address, hello, TLS[0], f"guest@{organisation}", forward))
    return sorted(said)


def address_of(number: int) -> IPAddress:
    """The address of a device, by its number from 0; those from ``DEVICES`` less 5 on hide many machines."""
    return ip_address(f"10.1.{number // 100}.{10 + number % 100}")


def _devices(random: Random) -> Iterator[tuple[Habit, float]]:
    """Each of 200 devices: its habit, and the seconds between two of its transactions."""
    for number in range(70):
        yield computer(number), random.uniform(120, 1800)
    for number in range(40):
        yield printer(number), random.uniform(300, 3600)
    for number in range(25):
        yield server(number), random.uniform(30, 900)
    for number in range(20):
        yield camera(number), random.uniform(20, 600)
    for number in range(15):
        yield telephone(number), random.uniform(600, 3600)
    for number in range(10):
        yield storage(number), random.uniform(300, 1800)
    for number in range(8):
        yield from_a_container(number), random.uniform(60, 900)
    for number in range(4):
        yield router(number), random.uniform(300, 900)
    for number in range(3):
        yield consultant(number), random.uniform(300, 900)
    yield branch_office, 10
    yield smarthost, 3
    yield newsletter, 1
    yield server_farm, 5
    yield hosting, 5


def computer(number: int) -> Habit:
    """A mail program at a desk: it says its own name, or its address as Thunderbird does."""
    hello = (f"PC{number:03}", f"[10.1.0.{10 + number}]", f"pc{number}.office.lan", f"desk{number}.corp.{OURS}")[
        number % 4
    ]

    def habit(random: Random) -> tuple[str, str, str, str]:
        mailbox = f"person{number}@{OURS}"
        if random.random() < 0.05:
            return hello, TLS[0], "", random.choice((f"boss@{OURS}", "x@gmail.com"))  # a return receipt
        if number == 7 and random.random() < 0.3:
            mailbox = "person7@gmail.com"  # and its private account
        to = random.choice((f"boss@{OURS}", f"person{random.randrange(70)}@{OURS}", f"c@{random.choice(FROM_OUTSIDE)}"))
        return hello, TLS[number % 2], mailbox, to

    return habit


def printer(number: int) -> Habit:
    """It scans to mail, says what its maker thought of, and speaks old TLS or none."""
    name = f"{MAKERS[number % len(MAKERS)]}{number:06X}"
    hello = (name, "localhost", f"{name}.local", f"[10.1.0.{80 + number}]", "localhost.localdomain")[number % 5]
    sent_by = (f"scanner{number}@{OURS}", "noreply@printer-maker.com", f"{name}@localhost")[number % 3]
    return lambda random: (hello, TLS[2 + number % 2], sent_by, f"person{random.randrange(70)}@{OURS}")


def server(number: int) -> Habit:
    """Reports of cron, applications, watchdogs: a name in our domain, or in the maker's of a hosted application."""
    hello = f"srv{number}.{('corp.' + OURS, 'internal', OURS)[number % 3]}"
    return lambda random: (hello, TLS[number % 2], f"root@{hello}", random.choice((f"it@{OURS}", "pager@sms-gate.net")))


def camera(number: int) -> Habit:
    return lambda _: ("ipcam", TLS[3], "admin@camera-maker.cn", f"guard{number % 3}@{OURS}")


def telephone(number: int) -> Habit:
    """A telephone system sends voice mail."""
    hello = (f"sip{number}.fritz.box", "asterisk", "pbx.telephone-maker.com")[number % 3]
    return lambda random: (hello, TLS[3], f"voicemail@{OURS}", f"person{random.randrange(70)}@{OURS}")


def storage(number: int) -> Habit:
    return lambda _: (f"nas{number}", TLS[1], f"nas{number}@{OURS}", f"it@{OURS}")


def from_a_container(number: int) -> Habit:
    """An application in a container calls itself by the container's id, which changes with each start."""

    def habit(random: Random) -> tuple[str, str, str, str]:
        return (
            f"{random.randrange(3):x}{number:011x}",
            TLS[0],
            f"app{number}@shop{number}.com",
            f"u@{random.choice(FROM_OUTSIDE)}",
        )

    return habit


def router(number: int) -> Habit:
    """It says the address that its provider gave it, another one each day."""
    return lambda random: (f"[198.51.{random.randrange(2) + 10}.7]", TLS[3], f"router{number}@{OURS}", f"it@{OURS}")


def consultant(number: int) -> Habit:
    """A guest's laptop: the name and the addresses of another company, to us and to everybody."""
    domain = f"consulting{number}.com"
    return lambda random: (
        f"laptop.{domain}",
        TLS[0],
        f"guest@{domain}",
        random.choice((f"boss@{OURS}", f"c@{random.choice(FROM_OUTSIDE)}", f"home@{domain}")),
    )


def branch_office(random: Random) -> tuple[str, str, str, str]:
    """Thirty machines behind one address: inner names, our mailboxes, some private ones, printers among them."""
    number = random.randrange(30)
    hello = (f"BR{number}", f"br{number}.branch.lan", f"[192.168.7.{number}]")[number % 3]
    mailbox = f"clerk{number}@{OURS}" if random.random() < 0.97 else f"clerk@{FROM_OUTSIDE[number % 4]}"
    to = random.choice((f"boss@{OURS}", f"c@{random.choice(FROM_OUTSIDE)}"))
    return hello, TLS[number % 4], mailbox, to


def smarthost(random: Random) -> tuple[str, str, str, str]:
    """A mail server that relays for one organisation, and forwards to us and others what the world writes to it."""
    sent_by = random.choice(
        ("x@subsidiary.com", f"x@{random.choice(FROM_OUTSIDE)}", f"n@firm{random.randrange(500)}.com", "")
    )
    return "mail.subsidiary.com", TLS[0], sent_by, random.choice((f"boss@{OURS}", f"c@{random.choice(FROM_OUTSIDE)}"))


def newsletter(random: Random) -> tuple[str, str, str, str]:
    """One reverse-path for each reader, for the domains of several customers."""
    number = random.randrange(100_000)
    to = random.choice((f"person{number % 70}@{OURS}", f"r{number}@{random.choice(FROM_OUTSIDE)}"))
    return "out.news-sender.com", TLS[0], f"b+{number}=x@bounce.customer{number % 40}.com", to


def server_farm(random: Random) -> tuple[str, str, str, str]:
    """Twenty servers with public names of one organisation behind one translated address."""
    number = random.randrange(20)
    return f"web{number}.farm-operator.net", TLS[number % 2], f"www@web{number}.farm-operator.net", f"it@{OURS}"


def hosting(random: Random) -> tuple[str, str, str, str]:
    """As many again, which send the forms of the sites of thirty customers."""
    number = random.randrange(20)
    to = random.choice((f"sales@{OURS}", f"c@{random.choice(FROM_OUTSIDE)}"))
    return f"node{number}.hosting.co.uk", TLS[number % 3], f"form@site{random.randrange(30)}.com", to


if __name__ == "__main__":
    for one in record():
        print(*one)
