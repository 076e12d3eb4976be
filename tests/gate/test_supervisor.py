"""The supervisor with a fake worker: what clients, operators and systemd see of starts, deaths, reloads, drains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import pytest

from gatepost.errors import ConfigError
from gatepost.gate.children import Times
from gatepost.gate.listeners import Listeners
from gatepost.gate.settings import ListenSettings
from gatepost.gate.supervisor import Plan, Programs, Supervisor
from gatepost.telemetry import (
    RELOADS,
    SESSIONS,
    SESSIONS_OPEN,
    WORKERS_RESTARTED,
    Metrics,
    Occupancy,
    Style,
    map_memory,
)

WORKER = str(Path(__file__).with_name("fake_worker.py"))
TIMES = Times(
    tick_s=0.1,
    silent_ticks=10_000,
    quick_s=1000.0,
    wait_first_s=0.1,
    wait_max_s=0.4,
    start_tries=2,
    apply_s=20.0,
    drain_s=30.0,
    cut_s=5.0,
    bind_s=0.0,
    settle_s=0.05,
)
PATIENCE_S = 30.0


def mx(*ports: int, name: str = "mx", line: int = 3) -> ListenSettings:
    addresses = tuple(("127.0.0.1", port) for port in ports or (0,))
    return ListenSettings(name=name, addresses=addresses, where=f"gatepost.toml:{line}")


class Trial:
    """One supervisor in this process, its log, and the configuration that it finds."""

    def __init__(self, directory: Path, times: Times = TIMES, notify_socket: str = "") -> None:
        self.plan = Plan(
            octets=b"serve",
            path="gatepost.toml",
            workers=1,
            data=str(directory / "data"),
            listens=(mx(),),
        )
        self.error: Exception | None = None
        self.times = times
        self.notify_socket = notify_socket
        self.programs = Programs((sys.executable, WORKER), (sys.executable, "-c", "raise SystemExit(7)"))
        self.lines: list[str] = []
        self.supervisor: Supervisor

    def load(self) -> Plan:
        if self.error is not None:
            raise self.error
        return self.plan

    async def __aenter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        asyncio.get_running_loop().add_reader(self._reading, self._read)
        self._partial = b""
        self._news = asyncio.Event()
        self.supervisor = Supervisor(
            self.load,
            self.programs,
            Style(),
            notify_socket=self.notify_socket,
            output=self._writing,
            times=self.times,
        )
        self.run = asyncio.create_task(self.supervisor.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()
        self.end()
        with contextlib.suppress(ConfigError):
            await asyncio.wait_for(self.run, PATIENCE_S)
        asyncio.get_running_loop().remove_reader(self._reading)
        os.close(self._reading)
        os.close(self._writing)

    def _read(self) -> None:
        *lines, self._partial = (self._partial + os.read(self._reading, 1 << 20)).split(b"\n")
        self.lines += [line.decode() for line in lines]
        self._news.set()

    async def line(self, beginning: str) -> str:
        """The first line that begins so, now or later."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for line in self.lines:
                    if line.startswith(beginning):
                        return line
                if self.run.done():
                    await self.run
                self._news.clear()
                await self._news.wait()

    async def event(self, name: str, number: int = 1) -> dict[str, Any]:
        """The n-th event of this name, now or later."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [event for event in self.events() if event["event"] == name]
                if len(found) >= number:
                    return found[number - 1]
                self._news.clear()
                await self._news.wait()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    async def ready(self) -> list[int]:
        """The ports that the line ``ready`` names."""
        line = await self.line("ready")
        return [int(word.rpartition(":")[2]) for word in re.findall(r"127[^ ,;]+", line.partition(";")[0])]

    async def greeting(self, port: int) -> list[str]:
        """What a client is told: worker, process id, generation, listener."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            words = (await reader.readline()).decode().split()
            writer.close()
            return words

    def hup(self) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    def end(self) -> None:
        self.supervisor._asked_to_end()

    def state(self) -> dict[str, Any]:
        return self.supervisor._shared.board.read()


@pytest.fixture(autouse=True)
def process_state() -> Any:
    """The supervisor raises limits and sets the umask of its process, which here is the test's."""
    mask, limits = os.umask(0o022), resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    os.umask(mask)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


async def test_ready_names_the_real_ports_once_every_listener_accepts(trial: Trial) -> None:
    trial.plan = replace(trial.plan, workers=2, listens=(mx(0, 0), mx(0, name="inside")))
    async with trial:
        ports = await trial.ready()
        assert len(set(ports)) == 3
        line = await trial.line("ready")
        assert line == f"ready: mx 127.0.0.1:{ports[0]}, mx 127.0.0.1:{ports[1]}, inside 127.0.0.1:{ports[2]}"
        assert (await trial.greeting(ports[0]))[2:] == ["1", "mx"]
        assert (await trial.greeting(ports[2]))[2:] == ["1", "inside"]
        assert {(await trial.greeting(ports[0]))[0] for _ in range(40)} == {"0", "1"}
        state = trial.state()
        assert state["serving"]
        assert [worker["ready"] for worker in state["workers"]] == [True, True]


