"""Verify by Dovecot's auth protocol.

Why: where Dovecot knows the users, its auth service says so without a mailbox being opened.
Trust: the socket is the administrator's, its octets are bounded even so; of what follows a secret only known words are
    repeated.
Promise: OK to our request is yes, FAIL without a temporary reason is no, everything else is unknown.  A connection is
    made for each login: nothing needs to be mended when Dovecot starts anew.
Sources: Dovecot's documentation of its authentication protocol, version 1 (VERSION, CPID, MECH, DONE; AUTH, OK, FAIL);
    RFC 4616 (PLAIN).
"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
from contextlib import closing
from typing import ClassVar, Final

from gatepost.auth import Credentials, Denied, Outcome, Unavailable, Verified
from gatepost.auth.inquiry import Inquiries, Lines, Trouble, connect, connect_unix
from gatepost.auth.login import NOT_A_PASSWORD, NOT_CARRIED, carried
from gatepost.auth.settings import DovecotServer
from gatepost.smtp.sasl import Password, client_initial, prepare_user

TOGETHER_MAX = 20  # logins at a time
HANDSHAKE_LINES_MAX = 100

_PROCESS_IDS: Final = (1 << 31) - 1
_LF: Final = b"\n"
_HELLO: Final = b"VERSION\t1\t1\nCPID\t%d\n"
# We ask where the gate has allowed AUTH, so that the client's line is as secure as the administrator wants it; no
# mail process follows up on the login (nologin).  resp comes last.
_REQUEST: Final = b"AUTH\t1\tPLAIN\tservice=smtp\tsecured\tnologin\tresp=%b"
_ESCAPED = re.compile(rb"\x01(.)", re.DOTALL)
_UNESCAPED = {b"0": b"\0", b"1": b"\x01", b"t": b"\t", b"n": b"\n", b"r": b"\r"}
_WHY_DENIED = {
    b"user_disabled": "the user is disabled",
    b"pass_expired": "the password has expired",
    b"authz_fail": "the user may not log in",
}


class DovecotVerifier:
    """[auth.dovecot]."""

    name: ClassVar[str] = "dovecot"

    def __init__(self, server: DovecotServer) -> None:
        self._server = server
        peer = server.path or f"{server.host}:{server.port}"
        self._inquiries = Inquiries(peer, server.timeout_s, TOGETHER_MAX)

    async def verify(self, credentials: Credentials) -> Outcome:
        if not isinstance(credentials, Password):
            return NOT_A_PASSWORD
        login = Password(credentials.user, credentials.secret)  # for nobody else: the caller judges an authzid
        if not carried(login.user, login.secret):
            return NOT_CARRIED
        return await self._inquiries.ask(lambda deadline: self._ask(login, deadline))

    async def close(self) -> None:
        """Nothing is kept between logins."""

    async def _ask(self, login: Password, deadline: asyncio.Timeout) -> Outcome:
        server = self._server
        if server.path:
            lines = await connect_unix(server.path, _LF)
        else:
            lines = await connect(server.host, server.port, deadline, _LF)
        with closing(lines):
            await _shake_hands(lines)
            request = _REQUEST % base64.b64encode(client_initial("PLAIN", login))
            return _judged(await lines.ask(request), login)


async def _shake_hands(lines: Lines) -> None:
    """Versions and mechanisms.

    Dovecot takes two connections with one process id for a mistake, so that each of ours has its own number.
    """
    lines.send(_HELLO % (1 + secrets.randbelow(_PROCESS_IDS)))
    if (await lines.line()).split(b"\t")[:2] != [b"VERSION", b"1"]:
        raise Trouble("it does not speak version 1 of Dovecot's auth protocol")
    mechanisms = set()
    for _ in range(HANDSHAKE_LINES_MAX):
        command, *parameters = (await lines.line()).split(b"\t")
        if command == b"DONE":
            break
        if command == b"MECH":
            mechanisms |= {mechanism.upper() for mechanism in parameters[:1]}
    else:
        raise Trouble("it does not come to an end with its greeting")
    if b"PLAIN" not in mechanisms:
        raise Trouble("it does not offer PLAIN")


def _judged(line: bytes, login: Password) -> Outcome:
    command, *parameters = line.split(b"\t")
    if parameters[:1] != [b"1"]:  # the number of our request
        raise Trouble("its answer is not to our request")
    found = {name: value for name, _, value in (parameter.partition(b"=") for parameter in parameters[1:])}
    if command == b"OK":
        return Verified(_account(found.get(b"user"), login))
    if command != b"FAIL":
        raise Trouble("its answer is neither OK nor FAIL")
    if b"temp" in found or found.get(b"code") == b"temp_fail":
        return Unavailable("it has a failure that will pass")
    if b"authz" in found:
        return Denied(_WHY_DENIED[b"authz_fail"])
    return Denied(_WHY_DENIED.get(found.get(b"code", b""), "wrong user name or password"))


def _account(canonical: bytes | None, login: Password) -> str:
    """The name that Dovecot has for the user; what the client typed where it says none."""
    if canonical is None:
        return login.user.lower()
    octets = _ESCAPED.sub(lambda match: _UNESCAPED.get(match[1], match[1]), canonical)
    user = prepare_user(octets.decode("utf-8", "replace"))
    if user is None:
        raise Trouble("it names the user in a way that is no name")
    return user.lower()
