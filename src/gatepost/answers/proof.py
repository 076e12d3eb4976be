"""What a configuration allows, and the proof that it allows nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from gatepost import config
from gatepost.answers import trust
from gatepost.backend import profile
from gatepost.backend.dialect import Dialect
from gatepost.backend.settings import BackendSettings
from gatepost.config import Config, dialects, exposure, sentences, settings, surroundings
from gatepost.config.document import Document
from gatepost.errors import ConfigError, StorageError
from gatepost.gate import interfaces

_TOLD_AT_EACH_CHECK: Final = ("would-be-relayed", "cannot-be-told")  # and every warning


class Proven(NamedTuple):
    """The answer.

    Attributes:
        told: the configuration in words, with "proof"; where it is refused for being open, "valid" is False.
        well: nobody else may relay, or the file says that it means it.
    """

    told: dict[str, Any]
    well: bool


def answer(octets: bytes, path: str) -> Proven:
    """Load the configuration, and decide for everybody.

    Args:
        path: the file's name, "" for the embedded default.

    Raises:
        ConfigError: it does not load, for other reasons than that strangers relay.
    """
    now = datetime.now(UTC).timestamp()
    document = Document(octets, path or config.EMBEDDED_DEFAULT_NAME)
    gate = settings.build(document, now, refuse_open=False)
    settings.console_address(document)
    readings = dialects.readings(
        recalled(gate.data, gate.backends), gate.rules, settings.smtp_listeners(gate.listens), now
    )
    proof = sentences.proof_facts(settings.prove(document, gate, now), gate.rules, now, readings)
    try:
        loaded = config.load(octets, path) if path else config.embedded_default()
    except ConfigError as error:
        if document.problems or not proof["openings"]:
            raise
        # Nothing is wrong but that strangers relay.
        refused = {"config": document.path, "valid": False, "problems": list(error.problems), "proof": proof}
        return Proven(refused, well=False)
    told = sentences.summary(loaded, now)
    told["proof"] = proof
    told["warnings"] = [
        *told["warnings"],
        *exposure.without_owner(gate.rules, now),
        *surroundings.look(loaded),
        *surroundings.around(loaded, interfaces.look(), now),
        *trust.warnings(loaded, now),
    ]
    told["dialects"] = kept(loaded, now)
    return Proven(told, well=proof["proven"] or loaded.gate.open_relay)


def kept(loaded: Config, now: float) -> list[dict[str, Any]]:
    """What backends answered when they were asked last: one object for each that was."""
    out = []
    for backend in loaded.gate.backends:
        try:
            found = profile.recall(profile.path_of(loaded.data, backend.name))
        except StorageError as error:
            out.append({"name": backend.name, "heading": backend.name, "sentences": [str(error)]})
            continue
        if found is not None:
            meant = dialects.findings(found, loaded.gate.rules, now)
            told = [one.sentence for one in meant if one.warning or one.kind in _TOLD_AT_EACH_CHECK]
            out.append({"name": backend.name, "heading": dialects.short_heading(found), "sentences": told})
    return out


def recalled(data: str, backends: Iterable[BackendSettings]) -> list[Dialect]:
    """What backends answered, as far as it is kept and can be read; what cannot is told by ``kept``."""
    out = []
    for backend in backends:
        with contextlib.suppress(StorageError):
            found = profile.recall(profile.path_of(data, backend.name))
            if found is not None:
                out.append(found)
    return out
