"""What the gate remembers of its grants: whose trust is suspended, and which nobody uses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from gatepost.answers import records
from gatepost.config import Config
from gatepost.counters import Sources, Suspension, Use, Uses
from gatepost.errors import StorageError
from gatepost.gate.uses import unused
from gatepost.policy import relay
from gatepost.policy.relay import TrustEntry


def warnings(loaded: Config, now_s: float) -> list[str]:
    """What is suspended at the configuration's gate, and what nobody uses, for ``gatepost check``."""
    try:
        state = known(loaded, now_s)
    except StorageError as error:
        return [f"whether any trust is suspended cannot be told, nor which is unused: {error}"]
    suspended = [
        f"the trust in {one.source} is suspended since {moment(one.since_s)}: {'; '.join(one.why)}; mend what hides "
        f"its clients (docs/howto/addresses.md), then: gatepost trust resume {one.source}"
        for one in state.suspensions
    ]
    return [*suspended, *state.unused]


class Known(NamedTuple):
    """What the gate remembers of its grants.

    Attributes:
        uses: of the entries that are watched, in the order of the file; unused: the warnings.
    """

    suspensions: list[Suspension]
    uses: list[tuple[TrustEntry, Use]]
    unused: list[str]


def known(loaded: Config, now_s: float, said: Callable[[str], None] = lambda _: None) -> Known:
    """Read it.

    Args:
        said: takes a sentence for the operator.

    Raises:
        StorageError: it cannot be read.
    """
    with records.opened(loaded, make=False, said=said) as store:
        if store is None:
            return Known([], [], [])
        rules, uses = loaded.gate.rules, Uses(store)
        found = zip(rules.trust, uses.of(map(relay.sense, rules.trust), now_s), strict=True)
        watched = [(entry, use) for entry, use in found if use is not None]
        return Known(Sources(store).suspensions(now_s), watched, unused(rules, uses, now_s))


def moment(at_s: float) -> str:
    """For a person."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
