"""`expertmesh rebalance` and `expertmesh placement save|load`: where the experts are, and where they should be."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.client import JsonOption, open_channel, to_dict
from expertmesh.actors.cli.scale import WaitOption, follow
from expertmesh.actors.cli.server_options import Server, calls_a_server
from expertmesh.actors.cli.status import format_bytes
from expertmesh.cluster.errors import InputError
from expertmesh.v1.admin_pb2 import GetPlacementRequest, PlacementRecord, RebalanceRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub

_TIMEOUT_S = 60.0
_SHOWN_MOVES = 20


@calls_a_server
def rebalance(
    server: Server,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be moved.")] = False,
    wait: WaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move experts to where the load of the last minutes wants them, if that is worth it."""
    with open_channel(server) as channel:
        plan = to_dict(AdminStub(channel).Rebalance(RebalanceRequest(dry_run=dry_run), timeout=_TIMEOUT_S))
    operation = plan["operation"]
    if as_json and not (operation and wait):
        typer.echo(json.dumps({**plan, "operation": operation}))
        return
    if not as_json:
        table = Table("layer", "expert", "from", "to")
        for move in plan["moves"][:_SHOWN_MOVES]:
            table.add_row(str(move["layer"]), str(move["expert"]), move["source"] or "checkpoint", move["target"])
        if plan["moves"]:
            Console().print(table)
        left_out = len(plan["moves"]) - _SHOWN_MOVES
        more = f" ({left_out} more not shown)" if left_out > 0 else ""
        typer.echo(f"{len(plan['moves'])} moves{more}, {format_bytes(plan['bytes_moved'])}")
        typer.echo(f"balancedness {plan['balancedness_before']:.3f} now, {plan['balancedness_after']:.3f} after")
        typer.echo(f"gain {plan['gain_s']:.1f} s, cost {plan['cost_s']:.2f} s: {plan['reason']}")
    if operation:
        follow(server, operation, wait=wait, as_json=as_json)


@calls_a_server
def placement(
    server: Server,
    action: Annotated[str, typer.Argument(metavar="save|load", help="save: write it; load: put it in force.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that save wrote.")],
    wait: WaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Save the placement in force to a file, or load one."""
    if action not in ("save", "load"):
        raise InputError(f"placement {action!r}: it is save or load")
    try:
        record = file.read_bytes() if action == "load" else b""
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    with open_channel(server) as channel:
        admin = AdminStub(channel)
        if action == "load":
            operation = to_dict(admin.SetPlacement(PlacementRecord(record=record), timeout=_TIMEOUT_S))
        else:
            record = admin.GetPlacement(GetPlacementRequest(), timeout=_TIMEOUT_S).record
    if action == "load":
        follow(server, operation, wait=wait, as_json=as_json)
        return
    try:
        file.write_bytes(record)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    typer.echo(json.dumps({"file": str(file), "bytes": len(record)}) if as_json else f"{len(record)} bytes in {file}")
