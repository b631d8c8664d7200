"""`expertmesh trace record|make|show`: which experts tokens chose, interval by interval, for the simulator.

Shape suffixes: L MoE layers, E experts of a layer.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertmesh.actors.cli.client import JsonOption, open_channel
from expertmesh.actors.cli.server_options import Server, calls_a_server
from expertmesh.actors.cli.status import TIMEOUT_S, fetch
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.synthetic_traces import zipf_steps
from expertmesh.cluster.trace_recorder import TraceRecorder
from expertmesh.cluster.trace_summary import TraceSummary, summarise
from expertmesh.cluster.traces import TraceHeader, TraceReader, TraceStep, TraceWriter
from expertmesh.v1.admin_pb2 import GetLoadsRequest, LoadsResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub

_SHOWN_EXPERTS = 10

trace = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The trace.")]


@trace.callback()
def about() -> None:
    """Record the routing of live traffic, make some up, show what a trace holds."""


@trace.command()
@calls_a_server
def record(
    server: Server,
    file: FileArgument,
    seconds: Annotated[float, typer.Option(help="How long; Ctrl-C ends it sooner.")] = 60.0,
    period_s: Annotated[float, typer.Option(help="Seconds of an interval.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Record which experts the tokens of a running server choose, counted by its workers."""
    if not 0 < period_s <= seconds < float("inf"):
        raise InputError(f"--seconds {seconds} and --period-s {period_s}: they must be above 0, the period the shorter")
    header = _header_of(fetch(server)["model"])
    with _progress() as progress:
        _write(file, header, _live_steps(server, header, seconds, period_s, progress))
    _tell(file, as_json)


