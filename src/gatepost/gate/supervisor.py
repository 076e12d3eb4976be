"""The supervisor: one small process that owns the ports and keeps the others alive.

Why: what serves strangers may die, and must be able to take a new configuration, without a client noticing.  So this
    process serves nobody: it binds the addresses, hands copies of the sockets to the workers, and starts again what
    ends.
Trust: it reads nothing from the network.  The configuration is the administrator's; what workers say is read strictly
    (``gate/channel.py``).
Promise:
    - A worker that dies is started again with the same sockets: connections that wait in its backlog are served.
    - A configuration is loaded, and its new addresses are bound, before any worker hears of it; where that fails, or a
      worker refuses it, the one before stays in force everywhere.
    - A drain cuts no content in flight before its patience is over or a second signal says so.
Sources: signal(7), sd_notify(3), unix(7).

    start:             load -> data directory, lock -> bind -> drop privileges -> workers and console -> "ready"
    HUP, file change:  load -> bind what is new -> configure(n+1) -> every worker ready(n+1) -> close what is gone
    TERM, INT:         close the listening sockets -> drain -> every worker drained -> end
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import watchfiles

from gatepost import __version__
from gatepost.errors import ConfigError
from gatepost.gate import children, privileges
from gatepost.gate.channel import (
    Channel,
    ChannelError,
    Configure,
    Drain,
    Drained,
    Listening,
    Message,
    Ready,
    Refused,
    Status,
    pair,
)
from gatepost.gate.children import BackOff, Process, Times
from gatepost.gate.listeners import Listeners, bind_one, endpoint
from gatepost.gate.settings import ListenSettings
from gatepost.telemetry import (
    RELOADS,
    WORKERS_RESTARTED,
    Level,
    Metrics,
    Occupancy,
    SessionLog,
    StatusBoard,
    Style,
    create_memory,
    map_memory,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the supervisor has to know of a configuration; ``app`` makes it, for this module stands below ``config``.

    Attributes:
        octets: the configuration as the workers will parse it.
        path: the file's name for messages, "" for the embedded default.
        data, user: like ``workers`` and ``console`` they hold from one start to the next.
        console: host and port, None for no console.
        sessions: how many a worker may hold, 0 for no limit.
        watch: files whose change means a reload.
        journal: the settings of the journal, None for none; where they change, its writer begins anew.
        introduction: what a person should hear first.
        warnings: what loads, and should be known.
    """

    octets: bytes
    path: str
    workers: int
    data: str
    listens: tuple[ListenSettings, ...]
    user: str = ""
    console: tuple[str, int] | None = None
    console_where: str = ""
    sessions: int = 0
    backends: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()
    journal: object = None
    introduction: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The configuration's name for people."""
        return self.path or "embedded default"


class Programs(NamedTuple):
    """Command lines; what a process needs to know is appended as options."""

    worker: tuple[str, ...]
    console: tuple[str, ...]
    journal: tuple[str, ...] = ()


@dataclass(slots=True)
class _Worker:
    """One place for a worker process.

    Attributes:
        sent, ready: the last generation handed to it, and the last that it said is in force.
        refusal: (generation, why).
        deaths: how often it had to be started again.
        cut: sessions it had to cut when its drain was over.
        over: it was drained and will not be started again.
    """

    index: int
    process: Process | None = None
    channel: Channel | None = None
    sent: int = 0
    ready: int = 0
    refusal: tuple[int, str] = (0, "")
    deaths: int = 0
    sessions: int = 0
    cut: int = 0
    silent_ticks: int = 0
    problem: str = ""
    over: bool = False


