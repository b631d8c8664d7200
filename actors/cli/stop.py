"""`expertmesh stop`: end a server that `serve` started on this machine."""

from typing import Annotated

import psutil
import typer

from expertmesh.actors.cli.running import choose, find_running
from expertmesh.cluster.errors import UnavailableError


def stop(
    url: Annotated[str, typer.Option(help="gRPC address of the server; needed when several run here.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Longest wait for its end.")] = 60.0,
) -> None:
    """Stop a server that runs on this machine: streams get a few seconds to end."""
    server = choose(find_running(), url)
    try:
        process = psutil.Process(server.pid)
        process.terminate()
        process.wait(timeout_s)
    except psutil.NoSuchProcess:
        pass  # it ended before it could be waited for
    except psutil.TimeoutExpired as error:
        raise UnavailableError(f"process {server.pid} did not end within {timeout_s:g} s") from error
    typer.echo(f"stopped {server.grpc_address} (pid {server.pid}, {server.model})")
