"""What all tests share: hypothesis profiles, one row for what needs the real servers, and no silent skip in CI.

Why: the real servers are heavy to start and wait for each other's disk, so their tests run one after the other in one
    xdist worker, and everything else runs beside them.  A test that is skipped because its server is missing says so in
    the summary, and fails CI, where everything is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from tests.marked import files_with_it, seen_in
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

REAL = Path(__file__).parent / "real"
CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

# A slow machine is no finding: no deadline for one example.  CI repeats the same examples, a person gets new ones;
# "long" is for by hand: pytest --hypothesis-profile=long.
settings.register_profile("here", deadline=None, max_examples=100)
settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, database=None)
settings.register_profile(
    "long",
    deadline=None,
    max_examples=20_000,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
)
settings.load_profile("ci" if CI else "here")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the real servers comes first: it is the longest row, and nothing else can shorten it."""
    for item in items:
        if item.path.is_relative_to(REAL):
            item.add_marker(pytest.mark.real)
    items.sort(key=lambda item: not item.path.is_relative_to(REAL))


class Rows(LoadScopeScheduling):
    """Tests of one file stay in one worker, for the gate or backend they share; all of tests/real is one such row.

    xdist's own groups (``xdist_group``) are not used: its 3.8 marks them in a field that pytest 9.2 no longer has, and
    the tests of a group run side by side without a word.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/real" if nodeid.startswith("tests/real/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """``--dist loadscope`` hands out rows, in the order of collection."""
    if config.getoption("dist") != "loadscope":
        return None
    config.option.loadscopereorder = False
    return Rows(config, log)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The judgements that no single test can make; the process that hands out the tests makes them."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    _fail_skips_in_ci(session, reporter)
    _fail_written_secrets(session, reporter)


def _fail_written_secrets(session: pytest.Session, reporter: pytest.TerminalReporter) -> None:
    """The marked password stands in nothing that was written during the suite: no log, no data, no traceback."""
    directory = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    written = files_with_it(directory)
    told = [
        report.nodeid
        for reports in reporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
        and any(seen_in(text.encode("utf-8", "replace")) for _, text in report.sections)
    ]
    if written or told:
        places = ", ".join([*map(str, written), *told])
        reporter.write_line(f"\na password that was typed in a test was written down: {places}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _fail_skips_in_ci(session: pytest.Session, reporter: pytest.TerminalReporter) -> None:
    """In CI a skipped test is a failed one: there everything is installed that a test may need."""
    if not CI:
        return
    if skipped := reporter.stats.get("skipped"):
        reporter.write_line("")
        reporter.write_line(
            f"CI allows no skipped test, and {len(skipped)} were skipped; their reasons stand below", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
