"""A port is one server's: against other programs, against other servers of ours, and after one has ended."""

import http.server
import socket
import ssl
import threading
from contextlib import closing
from pathlib import Path

import pytest

from expertmesh.actors.port_claim import PortClaim, require_http, url_host
from expertmesh.cluster.errors import InputError, UnavailableError
from tests.certificates import make

HOST = "127.0.0.1"


def listening(port: int) -> socket.socket:
    """Return a socket as Ray Serve's proxy opens it."""
    proxy = socket.socket()
    proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    proxy.bind((HOST, port))
    proxy.listen()
    return proxy


def test_a_claimed_port_is_the_proxys_and_no_other_servers() -> None:
    claim = PortClaim(HOST, 0)
    try:
        with pytest.raises(InputError, match=f"cannot listen on {HOST}:{claim.port}: .*in use"):
            PortClaim(HOST, claim.port)
        with listening(claim.port) as proxy, socket.create_connection((HOST, claim.port)) as client:
            accepted, _ = proxy.accept()
            with accepted:
                assert accepted.getpeername() == client.getsockname()
    finally:
        claim.release()
    again = PortClaim(HOST, claim.port)
    again.release()
    again.release()


def test_another_program_that_listens_is_seen_whether_or_not_it_shares_its_port() -> None:
    with listening(0) as sharing, socket.create_server((HOST, 0)) as own:
        for other in (sharing, own):
            with pytest.raises(InputError, match="in use"):
                PortClaim(HOST, other.getsockname()[1])


def test_connections_that_a_former_server_ended_do_not_keep_its_port() -> None:
    with listening(0) as proxy:
        port = proxy.getsockname()[1]
        with socket.create_connection((HOST, port)) as client:
            proxy.accept()[0].close()
            assert client.recv(1) == b""
    PortClaim(HOST, port).release()


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    for host in ("192.0.2.1", "nowhere.invalid"):
        with pytest.raises(InputError, match=f"cannot listen on {host}:0: "):
            PortClaim(host, 0)


@pytest.mark.parametrize(
    ("host", "reached"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("host", "host")],  # noqa: S104
)
def test_a_url_names_a_host_that_can_be_reached(host: str, reached: str) -> None:
    assert url_host(host) == reached


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        return


def test_http_is_waited_for_and_its_absence_told() -> None:
    with closing(socket.create_server((HOST, 0))) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(UnavailableError, match=f"no HTTP at http://{HOST}:{port}: .*refused"):
        require_http(f"http://{HOST}:{port}", 0.1)
    with http.server.HTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            require_http(f"http://{HOST}:{server.server_port}", 5)
            with pytest.raises(UnavailableError, match="404"):
                require_http(f"http://{HOST}:{server.server_port}/elsewhere", 2)
        finally:
            server.shutdown()
            thread.join()


def test_https_is_waited_for_under_the_servers_own_certificate_alone(tmp_path: Path) -> None:
    authority = make("authority")
    own = make("server", authority).write(tmp_path, "server")
    strange = make("server", authority).write(tmp_path, "strange")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own)
    with http.server.HTTPServer((HOST, 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            require_http(f"https://{HOST}:{server.server_port}", 5, own[0])
            with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
                require_http(f"https://{HOST}:{server.server_port}", 0.1, strange[0])
        finally:
            server.shutdown()
            thread.join()
