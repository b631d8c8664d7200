"""The gateway's own TLS: certificates from files, read anew for each handshake, so that a new pair needs no restart."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import grpc
from cryptography import x509

from expertmesh.actors.certificates import KeyPair, certificates_of, check_key_pair, read_file, utc_now
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import TlsSettings

_log = EventLog(__name__)


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """What the files hold. client_ca_pem: None asks clients for nothing."""

    pair: KeyPair
    client_ca_pem: bytes | None


def read_certificates(settings: TlsSettings) -> Certificates:
    """Read the files.

    Raises:
        InputError: one cannot be read; the message names it and says why.
    """
    return Certificates(
        pair=KeyPair(cert_pem=read_file(settings.cert_file), key_pem=read_file(settings.key_file)),
        client_ca_pem=None if settings.client_ca_file is None else read_file(settings.client_ca_file),
    )


def check_certificates(found: Certificates, settings: TlsSettings, now: datetime) -> x509.Certificate:
    """Return the server's certificate if all that was read can be used.

    Raises:
        InputError: a file is of no use; the message names it and says why.
    """
    certificate = check_key_pair(found.pair, settings.cert_file, settings.key_file, now)
    if settings.client_ca_file is not None and found.client_ca_pem is not None:
        certificates_of(found.client_ca_pem, settings.client_ca_file)
    return certificate


class CertificateWatch:
    """Says at each handshake whether the files hold other certificates than those in force.

    Guarantees:
        - What cannot be used (half written, a key of another certificate, expired) leaves those in force as they are,
          and is said in one line of the log until something else is found.
        - Connections go on under the certificate that they began with.
    """

    def __init__(self, settings: TlsSettings, now: Callable[[], datetime] = utc_now) -> None:
        """Read the files.

        Raises:
            InputError: see read_certificates and check_certificates.
        """
        self._settings = settings
        self._now = now
        self._in_force = read_certificates(settings)
        self._certificate = check_certificates(self._in_force, settings, now())
        self._problem = ""
        # gRPC asks from several threads of its own.
        self._lock = threading.Lock()

    @property
    def valid_until(self) -> datetime:
        """When the certificate in force expires."""
        return self._certificate.not_valid_after_utc

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which follow the files; their least version of TLS is 1.2."""
        asks_clients = self._settings.client_ca_file is not None
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._in_force),
            self.changed,  # type: ignore[arg-type]  # may return None, gRPC says; its stubs do not
            asks_clients,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold now; None: nothing else that can be used.

        The files are read (some 10 us each), whatever their times: one may be written twice within a tick of the clock.
        """
        with self._lock:
            try:
                found = read_certificates(self._settings)
                if found == self._in_force:
                    self._check_expiry()
                    return None
                certificate = check_certificates(found, self._settings, self._now())
            except InputError as error:
                self._say_once(f"the certificate in force stays: {error}")
                return None
            self._in_force, self._certificate, self._problem = found, certificate, ""
            _log.tell("certificate_renewed", serial_number=f"{certificate.serial_number:x}")
            return _configuration(found)

    def _check_expiry(self) -> None:
        if self._now() > self.valid_until:
            self._say_once(f"{self._settings.cert_file}: expired at {self.valid_until}, clients refuse it")
        else:
            self._problem = ""

    def _say_once(self, problem: str) -> None:
        if problem != self._problem:
            _log.tell("certificate_problem", reason=problem)
        self._problem = problem


def _configuration(found: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(found.pair.key_pem, found.pair.cert_pem)], found.client_ca_pem)
