"""Trusted addresses and listeners under watch: what their sessions show is kept, weighed, and acted on.

Why: a session of a trusted client may be a stranger's whose address was lost on the way; see ``policy.sources``.
Trust: as there.
Promise: a client that no suspendable grant covers is not watched and costs nothing.  For others a session costs a read
    of the shared records, one more for each RCPT, so that what another worker suspends is refused from the next
    recipient on, and a write where it shows something new: about 10 us in all where it does not.
"""

from __future__ import annotations

from collections.abc import Callable

from gatepost.counters import Source, Store
from gatepost.counters import Sources as Records
from gatepost.facts import Session
from gatepost.gate.interfaces import Interfaces
from gatepost.policy import relay, sources
from gatepost.policy.relay import RelayRules
from gatepost.policy.sources import Judgement
from gatepost.smtp.path import ForwardPath, Mailbox, ReversePath
from gatepost.telemetry import Level, SessionLog

SIGNS_PER_SESSION = 16  # sessions that go on and on show enough


class Sources:
    """The watch over the trust of one configuration.

    Args:
        name: of this host; now_s: seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        rules: RelayRules,
        name: str,
        *,
        log: SessionLog,
        interfaces: Interfaces,
        now_s: Callable[[], float],
    ) -> None:
        self.records = Records(store)
        self.rules = rules
        self.ours = sources.our_organisations(rules, name)
        self.now_s = now_s
        self._log = log
        self._interfaces = interfaces

    def watch(self, facts: Session) -> Watch | None:
        """The watch over one session; None where its trust does not rest on where its client comes from.

        A public client at a trusted listener is seen here already, whatever it says.
        """
        found = sources.watched(self.rules, facts)
        if not found.address:
            return None
        if found.listen:
            seen = sources.public_client(facts.client.address)
            known = self.records.note(facts.listen, seen, self.now_s()) if seen.public_clients else None
            if known is not None:
                self._act(facts.listen, sources.judge_listener(known))
        return Watch(self)

    def show(self, facts: Session, fingerprint: str, reverse_path: ReversePath | None, *, inbound: bool) -> None:
        """Keep what a session shows, and suspend the trust in its client's address where that is too much."""
        address = facts.client.address
        seen = sources.shown(facts, self.ours, fingerprint, reverse_path, inbound=inbound)
        known = self.records.note(address, seen, self.now_s())
        if known is not None:
            self._act(address, sources.judge(known, address, self._interfaces.what_is(address)))

    def _act(self, source: Source, judgement: Judgement) -> None:
        if not judgement.suspicious or not self.records.suspend(source, judgement.sentences, self.now_s()):
            return
        whom = f"the listener {source}" if isinstance(source, str) else str(source)
        why = "; ".join(judgement.sentences)
        text = (
            f"the trust in {whom} is suspended, its clients may relay only with AUTH: {why}. {judgement.mend}. "
            f"Then: gatepost trust resume {source}"
        )
        self._log.event(
            "suspended",
            text,
            Level.ERROR,
            source=str(source),
            score=judgement.score,
            threshold=sources.THRESHOLD,
            evidence=list(judgement.sentences),
            mend=judgement.mend,
        )


class Watch:
    """One session under watch."""

    __slots__ = ("_shown", "_sources")

    def __init__(self, watching: Sources) -> None:
        self._sources = watching
        self._shown: set[tuple[str, str, str, bool]] = set()

    def standing(self, facts: Session) -> Session:
        """The facts with what is suspended now."""
        now_s = self._sources.now_s()
        suspended, listen_suspended = self._sources.records.suspended(facts.client.address, facts.listen, now_s)
        if (suspended, listen_suspended) == (facts.suspended, facts.listen_suspended):
            return facts
        return facts._replace(suspended=suspended, listen_suspended=listen_suspended)

    def recipient(
        self, facts: Session, fingerprint: str, reverse_path: ReversePath, forward_path: ForwardPath
    ) -> Session:
        """The facts once this recipient was seen: what it shows counts for its own verdict already."""
        rules = self._sources.rules
        addressed = relay.with_domain(rules, forward_path)
        inbound = addressed is not None and relay.local_domain(rules, addressed) is not None
        self._show(facts, fingerprint, reverse_path, inbound=inbound)
        return self.standing(facts)

    def ended(self, facts: Session, fingerprint: str) -> None:
        """The session is over; one that named no recipient has shown its hello name all the same."""
        if not self._shown:
            self._show(facts, fingerprint, None, inbound=False)

    def _show(self, facts: Session, fingerprint: str, reverse_path: ReversePath | None, *, inbound: bool) -> None:
        domain = str(reverse_path.domain) if isinstance(reverse_path, Mailbox) else ""
        sign = (facts.hello, fingerprint, domain, inbound)
        if sign not in self._shown and len(self._shown) < SIGNS_PER_SESSION:
            self._shown.add(sign)
            self._sources.show(facts, fingerprint, reverse_path, inbound=inbound)