@trace.command()
def make(
    file: FileArgument,
    zipf: Annotated[float, typer.Option(help="Skew: the r-th expert of a layer is as popular as r ** -SKEW.")] = 1.0,
    topic_steps: Annotated[int, typer.Option(help="Other experts are hot after so many intervals; 0: never.")] = 0,
    steps: Annotated[int, typer.Option(help="Intervals.")] = 60,
    step_s: Annotated[float, typer.Option(help="Seconds of an interval.")] = 1.0,
    prefill_tokens: Annotated[int, typer.Option(help="Tokens of prompts in an interval.")] = 0,
    decode_tokens: Annotated[int, typer.Option(help="Generated tokens in an interval.")] = 64,
    like: Annotated[Path | None, typer.Option(help="A trace of the model to be made one of.")] = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers, where there is no --like.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that a token chooses.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Numbers of a token's hidden state.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model.")] = "synthetic",
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make up a trace whose experts are as popular as Zipf's law has it."""
    shape = {"layers": layers, "experts": experts, "top_k": top_k, "hidden_size": hidden_size}
    header = _made_up_header(model, shape) if like is None else _header_like(like, shape)
    made = zipf_steps(
        header,
        skew=zipf,
        num_steps=steps,
        step_s=step_s,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        seed=seed,
        topic_steps=topic_steps,
    )
    with _progress() as progress:
        _write(file, header, progress.track(made, total=steps, description="making"))
    _tell(file, as_json)


@trace.command()
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show what a trace holds: its model, its tokens, how uneven its experts are."""
    _tell(file, as_json)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _header_of(model: dict[str, Any]) -> TraceHeader:
    return TraceHeader(
        model=model["name"],
        layers=tuple(model["moe_layers"]),
        num_experts=model["num_experts"],
        top_k=model["top_k"],
        hidden_size=model["hidden_size"],
    )


def _made_up_header(model: str, shape: dict[str, int | None]) -> TraceHeader:
    given = {name: value for name, value in shape.items() if value is not None}
    for name in shape.keys() - given.keys():
        raise InputError(f"--{name.replace('_', '-')} is needed where there is no --like FILE")
    if given["layers"] < 1:
        raise InputError(f"--layers is {given['layers']}; it must be at least 1")
    return TraceHeader(
        model=model,
        layers=tuple(range(given["layers"])),
        num_experts=given["experts"],
        top_k=given["top_k"],
        hidden_size=given["hidden_size"],
    )


def _header_like(like: Path, shape: dict[str, int | None]) -> TraceHeader:
    for name, value in shape.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} {value} beside --like {like}, which says it")
    return open_trace(like).header


def _live_steps(
    server: Server, header: TraceHeader, seconds: float, period_s: float, progress: Progress
) -> Iterator[TraceStep]:
    """Yield an interval each period_s, for so many seconds; where the server is away for a moment the next is longer.

    Raises:
        UnavailableError: there was none.
    """
    recorder, task = TraceRecorder(header), progress.add_task("recording", total=seconds)
    started_s, number, lost = time.monotonic(), 0, "no interval passed"
    try:
        for at_s in np.append(np.arange(0, seconds, period_s), seconds).tolist():
            time.sleep(max(0.0, started_s + at_s - time.monotonic()))
            progress.update(task, completed=at_s)
            try:
                counted = _fetch_loads(server)
            except UnavailableError as error:
                lost = str(error)
                progress.console.print(f"after {at_s:.0f} s: {lost}", markup=False)
                continue
            load_LE = np.array([layer.tokens for layer in counted.layers], dtype=np.int64)
            step = recorder.look(time.monotonic(), load_LE, counted.layers[0].decode_tokens)
            if step is not None:
                number += 1
                yield step
    except KeyboardInterrupt:
        progress.console.print("ended before its time")
    if number == 0:
        raise UnavailableError(f"nothing was recorded: {lost}")


def _fetch_loads(server: Server) -> LoadsResponse:
    with open_channel(server) as channel:
        response: LoadsResponse = AdminStub(channel).GetLoads(GetLoadsRequest(), timeout=TIMEOUT_S)
        return response


def _write(file: Path, header: TraceHeader, steps: Iterable[TraceStep]) -> None:
    writer = TraceWriter(header)
    try:
        with file.open("wb") as out:
            out.write(writer.begin())
            for step in steps:
                out.write(writer.step(step))
            out.write(writer.end())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def open_trace(file: Path) -> TraceReader:
    """Open a trace, mapped into memory: one of hours is large.

    Raises:
        InputError: it cannot be read, or is no trace.
    """
    try:
        with file.open("rb") as content:
            is_empty = file.stat().st_size == 0
            data = b"" if is_empty else memoryview(mmap(content.fileno(), 0, access=ACCESS_READ))
        return TraceReader(data)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _tell(file: Path, as_json: bool) -> None:
    reader = open_trace(file)
    try:
        summary = summarise(reader)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if as_json:
        typer.echo(json.dumps({"file": str(file), "bytes": file.stat().st_size, **_facts(summary)}))
    else:
        _print(file, summary)


def _facts(summary: TraceSummary) -> dict[str, Any]:
    names = ("num_steps", "duration_s", "prefill_tokens", "decode_tokens", "imbalance", "interval_imbalance")
    loads = [
        {"layer": layer, "tokens": load_E.tolist()}
        for layer, load_E in zip(summary.header.layers, summary.load_LE, strict=True)
    ]
    return {**asdict(summary.header), **{name: getattr(summary, name) for name in names}, "loads": loads}


def _print(file: Path, summary: TraceSummary) -> None:
    header, tokens = summary.header, summary.prefill_tokens + summary.decode_tokens
    typer.echo(
        f"{file}: {header.model}, {len(header.layers)} MoE layers of {header.num_experts} experts, top {header.top_k}, "
        f"hidden size {header.hidden_size}"
    )
    rate = f", {tokens / summary.duration_s:.1f} a second" if summary.duration_s else ""
    typer.echo(
        f"{summary.num_steps} intervals in {summary.duration_s:.1f} s: {tokens} tokens, {summary.prefill_tokens} of "
        f"prompts and {summary.decode_tokens} generated{rate}"
    )
    if summary.imbalance is None or summary.interval_imbalance is None:
        return
    typer.echo(
        f"a layer's busiest expert has {summary.imbalance:.2f} times the mean load, "
        f"{summary.interval_imbalance:.2f} times within an interval"
    )
    table = Table("expert", "chosen by")
    for key, part in summary.hottest(_SHOWN_EXPERTS):
        table.add_row(str(key), f"{part:.1%}")
    Console().print(table)
