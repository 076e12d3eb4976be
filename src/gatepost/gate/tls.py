"""TLS at the gate: contexts by certificate and oldest version, what a handshake gave, a self-signed pair.

Why: STARTTLS with a certificate nobody vouches for still hides mail from those who only listen, and needs no set-up.
    Mail is encrypted opportunistically: who is refused a handshake sends in plain text, so that everything offered is
    good and forward secret, and no more is refused than must be (docs/tls.md has the choice and its reasons).
Trust: certificate and key files are the administrator's, but may be half written.  The name that a client asks for
    (SNI) is hostile: it chooses among our certificates and nothing else; one that nobody has gets the first.
Promise: contexts that belong together have one oldest version, whatever name is asked for; certificates are read
    once, and are used as they were read or not at all; no ticket is given, so that no key of ours could open what was
    recorded; the private key that is made is readable by its owner alone and complete or absent.
Sources: RFC 3207 (STARTTLS), RFC 8314 (implicit TLS), RFC 8996 (TLS 1.0 and 1.1 are out of use), RFC 6066 §3 (SNI),
    RFC 6125 §6.4.3 (wildcards), RFC 9325 (recommendations), RFC 5929 and RFC 9266 (channel bindings).
"""

from __future__ import annotations

import datetime
import os
import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from gatepost.errors import ConfigError, StorageError
from gatepost.gate.settings import CertificateFiles, TlsSettings

PEM_OCTETS_MAX = 1 << 20
_EXPIRES_SOON = datetime.timedelta(days=14)

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey

_MINIMUM = {
    "1.0": (ssl.TLSVersion.TLSv1, SSL.TLS1_VERSION),
    "1.1": (ssl.TLSVersion.TLSv1_1, SSL.TLS1_1_VERSION),
    "1.2": (ssl.TLSVersion.TLSv1_2, SSL.TLS1_2_VERSION),
    "1.3": (ssl.TLSVersion.TLSv1_3, SSL.TLS1_3_VERSION),
}

# Suites of TLS 1.2 and older, best first; those of TLS 1.3 are the library's.  RFC 9325 §4.2.
_FORWARD_SECRET = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!aNULL:!eNULL:!PSK:!AESCCM"  # noqa: S105 - no password
_CIPHERS = f"{_FORWARD_SECRET}:@SECLEVEL=2"
# For old devices, behind the good ones: OpenSSL 3 speaks TLS 1.0 and 1.1 at no other level.  Never RC4 (RFC 7465).
_CIPHERS_OF_OLD = f"{_FORWARD_SECRET}:RSA+AESGCM:RSA+AES:RSA+3DES:@SECLEVEL=0"

_OPTIONS = ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
# RFC 5929 §4.1: SHA-256 takes the place of these.
_WEAK_HASHES = {"md5", "sha1"}


@dataclass(frozen=True)
class Secured:
    """What a handshake gave.

    Attributes:
        version: such as "TLSv1.3"; cipher: the name of its suite, as OpenSSL has it.
        certificate: SHA-256 of the client's certificate in DER, hexadecimal, "" for none.  The client proved that it
            has the key; nobody vouches for anything else in it.
    """

    version: str
    cipher: str
    certificate: str
    _read_bindings: Callable[[], Mapping[str, bytes]] = field(repr=False, compare=False)

    @cached_property
    def bindings(self) -> Mapping[str, bytes]:
        """Channel bindings for SCRAM by their IANA names; looked at once, while the connection is there."""
        return self._read_bindings()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Certificate:
    """One certificate of ours, as its files were when they were read.

    Attributes:
        names: of its subjectAltName, in lower case, A-labels, perhaps with a wildcard as first label.
        end_point: the channel binding tls-server-end-point, b"" where RFC 5929 §4.1 defines none.
    """

    files: CertificateFiles
    digest: bytes
    chain: tuple[x509.Certificate, ...]
    key: PrivateKey
    names: tuple[str, ...]
    end_point: bytes

    def refused(self, reason: object) -> ConfigError:
        """The error that names both files."""
        return _refused(self.files, reason)

    @classmethod
    def read(cls, files: CertificateFiles) -> Certificate:
        """Read and compare both files.

        Raises:
            ConfigError: they cannot be used.
        """
        octets, key_octets = _read(files, files.certificate), _read(files, files.key)
        try:
            chain = tuple(x509.load_pem_x509_certificates(octets))
            names = tuple(_names(chain[0]))
            public_keys = [certificate.public_key() for certificate in chain]
        except (ValueError, UnsupportedAlgorithm) as error:
            raise _refused(files, f"{files.certificate} must have a whole certificate in PEM ({error})") from error
        try:
            key = serialization.load_pem_private_key(key_octets, None)
        except TypeError as error:
            raise _refused(
                files, "the key is encrypted; store it without a password, readable by the gate's user alone"
            ) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise _refused(files, f"{files.key} must have a whole private key in PEM") from error
        if key.public_key() != public_keys[0]:
            if key.public_key() in public_keys:
                raise _refused(files, "the host's own certificate must stand first, before those that vouch for it")
            raise _refused(files, "they do not belong together; name the key that the certificate was made for")
        if not isinstance(key, PrivateKey):
            raise _refused(files, "the key must be RSA or of an elliptic curve; mail clients speak nothing else")
        return cls(files, _digest(octets, key_octets), chain, key, names, _end_point(chain[0]))

    def unchanged(self) -> bool:
        """Whether the files still are what was read; OpenSSL's contexts of Python read them by themselves."""
        return self.digest == _digest(_read(self.files, self.files.certificate), _read(self.files, self.files.key))


