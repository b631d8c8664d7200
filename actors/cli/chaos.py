"""`expertmesh chaos`: break a server on purpose under live streams, and show that no request is lost or changed."""

import asyncio
import json
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.chaos_events import SCENARIOS, Scenario, Target
from expertmesh.actors.cli.chaos_streams import Record, Streams, mismatches, unsteady
from expertmesh.actors.cli.child_server import child_server
from expertmesh.actors.cli.client import JsonOption
from expertmesh.cluster.errors import ExpertMeshError, InputError
from expertmesh.v1.admin_pb2 import GetStatusRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub

# A step that waits for a new process, or for many experts to be read, does not give up.
_RECOVERY_S = 60.0
_SETTLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The command's options; options are those that `serve` gets."""

    options: tuple[str, ...]
    streams: int
    new_tokens: int
    cycles: int
    minutes: float
    seed: int
    plot: Path | None


def chaos(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    only: Annotated[str, typer.Option(help="Scenarios whose name contains this.")] = "",
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 16,
    new: Annotated[int, typer.Option(help="Tokens of each.", min=2)] = 300,
    cycles: Annotated[int, typer.Option(help="Cycles of scaling up and down.", min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="How long random faults go on, one every 5 s.", min=0.1)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random faults.")] = 0,
    dtype: Annotated[str, typer.Option(help="As for `serve`.")] = "float32",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="As for `serve`.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture for each scenario to this folder (PNG).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve MODEL for each scenario, break it while streams run, compare every token, and print a table."""
    chosen = [s for s in SCENARIOS if only.lower() in s.name.lower()]
    if not chosen:
        raise InputError(f"--only {only!r} names none of: {'; '.join(s.name for s in SCENARIOS)}")
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
    asked = _Asked(
        options=("--dtype", dtype, *(("--deterministic",) if deterministic else ())),
        streams=streams,
        new_tokens=new,
        cycles=cycles,
        minutes=minutes,
        seed=seed,
        plot=plot,
    )
    rows: list[dict[str, Any]] = []
    for scenario in chosen:
        typer.echo(f"{scenario.name} ...", err=True)
        rows.append(_run(scenario, model, asked))
    if as_json:
        how = {"streams": streams, "new_tokens": new, "dtype": dtype, "deterministic": deterministic}
        typer.echo(json.dumps({"model": model.name, **how, "rows": rows}))
    else:
        _print(rows)
    broken = [row["event"] for row in rows if row["failed"] or row["changed"] or row["error"]]
    if broken:
        raise ExpertMeshError(f"not as promised: {', '.join(broken)}")


def _run(scenario: Scenario, model: Path, asked: _Asked) -> dict[str, Any]:
    config = {"recovery_s": _RECOVERY_S, **scenario.config}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chaos.toml"
        file.write_text("".join(f"{name} = {value}\n" for name, value in config.items()))
        options = [*asked.options, "--shards", str(scenario.shards), "--workers", str(scenario.workers)]
        options += ["--replicas", str(scenario.replicas), "--config", str(file)]
        with child_server(model, options) as address:
            return asyncio.run(_measure(scenario, address, asked))


async def _measure(scenario: Scenario, address: str, asked: _Asked) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        model = (await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=30)).model
        streams = Streams(address, model, asked.streams, asked.new_tokens)
        target = Target(channel, streams, asked.seed, asked.cycles, asked.minutes)
        await target.whole()
        over = asyncio.Event()
        over.set()
        await streams.run_until(over, Record())  # not counted: code and pages are touched for the first time
        calm, rough = Record(), Record()
        for streams.topic in scenario.topics:
            await streams.run_calm(calm)
        for shards, workers in scenario.fleets:
            await target.scale(shards, workers)
            await streams.run_calm(calm)
        target.marks.clear()
        streams.topic = scenario.topics[0]
        done = asyncio.Event()
        error, _ = await asyncio.gather(_act(scenario.act(target), done), streams.run_until(done, rough))
        if not error:
            await target.whole()
    if asked.plot is not None:
        from expertmesh.actors.cli.chaos_plot import draw

        draw(asked.plot / f"{_file_name(scenario.name)}.png", scenario.name, rough, target.marks)
    changed = mismatches(calm, rough)
    return {
        "event": scenario.name,
        "requests": sum(len(outputs) for outputs in rough.outputs.values()) + len(rough.errors),
        "failed": len(rough.errors),
        "changed": len(changed),
        "unsteady": unsteady(calm),
        "longest_gap_s": rough.longest_gap_s,
        "p99_gap_s": rough.p99_gap_s,
        "calm_longest_gap_s": calm.longest_gap_s,
        "calm_p99_gap_s": calm.p99_gap_s,
        "facts": target.facts,
        "marks": [what for _, what in target.marks],
        "errors": [*sorted(set(rough.errors))[:5], *changed[:5]],
        "error": error,
    }


async def _act(action: Awaitable[None], done: asyncio.Event) -> str:
    """Let the streams run a little, do the scenario, and tell the streams; return what went wrong, if anything."""
    await asyncio.sleep(_SETTLE_S)
    try:
        await action
    except (ExpertMeshError, grpc.RpcError) as error:
        return str(error)
    finally:
        done.set()
    return ""


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "event", "requests", "failed", "changed", "unsteady", "longest gap", "p99 gap", "calm: longest", "p99"
    )
    for row in rows:
        table.add_row(
            row["event"],
            str(row["requests"]),
            str(row["failed"]),
            str(row["changed"]),
            str(row["unsteady"]),
            f"{row['longest_gap_s']:.3f} s",
            f"{row['p99_gap_s']:.3f} s",
            f"{row['calm_longest_gap_s']:.3f} s",
            f"{row['calm_p99_gap_s']:.3f} s",
        )
    Console(width=140).print(table)
    for row in rows:
        for name, value in row["facts"].items():
            typer.echo(f"{row['event']}: {name.replace('_', ' ')}: {value}")
        for problem in (*row["errors"], row["error"]):
            if problem:
                typer.echo(f"{row['event']}: {problem}")


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
