"""Complaints as people send them: files of this folder, with tokens that a key of the tests seals put in.

What is replaced in a file:
    {TOKEN}             of the message complained of; {TOKEN1} and {TOKEN2} are its halves
    {OCR}               the same as a reader of images may take it
    {OTHER}             of another session of ours; {STRANGER} of another gate's key; {CUT} the first third of ours
    {INBOUND}           of the session in which the complaint itself came to us
    {BASE64 FILE}       that file, replaced likewise, as lines of base64
    {QUOTED FILE}       the same as quoted-printable
"""

from __future__ import annotations

import base64
import quopri
import re
from ipaddress import ip_address
from pathlib import Path

from gatepost.facts import Client, Identity, Session
from gatepost.gate.trace import KEY_OCTETS, TraceKey

NAME = "mx.example.com"
SECONDS = 1795688112  # Thu, 26 Nov 2026 10:15:12 +0000
KEY_BYTES = bytes(range(KEY_OCTETS))
KEY = TraceKey(KEY_BYTES)
CLIENT = ip_address("198.51.100.23")
SESSION = Session(
    "K7Q2M9XA", Client(CLIENT, 4711), "submission", "submission", "laptop.example.com", esmtp=True, tls="TLSv1.3",
    identity=Identity("anna", "PLAIN", "accounts", "laptop"),
)  # fmt: skip
OTHER_SESSION = SESSION._replace(
    reference="M3N4P5R6", client=Client(ip_address("198.51.100.99"), 1), identity=Identity("bert", "PLAIN")
)
INBOUND_SESSION = SESSION._replace(
    reference="7ABCDEFG", client=Client(ip_address("192.0.2.44"), 1), listen="mx", role="mx", identity=None
)
TOKEN = KEY.seal(SESSION, SECONDS)
INBOUND = KEY.seal(INBOUND_SESSION, SECONDS + 3600)
OTHER = KEY.seal(OTHER_SESSION, SECONDS - 86400)
STRANGER = TraceKey(bytes(reversed(KEY_BYTES))).seal(SESSION, SECONDS)
HERE = Path(__file__).parent


def misread(token: str) -> str:
    """As a reader of images may: the first of each of these letters taken for the other, and a blank in the middle."""
    for meant, shown in (("0", "O"), ("l", "1"), ("5", "S"), ("I", "l")):
        at = token.find(meant)
        if at >= 0:
            token = token[:at] + shown + token[at + 1 :]
            break
    return f"{token[:31]} {token[31:]}"


def complaint(name: str) -> bytes:
    """A file of this folder with everything in place."""
    text = (HERE / name).read_text("utf-8")
    half = len(TOKEN) // 2
    words = {
        "TOKEN": TOKEN, "TOKEN1": TOKEN[:half], "TOKEN2": TOKEN[half:], "OCR": misread(TOKEN), "OTHER": OTHER,
        "STRANGER": STRANGER, "CUT": TOKEN[: len(TOKEN) // 3], "INBOUND": INBOUND,
    }  # fmt: skip
    text = re.sub(r"\{([A-Z]+[12]?)\}", lambda found: words[found[1]], text)
    text = re.sub(r"\{BASE64 (\S+)\}\n", lambda found: base64.encodebytes(complaint(found[1])).decode(), text)
    text = re.sub(r"\{QUOTED (\S+)\}\n", lambda found: quopri.encodestring(complaint(found[1])).decode(), text)
    return text.encode()
