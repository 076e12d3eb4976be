"""./gatepost in a clone: what it sets up and when, with an interpreter that only notes what it was asked to do.

The real set-up, from a registry and in a fresh clone, is a step of .ci/run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

LAUNCHER = Path(__file__).parent.parent / "gatepost"

# Makes a .venv whose commands only speak; notes each venv and pip in $NOTES; pip fails where $NOTES.fail exists.
PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv "*)
        echo "venv" >>"$NOTES"
        for last; do :; done
        mkdir -p "$last/bin"
        cp "$0" "$last/bin/python"
        printf '#!/bin/sh\\necho "said [$*] in $(pwd)"\\n' >"$last/bin/gatepost"
        chmod +x "$last/bin/gatepost" ;;
    *"-m pip "*)
        for last; do :; done
        echo "pip $(basename "$last")" >>"$NOTES"
        sleep "${PIP_S:-0}"
        if [ -e "$NOTES.fail" ]; then echo "no such version"; exit 1; fi ;;
    *"-m pytest"*) echo "tested [$*] in $(pwd)" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Clone(NamedTuple):
    """A clone with nothing in it but what the launcher looks at."""

    root: Path
    notes: Path

    def start(self, *arguments: str, pip_s: float = 0) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "GATEPOST_PYTHON": str(self.notes.parent / "a python"),
            "REAL_PYTHON": sys.executable,
            "NOTES": str(self.notes),
            "PIP_S": str(pip_s),
        }
        command = [str(self.root / "gatepost"), *arguments]
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def done(self) -> list[str]:
        """What the interpreter was asked to do since the last look."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.write_text("")
        return lines


SET_UP = ["venv", "pip requirements.lock", "pip a clone"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root = tmp_path / "a clone"
    (root / "src" / "gatepost").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.lock", "requirements-dev.lock", "src/gatepost/__init__.py"):
        (root / name).write_text(name)
    shutil.copy(LAUNCHER, root / "gatepost")
    python = tmp_path / "a python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return Clone(root, tmp_path / "notes")


def test_first_run_sets_up_and_passes_the_command_on(clone: Clone) -> None:
    assert clone.run("run", "--config", "a file")[:2] == (0, "said [run --config a file] in /\n")
    assert clone.done() == SET_UP


def test_later_runs_do_nothing_but_the_command_and_say_nothing(clone: Clone) -> None:
    clone.run("run")
    clone.done()
    assert clone.run("check") == (0, "said [check] in /\n", "")
    assert clone.done() == []


def test_runs_through_a_link(clone: Clone) -> None:
    link = clone.root.parent / "link"
    link.symlink_to(clone.root / "gatepost")
    with clone.start("run") as process:
        process.communicate(timeout=60)
    environment = {**os.environ, "REAL_PYTHON": sys.executable}
    done = subprocess.run([link, "status"], env=environment, capture_output=True, text=True, check=True, cwd="/")
    assert (done.stdout, done.stderr) == ("said [status] in /\n", "")


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml", "src/gatepost/__init__.py"])
def test_a_changed_lock_or_project_is_installed_into_what_is_there(clone: Clone, name: str) -> None:
    clone.run("run")
    clone.done()
    (clone.root / name).write_text("another")
    assert clone.run("run")[0] == 0
    assert clone.done() == SET_UP[1:]


def test_a_clone_that_was_moved_is_set_up_anew(clone: Clone) -> None:
    clone.run("run")
    clone.done()
    moved = clone._replace(root=clone.root.rename(clone.root.parent / "a clone elsewhere"))
    assert moved.run("run")[0] == 0
    assert clone.done() == ["venv", "pip requirements.lock", "pip a clone elsewhere"]


def test_a_set_up_that_was_cut_off_is_done_anew(clone: Clone) -> None:
    with clone.start("run", pip_s=60) as process:
        while not clone.notes.exists() or "pip" not in clone.notes.read_text():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    clone.done()
    assert clone.run("run")[0] == 0
    assert clone.done() == SET_UP


def test_a_failure_names_the_log_and_shows_its_end(clone: Clone) -> None:
    Path(f"{clone.notes}.fail").touch()
    code, output, errors = clone.run("run")
    assert (code, output) == (2, "")
    log = clone.root / ".venv.log"
    assert f"failed; the end of {log}:" in errors
    assert "no such version" in errors
    assert "no such version" in log.read_text()
    Path(f"{clone.notes}.fail").unlink()
    clone.done()
    assert clone.run("run")[0] == 0
    assert clone.done() == SET_UP


def test_two_at_once_set_up_once(clone: Clone) -> None:
    first, second = clone.start("one", pip_s=1), clone.start("two", pip_s=1)
    with first, second:
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outputs == ["said [one] in /\n", "said [two] in /\n"]
    assert clone.done() == SET_UP


def test_test_adds_the_test_tools_and_runs_pytest_in_the_clone(clone: Clone) -> None:
    clone.run("run")
    clone.done()
    (clone.root / "tests").mkdir()
    (clone.root / "tests" / "install-servers.sh").write_text('echo servers >>"$NOTES"\n')
    code, output, _ = clone.run("test", "-k", "a or b")
    assert (code, output) == (0, f"tested [-m pytest -n 2 --dist loadscope -k a or b] in {clone.root}\n")
    assert clone.done() == ["pip requirements-dev.lock", "servers"]


def test_servers_that_cannot_be_had_do_not_keep_the_tests_from_running(clone: Clone) -> None:
    (clone.root / "tests").mkdir()
    (clone.root / "tests" / "install-servers.sh").write_text("exit 1\n")
    code, output, errors = clone.run("test")
    assert code == 0
    assert output.startswith("tested ")
    assert "not every server" in errors


def test_a_clone_one_may_not_write_to_says_so(clone: Clone) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own places are closed to others
        root = Path(place) / "a clone"
        shutil.copytree(clone.root, root)
        Path(place).chmod(0o755)
        root.chmod(0o555)
        other = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
        done = subprocess.run([*other, root / "gatepost", "run"], capture_output=True, text=True, check=False, cwd="/")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"gatepost: cannot write to {root}, where .venv belongs\n"
        root.chmod(0o755)
