"""Every published way to ask a server to relay, each as one row.

Why: servers that refuse <victim@elsewhere> have relayed <victim%elsewhere@ours>, or the same in quotes, or behind a
    source route.  Each row is a bug or a habit that some server had.
Trust: the names put into a form are checked by whoever makes ``Names``; here they are text.
Promise: a form ends in a question to which only a relay says yes: its last RCPT leads outside, or to a made-up user.
Sources: RFC 5321 appendix C (source routes), RFC 1123 §5.2.16 to §5.2.19 (percent, routes), RFC 976 (bang paths), RFC
    4954 §5 (AUTH=), RFC 3461 §4.2 (ORCPT=), RFC 6531 (addresses in UTF-8); the lists of forms of nmap
    (smtp-open-relay), Metasploit (smtp_relay), abuse.net, mail-abuse.org and rlytest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

# Whose the right-most domain is: who must answer for the address if nothing in it is read as a route.
Landing = Literal["outside", "ours", "literal", "server", "localhost", "bare"]
LANDINGS: tuple[Landing, ...] = ("ours", "literal", "server", "localhost", "bare")  # where made-up users are tried

_SENDMAIL_CF = "sendmail.cf of BSD, IDA and SunOS"
_NMAP = "nmap smtp-open-relay"
_ABUSE = "abuse.net, mail-abuse.org, rlytest"


class Names(NamedTuple):
    """What is put into the forms.

    Attributes:
        user, outside: the foreign address, local-part and domain.
        ours: a local domain of the server.
        literal: the server's address as an address literal.
        server: its host name.
        nobody: a local-part that nobody has.
    """

    user: str
    outside: str
    ours: str
    literal: str
    server: str
    nobody: str

    def fill(self, pattern: str) -> str:
        """A pattern of a form with the names in it."""
        fields = self._asdict() | {"USER": self.user.upper(), "OUTSIDE": self.outside.upper()}
        return pattern.format(**fields, lookalike=_lookalike(self.ours))


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask.

    Attributes:
        id: its name in reports.
        rcpt: what follows ``verb``.
        why: a sentence: who might say yes, and why.
        mail: what follows "MAIL FROM:"; "" for whatever reverse-path the server takes.
        hello: what EHLO says first; "" for our own name.
        first: a recipient named before, so that the transaction is a good one.
        despite: RCPT is said even if MAIL was refused.
        together: the commands are sent in one go.  RFC 2920.
    """

    id: str
    rcpt: str
    why: str
    source: str
    lands: Landing = "outside"
    mail: str = ""
    hello: str = ""
    first: str = ""
    verb: str = "RCPT TO:"
    despite: bool = False
    together: bool = False

    @property
    def to_the_victim(self) -> bool:
        """Whether a message that relays in this way reaches the foreign address, and nobody else."""
        return not self.first and ("{outside}" in self.rcpt or "{OUTSIDE}" in self.rcpt)


PLAIN = "<{user}@{outside}>"

