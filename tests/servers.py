"""Real servers for tests: Postfix, Exim and OpenSMTPD on free ports of the loopback interface, each in its own place.

    with Postfix() as server:
        ... deliver to 127.0.0.1:{server.port} for alice@example.com or bob@example.com ...
        assert server.arrived("alice")[0] == trace_field + content

Each keeps what it accepts in a Maildir a user, and refuses every other recipient of example.com with 550 at RCPT.  What
it started is ended by process id.  ``need(NAME)`` skips a test, with the reason, where a server or client is missing;
under CI it fails: there everything is installed (tests/install-servers.sh).
"""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "servers"
CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

DOMAIN = "example.com"
USERS = ("alice", "bob")
START_S = 30.0
ARRIVE_S = 30.0
STOP_S = 10.0
MESSAGE_OCTETS_MAX = 60 << 20

_SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


class Missing(Exception):
    """What is missing, as a clause."""


def _program(name: str, *, root: bool = False) -> Path:
    if root and os.geteuid() != 0:
        raise Missing(f"{name} must be started by root")
    found = shutil.which(name, path=_SBIN)
    if found is None:
        raise Missing(f"{name} is not installed")
    return Path(found)


def _postfix() -> Path:
    program = _program("postfix", root=True)
    if not Path("/usr/lib/postfix/sbin/master").exists():
        raise Missing("/usr/lib/postfix/sbin is not there")
    return program


def _exim() -> Path:
    if os.geteuid() != 0:
        raise Missing("Exim must be started by root")
    program = CACHE / "exim4-daemon-light" / "usr" / "sbin" / "exim4"
    _try([str(program), "-C", "/dev/null", "-bV"], "Exim")
    return program


def _opensmtpd() -> Path:
    if os.geteuid() != 0:
        raise Missing("OpenSMTPD must be started by root")
    program = CACHE / "opensmtpd" / "usr" / "sbin" / "smtpd"
    _try([str(program), "-h"], "OpenSMTPD", status=1)
    _try(["chroot", "/", "true"], "chroot")
    return program


def _nodemailer() -> Path:
    _program("node")
    for directory in (Path("/usr/share/nodejs/nodemailer"), Path("/usr/lib/nodejs/nodemailer")):
        if directory.is_dir():
            return directory
    raise Missing("node-nodemailer is not installed")


