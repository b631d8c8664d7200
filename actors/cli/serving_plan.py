"""`serve --plan`: what a kind of plan, a file or the planner says, put into the settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expertmesh.actors.cli.configuration import complaint
from expertmesh.actors.cli.plan_files import load_shape, this_machine
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.fleet_cost import fleet_choices
from expertmesh.cluster.serving_plan import KINDS, read_plan, slices_of
from expertmesh.cluster.settings import ServeSettings

AUTO = "auto"
_TOKENS = 8  # sequences that decode at once, for which `auto` compares
# Steps that differ by less are alike: the median error of predictions (docs/planner.md). Then fewer slices are simpler.
_ERROR = 0.065


def with_plan(settings: ServeSettings, plan: str, say: Callable[[str], None]) -> ServeSettings:
    """Return the settings with what a plan decides.

    Args:
        settings: of everything else; shards and workers stay unless the plan is a file.
        plan: "auto", one of KINDS, or a file that `expertmesh plan --json` printed.
        say: told what was chosen and why.

    Raises:
        InputError: no such plan, or one that is not served; with "auto", this machine was not measured.
    """
    if plan == AUTO:
        return _with(settings, {"expert_tp": _fastest(settings, say)})
    if plan in KINDS or not Path(plan).exists():
        return _with(settings, {"expert_tp": slices_of(plan, settings.shards)})
    found = read_plan(plan, _read(Path(plan)))
    say(f"plan of {plan}: {found}")
    members = {"shards": found.shards, "workers": found.workers}
    return _with(settings, {**members, "replicas": found.replicas, "expert_tp": found.expert_tp})


def _fastest(settings: ServeSettings, say: Callable[[str], None]) -> int:
    """Return the fewest slices whose predicted step is as short as any, as far as predictions can tell."""
    hardware = this_machine()
    if hardware is None:
        raise InputError("--plan auto: this machine was not measured; run `expertmesh doctor --measure` first")
    workers, shards = settings.workers, settings.shards
    shape = load_shape(str(settings.model))
    choices = fleet_choices(shape, hardware, num_workers=workers, num_shards=shards, tokens=_TOKENS)
    shortest_s = min(cost.step_s for cost in choices.values())
    best = min(number for number, cost in choices.items() if cost.step_s <= shortest_s * (1 + _ERROR))
    predicted = ", ".join(f"{cost.step_s * 1e3:.3g} ms with expert_tp={number}" for number, cost in choices.items())
    say(f"plan auto: expert_tp={best}; a step of {_TOKENS} sequences is predicted to take {predicted}")
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"plan {path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"plan {path}: must hold a JSON object, found {type(content).__name__}")
    return content


def _with(settings: ServeSettings, changes: dict[str, int]) -> ServeSettings:
    try:
        return ServeSettings(**{**settings.model_dump(), **changes})
    except ValidationError as error:
        raise InputError(complaint(error.errors()[0])) from error