@dataclass(slots=True)
class _Part:
    """A process that serves no client: the console, or the journal's writer.

    Attributes:
        wanted: whether there is to be one now.
        descriptors: what it inherits, by option; words: further options.
        again: it is to begin anew, or to end where it is not wanted any more.
    """

    name: str
    program: tuple[str, ...]
    wanted: Callable[[], bool]
    descriptors: Callable[[], contextlib.AbstractContextManager[dict[str, int]]]
    words: Callable[[], tuple[str, ...]] = tuple
    again: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Shared:
    """The memory that the processes have in common."""

    workers: int
    metrics_fd: int = field(init=False)
    occupancy_fd: int = field(init=False)
    board_fd: int = field(init=False)
    metrics: Metrics = field(init=False)
    occupancy: Occupancy = field(init=False)
    board: StatusBoard = field(init=False)

    def __post_init__(self) -> None:
        self.metrics_fd = create_memory("gatepost-metrics", Metrics.size_octets(self.workers))
        memory = map_memory(self.metrics_fd)
        Metrics.format(memory)
        self.metrics = Metrics(memory, self.workers)
        self.occupancy_fd = create_memory("gatepost-occupancy", Occupancy.size_octets(self.workers))
        memory = map_memory(self.occupancy_fd)
        Occupancy.format(memory)
        self.occupancy = Occupancy(memory, 0)  # to clear rows; the supervisor has no sessions
        self.board_fd = create_memory("gatepost-status", StatusBoard.SIZE_OCTETS)
        self.board = StatusBoard(map_memory(self.board_fd))

    def close(self) -> None:
        for descriptor in (self.metrics_fd, self.occupancy_fd, self.board_fd):
            os.close(descriptor)


