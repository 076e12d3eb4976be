"""Who the gate runs as, where it keeps things, and that nobody else does so there."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import watchfiles

from gatepost.errors import ConfigError
from gatepost.gate import privileges
from gatepost.gate.privileges import Instance, account_of, check_programs, prepare_data, raise_open_files, warning_about

AM_ROOT = os.geteuid() == 0  # CI is; whoever is not, tests what holds then
WHERE = "gatepost.toml"


def as_root(program: str, *arguments: str) -> str:
    """Run Python as root, in a process that may become somebody else."""
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def passable(directory: Path) -> Path:
    """pytest's directories are its user's alone; another user shall be able to get there."""
    for each in (directory, *directory.parents):
        if each.name.startswith("pytest-of-"):  # the topmost that pytest made
            each.chmod(0o755)
            return directory
        each.chmod(0o755)
    raise AssertionError(f"{directory} is not one of pytest's directories")


def test_nobody_is_a_user_and_nosuchuser_is_not():
    account = account_of("nobody", WHERE)
    if not AM_ROOT:
        assert account is None
        return
    assert account is not None
    assert account.uid == pwd.getpwnam("nobody").pw_uid
    assert account_of("", WHERE) is None
    with pytest.raises(ConfigError, match=r"user = 'no-such-user': there is no such user.*useradd"):
        account_of("no-such-user", WHERE)


def test_dropped_privileges_do_not_come_back():
    if not AM_ROOT:
        with pytest.raises(PermissionError):
            privileges.drop(privileges.Account("nobody", 65534, 65534))
        return
    out = as_root(
        """
import json, os
from gatepost.gate import privileges
privileges.drop(privileges.account_of("nobody", "x"))
try:
    os.setuid(0)
    back = True
except PermissionError:
    back = False
print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), back]))
"""
    )
    nobody = pwd.getpwnam("nobody")
    uids, gids, groups, back = json.loads(out)
    assert set(uids) == {nobody.pw_uid}
    assert set(gids) == {nobody.pw_gid}
    assert groups == [nobody.pw_gid]
    assert not back


def test_the_data_directory_is_made_for_the_user_and_its_files_are_the_users(tmp_path: Path):
    data = passable(tmp_path) / "var" / "data"
    account = account_of("nobody", WHERE)
    prepare_data(str(data), account, WHERE)
    uid = account.uid if account else os.geteuid()
    assert (data.stat().st_uid, data.stat().st_mode & 0o777) == (uid, 0o750)
    instance = Instance(str(data), account, WHERE)
    assert (data / "gatepost.pid").stat().st_uid == uid
    assert (os.geteuid() == 0) == AM_ROOT
    instance.release()


def test_data_that_belongs_to_somebody_else_is_refused_with_its_mend(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir(0o700)
    (data / "mail").touch()
    if not AM_ROOT:
        data.chmod(0o500)
        with pytest.raises(ConfigError, match=r"cannot be written by the user .*; `chown -R"):
            prepare_data(str(data), None, WHERE)
        return
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match=r"cannot be written by the user nobody; the directories above it must let"):
        prepare_data(str(data), account_of("nobody", WHERE), WHERE)
    passable(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be written by the user nobody; `chown -R nobody: .*data` mends it"):
        prepare_data(str(data), account_of("nobody", WHERE), WHERE)


def test_a_program_that_the_user_cannot_read_is_found_before_anything_starts(tmp_path: Path, monkeypatch):
    account = account_of("nobody", WHERE)
    passable(tmp_path)
    program = tmp_path / "python"
    program.touch(0o600)
    for module in (os, privileges, watchfiles):
        monkeypatch.setattr(module, "__file__", "/bin/sh")
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    check_programs(account, WHERE)
    monkeypatch.setattr(sys, "executable", str(program))
    if account is None:
        check_programs(account, WHERE)
        return
    with pytest.raises(ConfigError, match=rf"user = 'nobody': that user cannot read {program}, a part of this gate"):
        check_programs(account, WHERE)


def test_a_link_planted_by_the_user_leads_root_nowhere(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (data / "gatepost.pid").symlink_to(precious)
    with pytest.raises(ConfigError, match=r"gatepost.pid: .*; remove it"):
        Instance(str(data), None, WHERE)
    assert precious.read_text() == "keep"


def test_a_file_in_the_place_of_the_data_directory_is_refused(tmp_path: Path):
    data = tmp_path / "data"
    data.touch()
    with pytest.raises(ConfigError, match="it is no directory; write another path"):
        prepare_data(str(data), None, WHERE)
    with pytest.raises(ConfigError, match="write another directory"):
        prepare_data(str(data / "below"), None, WHERE)


def test_the_right_to_a_data_directory_is_the_lock_and_not_the_file(tmp_path: Path):
    data = str(tmp_path)
    (tmp_path / "gatepost.pid").write_text("99999999\n")  # left behind by a gate that was killed
    instance = Instance(data, None, WHERE)
    assert (tmp_path / "gatepost.pid").read_text() == f"{os.getpid()}\n"
    with pytest.raises(ConfigError, match=rf"gatepost.toml: another gate \(process {os.getpid()}\) runs on "):
        Instance(data, None, WHERE)
    instance.release()
    assert not (tmp_path / "gatepost.pid").exists()
    Instance(data, None, WHERE).release()


def test_somebody_who_only_looks_at_the_lock_does_not_stop_a_start(tmp_path: Path):
    with (tmp_path / "gatepost.pid").open("w") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (looker, fcntl.LOCK_UN))
        timer.start()
        Instance(str(tmp_path), None, WHERE).release()
        timer.join()


def test_the_lock_ends_with_the_process(tmp_path: Path):
    program = (
        "import os, sys; from gatepost.gate.privileges import Instance; i = Instance(sys.argv[1], None, 'x');"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert (tmp_path / "gatepost.pid").exists()
    Instance(str(tmp_path), None, WHERE).release()


def test_warnings_about_who_runs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert warning_about("").startswith("running as root: ")
    assert warning_about("gatepost") == ""
    nobody = pwd.getpwnam("nobody").pw_uid
    monkeypatch.setattr(os, "geteuid", lambda: nobody)
    assert warning_about("") == ""
    assert warning_about("nobody") == ""
    assert warning_about("root") == "[gate] user = 'root' has no effect: only root can become somebody else"
    assert account_of("root", WHERE) is None


def test_open_files_are_raised_and_missing_ones_are_told():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        _, hard = before
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        sessions = (hard - 200) // 2
        assert raise_open_files(sessions) == ""
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert f"may need {(sessions + 1) * 2 + 200} open files" in raise_open_files(sessions + 1)
        assert raise_open_files(0) == ""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_acting_as_nobody_in_particular_changes_nothing():
    before = os.getresuid()
    with privileges.acting_as(None):
        assert os.getresuid() == before
