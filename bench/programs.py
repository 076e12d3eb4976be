"""The gate and its peers: how each is configured for the same work, started and asked whether it does that work.

Why: a ratio is honest only when both programs apply the same policy in front of the same sink: accept for example.com
    from anyone, let 127.0.0.2 relay, refuse the rest at RCPT.
Trust: each program runs from a configuration and a directory of its own, on loopback; no service of the machine is
    touched.
Promise: ``start`` returns when the program greets and has shown that policy in a dialogue; else Failed with its log.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bench import hotspots
from bench.machine import Failed, Ports, Processes
from bench.report import BARE

ROOT = Path(__file__).resolve().parent.parent
LOCAL = "user@example.com"
ELSEWHERE = "someone@elsewhere.test"  # the sink refuses it, so that a program without a policy can be measured too
PARTNER = "someone@partner.test"  # the sink takes it
STRANGER = "127.0.0.3"
TRUSTED = "127.0.0.2"
READY_TIMEOUT_S = 60.0


class Program:
    """One server between generator and sink.

    Attributes:
        name: as on the command line; title: as in the table.
        has_policy: it decides about relaying itself.
        warm_up_s: load before each scenario's first round.
    """

    name = ""
    title = ""
    has_policy = True
    warm_up_s = 1.0

    def __init__(self, directory: Path, ports: Ports, sink_port: int) -> None:
        self.directory = directory
        self.sink_port = sink_port
        self.port = ports.free()
        self.processes: Processes | None = None
        self.sessions_opened = 0  # by us, for the count of log lines
        self._ports = ports

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be measured here; "" when it can."""
        return ""

    def arguments(self) -> list[str | Path]:
        """Writes the configuration into ``self.directory``; returns the command that stays in the foreground."""
        raise NotImplementedError

    def environment(self) -> dict[str, str] | None:
        """None: ours."""
        return None

    @property
    def log(self) -> Path:
        return self.directory / "stdout"

    def start(self) -> None:
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        arguments = self.arguments()
        self.processes = Processes(self.name)
        self.processes.start(
            arguments,
            stdout=self.log,
            stderr=self.directory / "stderr",
            cwd=self.directory,
            environment=self.environment(),
        )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._greets():
            if not self.processes.alive():
                raise Failed(f"{self.title} ended while starting:\n{self.logged()}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.title} did not answer within {READY_TIMEOUT_S:.0f} s:\n{self.logged()}")
            time.sleep(0.1)
        if self.has_policy:
            self._show_policy()

    def stop(self) -> None:
        if self.processes is not None:
            self.processes.stop()
            self.processes = None

    def settle(self) -> None:
        """Wait for what it still does for the units that are over."""

    def cpu_s(self) -> float:
        return 0.0 if self.processes is None else self.processes.cpu_s()

    def logged(self) -> str:
        """The last lines of what it said."""
        files = [*sorted(self.directory.glob("*.log")), self.directory / "stderr", self.directory / "stdout"]
        return "".join(
            f"  {file.name}: {line}\n"
            for file in files
            if file.exists()
            for line in file.read_text(errors="replace").splitlines()[-12:]
        )

    def _greets(self) -> bool:
        try:
            with self.dialogue(STRANGER) as say:
                return say("NOOP").startswith("250")
        except (OSError, Failed):
            return False

    def _show_policy(self) -> None:
        for source, recipient, right in (
            (STRANGER, LOCAL, ("250",)),
            (STRANGER, ELSEWHERE, ("550", "554")),
            (TRUSTED, PARTNER, ("250",)),
        ):
            with self.dialogue(source) as say:
                say("EHLO client.stranger.test")
                say("MAIL FROM:<sender@stranger.test>")
                reply = say(f"RCPT TO:<{recipient}>")
                if not reply.startswith(right):
                    raise Failed(f"{self.title} answered {reply!r} to <{recipient}> from {source}:\n{self.logged()}")

    @contextmanager
    def dialogue(self, source: str) -> Iterator[Say]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20, source_address=(source, 0)) as connection:
            self.sessions_opened += 1
            with connection.makefile("rb") as replies:
                say = Say(connection, replies)
                say("")
                yield say
                say("QUIT")


