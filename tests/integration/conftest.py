"""Servers for the integration tests: real processes on their own Ray, on loopback, ended even when a test fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from tests.families import write_checkpoint

POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket-moe"
CLI = [sys.executable, "-m", "expertmesh.actors.cli.main"]


@dataclass
class Server:
    """A running `expertmesh serve`. metadata: of an API key, where it needs one."""

    address: str
    process: subprocess.Popen[str]
    log: Path
    http_url: str = ""
    metadata: tuple[tuple[str, str], ...] = ()

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address)

    def status(self) -> StatusResponse:
        with self.channel() as channel:
            response: StatusResponse = AdminStub(channel).GetStatus(
                GetStatusRequest(), metadata=self.metadata, timeout=20
            )
            return response


Serve = Callable[..., "Server"]


@contextmanager
def serving(
    model: Path, home: Path, *options: str, env: Mapping[str, str] | None = None, within: Sequence[str] = ()
) -> Iterator[Server]:
    """Run a server while the block lasts, with its own home; check at the end that no process is left.

    Args:
        model: checkpoint directory.
        home: of the server; compiled kernels are this user's.
        options: of `serve`.
        env: variables beside those of this process.
        within: a command that runs the one that follows it, such as one that enters a network namespace.
    """
    log = home / "serve.log"
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    env = {
        **os.environ,
        **(env or {}),
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CACHE_HOME": cache,
    }
    http = [] if "--http-port" in options else ["--no-http"]
    command = [*within, *CLI, "serve", str(model), "--grpc-port", "0", *http, *options]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    tree: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), log.read_text()
        tree = psutil.Process(process.pid).children(recursive=True)
        _, address, *urls = line.split()
        yield Server(address, process, log, "".join(urls))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
        left = psutil.wait_procs(tree, timeout=5)[1]
        for survivor in left:
            survivor.kill()
        assert not left, f"left behind: {left}\n{log.read_text()}"


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The pocket model in float32 on two shards, every expert on both."""
    home = tmp_path_factory.mktemp("pocket")
    with serving(POCKET, home, "--shards", "2", "--replicas", "2", "--workers", "2", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint without a tokenizer: latent attention, shared experts, a dense first layer."""
    directory = tmp_path_factory.mktemp("tiny") / "deepseek_v3"
    write_checkpoint("deepseek_v3", directory)
    return directory
