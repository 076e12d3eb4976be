"""What a configuration expects of the host it runs on: files, a user.

Why: a missing certificate or user is found when the gate starts; better found when the file is checked.
Trust: an administrator's file; what it names is looked at, never changed.
Promise: warnings, not problems: a file may be checked on another host than the one it is for.
Sources: none.
"""

from __future__ import annotations

import contextlib
import pwd
import ssl
from pathlib import Path

from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket
from gatepost.config import Config
from gatepost.gate.settings import CertificateFiles


def look(config: Config) -> list[str]:
    """What is missing on this host, each "file:line: ..."."""
    return [*_user(config), *_certificate(config), *_backends(config)]


def _user(config: Config) -> list[str]:
    if config.user:
        try:
            pwd.getpwnam(config.user)
        except KeyError:
            at = config.sources.at(("gate", "user"))
            return [f'{at}: [gate] user = "{config.user}": this host has no such user; make it before the gate starts']
    return []


def _certificate(config: Config) -> list[str]:
    tls = config.gate.tls
    if not tls.certificates:
        if any(listen.tls != "none" for listen in config.gate.listens):
            at = config.sources.at(("tls",)) if ("tls",) in config.sources else config.config_path
            return [f"{at}: no [tls] certificate: the gate makes a self-signed one, which strict clients refuse"]
        return []
    return [found for number, files in enumerate(tls.certificates) for found in _pair(config, number, files)]


def _pair(config: Config, number: int, files: CertificateFiles) -> list[str]:
    at = config.sources.at(("tls", "certificate", number))
    for path in dict.fromkeys(files):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            return [f"{at}: [tls] {path}: {error.strerror} on this host"]
    with contextlib.suppress(OSError):  # ssl.SSLError is one, and says less than we do
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password="")
        return []
    names = f"{files.certificate} and {files.key}"
    return [f"{at}: [tls] {names}: these are no certificate in PEM and its key, without password"]


def _backends(config: Config) -> list[str]:
    missing = []
    for backend in config.gate.backends:
        for number, address in enumerate(backend.addresses):
            if isinstance(address, LmtpSocket) and not Path(address.path).is_socket():
                at = config.sources.at(("backend", backend.name, "address", number))
                missing.append(f"{at}: [backend.{backend.name}] address: this host has no socket {address.path} now")
            if isinstance(address, EmbeddedMailboxes) and Path(address.directory).is_file():
                at = config.sources.at(("backend", backend.name, "address", number))
                missing.append(f"{at}: [backend.{backend.name}] address: {address.directory} is a file, no directory")
    return missing
