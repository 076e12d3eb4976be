"""``gatepost check``: is the configuration right, and what does it allow?"""

from __future__ import annotations

from datetime import UTC, datetime

from gatepost import config
from gatepost.cli import DONE, trust
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import sentences, surroundings


def check(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Check the configuration, and say in words what it allows.

    Every problem is told at once, with file, line and mend. Exit code: 0 it loads, 2 it does not.
    """
    path = config.find(config_path)
    loaded = config.load_file(path)
    facts = sentences.summary(loaded, datetime.now(UTC).timestamp())
    facts["warnings"] += surroundings.look(loaded) + trust.warnings(loaded)
    if as_json:
        say_json(facts)
    else:
        say(sentences.text(facts))
    return DONE
