"""`expertmesh stop`: end a server that `serve` started on this machine."""

from typing import Annotated

import psutil
import typer

from expertmesh.actors.cli.running import RunningServer, find_running
from expertmesh.cluster.errors import InputError, UnavailableError


def stop(
    url: Annotated[str, typer.Option(help="gRPC address of the server; needed when several run here.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Longest wait for its end.")] = 60.0,
) -> None:
    """Stop a server that runs on this machine: streams get a few seconds to end."""
    server = _choose(find_running(), url)
    try:
        process = psutil.Process(server.pid)
        process.terminate()
        process.wait(timeout_s)
    except psutil.NoSuchProcess:
        pass  # it ended before it could be waited for
    except psutil.TimeoutExpired as error:
        raise UnavailableError(f"process {server.pid} did not end within {timeout_s:g} s") from error
    typer.echo(f"stopped {server.grpc_address} (pid {server.pid}, {server.model})")


def _choose(servers: list[RunningServer], url: str) -> RunningServer:
    listing = ", ".join(f"{s.grpc_address} (pid {s.pid})" for s in servers) or "none"
    matching = [s for s in servers if not url or s.grpc_address == url]
    if len(matching) != 1:
        what = (
            f"no server at {url}"
            if url
            else "no server runs here"
            if not servers
            else "several servers run; give --url"
        )
        raise InputError(f"{what}; running: {listing}")
    return matching[0]
