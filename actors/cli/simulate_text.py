"""How `expertmesh simulate` prints: the figures, what happened, the table of a sweep."""

from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.step_time import StepClock
from expertmesh.cluster.simulation.sweep import KNEE, Point, gain_per_doubling, knee, point

_SHOWN_EVENTS = 20
_PIPE_WIDTH = 160
_MEANWHILE_S = 60.0  # after a failure: how long its steps are told apart


def about(clock: StepClock) -> dict[str, Any]:
    """Return what was simulated, as JSON has it."""
    plan = clock.plan
    names = ("attention_tp", "attention_dp", "ep", "expert_tp")
    return {
        "model": clock.shape.name,
        "hardware": clock.hardware.name,
        "dtype": clock.form.name,
        "plan": {name: getattr(plan, name) for name in names},
    }


def print_result(clock: StepClock, result: Result) -> None:
    """Print a simulation for people."""
    facts, found = result.summary(), point(clock, result)
    _print_about(clock)
    steps, wait_s = facts["step_s"], facts["mean_wait_s"]
    if steps:
        times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in steps.items())
        typer.echo(f"{facts['steps']} steps in {result.duration_s:.0f} s; milliseconds of a step: {times}")
    typer.echo(
        f"{result.offered} tokens offered, {result.served} served ({facts['tokens_per_s']:.0f}/s), {result.left} left; "
        f"steps run for {facts['busy']:.0%} of the time ({found.tokens_per_s_per_gpu:.0f} tokens/s a GPU while they do)"
    )
    typer.echo(
        f"a token waits {wait_s * 1e3:.1f} ms for its step; at most {facts['queue_max_tokens']} wait; "
        f"for {result.behind_s:.1f} s steps left some to the next"
    )
    balance, shards = facts["balancedness"], facts["shards"]
    typer.echo(
        f"balancedness {balance['mean']:.3f} (lowest {balance['min']:.3f}); {shards['min']} to {shards['max']} shards "
        f"of {result.slots} slots"
    )
    typer.echo(
        f"{facts['moves']} experts copied behind the traffic, {facts['moved_bytes'] / 1e9:.1f} GB in "
        f"{facts['moving_s']:.1f} s; dispatch weights changed {result.weight_changes} times"
    )
    _print_memory(found)
    _print_events(result)


def _print_about(clock: StepClock) -> None:
    plan, machine = clock.plan, clock.hardware
    typer.echo(f"{clock.shape.name}, {clock.form.name}, on {plan.num_gpus} GPUs of {machine.name}: {plan}")


def _print_memory(found: Point) -> None:
    if found.short_of_bytes > 0:
        typer.echo(f"it does not fit by {found.short_of_bytes / 1e9:.1f} GB a GPU: fewer slots, or more shards")


def _print_events(result: Result) -> None:
    for event in result.events[:_SHOWN_EVENTS]:
        copied = f": {event.num_experts} experts, {event.num_bytes / 1e9:.1f} GB" if event.num_experts else ""
        took = f" in {event.seconds:.2f} s" if event.seconds else ""
        typer.echo(f"{event.time_s:10.1f} s  {event.kind:8} {event.text}{copied}{took}")
        if event.kind == "failure":
            meanwhile = result.step_percentiles(event.time_s, event.time_s + _MEANWHILE_S)
            times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in meanwhile.items())
            typer.echo(f"{'':12}  {'':8} steps stood still for {event.seconds:.2f} s; the next minute's, ms: {times}")
    if len(result.events) > _SHOWN_EVENTS:
        typer.echo(f"{len(result.events) - _SHOWN_EVENTS} later events are not shown; --json has them all")


def sweep_facts(points: Sequence[Point]) -> dict[str, Any]:
    """Return a sweep as JSON has it: `points`, and `knee`, the shards beyond which a doubling does not pay."""
    return {"points": [one.as_dict() for one in points], "knee": knee(points).shards}


def print_sweep(clock: StepClock, points: Sequence[Point]) -> None:
    """Print the table of a sweep."""
    typer.echo(f"{clock.shape.name}, {clock.form.name}, on GPUs of {clock.hardware.name}, by the number of shards")
    columns = ("shards", "GPUs", "step ms p50", "p99", "shorter a doubling", "tokens/s", "tokens/s a GPU")
    table = Table(*columns, "balancedness", "moves", "slots", "lacks GB", "tokens left")
    before: Point | None = None
    for one in points:
        gain = "-" if before is None else f"{gain_per_doubling(before, one):.1%}"
        table.add_row(
            *(str(one.shards), str(one.gpus), f"{one.step_p50_s * 1e3:.2f}", f"{one.step_p99_s * 1e3:.2f}", gain),
            *(f"{one.tokens_per_s:.0f}", f"{one.tokens_per_s_per_gpu:.0f}", f"{one.balancedness:.3f}"),
            *(str(one.moves), str(one.slots), f"{one.short_of_bytes / 1e9:.1f}", str(one.tokens_left)),
        )
        before = one
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)
    found = knee(points)
    if found is points[-1]:
        typer.echo(f"every step up to {found.shards} shards pays: at least {KNEE:.0%} shorter a doubling")
    else:
        typer.echo(
            f"the knee is at {found.shards} shards: beyond it a doubling shortens the step by less than {KNEE:.0%}"
        )
