"""The step that the planner predicts for a fleet on this machine, beside the step measured; experts whole and sliced.

First `expertmesh doctor --measure` times cores, links and an engine's step, from which alone the prediction follows
(cluster/planner/fleet_cost.py). Then the engine of benchmarks.distribution, without Ray, decodes on all fleets of
shards in turns; or, with --through serve, `expertmesh bench serve` measures one server after another.

usage: python -m benchmarks.predicted CHECKPOINT [--batch 1,8,32] [--shards 2,4] [--rounds 3] [--through serve] [--keep]
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.breakdown import table
from benchmarks.distribution import NEW, PROMPT, _decode, _engine, _shard, _start
from benchmarks.record import keep
from expertmesh.actors.cli.measure import QUIET_CORES, measure
from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.actors.cli.plan_files import load_shape, this_machine
from expertmesh.cluster.planner.fleet_cost import FleetStepCost, fleet_step_cost
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape

WANTED = 0.25  # median of the errors


@dataclass(frozen=True)
class Fleet:
    """Shards of one worker, and the slices of an expert."""

    num_shards: int
    expert_tp: int

    def __str__(self) -> str:
        return f"{self.num_shards} shards, {'whole experts' if self.expert_tp == 1 else f'{self.expert_tp} slices'}"


def main() -> int:
    """Measure the machine, predict, measure the fleets, print the errors; 1 if their median is above what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--shards", default="2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--through", choices=["engine", "serve"], default="engine", help="what is measured")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    batches = [int(part) for part in arguments.batch.split(",")]
    fleets = [Fleet(num, tp) for num in map(int, arguments.shards.split(",")) for tp in (1, num)]
    measured = measure(Sizes(), lambda doing: print(f"measuring {doing}", flush=True))
    hardware = this_machine()
    assert hardware is not None, "measured, and not found"
    print(
        f"measured in {measured.seconds:.0f} s, {measured.hardware_file}, others used {measured.others_cores:.2f} cores"
    )
    if measured.others_cores > QUIET_CORES:
        parser.exit(2, "the machine is not quiet: nothing follows from its times\n")
    shape = load_shape(str(arguments.checkpoint))
    if arguments.through == "engine":
        steps = _engine_steps(arguments.checkpoint, fleets, batches, arguments.rounds, shape.num_moe_layers)
    else:
        steps = _served_steps(arguments.checkpoint, fleets, batches, arguments.rounds)
    rows = [_row(shape, hardware, *case, steps[case]) for case in itertools.product(fleets, batches)]
    median_error = _print(arguments.through, rows)
    if arguments.keep:
        result = {"through": arguments.through, "rounds": arguments.rounds, "rows": rows, "median_error": median_error}
        print(f"kept in {keep('predicted', {**result, 'hardware': hardware.model_dump(mode='json')})}")
    return int(median_error > WANTED)


def _row(shape: ModelShape, hardware: Hardware, fleet: Fleet, batch: int, measured: dict[str, float]) -> dict[str, Any]:
    cost: FleetStepCost = fleet_step_cost(
        shape,
        hardware,
        num_workers=1,
        num_shards=fleet.num_shards,
        expert_tp=fleet.expert_tp,
        tokens=batch,
        context=PROMPT + NEW // 2,
    )
    return {
        "fleet": str(fleet),
        "batch": batch,
        "predicted_ms": 1e3 * cost.step_s,
        "measured_ms": 1e3 * measured["step_s"],
        "error": cost.step_s / measured["step_s"] - 1,
        "predicted_us_a_layer": {part: 1e6 * s / shape.num_moe_layers for part, s in cost.parts_s.items()},
        "measured_us_a_layer": {part: us for part, us in measured.items() if part != "step_s"},
    }


def _print(through: str, rows: list[dict[str, Any]]) -> float:
    """Print the table; return the median error."""
    print(f"\n{through + ':':<26} {'batch':>5} {'predicted ms':>13} {'measured ms':>12} {'error':>7}")
    for row in rows:
        print(
            f"{row['fleet']:<26} {row['batch']:>5} {row['predicted_ms']:>13.1f} {row['measured_ms']:>12.1f} "
            f"{row['error']:>+7.0%}"
        )
    errors: list[float] = [abs(row["error"]) for row in rows]
    print(f"median of the errors {statistics.median(errors):.1%}, largest {max(errors):.1%}, wanted {WANTED:.0%}")
    return statistics.median(errors)


def _engine_steps(
    checkpoint: Path, fleets: list[Fleet], batches: list[int], rounds: int, num_layers: int
) -> dict[tuple[Fleet, int], dict[str, float]]:
    """Return the median step of each fleet and batch, with its parts in microseconds a layer."""
    found: dict[tuple[Fleet, int], list[dict[str, float]]] = {(f, b): [] for f in fleets for b in batches}
    with contextlib.ExitStack() as stack:
        engines = {fleet: stack.enter_context(_fleet(checkpoint, fleet)) for fleet in fleets}
        for number in range(rounds + 1):
            for batch in batches:
                for fleet, (engine, shards) in engines.items():
                    _, steps, expert_s = _decode([engine], shards, batch, number * 1000 + batch, PROMPT, NEW)
                    step_s = steps.wall_s / steps.num_steps
                    print(f"round {number}, {fleet}, batch {batch}: {1e3 * step_s:.1f} ms a step", flush=True)
                    if number:
                        found[fleet, batch].append({"step_s": step_s, **table(steps, num_layers, expert_s)})
    return {
        case: {part: statistics.median(one[part] for one in times) for part in times[0]}
        for case, times in found.items()
    }


@contextlib.contextmanager
def _fleet(checkpoint: Path, fleet: Fleet) -> Iterator[tuple[Connection, list[Connection]]]:
    """Run shards and an engine; their pipes' ends tell them to end."""
    num, slices, cores = fleet.num_shards, fleet.expert_tp, os.cpu_count() or 1
    threads = max(1, cores // num)
    kinds = (checkpoint, num, 1, "shared")
    shards = [
        _start(_shard, threads, kinds[0], index, *kinds[1:], True, slices, policy="PASSIVE") for index in range(num)
    ]
    ports = [pipe.recv() for pipe in shards]
    engine = _start(_engine, cores, checkpoint, ports, "shared", 0, slices, policy="PASSIVE")
    try:
        engine.recv()
        yield engine, shards
    finally:
        for pipe in (engine, *shards):
            pipe.close()


def _served_steps(
    checkpoint: Path, fleets: list[Fleet], batches: list[int], rounds: int
) -> dict[tuple[Fleet, int], dict[str, float]]:
    """Return the step of each fleet and batch as `expertmesh bench serve` sees it: a batch over its tokens a second."""
    found: dict[tuple[Fleet, int], dict[str, float]] = {}
    for fleet in fleets:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "fleet.toml"
            config.write_text(f"expert_tp = {fleet.expert_tp}\n")
            command = [sys.executable, "-m", "expertmesh.actors.cli.main", "bench", "serve", str(checkpoint), "--json"]
            command += ["--shards", str(fleet.num_shards), "--config", str(config), "--rounds", str(rounds)]
            command += ["--batch", ",".join(map(str, batches)), "--prompt", str(PROMPT), "--new", str(NEW)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for row in json.loads(done.stdout)["batches"]:
            found[fleet, row["batch"]] = {"step_s": row["batch"] / row["decode_tokens_per_s"]}
            print(f"{fleet}, batch {row['batch']}: {row['decode_tokens_per_s']:.1f} tokens/s", flush=True)
    return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