class TlsContext(ssl.SSLContext):
    """For handshakes that ask for no certificate."""

    certificate: Certificate


class AskingContext(SSL.Context):
    """For handshakes that ask the client for a certificate, and take any that it has the key of, or none."""

    certificate: Certificate


class Tls:
    """All contexts of this host's listeners, under one [tls] table.

    Args:
        name: the host name that a self-signed certificate is made for.
        data: where a self-signed pair is kept (``tls-self-signed-NAME.pem``), made at first use.

    Raises:
        ConfigError: a certificate or key cannot be used.
        StorageError: a self-signed pair cannot be written.
    """

    def __init__(self, settings: TlsSettings, name: str, data: str) -> None:
        files = settings.certificates
        if not files:
            path = str(self_signed(name, Path(data)))
            files = (CertificateFiles(path, path),)
        self._certificates = [Certificate.read(pair) for pair in files]
        self._by_name: dict[str, int] = {}
        for index, certificate in enumerate(self._certificates):
            for known in certificate.names:
                self._by_name.setdefault(known, index)
        self._contexts: dict[str, TlsContext] = {}
        self._asking: dict[str, AskingContext] = {}

    def context(self, minimum: str) -> TlsContext:
        """The context that speaks nothing older; made at first use, so ask for all that are needed before serving.

        Args:
            minimum: "1.0" to "1.3".

        Raises:
            ConfigError: OpenSSL does not take a certificate, or its file has changed since it was read.
        """
        if minimum not in self._contexts:
            contexts = [_context(certificate, minimum) for certificate in self._certificates]

            def choose(connection: ssl.SSLObject, asked: str | None, _: ssl.SSLContext) -> None:
                connection.context = contexts[self.chosen(asked or "")]

            if len(contexts) > 1:
                contexts[0].sni_callback = choose
            self._contexts[minimum] = contexts[0]
        return self._contexts[minimum]

    def asking(self, minimum: str) -> AskingContext:
        """As ``context``, for listeners whose rules name certificates of clients."""
        if minimum not in self._asking:
            contexts = [_asking_context(certificate, minimum) for certificate in self._certificates]

            def choose(connection: SSL.Connection) -> None:
                asked = connection.get_servername() or b""
                connection.set_context(contexts[self.chosen(asked.decode("ascii", "replace"))])

            if len(contexts) > 1:
                contexts[0].set_tlsext_servername_callback(choose)
            self._asking[minimum] = contexts[0]
        return self._asking[minimum]

    def chosen(self, asked: str) -> int:
        """Which certificate serves this name: the first that has it, then the first whose wildcard covers it.

        A wildcard stands for one label, the leftmost (RFC 6125 §6.4.3).  Nobody's name gets the first certificate:
        a mail client that asks for a wrong one would rather have that than no encryption.
        """
        asked = asked.lower()
        found = self._by_name.get(asked)
        if found is None:
            found = self._by_name.get("*." + asked.partition(".")[2], 0)
        return found

    def warnings(self, now: datetime.datetime) -> list[str]:
        """What an operator should know about the certificates' dates; an expired one is better than plain text."""
        said: list[str] = []
        for certificate in self._certificates:
            own, path = certificate.chain[0], certificate.files.certificate
            until = f"{own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            if now > own.not_valid_after_utc:
                said.append(f"[tls] certificate {path!r} expired at {until}; renew it")
            elif now > own.not_valid_after_utc - _EXPIRES_SOON:
                said.append(f"[tls] certificate {path!r} expires at {until}; renew it")
            elif now < own.not_valid_before_utc:
                since = f"{own.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
                said.append(f"[tls] certificate {path!r} is not valid before {since}; is the clock right?")
        return said


