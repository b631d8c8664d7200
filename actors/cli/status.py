"""`expertmesh status`: what a running server is made of, as tables or JSON, once or again and again."""

import json
import time
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertmesh.actors.cli.client import JsonOption, open_channel, to_dict
from expertmesh.actors.cli.server_options import Server, calls_a_server
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.v1.admin_pb2 import GetStatusRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub

TIMEOUT_S = 10.0
_SHOWN_EXPERTS = 5  # of those that tokens were dropped of


@calls_a_server
def status(
    server: Server,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option(help="Seconds between two looks of --watch.")] = 1.0,
) -> None:
    """Show what a running server is made of: plan, controller, shards, workers."""
    if interval_s <= 0:
        raise InputError(f"--interval-s is {interval_s}; it must be above 0")
    if as_json:
        while True:
            typer.echo(json.dumps(fetch(server)))
            if not watch:
                return
            time.sleep(interval_s)
    if watch:
        _watch(server, interval_s)
    Console().print(render(fetch(server)))


def fetch(server: Server) -> dict[str, Any]:
    """Return StatusResponse of the server as plain values by field name."""
    with open_channel(server) as channel:
        return to_dict(AdminStub(channel).GetStatus(GetStatusRequest(), timeout=TIMEOUT_S))


def render(state: dict[str, Any]) -> RenderableType:
    """Return the tables of a status."""
    parts: list[RenderableType] = [_head(state)]
    for title, kind in (("Expert shards", "shards"), ("Attention workers", "workers")):
        if state[kind]:
            parts.append(_members(title, state[kind]))
    if state["layer_traffic"]:
        parts.append(_traffic(state["layer_traffic"]))
    return Group(*parts)


def format_bytes(count: int) -> str:
    """Return a count of bytes with a binary unit, to three digits or so."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _watch(server: Server, interval_s: float) -> NoReturn:
    with Live(auto_refresh=False) as live:
        while True:
            # A server that is away for a moment is what one watches for.
            try:
                view = render(fetch(server))
            except UnavailableError as error:
                view = Text(str(error), style="red")
            live.update(view, refresh=True)
            time.sleep(interval_s)


def _head(state: dict[str, Any]) -> Table:
    model, controller = state["model"], state["controller"]
    balancedness, recent = state["balancedness"], state["recent_balancedness"]
    rows = {
        "state": "ready" if state["ready"] else f"not ready: {state['not_ready_reason']}",
        **({"warnings": "; ".join(state["warnings"])} if state["warnings"] else {}),
        "address": state["grpc_address"],
        "model": f"{model['name']} ({model['architecture']}, {model['dtype']})",
        "experts": f"{model['num_experts']} in each of {len(model['moe_layers'])} of {model['num_layers']} layers, "
        f"top {model['top_k']}",
        "context": f"{model['max_context']} tokens" + ("" if model["has_tokenizer"] else ", no tokenizer"),
        "plan": state["plan"],
        "placement": f"epoch {state['epoch']}, balancedness "
        + ("unknown (no traffic yet)" if balancedness is None else f"{balancedness:.3f} over minutes")
        + ("" if recent is None else f", {recent:.3f} over the last seconds"),
        "controller": f"pid {controller['pid']} on {short_node(controller['node'])}" if controller["pid"] else "away",
        **_autoscaler(state["autoscaler"]),
        **_dropped(state),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, Text(text))
    return table


def short_node(node_id: str) -> str:
    """Return enough of a node's id in Ray to tell nodes apart."""
    return node_id[-8:]


def _autoscaler(decision: dict[str, Any] | None) -> dict[str, str]:
    if decision is None:
        return {}
    wanted = f"{decision['shards']} shards and {decision['workers']} workers wanted, {decision['age_s']:.1f} s ago"
    problem = [f"cannot be had now: {decision['problem']}"] if decision["problem"] else []
    return {"autoscaler": "\n".join([wanted, *decision["reasons"], *problem])}


def _dropped(state: dict[str, Any]) -> dict[str, str]:
    if state["capacity_factor"] is None:
        return {}
    experts = [
        (pairs, ExpertKey(layer["layer"], expert))
        for layer in state["drops"]
        for expert, pairs in enumerate(layer["pairs"])
        if pairs
    ]
    most = ", ".join(f"{key} {pairs}" for pairs, key in sorted(experts, reverse=True)[:_SHOWN_EXPERTS])
    pairs = f"{state['dropped_pairs']} pairs of a token and an expert"
    beyond = f", beyond a capacity factor of {state['capacity_factor']}"
    return {"dropped": pairs + beyond + (f"; most of {most}" if most else "")}


def _members(title: str, members: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in members[0]:
        table.add_column(column, overflow="fold")
    for member in members:
        table.add_row(*(_cell(name, value) for name, value in member.items()))
    return table


def _cell(name: str, value: Any) -> str:
    if name == "node":
        return short_node(value)
    return format_bytes(value) if name.endswith("_bytes") else str(value)


def _traffic(layers: list[dict[str, Any]]) -> Table:
    table = Table(title="Bytes over the links since start", title_justify="left")
    kinds = ("dispatch_bytes", "combine_bytes", "reduce_bytes")
    for column in ("layer", *kinds):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(str(layer["layer"]), *(format_bytes(layer[kind]) for kind in kinds))
    return table
