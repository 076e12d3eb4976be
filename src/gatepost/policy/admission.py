"""As whom may this account send: the reverse-path of its mail, and the author that its readers will see.

Why: an account that may send as anybody is worth stealing, and a colleague's name is the best bait.  So an account uses
    its own address, and those that are granted to it.
Trust: the facts come from the network, but parsed, and the account was verified; rules come from the administrator.
Promise: pure and total.  Names of accounts are addresses or words, never patterns: an account "*" matches itself alone.
    Sessions without an account are none of this module's business: they are relay's.
Sources: RFC 6409 §6.1 (enforced submission rights), RFC 5322 §3.6.2 (From is the author), RFC 5321 §4.5.5 (null
    reverse-path, which notifications need and which names nobody).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gatepost.facts import Identity
from gatepost.smtp.path import Mailbox, Pattern, ReversePath, exact_text, parse_reverse_path, pattern_texts
from gatepost.verdict import Reason, Refuse

EXPECTED_MAX = 3  # addresses that a reply names


@dataclass(frozen=True, slots=True)
class SendAsEntry:
    """One [[send_as]] table: these accounts may also send as these.  ``expires_at``: seconds since the epoch."""

    where: str
    accounts: tuple[str, ...]
    reverse_paths: tuple[Pattern, ...]
    why: str = ""
    owner: str = ""
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class SendAsRules:
    """Who may send as whom.

    Attributes:
        domains: our local domains without wildcards: an account that is no address has one at each of them.
        domain_names: the same, to be looked up.
        by_account: the entries by the account that they name, "*" for all, each with the texts of its patterns.
    """

    entries: tuple[SendAsEntry, ...] = ()
    domains: tuple[str, ...] = ()
    domain_names: frozenset[str] = field(init=False, repr=False, compare=False)
    by_account: dict[str, list[tuple[SendAsEntry, frozenset[str]]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain_names", frozenset(self.domains))
        by_account: dict[str, list[tuple[SendAsEntry, frozenset[str]]]] = {}
        for entry in self.entries:
            for account in entry.accounts:
                by_account.setdefault(account, []).append((entry, frozenset(map(str, entry.reverse_paths))))
        object.__setattr__(self, "by_account", by_account)


def send_as(rules: SendAsRules, identity: Identity, reverse_path: ReversePath, now: float) -> Refuse | None:
    """Whether this account may not use this reverse-path."""
    if not isinstance(reverse_path, Mailbox):
        return None
    return author(rules, identity, (reverse_path,), now)


def author(rules: SendAsRules, identity: Identity, mailboxes: Iterable[Mailbox], now: float) -> Refuse | None:
    """Whether this account may not send as one of these, as whom a reader would take the author for.

    Returns:
        A refusal whose hint names what was expected: the client is that account, and knows its own addresses.
    """
    for mailbox in mailboxes:
        texts = set(pattern_texts(mailbox))
        if texts.isdisjoint(_own(rules, identity, mailbox)) and not any(
            not allowed.isdisjoint(texts) for _, allowed in _granted(rules, identity, now)
        ):
            return Refuse(
                Reason.SEND_AS,
                detail=f"{identity.account} as {mailbox}",
                hint=_expected(rules, identity, now),
            )
    return None


def _own(rules: SendAsRules, identity: Identity, mailbox: Mailbox) -> Iterator[str]:
    """The exact texts of the account's own addresses; of those at each local domain the one that may be this one."""
    domain = mailbox.domain
    at = [domain] if isinstance(domain, str) and domain in rules.domain_names else []
    return _texts(identity, at)


def _texts(identity: Identity, domains: Iterable[str]) -> Iterator[str]:
    account = identity.account
    written = [account] if "@" in account else [f"{account}@{domain}" for domain in domains]
    for address in (*written, *identity.addresses):
        # The path parser, not the one for patterns: a server that has a user "*" must not give it everybody's address.
        path = parse_reverse_path(f"<{address}>".encode("utf-8", "replace"), smtputf8=True)
        if isinstance(path, Mailbox):
            yield exact_text(path)


def _granted(rules: SendAsRules, identity: Identity, now: float) -> Iterator[tuple[SendAsEntry, frozenset[str]]]:
    for account in (identity.account, "*"):
        for entry, texts in rules.by_account.get(account, ()):
            if entry.expires_at is None or now < entry.expires_at:
                yield entry, texts


def _expected(rules: SendAsRules, identity: Identity, now: float) -> str:
    """Such as "expected alice@example.com or sales@example.com", in printable ASCII."""
    named = [
        *_texts(identity, rules.domains[: EXPECTED_MAX + 1]),
        *(str(p) for entry, _ in _granted(rules, identity, now) for p in entry.reverse_paths),
    ]
    shown = [text for text in dict.fromkeys(named) if text.isascii() and text.isprintable()]
    if not shown:
        return "nothing is granted to this account"
    more = " or others" if len(shown) > EXPECTED_MAX else ""
    return f"expected {' or '.join(shown[:EXPECTED_MAX])}{more}"