def end_point_binding(certificate: Certificate) -> dict[str, bytes]:
    """The channel binding that the certificate alone gives."""
    return {"tls-server-end-point": certificate.end_point} if certificate.end_point else {}


def secured(ssl_object: ssl.SSLObject) -> Secured:
    """What the handshake of a ``TlsContext`` gave."""
    version = ssl_object.version() or ""
    cipher = ssl_object.cipher()

    def read_bindings() -> Mapping[str, bytes]:
        context = ssl_object.context
        bindings = end_point_binding(context.certificate) if isinstance(context, TlsContext) else {}
        # RFC 9266 §3: not defined for TLS 1.3.  RFC 7627 §1: a resumed session may be somebody else's.
        if version != "TLSv1.3" and not ssl_object.session_reused:
            unique = ssl_object.get_channel_binding("tls-unique")
            if unique:
                bindings["tls-unique"] = unique
        return bindings

    return Secured(version, cipher[0] if cipher else "", "", read_bindings)


def _ciphers(minimum: str) -> str:
    return _CIPHERS if minimum >= "1.2" else _CIPHERS_OF_OLD


def _context(certificate: Certificate, minimum: str) -> TlsContext:
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.certificate = certificate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that 1.0 and 1.1 are old is why they have to be named
        context.minimum_version = _MINIMUM[minimum][0]
    context.set_ciphers(_ciphers(minimum))
    context.options |= _OPTIONS
    context.num_tickets = 0
    try:
        context.load_cert_chain(*certificate.files, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise certificate.refused(error) from error
    if not certificate.unchanged():
        raise certificate.refused("the files are being written just now; they are read again when they are complete")
    return context


def _asking_context(certificate: Certificate, minimum: str) -> AskingContext:
    context = AskingContext(SSL.TLS_SERVER_METHOD)
    context.certificate = certificate
    context.set_min_proto_version(_MINIMUM[minimum][1])
    context.set_options(_OPTIONS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(b"gatepost")  # OpenSSL wants one where certificates are asked for, even if nothing resumes
    # No chain is judged, so none is built; that the client has the key is not for the callback to forgive.
    context.set_verify_depth(0)
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    try:
        context.set_cipher_list(_ciphers(minimum).encode())
        context.use_certificate(certificate.chain[0])
        for link in certificate.chain[1:]:
            context.add_extra_chain_cert(link)
        context.use_privatekey(certificate.key)
        context.check_privatekey()
    except SSL.Error as error:
        raise certificate.refused(words(error)) from error
    return context


def words(error: SSL.Error) -> str:
    """What OpenSSL says of it."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return "; ".join(reason for *_, reason in queue) or type(error).__name__


def _read(files: CertificateFiles, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            octets = file.read(PEM_OCTETS_MAX + 1)
    except OSError as error:
        raise _refused(files, error) from error
    if len(octets) > PEM_OCTETS_MAX:
        raise _refused(files, f"{path} has more than {PEM_OCTETS_MAX:,} octets; that is no certificate")
    last_line = octets.rpartition(b"\n")[2]
    if octets.count(b"-----BEGIN ") != octets.count(b"-----END ") or (
        last_line and b"-----BEGIN ".startswith(last_line)
    ):
        raise _refused(files, f"{path} is half written")
    return octets


def _refused(files: CertificateFiles, reason: object) -> ConfigError:
    return ConfigError([f"[tls] certificate = {files.certificate!r}, key = {files.key!r}: {reason}"])


def _digest(*files: bytes) -> bytes:
    return sha256(b"".join(sha256(octets).digest() for octets in files)).digest()


def _names(certificate: x509.Certificate) -> Iterator[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for name in found.get_values_for_type(x509.DNSName):
        yield name.lower()


def _end_point(certificate: x509.Certificate) -> bytes:
    algorithm = certificate.signature_hash_algorithm
    if algorithm is None:  # Ed25519 and its like: no hash function, no binding
        return b""
    return certificate.fingerprint(hashes.SHA256() if algorithm.name in _WEAK_HASHES else algorithm)


def _no_password() -> str:
    """OpenSSL would ask on the terminal, which nobody watches."""
    raise ssl.SSLError("the key is encrypted; store it without a password, readable by the gate's user alone")


def self_signed(name: str, data: Path) -> Path:
    """The path of the self-signed pair for this name, made if it is not there.

    Raises:
        StorageError: it cannot be written.
    """
    path = data / f"tls-self-signed-{name.replace('/', '_')}.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    try:
        write_once(path, pem)
    except OSError as error:
        raise StorageError(f"cannot write the self-signed certificate {path}: {error.strerror}") from error
    return path


def write_once(path: Path, octets: bytes) -> None:
    """Put a secret file in place, complete or not at all; the first of several processes wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(octets)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