class Say:
    """One command, one reply: its last line."""

    def __init__(self, connection: socket.socket, replies: BinaryIO) -> None:
        self._connection = connection
        self._replies = replies

    def __call__(self, command: str) -> str:
        if command:
            self._connection.sendall(command.encode("ascii") + b"\r\n")
        while True:
            try:
                line = self._replies.readline(1000)
            except OSError as error:
                raise Failed(f"after {command!r}: {error}") from None
            if not line.endswith(b"\r\n"):
                raise Failed(f"the connection ended after {command!r}")
            if line[3:4] != b"-":
                return line.decode("utf-8", "replace").rstrip()


SETTLE_S = 60.0


class Gatepost(Program):
    """The gate as a user runs it: a configuration file, two workers, one JSON line a session in a file."""

    name = "gatepost"
    title = "gatepost"
    workers = 2
    entries = 0  # so many trust entries and so many local domains beside the policy's own
    journal = False

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("gatepost") else "gatepost is not installed in this Python"

    def arguments(self) -> list[str | Path]:
        domains = ['"example.com"', *(f'"customer-{i}.test"' for i in range(self.entries))]
        trust = [(TRUSTED, "the benchmark's trusted client")]
        trust += [(f"10.{i >> 8 & 255}.{i & 255}.0/24", f"customer {i}") for i in range(self.entries)]
        config = self.directory / "gatepost.toml"
        config.write_text(
            f"""\
[gate]
name = "gate.bench.test"
data = "{self.directory / "data"}"
workers = {self.workers}

[[listen]]
name = "mx"
address = "127.0.0.1:{self.port}"
role = "mx"
tls = "none"

[domains]
local = [{", ".join(domains)}]

[backend.sink]
address = "127.0.0.1:{self.sink_port}"
tls = "off"
connections = 2500

[limits]  # every one in force, and wide enough for one host that plays sixty
sessions = 5000
sessions_per_client = 5000
sessions_per_minute_per_client = 10000000
messages_per_hour_per_mailbox = 1000000000

[journal]
enabled = {str(self.journal).lower()}

[console]
address = "127.0.0.1:{self._ports.free()}"
"""
            + "".join(f'\n[[trust]]\nnetwork = "{network}"\nwhy = "{why}"\n' for network, why in trust)
        )
        return [sys.executable, "-m", "gatepost", "run", "--config", config]

    def _greets(self) -> bool:
        said = self.log.read_text(errors="replace") + (self.directory / "stderr").read_text(errors="replace")
        return any(line.startswith("ready") for line in said.splitlines()) and super()._greets()

    def worker_pids(self) -> list[int]:
        pids = [] if self.processes is None else self.processes.pids()
        return [pid for pid in pids if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]

    def session_lines(self) -> int:
        """How many JSON lines it has written."""
        with self.log.open("rb") as lines:
            return sum(line.startswith(b"{") for line in lines)


class GatepostEverything(Gatepost):
    """The gate with the journal as well, which is how it comes."""

    name = "everything"
    title = "gatepost, everything on"
    journal = True

    def settle(self) -> None:
        """Wait until all that was journalled is in the database: it is a cost of what has just been measured."""
        path = self.directory / "data" / "journal"
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end:
            with suppress(sqlite3.Error), closing(sqlite3.connect(path / "journal.sqlite")) as database:
                (read,) = database.execute("SELECT segment, octets FROM backlogs").fetchall()
                files = sorted((path / "backlog").glob("*.jsonl"))
                if read == (int(files[-1].stem), files[-1].stat().st_size):
                    return
            time.sleep(0.05)
        raise Failed("the journal did not take over what waited")


class GatepostBaseline(Gatepost):
    """The gate from other sources, as a peer: what a change has bought."""

    name = "baseline"
    title = "gatepost, baseline"
    sources = ""

    def environment(self) -> dict[str, str] | None:
        return {**os.environ, "PYTHONPATH": self.sources}


class GatepostSampled(Gatepost):
    """The gate with its workers ready to be sampled."""

    name = "gatepost-sampled"
    title = "gatepost, sampled"

    def environment(self) -> dict[str, str] | None:
        return hotspots.environment(self.directory)


