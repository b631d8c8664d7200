"""Bringing a deployment up and down from one process: checks first, then Ray, controller, gateway."""

import multiprocessing
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from expertmesh.actors.controller.actor import start_controller
from expertmesh.actors.gateway.credentials import CertificateWatch
from expertmesh.actors.gateway.deployment import deploy_gateway
from expertmesh.actors.gateway.key_book import read_keys
from expertmesh.actors.inspection import inspect, known_facts
from expertmesh.actors.machine_share import usable_memory
from expertmesh.actors.port_claim import PortClaim, require_http, url_host
from expertmesh.actors.runtime import GATEWAY_APP, join_ray, metrics_address, start_local_ray, yield_to_actors
from expertmesh.actors.state import connect
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, InputError, UnavailableError
from expertmesh.cluster.model_info import CheckpointFacts, require_divisible
from expertmesh.cluster.settings import ServeSettings, TlsSettings
from expertmesh.models.config_file import read_config_file

_PROGRESS_PERIOD_S = 0.2
# Of experts that kernels/cpu/expert_mlp packs.
_PACKED_WIDTH = 32
_DRAIN_S = 5.0
# Serve's proxy learns of the gateway's path within a look of its controller.
_HTTP_TIMEOUT_S = 20.0


class Deployment:
    """A served model. `start` blocks until it is ready; `stop` leaves none of our processes, however far start came."""

    def __init__(
        self,
        settings: ServeSettings,
        ray_address: str | None,
        say: Callable[[str], None],
        on_ray: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare a deployment.

        Args:
            settings: what to serve and how.
            ray_address: of a running cluster; None starts one of our own on loopback.
            say: told each step in a line.
            on_ray: called when Ray runs; Ray's start takes over the process's signal handlers, and they can be set
                anew.
        """
        # Our own Ray is for this machine alone, and so are its links.
        own = {} if ray_address else {"link_host": "127.0.0.1"}
        keys = settings.keys and settings.keys.resolve()
        self._settings = settings.model_copy(
            update={"model": settings.model.resolve(), "tls": _absolute(settings.tls), "keys": keys, **own}
        )
        self._ray_address = ray_address
        self._say = say
        self._on_ray = on_ray
        self._directory = Path(tempfile.mkdtemp(prefix="expertmesh-"))
        self._controller: Any = None
        self._gateway: Any = None
        self._is_deployed = False
        self._http_port: PortClaim | None = None
        self.grpc_address = ""
        self.metrics_address = ""  # of our own Ray alone
        self.http_url = ""

    @property
    def log_folder(self) -> str:
        """Where Ray keeps the logs of our processes; "": each node of a cluster keeps its own."""
        return "" if self._ray_address else str(self._directory / "ray" / "session_latest" / "logs")

    def start(self) -> None:
        """Bring everything up.

        Raises:
            InputError: the port is in use, a certificate cannot be used, the file of keys is wrong, or the settings do
                not fit.
            CheckpointError: the model cannot be served.
            CapacityError: too little memory or too few accelerators.
            UnavailableError: something did not come up.
        """
        settings = self._settings
        _require_free_port(settings.grpc_host, settings.grpc_port)
        _check_metrics_port(settings.metrics_port, self._ray_address)
        if settings.tls is not None:
            until = CertificateWatch(settings.tls).valid_until
            self._say(f"TLS by the certificate in {settings.tls.cert_file}, valid until {until}")
        if settings.http:
            self._http_port = PortClaim(settings.http_host, settings.http_port)
        if settings.keys is not None:
            read_keys(settings.keys)
        if settings.state:
            connect(settings.state).close()
        self._say(f"checking {settings.model}")
        read_config_file(settings.model)
        facts = self._start_ray_and_inspect()
        require_divisible(facts.expert_width, settings.expert_tp)
        info = replace(facts.info, expert_tp=settings.expert_tp)
        self._say(
            f"{info.architecture}, {info.dtype}: {len(info.moe_layers)} MoE layers of {info.num_experts} experts, "
            f"dense half {facts.dense_bytes / 2**20:.1f} MiB, an expert {facts.expert_bytes / 2**20:.2f} MiB"
        )
        width = facts.expert_width // settings.expert_tp
        if width % _PACKED_WIDTH and not facts.expert_width % _PACKED_WIDTH:
            self._say(
                f"slices of width {width}: on CPUs torch computes them, the kernel takes multiples of {_PACKED_WIDTH}"
            )
        if self._ray_address is None:
            self._check_memory(facts)
            self.metrics_address = metrics_address()
        else:
            join_ray(self._ray_address)
        self._on_ray()
        self._controller = start_controller(settings, info, self._directory / "state")
        starting = self._controller.start.remote()
        with ThreadPoolExecutor(1) as thread:
            # Its process waits much and computes little; until the controller is ready it answers that it is not.
            self._is_deployed = True
            http_port = None if self._http_port is None else self._http_port.port
            deployment = thread.submit(deploy_gateway, settings, info, http_port)
            self._follow(starting)
            self._say("starting the gateway")
            self._gateway = deployment.result()
        if self._ray_address is None:
            yield_to_actors()
        self.grpc_address = self._gateway.address.remote().result(timeout_s=60)
        if self.metrics_address:
            self._say(f"metrics on http://{self.metrics_address}/metrics")
        if http_port is not None:
            certificate = None if settings.tls is None else settings.tls.cert_file
            scheme = "http" if certificate is None else "https"
            self.http_url = f"{scheme}://{url_host(settings.http_host)}:{http_port}"
            require_http(self.http_url, _HTTP_TIMEOUT_S, certificate)
        self._say(" and ".join(filter(None, ("serving on " + self.grpc_address, self.http_url))))

    def _start_ray_and_inspect(self) -> CheckpointFacts:
        """Start Ray unless there is one, and return the checkpoint's facts; both take seconds."""
        settings = self._settings
        known = known_facts(settings)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            # In a process of its own, so that torch and transformers do not stay in this one.
            inspection = pool.submit(inspect, settings) if known is None else None
            if self._ray_address is None:
                self._say("starting Ray on this machine")
                start_local_ray(self._directory / "ray", settings.metrics_port)
            facts = known if inspection is None else inspection.result()
        if isinstance(facts, ExpertMeshError):
            raise facts
        assert facts is not None, "neither known nor inspected"
        return facts

    def stop(self) -> None:
        """Drain the gateway, end all actors and, if it is our own, Ray."""
        try:
            if self._gateway is not None:
                self._say("draining the gateway")
                self._gateway.shut_down.remote(_DRAIN_S).result(timeout_s=_DRAIN_S + 10)
            if self._is_deployed:  # another's gateway may run in a cluster that this one failed to start in
                serve.delete(GATEWAY_APP)
            if ray.is_initialized():
                self._stop_controller()
        finally:
            ray.shutdown()
            if self._http_port is not None:
                self._http_port.release()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _stop_controller(self) -> None:
        if self._controller is None:
            return
        try:
            ray.get(self._controller.stop.remote(), timeout=30)
        except RayActorError as error:
            self._say(f"the controller was gone already: {type(error).__name__}")
        ray.kill(self._controller)

    def _follow(self, reference: Any) -> None:
        """Wait for the controller's start and pass on what it says meanwhile."""
        told = 0
        while True:
            done, _ = ray.wait([reference], timeout=_PROGRESS_PERIOD_S)
            try:
                lines = ray.get(self._controller.progress.remote(told))
                if done:
                    ray.get(reference)
            except RayTaskError as error:
                raise (
                    error.cause if isinstance(error.cause, ExpertMeshError) else UnavailableError(str(error))
                ) from error
            except RayActorError as error:
                raise UnavailableError(f"the controller died: {error}") from error
            for line in lines:
                self._say(line)
            told += len(lines)
            if done:
                return

    def _check_memory(self, facts: CheckpointFacts) -> None:
        """Refuse what cannot fit on this machine, before anything is loaded. Accelerators check themselves."""
        settings, info = self._settings, facts.info
        if settings.device == "cuda":
            return
        experts = facts.expert_bytes * info.num_experts * len(info.moe_layers) * settings.replicas
        dense = facts.dense_bytes * settings.workers
        free = usable_memory().available_bytes
        if experts + dense > free:
            raise CapacityError(
                f"{settings.model}: {experts / 2**30:.2f} GiB of experts and {dense / 2**30:.2f} GiB of dense halves "
                f"do not fit in the {free / 2**30:.2f} GiB that are free"
            )


def _absolute(tls: TlsSettings | None) -> TlsSettings | None:
    """Make paths independent of the current folder. A symbolic link stays one: another target may be a new pair."""
    if tls is None:
        return None
    files = {name: path.absolute() for name in TlsSettings.model_fields if (path := getattr(tls, name)) is not None}
    return TlsSettings(**files)


def _check_metrics_port(port: int, ray_address: str | None) -> None:
    if port and ray_address:
        raise InputError(f"metrics_port={port} is for a Ray that is started here; that at {ray_address} has its own")
    if port:
        _require_free_port("", port)  # Ray listens on all interfaces


def _require_free_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from error
