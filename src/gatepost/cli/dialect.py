"""``gatepost check --backend``: ask the backends how they read addresses, keep the answers, say what they mean."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from gatepost import config
from gatepost.backend import dialect, profile
from gatepost.backend.dialect import Answer, Dialect
from gatepost.backend.settings import BackendSettings
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import say, say_json
from gatepost.config import Config, dialects, values
from gatepost.errors import GatepostError
from gatepost.gate import privileges
from gatepost.smtp.path import Mailbox, PathDefect, Shape, parse_forward_path

INIT_ASK_S = 10.0  # somebody waits at the keyboard
_NONCE_OCTETS = 4


def ask_backends(
    loaded: Config, names: Sequence[str], *, elsewhere: str | None, end_of_data: str | None, as_json: bool
) -> int:
    """Ask the backends of these names, or all of them; print what each answered, and what that means.

    Returns:
        The exit code: 1 where something is to be done, 2 where one could not be asked.
    """
    backends = _named(loaded, names)
    foreign = _domain(elsewhere) if elsewhere else dialect.ELSEWHERE
    recipient = _recipient(end_of_data) if end_of_data else None
    if recipient is not None and len(backends) > 1:
        raise GatepostError(f"--end-of-data: name one backend, as in --backend {backends[0].name}")
    outcomes = [_outcome(loaded, settings, foreign, recipient, quiet=as_json) for settings in backends]
    if as_json:
        say_json({"backends": outcomes})
    if any(outcome["problem"] for outcome in outcomes):
        return NOT_DONE
    warned = any(finding["warning"] for outcome in outcomes for finding in outcome["findings"])
    return BAD_NEWS if warned else DONE


def first_look(loaded: Config) -> list[dialects.Finding]:
    """For ``gatepost init``: what the first backend answers within some seconds, kept; nothing where it cannot tell."""
    settings = loaded.gate.backends[0]
    local_domain = dialects.local_domain(loaded.gate.rules, settings.name)
    if not local_domain or not dialect.can_be_asked(settings):
        return []
    now = _now()
    try:
        found = asyncio.run(dialect.ask(settings, local_domain, nonce=_nonce(), now=now, budget_s=INIT_ASK_S))
    except GatepostError:
        return []  # that it cannot be used was seen, and is told, without this
    with contextlib.suppress(GatepostError):  # the gate has no place yet; the first check will ask again
        _keep(loaded, found)
    return dialects.findings(found, loaded.gate.rules, now)


def kept_text(answers: Iterable[dict[str, Any]]) -> str:
    """The same for a person; "" where there is nothing to say."""
    lines = [f"  {one['heading']}: {sentence}" for one in answers for sentence in one["sentences"]]
    return "\n".join(["", "", "What backends answered", *lines]) if lines else ""


def _named(loaded: Config, names: Sequence[str]) -> list[BackendSettings]:
    known = {settings.name: settings for settings in loaded.gate.backends}
    for name in names:
        if name not in known:
            raise GatepostError(f'--backend "{name}": there is no such backend; there is {", ".join(known)}')
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def _domain(written: str) -> str:
    try:
        return values.domain(written)
    except ValueError as error:
        raise GatepostError(f'--elsewhere "{written}": {error}') from None


def _recipient(written: str) -> Mailbox:
    path = parse_forward_path(f"<{written}>".encode("utf-8", "replace"), smtputf8=False)
    if isinstance(path, PathDefect) or path.shape is not Shape.PLAIN or not isinstance(path.mailbox, Mailbox):
        raise GatepostError(f'--end-of-data "{written}": write one address of your own, as in you@example.com')
    return path.mailbox


def _outcome(
    loaded: Config, settings: BackendSettings, elsewhere: str, recipient: Mailbox | None, *, quiet: bool
) -> dict[str, Any]:
    """Ask one backend, keep what it answered, print it unless quiet."""
    outcome: dict[str, Any] = {"name": settings.name, "problem": "", "kept": "", "profile": None, "findings": []}
    now = _now()
    try:
        found = _asked(loaded, settings, elsewhere, recipient, now)
    except GatepostError as error:
        outcome["problem"] = str(error)
        if not quiet:
            say(f"backend {settings.name} could not be asked: {error}", "bold red")
        return outcome
    if found is None:
        sentence = "The gate's own mailboxes give no local-part a second meaning: there is nothing to ask."
        outcome["findings"] = [dialects.Finding("embedded", sentence)._asdict()]
        if not quiet:
            say(f"backend {settings.name}: {sentence}")
        return outcome
    meant = dialects.findings(found, loaded.gate.rules, now)
    outcome["profile"] = profile.as_object(found)
    outcome["findings"] = [finding._asdict() for finding in meant]
    if not quiet:
        _print(found, meant)
    try:
        outcome["kept"] = _keep(loaded, found)
    except GatepostError as error:
        not_kept = f"The answers are not kept: {error}"
        outcome["findings"].append(dialects.Finding("not-kept", not_kept)._asdict())
        if not quiet:
            say(not_kept, "yellow")
    else:
        if not quiet:
            say(f"Kept as {outcome['kept']}." + (_TAKES_EFFECT if _changes(loaded, found) else ""))
    return outcome


_TAKES_EFFECT = " A running gate heeds it after: gatepost reload"


def _changes(loaded: Config, found: Dialect) -> bool:
    """Whether the gate refuses strangers more or less than before this was known."""
    before = loaded.gate.rules.index.reread.get(found.backend, "")
    return set(before) != {form.character for form in found.open_to_strangers}


def _asked(
    loaded: Config, settings: BackendSettings, elsewhere: str, recipient: Mailbox | None, now: float
) -> Dialect | None:
    if not dialect.can_be_asked(settings):
        return None
    local_domain = dialects.local_domain(loaded.gate.rules, settings.name)
    if not local_domain:
        raise GatepostError("no local domain that is known by name goes to it, so that there is nobody to ask for")
    found = asyncio.run(dialect.ask(settings, local_domain, nonce=_nonce(), now=now, elsewhere=elsewhere))
    if recipient is not None:
        found = found.with_ends(asyncio.run(dialect.end_of_data(settings, recipient, nonce=_nonce(), now=now)))
    return found


def _keep(loaded: Config, found: Dialect) -> str:
    """Below the data directory, as the user that the gate runs as.

    Raises:
        GatepostError: it cannot be kept.
    """
    where = loaded.config_path or config.EMBEDDED_DEFAULT_NAME
    account = privileges.account_of(loaded.user, where)
    privileges.prepare_data(loaded.data, account, where)
    path = profile.path_of(loaded.data, found.backend)
    with privileges.acting_as(account):
        profile.keep(path, found)
    return str(path)


def _print(found: Dialect, meant: Iterable[dialects.Finding]) -> None:
    say(dialects.heading(found), "bold")
    say(f"it greets with {found.greeting}")
    say(f"it offers {', '.join(found.keywords) or 'no extension'}\n")
    rows = [(heard.id, heard.answer, heard.asked, heard.said) for heard in found.heard]
    rows += [(heard.id, heard.answer, "as the end of a message", heard.said) for heard in found.ends]
    name_width = max(len(row[0]) for row in rows)
    asked_width = max(len(row[2]) for row in rows)
    styles = {Answer.TAKEN: "bold", Answer.REFUSED: "", Answer.UNKNOWN: "dim"}
    for name, answer, asked, said in rows:
        say(f"  {name:{name_width}}  {answer.value:7}  {asked:{asked_width}}  {said}", styles[answer])
    say("")
    for finding in meant:
        say(f"- {finding.sentence}", "yellow" if finding.warning else "")
    say("")


def _nonce() -> str:
    return secrets.token_hex(_NONCE_OCTETS)


def _now() -> float:
    return datetime.now(UTC).timestamp()
