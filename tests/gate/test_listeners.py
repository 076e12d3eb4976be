"""Listening sockets: one a worker and address, all or none, shared with no other program."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from gatepost.errors import ConfigError
from gatepost.gate.channel import LISTENERS_MAX
from gatepost.gate.listeners import Listeners, bind_one, endpoint
from gatepost.gate.settings import ListenSettings


def listen(*addresses: tuple[str, int], name: str = "mx") -> ListenSettings:
    return ListenSettings(name, addresses, where=f"gatepost.toml:{len(addresses)}")


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def listeners():
    listeners = Listeners(2)
    yield listeners
    listeners.close()


def test_each_worker_has_its_own_socket_on_the_same_port(listeners):
    settings = (listen(("127.0.0.1", 0), ("127.0.0.1", 0)), listen(("127.0.0.1", 0), name="inside"))
    listeners.extend(settings)
    first, second = listeners.of_worker(0, settings), listeners.of_worker(1, settings)
    assert [at for at, _ in first] == [at for at, _ in second]
    assert [at.name for at, _ in first] == ["mx", "mx", "inside"]
    assert len({at.port for at, _ in first}) == 3
    for (at, sock), (_, other) in zip(first, second, strict=True):
        assert sock.getsockname() == other.getsockname() == ("127.0.0.1", at.port)
        assert sock.fileno() != other.fileno()
    socket.create_connection(("127.0.0.1", first[0][0].port)).close()


def test_what_is_bound_stays_and_what_is_no_longer_named_is_closed(listeners):
    before = (listen(("127.0.0.1", 0)),)
    listeners.extend(before)
    ((at, sock),) = listeners.of_worker(0, before)
    after = (listen(("127.0.0.1", 0), name="renamed"), listen(("127.0.0.2", 0), name="new"))
    listeners.extend(after)
    (kept, same), (_, new) = listeners.of_worker(0, after)
    assert (kept.name, kept.port, same) == ("renamed", at.port, sock)
    listeners.prune(before)
    assert new.fileno() == -1
    assert sock.fileno() >= 0


def test_one_address_that_cannot_be_had_leaves_everything_as_it_was(listeners):
    before = (listen(("127.0.0.1", 0)),)
    listeners.extend(before)
    open_before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listeners.extend((*before, listen(("127.0.0.1", 0), ("127.0.0.1", taken), ("192.0.2.1", 9), name="x")))
    first, second = caught.value.problems
    assert first.startswith(f"gatepost.toml:3: cannot listen on 127.0.0.1:{taken}: another program listens there; stop")
    assert second.startswith("gatepost.toml:3: cannot listen on 192.0.2.1:9: this host has no address 192.0.2.1;")
    assert open_descriptors() == open_before
    assert len(listeners.of_worker(0, before)) == 1


def test_another_gate_that_would_share_the_port_is_found(listeners):
    settings = (listen(("127.0.0.1", 0)),)
    listeners.extend(settings)
    port = listeners.of_worker(0, settings)[0][0].port
    with pytest.raises(ConfigError, match="another program listens there"):
        Listeners(1).extend((listen(("127.0.0.1", port)),))
    with pytest.raises(ConfigError, match="another program listens there"):
        Listeners(1).extend((listen(("0.0.0.0", port)),))


def test_a_port_that_becomes_free_in_time_is_taken(listeners):
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]
    timer = threading.Timer(0.2, other.close)
    timer.start()
    listeners.extend((listen(("127.0.0.1", port)),), patience_s=20.0)
    timer.join()
    assert listeners.of_worker(0, (listen(("127.0.0.1", port)),))[0][0].port == port


def test_the_same_port_in_another_way_is_bound_beside_our_own(listeners):
    settings = (listen(("127.0.0.1", 0)),)
    listeners.extend(settings)
    port = listeners.of_worker(0, settings)[0][0].port
    wider = (listen(("0.0.0.0", port)),)
    listeners.extend(wider)
    assert listeners.of_worker(0, wider)[0][0].port == port


def test_an_unprivileged_port_says_what_it_needs(listeners, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    for privileged, mend in ((True, "start as root with"), (False, "restart the gate")):
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:25: .*{mend}"):
            listeners.extend((listen(("127.0.0.1", 25)),), privileged=privileged)


def test_ipv6_stands_beside_ipv4_on_one_port(listeners):
    try:
        bind_one("::1", 0).close()
    except OSError:
        with pytest.raises(ConfigError, match=r"IPv6 switched off|this host has no address"):
            listeners.extend((listen(("::1", 0)),))
        return
    settings = (listen(("::", 0)),)
    listeners.extend(settings)
    port = listeners.of_worker(0, settings)[0][0].port
    both = (*settings, listen(("0.0.0.0", port), name="v4"))
    listeners.extend(both)
    for host in ("::1", "127.0.0.1"):
        socket.create_connection((host, port)).close()


@pytest.mark.parametrize("number", [LISTENERS_MAX - 1, LISTENERS_MAX, LISTENERS_MAX + 1])
def test_addresses_are_bounded_by_what_one_message_carries(number):
    listeners = Listeners(1)
    settings = (listen(*[("127.0.0.1", 0)] * number),)
    if number <= LISTENERS_MAX:
        listeners.extend(settings)
        assert len(listeners.of_worker(0, settings)) == number
    else:
        with pytest.raises(ConfigError, match="too many"):
            listeners.extend(settings)
    listeners.close()


def test_endpoints_are_written_as_people_write_them():
    assert endpoint("127.0.0.1", 25) == "127.0.0.1:25"
    assert endpoint("::1", 25) == "[::1]:25"


def test_the_consoles_port_is_shared_with_nobody():
    with bind_one("127.0.0.1", 0) as sock, pytest.raises(OSError, match="in use"):
        bind_one("127.0.0.1", sock.getsockname()[1])