class GatepostOneWorker(Gatepost):
    name = "gatepost-1-worker"
    title = "gatepost, 1 worker"
    workers = 1


class GatepostLarge(Gatepost):
    name = "gatepost-large"
    title = "gatepost, 10,000 trust entries and domains"
    entries = 10_000


class PostfixProxy(Program):
    """Postfix's before-queue content filter: smtpd hands each message to the sink while the client waits."""

    name = "postfix"
    title = "Postfix, before-queue proxy"
    inet = "127.0.0.1:{port} inet n - n - - smtpd -o smtpd_proxy_filter=127.0.0.1:{sink}\n"
    extra = ""
    logs = True

    @classmethod
    def missing(cls) -> str:
        if shutil.which("postfix") is None:
            return "postfix is not installed"
        return "" if os.geteuid() == 0 else "Postfix can only be started by root"

    def arguments(self) -> list[str | Path]:
        etc = self.directory / "etc"
        etc.mkdir()
        (self.directory / "spool").mkdir()
        (self.directory / "data").mkdir()
        shutil.chown(self.directory / "data", "postfix", "postfix")
        daemons = subprocess.check_output(["postconf", "-dh", "daemon_directory"], text=True).strip()
        (etc / "main.cf").write_text(f"""\
compatibility_level = 3.6
queue_directory = {self.directory / "spool"}
data_directory = {self.directory / "data"}
daemon_directory = {daemons}
command_directory = /usr/sbin
mail_owner = postfix
setgid_group = postdrop
{f"maillog_file = {self.directory / 'postfix.log'}" if self.logs else ""}
maillog_file_prefixes = {self.directory}
myhostname = postfix.bench.test
mydestination =
relay_domains = example.com
mynetworks = {TRUSTED}/32
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
# no name service: the gate asks for none in this work either
smtpd_peername_lookup = no
disable_dns_lookups = yes
alias_maps =
alias_database =
local_recipient_maps =
# the limits a client has by default are in force, and wide enough for one host that plays sixty
default_process_limit = 2500
smtpd_client_connection_count_limit = 5000
message_size_limit = 104857600
{self.extra}""")
        (etc / "master.cf").write_text(
            self.inet.format(port=self.port, sink=self.sink_port)
            + """\
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
proxymap  unix  - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp      unix  - - n - - smtp
relay     unix  - - n - - smtp
error     unix  - - n - - error
retry     unix  - - n - - error
discard   unix  - - n - - discard
anvil     unix  - - n - 1 anvil
scache    unix  - - n - 1 scache
postlog   unix-dgram n - n - 1 postlogd
"""
        )
        # "postfix start-fg" keeps a shell between us and master: what it prepares is done by "check".
        checked = subprocess.run(["postfix", "-c", etc, "check"], capture_output=True, text=True, check=False)
        if checked.returncode != 0:
            raise Failed(f"postfix check: {checked.stderr}")
        return [Path(daemons) / "master", "-c", etc, "-s"]


class PostfixLean(PostfixProxy):
    """The same without what it does by default and HAProxy does not: no log, no limits a client."""

    name = "postfix-lean"
    title = "Postfix, before-queue proxy (no log, no client limits)"
    logs = False
    extra = "smtpd_client_connection_count_limit = 0\n"


class Postscreen(PostfixProxy):
    """The same with postscreen in front; every client has passed its tests before anything is measured."""

    name = "postscreen"
    title = "Postfix + postscreen, proxy"
    warm_up_s = 4.0  # each of our clients waits once for a second
    inet = (
        "127.0.0.1:{port} inet n - n - 1 postscreen\n"
        "smtpd pass - - n - - smtpd -o smtpd_proxy_filter=127.0.0.1:{sink}\n"
        "dnsblog unix - - n - 0 dnsblog\n"
        "tlsproxy unix - - n - 0 tlsproxy\n"
    )

    @property
    def extra(self) -> str:  # type: ignore[override]
        return f"""\
postscreen_greet_wait = 1s
postscreen_cache_map = btree:{self.directory / "data" / "postscreen_cache"}
postscreen_client_connection_count_limit = 5000
"""


