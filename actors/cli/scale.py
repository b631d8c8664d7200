"""`expertmesh scale`, `drain` and `ops`: change the fleet while it serves, and see how far that is."""

import json
import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.client import JsonOption, open_channel, to_dict
from expertmesh.actors.cli.server_options import Server, calls_a_server
from expertmesh.cluster.errors import ExpertMeshError, InputError, UnavailableError
from expertmesh.v1.admin_pb2 import DrainRequest, ListOperationsRequest, ScaleRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub

_TIMEOUT_S = 30.0
_LOOK_S = 0.3
_OVER = ("DONE", "ROLLED_BACK")

WaitOption = Annotated[bool, typer.Option("--wait", help="Return when it is over; an error when it was rolled back.")]


@calls_a_server
def scale(
    server: Server,
    shards: Annotated[int | None, typer.Option(help="Expert shards to have.")] = None,
    workers: Annotated[int | None, typer.Option(help="Attention workers to have.")] = None,
    wait: WaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Have other numbers of shards and workers; streams go on meanwhile."""
    for name, number in (("--shards", shards), ("--workers", workers)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}; it must be at least 1")
    request = ScaleRequest(shards=shards, workers=workers)
    with open_channel(server) as channel:
        operation = to_dict(AdminStub(channel).Scale(request, timeout=_TIMEOUT_S))
    follow(server, operation, wait=wait, as_json=as_json)


@calls_a_server
def drain(
    server: Server,
    member: Annotated[str, typer.Argument(metavar="SHARD|WORKER", help="Its id, as `status` shows it.")],
    wait: WaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take one shard or worker out; streams go on meanwhile."""
    with open_channel(server) as channel:
        operation = to_dict(AdminStub(channel).Drain(DrainRequest(id=member), timeout=_TIMEOUT_S))
    follow(server, operation, wait=wait, as_json=as_json)


@calls_a_server
def ops(
    server: Server,
    operation_id: Annotated[str, typer.Argument(metavar="[ID]", help="One operation; without it, all.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show the operations, or one of them."""
    operations = _fetch(server, operation_id)
    if as_json:
        typer.echo(json.dumps(operations[0] if operation_id else operations))
        return
    table = Table("id", "asked", "phase", "began", "took", "what")
    for one in operations:
        began = datetime.fromtimestamp(one["started_s"]).astimezone()
        took_s = (one["ended_s"] or time.time()) - one["started_s"]
        what = one["error"] or one["progress"]
        table.add_row(one["id"], one["request"], one["phase"], f"{began:%H:%M:%S}", f"{took_s:.1f} s", what)
    Console().print(table if operations else "no operation yet")


def follow(server: Server, operation: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    """Print an operation, with wait each phase of it until it is over.

    Raises:
        ExpertMeshError: it was rolled back.
    """
    shown = ""
    while True:
        line = f"{operation['id']}: {operation['request']}: {operation['phase']} {operation['progress']}".rstrip()
        if not as_json and line != shown:
            typer.echo(line)
            shown = line
        if not wait or operation["phase"] in _OVER:
            break
        time.sleep(_LOOK_S)
        try:
            operation = _fetch(server, operation["id"])[0]
        except UnavailableError:
            continue  # the controller may be away for a moment; the operation goes on when it is back
    if as_json:
        typer.echo(json.dumps(operation))
    if operation["phase"] == "ROLLED_BACK":
        raise ExpertMeshError(f"{operation['id']} was rolled back: {operation['error']}")


def _fetch(server: Server, operation_id: str) -> list[dict[str, Any]]:
    with open_channel(server) as channel:
        response = AdminStub(channel).ListOperations(ListOperationsRequest(id=operation_id), timeout=_TIMEOUT_S)
    return [to_dict(operation) for operation in response.operations]
