"""What all tests share: hypothesis profiles, one group for what needs the real servers, and no silent skip in CI.

Why: the real servers listen on fixed ports, so their tests run one after the other in one xdist worker; everything else
    runs in parallel.  A test that is skipped because its server is missing says so in the summary, and fails CI, where
    everything is installed.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

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
    """Everything below tests/real, and what is marked so, shares the real servers."""
    for item in items:
        if "real" in item.path.parts:
            item.add_marker(pytest.mark.real)
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.xdist_group("real"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failed one: there everything is installed that a test may need."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not CI or reporter is None or hasattr(session.config, "workerinput"):
        return
    if skipped := reporter.stats.get("skipped"):
        reporter.write_line("")
        reporter.write_line(
            f"CI allows no skipped test, and {len(skipped)} were skipped; their reasons stand below", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
