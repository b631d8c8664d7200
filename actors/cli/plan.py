"""`expertmesh plan`: which parallelism, on which hardware, and why."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from expertmesh.actors.cli import plan_files, plan_kubernetes, plan_text
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.calibration import calibrate
from expertmesh.cluster.planner.hardware import complaint
from expertmesh.cluster.planner.planner import REPLICAS, make_report
from expertmesh.cluster.planner.validation import validate
from expertmesh.cluster.planner.workload import Workload


def plan(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory, config.json, or card; see --list.")] = None,
    hardware: Annotated[str, typer.Option(help="YAML file, shipped machine (--list), or this-machine.")] = "hgx-h100",
    gpus: Annotated[int | None, typer.Option(help="GPUs, in place of what the hardware says.")] = None,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step, of all GPUs together.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bf16, fp8 or nvfp4.")] = "bf16",
    phase: Annotated[
        Literal["decode", "prefill"], typer.Option(help="decode: a token of each sequence. prefill: of prompts.")
    ] = "decode",
    skew: Annotated[float, typer.Option(help="Zipf's exponent of experts' popularity; 0: uniform.")] = 0.6,
    replicas: Annotated[
        int | None, typer.Option(help="Slots for replicas of hot experts, a rank and layer; else 0 and 1 are tried.")
    ] = None,
    overlap: Annotated[float, typer.Option(help="Part of computing that hides communication, 0 to 1.")] = 0.0,
    slo_itl_ms: Annotated[float | None, typer.Option(help="Longest step that is wanted, milliseconds.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="JSON of measured constants, in place of the hardware's.", metavar="FILE")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print every plan, those that cannot run too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    kubernetes: Annotated[
        bool, typer.Option(help="Print worker groups of the best plan that is served, as a patch for k8s/overlays/gpu.")
    ] = False,
    gpus_per_pod: Annotated[int, typer.Option(help="With --kubernetes: GPUs of a host, which a pod takes whole.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Draw the best plans' steps.", metavar="FILE.svg")] = None,
    check: Annotated[bool, typer.Option("--validate", help="Compare the model with published figures.")] = False,
    show_known: Annotated[bool, typer.Option("--list", help="Name the shipped cards and machines.")] = False,
) -> None:
    """Weigh every way to spread a model over some hardware, and recommend one."""
    if show_known:
        typer.echo(f"cards: {', '.join(plan_files.card_names())}")
        typer.echo(f"machines: {', '.join(plan_files.machine_names())}, {plan_files.THIS_MACHINE}")
        return
    if check:
        checks = validate(plan_files.shipped_shapes(), plan_files.shipped_machines())
        if as_json:
            typer.echo(json.dumps(plan_text.checks_as_dicts(checks)))
        else:
            plan_text.print_checks(checks)
        return
    if as_json and kubernetes:
        raise InputError("--json and --kubernetes are two ways to print: give one")
    if model is None:
        raise InputError("MODEL is missing: a checkpoint directory, a config.json, or a card; --list names the cards")
    if replicas is not None and replicas < 0:
        raise InputError(f"--replicas is {replicas}, and cannot be negative")
    machine = plan_files.load_hardware(hardware, gpus)
    measured = plan_files.load_calibration(hardware, calibration)
    if measured is not None:
        machine = calibrate(machine, measured)
    report = make_report(
        plan_files.load_shape(model),
        machine,
        _workload(tokens_per_step, context, phase, skew, overlap, slo_itl_ms),
        dtype,
        replicas=REPLICAS if replicas is None else (replicas,),
    )
    if plot is not None:
        # Here, not above: matplotlib is an extra, and takes a second to import.
        from expertmesh.actors.cli.plan_plot import draw

        draw(plot, report)
    if kubernetes:
        plan_kubernetes.print_groups(report, gpus_per_pod)
        return
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        plan_text.print_report(report, show_all=show_all)
    if report.recommended is None:
        raise typer.Exit(1)


def _workload(
    tokens_per_step: int,
    context: int,
    phase: Literal["decode", "prefill"],
    skew: float,
    overlap: float,
    slo_ms: float | None,
) -> Workload:
    try:
        return Workload(
            tokens_per_step=tokens_per_step,
            context=context,
            phase=phase,
            skew=skew,
            overlap=overlap,
            slo_itl_s=None if slo_ms is None else slo_ms / 1e3,
        )
    except ValidationError as error:
        option = complaint(error).replace("slo_itl_s", "slo_itl_ms").replace("_", "-")
        raise InputError(f"--{option}") from error
