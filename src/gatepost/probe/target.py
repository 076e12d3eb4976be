"""What a person may ask to be tested, and with which names: one host, and texts that can be said to a server.

Why: the tester is for one's own server, or for one that sends complaints; it is no scanner, so it takes one host a run.
Trust: the person's own words, perhaps copied from mail: nothing but plain names and addresses gets into a command line.
Promise: after ``checked`` no text holds a space, a control or a bracket.
Sources: RFC 1035 §2.3.1 and RFC 5890 §2.3.2.1 (names), RFC 5321 §4.1.2 (dot-string).
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from ipaddress import ip_address

import idna

from gatepost.errors import GatepostError
from gatepost.probe.report import DEFAULT_PORT, ProbeSettings, Target

LOCAL_DOMAINS_MAX = 3  # each multiplies the questions
WAIT_S_MAX = 600  # between two forms, and for one reply
BUDGET_S_MAX = 21_600

_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_ATOM = "[A-Za-z0-9_'~+=^&*#$?|`-]+"  # without percent, bang and braces: the forms bring their own
_LOCAL_PART = re.compile(rf"(?=.{{1,64}}\Z){_ATOM}(?:\.{_ATOM})*")
_HOST_PORT = re.compile(r"\[(?P<v6>[^\]]*)\](?::(?P<port6>[0-9]{1,5}))?|(?P<host>[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")
_HELLO = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,255}")


def target_of(written: str, port: int | None = None) -> Target:
    """HOST, HOST:PORT, an IPv6 address, or [IPv6]:PORT.

    Args:
        port: overrides what is written; None for that, or 25.

    Raises:
        GatepostError: it does not name one host.
    """
    said = ""
    host = _address(written)
    if not host:
        match = _HOST_PORT.fullmatch(written)
        if match is None or "/" in written or "," in written or "*" in written:
            raise GatepostError(f'"{written}": name one host, as mx.example.com:25, 192.0.2.1:25 or [2001:db8::1]:25')
        name = match["v6"] or match["host"] or ""
        said = match["port6"] or match["port"] or ""
        host = _address(name) or domain_name(name)
        if not host:
            raise GatepostError(f'"{written}": this is neither a host name nor an IP address')
    number = int(said or DEFAULT_PORT) if port is None else port
    if not 1 <= number <= 65_535:
        raise GatepostError(f"port {number}: ports are 1 to 65535")
    return Target(host, number)


def domain_name(written: str) -> str:
    """A domain in A-labels and lower case; "" for what is none."""
    name = written.removesuffix(".").lower()
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError:
            return ""
    return name if _DOMAIN.fullmatch(name) and re.search("[a-z]", name.rpartition(".")[2]) else ""


def checked(settings: ProbeSettings) -> ProbeSettings:
    """Settings whose texts can be said to a server; ``outside`` is the address that the forms use.

    Raises:
        GatepostError: one of them cannot, or they contradict each other.
    """
    domains = []
    for written in settings.local_domains:
        domain = domain_name(written)
        if not domain:
            raise GatepostError(f'local domain "{written}": this is not a domain; write it as example.com')
        domains.append(domain)
    domains = list(dict.fromkeys(domains))
    if len(domains) > LOCAL_DOMAINS_MAX:
        raise GatepostError(f"{len(domains)} local domains: no more than {LOCAL_DOMAINS_MAX} are tested in a run")
    outside = _mailbox(settings.deliver or settings.outside)
    if outside.rpartition("@")[2] in domains:
        raise GatepostError(f'"{outside}" is in a local domain: the server may take it without relaying')
    reverse_path = settings.reverse_path.strip()
    if reverse_path not in ("", "<>"):
        reverse_path = f"<{_mailbox(reverse_path)}>"
    if settings.hello and not _HELLO.fullmatch(settings.hello):
        raise GatepostError(f'"{settings.hello}": this is not a name for EHLO')
    if settings.source is not None and settings.source.version not in settings.families:
        raise GatepostError(f"{settings.source} is an IPv{settings.source.version} address, and that is not asked for")
    if not 0 <= settings.pause_s <= WAIT_S_MAX or not 0 < settings.timeout_s <= WAIT_S_MAX:
        raise GatepostError(f"a pause and a wait for a reply may take {WAIT_S_MAX} s at most, and the wait more than 0")
    if not 0 < settings.budget_s <= BUDGET_S_MAX:
        raise GatepostError(f"a test may take {BUDGET_S_MAX} s at most, and more than 0")
    return replace(
        settings,
        local_domains=tuple(domains),
        outside=outside,
        deliver=outside if settings.deliver else "",
        reverse_path=reverse_path,
    )


def _address(written: str) -> str:
    with contextlib.suppress(ValueError):
        return str(ip_address(written))
    return ""


def _mailbox(written: str) -> str:
    local_part, _, domain = written.strip().removeprefix("<").removesuffix(">").rpartition("@")
    name = domain_name(domain)
    if not _LOCAL_PART.fullmatch(local_part) or not name:
        raise GatepostError(f'"{written}": this is not a plain address; write it as you@example.net')
    return f"{local_part}@{name}"
