"""One question by names, as a form or a program asks it: a refusal by its reference, or a message described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gatepost.answers import described, refused
from gatepost.config import Config
from gatepost.errors import GatepostError

NAMES: Final = ("reference", *described.Question._fields)
_NEEDED: Final = ("client", "reverse_path", "forward_path")


def answer(loaded: Config, asked: Mapping[str, str]) -> dict[str, Any]:
    """What ``gatepost explain --json`` prints.

    Args:
        asked: of ``NAMES``, those that were given; hostile text.

    Raises:
        GatepostError: the question cannot be asked.  A name that means nothing is refused: the answer would be to
            another question than the one that was meant.
    """
    unknown = [name for name in asked if name not in NAMES]
    if unknown:
        raise GatepostError(f'"{unknown[0]}" is nothing to ask by; there is {", ".join(NAMES)}')
    others = [name for name in asked if name != "reference"]
    if "reference" not in asked:
        missing = [name for name in _NEEDED if name not in asked]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise GatepostError(
                f"say what to explain: a reference, or a message by {_and(_NEEDED)}; {_and(missing)} {verb} missing"
            )
        return described.answer(loaded, described.Question(**asked))
    if others:
        raise GatepostError(f"a reference says it all: leave {_and(others)} out, or the reference")
    return refused.by_reference(loaded, asked["reference"])


def lines(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The answer in words: a label and what stands behind it; none where nothing was found."""
    if "found" not in answer:
        return described.lines(answer)
    return refused.lines(answer) if answer["found"] else []


def _and(names: list[str] | tuple[str, ...]) -> str:
    """In a sentence: "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
