"""Whether the one message of a probe arrived: its mark, looked for at a URL that shows the person's inbox.

Why: a 250 to the content is still a promise; the message in a mailbox elsewhere is proof.
Trust: the URL is the person's; what is behind it may be any page.  It is bounded in octets and in time, and nothing in
    it but the mark is looked at.
Promise: ``True`` only where the mark of this very probe, made up for it, stands in the answer.  The URL, which may hold
    a password, is in no sentence; its host is.
Sources: RFC 9110 §9.3.1 (GET), §15.3.1 (200).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp

from gatepost.errors import GatepostError
from gatepost.probe.report import Report, Verdict
from gatepost.probe.wire import Deadline

INBOX_OCTETS_MAX = 4_194_304  # of one answer; the mark is looked for in these
INBOX_WAIT_S_MAX = 3_600
URL_CHARACTERS_MAX = 2_048
LOOK_S = 10.0  # for one answer
LOOKS_APART_S = 5.0
REDIRECTS_MAX = 5

Look = Callable[[], None]


def inbox_host(url: str) -> str:
    """The host of an inbox's URL.

    Raises:
        GatepostError: it is none that can be asked.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= URL_CHARACTERS_MAX
    if parts.scheme not in ("http", "https") or not host or not plain:
        raise GatepostError("--inbox: this is no URL that can be asked; write it as https://mail.example.net/inbox")
    return host


async def arrived(url: str, token: str, wait_s: float, looking: Look | None = None) -> bool:
    """Whether the mark shows up at the URL.

    Args:
        wait_s: so long it is looked for, 0 for one look.
        looking: told before each look.
    """
    deadline = Deadline(time.monotonic, wait_s)
    limits = aiohttp.ClientTimeout(total=LOOK_S)
    async with aiohttp.ClientSession(timeout=limits, auto_decompress=False) as session:
        while True:
            if looking is not None:
                looking()
            if token.encode() in await _read(session, url):
                return True
            if deadline.over:
                return False
            await asyncio.sleep(deadline.at_most(LOOKS_APART_S))


def with_arrival(report: Report, *, found: bool, host: str) -> Report:
    """The report with what the inbox says: a message that arrived was relayed, whatever else was unclear.

    Args:
        host: where the inbox is.
    """
    if report.delivery is None:
        return report
    delivery = replace(report.delivery, arrived=found, inbox=host)
    if not found:
        return replace(report, delivery=delivery)
    proof = f"The message marked {delivery.token} arrived: its mark was found in the inbox at {host}."
    return replace(report, verdict=Verdict.OPEN, why=(proof, *report.why), delivery=delivery)


async def _read(session: aiohttp.ClientSession, url: str) -> bytes:
    """What is there now; b"" where it cannot be had: it may be, the next time."""
    octets = bytearray()
    try:
        headers = {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}
        async with session.get(url, headers=headers, max_redirects=REDIRECTS_MAX) as answer:
            if answer.status != 200:
                return b""
            async for chunk in answer.content.iter_any():
                octets += chunk[: INBOX_OCTETS_MAX - len(octets)]
                if len(octets) >= INBOX_OCTETS_MAX:
                    break
    except (aiohttp.ClientError, OSError, ValueError):  # a timeout is an OSError
        return b""
    return bytes(octets)
