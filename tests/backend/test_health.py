"""Which address is tried when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gatepost.backend.health import DELAY_FIRST_S, DELAY_QUICK_MAX_S, DELAY_SLOW_MAX_S, QUICK_S, Addresses
from gatepost.backend.settings import SmtpAddress

FIRST, SECOND = SmtpAddress("127.0.0.1", 1), SmtpAddress("127.0.0.1", 2)


def test_an_address_is_tried_until_it_fails_and_again_after_a_while():
    addresses = Addresses([FIRST, SECOND])
    first, second = addresses.working()
    assert first.failed("refused", 10.0, 10.0), "news"
    assert addresses.working() == [second]
    assert addresses.due(10.0) == []
    assert addresses.due(10.0 + DELAY_FIRST_S) == [first]
    assert not addresses.hopeless(10.0)
    assert addresses.trouble == ""
    assert first.succeeded(), "news again"
    assert addresses.working() == [first, second]
    assert not first.succeeded()


def test_when_all_have_failed_one_attempt_at_a_time_is_made():
    addresses = Addresses([FIRST])
    (only,) = addresses.working()
    only.failed("refused", 10.0, 10.0)
    assert addresses.hopeless(10.0)
    assert addresses.trouble == "refused"
    assert not addresses.hopeless(11.0)
    only.trial = True
    assert addresses.hopeless(11.0)
    assert addresses.due(11.0) == []


def test_the_delay_grows_to_a_bound_that_depends_on_what_an_attempt_costs():
    for took_s, longest_s in ((0.0, DELAY_QUICK_MAX_S), (QUICK_S, DELAY_SLOW_MAX_S)):
        (health,) = Addresses([FIRST]).working()
        now, delays = 100.0, []
        for _ in range(40):
            now += took_s
            health.failed("no", now - took_s, now)
            delays.append(health.retry_at - now)
            now = health.retry_at
        assert delays == sorted(delays)
        assert abs(delays[0] - DELAY_FIRST_S) < 1e-6
        assert abs(delays[-1] - longest_s) < 1e-6


def test_attempts_that_ran_side_by_side_count_once():
    (health,) = Addresses([FIRST]).working()
    assert health.failed("refused", 10.0, 11.0)
    assert not health.failed("refused", 10.5, 11.5)
    assert health.failures == 1
    health.failed("refused", 11.5, 11.6)
    assert health.failures == 2


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=30))
def test_a_failed_address_always_comes_due_again(history):
    addresses = Addresses([FIRST])
    (health,) = addresses.working()
    now = 0.0
    for good, step_s in history:
        now += step_s
        if good:
            health.succeeded()
        else:
            health.failed("no", now, now)
    assert addresses.working() or addresses.due(now + DELAY_SLOW_MAX_S) == [health]
