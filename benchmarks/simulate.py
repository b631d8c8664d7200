"""How long an hour of traffic takes to simulate: deepseek-v3 (58 layers of 256 experts) on 144 GPUs; wanted: 2 minutes.

One core, the server's own looks: every 3 s at dispatch weights, every 30 s at replicas. 10 steps a second of 10,000
tokens, Zipf 0.8. The second case has 1,024 GPUs, of which a rack of 72 fails and comes back, for as long as --minutes:
how long each look took there is what a controller of such a fleet would need. Times are of the processor.

usage: OPENBLAS_NUM_THREADS=1 python -m benchmarks.simulate [--minutes N] [--only 144|1024] [--json] [--keep]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.record import keep
from expertmesh.actors.cli import plan_files, simulate_files
from expertmesh.cluster.load_following import LoadFollower
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.faults import Fault
from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.simulator import simulate
from expertmesh.cluster.simulation.step_time import StepClock

WANTED_S = 120.0
LEVEL = 0.9  # a fleet is level again from when its balancedness stays above this
RATE = 100_000.0


def main() -> int:
    """Time the cases, print and return 1 if the hour on 144 GPUs took longer than wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of traffic of the second case")
    parser.add_argument("--only", choices=["144", "1024"], help="one of the cases")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {}
    if arguments.only != "1024":
        cases["144 GPUs"] = case(144, 3600.0, spare_slots=0.125, fail_s=None)
    if arguments.only != "144":
        # Two slots a layer and shard: with 256 experts on 1,024 shards an eighth of the slots would be none.
        cases["1024 GPUs"] = case(1024, arguments.minutes * 60, spare_slots=7.0, fail_s=arguments.minutes * 30)
    result = {"cases": cases, "wanted_s": WANTED_S}
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, found in cases.items():
            parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in found["parts_s"].items())
            print(
                f"{name}: {found['steps']} steps of {found['virtual_s']:.0f} s in {found['processor_s']:.1f} s: {parts}"
            )
            print(
                f"    balancedness {found['balancedness']['mean']:.3f}, step {found['step_s']['p50'] * 1e3:.2f} ms, "
                f"longest look {found['longest_s']}, level after {found['level_after_s']}"
            )
    if arguments.keep:
        path = keep("simulate", result)
        if not arguments.json:
            print(f"kept in {path}")
    return int("144 GPUs" in cases and cases["144 GPUs"]["processor_s"] > WANTED_S)


def case(num_gpus: int, duration_s: float, *, spare_slots: float, fail_s: float | None) -> dict[str, Any]:
    """Simulate, and return the figures and where the time went."""
    shape, machine = plan_files.load_shape("deepseek-v3"), plan_files.load_hardware("gb200-nvl72", num_gpus)
    plan = Plan(attention_tp=1, attention_dp=num_gpus, ep=num_gpus, expert_tp=1)
    clock = StepClock(shape, machine, plan, Workload(), find_format("fp8"))
    rate = simulate_files.read_rate(f"{RATE:g}")
    traffic = simulate_files.made_up(shape, rate, duration_s, skew=0.8, topic_s=0.0, seed=0)
    settings = SimulationSettings(rack_shards=72, spare_slots=spare_slots)
    faults = () if fail_s is None else (Fault(at_s=fail_s, kind="rack", number=1),)
    spent: dict[str, list[int]] = {name: [0] for name in ("level", "rebalance")}
    loops = {name: getattr(LoadFollower, name) for name in spent}
    start_s = time.process_time()
    for name, loop in loops.items():
        setattr(LoadFollower, name, timed(loop, spent[name]))
    try:
        found = simulate(clock, traffic.layers, traffic.intervals(), settings, duration_s=duration_s, faults=faults)
    finally:
        for name, loop in loops.items():
            setattr(LoadFollower, name, loop)
    took_s = time.process_time() - start_s
    parts_s = {name: sum(times_ns) / 1e9 for name, times_ns in spent.items()}
    rest_s = took_s - sum(parts_s.values())
    return {
        **found.summary(),
        "virtual_s": duration_s,
        "processor_s": took_s,
        "parts_s": {**parts_s, "steps and the rest": rest_s},
        "longest_s": {name: max(times_ns) / 1e9 for name, times_ns in spent.items()},
        "median_s": {name: sorted(times_ns)[len(times_ns) // 2] / 1e9 for name, times_ns in spent.items()},
        "level_after_s": level_after_s(found, [0.0] if fail_s is None else [0.0, fail_s]),
        "periods": {"weights_period_s": settings.weights_period_s, "rebalance_period_s": settings.rebalance_period_s},
    }


def level_after_s(found: Result, from_s: list[float]) -> list[float]:
    """Return how long after each of these times the balancedness was above LEVEL for good, until the next of them."""
    after = []
    for begin_s, end_s in zip(from_s, [*from_s[1:], found.duration_s], strict=True):
        uneven = [s.time_s for s in found.samples if begin_s <= s.time_s < end_s and s.balancedness < LEVEL]
        after.append(max(uneven, default=begin_s) - begin_s)
    return after


def timed(loop: Callable[..., Any], times_ns: list[int]) -> Callable[..., Any]:
    """Return a look that notes its nanoseconds."""

    def look(*arguments: Any) -> Any:
        start_ns = time.process_time_ns()
        try:
            return loop(*arguments)
        finally:
            times_ns.append(time.process_time_ns() - start_ns)

    return look


if __name__ == "__main__":
    sys.exit(main())
