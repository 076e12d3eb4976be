"""The relay tester: one host, over each address family, plain and under TLS.

Why: whether a server is an open relay is seen from outside or not at all; and a tester that shares nothing with the
    gate sees what the gate's own parser is blind for.
Trust: the server is hostile, DNS is what it is: what could not be asked makes the verdict UNKNOWN, never CLOSED.
Promise: one host, one address of each family, one connection at a time, all within a budget of time; an answer always.
Sources: RFC 5321 §3.6.1 (relaying), §5.1; RFC 3207 (STARTTLS).
"""

from __future__ import annotations

import contextlib
import time
from ipaddress import ip_address

from gatepost.probe.report import Address, Delivery, ProbeSettings, Report, Round, Target, Verdict
from gatepost.probe.round import Progress, RoundTest
from gatepost.probe.target import checked
from gatepost.probe.wire import Deadline
from gatepost.resolver import Certainty, Resolver


async def probe(target: Target, settings: ProbeSettings, progress: Progress | None = None) -> Report:
    """Ask one host every form.

    Args:
        progress: told before each form what is tested, how many were asked, and how many there are.

    Returns:
        What was found, also where nobody answers.

    Raises:
        GatepostError: the settings make no sense.
    """
    settings = checked(settings)
    begun = time.monotonic()
    deadline = Deadline(time.monotonic, settings.budget_s)
    addresses, untested = await _addresses(target, settings)
    rounds: list[Round] = []
    delivery: Delivery | None = None
    for address in addresses:
        plain = None
        if settings.starttls != "require" and not settings.implicit_tls:
            plain = RoundTest(target, address, settings, deadline, progress, tls=False)
            rounds.append(await plain.run(deliver=not (delivery and delivery.taken)))
            delivery = plain.delivery or delivery
        wanted = settings.implicit_tls or settings.starttls == "require"
        if wanted or (settings.starttls == "auto" and plain is not None and plain.offers_tls):
            under_tls = RoundTest(target, address, settings, deadline, progress, tls=True)
            rounds.append(await under_tls.run(deliver=not (delivery and delivery.taken)))
            delivery = under_tls.delivery or delivery
    verdict, why = _together(rounds, untested)
    return Report(
        target, settings.outside, verdict, tuple(why), tuple(rounds), delivery, round(time.monotonic() - begun, 3)
    )


async def _addresses(target: Target, settings: ProbeSettings) -> tuple[list[Address], list[str]]:
    """One address of each family, and sentences about what cannot be tested."""
    families = settings.families if settings.source is None else (settings.source.version,)
    with contextlib.suppress(ValueError):
        address = ip_address(target.host)
        if address.version in families:
            return [address], []
        return [], [f"{target.host} is an IPv{address.version} address, and that is not asked for."]
    resolver = Resolver()
    addresses: list[Address] = []
    untested = []
    absent = []
    try:
        for family in sorted(families):
            answer = await resolver.lookup(target.host, "A" if family == 4 else "AAAA")
            if answer.certainty is Certainty.FOUND:
                addresses.append(answer.addresses[0])
            elif answer.certainty is Certainty.UNKNOWN:
                untested.append(f"IPv{family} was not tested: DNS does not answer for {target.host} ({answer.why}).")
            else:
                absent.append(f"{target.host} has no IPv{family} address.")
    finally:
        await resolver.close()
    return addresses, untested if addresses else untested + absent


def _together(rounds: list[Round], untested: list[str]) -> tuple[Verdict, list[str]]:
    """Open in one is open; closed is what was tested in all and is closed in all."""
    verdicts = {one.verdict for one in rounds}
    why = [f"{one.name}: {sentence}" for one in rounds for sentence in one.why] + untested
    if Verdict.OPEN in verdicts:
        return Verdict.OPEN, why
    if verdicts == {Verdict.CLOSED} and not untested:
        return Verdict.CLOSED, why
    return Verdict.UNKNOWN, why