async def test_introduction_and_warnings_come_first(trial: Trial) -> None:
    trial.plan = replace(trial.plan, introduction=("the embedded default",), warnings=("gatepost.toml:1: hm",))
    async with trial:
        await trial.ready()
        texts = [event["text"] for event in trial.events()]
        assert texts[0].startswith("Gatepost ")
        assert texts[1:3] == ["the embedded default", "gatepost.toml:1: hm"]
        if os.geteuid() == 0:
            assert texts[3].startswith("running as root")


async def test_a_killed_worker_comes_back_and_serves_whoever_connected_meanwhile(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        _, pid, *_ = await trial.greeting(port)
        os.kill(int(pid), signal.SIGKILL)
        # Nobody accepts now: these wait in the backlog of the socket that the supervisor keeps.
        greetings = await asyncio.gather(*(trial.greeting(port) for _ in range(20)))
        assert {words[0] for words in greetings} == {"0"}
        assert pid not in {words[1] for words in greetings}
        died = await trial.event("worker_died")
        assert died["how"] == "was killed by SIGKILL"
        metrics = trial.supervisor._metrics
        assert metrics.read(WORKERS_RESTARTED)[0].value == 1


async def test_what_a_dead_worker_held_is_forgotten_and_what_it_counted_is_not(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        shared = trial.supervisor._shared
        metrics = Metrics(map_memory(shared.metrics_fd), 0)
        occupancy = Occupancy(map_memory(shared.occupancy_fd), 0)
        metrics.inc(metrics.cell(SESSIONS, "mx"), 5)
        metrics.inc(metrics.cell(SESSIONS_OPEN, "mx"), 3)
        assert occupancy.enter(ip_address("192.0.2.1")) == 1
        os.kill(int((await trial.greeting(port))[1]), signal.SIGKILL)
        await trial.event("worker_died")
        assert metrics.read(SESSIONS)[0].value == 5
        assert metrics.read(SESSIONS_OPEN)[0].value == 0
        assert occupancy.sessions() == 0
        assert occupancy.enter(ip_address("192.0.2.1")) == 1


async def test_a_worker_that_dies_again_and_again_waits_longer_and_is_not_given_up(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        waits = []
        for number in (1, 2, 3, 4):
            os.kill(int((await trial.greeting(port))[1]), signal.SIGKILL)
            waits.append((await trial.event("worker_died", number))["back_s"])
        assert waits == [0.1, 0.2, 0.4, 0.4]
        assert await trial.greeting(port)


async def test_hup_puts_a_new_configuration_in_force_without_closing_what_stays(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline()).split()[2] == b"1"
        trial.plan = replace(trial.plan, listens=(mx(0), mx(0, name="inside")))
        trial.hup()
        reload = await trial.event("reload")
        assert reload["generation"] == 2
        assert (await trial.greeting(port))[2:] == ["2", "mx"]
        added = trial.state()["listeners"][1]
        assert added["name"] == "inside"
        added_port = int(added["address"].rpartition(":")[2])
        assert (await trial.greeting(added_port))[3] == "inside"
        # The session from before the reload goes on.
        writer.write(b"content\nend\n")
        assert await reader.read() == b"go\ndone\n"
        writer.close()
        # And what is no longer named is closed.
        trial.plan = replace(trial.plan, listens=(mx(0),))
        trial.hup()
        await trial.event("reload", 2)
        with pytest.raises(ConnectionRefusedError):
            await trial.greeting(added_port)
        assert trial.supervisor._metrics.read(RELOADS)[0].value == 2


async def test_a_configuration_that_does_not_load_leaves_the_old_one_in_force_and_says_so(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        error = trial.error = ConfigError(["gatepost.toml:1: bad", "gatepost.toml:2: worse"])
        trial.hup()
        last = await trial.event("reload_refused", 3)
        assert [e["text"] for e in trial.events() if e["event"] == "reload_refused"][:2] == error.problems
        assert last["text"] == "the configuration before this one stays in force"
        assert (await trial.greeting(port))[2] == "1"
        assert trial.state()["reload"] == {"result": "refused", "problems": error.problems}
        trial.error = None
        trial.hup()
        await trial.event("reload")
        assert trial.state()["reload"]["result"] == "ok"


async def test_not_even_our_own_fault_in_reading_a_file_ends_a_running_gate(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        trial.error = KeyError("a fault of ours")
        trial.hup()
        text = (await trial.event("reload_refused"))["text"]
        assert text == "gatepost.toml: Gatepost failed to read it (KeyError); please report it with the lines above"
        assert "a fault of ours" in (await trial.event("fault"))["text"]
        assert (await trial.greeting(port))[2] == "1"


@pytest.mark.parametrize("word", [b"refuse", b"die"])
async def test_a_configuration_that_a_worker_cannot_take_is_taken_back_everywhere(trial: Trial, word: bytes) -> None:
    trial.plan = replace(trial.plan, workers=2)
    async with trial:
        (port,) = await trial.ready()
        good = trial.plan
        trial.plan = replace(good, octets=word, listens=(mx(0), mx(0, name="inside")))
        trial.hup()
        first = await trial.event("reload_refused")
        assert "not like this" in first["text"] or "died while it took the configuration" in first["text"]
        await trial.supervisor._until(trial.supervisor._all_ready, PATIENCE_S)
        assert {(await trial.greeting(port))[2] for _ in range(20)} == {"3"}
        assert len(trial.state()["listeners"]) == 1


async def test_an_address_that_cannot_be_bound_refuses_the_reload(trial: Trial) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        async with trial:
            (port,) = await trial.ready()
            trial.plan = replace(trial.plan, listens=(mx(0), mx(taken, name="inside", line=9)))
            trial.hup()
            text = (await trial.event("reload_refused"))["text"]
            assert text.startswith(f"gatepost.toml:9: cannot listen on 127.0.0.1:{taken}: another program")
            assert (await trial.greeting(port))[2] == "1"


async def test_what_needs_a_restart_is_said(trial: Trial) -> None:
    async with trial:
        await trial.ready()
        trial.plan = replace(trial.plan, workers=3)
        trial.hup()
        await trial.event("reload")
        assert "[gate] workers has changed; it takes effect at the next start" in [e["text"] for e in trial.events()]


async def test_a_running_gate_does_not_move_to_other_data(trial: Trial, tmp_path: Path) -> None:
    async with trial:
        (port,) = await trial.ready()
        trial.plan = replace(trial.plan, data=str(tmp_path / "other"))
        trial.hup()
        assert "[gate] data has changed" in (await trial.event("reload_refused"))["text"]
        assert (await trial.greeting(port))[2] == "1"
        assert not (tmp_path / "other").exists()


async def test_a_changed_file_reloads(trial: Trial, tmp_path: Path) -> None:
    file = tmp_path / "gatepost.toml"
    file.write_text("one")
    trial.plan = replace(trial.plan, watch=(str(file),))
    async with trial:
        await trial.ready()
        (tmp_path / "bystander").write_text("nothing to do with us")
        for number, text in enumerate(("two", "three!"), 1):
            replacement = tmp_path / "new"
            replacement.write_text(text)
            replacement.replace(file)  # as an editor does
            await trial.event("reload", number)
        assert len([event for event in trial.events() if event["event"] == "changed"]) == 2


async def test_a_drain_takes_no_new_session_and_waits_for_content(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readline()
        writer.write(b"content\n")
        assert await reader.readline() == b"go\n"
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        await idle_reader.readline()
        os.kill(os.getpid(), signal.SIGTERM)
        assert "30 s" in (await trial.event("drain"))["text"]
        assert await idle_reader.read() == b""
        idle_writer.close()
        assert trial.state()["draining"]
        trial.hup()
        assert (await trial.event("reload"))["text"] == "HUP is ignored: the gate is draining"
        with pytest.raises(ConnectionRefusedError):
            await trial.greeting(port)
        assert not trial.run.done()
        writer.write(b"end\n")
        assert await reader.readline() == b"done\n"
        writer.close()
        await asyncio.wait_for(trial.run, PATIENCE_S)
        assert (await trial.event("stop"))["text"] == "stopped"


async def test_a_second_signal_cuts_the_drain_short_and_says_what_was_cut(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readline()
        writer.write(b"content\n")
        assert await reader.readline() == b"go\n"
        os.kill(os.getpid(), signal.SIGINT)
        await trial.event("drain")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(trial.run, PATIENCE_S)
        assert (await trial.event("drain", 2))["text"] == "1 session cut: the drain was over"
        writer.close()


async def test_every_address_that_cannot_be_had_is_told_with_its_mend_before_anything_starts(trial: Trial) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        trial.plan = replace(
            trial.plan,
            listens=(
                mx(taken),
                ListenSettings("far", (("192.0.2.77", 2525),), where="gatepost.toml:9"),
            ),
            console=("127.0.0.1", taken),
            console_where="gatepost.toml:12",
        )
        async with trial:
            with pytest.raises(ConfigError) as caught:
                await trial.run
    first, second, third = caught.value.problems
    assert first.startswith(f"gatepost.toml:3: cannot listen on 127.0.0.1:{taken}: another program listens there; ")
    assert f"sport = :{taken}" in first
    assert second.startswith("gatepost.toml:9: cannot listen on 192.0.2.77:2525: this host has no address 192.0.2.77")
    assert third.startswith(f"gatepost.toml:12: the console cannot listen on 127.0.0.1:{taken}")
    assert not trial.lines


async def test_another_gate_on_the_same_port_is_found_although_it_shares(trial: Trial) -> None:
    other = Listeners(1)
    other.extend((mx(0),))
    port = other.of_worker(0, (mx(0),))[0][0].port
    try:
        trial.plan = replace(trial.plan, listens=(mx(port),))
        async with trial:
            with pytest.raises(ConfigError, match="another program listens there"):
                await trial.run
    finally:
        other.close()


async def test_another_gate_on_the_same_data_is_refused(trial: Trial, tmp_path: Path) -> None:
    async with trial:
        await trial.ready()
        assert (tmp_path / "data" / "gatepost.pid").read_text() == f"{os.getpid()}\n"
        second = Trial(tmp_path)
        async with second:
            with pytest.raises(ConfigError, match=rf"another gate \(process {os.getpid()}\) runs on .*data; stop it"):
                await second.run
        assert await trial.greeting((await trial.ready())[0])
    assert not (tmp_path / "data" / "gatepost.pid").exists()


async def test_a_configuration_that_the_first_worker_refuses_is_a_failed_start(trial: Trial) -> None:
    trial.plan = replace(trial.plan, octets=b"refuse", workers=2)
    async with trial:
        with pytest.raises(ConfigError) as caught:
            await asyncio.wait_for(trial.run, PATIENCE_S)
    assert caught.value.problems == ["gatepost.toml:7: not like this"]
    assert not [line for line in trial.lines if line.startswith("ready")]


async def test_a_worker_that_cannot_live_is_a_failed_start(trial: Trial) -> None:
    trial.plan = replace(trial.plan, octets=b"die")
    async with trial:
        with pytest.raises(ConfigError, match="worker 0 ended with exit code 3"):
            await asyncio.wait_for(trial.run, PATIENCE_S)


async def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    trial = Trial(tmp_path, replace(TIMES, silent_ticks=20))
    async with trial:
        (port,) = await trial.ready()
        _, pid, *_ = await trial.greeting(port)
        os.kill(int(pid), signal.SIGSTOP)
        hangs = await trial.event("worker_hangs")
        assert hangs["worker"] == 0
        # SIGABRT stays pending in a stopped process; the next look kills it for good.
        assert (await trial.event("worker_died"))["how"].startswith("was killed by SIG")
        assert (await trial.greeting(port))[1] != pid


async def test_a_worker_that_breaks_the_protocol_is_ended(trial: Trial) -> None:
    async with trial:
        (port,) = await trial.ready()
        trial.plan = replace(trial.plan, octets=b"garble")
        trial.hup()
        await trial.event("worker_defect")
        await trial.event("reload_refused")
        await trial.supervisor._until(trial.supervisor._all_ready, PATIENCE_S)
        assert (await trial.greeting(port))[2] == "3"


async def test_the_console_is_started_again(trial: Trial) -> None:
    trial.plan = replace(trial.plan, console=("127.0.0.1", 0))
    async with trial:
        assert "; console http://127.0.0.1:" in await trial.line("ready")
        died = await trial.event("console_died", 2)
        assert died["how"] == "ended with exit code 7"


async def test_systemd_is_told(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.setblocking(False)
        trial = Trial(tmp_path, notify_socket=address)
        async with trial:
            await trial.ready()
            trial.hup()
            await trial.event("reload")
        said = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                said += systemd.recv(4096) + b"\n"
    states = [line for line in said.decode().split("\n") if line in ("READY=1", "RELOADING=1", "STOPPING=1")]
    assert states == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert "WATCHDOG=1" in said.decode()


async def test_a_worker_outlives_a_supervisor_that_was_killed_only_to_drain(tmp_path: Path) -> None:
    """The worker's end of the channel says EOF, whatever killed the other end: see tests/gate/test_worker.py."""
    trial = Trial(tmp_path)
    async with trial:
        (port,) = await trial.ready()
        channel = trial.supervisor._workers[0].channel
        assert channel is not None
        channel._socket.shutdown(socket.SHUT_WR)
        assert (await trial.event("worker_died"))["how"] == "ended with exit code 0"
        assert await trial.greeting(port)
