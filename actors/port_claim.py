"""A TCP port that is one server's alone, from before Ray Serve's proxy listens on it until the server ends."""

import errno
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from expertmesh.cluster.errors import InputError, UnavailableError

_PERIOD_S = 0.05


class PortClaim:
    """Holds host:port without listening.

    Proxies bind with SO_REUSEPORT, which lets a server be started again at once, but also lets two servers share a
    port and each get half of the calls. So the claim binds likewise, and looks besides whether anybody answers
    there; two of ours see each other by a name in the kernel, which ends with its process.
    """

    def __init__(self, host: str, port: int) -> None:
        """Take the port; 0 takes a free one.

        Raises:
            InputError: the address cannot be listened on, or somebody does; the message says why.
        """
        self._sockets: list[socket.socket] = []
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            held = self._open(family, kind, protocol)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(address)
            self.port: int = held.getsockname()[1]
            self._open(socket.AF_UNIX, socket.SOCK_STREAM).bind(f"\0expertmesh-http-{self.port}")
            if self._open(family, kind, protocol).connect_ex(held.getsockname()) == 0:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        except OSError as error:
            self.release()
            raise InputError(f"cannot listen on {host}:{port}: {error}") from error

    def release(self) -> None:
        """Let go of the port; a second time changes nothing."""
        while self._sockets:
            self._sockets.pop().close()

    def _open(self, *kind: int) -> socket.socket:
        self._sockets.append(socket.socket(*kind))
        return self._sockets[-1]


def url_host(host: str) -> str:
    """Return the host part of a URL by which this machine reaches what listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"[{reached}]" if ":" in reached else reached


def _trusting(cert_file: Path) -> ssl.SSLContext:
    """Trust what the file holds and nothing else, whatever name it gives: it is this server's own."""
    context = ssl.create_default_context(cafile=str(cert_file))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def require_http(url: str, timeout_s: float, cert_file: Path | None = None) -> None:
    """Wait until the gateway answers over HTTP, with cert_file over TLS and under the first certificate of that file.

    Raises:
        UnavailableError: it does not; the message says what is there instead.
    """
    end_s = time.monotonic() + timeout_s
    # No proxy of the environment stands between this machine and itself.
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if cert_file is not None:
        handlers.append(urllib.request.HTTPSHandler(context=_trusting(cert_file)))
    opener = urllib.request.build_opener(*handlers)
    while True:
        try:
            with opener.open(f"{url}/health", timeout=timeout_s) as answer:
                if answer.status == HTTPStatus.OK:
                    return
                found = f"HTTP status {answer.status}"
        except urllib.error.HTTPError as error:
            found = f"HTTP status {error.code}"
            error.close()
        except OSError as error:
            found = str(error)
        if time.monotonic() > end_s:
            raise UnavailableError(
                f"no HTTP at {url}: {found}. A cluster whose Ray Serve runs already keeps its own HTTP options; "
                "--no-http does without"
            )
        time.sleep(_PERIOD_S)