FORMS = (
    # ---- a foreign address as it is; only who asks differs
    Form("null-sender", PLAIN, "a bounce for a stranger: the null reverse-path opens some doors", _NMAP, mail="<>"),
    Form("foreign-sender", PLAIN, "a stranger writes to a stranger", _NMAP, mail="<antispam@{outside}>"),
    Form("same-sender", PLAIN, "the victim writes to itself", _ABUSE, mail=PLAIN),
    Form("local-sender", PLAIN, "whoever claims a local address may relay", _NMAP, mail="<postmaster@{ours}>"),
    Form("literal-sender", PLAIN, "the server's own address counts as local", _NMAP, mail="<postmaster@{literal}>"),
    Form("server-sender", PLAIN, "the server's own name counts as local", _NMAP, mail="<postmaster@{server}>"),
    Form("localhost-sender", PLAIN, "localhost counts as local", _ABUSE, mail="<postmaster@localhost>"),
    Form("bare-sender", PLAIN, "a sender without domain is completed to a local one", _ABUSE, mail="<postmaster>"),
    Form("hello-localhost", PLAIN, "whoever says that he is this host is believed", _ABUSE, hello="localhost"),
    Form("hello-ours", PLAIN, "whoever names a local domain in EHLO is believed", _ABUSE, hello="{ours}"),
    Form("hello-literal", PLAIN, "whoever names the server's address in EHLO is believed", _ABUSE, hello="{literal}"),
    # ---- percent: the last one becomes the at-sign once the local domain is taken off
    Form("percent-ours", "<{user}%{outside}@{ours}>", "the percent hack", _NMAP, "ours"),
    Form("percent-literal", "<{user}%{outside}@{literal}>", "percent hack at the server's address", _NMAP, "literal"),
    Form("percent-server", "<{user}%{outside}@{server}>", "percent hack at the server's name", _ABUSE, "server"),
    Form("percent-localhost", "<{user}%{outside}@localhost>", "percent hack at localhost", _ABUSE, "localhost"),
    Form("percent-bare", "<{user}%{outside}>", "percent hack without a domain", _ABUSE, "bare"),
    Form("percent-twice", "<{user}%{outside}%{ours}@{ours}>", "only one percent is looked at", _ABUSE, "ours"),
    # ---- quotes: an at-sign inside them is no separator, until somebody takes the quotes off
    Form("quoted-whole", '<"{user}@{outside}">', "quotes are taken off, and an address appears", _NMAP, "bare"),
    Form("quoted-percent-bare", '<"{user}%{outside}">', "the same with percent", _NMAP, "bare"),
    Form("quoted-ours", '<"{user}@{outside}"@{ours}>', "quotes are taken off with the local domain", _NMAP, "ours"),
    Form("quoted-literal", '<"{user}@{outside}"@{literal}>', "the same at the server's address", _NMAP, "literal"),
    Form("quoted-percent-ours", '<"{user}%{outside}"@{ours}>', "quotes hide the percent", _ABUSE, "ours"),
    Form("escaped-at", "<{user}\\@{outside}@{ours}>", "a backslash hides the first at-sign", "RFC 5321 §4.1.2", "ours"),
    # ---- more than one at-sign, or none behind it
    Form("doubled-at-ours", "<{user}@{outside}@{ours}>", "split at the first at-sign, not the last", _NMAP, "ours"),
    Form("doubled-at-literal", "<{user}@{outside}@{literal}>", "the same at the server's address", _NMAP, "literal"),
    Form("trailing-at", "<{user}@{outside}@>", "the empty domain counts as local", _ABUSE, "bare"),
    # ---- bang: UUCP paths are read from the left
    Form("bang-bare", "<{outside}!{user}>", "a UUCP path", _NMAP, "bare"),
    Form("bang-ours", "<{outside}!{user}@{ours}>", "a UUCP path at the local domain", _NMAP, "ours"),
    Form("caret-ours", "<{outside}^{user}@{ours}>", "a UUCP path, for shells that take a bang", _SENDMAIL_CF, "ours"),
    Form("bang-literal", "<{outside}!{user}@{literal}>", "a UUCP path at the server's address", _NMAP, "literal"),
    Form("bang-path", "<{ours}!{outside}!{user}>", "a UUCP path of two hops", "RFC 976", "bare"),
    Form("bang-through-us", "<{ours}!{user}@{outside}>", "the local domain is seen first", "RFC 976"),
    # ---- source routes: the first hop is local, the mailbox is not
    Form("route-ours", "<@{ours}:{user}@{outside}>", "a source route through the local domain", _NMAP),
    Form("route-literal", "<@{literal}:{user}@{outside}>", "a source route through the server's address", _NMAP),
    Form("route-two", "<@{ours},@{server}:{user}@{outside}>", "a source route of two hops", "RFC 5321 appendix C"),
    # ---- the same address, spelled so that a check of text misses it
    Form("no-brackets", "{user}@{outside}", "only brackets are checked", _ABUSE, mail="postmaster@{ours}"),
    Form("space-before", " <{user}@{outside}>", "a space where none belongs", "RFC 5321 §4.1.1.3"),
    Form("tab-before", "\t<{user}@{outside}>", "a tab where none belongs", "RFC 5321 §4.1.1.3"),
    Form("space-inside", "< {user}@{outside} >", "spaces within the brackets", "RFC 5321 §4.1.2"),
    Form("trailing-dot", "<{user}@{outside}.>", "the root's dot makes it another text", "RFC 1034 §3.1"),
    Form("upper-case", "<{USER}@{OUTSIDE}>", "compared letter by letter", "RFC 5321 §2.4", verb="rcpt to:"),
    Form("comment-ours", "<{user}@{outside}(@{ours})>", "the local domain in a comment", "RFC 5322 §3.2.2"),
    Form("comment-local", "<{user}(@{ours})@{outside}>", "a comment within the local-part", "RFC 5322 §3.2.2"),
    Form("pair-comma", "<{nobody}@{ours},{user}@{outside}>", "only the first of two is checked", _ABUSE, "ours"),
    Form("pair-brackets", "<{nobody}@{ours}> <{user}@{outside}>", "the last bracket counts", _ABUSE, "ours"),
    Form("full-width-at", "<{user}＠{outside}@{ours}>", "U+FF20 is folded to an at-sign", "RFC 6531, UTS 46", "ours"),
    Form("look-alike", "<{user}@{lookalike}>", "looks like the local domain, and is another", "RFC 6531, UTS 39"),
    # ---- addresses instead of names; these are of the blocks for documentation, and nobody's
    Form("address-v4", "<{user}@[192.0.2.1]>", "an address literal has no domain to check", "RFC 5321 §4.1.3"),
    Form("address-v6", "<{user}@[IPv6:2001:db8::1]>", "the same in IPv6", "RFC 5321 §4.1.3"),
    Form("address-decimal", "<{user}@[3221225985]>", "192.0.2.1 as one number", "inet_aton(3)"),
    Form("address-bare", "<{user}@192.0.2.1>", "an address that looks like a name", _ABUSE),
    # ---- parameters and state
    Form("auth-parameter", PLAIN, "AUTH= is taken for a login", "RFC 4954 §5", mail="<> AUTH=<>"),
    Form(
        "auth-parameter-local", PLAIN, "AUTH= names somebody local", "RFC 4954 §5",
        mail="<postmaster@{ours}> AUTH=postmaster@{ours}",
    ),
    Form("orcpt", PLAIN + " ORCPT=rfc822;postmaster@{ours}", "ORCPT= is checked instead", "RFC 3461 §4.2"),
    Form("after-local", PLAIN, "a local recipient before it clears the way", "Exim tests", first="<postmaster@{ours}>"),
    Form("after-refused-mail", PLAIN, "the refusal of MAIL is forgotten", "RFC 5321 §4.1.4", mail="<@>", despite=True),
    Form(
        "pipelined", PLAIN, "commands in one go are not all checked", "RFC 2920",
        first="<postmaster@{ours}>", together=True,
    ),
)  # fmt: skip


