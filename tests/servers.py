"""Real servers for tests, on free ports of the loopback interface, each in its own place.

Postfix, Exim, OpenSMTPD and Sendmail take mail:

    with Postfix() as server:
        ... deliver to 127.0.0.1:{server.port} for alice@example.com or bob@example.com ...
        assert server.arrived("alice")[0] == trace_field + content

Each keeps what it accepts in a Maildir a user, and refuses every other recipient of example.com with 550 at RCPT.

Dovecot and slapd know users:

    with Dovecot(users={"alice@example.com": "wonder"}) as server:
        ... log in at 127.0.0.1:{server.pop3_port}, {server.imap_port} or the auth protocol at {server.auth_path} ...
        server.set_password("alice@example.com", "changed")

PostgreSQL keeps databases: ``server.url(NAME)``.

What they started is ended by process id.  ``need(NAME)`` skips a test, with the reason, where a server or client is
missing; under CI it fails: there everything is installed (tests/install-servers.sh).
"""

from __future__ import annotations

import base64
import functools
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import quote

import psycopg
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


def _sendmail() -> Path:
    if os.geteuid() != 0:
        raise Missing("Sendmail must be started by root")
    _program("m4")
    if not (CACHE / "sendmail-cf").is_dir():
        raise Missing("sendmail-cf is not unpacked")
    program = CACHE / "sendmail-bin" / "usr" / "libexec" / "sendmail" / "sendmail"
    _try(["ldd", str(program)], "Sendmail")
    _try(["unshare", "--uts", "--mount", "hostname", "sendmail.test"], "Sendmail, which wants names of its own,")
    return program


def _dovecot() -> Path:
    program = _program("dovecot", root=True)
    for package in ("imap", "pop3"):
        if not Path(f"/usr/lib/dovecot/{package}-login").exists():
            raise Missing(f"dovecot-{package}d is not installed")
    return program


def _slapd() -> Path:
    _program("ldapmodify")
    return _program("slapd", root=True)


def _postgresql() -> Path:
    if os.geteuid() != 0:
        raise Missing("PostgreSQL must be started by root, who becomes its user")
    _program("setpriv")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        raise Missing("postgresql is not installed")
    return found[-1]


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
    "sendmail": _sendmail,
    "dovecot": _dovecot,
    "slapd": _slapd,
    "postgresql": _postgresql,
    "nodemailer": _nodemailer,
    **{name: functools.partial(_program, name) for name in ("swaks", "haproxy", "curl", "node", "msmtp", "nmap")},
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
        port: where it listens; of a mail server where it speaks SMTP.
        hello: what it must be told before it says anything; greeting: how that which it says then begins, by which it
            is known to be ready; farewell: what ends such a visit.
    """

    name: ClassVar[str]
    hello: ClassVar[bytes] = b""
    greeting: ClassVar[bytes] = b"220"
    farewell: ClassVar[bytes] = b"QUIT\r\n"
    end_signal: ClassVar[signal.Signals] = signal.SIGTERM

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
            if self._greets():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"{self.name} did not start:\n{self.log}")

    def _greets(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
            probe.settimeout(5)
            probe.sendall(self.hello)
            if probe.recv(len(self.greeting)) == self.greeting:
                probe.sendall(self.farewell)
                return True
        return False

    def stop(self) -> None:
        """End it and everything it started."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(self.end_signal)
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


