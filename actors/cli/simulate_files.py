"""What `expertmesh simulate` reads: the plan, the rate, a trace or what is to be made up."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.actors.cli.trace import open_trace
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.planner import make_report
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.traffic import (
    Interval,
    Rate,
    at_rate,
    repeated,
    trace_intervals,
    zipf_intervals,
)
from expertmesh.cluster.traces import TraceHeader

_FIELDS = ("attention_tp", "attention_dp", "ep", "expert_tp", "pp", "instances")


def load_plan(text: str, shape: ModelShape, hardware: Hardware, workload: Workload, dtype: str) -> Plan:
    """Read a plan: `auto`, `ep`, fields like ep=16,attention_tp=2, or a file of them or of `expertmesh plan --json`.

    Raises:
        InputError: none of these, a field that is unknown or no number, or nothing to recommend.
    """
    if text == "auto":
        report = make_report(shape, hardware, workload, dtype)
        plans = (one.plan for one in report.candidates if one.is_feasible)
        found = next((p for p in plans if p.pp == p.instances == 1 and p.ep > 1), None)
        if found is None:
            raise InputError(f"--plan auto: no plan of one stage that spreads experts fits; {report.reason}")
        return replace(found, replicas=0)
    if text == "ep":
        return _plan("ep", {"ep": hardware.num_gpus})
    path = Path(text)
    if path.is_file():
        return _plan(text, _plan_in_file(path))
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value.strip().isdigit():
            raise InputError(f"--plan {text}: no such file, and {part!r} is not like ep=16; or auto, or ep")
        fields[name.strip()] = int(value)
    return _plan(text, fields)


def _plan_in_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--plan {path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--plan {path}: must hold fields by name, found {type(content).__name__}")
    if "plans" not in content:
        return content
    recommended = content.get("recommended")
    if not isinstance(recommended, int):
        raise InputError(f"--plan {path}: recommended is {recommended!r}; there is no plan to take")
    return {name: content["plans"][recommended][name] for name in _FIELDS}


def _plan(text: str, fields: dict[str, Any]) -> Plan:
    for name, value in fields.items():
        if name not in _FIELDS:
            raise InputError(f"--plan {text}: unknown field {name}; known are {', '.join(_FIELDS)}")
        if not isinstance(value, int) or value < 1:
            raise InputError(f"--plan {text}: {name}={value!r}; it must be a whole number, at least 1")
    values = {"attention_tp": 1, "expert_tp": 1, **fields}
    if "ep" not in values:
        raise InputError(f"--plan {text}: ep is missing")
    values.setdefault("attention_dp", max(1, values["ep"] * values["expert_tp"] // values["attention_tp"]))
    return Plan(**values)


def read_rate(text: str) -> Rate:
    """Read tokens a second: a number, or points "0:1000,3600:5000" of seconds and rates.

    Raises:
        InputError: something else, or a rate that `Rate` refuses.
    """
    points = []
    for part in text.split(","):
        time_s, separator, rate = part.rpartition(":")
        try:
            points.append((float(time_s) if separator else 0.0, float(rate)))
        except ValueError as error:
            raise InputError(f"--rate {text}: {part!r} is not like 5000, or 3600:5000") from error
    try:
        return Rate(points)
    except InputError as error:
        raise InputError(f"--{error}") from error


def read_sweep(text: str) -> tuple[int, ...]:
    """Read numbers of shards, and return them rising.

    Raises:
        InputError: something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--sweep {text}: it must be numbers of shards, like 16,32,64")
    return tuple(sorted({int(part) for part in parts}))


def require_plot(file: Path) -> None:
    """Refuse a plot's file that is named neither .png nor .svg.

    Raises:
        InputError: it is not.
    """
    if file.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {file}: a PNG or an SVG is drawn; name it .png or .svg")


class Traffic:
    """What is to be replayed, as often as it is asked for: layers of the model, seconds, intervals."""

    def __init__(self, layers: tuple[int, ...], duration_s: float, make: Callable[[], Iterator[Interval]]) -> None:
        self.layers, self.duration_s, self.intervals = layers, duration_s, make


def recorded(file: Path, shape: ModelShape, rate: Rate | None, duration_s: float | None) -> Traffic:
    """Open a trace of the model: at its own times and tokens, or at a rate; over and over if it is to last longer.

    Raises:
        InputError: it cannot be read, is empty, or of another model.
    """
    header = open_trace(file).header
    fits = len(header.layers) == shape.num_moe_layers
    model = TraceHeader(
        model=header.model,
        layers=header.layers if fits else _layers(shape),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
    )
    try:
        header.require(model)
    except InputError as error:
        raise InputError(f"--trace {file}: {error} ({shape.name})") from error
    length_s = tokens = 0.0
    for interval in trace_intervals(open_trace(file).steps()):
        length_s, tokens = interval.end_s, tokens + interval.tokens
    if not tokens:
        raise InputError(f"--trace {file}: it has no tokens")
    lasts_s = length_s if duration_s is None else duration_s
    if rate is not None:
        return Traffic(header.layers, lasts_s, lambda: at_rate(_repeated(file, lasts_s, keep_empty=False), rate))
    return Traffic(header.layers, lasts_s, lambda: _repeated(file, lasts_s, keep_empty=True))


def _repeated(file: Path, duration_s: float, *, keep_empty: bool) -> Iterator[Interval]:
    return repeated(
        lambda: (i for i in trace_intervals(open_trace(file).steps()) if keep_empty or i.tokens), duration_s
    )


def made_up(
    shape: ModelShape, rate: Rate | None, duration_s: float | None, *, skew: float, topic_s: float, seed: int
) -> Traffic:
    """Make up traffic of the model, an hour unless it is told.

    Raises:
        InputError: no rate, or a skew or time out of range.
    """
    if rate is None:
        raise InputError("--rate is needed with --zipf and --topics: tokens/s, or points like 0:1000,3600:5000")
    lasts_s = 3600.0 if duration_s is None else duration_s
    layers = _layers(shape)
    header = TraceHeader(
        model=shape.name,
        layers=layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
    )

    def make() -> Iterator[Interval]:
        return zipf_intervals(header, rate, skew=skew, topic_s=topic_s, duration_s=lasts_s, seed=seed)

    return Traffic(layers, lasts_s, make)


def _layers(shape: ModelShape) -> tuple[int, ...]:
    """Return indices of the layers with experts: the last ones, as checkpoints have them."""
    return tuple(range(shape.num_layers - shape.num_moe_layers, shape.num_layers))