class Supervisor:
    """One gate.

    Args:
        load: reads the configuration anew; raises ConfigError.
        programs: what to start.
        style: of the log.
        notify_socket: systemd's NOTIFY_SOCKET, "" without.
        output: the descriptor of the log.
    """

    def __init__(
        self,
        load: Callable[[], Plan],
        programs: Programs,
        style: Style,
        *,
        notify_socket: str = "",
        output: int = 1,
        times: Times | None = None,
    ) -> None:
        self._load = load
        self._programs = programs
        self._notify_socket = notify_socket
        self._times = times or Times()
        self._began_s = time.monotonic()
        self._plan = plan = load()
        self._account = privileges.account_of(plan.user, plan.where)
        self._shared = _Shared(plan.workers)
        self._metrics = self._shared.metrics
        self._log = SessionLog(output, style, lock=self._shared.metrics_fd, dropped=self._metrics.log_dropped)
        self._listeners = Listeners(plan.workers)
        self._console_socket: socket.socket | None = None
        self._workers = [_Worker(index) for index in range(plan.workers)]
        self._generation = 1
        self._serving = False
        self._start_failure: list[str] = []
        self._last_reload: dict[str, object] = {}
        self._fingerprint = _fingerprint(plan.watch)
        self._waiters: list[asyncio.Future[None]] = []
        self._reload_wanted = asyncio.Event()
        self._end_wanted = asyncio.Event()
        self._cut_wanted = False
        self._watch_again = asyncio.Event()
        self._console = _Part(
            "console",
            programs.console,
            lambda: self._console_socket is not None,
            self._console_descriptors,
            lambda: ("--path", self._plan.path),
        )
        self._journal = _Part(
            "journal",
            programs.journal,
            lambda: bool(programs.journal) and self._plan.journal is not None,
            self._journal_descriptors,
            lambda: ("--path", self._plan.path, "--index", str(len(self._workers) + 1)),
        )

    # ---- start

    async def run(self) -> None:
        """Serve until a signal says otherwise, and drain.

        Raises:
            ConfigError: the gate could not start, and nothing was served.
        """
        plan = self._plan
        loop = asyncio.get_running_loop()
        signals = {
            signal.SIGTERM: self._asked_to_end,
            signal.SIGINT: self._asked_to_end,
            signal.SIGHUP: self._asked_to_reload,
        }
        privileges.check_programs(self._account, plan.where)
        privileges.prepare_data(plan.data, self._account, plan.where)
        os.umask(0o077)
        instance = privileges.Instance(plan.data, self._account, plan.where)
        try:
            self._bind()
            if self._account is not None:
                privileges.drop(self._account)
            self._introduce()
            self._metrics.name_backends(plan.backends)
            for number, handler in signals.items():
                loop.add_signal_handler(number, handler)
            await self._serve()
            if self._start_failure:
                raise ConfigError(self._start_failure)
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            self._listeners.close()
            if self._console_socket is not None:
                self._console_socket.close()
            instance.release()
            await asyncio.to_thread(self._log.close)
            self._shared.close()

    def _bind(self) -> None:
        """All addresses, the console's too; every problem is told at once."""
        plan = self._plan
        problems: list[str] = []
        try:
            self._listeners.extend(plan.listens, patience_s=self._times.bind_s)
        except ConfigError as error:
            problems += error.problems
        if plan.console is not None:
            try:
                self._console_socket = bind_one(*plan.console)
            except OSError as error:
                where = f"{plan.console_where}: " if plan.console_where else ""
                mend = f"{error.strerror or error}; write another [console] address"
                problems.append(f"{where}the console cannot listen on {endpoint(*plan.console)}: {mend}")
        if problems:
            raise ConfigError(problems)

    def _introduce(self) -> None:
        plan = self._plan
        self._log.event(
            "start",
            f"Gatepost {__version__}, {plan.where}, {_count(plan.workers, 'worker')}",
            version=__version__,
            config=plan.path,
            workers=plan.workers,
            pid=os.getpid(),
        )
        for text in plan.introduction:
            self._log.event("introduction", text)
        for text in (
            *plan.warnings,
            privileges.warning_about(plan.user),
            privileges.raise_open_files(plan.sessions),
        ):
            if text:
                self._log.event("warning", text, Level.WARNING)

    async def _serve(self) -> None:
        """Everything at once, until the drain is over."""
        async with asyncio.TaskGroup() as group:
            for worker in self._workers:
                group.create_task(self._keep_worker(worker))
            over, journal_over = asyncio.Event(), asyncio.Event()
            console = group.create_task(self._keep_part(self._console, over))
            journal = group.create_task(self._keep_part(self._journal, journal_over))
            others = [
                group.create_task(duty) for duty in (self._announce(), self._reloads(), self._watch(), self._tick())
            ]
            await self._end_wanted.wait()
            await self._drain()
            for task in others:
                task.cancel()
            over.set()
            await console
            journal_over.set()  # last of all: it takes over what the workers left behind
            await journal
        self._log.event("stop", "could not start" if self._start_failure else "stopped")

    async def _announce(self) -> None:
        """Say "ready" once every listener accepts."""
        await self._until(lambda: self._start_failure or self._all_ready())
        if self._start_failure:
            self._end_wanted.set()
            return
        self._serving = True
        addresses = [(listening.name, endpoint(listening.host, listening.port)) for listening in self._listening()]
        console = ""
        if self._console_socket is not None:
            console = f"http://{endpoint(*self._console_socket.getsockname()[:2])}/"
        seconds = time.monotonic() - self._began_s
        self._log.event(
            "ready",
            f"every listener accepts, {seconds:.1f} s after the start",
            listeners=[{"name": name, "address": address} for name, address in addresses],
            console=console,
        )
        listeners = ", ".join(f"{name} {address}" for name, address in addresses)
        self._log.line(f"ready: {listeners}" + (f"; console {console}" if console else ""))
        self._notify(f"READY=1\nSTATUS=serving {listeners}")
        self._changed()

    def _listening(self) -> list[Listening]:
        return [listening for listening, _ in self._listeners.of_worker(0, self._plan.listens)]

    def _all_ready(self) -> bool:
        return all(worker.ready == self._generation for worker in self._workers)

    # ---- workers

    async def _keep_worker(self, worker: _Worker) -> None:
        """Start it, again and again."""
        back_off = BackOff(self._times)
        while not self._end_wanted.is_set():
            back_off.started()
            how = await self._run_worker(worker)
            was_ready = worker.ready
            worker.process, worker.channel, worker.sessions = None, None, 0
            worker.ready, worker.sent = 0, 0
            # Nobody writes these rows now: what the dead had open is over, what it counted stays.
            self._metrics.clear_gauges(worker.index)
            self._shared.occupancy.clear(worker.index)
            if self._end_wanted.is_set():
                if how != _DRAINED:
                    text = f"worker {worker.index} {how} in its drain"
                    self._log.event("worker_died", text, Level.ERROR, worker=worker.index, how=how)
                break
            back_s = back_off.died()
            worker.deaths += 1
            worker.problem = how
            self._metrics.inc(self._metrics.cell(WORKERS_RESTARTED))
            text = f"worker {worker.index} {how}; it is started again {f'in {back_s:g} s' if back_s else 'at once'}"
            self._log.event("worker_died", text, Level.ERROR, worker=worker.index, how=how, back_s=back_s)
            if not self._serving and not was_ready and back_off.quick_deaths >= self._times.start_tries:
                why = f"worker {worker.index} {how}; what it said about it stands above"
                self._start_failure.append(f"{self._plan.where}: {why}")
            self._changed()
            await self._pause(back_s)
        worker.over = True
        self._changed()

    async def _run_worker(self, worker: _Worker) -> str:
        """One process from its start to its end.

        Returns:
            How it ended, as the rest of a sentence.
        """
        try:
            ours, theirs = pair()
        except OSError as error:
            return f"could not be started: {error}"
        command = (
            *self._programs.worker,
            *("--channel", str(theirs.fileno())),
            *("--metrics", str(self._shared.metrics_fd)),
            *("--occupancy", str(self._shared.occupancy_fd)),
            *("--index", str(worker.index)),
            *("--workers", str(len(self._workers))),
        )
        with theirs:
            try:
                worker.process = process = await children.spawn(
                    command, (theirs.fileno(), self._shared.metrics_fd, self._shared.occupancy_fd)
                )
            except OSError as error:
                ours.close()
                return f"could not be started: {error}"
        worker.channel = channel = Channel(ours, descriptors_max=0)
        worker.silent_ticks = 0
        worker.refusal = (0, "")
        try:
            with contextlib.suppress(ConnectionError):  # seen again when we listen
                await self._configure(worker)
            await self._hear(worker, channel)
        except OSError as error:
            self._log.event("worker_defect", f"worker {worker.index}: {error}", Level.ERROR, worker=worker.index)
        finally:
            channel.close()
            # It has ended, or is about to: without its channel it has nothing to live for.
            returncode = await children.end(process, self._times.cut_s)
        if worker.refusal[0] and not worker.ready:
            return f"refused the configuration: {worker.refusal[1]}"
        return children.how_it_ended(returncode)

    async def _configure(self, worker: _Worker) -> None:
        """Hand the worker the configuration in force, or the end when that is near.

        Raises:
            ConnectionError: it is gone.
        """
        channel = worker.channel
        if channel is None or worker.sent == self._generation:
            return
        if self._end_wanted.is_set():
            await channel.send(Drain(0.0))
            return
        worker.sent = self._generation
        served = self._listeners.of_worker(worker.index, self._plan.listens)
        configure = Configure(self._generation, self._plan.path, tuple(listening for listening, _ in served))
        with self._plan_descriptor() as descriptor:
            await channel.send(configure, (descriptor, *(sock.fileno() for _, sock in served)))

    async def _hear(self, worker: _Worker, channel: Channel) -> None:
        """Until the worker closes its end, or says something that no worker of ours would say."""
        while True:
            try:
                received = await channel.receive()
            except ChannelError as error:
                text = f"worker {worker.index} broke the protocol of its control channel and is ended: {error}"
                self._log.event("worker_defect", text, Level.ERROR, worker=worker.index)
                children.send_signal(worker.process, signal.SIGKILL)
                return
            if received is None:
                return
            worker.silent_ticks = 0
            self._heard(worker, received.message)

    def _heard(self, worker: _Worker, message: Message) -> None:
        match message:
            case Ready(generation):
                worker.ready, worker.problem = generation, ""
                self._changed()
            case Refused(generation, text):
                worker.refusal, worker.problem = (generation, text), text
                if not self._serving and generation == self._generation:
                    # At the start there is nothing to go back to.
                    _add(self._start_failure, text)
                self._changed()
            case Status(sessions):
                worker.sessions = sessions
            case Drained(sessions):
                worker.cut = sessions
            case Configure() | Drain():
                pass  # not for us, and saying it confers nothing

    # ---- the console and the journal's writer

    async def _keep_part(self, part: _Part, over: asyncio.Event) -> None:
        """As ``_keep_worker``.  It ends with its lifeline, whose other end is ours alone."""
        back_off = BackOff(self._times)
        while not over.is_set():
            if not part.wanted():
                await _first(over, part.again)
                part.again.clear()
                continue
            back_off.started()
            ours, theirs = pair()
            try:
                with theirs, part.descriptors() as descriptors:
                    options = {**descriptors, "--lifeline": theirs.fileno()}
                    words = [word for option, number in options.items() for word in (option, str(number))]
                    command = (*part.program, *words, *part.words())
                    process = await children.spawn(command, tuple(options.values()))
            except OSError as error:
                how = f"could not be started: {error}"
            else:
                how = await self._part_life(part, process, over, ours)
            finally:
                ours.close()
            if over.is_set() or part.again.is_set():
                part.again.clear()
                continue
            back_s = back_off.died()
            text = f"the {part.name} {how}; it is started again {f'in {back_s:g} s' if back_s else 'at once'}"
            self._log.event(f"{part.name}_died", text, Level.ERROR, how=how, back_s=back_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(back_s):
                    await over.wait()

    async def _part_life(self, part: _Part, process: Process, over: asyncio.Event, lifeline: socket.socket) -> str:
        try:
            async with asyncio.TaskGroup() as group:
                dead = group.create_task(process.wait())
                told = group.create_task(_first(over, part.again))
                await asyncio.wait((dead, told), return_when=asyncio.FIRST_COMPLETED)
                told.cancel()
                lifeline.close()
                return children.how_it_ended(await children.end(process, self._times.cut_s))
        finally:
            children.send_signal(process, signal.SIGKILL)

    @contextlib.contextmanager
    def _console_descriptors(self) -> Iterator[dict[str, int]]:
        assert self._console_socket is not None
        with self._plan_descriptor() as descriptor:
            yield {
                "--socket": self._console_socket.fileno(),
                "--metrics": self._shared.metrics_fd,
                "--board": self._shared.board_fd,
                "--config": descriptor,
            }

    @contextlib.contextmanager
    def _journal_descriptors(self) -> Iterator[dict[str, int]]:
        # Its place among the metrics may be a dead one's.
        self._metrics.clear_gauges(len(self._workers) + 1)
        with self._plan_descriptor() as descriptor:
            yield {"--config": descriptor, "--metrics": self._shared.metrics_fd}

    @contextlib.contextmanager
    def _plan_descriptor(self) -> Iterator[int]:
        """The configuration in force, to be read by a process that may not read its file."""
        descriptor = create_memory("gatepost-config", len(self._plan.octets))
        try:
            os.pwrite(descriptor, self._plan.octets, 0)
            yield descriptor
        finally:
            os.close(descriptor)

    # ---- reload

    def _asked_to_reload(self) -> None:
        if self._end_wanted.is_set():
            self._log.event("reload", "HUP is ignored: the gate is draining")
        else:
            self._reload_wanted.set()

    async def _reloads(self) -> None:
        """One after the other; several wishes in the meantime are one."""
        await self._until(lambda: self._serving)
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            problems = await self._reload()
            result = "refused" if problems else "ok"
            self._last_reload = {"result": result, "problems": problems}
            self._changed()
            # Counted last: whoever waits for the count then finds the reasons.
            self._metrics.inc(self._metrics.cell(RELOADS, result))
            self._notify("READY=1")

    async def _reload(self) -> list[str]:
        """Take the configuration as it is now.

        Returns:
            Why not, as sentences; the one before is then in force everywhere.
        """
        before = self._plan
        self._fingerprint = _fingerprint(before.watch)
        try:
            plan = await self._loaded()
            if plan.data != before.data:
                return self._stays(
                    [f"{plan.where}: [gate] data has changed, and a running gate cannot move; restart it"]
                )
            self._listeners.extend(plan.listens, privileged=self._account is None)
        except ConfigError as error:
            return self._stays(error.problems)
        self._metrics.name_backends(plan.backends)
        self._plan = plan
        problems = await self._hand_out()
        if problems:
            self._plan = before
            problems += await self._hand_out()
            self._listeners.prune(before.listens)
            return self._stays(problems)
        self._listeners.prune(plan.listens)
        if plan.watch != before.watch:
            self._fingerprint = _fingerprint(plan.watch)
            self._watch_again.set()
        if plan.journal != before.journal:
            self._journal.again.set()
        if plan.octets != before.octets:
            # It answers for the configuration in force.  Who asks meanwhile waits in its socket's queue.
            self._console.again.set()
        for text in (*plan.warnings, *_at_next_start(before, plan)):
            self._log.event("warning", text, Level.WARNING)
        self._log.event("reload", f"{plan.where} is in force", config=plan.path, generation=self._generation)
        return []

    async def _loaded(self) -> Plan:
        """The configuration as it is now.

        Raises:
            ConfigError: it does not load; also where the fault is ours: not even that ends a gate that runs.
        """
        # In a thread: a long one must not keep signals and systemd waiting.
        (outcome,) = await asyncio.gather(asyncio.to_thread(self._load), return_exceptions=True)
        if isinstance(outcome, Plan):
            return outcome
        if isinstance(outcome, ConfigError):
            raise outcome
        self._log.event("fault", "".join(traceback.format_exception(outcome)), Level.ERROR)
        mend = "please report it with the lines above"
        raise ConfigError([f"{self._plan.where}: Gatepost failed to read it ({type(outcome).__name__}); {mend}"])

    def _stays(self, problems: list[str]) -> list[str]:
        for problem in problems:
            self._log.event("reload_refused", problem, Level.ERROR)
        self._log.event("reload_refused", "the configuration before this one stays in force", Level.WARNING)
        return problems

    async def _hand_out(self) -> list[str]:
        """Give every worker the plan.

        Returns:
            [] when all that live have it in force; one that is dead right now gets it when it is back.
        """
        self._generation += 1
        generation = self._generation
        asked = [(worker, worker.deaths) for worker in self._workers if worker.channel is not None]
        for worker, _ in asked:
            with contextlib.suppress(ConnectionError):
                await self._configure(worker)

        def answered(worker: _Worker, deaths: int) -> bool:
            return worker.ready == generation or worker.refusal[0] == generation or worker.deaths != deaths

        def settled() -> bool:
            return self._end_wanted.is_set() or all(answered(worker, deaths) for worker, deaths in asked)

        await self._until(settled, self._times.apply_s)
        problems: list[str] = []
        for worker, deaths in asked:
            if worker.refusal[0] == generation:
                _add(problems, worker.refusal[1])
            elif worker.deaths != deaths and worker.ready != generation:
                problems.append(f"{self._plan.where}: worker {worker.index} died while it took the configuration")
            elif worker.ready != generation and not self._end_wanted.is_set():
                problems.append(f"{self._plan.where}: worker {worker.index} did not take the configuration in time")
        return problems

    async def _watch(self) -> None:
        """Ask for a reload when a file of the configuration changed."""
        while True:
            # The directory is watched, not the file: editors and Kubernetes put a new file in the old one's place.
            directories = {os.path.dirname(file) or "." for file in self._plan.watch}  # noqa: PTH120  no I/O here
            self._watch_again.clear()
            if not directories:
                await self._watch_again.wait()
                continue
            settle_ms = int(self._times.settle_s * 1000)
            try:
                async for _ in watchfiles.awatch(
                    *directories,
                    watch_filter=None,
                    recursive=False,
                    debounce=settle_ms,
                    step=settle_ms // 2,
                    stop_event=self._watch_again,
                ):
                    if _fingerprint(self._plan.watch) != self._fingerprint:
                        self._log.event("changed", f"{self._plan.where}, or a file it names, has changed")
                        self._reload_wanted.set()
            except (OSError, RuntimeError) as error:
                text = f"files are not watched for changes ({error}); HUP reloads"
                self._log.event("warning", text, Level.WARNING)
                await self._watch_again.wait()

    # ---- drain

    def _asked_to_end(self) -> None:
        if self._end_wanted.is_set():
            self._cut_wanted = True
        self._end_wanted.set()
        self._changed()

    async def _drain(self) -> None:
        """No new session, nothing in content cut, then the end."""
        patience_s, cut_s = self._times.drain_s, self._times.cut_s
        self._notify("STOPPING=1")
        if self._serving:
            sessions = self._shared.occupancy.sessions()
            text = (
                f"draining: no new session; content in flight is awaited for up to {patience_s:g} s, "
                "a second signal cuts it short"
            )
            self._log.event("drain", text, sessions=sessions)
        self._listeners.close()
        self._publish()
        await self._tell_all(Drain(patience_s))

        def over() -> bool:
            return all(worker.over for worker in self._workers)

        await self._until(lambda: over() or self._cut_wanted, patience_s + cut_s)
        if not over():
            await self._tell_all(Drain(0.0))
            await self._until(over, cut_s)
        for worker in self._workers:
            children.send_signal(worker.process, signal.SIGKILL)
        await self._until(over)
        cut = sum(worker.cut for worker in self._workers)
        if cut:
            self._log.event("drain", f"{_count(cut, 'session')} cut: the drain was over", Level.WARNING, sessions=cut)

    async def _tell_all(self, message: Message) -> None:
        for worker in self._workers:
            if worker.channel is not None:
                # A worker that is gone is drained; one that does not listen is killed in the end.
                with contextlib.suppress(ConnectionError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await worker.channel.send(message)

    # ---- looking after it all

    async def _tick(self) -> None:
        """Find workers that hang; tell systemd that we do not."""
        while True:
            await asyncio.sleep(self._times.tick_s)
            self._notify("WATCHDOG=1")
            for worker in self._workers:
                # Ticks are counted, not seconds: when the whole host sleeps, nobody is to blame.
                worker.silent_ticks += 1
                if worker.process is None or worker.silent_ticks < self._times.silent_ticks:
                    continue
                if worker.silent_ticks == self._times.silent_ticks:
                    text = f"worker {worker.index} does not answer any more and is ended"
                    self._log.event("worker_hangs", text, Level.ERROR, worker=worker.index)
                    children.send_signal(worker.process, signal.SIGABRT)  # its stack goes to standard error
                else:
                    children.send_signal(worker.process, signal.SIGKILL)
            self._publish()

    async def _until(self, true: Callable[[], object], timeout_s: float | None = None) -> None:
        """Wait for a state, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not true():
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiters.append(waiter)
                    await waiter

    def _changed(self) -> None:
        """The state is another: tell the console and whoever waits for one."""
        self._publish()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._end_wanted.wait()

    def _publish(self) -> None:
        """The state, for the console's /readyz."""
        ending = self._end_wanted.is_set()
        listening = [] if ending else self._listening()
        silent_ticks = max(3, self._times.silent_ticks // 4)
        state = {
            "version": __version__,
            "pid": os.getpid(),
            "config": self._plan.where,
            "generation": self._generation,
            "serving": self._serving,
            "draining": ending,
            "listeners": [{"name": at.name, "address": endpoint(at.host, at.port)} for at in listening],
            "workers": [
                {
                    "index": worker.index,
                    # During a reload the one before is in force, and serves.
                    "ready": worker.ready > 0,
                    "current": worker.ready == self._generation,
                    "answers": worker.silent_ticks < silent_ticks,
                    "sessions": worker.sessions,
                    "restarts": worker.deaths,
                    "problem": worker.problem[:500],
                }
                for worker in self._workers
            ],
            "reload": self._last_reload,
        }
        try:
            self._shared.board.write(state)
        except ValueError:  # a configuration with thousands of problems
            self._shared.board.write({**state, "reload": {"result": "refused", "problems": []}})

    def _notify(self, text: str) -> None:
        """sd_notify(3)."""
        if not self._notify_socket:
            return
        address = "\0" + self._notify_socket[1:] if self._notify_socket[0] == "@" else self._notify_socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), address)


_DRAINED = children.how_it_ended(0)


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(event.wait()) for event in events]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


def _fingerprint(files: Sequence[str]) -> tuple[object, ...]:
    """What changes when one of the files does; a key file need not be readable for that."""
    seen: list[object] = []
    for file in files:
        try:
            status = Path(file).stat()
        except OSError:
            seen.append(None)
        else:
            seen.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(seen)


def _at_next_start(before: Plan, after: Plan) -> list[str]:
    """What has changed and cannot be changed in a running gate."""
    changed = [
        name
        for name, old, new in (
            ("[gate] workers", before.workers, after.workers),
            ("[gate] user", before.user, after.user),
            ("[console] address", before.console, after.console),
        )
        if old != new
    ]
    return [f"{name} has changed; it takes effect at the next start" for name in changed]


def _add(problems: list[str], text: str) -> None:
    """The lines of a worker's refusal; all workers say the same."""
    problems += [line for line in text.split("\n") if line not in problems]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
