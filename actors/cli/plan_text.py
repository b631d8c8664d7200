"""How `expertmesh plan` prints: plans, why others cannot run, the recommended step by part; the validation table."""

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from expertmesh.cluster.planner.planner import Candidate, Report
from expertmesh.cluster.planner.validation_check import YES, Check

_SHOWN = 15
_PIPE_WIDTH = 220
_WIDE = 170  # columns of a terminal that all of the table needs
_COLUMNS = (
    "attention",
    "experts",
    "PP",
    "copies",
    "slots",
    "weights GB",
    "KV GB",
    "tokens a rank",
    "tokens an expert",
    "dispatch MB",
    "combine MB",
    "all-reduce MB",
    "dispatch us",
    "expert us",
    "step ms",
    "tokens/s",
    "bound by",
    "verdict",
)
_ALWAYS = ("attention", "experts", "PP", "copies", "slots", "weights GB", "step ms", "tokens/s", "bound by")
_TEXT_COLUMNS = ("attention", "experts", "bound by", "verdict")


def print_report(report: Report, *, show_all: bool) -> None:
    """Print a report for people. Bytes are of a layer, of all ranks of a stage together."""
    console = _console()
    shape, machine, workload = report.shape, report.hardware, report.workload
    console.print(
        f"{shape.name}: {shape.total_params / 1e9:.1f} B parameters, {shape.active_params / 1e9:.1f} B of them compute "
        f"a token, {shape.routed_params / shape.total_params:.0%} are routed experts"
    )
    console.print(
        f"{machine.num_gpus} GPUs of {machine.name}, {report.dtype}, {workload.phase} of {workload.tokens_per_step} "
        f"tokens a step, context {workload.context}, skew {workload.skew:g}"
    )
    rows = report.as_dict()["plans"]
    feasible = [row for row in rows if row["feasible"]]
    shown = feasible if show_all else feasible[:_SHOWN]
    if shown:
        _print_plans(console, shown)
    if len(shown) < len(feasible):
        console.print(f"{len(feasible) - len(shown)} slower plans are not shown; --all prints them")
    _print_refused(console, report.candidates, show_all=show_all)
    if report.recommended is not None:
        _print_parts(console, rows[report.recommended])
    console.print(f"{'recommended' if report.recommended is not None else 'nothing recommended'}: {report.reason}")


def print_checks(checks: Sequence[Check]) -> None:
    """Print the validation table."""
    table = Table("what", "source says", "model", "ratio", "within", "", "note", title="The model beside its sources")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        table.add_row(
            check.what,
            "-" if check.said is None else _value(check, check.said),
            _value(check, check.model),
            "-" if check.ratio is None or check.unit == YES else f"{check.ratio:.2f}",
            f"{check.tolerance:.0%}" if check.tolerance else "-",
            _mark(check),
            check.note,
        )
    console = _console()
    console.print(table)
    for source in dict.fromkeys(check.source for check in checks):
        console.print(f"source: {source}", highlight=False)
    claimed = [check.is_met for check in checks if check.is_met is not None]
    console.print(f"{sum(claimed)} of {len(claimed)} are met, {len(claimed) - sum(claimed)} missed")


def checks_as_dicts(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the table as JSON can hold it."""
    return [
        {
            "group": check.group,
            "what": check.what,
            "said": check.said,
            "model": check.model,
            "unit": check.unit,
            "ratio": check.ratio,
            "tolerance": check.tolerance,
            "met": check.is_met,
            "source": check.source,
            "note": check.note,
        }
        for check in checks
    ]


def _console() -> Console:
    """Return one as wide as the terminal; what goes to a file or a pipe is not wrapped."""
    console = Console()
    return console if console.is_terminal or console.width > _PIPE_WIDTH else Console(width=_PIPE_WIDTH)


def _value(check: Check, value: float) -> str:
    if check.unit == YES:
        return "yes" if value else "no"
    return f"{value:.4g} {check.unit}"


def _mark(check: Check) -> str:
    return {None: "", True: "met", False: "[red]MISSED[/red]"}[check.is_met]


def _print_plans(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    shown = [column for column in _COLUMNS if console.width >= _WIDE or column in _ALWAYS]
    table = Table()
    for column in shown:
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right")
    for row in rows:
        values = (
            f"TP{row['attention_tp']} DP{row['attention_dp']}",
            f"EP{row['ep']} TP{row['expert_tp']}",
            str(row["pp"]),
            str(row["instances"]),
            str(row["replicas"]),
            f"{row['weight_bytes_per_gpu'] / 1e9:.1f}",
            f"{row['kv_bytes_per_gpu'] / 1e9:.2f}",
            f"{row['tokens_per_rank']:.4g}",
            f"{row['tokens_per_expert']:.3g}",
            f"{row['dispatch_bytes_per_layer'] / 1e6:.3g}",
            f"{row['combine_bytes_per_layer'] / 1e6:.3g}",
            f"{row['all_reduce_bytes_per_layer'] / 1e6:.3g}",
            f"{row['dispatch_s'] * 1e6:.0f}",
            f"{row['expert_s'] * 1e6:.0f}",
            f"{row['step_s'] * 1e3:.2f}",
            f"{row['tokens_per_s']:.0f}",
            row["bound_by"],
            row["verdict"],
        )
        named = dict(zip(_COLUMNS, values, strict=True))
        table.add_row(*(named[column] for column in shown))
    console.print(table)
    if len(shown) < len(_COLUMNS):
        console.print(f"{len(_COLUMNS) - len(shown)} columns more in {_WIDE} characters' width, or with --json")


def _print_refused(console: Console, candidates: Sequence[Candidate], *, show_all: bool) -> None:
    """Print why plans cannot run: all of them, or one of each kind, the nearest first."""
    refused = [one for one in candidates if one.why_not is not None]
    if show_all:
        for one in refused:
            console.print(f"cannot run: {one.plan}: {one.why_not}", highlight=False)
        return
    kinds: dict[str, list[Candidate]] = {}
    for one in refused:
        assert one.why_not is not None
        kinds.setdefault(re.sub(r"[0-9.]+", "N", one.why_not), []).append(one)
    for members in kinds.values():
        console.print(
            f"{len(members)} plans cannot run, such as {members[0].plan}: {members[0].why_not}", highlight=False
        )


def _print_parts(console: Console, row: dict[str, Any]) -> None:
    parts = sorted(row["parts_s"].items(), key=lambda part: -part[1])
    text = ", ".join(f"{what} {seconds * 1e3:.2f}" for what, seconds in parts if seconds > 0)
    console.print(f"milliseconds of its step: {text}", highlight=False)
    if row["dispatch_bytes_per_layer"]:
        console.print(
            f"dispatch of a layer: {row['dispatch_bytes_per_layer'] / 1e6:.3g} MB leave their rank; were each "
            f"token sent everywhere, {row['dispatch_dense_bound_bytes_per_layer'] / 1e6:.3g} MB; busiest rank "
            f"{row['imbalance']:.2f} of the mean",
            highlight=False,
        )