class Question(NamedTuple):
    """A form with the names in it.

    Attributes:
        id: the form's, with the local domain behind it where there are several.
        lands: the domain that must answer for the address, "" for none; ``outside`` says whether it is foreign.
    """

    id: str
    form: Form
    mail: str
    rcpt: str
    hello: str
    first: str
    lands: str
    outside: bool


def questions(names: Names, more_local: Iterable[str] = ()) -> Iterator[Question]:
    """Every form, those that name the local domain once for each; what would be asked twice is asked once."""
    asked = set()
    for ours in (names.ours, *more_local):
        for form in FORMS:
            if form.id == "look-alike" and _lookalike(ours) == ours:
                continue  # it has no such letters, or is an address
            question = _question(
                form, names._replace(ours=ours), form.id if ours == names.ours else f"{form.id}:{ours}"
            )
            what = (question.mail, form.verb + question.rcpt, question.hello, question.first, form.together)
            if what not in asked:
                asked.add(what)
                yield question


def domain_of(landing: Landing, names: Names) -> str:
    """The domain on which forms of this kind land."""
    domains = {"ours": names.ours, "literal": names.literal, "server": names.server, "localhost": "localhost"}
    return domains.get(landing, "")


def _question(form: Form, names: Names, identity: str) -> Question:
    return Question(
        identity,
        form,
        names.fill(form.mail),
        names.fill(form.rcpt),
        names.fill(form.hello),
        names.fill(form.first),
        domain_of(form.lands, names),
        form.lands == "outside",
    )


def _lookalike(domain: str) -> str:
    """The domain, before its last label with Cyrillic letters for Latin ones of the same shape where it has such."""
    name, dot, last = domain.rpartition(".")
    return name.translate(str.maketrans("aceopxy", "асеорху")) + dot + last
