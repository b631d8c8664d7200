"""`expertmesh simulate`: a fleet in virtual time, on recorded or made-up routing."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from expertmesh.actors.cli import plan_files, simulate_files, simulate_text
from expertmesh.actors.cli.client import JsonOption
from expertmesh.cluster.autoscaler import ShardTierSettings, WorkerTierSettings
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.calibration import calibrate
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.hardware import complaint
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.settings import AutoscaleSettings
from expertmesh.cluster.simulation.faults import read_faults
from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.simulator import simulate as run
from expertmesh.cluster.simulation.step_time import StepClock
from expertmesh.cluster.simulation.sweep import Point, point

_HELP_FAIL = "What fails when, as 600:shard-3 or 600:rack-1; may be given often."


def simulate(
    hardware: Annotated[str, typer.Option(help="YAML file, shipped machine (plan --list), or this-machine.")],
    plan: Annotated[str, typer.Option(help="auto, ep, fields like ep=16,attention_tp=2, or a file of them.")] = "auto",
    model: Annotated[str, typer.Option(help="Checkpoint directory, config.json, or card.")] = "deepseek-v3",
    gpus: Annotated[int | None, typer.Option(help="GPUs, in place of what the hardware says.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A recording to replay.", metavar="FILE")] = None,
    zipf: Annotated[float | None, typer.Option(help="Make traffic up; exponent of experts' popularity.")] = None,
    topics: Annotated[float | None, typer.Option(help="Made up: other experts are hot after so many seconds.")] = None,
    rate: Annotated[str | None, typer.Option(help="Tokens/s, or points like 0:1000,3600:5000.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Default: the trace's, or an hour.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp8 or nvfp4.")] = "fp8",
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    phase: Annotated[Literal["decode", "prefill"], typer.Option(help="What tokens are.")] = "decode",
    overlap: Annotated[float, typer.Option(help="Part of computing that hides communication, 0 to 1.")] = 0.0,
    calibration: Annotated[Path | None, typer.Option(help="JSON of measured constants.", metavar="FILE")] = None,
    replicas: Annotated[int, typer.Option(help="Shards that hold each expert.")] = 1,
    spare_slots: Annotated[float, typer.Option(help="Room for more replicas, as a part of the slots.")] = 0.125,
    weights_period_s: Annotated[float, typer.Option(help="Between looks at dispatch weights; 0: never.")] = 3.0,
    rebalance_period_s: Annotated[float, typer.Option(help="Between looks at replicas; 0: never.")] = 30.0,
    pace_s: Annotated[float, typer.Option(help="Steps begin so far apart; 0: one after the other.")] = 0.1,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of a step, of one copy of attention.")] = 1024,
    fail: Annotated[list[str] | None, typer.Option(help=_HELP_FAIL)] = None,
    rack_shards: Annotated[int | None, typer.Option(help="Shards of a rack; default: of the innermost links.")] = None,
    notice_s: Annotated[float, typer.Option(help="Until a dead shard is noticed.")] = 0.2,
    restart_s: Annotated[float, typer.Option(help="Until a dead shard is back.")] = 20.0,
    no_restart: Annotated[bool, typer.Option("--no-restart", help="The dead do not come back.")] = False,
    start_s: Annotated[float, typer.Option(help="Until a new shard is ready.")] = 20.0,
    checkpoint_gb_s: Annotated[float, typer.Option(help="Reading the checkpoint, GB/s a shard.")] = 1.0,
    min_shards: Annotated[int, typer.Option(help="Fewest shards of the autoscaler.")] = 1,
    max_shards: Annotated[int | None, typer.Option(help="Most shards; with it the autoscaler runs.")] = None,
    target_utilisation: Annotated[float, typer.Option(help="What the autoscaler aims at.")] = 0.7,
    down_delay_s: Annotated[float, typer.Option(help="How long it waits before it shrinks.")] = 300.0,
    sweep: Annotated[str | None, typer.Option(help="Run with each of these numbers of shards: 16,32,64.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a name ending in .png or .svg.", metavar="FILE")] = None,
) -> None:
    """Replay routing through the real placement and balancing, in virtual time, against the planner's cost model."""
    if (trace is None) == (zipf is None and topics is None):
        raise InputError("one of --trace FILE, and --zipf S or --topics SECONDS, is needed")
    if duration_s is not None and not 0 < duration_s <= 31 * 86400:
        raise InputError(f"--duration-s is {duration_s:g}; it must be above 0, and at most 31 days")
    if seed < 0:
        raise InputError(f"--seed is {seed}, and cannot be negative")
    if plot is not None:
        simulate_files.require_plot(plot)
    machine = plan_files.load_hardware(hardware, gpus)
    measured = plan_files.load_calibration(hardware, calibration)
    machine = machine if measured is None else calibrate(machine, measured)
    shape = plan_files.load_shape(model)
    workload = _checked(Workload, context=context, phase=phase, overlap=overlap)
    chosen = simulate_files.load_plan(plan, shape, machine, workload, dtype)
    offered = None if rate is None else simulate_files.read_rate(rate)
    if trace is not None:
        traffic = simulate_files.recorded(trace, shape, offered, duration_s)
    else:
        skew = 1.0 if zipf is None else zipf
        traffic = simulate_files.made_up(shape, offered, duration_s, skew=skew, topic_s=topics or 0.0, seed=seed)
    domain = machine.tiers[0].domain_size // chosen.expert_tp if machine.tiers else 1
    settings = _checked(
        SimulationSettings,
        pace_s=pace_s,
        max_batch_tokens=max_batch_tokens,
        replicas=replicas,
        spare_slots=spare_slots,
        weights_period_s=weights_period_s,
        rebalance_period_s=rebalance_period_s,
        rack_shards=max(1, domain) if rack_shards is None else rack_shards,
        notice_s=notice_s,
        restart_s=None if no_restart else restart_s,
        start_s=start_s,
        copying={"checkpoint_bytes_per_s": checkpoint_gb_s * 1e9},
        autoscale=_autoscale(min_shards, max_shards, target_utilisation, down_delay_s),
    )
    clock = StepClock(shape, machine, chosen, workload, find_format(dtype))
    if max_shards is not None:
        clock.require(max_shards, "--max-shards")

    def once(clock: StepClock, what: str) -> Result:
        rack = settings.rack_shards
        faults = read_faults(fail or (), num_shards=clock.plan.ep, rack_shards=rack, duration_s=traffic.duration_s)
        with _progress(traffic.duration_s, what) as on_progress:
            return run(
                clock,
                traffic.layers,
                traffic.intervals(),
                settings,
                duration_s=traffic.duration_s,
                faults=faults,
                seed=seed,
                on_progress=on_progress,
            )

    if sweep is not None:
        _sweep(clock, simulate_files.read_sweep(sweep), once, as_json, plot)
        return
    result = once(clock, "simulating")
    if plot is not None:
        # Here, not above: matplotlib is an extra, and takes a second to import.
        from expertmesh.actors.cli.simulate_plot import draw

        draw(plot, result)
    if as_json:
        typer.echo(json.dumps({**simulate_text.about(clock), **point(clock, result).as_dict(), **result.as_dict()}))
    else:
        simulate_text.print_result(clock, result)


