"""TLS contexts for listeners; a self-signed certificate where none is given.

Why: STARTTLS with a certificate nobody vouches for still hides mail from those who only listen, and needs no set-up.
Trust: certificate and key files are the administrator's.
Promise: the private key that is made is readable by its owner alone and complete or absent.
Sources: RFC 3207 (STARTTLS), RFC 8314 (implicit TLS), RFC 8996 (TLS 1.0 and 1.1 are out of use).
"""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gatepost.errors import ConfigError, StorageError
from gatepost.gate.settings import TlsSettings

_MINIMUM = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


def server_context(settings: TlsSettings, name: str, data: str) -> ssl.SSLContext:
    """The context of this host's listeners.

    Args:
        name: the host name that a self-signed certificate is made for.
        data: where a self-signed pair is kept (``tls-self-signed-NAME.pem``), made at first use.

    Raises:
        ConfigError: certificate or key cannot be used.
        StorageError: a self-signed pair cannot be written.
    """
    certificate, key = settings.certificate, settings.key
    if not certificate:
        certificate = key = str(self_signed(name, Path(data)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[settings.minimum]
    if settings.minimum < "1.2":
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL 3 speaks TLS 1.0 and 1.1 at no other level
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        context.load_cert_chain(certificate, key or certificate, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            [f"[tls] certificate = {certificate!r}, key = {key!r}: {error}; both must be PEM and belong together"]
        ) from error
    return context


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
