"""One command line to one value, or to the reply that refuses it.

Why: what a client asked for is decided once; the gate acts on the value, and what it asks of a backend is made from the
    value again (``octets``), so that no unknown verb, no unknown parameter and no odd spelling ever goes on.
Trust: every octet is hostile; CR, LF and NUL were refused by the framing, and are refused here again where they matter.
Promise: never raises on what a peer sent; every number is ASCII digits of bounded length; time is linear in the line.
Sources: RFC 5321 §4.1 (commands), §4.5.3.1.4 (lengths); RFC 1870 (SIZE), RFC 6152 (8BITMIME), RFC 6531 (SMTPUTF8),
    RFC 3030 (BDAT), RFC 3461 and RFC 6533 (DSN parameters), RFC 4954 (AUTH), RFC 3207 (STARTTLS);
    Postfix's description of XCLIENT.
    Stricter: exactly one space after MAIL and RCPT and none before the colon; a parameter given twice is an error.
    Wider: spaces before the path, a plain address without brackets, lower-case hexadecimal digits in xtext.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, Literal, NamedTuple

from gatepost.smtp.path import (
    NULL_REVERSE_PATH,
    ForwardPath,
    PathDefect,
    ReversePath,
    Shape,
    parse_domain,
    parse_forward_path,
    parse_plain_mailbox,
    parse_reverse_path,
    split_path,
)
from gatepost.smtp.preamble import unmapped
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import BASE64, prepare_user

# RFC 5321 §4.5.3.1.4 gives 512 octets with CRLF; each extension adds to it: SIZE 26, 8BITMIME 17, SMTPUTF8 10,
# AUTH 500, DSN 100 for MAIL and 500 for RCPT.  One bound above their sum serves all commands.
COMMAND_OCTETS_MAX = 2048
AUTH_OCTETS_MAX = 12288  # RFC 4954 §4: base64 lines of SASL exchanges

SIZE_DIGITS_MAX = 20  # RFC 1870 §3
BDAT_DIGITS_MAX = 18
HELLO_OCTETS_MAX = 255  # RFC 5321 §4.5.3.1.2
ENVID_OCTETS_MAX = 100  # RFC 3461 §4.4
ORCPT_OCTETS_MAX = 500  # RFC 3461 §4.2
MECHANISM_OCTETS_MAX = 20  # RFC 4422 §3.1
XCLIENT_VALUE_OCTETS_MAX = 768  # xtext of a host name of 255 octets or a user name of 256


class MailParameters(NamedTuple):
    """Parameters of MAIL.

    Attributes:
        size_octets: declared, and no more than a claim.
        body: "7BIT", "8BITMIME" or, where it was offered, "BINARYMIME".
        ret: "FULL" or "HDRS"; envid: decoded.  RFC 3461 §4.3, §4.4.
        auth: who submitted the message first, as the client says; "" for AUTH=<>.  It confers nothing.  RFC 4954 §5.
    """

    size_octets: int | None = None
    body: str | None = None
    smtputf8: bool = False
    ret: str | None = None
    envid: str | None = None
    auth: str | None = None

    def octets(self, offered: frozenset[str]) -> bytes:
        """The parameters for a server that offers these keywords, each with a space before it.

        AUTH= is never handed on: it would vouch for an identity that this gate did not verify.  An ENVID that grew over
        its limit by our encoding is left out: a notification without reference is better than a message refused.
        """
        if self == NO_MAIL_PARAMETERS:
            return b""
        out = ""
        if self.size_octets is not None and "SIZE" in offered:
            out += f" SIZE={self.size_octets}"
        if self.body is not None and ("BINARYMIME" if self.body == "BINARYMIME" else "8BITMIME") in offered:
            out += f" BODY={self.body}"
        if self.smtputf8 and "SMTPUTF8" in offered:
            out += " SMTPUTF8"
        if "DSN" in offered:
            if self.ret is not None:
                out += f" RET={self.ret}"
            if self.envid is not None and len(envid := _xtext(self.envid)) <= ENVID_OCTETS_MAX:
                out += f" ENVID={envid}"
        return out.encode("ascii")


class RcptParameters(NamedTuple):
    """Parameters of RCPT.  RFC 3461 §4.1, §4.2.

    Attributes:
        notify: ("NEVER",), or of "SUCCESS", "FAILURE", "DELAY" in this order; () where it was not given.
        orcpt: address type in lower case and address, decoded.  Never a place to send to.
    """

    notify: tuple[str, ...] = ()
    orcpt: tuple[str, str] | None = None

    def octets(self, offered: frozenset[str]) -> bytes:
        """The parameters for a server that offers these keywords, each with a space before it.

        An ORCPT that grew over its limit by our encoding is left out, as with ENVID.
        """
        if self == NO_RCPT_PARAMETERS or "DSN" not in offered:
            return b""
        out = ""
        if self.notify:
            out += " NOTIFY=" + ",".join(self.notify)
        if self.orcpt is not None and len(orcpt := _orcpt_octets(*self.orcpt)) <= ORCPT_OCTETS_MAX:
            out += f" ORCPT={orcpt}"
        return out.encode("ascii")


NO_MAIL_PARAMETERS: Final = MailParameters()
NO_RCPT_PARAMETERS: Final = RcptParameters()


NAMELESS: Final = "NAMELESS"  # no keyword of EHLO: among what is offered it lets a client say EHLO without a name


class Hello(NamedTuple):
    """EHLO, HELO or (where "LHLO" is offered) LHLO.

    Attributes:
        name: a claim, printable but otherwise arbitrary; "" only where NAMELESS clients are borne.
    """

    verb: str
    name: str


class Mail(NamedTuple):
    """RFC 5321 §4.1.1.2."""

    reverse_path: ReversePath
    parameters: MailParameters
    verb: Literal["MAIL"] = "MAIL"


class Rcpt(NamedTuple):
    """RFC 5321 §4.1.1.3."""

    forward_path: ForwardPath
    parameters: RcptParameters
    verb: Literal["RCPT"] = "RCPT"


class Data(NamedTuple):
    """RFC 5321 §4.1.1.4."""

    verb: Literal["DATA"] = "DATA"


class Bdat(NamedTuple):
    """RFC 3030 §2."""

    size_octets: int
    last: bool
    verb: Literal["BDAT"] = "BDAT"


class Rset(NamedTuple):
    """RFC 5321 §4.1.1.5."""

    verb: Literal["RSET"] = "RSET"


class Noop(NamedTuple):
    """RFC 5321 §4.1.1.9.  Its argument is ignored."""

    verb: Literal["NOOP"] = "NOOP"


class Help(NamedTuple):
    """RFC 5321 §4.1.1.8."""

    topic: str
    verb: Literal["HELP"] = "HELP"


class Vrfy(NamedTuple):
    """RFC 5321 §4.1.1.6."""

    text: str
    verb: Literal["VRFY"] = "VRFY"


class Expn(NamedTuple):
    """RFC 5321 §4.1.1.7."""

    text: str
    verb: Literal["EXPN"] = "EXPN"


class StartTls(NamedTuple):
    """RFC 3207 §4."""

    verb: Literal["STARTTLS"] = "STARTTLS"


class Auth(NamedTuple):
    """``initial``: the initial response, still base64; b"" for "=", None where there was none.  RFC 4954 §4."""

    mechanism: str
    initial: bytes | None
    verb: Literal["AUTH"] = "AUTH"

    def __repr__(self) -> str:
        return f"Auth(mechanism={self.mechanism!r})"  # the initial response is nearly always a secret


class Xclient(NamedTuple):
    """XCLIENT: a listed front end says who its client is, and the session begins anew with that client.

    Only where "XCLIENT" is offered.  As with STARTTLS, octets behind the command may be another's: whoever answers it
    with 220 must first have seen that the engine's ``unread_octets`` is 0.

    Attributes:
        name: the client's host name as the front end looked it up, lower case.
        address, port; destination_address, destination_port: both ends of the client's connection.  A mapped IPv6
            address is the IPv4 address.
        protocol: "SMTP" or "ESMTP"; hello: the client's claim.
        login: the user name that the front end authenticated, prepared as ``sasl.prepare_user`` does.
        unavailable: the attributes that the front end gave and does not know ("[UNAVAILABLE]", "[TEMPUNAVAIL]").  What
            is None and not named here was not given, and stays as an earlier XCLIENT said.  A client whose "ADDR" is
            named here must not inherit the front end's own rights.
    """

    name: str | None = None
    address: IPv4Address | IPv6Address | None = None
    port: int | None = None
    protocol: str | None = None
    hello: str | None = None
    login: str | None = None
    destination_address: IPv4Address | IPv6Address | None = None
    destination_port: int | None = None
    unavailable: frozenset[str] = frozenset()
    verb: Literal["XCLIENT"] = "XCLIENT"


class Quit(NamedTuple):
    """RFC 5321 §4.1.1.10."""

    verb: Literal["QUIT"] = "QUIT"


class Foreign(NamedTuple):
    """The peer does not speak SMTP: a browser made to post here, or a PROXY header from somebody who may not send one.

    Whatever follows was written for another protocol, so that the only answer is to hang up.
    """

    protocol: str
    verb: Literal["FOREIGN"] = "FOREIGN"


Command = (
    Hello | Mail | Rcpt | Data | Bdat | Rset | Noop | Help | Vrfy | Expn | StartTls | Auth | Xclient | Quit | Foreign
)  # fmt: skip

_DATA: Final = Data()
_RSET: Final = Rset()
_NOOP: Final = Noop()
_STARTTLS: Final = StartTls()
_QUIT: Final = Quit()

_TOO_LONG = Reply(500, "Line too long", "5.5.2")
_UNKNOWN = Reply(500, "Command not recognized", "5.5.1")
_NOT_OFFERED = Reply(502, "Command not implemented", "5.5.1")
_NO_ARGUMENT = Reply(501, "This command takes no argument", "5.5.4")
_NEEDS_ARGUMENT = Reply(501, "This command needs an argument", "5.5.4")
_BAD_ARGUMENT = Reply(501, "The argument is not printable text", "5.5.4")
_BAD_HELLO = Reply(501, f"A host name of 1 to {HELLO_OCTETS_MAX} printable octets is needed", "5.5.4")
_BAD_MAIL = Reply(501, "Syntax: MAIL FROM:<address> [parameters]", "5.5.4")
_BAD_RCPT = Reply(501, "Syntax: RCPT TO:<address> [parameters]", "5.5.4")
_BAD_BDAT = Reply(501, "Syntax: BDAT size-in-octets [LAST]", "5.5.4")
_BAD_XCLIENT = Reply(501, "Syntax: XCLIENT attribute=value, each of those offered at most once", "5.5.4")
_BAD_AUTH = Reply(501, "Syntax: AUTH mechanism [initial-response]", "5.5.4")


def parse_command(line: bytes, offered: frozenset[str], *, smtputf8: bool | None = None) -> Command | Reply:
    """What one line asks for.

    Args:
        line: hostile; without CRLF.
        offered: the EHLO keywords that this session offers to this client at this moment; "EXPN" and "LHLO" likewise.
        smtputf8: whether the MAIL of the open transaction carried SMTPUTF8, so that a forward-path may hold UTF-8
            (RFC 6531 §3.4).  None: wherever SMTPUTF8 is offered; the caller then looks at the transaction itself.

    Returns:
        The command, or the reply that refuses the line.
    """
    verb, _, argument = line.partition(b" ")
    parse = _VERBS.get(verb.upper())  # bytes.upper() knows ASCII letters only, so that no "ı" becomes an "I"
    if len(line) + 2 > COMMAND_OCTETS_MAX and (parse is not _auth or len(line) + 2 > AUTH_OCTETS_MAX):
        return _TOO_LONG
    if parse is None:
        return _UNKNOWN
    return parse(argument, offered, "SMTPUTF8" in offered if smtputf8 is None else smtputf8)


def _ehlo(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    name = _name(argument, offered)
    return _BAD_HELLO if name is None else Hello("EHLO", name)


def _helo(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    name = _name(argument, offered)
    return _BAD_HELLO if name is None else Hello("HELO", name)


def _lhlo(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "LHLO" not in offered:
        return _UNKNOWN
    name = _name(argument, offered)
    return _BAD_HELLO if name is None else Hello("LHLO", name)


def _mail(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if argument[:5].upper() != b"FROM:":
        return _BAD_MAIL
    argument = argument[5:]
    octets, _, rest = argument.partition(b" ")
    reverse_path: ReversePath | PathDefect | None
    # A plain path holds no space, and neither does "<>": the first one ends it.  Anything else is split with care.
    reverse_path = NULL_REVERSE_PATH if octets == b"<>" else parse_plain_mailbox(octets)
    if reverse_path is None:
        split = split_path(argument)
        if isinstance(split, PathDefect):
            return split.reply
        octets, rest = split
    parameters = _mail_parameters(rest, offered) if rest else NO_MAIL_PARAMETERS
    if isinstance(parameters, Reply):
        return parameters
    if reverse_path is None:
        reverse_path = parse_reverse_path(octets, smtputf8=parameters.smtputf8)
        if isinstance(reverse_path, PathDefect):
            return reverse_path.reply
    return Mail(reverse_path, parameters)


def _rcpt(argument: bytes, offered: frozenset[str], smtputf8: bool) -> Command | Reply:
    if argument[:3].upper() != b"TO:":
        return _BAD_RCPT
    argument = argument[3:]
    octets, _, rest = argument.partition(b" ")
    mailbox = parse_plain_mailbox(octets)
    if mailbox is not None:
        forward_path = ForwardPath(mailbox, Shape.PLAIN)
    else:
        split = split_path(argument)
        if isinstance(split, PathDefect):
            return split.reply
        octets, rest = split
        parsed = parse_forward_path(octets, smtputf8=smtputf8)
        if isinstance(parsed, PathDefect):
            return parsed.reply
        forward_path = parsed
    parameters = _rcpt_parameters(rest, offered, smtputf8) if rest else NO_RCPT_PARAMETERS
    return parameters if isinstance(parameters, Reply) else Rcpt(forward_path, parameters)


def _data(argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return _NO_ARGUMENT if argument.strip(b" ") else _DATA


def _bdat(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "CHUNKING" not in offered:
        return _NOT_OFFERED
    match = _BDAT.fullmatch(argument)
    return _BAD_BDAT if match is None else Bdat(int(match[1]), match[2] is not None)


def _rset(argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return _NO_ARGUMENT if argument.strip(b" ") else _RSET


def _noop(argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return _BAD_ARGUMENT if _text(argument, utf8=True) is None else _NOOP  # RFC 5321 §4.1.1.9: the string is ignored


def _help(argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    topic = _text(argument, utf8=False)
    return _BAD_ARGUMENT if topic is None else Help(topic)


def _vrfy(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    text = _text(argument, utf8="SMTPUTF8" in offered)
    if text is None:
        return _BAD_ARGUMENT
    return Vrfy(text) if text else _NEEDS_ARGUMENT


def _expn(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "EXPN" not in offered:
        return _NOT_OFFERED
    text = _text(argument, utf8="SMTPUTF8" in offered)
    if text is None:
        return _BAD_ARGUMENT
    return Expn(text) if text else _NEEDS_ARGUMENT


def _starttls(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "STARTTLS" not in offered:
        return _NOT_OFFERED
    return _NO_ARGUMENT if argument.strip(b" ") else _STARTTLS  # RFC 3207 §4


def _auth(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "AUTH" not in offered:
        return _NOT_OFFERED
    match = _AUTH.fullmatch(argument)
    if match is None:
        return _BAD_AUTH
    initial = match[2]
    return Auth(match[1].upper().decode(), b"" if initial == b"=" else initial)


def _xclient(argument: bytes, offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    if "XCLIENT" not in offered:
        return _NOT_OFFERED
    found = _split_parameters(argument)
    if isinstance(found, Reply) or not found:
        return _BAD_XCLIENT
    fields: dict[str, Any] = {}
    unavailable: set[str] = set()
    for keyword, value in found.items():
        attribute = _XCLIENT.get(keyword)
        if attribute is None:
            return _BAD_XCLIENT
        field, read = attribute
        octets = _xtext_octets(value, XCLIENT_VALUE_OCTETS_MAX)
        if octets is None:
            return _bad_value(keyword.decode("ascii"))
        if octets.upper() in (b"[UNAVAILABLE]", b"[TEMPUNAVAIL]"):
            unavailable.add(keyword.decode("ascii"))
            continue
        fields[field] = read(octets, offered)
        if fields[field] is None:
            return _bad_value(keyword.decode("ascii"))
    return Xclient(**fields, unavailable=frozenset(unavailable))


def _quit(argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return _NO_ARGUMENT if argument.strip(b" ") else _QUIT


def _not_offered(_argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return _NOT_OFFERED


def _http(_argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return Foreign("HTTP")


def _proxy(_argument: bytes, _offered: frozenset[str], _smtputf8: bool) -> Command | Reply:
    return Foreign("PROXY")


_VERBS: Final[dict[bytes, Callable[[bytes, frozenset[str], bool], Command | Reply]]] = {
    b"EHLO": _ehlo,
    b"HELO": _helo,
    b"LHLO": _lhlo,
    b"MAIL": _mail,
    b"RCPT": _rcpt,
    b"DATA": _data,
    b"BDAT": _bdat,
    b"RSET": _rset,
    b"NOOP": _noop,
    b"HELP": _help,
    b"VRFY": _vrfy,
    b"EXPN": _expn,
    b"STARTTLS": _starttls,
    b"AUTH": _auth,
    b"XCLIENT": _xclient,
    b"QUIT": _quit,
    # Known by name, so that a client is told 502 and goes on without: RFC 821 (SEND SOML SAML TURN), RFC 1985,
    # RFC 2645, RFC 4468, and one that only tells another server's log who the client was.
    b"SEND": _not_offered,
    b"SOML": _not_offered,
    b"SAML": _not_offered,
    b"TURN": _not_offered,
    b"ETRN": _not_offered,
    b"ATRN": _not_offered,
    b"BURL": _not_offered,
    b"XFORWARD": _not_offered,
    # RFC 9110 §9.3 and RFC 5789: a web page can make its visitor's browser post SMTP commands to us.
    b"GET": _http,
    b"POST": _http,
    b"HEAD": _http,
    b"PUT": _http,
    b"DELETE": _http,
    b"OPTIONS": _http,
    b"CONNECT": _http,
    b"TRACE": _http,
    b"PATCH": _http,
    b"PROXY": _proxy,
}

# --- Arguments --------------------------------------------------------------------------------------------------------

_BDAT = re.compile(rb"([0-9]{1,%d})(?: +([Ll][Aa][Ss][Tt]))? *" % BDAT_DIGITS_MAX)  # RFC 3030 §2
_AUTH = re.compile(rb"([A-Za-z0-9_-]{1,%d})(?: +(=|%b))? *" % (MECHANISM_OCTETS_MAX, BASE64))
_PRINTABLE = re.compile(rb"[\x20-\x7e]*")


def _text(argument: bytes, *, utf8: bool) -> str | None:
    """Printable text without outer spaces, or None."""
    if _PRINTABLE.fullmatch(argument):
        return argument.strip(b" ").decode("ascii")
    if not utf8:
        return None
    try:
        text = argument.strip(b" ").decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None  # neither controls nor invisible format characters


def _name(argument: bytes, offered: frozenset[str]) -> str | None:
    """The client's claim.  RFC 5321 §4.1.4: whatever it says, mail is not refused for it."""
    name = _text(argument, utf8="SMTPUTF8" in offered)
    if name == "" and NAMELESS in offered:  # printers and scanners
        return name
    return name if name and len(argument.strip(b" ")) <= HELLO_OCTETS_MAX else None


