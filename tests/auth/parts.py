"""What tests of several verifiers share: users with awkward passwords, TLS contexts, questions."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import trustme

from gatepost.auth import Denied, Outcome, Unavailable, Verified
from gatepost.smtp.sasl import Password

PASSWORDS = {
    "alice@example.com": "wonder",
    "spaces@example.com": " two  words ",
    "quotes@example.com": """say "so" \\ it's 100%s of {user}""",
    "octets@example.com": "pässwörd € 密碼",
    "signs@example.com": "a:b;c<d>e@f=g,h*i(j)k&l|m!n#o+p",
    "long@example.com": "x" * 400,
}


def password(user: str, secret: str = "") -> Password:
    return Password(user, secret or PASSWORDS[user])


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client that knows the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def serving(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def is_yes(outcome: Outcome, account: str) -> bool:
    return isinstance(outcome, Verified) and outcome.account == account


def is_no(outcome: Outcome) -> bool:
    return isinstance(outcome, Denied)


def is_unknown(outcome: Outcome) -> bool:
    return isinstance(outcome, Unavailable)


def tells(secret: str, *things: Any) -> bool:
    """The secret is in what a log or a traceback would show of these."""
    return any(secret in text for thing in things for text in (str(thing), repr(thing)))
