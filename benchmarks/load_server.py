"""A server under load as the load benchmarks see it: started by its command, its processes looked at by role."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub

# As Ray titles its processes: ray::WorkerActor.submit, ray::ServeReplica:expertmesh:gateway, raylet.
_ROLES = {
    r"ray::ServeReplica": "gateway",
    r"ray::(HTTP)?ProxyActor": "HTTP proxy",
    r"ray::WorkerActor": "worker",
    r"ray::ShardActor": "shard",
    r"ray::ControllerActor": "controller",
    r"ray::ServeController": "Serve's controller",
    r"redis-server": "Redis",
}
OTHERS = "others"


@dataclass(frozen=True)
class LoadedServer:
    """A running `expertmesh serve`. pid: of the command; http_url is empty without HTTP."""

    address: str
    http_url: str
    pid: int

    def status(self) -> StatusResponse:
        """Ask what runs where."""
        with grpc.insecure_channel(self.address) as channel:
            response: StatusResponse = AdminStub(channel).GetStatus(GetStatusRequest(), timeout=30)
            return response


@contextlib.contextmanager
def running(model: Path, options: Sequence[str]) -> Iterator[LoadedServer]:
    """Serve a checkpoint while the block lasts; its progress goes to stderr.

    Args:
        model: the checkpoint.
        options: of `expertmesh serve`, beside its gRPC port, which is a free one.
    """
    command = [sys.executable, "-m", "expertmesh.actors.cli.main", "serve", str(model), "--grpc-port", "0", *options]
    # Not in a session of its own: see `child_server`.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["ready"], f"the server did not start: {words}"
        yield LoadedServer(words[1], "".join(words[2:]), process.pid)
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(90)


def _interrupt(_number: int, _frame: object) -> None:
    """End as on Ctrl-C, so that the server is stopped first."""
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Usage:
    """What the processes of one role use together."""

    rss_bytes: int
    num_fds: int


def look(pid: int) -> dict[str, Usage]:
    """Return what a server's processes use, by role: the command's own and all its descendants."""
    found: dict[str, Usage] = {}
    command = psutil.Process(pid)
    for process in (command, *command.children(recursive=True)):
        try:
            role = "command" if process.pid == pid else _role(process)
            usage = Usage(process.memory_info().rss, process.num_fds())
        except psutil.NoSuchProcess:
            continue
        before = found.get(role, Usage(0, 0))
        found[role] = Usage(before.rss_bytes + usage.rss_bytes, before.num_fds + usage.num_fds)
    return found


def _role(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    return next((role for pattern, role in _ROLES.items() if re.search(pattern, title)), OTHERS)


@dataclass
class Watch:
    """Looks at a server again and again. times_s count from the beginning."""

    times_s: list[float] = field(default_factory=list)
    usages: list[dict[str, Usage]] = field(default_factory=list)

    def series(self, role: str) -> list[Usage]:
        """Return what one role used at each look; roles that come later begin with nothing."""
        return [usage.get(role, Usage(0, 0)) for usage in self.usages]

    @property
    def roles(self) -> list[str]:
        """The roles that were seen."""
        return sorted({role for usage in self.usages for role in usage})


@contextlib.contextmanager
def watching(pid: int, period_s: float = 2.0) -> Iterator[Watch]:
    """Look at a server each period_s while the block lasts, from a thread."""
    watch, over, began_s = Watch(), threading.Event(), time.monotonic()

    def run() -> None:
        while not over.is_set():
            watch.times_s.append(time.monotonic() - began_s)
            watch.usages.append(look(pid))
            over.wait(period_s)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def until_idle(server: LoadedServer, timeout_s: float = 60.0) -> StatusResponse:
    """Wait until no sequence is live and all pages are free, and return the status.

    Raises:
        TimeoutError: something is left; the message says what.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        status = server.status()
        left = [
            f"{worker.id}: {worker.running} run, {worker.waiting} wait, {worker.num_pages - worker.free_pages} pages"
            for worker in status.workers
            if worker.running or worker.waiting or worker.free_pages != worker.num_pages
        ]
        if not left:
            return status
        if time.monotonic() > end_s:
            raise TimeoutError(f"after {timeout_s} s there are left: {left}")
        time.sleep(0.2)
