"""Certificates and keys in PEM files: read, and checked for what would let a handshake fail later."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from expertmesh.cluster.errors import InputError

# The curves that TLS 1.3 has code points for (RFC 8446, section 4.2.3); gRPC refuses others.
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """A certificate chain, PEM, and the private key of its first certificate. Its text shows nothing of the key."""

    cert_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"KeyPair({len(self.cert_pem)} bytes of certificates)"


def read_file(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        InputError: it cannot be read; the message says which and why.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def check_key_pair(pair: KeyPair, cert_file: Path, key_file: Path, now: datetime) -> x509.Certificate:
    """Return the first certificate of a chain after a check of it and its key, which were read from these files.

    Raises:
        InputError: a file is not what it should be, the key is of another certificate, or the certificate is not valid
            at `now`; the message names the file.
    """
    certificate = certificates_of(pair.cert_pem, cert_file)[0]
    if now > certificate.not_valid_after_utc:
        raise InputError(f"{cert_file}: the certificate expired at {certificate.not_valid_after_utc}")
    if now < certificate.not_valid_before_utc:
        raise InputError(f"{cert_file}: the certificate is not valid before {certificate.not_valid_before_utc}")
    try:
        key = load_pem_private_key(pair.key_pem, password=None)
    except TypeError as error:
        raise InputError(f"{key_file}: the private key is encrypted; it must not be") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key_file}: no private key in PEM, or a damaged one") from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and not isinstance(key.curve, _CURVES):
        raise InputError(f"{key_file}: the key is on the curve {key.curve.name}, which TLS does not use")
    if key.public_key() != certificate.public_key():
        raise InputError(f"{key_file}: the private key is not that of the certificate in {cert_file}")
    return certificate


def certificates_of(pem: bytes, path: Path) -> list[x509.Certificate]:
    """Return the certificates in the content of a file, in order.

    Raises:
        InputError: there is none, or one is damaged; the message names the file.
    """
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InputError(f"{path}: no certificate in PEM, or a damaged one") from error


def utc_now() -> datetime:
    """Return the time now."""
    return datetime.now(UTC)
