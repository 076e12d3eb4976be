"""TLS for listeners: what is configured is what is spoken; a self-signed pair is private and made once."""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from gatepost.errors import ConfigError, StorageError
from gatepost.gate import tls
from gatepost.gate.settings import CertificateFiles, TlsSettings
from gatepost.gate.tls import PEM_OCTETS_MAX, Certificate, Tls, self_signed, write_once

NAME = "mx.example.com"
NOW = datetime.now(UTC)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def pair(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    """A certificate with its chain, and its key, as two files."""
    directory = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert(NAME)
    certificate, key = directory / "tls.pem", directory / "tls.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return CertificateFiles(str(certificate), str(key))


def one_file(path: Path, authority: trustme.CA, *names: str, **more: Any) -> CertificateFiles:
    path.write_bytes(authority.issue_cert(*names, **more).private_key_and_cert_chain_pem.bytes())
    return CertificateFiles(str(path), str(path))


def tls_of(*files: CertificateFiles, data: object = "/nonexistent") -> Tls:
    return Tls(TlsSettings(files), NAME, str(data))


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


def unverifying(ciphers: str = "DEFAULT") -> ssl.SSLContext:
    """A client that takes any certificate, as mail servers do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(ciphers)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_the_configured_certificate_is_shown(authority: trustme.CA, pair: CertificateFiles, tmp_path: Path) -> None:
    context = tls_of(pair, data=tmp_path).context("1.2")
    assert handshake(context, client_context(authority)) == "TLSv1.3"
    assert list(tmp_path.iterdir()) == [], "no self-signed pair where there is a certificate"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, client_context(authority), "elsewhere.test")


def test_key_and_certificate_may_stand_in_one_file_in_either_order(authority: trustme.CA, tmp_path: Path) -> None:
    issued = authority.issue_cert(NAME)
    key, chain = issued.private_key_pem.bytes(), b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    both = tmp_path / "both.pem"
    for octets in (key + chain, chain + key, b"a comment\r\n" + chain.replace(b"\n", b"\r\n") + b"\n" + key):
        both.write_bytes(octets)
        tls = tls_of(CertificateFiles(str(both), str(both)))
        assert handshake(tls.context("1.2"), client_context(authority)) == "TLSv1.3"
        assert tls.asking("1.2").certificate.names == (NAME,)


def test_the_oldest_version_is_the_one_asked_for(authority: trustme.CA, pair: CertificateFiles) -> None:
    tls = tls_of(pair)
    old_client = client_context(authority)
    old_client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(tls.context("1.2"), old_client) == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        handshake(tls.context("1.3"), old_client)
    assert handshake(tls.context("1.3"), client_context(authority)) == "TLSv1.3"


def test_a_context_is_made_once_for_each_oldest_version(pair: CertificateFiles) -> None:
    tls = tls_of(pair)
    for make in (tls.context, tls.asking):
        contexts = [make(minimum) for minimum in ("1.0", "1.1", "1.2", "1.3")]
        assert len({id(context) for context in contexts}) == 4
        assert make("1.2") is contexts[2]


def test_no_renegotiation_no_compression_no_ticket_and_no_client_certificate(pair: CertificateFiles) -> None:
    """Renegotiation is a way to make the server work; and a certificate nobody looks at must not seem to count."""
    context = tls_of(pair).context("1.2")
    for option in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_COMPRESSION, ssl.OP_NO_TICKET, ssl.OP_CIPHER_SERVER_PREFERENCE):
        assert context.options & option
    assert context.num_tickets == 0
    assert context.verify_mode is ssl.CERT_NONE


def test_suites_are_forward_secret_and_authenticated_ones_come_first(pair: CertificateFiles) -> None:
    suites = [suite for suite in tls_of(pair).context("1.2").get_ciphers() if suite["protocol"] != "TLSv1.3"]
    assert all(suite["kea"] == "kx-ecdhe" for suite in suites)
    assert all(suite["auth"] in ("auth-rsa", "auth-ecdsa") for suite in suites)
    aead = [suite["aead"] for suite in suites]
    assert aead == sorted(aead, reverse=True)
    assert any(aead)
    assert min(suite["strength_bits"] for suite in suites) >= 128


def test_old_devices_get_old_suites_last_and_never_rc4(pair: CertificateFiles) -> None:
    good = [suite["name"] for suite in tls_of(pair).context("1.2").get_ciphers()]
    old = [suite["name"] for suite in tls_of(pair).context("1.0").get_ciphers()]
    assert old[: len(good)] == good
    assert "AES128-SHA" in old
    assert not [name for name in old if "RC4" in name or "NULL" in name or name.startswith(("ADH", "AECDH", "EXP"))]


# ---- several certificates


@pytest.fixture(scope="module")
def several(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Tls:
    directory = tmp_path_factory.mktemp("several")
    return tls_of(
        one_file(directory / "0.pem", authority, NAME),
        one_file(directory / "1.pem", authority, "*.example.com", "Mail.Example.ORG"),
        one_file(
            directory / "2.pem", authority, "xn--mnchen-3ya.example", "*.xn--mnchen-3ya.example", "mail.example.org"
        ),
    )


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ("", 0),
        (NAME, 0),
        ("MX.Example.Com", 0),
        ("other.example.com", 1),
        ("OTHER.EXAMPLE.COM", 1),
        ("mail.example.org", 1),  # the first that has it
        ("example.com", 0),  # a wildcard is a label, and not none
        ("a.b.example.com", 0),  # nor two
        ("xn--mnchen-3ya.example", 2),
        ("post.xn--mnchen-3ya.example", 2),
        ("münchen.example", 0),  # SNI has A-labels only
        ("unknown.test", 0),
        (".example.com", 1),
        (".", 0),
        ("com", 0),
        ("*", 0),
        ("\ufffd" * 255, 0),
    ],
)
def test_a_name_chooses_the_first_certificate_that_has_it(several: Tls, asked: str, index: int) -> None:
    assert several.chosen(asked) == index


@pytest.mark.parametrize("name", [NAME, "other.example.com", "mail.example.org", "post.xn--mnchen-3ya.example"])
@pytest.mark.parametrize("minimum", ["1.0", "1.2", "1.3"])
def test_clients_that_check_names_are_content(authority: trustme.CA, several: Tls, minimum: str, name: str) -> None:
    assert handshake(several.context(minimum), client_context(authority), name) == "TLSv1.3"


def test_a_certificate_without_names_is_served_to_those_who_ask_for_none_of_the_others(
    authority: trustme.CA, pair: CertificateFiles, tmp_path: Path
) -> None:
    nameless = written(tmp_path / "nameless.pem", certificate_of(ec.generate_private_key(ec.SECP256R1())))
    tls = tls_of(nameless, pair)
    assert handshake(tls.context("1.2"), client_context(authority)) == "TLSv1.3"
    assert tls.chosen("unknown.test") == 0


# ---- the binding of a certificate


def certificate_of(key: Any, hash_: Any = None, *, days: tuple[int, int] = (-1, 30)) -> tuple[x509.Certificate, Any]:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hash_ or hashes.SHA256()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(4711)
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .sign(key, algorithm)
    )
    return certificate, key


def written(path: Path, made: tuple[x509.Certificate, Any], password: bytes = b"") -> CertificateFiles:
    certificate, key = made
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return CertificateFiles(str(path), str(path))


@pytest.mark.parametrize(
    ("hash_", "expected"), [(hashes.SHA256(), "sha256"), (hashes.SHA384(), "sha384"), (hashes.SHA512(), "sha512")]
)
def test_the_end_point_binding_has_the_hash_of_the_signature(tmp_path: Path, hash_: Any, expected: str) -> None:
    """RFC 5929 §4.1."""
    made = certificate_of(ec.generate_private_key(ec.SECP256R1()), hash_)
    certificate = Certificate.read(written(tmp_path / "x.pem", made))
    assert certificate.end_point == hashlib.new(expected, made[0].public_bytes(serialization.Encoding.DER)).digest()


def test_a_signature_without_hash_gives_no_end_point_binding(tmp_path: Path) -> None:
    files = written(tmp_path / "x.pem", certificate_of(ed25519.Ed25519PrivateKey.generate()))
    assert Certificate.read(files).end_point == b""
    assert handshake(tls_of(files).context("1.2"), unverifying()) == "TLSv1.3"


def test_a_weak_hash_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RFC 5929 §4.1; no library of today signs with MD5 or SHA-1, so one is pretended."""
    certificate, _ = certificate_of(ec.generate_private_key(ec.SECP256R1()))

    class Weak:
        signature_hash_algorithm = hashes.SHA1()  # noqa: S303 - this is what must not be used
        fingerprint = certificate.fingerprint

    assert tls._end_point(cast("x509.Certificate", Weak())) == certificate.fingerprint(hashes.SHA256())


# ---- files that cannot be used


def refusal(certificate: object, key: object) -> str:
    """The one line that says what is wrong; both files are in it."""
    with pytest.raises(ConfigError) as caught:
        tls_of(CertificateFiles(str(certificate), str(key))).context("1.2")
    (problem,) = caught.value.problems
    assert str(certificate) in problem
    assert str(key) in problem
    return problem


def test_files_that_are_no_pair_are_named(authority: trustme.CA, pair: CertificateFiles, tmp_path: Path) -> None:
    other_key = tmp_path / "other.key"
    other_key.write_bytes(authority.issue_cert(NAME).private_key_pem.bytes())
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    assert "do not belong together" in refusal(pair.certificate, other_key)
    assert "whole private key" in refusal(pair.certificate, pair.certificate)
    assert "No such file" in refusal(pair.certificate, tmp_path / "gone.key")
    assert "No such file" in refusal(tmp_path / "gone.pem", pair.key)
    assert "whole certificate" in refusal(rubbish, pair.key)
    assert "whole certificate" in refusal(empty, pair.key)
    assert "Is a directory" in refusal(tmp_path, pair.key)


def test_a_chain_in_the_wrong_order_is_said(authority: trustme.CA, tmp_path: Path) -> None:
    issued = authority.issue_cert(NAME)
    path, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    path.write_bytes(authority.cert_pem.bytes() + issued.cert_chain_pems[0].bytes())
    key.write_bytes(issued.private_key_pem.bytes())
    assert "must stand first" in refusal(path, key)


def test_a_half_written_file_is_never_used(authority: trustme.CA, tmp_path: Path) -> None:
    child = authority.create_child_ca()
    issued = child.issue_cert(NAME)
    whole = issued.private_key_and_cert_chain_pem.bytes()
    assert whole.count(b"BEGIN CERTIFICATE") == 2
    path = tmp_path / "half.pem"
    for cut in range(0, len(whole.rstrip()), 17):
        path.write_bytes(whole[:cut])
        octets = path.read_bytes()
        if octets.count(b"-----END CERTIFICATE-----") == 1 and octets.rstrip().endswith(b"-----END CERTIFICATE-----"):
            continue  # a whole certificate without those that vouch for it: that may be meant
        assert refusal(path, path)
    path.write_bytes(whole)
    assert handshake(tls_of(CertificateFiles(str(path), str(path))).context("1.2"), client_context(authority))


def test_an_encrypted_key_is_said_and_nobody_is_asked(tmp_path: Path) -> None:
    files = written(tmp_path / "x.pem", certificate_of(ec.generate_private_key(ec.SECP256R1())), b"secret")
    problem = refusal(*files)
    assert "encrypted; store it without a password" in problem


def test_a_key_that_no_mail_client_speaks_is_said(tmp_path: Path) -> None:
    files = written(tmp_path / "x.pem", certificate_of(dsa.generate_private_key(2048)))
    assert "must be RSA or of an elliptic curve" in refusal(*files)


def test_a_key_too_small_for_today_is_said(tmp_path: Path) -> None:
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505 - so the gate says
    files = written(tmp_path / "x.pem", certificate_of(small))
    assert "key too small" in refusal(*files).replace("_", " ").lower()
    with pytest.raises(ConfigError, match="key too small"):
        tls_of(files).asking("1.2")
    assert handshake(tls_of(files).context("1.0"), unverifying("DEFAULT:@SECLEVEL=0")) == "TLSv1.3", (
        "an old device may need it"
    )


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_file_that_is_too_large_for_a_certificate(pair: CertificateFiles, tmp_path: Path, more: int) -> None:
    octets = Path(pair.certificate).read_bytes()
    large = tmp_path / "large.pem"
    large.write_bytes(octets + b"\n" * (PEM_OCTETS_MAX - len(octets) + more))
    if more > 0:
        assert "more than 1,048,576 octets" in refusal(large, pair.key)
    else:
        assert handshake(tls_of(CertificateFiles(str(large), pair.key)).context("1.2"), unverifying()) == "TLSv1.3"


# ---- files that change


def test_a_changed_file_serves_when_it_is_read_again_and_not_before(authority: trustme.CA, tmp_path: Path) -> None:
    files = one_file(tmp_path / "x.pem", authority, NAME)
    before = tls_of(files)
    serving = before.context("1.2")
    one_file(tmp_path / "x.pem", authority, "renamed.example.com")
    assert handshake(serving, client_context(authority)) == "TLSv1.3", "what is served is what was read"
    assert handshake(tls_of(files).context("1.2"), client_context(authority), "renamed.example.com") == "TLSv1.3"
    with pytest.raises(ConfigError, match="being written just now"):
        before.context("1.3")
    assert before.asking("1.3").certificate.names == (NAME,), "made of what was read"


def test_a_broken_file_leaves_the_old_contexts_alone(authority: trustme.CA, tmp_path: Path) -> None:
    files = one_file(tmp_path / "x.pem", authority, NAME)
    serving = tls_of(files).context("1.2")
    Path(files.certificate).write_text("-----BEGIN CERTIFICATE-----\nhalf")
    with pytest.raises(ConfigError):
        tls_of(files)
    assert handshake(serving, client_context(authority)) == "TLSv1.3"


@pytest.mark.parametrize(
    ("days", "words"),
    [
        ((-60, -1), ["expired at", "renew it"]),
        ((-60, 13), ["expires at", "renew it"]),
        ((-60, 15), []),
        ((1, 30), ["is not valid before", "is the clock right?"]),
    ],
)
def test_dates_are_told_and_a_certificate_is_served_all_the_same(
    tmp_path: Path, days: tuple[int, int], words: list[str]
) -> None:
    files = written(tmp_path / "x.pem", certificate_of(ec.generate_private_key(ec.SECP256R1()), days=days))
    tls = tls_of(files)
    told = tls.warnings(NOW)
    assert len(told) == bool(words)
    assert all(word in told[0] and files.certificate in told[0] for word in words)
    assert handshake(tls.context("1.2"), unverifying()) == "TLSv1.3"


# ---- the self-signed pair


def test_a_self_signed_pair_is_made_once_and_is_private(tmp_path: Path) -> None:
    data = tmp_path / "data"
    context = Tls(TlsSettings(), NAME, str(data)).context("1.2")
    path = data / "tls-self-signed-mx.example.com.pem"
    octets = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in data.iterdir()] == [path.name]
    assert handshake(context, client_context(cafile=path)) == "TLSv1.3"
    Tls(TlsSettings(), NAME, str(data)).context("1.2")
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
    Tls(TlsSettings(), name, str(tmp_path)).context("1.2")


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