def _try(command: list[str], name: str, status: int = 0) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=START_S, check=False)
    except OSError as error:
        raise Missing(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode != status:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise Missing(f"{name} cannot be run: {said[-1] if said else done.returncode}")


_FINDERS: dict[str, Callable[[], Path]] = {
    "postfix": _postfix,
    "exim": _exim,
    "opensmtpd": _opensmtpd,
    "nodemailer": _nodemailer,
    **{name: functools.partial(_program, name) for name in ("swaks", "haproxy", "curl", "node")},
}


@functools.cache
def _find(name: str) -> Path | str:
    try:
        return _FINDERS[name]()
    except Missing as missing:
        return str(missing)


def need(name: str) -> Path:
    """The program (of nodemailer the directory); where it is missing the test is skipped, and under CI it fails."""
    found = _find(name)
    if isinstance(found, Path):
        return found
    reason = f"{found}; sh tests/install-servers.sh installs what can be had"
    if CI:
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now, and that no outgoing connection will be given."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)  # below what Linux hands out by itself
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """One running server.

    Attributes:
        directory: its own, under the system's temporary directory (a server that drops its rights could not enter the
            one that pytest makes); removed in the end.
        port: where it speaks SMTP.
    """

    name: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self.program = need(self.name)
        self.options = options
        self.directory = Path(tempfile.mkdtemp(prefix=f"gatepost-{self.name}-"))
        self.directory.chmod(0o755)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._prepare()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- what each one does in its own way

    def _prepare(self) -> None:
        """Write configuration and directories."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    # ---- what they have in common

    @property
    def log(self) -> str:
        """What it has written so far."""
        files = [self.directory / "output", *self.directory.glob("*log")]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())

    def start(self) -> None:
        """Start, again after ``stop`` on the same port, and wait until it greets."""
        with (self.directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                    probe.settimeout(5)
                    if probe.recv(3) == b"220":
                        probe.sendall(b"QUIT\r\n")
                        return
            except OSError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"{self.name} did not start:\n{self.log}")

    def stop(self) -> None:
        """End it and everything it started."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        # What it has started is in the session that was made for it, and nothing else is; most of it in its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        left: list[int] = []
        for _ in range(100):
            left = [pid for pid, _, session in _processes() if session == process.pid]
            if not left and process.poll() is not None:
                return
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        raise AssertionError(f"{self.name} cannot be stopped: {left}")

    def mailbox(self, user: str) -> Path:
        """The Maildir of a user."""
        return self.directory / "mail" / user

    def processes(self, name: str) -> list[int]:
        """Its processes of that name: they are in the session that was made for it."""
        assert self.process is not None
        return [pid for pid, its_name, session in _processes() if its_name == name and session == self.process.pid]

    def arrived(self, user: str, count: int = 1, first: bytes = b"Received: from gate-under-test ") -> list[bytes]:
        """The messages a user has got, oldest first, when there are so many; each as it was sent to this server.

        The server's own fields are taken off, and lines end in CRLF again, as they do on the wire.

        Args:
            first: how the first field begins that is not the server's.
        """
        until = time.monotonic() + ARRIVE_S
        while True:
            new = self.mailbox(user) / "new"
            files = sorted(new.iterdir(), key=lambda file: file.stat().st_mtime_ns) if new.is_dir() else []
            if len(files) >= count:
                return [_as_sent(file.read_bytes(), first) for file in files]
            if time.monotonic() > until:
                raise AssertionError(f"{len(files)} of {count} messages arrived for {user}:\n{self.log}")
            time.sleep(0.02)


def _processes() -> Iterator[tuple[int, str, int]]:
    """Every living process: its id, its name, its session.  proc(5)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = status.read_text().rpartition(")")
        except OSError:
            continue  # gone
        state, _, _, session = tail.split()[:4]
        if state not in "ZX":
            yield int(status.parent.name), head.partition("(")[2], int(session)


def _as_sent(octets: bytes, first: bytes) -> bytes:
    octets = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    start = octets.find(b"\n" + first) + 1
    return octets[start:]


class Postfix(Server):
    """Postfix.  Options: certificate (PEM file of key and chain) for STARTTLS; settings: lines for main.cf.

    It trusts the loopback interface, as a server behind a gate trusts the gate: what it is given for strangers' domains
    it discards.
    """

    name = "postfix"

    def _prepare(self) -> None:
        etc, mail = self.directory / "etc", self.directory / "mail"
        for directory in (etc, mail, self.directory / "queue", self.directory / "data"):
            directory.mkdir()
        shutil.chown(self.directory / "data", "postfix")
        shutil.chown(mail, "nobody")
        (etc / "master.cf").write_text(f"127.0.0.1:{self.port} inet n - n - - smtpd\n{_POSTFIX_SERVICES}")
        mailboxes = ", ".join(f"{{{user}@{DOMAIN} = {user}/}}" for user in USERS)
        nobody = pwd.getpwnam("nobody")
        lines = [
            "compatibility_level = 3.6",
            f"queue_directory = {self.directory}/queue",
            f"data_directory = {self.directory}/data",
            "command_directory = /usr/sbin",
            "daemon_directory = /usr/lib/postfix/sbin",
            f"maillog_file_prefixes = {self.directory}",
            f"maillog_file = {self.directory}/maillog",
            "mail_owner = postfix",
            "myhostname = postfix.test",
            "mydestination =",
            "inet_interfaces = 127.0.0.1",
            "inet_protocols = ipv4",
            "mynetworks = 127.0.0.0/8",
            "local_header_rewrite_clients =",  # what comes from this host is not completed: it comes through a gate
            "alias_maps =",
            "alias_database =",
            f"virtual_mailbox_domains = {DOMAIN}",
            f"virtual_mailbox_base = {mail}",
            f"virtual_mailbox_maps = inline:{{ {mailboxes} }}",
            f"virtual_uid_maps = static:{nobody.pw_uid}",
            f"virtual_gid_maps = static:{nobody.pw_gid}",
            "virtual_mailbox_limit = 0",
            f"message_size_limit = {MESSAGE_OCTETS_MAX}",
            "default_transport = discard:",
            "smtputf8_enable = yes",
        ]
        if "certificate" in self.options:
            lines += [
                "smtpd_tls_security_level = may",
                f"smtpd_tls_chain_files = {self.options['certificate']}",
            ]
        lines += self.options.get("settings", [])
        (etc / "main.cf").write_text("\n".join(lines) + "\n")

    def _command(self) -> list[str]:
        etc = str(self.directory / "etc")
        made = subprocess.run([self.program, "-c", etc, "check"], capture_output=True, timeout=START_S, check=False)
        assert made.returncode == 0, made.stderr.decode()
        # -d: master stays in the session it is started in, so that it and its children are found again.
        return ["/usr/lib/postfix/sbin/master", "-c", etc, "-d"]


_POSTFIX_SERVICES = """\
cleanup    unix  n - n - 0 cleanup
qmgr       unix  n - n 300 1 qmgr
tlsmgr     unix  - - n 1000? 1 tlsmgr
rewrite    unix  - - n - - trivial-rewrite
bounce     unix  - - n - 0 bounce
defer      unix  - - n - 0 bounce
trace      unix  - - n - 0 bounce
verify     unix  - - n - 1 verify
flush      unix  n - n 1000? 0 flush
proxymap   unix  - - n - - proxymap
error      unix  - - n - - error
retry      unix  - - n - - error
discard    unix  - - n - - discard
local      unix  - n n - - local
virtual    unix  - n n - - virtual
anvil      unix  - - n - 1 anvil
scache     unix  - - n - 1 scache
postlog    unix-dgram n - n - 1 postlogd
"""


class Exim(Server):
    """Exim.  Options: certificate (PEM file of key and chain) for STARTTLS."""

    name = "exim"

    def _prepare(self) -> None:
        for name in ("spool", "mail", "log"):
            (self.directory / name).mkdir()
            shutil.chown(self.directory / name, "Debian-exim", "Debian-exim")
        tls = ""
        if "certificate" in self.options:
            tls = f"tls_advertise_hosts = *\ntls_certificate = {self.options['certificate']}\n"
        (self.directory / "exim.conf").write_text(
            _EXIM.format(
                program=self.program,
                directory=self.directory,
                port=self.port,
                domain=DOMAIN,
                users=":".join(USERS),
                octets=MESSAGE_OCTETS_MAX,
                tls=tls or "tls_advertise_hosts =\n",
            )
        )

    @property
    def log(self) -> str:
        files = [self.directory / "output", *(self.directory / "log").iterdir()]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())

    def _command(self) -> list[str]:
        return [str(self.program), "-C", str(self.directory / "exim.conf"), "-bdf"]


# deliver_drop_privilege: the copy in .cache is not setuid, and needs no other user to deliver here.
_EXIM = """\
primary_hostname = exim.test
exim_path = {program}
exim_user = Debian-exim
exim_group = Debian-exim
deliver_drop_privilege = true
never_users =
keep_environment =
spool_directory = {directory}/spool
log_file_path = {directory}/log/%slog
pid_file_path = {directory}/log/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
message_size_limit = {octets}
host_lookup =
rfc1413_hosts =
smtp_accept_max = 0
{tls}
acl_smtp_rcpt = recipient

begin acl
recipient:
  accept domains = {domain}
         local_parts = {users}
  deny domains = {domain}
       message = no such user here
  accept hosts = 127.0.0.0/8
  deny message = relay not permitted

begin routers
strangers:
  driver = accept
  domains = ! {domain}
  transport = nowhere
mailboxes:
  driver = accept
  local_parts = {users}
  transport = maildir

begin transports
maildir:
  driver = appendfile
  directory = {directory}/mail/$local_part_data
  create_directory
  maildir_format
nowhere:
  driver = appendfile
  file = /dev/null
"""


class OpenSmtpd(Server):
    """OpenSMTPD, in a root directory of its own: its users and the places of its programs are compiled into it."""

    name = "opensmtpd"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    def mailbox(self, user: str) -> Path:
        return self.root / "mail" / user

    def _prepare(self) -> None:
        etc = self.root / "etc"
        for place in ("etc", "dev", "run", "tmp", "mail", "home", "var/lib/opensmtpd/empty", "var/spool/smtpd"):
            (self.root / place).mkdir(parents=True)
        (self.root / "var" / "run").symlink_to("../run")
        for place in ("var/lib/opensmtpd/empty", "var/spool/smtpd"):
            (self.root / place).chmod(0o711)
        (self.root / "tmp").chmod(0o1777)
        for name, minor in (("null", 3), ("zero", 5), ("random", 8), ("urandom", 9)):
            os.mknod(self.root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (self.root / "dev" / name).chmod(0o666)
        self._copy_programs()
        users = [("root", 0, "/"), ("nobody", 65534, "/")]
        users += [(name, 60801 + n, "/var/lib/opensmtpd/empty") for n, name in enumerate(("opensmtpd", "opensmtpq"))]
        users += [("keeper", 60803, "/home")]
        (etc / "passwd").write_text("".join(f"{name}:x:{uid}:{uid}::{home}:/bin/sh\n" for name, uid, home in users))
        (etc / "group").write_text("".join(f"{name}:x:{uid}:\n" for name, uid, _ in users))
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "mailname").write_text("opensmtpd.test\n")
        for place in ("mail", "home"):
            os.chown(self.root / place, 60803, 60803)
        recipients = ", ".join(f"{user}@{DOMAIN}" for user in USERS)
        mailboxes = ", ".join(f"{user}@{DOMAIN} = keeper" for user in USERS)
        (etc / "smtpd.conf").write_text(
            f"smtp max-message-size {MESSAGE_OCTETS_MAX}\n"
            f"table mailboxes {{ {mailboxes} }}\n"
            f"listen on 127.0.0.1 port {self.port} hostname opensmtpd.test\n"
            'action keep maildir "/mail/%{rcpt.user}" virtual <mailboxes>\n'
            f"match from any for rcpt-to {{ {recipients} }} action keep\n"
        )

    def _copy_programs(self) -> None:
        unpacked = CACHE / "opensmtpd"
        programs = {path: path.relative_to(unpacked) for path in (unpacked / "usr/libexec/opensmtpd").iterdir()}
        programs[unpacked / "usr/sbin/smtpd"] = Path("usr/sbin/smtpd")
        programs[Path("/bin/sh").resolve()] = Path("bin/sh")  # a delivery is a command
        for program in list(programs):
            listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
            programs |= {Path(word): Path(word[1:]) for word in listed.split() if word.startswith("/")}
        for source, place in programs.items():
            target = self.root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)

    def _command(self) -> list[str]:
        return ["chroot", str(self.root), "/usr/sbin/smtpd", "-d", "-f", "/etc/smtpd.conf"]