class HAProxy(Program):
    """A TCP pass-through: no policy, no SMTP; the limit of any proxy."""

    name = "haproxy"
    title = "HAProxy, TCP pass-through (no policy)"
    has_policy = False

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("haproxy") else "haproxy is not installed"

    def arguments(self) -> list[str | Path]:
        config = self.directory / "haproxy.cfg"
        config.write_text(f"""\
global
  maxconn 8000
defaults
  mode tcp
  timeout connect 10s
  timeout client 300s
  timeout server 300s
listen smtp
  bind 127.0.0.1:{self.port}
  server sink 127.0.0.1:{self.sink_port}
""")
        return ["haproxy", "-db", "-f", config]


class NginxMail(Program):
    """nginx's mail proxy: no relay policy; it asks over HTTP where each session goes, and the same nginx answers."""

    name = "nginx"
    title = "nginx mail proxy (no policy)"
    has_policy = False

    @classmethod
    def missing(cls) -> str:
        if shutil.which("nginx") is None:
            return "nginx is not installed"
        return "" if _nginx_mail_module() is not None else "this nginx has no mail module"

    def arguments(self) -> list[str | Path]:
        http = self._ports.free()
        module = _nginx_mail_module()
        config = self.directory / "nginx.conf"
        config.write_text(f"""\
{f"load_module {module};" if module else ""}
daemon off;
worker_processes 2;
pid {self.directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 10000; }}
http {{
  access_log off;
  client_body_temp_path {self.directory}/body;
  proxy_temp_path {self.directory}/proxy;
  fastcgi_temp_path {self.directory}/fastcgi;
  uwsgi_temp_path {self.directory}/uwsgi;
  scgi_temp_path {self.directory}/scgi;
  server {{
    listen 127.0.0.1:{http};
    location / {{
      add_header Auth-Status OK;
      add_header Auth-Server 127.0.0.1;
      add_header Auth-Port {self.sink_port};
      return 204;
    }}
  }}
}}
mail {{
  server_name nginx.bench.test;
  auth_http 127.0.0.1:{http}/;
  smtp_client_buffer 16k;  # with the default 4k each 4 KiB message waits for a delayed ACK
  server {{
    listen 127.0.0.1:{self.port};
    protocol smtp;
    smtp_auth none;
    xclient off;
    proxy on;
  }}
}}
""")
        return ["nginx", "-p", self.directory, "-c", config]


def _nginx_mail_module() -> str | None:
    """The path of the dynamic module, "" when it is built in, None when there is none."""
    if shutil.which("nginx") is None:
        return None
    told = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=False).stderr
    for place in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"):
        if (Path(place) / "ngx_mail_module.so").exists():
            return f"{place}/ngx_mail_module.so"
    return "" if "--with-mail " in f"{told} " else None


class Aiosmtpd(Program):
    """aiosmtpd's own Proxy handler with the policy at RCPT: what a small Python proxy costs."""

    name = "aiosmtpd"
    title = "aiosmtpd, Proxy handler"

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("aiosmtpd") else "aiosmtpd is not installed"

    def arguments(self) -> list[str | Path]:
        return [sys.executable, Path(__file__).with_name("aiosmtpd_proxy.py"), str(self.port), str(self.sink_port)]


class Bare(Program):
    """What Python itself costs here for a gate of this shape: see ``bare_proxy.py``."""

    name = BARE
    title = "a bare trial of the gate's shape (no log, no limits, no safety)"

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("uvloop") else "uvloop is not installed"

    def arguments(self) -> list[str | Path]:
        return [sys.executable, Path(__file__).with_name("bare_proxy.py"), str(self.port), str(self.sink_port)]


class Direct(Program):
    """No program at all: generator to sink, which shows that neither is the bottleneck."""

    name = "direct"
    title = "straight into the sink"
    has_policy = False

    def __init__(self, directory: Path, ports: Ports, sink_port: int) -> None:
        super().__init__(directory, ports, sink_port)
        self.port = sink_port

    def start(self) -> None:
        """There is nothing to start."""


PEERS: tuple[type[Program], ...] = (PostfixProxy, HAProxy, PostfixLean, Postscreen, NginxMail, Aiosmtpd, Bare)
PEERS_BY_DEFAULT = ("postfix", "haproxy", BARE)
