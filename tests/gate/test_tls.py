"""TLS for listeners: what is configured is what is spoken; a self-signed pair is private and made once."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from gatepost.errors import ConfigError, StorageError
from gatepost.gate import tls
from gatepost.gate.settings import TlsSettings
from gatepost.gate.tls import self_signed, server_context, write_once

NAME = "mx.example.com"


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def pair(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """A certificate with its chain, and its key, as two files."""
    directory = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert(NAME)
    certificate, key = directory / "tls.pem", directory / "tls.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return TlsSettings(str(certificate), str(key))


def handshake(server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str = NAME) -> str:
    """The version two ends agree on, without a network."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname=name)
    done = {client: False, server: False}
    for _ in range(20):
        for end in (client, server):
            try:
                end.do_handshake()
                done[end] = True
            except ssl.SSLWantReadError:
                continue
        if all(done.values()):
            version = server.version()
            assert version is not None
            return version
    raise AssertionError("the handshake does not end")


def client_context(authority: trustme.CA | None = None, cafile: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cafile)
    if authority is not None:
        authority.configure_trust(context)
    return context


def test_the_configured_certificate_is_shown(authority: trustme.CA, pair: TlsSettings, tmp_path: Path) -> None:
    context = server_context(pair, NAME, str(tmp_path))
    assert handshake(context, client_context(authority)) == "TLSv1.3"
    assert list(tmp_path.iterdir()) == [], "no self-signed pair where there is a certificate"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, client_context(authority), "elsewhere.test")


def test_key_and_certificate_may_stand_in_one_file(authority: trustme.CA, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(authority.issue_cert(NAME).private_key_and_cert_chain_pem.bytes())
    for key in ("", str(both)):
        context = server_context(TlsSettings(str(both), key), NAME, str(tmp_path))
        assert handshake(context, client_context(authority)) == "TLSv1.3"


def test_the_oldest_version_is_the_configured_one(authority: trustme.CA, pair: TlsSettings, tmp_path: Path) -> None:
    old_client = client_context(authority)
    old_client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(server_context(pair, NAME, str(tmp_path)), old_client) == "TLSv1.2"
    strict = TlsSettings(pair.certificate, pair.key, "1.3")
    with pytest.raises(ssl.SSLError):
        handshake(server_context(strict, NAME, str(tmp_path)), old_client)
    assert handshake(server_context(strict, NAME, str(tmp_path)), client_context(authority)) == "TLSv1.3"


def test_no_renegotiation_and_no_client_certificate(pair: TlsSettings, tmp_path: Path) -> None:
    """Renegotiation is a way to make the server work; and a certificate nobody looks at must not seem to count."""
    context = server_context(pair, NAME, str(tmp_path))
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.verify_mode is ssl.CERT_NONE


# ---- files that cannot be used


def test_files_that_are_no_pair_are_named(authority: trustme.CA, pair: TlsSettings, tmp_path: Path) -> None:
    other_key = tmp_path / "other.key"
    other_key.write_bytes(authority.issue_cert(NAME).private_key_pem.bytes())
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for certificate, key in (
        (pair.certificate, str(other_key)),
        (pair.certificate, pair.certificate),
        (pair.certificate, str(tmp_path / "gone.key")),
        (str(tmp_path / "gone.pem"), pair.key),
        (str(rubbish), pair.key),
        (str(empty), pair.key),
        (str(tmp_path), pair.key),
    ):
        with pytest.raises(ConfigError) as caught:
            server_context(TlsSettings(certificate, key), NAME, str(tmp_path))
        assert certificate in str(caught.value)
        assert key in str(caught.value)
        assert len(caught.value.problems) == 1


# ---- the self-signed pair


def test_a_self_signed_pair_is_made_once_and_is_private(tmp_path: Path) -> None:
    data = tmp_path / "data"
    context = server_context(TlsSettings(), NAME, str(data))
    path = data / "tls-self-signed-mx.example.com.pem"
    octets = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in data.iterdir()] == [path.name]
    assert handshake(context, client_context(cafile=path)) == "TLSv1.3"
    server_context(TlsSettings(), NAME, str(data))
    assert path.read_bytes() == octets


def test_the_self_signed_certificate_says_who_it_is(tmp_path: Path) -> None:
    octets = self_signed(NAME, tmp_path).read_bytes()
    certificate = x509.load_pem_x509_certificate(octets)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == NAME
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now < now + timedelta(days=365) < certificate.not_valid_after_utc
    key = serialization.load_pem_private_key(octets, None)
    assert key.public_key() == certificate.public_key()


@pytest.mark.parametrize("name", ["localhost", "a" * 63 + "." + "b" * 63 + ".example.com", "xn--mnchen-3ya.example"])
def test_any_host_name_will_do(name: str, tmp_path: Path) -> None:
    server_context(TlsSettings(), name, str(tmp_path))


def test_a_pair_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the self-signed certificate"):
        self_signed(NAME, tmp_path / "file")


# ---- write_once


def test_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    write_once(path, b"first")
    write_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_is_private_from_its_first_octet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    link = os.link

    def looking(source: Path, target: Path) -> None:
        modes.append(source.stat().st_mode & 0o777)
        link(source, target)

    monkeypatch.setattr(os, "link", looking)
    write_once(tmp_path / "secret", b"x")
    assert modes == [0o600]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_disk_that_fails_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_once(tmp_path / "secret", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_a_dead_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".secret.{os.getpid()}").write_text("half a secr")
    write_once(tmp_path / "secret", b"whole")
    assert (tmp_path / "secret").read_bytes() == b"whole"


def test_versions_are_those_that_can_be_configured() -> None:
    assert set(tls._MINIMUM) == {"1.0", "1.1", "1.2", "1.3"}
