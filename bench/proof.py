"""What the proof costs: seconds and decisions for 1,000 grants and 1,000 domains, as the table in docs/proof.md.

.venv/bin/python bench/proof.py [--runs 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from gatepost.policy.prover import Listener, openings, prove
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, TrustEntry
from gatepost.smtp.path import Pattern

MANY = 1_000
ALLOWED = 65_536  # public addresses that may be trusted
LISTENERS = (
    Listener("mx", "c:1", "mx", (ip_address("0.0.0.0"),), tls="starttls"),
    Listener("inside", "c:2", "inside", (ip_address("10.1.0.1"),)),
)


def network(number: int, **narrowing: Any) -> TrustEntry:
    where = f"c:{number + 3}"
    return TrustEntry(where, network=ip_network(f"10.{number % 250}.{number // 250}.0/24"), **narrowing)


def patterns(*texts: str) -> tuple[Pattern, ...]:
    return tuple(map(Pattern.parse, texts))


def rules(trust: Iterator[TrustEntry], domains: int = MANY, deny: tuple[DenyEntry, ...] = ()) -> RelayRules:
    local = tuple(LocalPattern(f"d{number}.example.com", f"d:{number}") for number in range(domains))
    return RelayRules(
        local=local, trust=tuple(trust), deny=deny, default_backend="mail", postmaster_domain="example.com"
    )


def kinds() -> Iterator[TrustEntry]:
    """As many of each kind that a grant has."""
    for number in range(MANY // 4):
        yield network(number)
        yield TrustEntry(f"h:{number}", host=f"h{number}.dyn.test")
        yield TrustEntry(f"a:{number}", accounts=(f"a{number}",))
        yield TrustEntry(f"t:{number}", certificate=f"{number:064x}")


def partner(number: int) -> dict[str, Any]:
    return {
        "reverse_paths": patterns(f"*@d{number}.example.com"),
        "forward_paths": patterns(f"*@p{number}.test", f"*@*.p{number}.test"),
    }


CONFIGURATIONS: dict[str, Callable[[], RelayRules]] = {
    "1,000 networks": lambda: rules(network(number) for number in range(MANY)),
    "each narrowed to two reverse-paths, over TLS 1.2": lambda: rules(
        network(number, tls_minimum="1.2", reverse_paths=patterns(f"*@d{number}.example.com", f"a{number}@example.com"))
        for number in range(MANY)
    ),
    "each narrowed to one reverse-path and a partner's domains": lambda: rules(
        network(number, **partner(number)) for number in range(MANY)
    ),
    "networks, hosts, accounts and certificates, and 1,000 deny entries": lambda: rules(
        kinds(),
        deny=tuple(
            DenyEntry(f"x:{number}", network=ip_network(f"100.{number % 250}.{number // 250}.0/24"))
            for number in range(MANY)
        ),
    ),
    "1,000 entries for one network, each for another reverse-path": lambda: rules(
        network(0, reverse_paths=patterns(f"a{number}@example.com")) for number in range(MANY)
    ),
    "one network and two domains": lambda: rules(iter((network(0),)), domains=2),
}


def measured(given: RelayRules, runs: int) -> dict[str, Any]:
    """CPU seconds at load, and by ``gatepost check``: least and most; and how often the policy was asked."""
    load_s, check_s, decisions = [], [], set()
    for _ in range(runs):
        began_s = time.process_time()
        openings(given, LISTENERS, ALLOWED, 0.0)
        load_s.append(time.process_time() - began_s)
        began_s = time.process_time()
        proof = prove(given, LISTENERS, ALLOWED, 0.0)
        check_s.append(time.process_time() - began_s)
        decisions.add(proof.decisions)
    (asked,) = decisions
    return {"load_s": [min(load_s), max(load_s)], "check_s": [min(check_s), max(check_s)], "decisions": asked}


def span(seconds: list[float]) -> str:
    least, most = (f"{second:.2f}" for second in seconds)
    if most < "0.01":
        return "below 0.01"
    return least if least == most else f"{least} to {most}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each configuration (default: 3)")
    parser.add_argument("--json", action="store_true", help="figures for programs")
    asked = parser.parse_args()
    figures = {}
    for name, make in CONFIGURATIONS.items():
        if sys.stderr.isatty():
            print(f"{name} ...", file=sys.stderr)
        figures[name] = measured(make(), asked.runs)
    if asked.json:
        print(json.dumps(figures, indent=2))
        return 0
    print("| configuration | at load | `gatepost check` | decisions |\n|---|---|---|---|")
    for name, one in figures.items():
        print(f"| {name} | {span(one['load_s'])} | {span(one['check_s'])} | {one['decisions']:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
