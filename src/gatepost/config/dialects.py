"""What a backend answered, in words: what it means under these rules, and what to do about it.

Why: twenty reply lines tell an administrator little; which grant lets which form pass to a server that relays it, much.
Trust: the backend's words are bounded; whoever shows them makes them printable.
Promise: pure; every answer is told, and what nobody could tell is said to be unknown.
Sources: RFC 5321 §4.5.1, §6.1 (bounces); RFC 6152, RFC 6531, RFC 1870, RFC 2920, RFC 3207, RFC 3461, RFC 3030.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from gatepost.backend.dialect import ELSEWHERE, FOREIGN, FORMS, NOBODY, POSTMASTER, Answer, Dialect, Form
from gatepost.config.values import size_text
from gatepost.policy import prover, relay
from gatepost.policy.prover import Exchange, Listener
from gatepost.policy.relay import RelayRules
from gatepost.smtp.path import ForwardPath, Mailbox, PathDefect, Shape, parse_forward_path


class Finding(NamedTuple):
    """One thing that the answers mean.

    Attributes:
        kind: its name for programs.
        warning: something is to be done; else it is good to know.
    """

    kind: str
    sentence: str
    warning: bool = False


class Reading(NamedTuple):
    """A forward-path that a backend reads as another address, though it is plain to every other server.

    Attributes:
        form: its name; asked, said: what the backend was asked for, and its answer.
        exchanges: what a stranger hears who says the same to the gate now.
        closed: the gate refuses it to strangers.
        passing: the grants under which it passes.
    """

    backend: str
    form: str
    asked: str
    said: str
    exchanges: tuple[Exchange, ...]
    closed: bool
    passing: tuple[str, ...]


def readings(
    dialects: Iterable[Dialect], rules: RelayRules, listeners: tuple[Listener, ...], now: float
) -> list[Reading]:
    """What backends were found to read as another address and no shape tells, each put to the policy as a stranger.

    Args:
        now: seconds since the epoch, for grants that have expired.
    """
    found = []
    for dialect in dialects:
        ours = local_domain(rules, dialect.backend) or dialect.local_domain
        for form in dialect.open_to_strangers:
            path = parse_forward_path(form.fill("user", ours).encode(), smtputf8=False)
            heard = next(heard for heard in dialect.heard if heard.id == form.id)
            exchanges = () if isinstance(path, PathDefect) else prover.heard_by_stranger(rules, listeners, path, now)
            found.append(
                Reading(
                    backend=dialect.backend,
                    form=form.id,
                    asked=heard.asked,
                    said=heard.said,
                    exchanges=exchanges,
                    closed=bool(exchanges) and not exchanges[-1].reply.startswith("2"),
                    passing=tuple(passing(rules, now)),
                )
            )
    return found


def local_domain(rules: RelayRules, backend: str) -> str:
    """The first local domain, known by name, whose mail goes to this backend; "" where there is none."""
    for entry in rules.local:
        if entry.pattern[0] in "*[":
            continue
        path = ForwardPath(Mailbox("postmaster", entry.pattern), Shape.PLAIN)
        numbers = rules.index.routes.matching(path) + rules.index.local_routes
        if backend == (rules.routes[min(numbers)].backend if numbers else rules.default_backend):
            return entry.pattern
    return ""


def findings(dialect: Dialect, rules: RelayRules, now: float) -> list[Finding]:
    """Everything that the answers mean, what matters most first.

    Args:
        now: seconds since the epoch, for grants that have expired.
    """
    return [
        *_holes(dialect),
        *_unknown_users(dialect),
        *_foreign(dialect),
        *_reread(dialect, rules, now),
        *_plain(dialect),
        *_postmaster(dialect),
        *_unanswered(dialect),
        *_ends(dialect),
        *_capabilities(dialect),
    ]


def heading(dialect: Dialect) -> str:
    """Who answered, and when."""
    asked_at = datetime.fromtimestamp(dialect.at, UTC)
    return (
        f"backend {dialect.backend} at {dialect.peer}, asked on {asked_at:%Y-%m-%d %H:%M} UTC for"
        f" {dialect.local_domain}, {'over ' + dialect.tls if dialect.tls else 'in plain text'}"
    )


def short_heading(dialect: Dialect) -> str:
    """The same where many are told of."""
    return f"{dialect.backend}, asked on {datetime.fromtimestamp(dialect.at, UTC):%Y-%m-%d}"


def _holes(dialect: Dialect) -> Iterable[Finding]:
    if dialect.open_to_strangers:
        yield Finding(
            "open-to-strangers",
            f"It takes {_names(dialect.open_to_strangers)} for users that nobody is, which are ordinary local-parts to"
            " every other server. Its log tells which address it makes of them: if that is another domain's, whoever"
            " may send them relays through it. So the gate refuses strangers every local-part with"
            f" {characters_text(dialect)} at its domains, the ordinary ones among them. Let it stop that, and ask"
            " again.",
            warning=True,
        )


def _unknown_users(dialect: Dialect) -> Iterable[Finding]:
    match dialect.accept_all:
        case Answer.REFUSED:
            yield Finding(
                "unknown-users-refused",
                "It refuses unknown users at RCPT. So does the gate, in its words, and nobody is owed a bounce.",
            )
        case Answer.TAKEN:
            yield Finding(
                "accept-all",
                "It is accept-all: it takes users that nobody is, and so does the gate then. What it cannot deliver it"
                " bounces later, to reverse-paths that spammers have forged; such backscatter gets its host listed. Let"
                " it refuse unknown users at RCPT (Postfix: local_recipient_maps or relay_recipient_maps, without"
                " luser_relay; Exim: verify = recipient; Exchange: recipient filtering). Where a catch-all mailbox"
                " really takes everything, nothing bounces and nothing is to be done.",
                warning=True,
            )
        case _:
            yield Finding(
                "unknown-users-unknown",
                f"Whether it refuses unknown users it did not tell: {_said(dialect, NOBODY)}. Greylisting passes: ask"
                " again later.",
            )


def _foreign(dialect: Dialect) -> Iterable[Finding]:
    match dialect.answer(FOREIGN):
        case Answer.TAKEN:
            yield Finding(
                "relays-for-the-gate",
                "It relays to other domains for whoever comes from the gate's address: as it must where mail that goes"
                " out passes it. So the gate alone stands between strangers and an open relay: let nobody else reach"
                " it, and keep the gate's address to the gate.",
            )
        case Answer.REFUSED:
            doubt = ""
            if dialect.elsewhere == ELSEWHERE:
                doubt = f" {ELSEWHERE} cannot exist, which may be why: --elsewhere asks for a domain that does."
            yield Finding(
                "does-not-relay",
                "It takes no other domain from the gate: what it read as an address elsewhere would end there. Mail of"
                f" those who may send elsewhere needs a [[route]] to another backend.{doubt}",
            )
        case _:
            yield Finding(
                "relaying-unknown",
                f"Whether it takes other domains from the gate it did not tell: {_said(dialect, (FOREIGN,))}.",
            )


def _reread(dialect: Dialect, rules: RelayRules, now: float) -> Iterable[Finding]:
    """What passes no stranger, sorted by whom it does pass."""
    shut = [form for form in FORMS if form.shape is None or form.shape.routing]
    reread = [form for form in shut if dialect.rereads(form) is Answer.TAKEN]
    passed = [form for form in reread if _sent(form)]
    kept = [form for form in reread if not _sent(form)]
    doubtful = [form for form in shut if _undecided(dialect, form) and _sent(form)]
    if passed:
        yield _routing(
            "would-be-relayed",
            f"It reads {_names(passed)} as another address: that would be relayed if it came through.",
            rules,
            now,
        )
    if doubtful:
        yield _routing(
            "cannot-be-told",
            f"Whether it reads {_names(doubtful)} as another address cannot be told, for it takes every user: count on"
            " it.",
            rules,
            now,
        )
    if kept:
        yield Finding("never-sent", f"It takes {_names(kept)}: the gate never sends these, for anybody.")
    if not (reread or doubtful or dialect.open_to_strangers) and dialect.accept_all is Answer.REFUSED:
        yield Finding("reads-as-written", "It takes none of the forms by which servers are made to relay.")


def _plain(dialect: Dialect) -> Iterable[Finding]:
    """What passes strangers, as it is plain to every other server."""
    doubtful = [form for form in FORMS if form.character and _undecided(dialect, form)]
    if doubtful:
        yield Finding(
            "strangers-cannot-be-told",
            f"Whether it reads {_names(doubtful)} as another address cannot be told, for it takes every user, and"
            " strangers may send these: its log tells which address it makes of them.",
        )


def _undecided(dialect: Dialect, form: Form) -> bool:
    """Whether it takes this form, and nobody can tell for what."""
    return dialect.answer(form) is Answer.TAKEN and dialect.rereads(form) is not Answer.TAKEN


def _sent(form: Form) -> bool:
    """Whether the gate could send it on, for anybody.  Of a source route only the mailbox is."""
    return form.shape is not None and form.shape is not Shape.ROUTE


def _routing(kind: str, sentence: str, rules: RelayRules, now: float) -> Finding:
    sentence += " The gate refuses it to strangers by construction"
    grants = passing(rules, now)
    if not grants:
        return Finding(kind, f"{sentence}, and no grant lets it pass.")
    return Finding(kind, f"{sentence}. Who may send anywhere may send it, too: {'; '.join(grants)}.")


def passing(rules: RelayRules, now: float) -> list[str]:
    """The grants in force under which a forward-path that some server reads as another one goes on to a backend."""
    if now < rules.index.forward_paths_denied_until:  # a [[deny]] forward_path refuses all such to everybody
        return []
    return [
        f"{relay.who(entry)} ({entry.where})"
        for entry in rules.trust
        if not entry.forward_texts and not relay.expired(entry, now)
    ]


def _postmaster(dialect: Dialect) -> Iterable[Finding]:
    if dialect.answer(POSTMASTER) is Answer.REFUSED:
        yield Finding(
            "no-postmaster",
            f"It refuses postmaster@{dialect.local_domain}, whom RFC 5321 §4.5.1 wants to be there; if it refuses its"
            " users as well, it does not know the domain.",
        )


def _unanswered(dialect: Dialect) -> Iterable[Finding]:
    silent = [form for form in FORMS if dialect.answer(form) is Answer.UNKNOWN]
    if silent:
        yield Finding("unanswered", f"It gave no answer to {_names(silent)}: {_said(dialect, silent)}.")


def _ends(dialect: Dialect) -> Iterable[Finding]:
    if not dialect.ends:
        return
    taken = [heard.id for heard in dialect.ends if heard.answer is Answer.TAKEN]
    unknown = [heard for heard in dialect.ends if heard.answer is Answer.UNKNOWN]
    if taken:
        yield Finding(
            "ends",
            f"It takes {_list(taken)} for the end of a message, too: whoever reaches it directly, or through a server"
            " that lets these pass, can smuggle messages into it. The gate never sends them: it refuses a message with"
            " a bare CR or LF, or makes each a CRLF, and then puts a period before every line that begins with one.",
        )
    elif not unknown:
        yield Finding("ends", "It takes nothing but CRLF . CRLF for the end of a message.")
    if unknown:
        named = _list([heard.id for heard in unknown])
        yield Finding("ends-unknown", f"Whether it takes {named} for the end did not come out: {unknown[0].said}.")


def _capabilities(dialect: Dialect) -> Iterable[Finding]:
    """What the gate does where an extension is there, or is not."""
    for keyword, there, missing in (
        ("8BITMIME", "", "messages with octets beyond ASCII are refused, 554 5.6.3"),
        ("SMTPUTF8", "", "addresses beyond ASCII are refused, 553 5.6.7"),
        ("PIPELINING", "", "commands go to it one at a time, which is slower"),
        ("STARTTLS", "", 'mail goes to it in plain text, and tls = "required" would defer all of it'),
        ("DSN", "", "clients are not offered it, either"),
        ("CHUNKING", "It offers CHUNKING, which the gate does not need: it sends DATA.", ""),
    ):
        sentence = there if keyword in dialect.keywords else missing and f"It does not offer {keyword}: {missing}."
        if sentence:
            yield Finding(f"capability-{keyword.lower()}", sentence)
    if dialect.size_octets:
        size = size_text(dialect.size_octets)
        yield Finding("capability-size", f"It takes messages up to {size}: the gate offers no more.")
    else:
        yield Finding("capability-size", "It names no SIZE: [limits] message_size alone bounds a message.")


def characters_text(dialect: Dialect) -> str:
    """What a local-part must not hold, as in "=" or "+"."""
    return " or ".join(f'"{form.character}"' for form in dialect.open_to_strangers)


def _names(forms: Iterable[Form]) -> str:
    return _list([f"{form.id} ({form.fill('user', 'ours', 'elsewhere')})" for form in forms])


def _list(words: list[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def _said(dialect: Dialect, forms: Iterable[Form]) -> str:
    """The first words among the answers to these that were none."""
    ids = {form.id for form in forms}
    unknown = (heard.said for heard in dialect.heard if heard.id in ids and heard.answer is Answer.UNKNOWN)
    return next(unknown, "no answer").rstrip(".")