# --- Parameters of MAIL and RCPT --------------------------------------------------------------------------------------

_KEYWORD = re.compile(rb"[A-Z0-9][A-Z0-9-]*")  # RFC 5321 §4.1.2
_SIZE = re.compile(rb"[0-9]{1,%d}" % SIZE_DIGITS_MAX)
_XTEXT = re.compile(rb"(?:[!-*,-<>-~]|\+[0-9A-Fa-f]{2})+")  # RFC 3461 §4
_XTEXT_PAIR = re.compile(rb"\+([0-9A-Fa-f]{2})")
# Both RFCs let any character be encoded.  All but these are, so that no backend finds a second address in a parameter.
_NOT_XCHAR = re.compile(r"[^A-Za-z0-9._-]")
_ADDRESS_TYPE = re.compile(rb"[A-Za-z0-9-]{1,64}")
# RFC 6533 §3: utf-8-addr-xtext, and utf-8-addr-unitext where the transaction is one of SMTPUTF8.
_UTF8_ADDRESS = re.compile(r"(?:[!-*,-<>-\[\]-~\xa0-\U0010ffff]|\\x\{[0-9A-Fa-f]{2,6}\})+")
_HEX_POINT = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_NOT_QCHAR = re.compile(r"[^A-Za-z0-9._-]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOTIFY_ORDER = ("SUCCESS", "FAILURE", "DELAY")


def _bad_value(keyword: str) -> Reply:
    return Reply(501, f"Bad value of the parameter {keyword}", "5.5.4")


def _split_parameters(rest: bytes) -> dict[bytes, bytes | None] | Reply:
    """Keywords in upper case with their values; None for a keyword without "="."""
    found: dict[bytes, bytes | None] = {}
    for parameter in rest.split(b" "):
        if not parameter:
            continue
        keyword, equals, value = parameter.partition(b"=")
        keyword = keyword.upper()
        if _KEYWORD.fullmatch(keyword) is None:
            return Reply(501, "Syntax error in parameters", "5.5.4")
        if keyword in found:
            return Reply(501, "A parameter is given twice", "5.5.4")
        found[keyword] = value if equals else None
    return found


def _not_recognized(keyword: bytes) -> Reply:
    return Reply(555, f"Parameter {keyword[:40].decode()} is not recognized or not offered here", "5.5.4")


def _mail_parameters(rest: bytes, offered: frozenset[str]) -> MailParameters | Reply:
    found = _split_parameters(rest)
    if isinstance(found, Reply):
        return found
    size_octets: int | None = None
    body: str | None = None
    smtputf8 = False
    ret: str | None = None
    envid: str | None = None
    auth: str | None = None
    for keyword, value in found.items():
        if keyword == b"SIZE" and "SIZE" in offered:
            if value is None or _SIZE.fullmatch(value) is None:
                return _bad_value("SIZE")
            size_octets = int(value)
        elif keyword == b"BODY" and "8BITMIME" in offered:
            body = _BODIES.get(value.upper()) if value else None
            if body is None:
                return _bad_value("BODY")
            if body == "BINARYMIME" and "BINARYMIME" not in offered:
                return Reply(555, "BODY=BINARYMIME is not offered here", "5.5.4")
        elif keyword == b"SMTPUTF8" and "SMTPUTF8" in offered:
            if value is not None:
                return _bad_value("SMTPUTF8")  # RFC 6531 §3.4: it has no value
            smtputf8 = True
        elif keyword == b"RET" and "DSN" in offered:
            ret = _RETURNS.get(value.upper()) if value else None
            if ret is None:
                return _bad_value("RET")
        elif keyword == b"ENVID" and "DSN" in offered:
            envid = _from_xtext(value, ENVID_OCTETS_MAX)
            if envid is None:
                return _bad_value("ENVID")
        elif keyword == b"AUTH" and "AUTH" in offered:
            auth = _auth_parameter(value)
            if auth is None:
                return _bad_value("AUTH")
        else:
            return _not_recognized(keyword)
    return MailParameters(size_octets, body, smtputf8, ret, envid, auth)


def _rcpt_parameters(rest: bytes, offered: frozenset[str], smtputf8: bool) -> RcptParameters | Reply:
    found = _split_parameters(rest)
    if isinstance(found, Reply):
        return found
    notify: tuple[str, ...] = ()
    orcpt: tuple[str, str] | None = None
    for keyword, value in found.items():
        if keyword == b"NOTIFY" and "DSN" in offered:
            words = _notify(value)
            if words is None:
                return _bad_value("NOTIFY")
            notify = words
        elif keyword == b"ORCPT" and "DSN" in offered:
            orcpt = _orcpt(value, smtputf8=smtputf8)
            if orcpt is None:
                return _bad_value("ORCPT")
        else:
            return _not_recognized(keyword)
    return RcptParameters(notify, orcpt)


_BODIES: Final = {b"7BIT": "7BIT", b"8BITMIME": "8BITMIME", b"BINARYMIME": "BINARYMIME"}
_RETURNS: Final = {b"FULL": "FULL", b"HDRS": "HDRS"}


def _notify(value: bytes | None) -> tuple[str, ...] | None:
    """RFC 3461 §4.1: NEVER alone, or each of the others at most once."""
    if value is None or not value.isascii():
        return None
    words = value.decode("ascii").upper().split(",")
    if words == ["NEVER"]:
        return ("NEVER",)
    if len(set(words)) != len(words) or not set(words) <= set(_NOTIFY_ORDER):
        return None
    return tuple(word for word in _NOTIFY_ORDER if word in words)


def _orcpt(value: bytes | None, *, smtputf8: bool) -> tuple[str, str] | None:
    """RFC 3461 §4.2, RFC 6533 §3: address type and decoded address."""
    if value is None or len(value) > ORCPT_OCTETS_MAX:
        return None
    address_type, semicolon, encoded = value.partition(b";")
    if not semicolon or _ADDRESS_TYPE.fullmatch(address_type) is None:
        return None
    kind = address_type.lower().decode("ascii")
    address = _from_utf8_address(encoded, raw=smtputf8) if kind == "utf-8" else _from_xtext(encoded, ORCPT_OCTETS_MAX)
    if address is None:
        return None
    # In ASCII alone the two types are one, and RFC 6533 has no embedded form for most of ASCII.
    return ("rfc822", address) if kind == "utf-8" and address.isascii() else (kind, address)


def _orcpt_octets(kind: str, address: str) -> str:
    if kind != "utf-8":
        return f"{kind};{_xtext(address)}"
    return kind + ";" + _NOT_QCHAR.sub(lambda match: f"\\x{{{ord(match[0]):02X}}}", address)


def _auth_parameter(value: bytes | None) -> str | None:
    """RFC 4954 §5: a mailbox in xtext, or <>.  "" for <>, None for a bad one."""
    text = _from_xtext(value, 500)
    if text is None or text == "<>":
        return None if text is None else ""
    mailbox = parse_reverse_path(b"<" + text.encode("ascii") + b">", smtputf8=False)
    return None if isinstance(mailbox, PathDefect) else str(mailbox)


def _xtext(text: str) -> str:
    """RFC 3461 §4: what is not a letter, digit, ".", "_" or "-", in two upper-case hexadecimal digits."""
    return _NOT_XCHAR.sub(lambda match: f"+{ord(match[0]):02X}", text)


def _from_xtext(value: bytes | None, octets_max: int) -> str | None:
    """The decoded text; None where it is malformed, too long or not printable ASCII (CR and LF hide in "+0D+0A")."""
    decoded = _xtext_octets(value, octets_max)
    return None if decoded is None or _PRINTABLE.fullmatch(decoded) is None else decoded.decode("ascii")


def _xtext_octets(value: bytes | None, octets_max: int) -> bytes | None:
    """The decoded octets, whatever they are; None where the value is malformed, empty or too long."""
    if value is None or len(value) > octets_max or _XTEXT.fullmatch(value) is None:
        return None
    return _XTEXT_PAIR.sub(lambda match: bytes((int(match[1], 16),)), value)


def _from_utf8_address(value: bytes, *, raw: bool) -> str | None:
    """RFC 6533 §3: the decoded address, without controls; raw UTF-8 only where ``raw``."""
    if not value.isascii() and not raw:
        return None
    try:
        text = value.decode("utf-8")
        if _UTF8_ADDRESS.fullmatch(text) is None:
            return None
        text = _HEX_POINT.sub(lambda match: chr(int(match[1], 16)), text)
        text.encode("utf-8")  # refuses surrogates
    except ValueError:
        return None
    return None if _CONTROLS.search(text) else text


# --- Attributes of XCLIENT --------------------------------------------------------------------------------------------

_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")


def _xclient_name(octets: bytes, _offered: frozenset[str]) -> str | None:
    try:
        return parse_domain(octets.decode("ascii"))
    except ValueError:  # UnicodeDecodeError is one
        return None


def _xclient_address(octets: bytes, _offered: frozenset[str]) -> IPv4Address | IPv6Address | None:
    try:
        text = octets.decode("ascii")
        if text[:5].upper() != "IPV6:":
            return IPv4Address(text)
        return None if "%" in text else unmapped(IPv6Address(text[5:]))  # a zone would be one of the front end's
    except ValueError:
        return None


def _xclient_port(octets: bytes, _offered: frozenset[str]) -> int | None:
    return int(octets) if _PORT.fullmatch(octets) and int(octets) <= 65535 else None


def _xclient_protocol(octets: bytes, _offered: frozenset[str]) -> str | None:
    return _PROTOCOLS.get(octets.upper())


def _xclient_login(octets: bytes, _offered: frozenset[str]) -> str | None:
    try:
        return prepare_user(octets.decode("utf-8"))
    except UnicodeDecodeError:
        return None


_PROTOCOLS: Final = {b"SMTP": "SMTP", b"ESMTP": "ESMTP"}
_XCLIENT: Final[dict[bytes, tuple[str, Callable[[bytes, frozenset[str]], object]]]] = {
    b"NAME": ("name", _xclient_name),
    b"ADDR": ("address", _xclient_address),
    b"PORT": ("port", _xclient_port),
    b"PROTO": ("protocol", _xclient_protocol),
    b"HELO": ("hello", _name),
    b"LOGIN": ("login", _xclient_login),
    b"DESTADDR": ("destination_address", _xclient_address),
    b"DESTPORT": ("destination_port", _xclient_port),
}
XCLIENT_ATTRIBUTES: Final = tuple(keyword.decode("ascii") for keyword in _XCLIENT)  # for EHLO to list
