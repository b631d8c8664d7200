"""Certificates for tests: authorities, and what they sign, as files."""

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def serial(self) -> str:
        """The serial number as ssl.SSLSocket.getpeercert writes it."""
        text = f"{self.certificate.serial_number:X}"
        return text.zfill(len(text) + len(text) % 2)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.pem and NAME.key."""
        cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
        cert_file.write_bytes(self.cert_pem)
        key_file.write_bytes(self.key_pem)
        return cert_file, key_file


def make(
    name: str,
    issuer: Pair | None = None,
    *,
    begins: datetime.datetime = NOW - DAY,
    ends: datetime.datetime = NOW + DAY,
    curve: ec.EllipticCurve | None = None,
) -> Pair:
    """Make a certificate for this machine, signed by `issuer`; without one it is an authority's own."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    unsigned = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return Pair(unsigned.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def client_context(authority: Pair, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Trust this authority alone, and show a certificate of one's own."""
    context = ssl.create_default_context(cadata=authority.cert_pem.decode())
    context.set_alpn_protocols(["h2"])
    if own is not None:
        context.load_cert_chain(*own)
    return context
