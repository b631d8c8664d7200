"""A server as a child of this process, for commands that need one for a while: the demo and the benchmarks."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertmesh.cluster.errors import UnavailableError

_STOP_TIMEOUT_S = 60.0


@contextmanager
def child_server(model: Path, options: list[str]) -> Iterator[str]:
    """Run `expertmesh serve MODEL OPTIONS` on a free port while the block lasts; its progress goes to stderr.

    Yields:
        Its gRPC address.

    Raises:
        UnavailableError: it ended before it was ready; its own error is on stderr.
    """
    command = [
        sys.executable,
        "-m",
        "expertmesh.actors.cli.main",
        "serve",
        str(model),
        "--grpc-port",
        "0",
        "--no-http",
        *options,
    ]
    # A process group of its own: Ctrl-C in the terminal reaches this process alone, which then stops the server in
    # order. Not a session: Linux divides cores between sessions first (autogroups), and a client that measures from
    # another one waits for up to two seconds while the server starts processes.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            raise UnavailableError(f"the server ended with exit code {process.wait()} before it was ready")
        yield line.split()[1]
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()


def _interrupt(_number: int, _frame: object) -> None:
    """End as on Ctrl-C, so that the server is stopped first."""
    raise KeyboardInterrupt
