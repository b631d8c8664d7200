"""The gateway's own gRPC server: Inference, Admin, the Open Inference Protocol, health and reflection on one port."""

import socket

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.admin_service import AdminService
from expertmesh.actors.gateway.credentials import CertificateWatch
from expertmesh.actors.gateway.grpc_access import AccessInterceptor
from expertmesh.actors.gateway.inference_service import InferenceService
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.oip_service import OpenInferenceService
from expertmesh.actors.gateway.undecodable import RefuseUndecodable
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import GrpcSettings, TlsSettings
from expertmesh.oip import open_inference_pb2, open_inference_pb2_grpc
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
# What is served only while each expert has a live replica. Admin is there as long as the server is.
HEALTH_NAMES = ("", INFERENCE, OPEN_INFERENCE)
DEFAULTS = GrpcSettings()
MAX_PENDING_CALLS = 10_000


class GatewayServer:
    """A listening server. Its health is NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        health_service: health.aio.HealthServicer,
        open_inference: OpenInferenceService,
        host: str,
        port: int,
    ) -> None:
        """Hold a started server; use `start_server`."""
        self._server = server
        self._health = health_service
        self._open_inference = open_inference
        self.host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port that it listens on."""
        return _address(self.host, self.port)

    @property
    def is_serving(self) -> bool:
        """Whether requests are served now."""
        return self._open_inference.is_ready

    async def set_serving(self, serving: bool) -> None:
        """Set what the health service answers, for the whole server and for its ways to generate."""
        self._open_inference.is_ready = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, give the running ones `grace_s` seconds to end, then cancel them."""
        self._open_inference.is_ready = False
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(
    *,
    host: str,
    port: int,
    inference: InferenceService,
    open_inference: OpenInferenceService,
    admin: AdminService,
    settings: GrpcSettings = DEFAULTS,
    tls: TlsSettings | None = None,
    keys: KeyBook | None = None,
) -> GatewayServer:
    """Start to listen on host:port; port 0 takes a free one, which the result tells.

    Plaintext without `tls`; without `keys` there are none.

    Raises:
        InputError: the address cannot be listened on, or a certificate cannot be used; the message says why.
    """
    access = AccessInterceptor(Access(KeyBook() if keys is None else keys, host))
    server = grpc.aio.server(options=_options(settings), interceptors=(access, RefuseUndecodable()))
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection(
        (INFERENCE, OPEN_INFERENCE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    _require_free(host, port)
    try:
        if tls is None:
            bound_port = server.add_insecure_port(_address(host, port))
        else:
            bound_port = server.add_secure_port(_address(host, port), CertificateWatch(tls).server_credentials())
    except RuntimeError as error:
        raise InputError(f"cannot listen on {_address(host, port)}: {error}") from error
    started = GatewayServer(server, health_service, open_inference, host=host, port=bound_port)
    await started.set_serving(False)
    await health_service.set(ADMIN, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return started


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options(settings: GrpcSettings) -> list[tuple[str, int]]:
    """Name the settings as gRPC does, https://grpc.github.io/grpc/core/group__grpc__arg__keys.html."""
    return [
        # Without this a second gateway would share the port, and each would get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # Of calls that wait to be taken up, gRPC cancels some by chance above the first number, any above the second
        # (1000 and 3000 unless given): with few a flood of one client's calls would end those of others.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
        # A connection that has not begun in order by then is closed.
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        # Which of the two ends a connection is gRPC's choice; this one is a minute unless given.
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        # A client may ask whether its server lives though it has no call just now.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(settings.min_ping_s * 1000)),
    ]


def _require_free(host: str, port: int) -> None:
    """Try the address first: gRPC's own error does not say what is wrong with it."""
    # Resolvers and gRPC take a larger number modulo 65536.
    if not 0 <= port <= 65535:
        raise InputError(f"cannot listen on {_address(host, port)}: a port is from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {_address(host, port)}: {error}") from error