def _sweep(
    clock: StepClock,
    counts: tuple[int, ...],
    once: Callable[[StepClock, str], Result],
    as_json: bool,
    plot: Path | None,
) -> None:
    clocks = [clock.resized(count) for count in counts]
    points: list[Point] = [point(one, once(one, f"{one.plan.ep} shards")) for one in clocks]
    if plot is not None:
        from expertmesh.actors.cli.simulate_plot import draw_sweep

        draw_sweep(plot, points)
    if as_json:
        typer.echo(json.dumps({**simulate_text.about(clock), **simulate_text.sweep_facts(points)}))
    else:
        simulate_text.print_sweep(clock, points)


def _autoscale(
    min_shards: int, max_shards: int | None, target_utilisation: float, down_delay_s: float
) -> AutoscaleSettings | None:
    if max_shards is None:
        return None
    shards = _checked(
        ShardTierSettings,
        min_count=min_shards,
        max_count=max_shards,
        target_utilisation=target_utilisation,
        down_delay_s=down_delay_s,
    )
    return AutoscaleSettings(shards=shards, workers=WorkerTierSettings(max_count=1))


def _checked(kind: Any, **values: Any) -> Any:
    """Make settings; what is wrong with a field is told by the name of its option."""
    try:
        return kind(**values)
    except ValidationError as error:
        option = complaint(error).replace("copying.checkpoint_bytes_per_s", "checkpoint-gb-s")
        option = option.replace("min_count", "min-shards").replace("max_count", "max-shards")
        name, separator, rest = option.partition(":")
        raise InputError(f"--{name.replace('_', '-')}{separator}{rest}") from error


@contextmanager
def _progress(duration_s: float, what: str) -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=duration_s)
        yield lambda now_s: progress.update(task, completed=now_s)
