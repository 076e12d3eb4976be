"""The file of ``gatepost probe --report``: whole or not there, and never in another file's place unasked.

Why: a report is handed on as evidence; half of one, or one that took the place of last week's, is none.
Trust: the path is the person's.
Promise: what can be refused is refused before the test, which may take half an hour.  A reader sees the old file or the
    new one, never a part.
Sources: link(2), rename(2).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gatepost.errors import GatepostError
from gatepost.probe import Report
from gatepost.probe.evidence import Circumstances, evidence_object, evidence_page


def _json(report: Report, circumstances: Circumstances) -> str:
    return json.dumps(evidence_object(report, circumstances), indent=2) + "\n"


_KINDS: dict[str, Callable[[Report, Circumstances], str]] = {
    ".json": _json,
    ".html": evidence_page,
    ".htm": evidence_page,
}


class ReportFile:
    """Where a report is to be written, and as what.

    Args:
        force: it may replace a file that is there.

    Raises:
        GatepostError: nothing can be written there.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path = path
        self._force = force
        kind = _KINDS.get(path.suffix.lower())
        if kind is None:
            raise GatepostError(f'--report "{path}": its ending says what is written, and must be .html or .json')
        self._kind = kind
        if not path.parent.is_dir():
            raise GatepostError(f'--report "{path}": there is no directory {path.parent}')
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise GatepostError(f'--report "{path}": nothing may be written in {path.parent}')
        if path.is_dir():
            raise GatepostError(f'--report "{path}": this is a directory')
        if not force and os.path.lexists(path):
            raise self._taken()

    def write(self, report: Report, circumstances: Circumstances) -> None:
        """Put the report there.

        Raises:
            GatepostError: it is not there, and what was there still is.
        """
        octets = self._kind(report, circumstances).encode()
        draft = self.path.with_name(f".{self.path.name[:100]}.{secrets.token_hex(4)}")
        try:
            try:
                with draft.open("xb") as file:
                    file.write(octets)
                    file.flush()
                    os.fsync(file.fileno())
                if self._force:
                    draft.replace(self.path)
                else:
                    self.path.hardlink_to(draft)  # which fails where there is a file, a new one too
            finally:
                with suppress(FileNotFoundError):
                    draft.unlink()
        except FileExistsError:
            raise self._taken() from None
        except OSError as error:
            raise GatepostError(f'--report "{self.path}": it cannot be written: {error.strerror}') from error

    def _taken(self) -> GatepostError:
        return GatepostError(f'--report "{self.path}": there is a file of that name; --force replaces it')
