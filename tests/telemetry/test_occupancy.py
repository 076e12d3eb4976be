"""Sessions of a client over all workers: counted together, forgotten when a worker dies, bounded in error."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.telemetry import Occupancy

A = ip_address("192.0.2.1")
B = ip_address("192.0.2.2")


def shared(workers: int) -> list[Occupancy]:
    memory = memoryview(bytearray(Occupancy.size_octets(workers)))
    Occupancy.format(memory)
    return [Occupancy(memory, row) for row in range(workers)]


def test_sessions_of_one_client_are_counted_over_all_workers():
    first, second = shared(2)
    assert [first.enter(A), second.enter(A), second.enter(A), first.enter(B)] == [1, 2, 3, 1]
    assert first.sessions() == second.sessions() == 4
    second.leave(A)
    assert first.enter(A) == 3
    for worker, address in ((first, A), (first, A), (second, A), (first, B)):
        worker.leave(address)
    assert first.sessions() == 0
    assert first.enter(A) == 1


def test_leaving_twice_takes_nothing_from_anybody():
    (worker,) = shared(1)
    worker.leave(A)
    assert worker.enter(A) == 1
    worker.leave(A)
    worker.leave(A)
    assert worker.sessions() == 0
    assert worker.enter(A) == 1


def test_an_ipv6_client_is_its_64():
    (worker,) = shared(1)
    assert worker.enter(ip_address("2001:db8:0:1::1")) == 1
    assert worker.enter(ip_address("2001:db8:0:1:ffff::2")) == 2
    assert worker.enter(ip_address("2001:db8:0:2::1")) == 1


def test_a_dead_workers_row_is_cleared_and_no_other():
    first, second = shared(2)
    first.enter(A)
    second.enter(A)
    first.arrive(A, 100.0)
    second.clear(0)
    assert second.sessions() == 1
    assert second.enter(A) == 2
    assert second.arrive(A, 101.0) == 2  # what it began in this minute stays


def test_the_rate_is_that_of_the_last_sixty_seconds_in_all_workers():
    first, second = shared(2)
    assert [first.arrive(A, 60.0 * 5 + second_) for second_ in range(30)] == list(range(1, 31))
    assert second.arrive(A, 60.0 * 5 + 59.9) == 31
    # A minute later half of the minute before is still within sixty seconds.
    assert second.arrive(A, 60.0 * 6 + 30) == 1 + 15
    assert first.arrive(A, 60.0 * 6 + 59.99) == 2
    # After two quiet minutes nothing is left.
    assert first.arrive(A, 60.0 * 9) == 1
    assert first.arrive(B, 60.0 * 9) == 1


def test_the_rate_does_not_overflow_into_the_clock():
    (worker,) = shared(1)
    assert [worker.arrive(A, 60.0) for _ in range(70_000)][-1] == 65_535
    assert worker.arrive(A, 120.0 + 59.999) in (1, 2)


def test_keys_differ_from_start_to_start():
    def places() -> tuple[int, ...]:
        return Occupancy.private()._places(A.packed[:8])

    assert len({places() for _ in range(4)}) == 4


def test_ten_thousand_strangers_do_not_make_an_innocent_look_busy():
    # The bound of the module's header: 80 clients at a limit of 50, and thousands with one session each.
    (worker,) = shared(1)
    for number in range(80):
        for _ in range(50):
            worker.enter(IPv4Address(0x0A000000 + number))
    counts = [worker.enter(IPv4Address(0x0B000000 + number)) for number in range(10_000)]
    assert sum(count > 50 for count in counts) <= 5  # 0.06 expected
    assert sum(count == 1 for count in counts) > 8_000


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(st.lists(st.tuples(st.integers(0, 2), addresses), max_size=40))
def test_counts_are_never_too_low_and_end_at_nothing(visits: list[tuple[int, IPv4Address | IPv6Address]]):
    workers = shared(3)
    true: dict[bytes, int] = {}
    for row, address in visits:
        key = address.packed[:8]
        true[key] = true.get(key, 0) + 1
        assert workers[row].enter(address) >= true[key]
    assert workers[0].sessions() == len(visits)
    for row, address in visits:
        workers[row].leave(address)
    assert workers[0].sessions() == 0
    assert not any(any(worker._counts) for worker in workers)


def test_there_is_no_row_beyond_the_last():
    memory = memoryview(bytearray(Occupancy.size_octets(2)))
    Occupancy.format(memory)
    with pytest.raises(ValueError, match="no row 2"):
        Occupancy(memory, 2)


def test_memory_of_another_version_is_refused():
    with pytest.raises(ValueError, match="restart it as a whole"):
        Occupancy(memoryview(bytearray(Occupancy.size_octets(2) + 8)), 0)
