"""A Ray cluster of several nodes on this machine, each node with its own raylet, for servers that join it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
# A node that is gone is noticed in about a second instead of a quarter of a minute.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class RayNodes:
    """The nodes of one cluster, the head first. A node ends, with all that runs on it, when its raylet does.

    directory: Ray's files, of all nodes.
    """

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self.directory = directory
        self._commands: list[subprocess.Popen[bytes]] = []
        self.address = ""
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(_QUICK if quick else {}),
        }

    def start(
        self,
        num_cpus: int,
        *,
        host: str = LOOPBACK,
        within: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> psutil.Process:
        """Start a node and return its raylet. See `conftest.serving` for `within`; labels are Ray's."""
        if self.address:
            role = ["--address", self.address]
        else:
            self.address = f"{host}:{_free_port()}"
            role = ["--head", "--port", self.address.partition(":")[2], "--include-dashboard", "false"]
            role += ["--ray-client-server-port", str(_free_port()), "--temp-dir", str(self.directory)]
        options = [f"--{name}=0" for name in ("min-worker-port", "max-worker-port", "dashboard-agent-listen-port")]
        options += ["--node-ip-address", host, "--num-cpus", str(num_cpus), "--object-store-memory", str(80 << 20)]
        if labels:
            options += ["--labels", ",".join(f"{name}={value}" for name, value in labels.items())]
        log = (self.directory / f"node-{len(self._commands)}.log").open("wb")
        with log:
            command = subprocess.Popen(
                [*within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *options],
                env={**_environment(), **self.env},
                stdout=log,
                stderr=log,
            )
        self._commands.append(command)
        deadline_s = time.monotonic() + 60
        while True:
            children = psutil.Process(command.pid).children(recursive=True) if command.poll() is None else []
            raylets = [child for child in children if child.name() == "raylet"]
            said = Path(log.name).read_text()
            if raylets and "--block" in said:  # it waits now: the node is there
                return raylets[0]
            assert command.poll() is None, said
            assert time.monotonic() < deadline_s, said
            time.sleep(0.05)

    def close(self) -> None:
        """End all nodes. Ray's own way takes half a minute."""
        commands = [psutil.Process(command.pid) for command in self._commands if command.poll() is None]
        for process in [*commands, *(child for command in commands for child in command.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for command in self._commands:
            command.wait(10)


@contextmanager
def ray_nodes(*, quick: bool = False) -> Iterator[RayNodes]:
    """Yield a cluster without nodes, which is quick to give a node up or as slow as Ray is; end what was started."""
    directory = Path(tempfile.mkdtemp(prefix="em-"))  # short: Ray's sockets lie in it
    nodes = RayNodes(directory, quick=quick)
    try:
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(directory, ignore_errors=True)


def members_on(raylet: psutil.Process) -> set[int]:
    """Return the pids of a node's actors."""
    return {child.pid for child in raylet.children(recursive=True)}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