class Sendmail(Server):
    """Sendmail.  Options: certificate (PEM file of key and chain) for STARTTLS; settings: lines for its .mc file.

    Unlike Sendmail as it comes, it trusts nobody, the loopback interface neither: tests come from there.  Strangers'
    mail that it takes all the same, it throws away.
    """

    name = "sendmail"

    def _prepare(self) -> None:
        (self.directory / "queue").mkdir(mode=0o700)
        for user in USERS:
            for part in ("new", "tmp", "cur"):
                (self.mailbox(user) / part).mkdir(parents=True)
                shutil.chown(self.mailbox(user) / part, "nobody")
        (self.directory / "aliases").write_text("")
        (self.directory / "keep").write_text(_SENDMAIL_KEEP.format(mail=self.directory / "mail"))
        (self.directory / "switch").write_text("hosts files\naliases files\n")  # DNS is not asked
        tls = ""
        if "certificate" in self.options:
            chain = self.directory / "chain.pem"
            shutil.copyfile(self.options["certificate"], chain)
            chain.chmod(0o600)  # it refuses a key that others can read
            places = dict.fromkeys(("SERVER_CERT", "SERVER_KEY", "CACERT"), "/mnt/chain.pem") | {"CACERT_PATH": "/mnt"}
            tls = "".join(f"define(`conf{name}', `{place}')dnl\n" for name, place in places.items())
        settings = "".join(f"{line}dnl\n" for line in self.options.get("settings", []))
        source = self.directory / "sendmail.mc"
        source.write_text(
            _SENDMAIL_BEGIN.format(directory=self.directory, port=self.port, octets=MESSAGE_OCTETS_MAX)
            + tls
            + settings
            + _SENDMAIL_END.format(directory=self.directory, users=" ".join(USERS), domain=DOMAIN)
        )
        templates = f"{CACHE / 'sendmail-cf'}/usr/share/sendmail/cf/"
        command = ["m4", f"-D_CF_DIR_={templates}", f"{templates}m4/cf.m4", str(source)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        assert made.returncode == 0, made.stderr
        # Whom it trusts for the address that they come from: nobody.
        text, count = re.subn(r"^SRelay_ok\n", r"\g<0>R$*\t$@ STRANGER\n", made.stdout, flags=re.MULTILINE)
        assert count == 1 or "promiscuous" in settings
        (self.directory / "sendmail.cf").write_text(text)

    def _command(self) -> list[str]:
        # Where the machine's name has no dot, it waits a minute for DNS to give it one, whatever it is configured to.
        # -bD: in the foreground; -X: what was said, for ``log``.
        # A key it takes only from below directories that nobody else may write in, as /tmp is none: so from /mnt.
        alone = 'hostname sendmail.test && mount --bind "$0" /mnt && exec "$@"'
        own_names = ["unshare", "--uts", "--mount", "sh", "-c", alone, str(self.directory)]
        configuration, talk = f"-C{self.directory / 'sendmail.cf'}", f"-X{self.directory / 'talk.log'}"
        return [*own_names, str(self.program), "-bD", configuration, talk]


_SENDMAIL_BEGIN = """\
divert(-1)
divert(0)dnl
VERSIONID(`for tests')dnl
OSTYPE(`linux')dnl
define(`confDOMAIN_NAME', `sendmail.test')dnl
define(`QUEUE_DIR', `{directory}/queue')dnl
define(`ALIAS_FILE', `{directory}/aliases')dnl
define(`STATUS_FILE', `{directory}/statistics')dnl
define(`HELP_FILE', `{directory}/help')dnl
define(`confPID_FILE', `{directory}/pid')dnl
define(`confCW_FILE', `-o {directory}/names')dnl
define(`confSERVICE_SWITCH_FILE', `{directory}/switch')dnl
define(`confMAX_MESSAGE_SIZE', `{octets}')dnl
define(`confTO_IDENT', `0')dnl
define(`confDELIVERY_MODE', `background')dnl
define(`confBAD_RCPT_THROTTLE', `0')dnl
define(`confDONT_BLAME_SENDMAIL', `GroupWritableDirPathSafe')dnl
define(`confRUN_AS_USER', `root')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`nocanonify')dnl
FEATURE(`accept_unresolvable_domains')dnl
DAEMON_OPTIONS(`Port={port}, Addr=127.0.0.1, Name=MTA, Family=inet')dnl
define(`SMART_HOST', `nowhere:anywhere')dnl
"""

# Rules: tabs part their two sides.  Who is not named at our domain is nobody.
_SENDMAIL_END = """\
MAILER(`local')dnl
MAILER(`smtp')dnl
MAILER_DEFINITIONS
Mkeep, P=/bin/sh, F=lsun, U=nobody, S=EnvFromL, R=EnvToL, A=sh {directory}/keep $u
Mnowhere, P=/bin/sh, F=sun, U=nobody, S=EnvFromL, R=EnvToL, A=sh -c cat>/dev/null
LOCAL_CONFIG
Cw{domain}
C{{Mailboxes}}{users}
LOCAL_RULE_0
R$={{Mailboxes}} < @ $=w . >	$#keep $: $1
R$+ < @ $=w . >	$#error $@ 5.1.1 $: "550 User unknown"
"""

_SENDMAIL_KEEP = """\
#!/bin/sh
# Keeps a message in a Maildir.
name=$(date +%s.%N).$$
cat >"{mail}/$1/tmp/$name" && mv "{mail}/$1/tmp/$name" "{mail}/$1/new/$name"
"""


class Dovecot(Server):
    """Dovecot 2.3 or 2.4.  Options: users, each with a password (text or octets); certificate (PEM file of key and
    chain) for TLS; settings: lines for its configuration.

    Users are whole names such as "alice@example.com", in lower case.  Passwords may be changed while it runs.

    Attributes:
        pop3_port, imap_port: plain, and with STLS and STARTTLS where there is a certificate; pop3s_port, imaps_port:
            TLS from the first octet, 0 without certificate.
        auth_path, auth_port: the auth protocol, on a Unix socket that everybody may use and on TCP.
    """

    name = "dovecot"
    greeting = b"+OK"

    def _prepare(self) -> None:
        self.pop3_port, self.imap_port, self.auth_port = self.port, free_port(), free_port()
        self.pop3s_port, self.imaps_port = (free_port(), free_port()) if "certificate" in self.options else (0, 0)
        self.auth_path = self.directory / "run" / "auth-client"
        self.users: dict[str, str | bytes] = dict(self.options.get("users", {}))
        self._written = 0
        (self.directory / "mail").mkdir()
        shutil.chown(self.directory / "mail", "nobody")
        self._write_users()
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, timeout=START_S, check=True)
        version = re.match(r"(\d+)\.(\d+)", said.stdout)
        assert version, said.stdout
        new = (int(version[1]), int(version[2])) >= (2, 4)
        lines = [
            (_DOVECOT_24 if new else _DOVECOT_23).format(directory=self.directory),
            _DOVECOT.format(
                directory=self.directory,
                imap=self.imap_port,
                imaps=self.imaps_port,
                pop3=self.pop3_port,
                pop3s=self.pop3s_port,
                auth=self.auth_port,
            ),
        ]
        if "certificate" in self.options:
            certificate, key = ("ssl_server_cert_file", "ssl_server_key_file") if new else ("ssl_cert", "ssl_key")
            value = f"{'' if new else '<'}{self.options['certificate']}"
            lines += ["ssl = yes", f"{certificate} = {value}", f"{key} = {value}"]
        else:
            lines.append("ssl = no")
        lines += self.options.get("settings", [])
        (self.directory / "dovecot.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> list[str]:
        return [str(self.program), "-F", "-c", str(self.directory / "dovecot.conf")]

    def set_password(self, user: str, password: str | bytes) -> None:
        """From now on this is the user's password; a user who was not there is there then."""
        self.users[user] = password
        self._write_users()

    def remove(self, user: str) -> None:
        """From now on nobody has that name."""
        del self.users[user]
        self._write_users()

    def _write_users(self) -> None:
        nobody = pwd.getpwnam("nobody")
        lines = []
        for user, password in self.users.items():
            octets = password if isinstance(password, bytes) else password.encode()
            scheme = "{PLAIN.b64}" + base64.b64encode(octets).decode()
            lines.append(f"{user}:{scheme}:{nobody.pw_uid}:{nobody.pw_gid}::{self.mailbox(user)}::\n")
        draft = self.directory / "users.new"
        draft.write_text("".join(lines))
        # A change is known to Dovecot by the file's size and the second it was written in; it looks once a second.
        self._written = max(self._written + 1, int(time.time()))
        os.utime(draft, (self._written, self._written))
        draft.rename(self.directory / "users")
        if self.process is not None:
            time.sleep(1.02 - time.time() % 1)


_DOVECOT_23 = """disable_plaintext_auth = no
mail_location = maildir:~/Maildir
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = passwd-file
  args = {directory}/users
}}
"""

_DOVECOT_24 = """dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
passdb passwd-file {{
  passwd_file_path = {directory}/users
}}
userdb passwd-file {{
  passwd_file_path = {directory}/users
}}
"""

# A wrong password is answered at once, and a test that gives many is not slowed down.
_DOVECOT = """base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/maillog
protocols = imap pop3
listen = 127.0.0.1
auth_mechanisms = plain login
auth_failure_delay = 0
first_valid_uid = 1
mail_max_userip_connections = 0
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0666
  }}
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = {pop3s}
  }}
}}
service auth {{
  unix_listener auth-client {{
    mode = 0666
  }}
  inet_listener auth-client {{
    port = {auth}
  }}
}}
"""


class PostgreSQL(Server):
    """PostgreSQL with one user, who may do everything, and no database but its own.

    Attributes:
        password: of the user "gatepost".
    """

    name = "postgresql"
    end_signal = signal.SIGINT  # what clients have begun is broken off
    password = "the database's password"

    def _prepare(self) -> None:
        self.directory.chmod(0o777)
        secret = self.directory / "secret"
        secret.write_text(self.password)
        secret.chmod(0o644)
        self._as_its_user(
            str(self.program.with_name("initdb")), "-D", "cluster", "-U", "gatepost", "-A", "scram-sha-256",
            "--pwfile", "secret", "-E", "UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip

    def _as_its_user(self, *command: str) -> None:
        done = subprocess.run(
            [*_AS_POSTGRES, *command], cwd=self.directory, capture_output=True, check=False, timeout=START_S
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")

    def _command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [*_AS_POSTGRES, str(self.program), "-D", str(self.directory / "cluster"), *words]

    def _greets(self) -> bool:
        # It listens before it lets anybody in.
        with suppress(psycopg.OperationalError), psycopg.connect(self.url("postgres"), connect_timeout=5):
            return True
        return False

    def url(self, database: str) -> str:
        """Of a database, with user and password."""
        return f"postgresql://gatepost:{quote(self.password, safe='')}@127.0.0.1:{self.port}/{database}"


_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")


class Slapd(Server):
    """OpenLDAP's slapd.  Options: users, each with a password; attributes: further ones of a user, each with its
    values; certificate (PEM file of key and chain) for TLS; settings: lines for slapd.conf before the database.

    A user "alice" is uid=alice,ou=people,dc=example,dc=com with the attribute mail: alice@example.com.  There may be
    proxyAddresses too, as in Active Directory.  Passwords may be changed while it runs.

    Attributes:
        port: plain, and with STARTTLS where there is a certificate; ldaps_port: TLS from the first octet, 0 without.
    """

    name = "slapd"
    base: ClassVar[str] = "dc=example,dc=com"
    people: ClassVar[str] = f"ou=people,{base}"
    admin: ClassVar[str] = f"cn=admin,{base}"
    admin_password: ClassVar[str] = "the-admins-password"
    # RFC 4511: an anonymous bind, message 1; the beginning of the answer to it; unbind, message 2.
    hello = bytes.fromhex("30 0c 02 01 01 60 07 02 01 03 04 00 80 00")
    greeting = bytes.fromhex("30 0c 02 01 01 61")
    farewell = bytes.fromhex("30 05 02 01 02 42 00")

    def dn(self, user: str) -> str:
        """The name of a user's entry.  RFC 4514 §2.4."""
        escaped = re.sub(r'[,+"\\<>;=]|^[ #]| $', r"\\\g<0>", user)
        return f"uid={escaped},{self.people}"

    def _prepare(self) -> None:
        self.ldaps_port = free_port() if "certificate" in self.options else 0
        (self.directory / "db").mkdir()
        tls = ""
        if "certificate" in self.options:
            file = self.options["certificate"]
            tls = f"TLSCertificateFile {file}\nTLSCertificateKeyFile {file}\n"
        (self.directory / "slapd.conf").write_text(
            _SLAPD.format(
                directory=self.directory,
                base=self.base,
                admin=self.admin,
                password=self.admin_password,
                tls=tls,
                settings="".join(f"{line}\n" for line in self.options.get("settings", [])),
            )
        )
        entries: list[list[tuple[str, str | bytes]]] = [
            [("dn", self.base), ("objectClass", "dcObject"), ("objectClass", "organization"), ("o", "Example")],
            [("dn", self.people), ("objectClass", "organizationalUnit")],
        ]
        attributes: Mapping[str, Mapping[str, list[str]]] = self.options.get("attributes", {})
        for user, password in self.options.get("users", {}).items():
            entry: list[tuple[str, str | bytes]] = [
                ("dn", self.dn(user)),
                ("objectClass", "inetOrgPerson"),
                ("objectClass", "mailAliases"),
            ]
            entry += [("cn", user), ("sn", user), ("uid", user), ("mail", f"{user}@{DOMAIN}")]
            entry += [(name, value) for name, values in attributes.get(user, {}).items() for value in values]
            entries.append([*entry, ("userPassword", password)])
        (self.directory / "init.ldif").write_text("\n".join(map(_ldif, entries)))
        self._run("slapadd", "-f", str(self.directory / "slapd.conf"), "-l", str(self.directory / "init.ldif"))

    def _command(self) -> list[str]:
        urls = f"ldap://127.0.0.1:{self.port}"
        if self.ldaps_port:
            urls += f" ldaps://127.0.0.1:{self.ldaps_port}"
        # -d 0: it stays in the session it is started in.
        return [str(self.program), "-d", "0", "-f", str(self.directory / "slapd.conf"), "-h", urls]

    def set_password(self, user: str, password: str | bytes) -> None:
        """From now on this is the user's password."""
        change = [
            ("dn", self.dn(user)),
            ("changetype", "modify"),
            ("replace", "userPassword"),
            ("userPassword", password),
        ]
        (self.directory / "change.ldif").write_text(_ldif(change))
        url = f"ldap://127.0.0.1:{self.port}"
        self._run(
            "ldapmodify", "-x", "-H", url, "-D", self.admin, "-w", self.admin_password,
            "-f", str(self.directory / "change.ldif"),
        )  # fmt: skip

    def _run(self, name: str, *arguments: str) -> None:
        command = [str(_program(name)), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        assert done.returncode == 0, done.stderr


def _ldif(lines: list[tuple[str, str | bytes]]) -> str:
    """One record; values in base64 where it matters not that a person can read them.  RFC 2849."""
    record = []
    for name, value in lines:
        octets = value if isinstance(value, bytes) else value.encode()
        plain = name in ("changetype", "replace")
        record.append(f"{name}: {value!s}" if plain else f"{name}:: {base64.b64encode(octets).decode()}")
    return "\n".join(record) + "\n"


# proxyAddresses is Active Directory's, by its own number; the class that allows it here is of no consequence.
_SLAPD = """include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
attributetype ( 1.2.840.113556.1.2.210 NAME 'proxyAddresses'
  EQUALITY caseIgnoreMatch SYNTAX 1.3.6.1.4.1.1466.115.121.1.15 )
objectclass ( 1.3.6.1.4.1.4203.666.11.1.1 NAME 'mailAliases' SUP top AUXILIARY MAY proxyAddresses )
pidfile {directory}/pid
modulepath /usr/lib/ldap
moduleload back_mdb
{tls}{settings}database mdb
suffix "{base}"
rootdn "{admin}"
rootpw {password}
directory {directory}/db
maxsize 16777216
index objectClass,mail,uid eq
"""
