"""How long an hour of traffic takes to simulate: deepseek-v3 (58 layers of 256 experts) on 144 GPUs; wanted: 2 minutes.

One core. 36,000 steps of 10,000 tokens, Zipf 0.8. The loops that follow the load look every 15 and 300 s there, not
every 3 and 30 s as in a server: their own time, which is that of the server's code, would be most of it. The second
case has the server's periods for as long as --minutes. The third has 1,024 GPUs, even popularity and no looks: one
plan of the balancer takes minutes at that size. Times are of the processor.

usage: OPENBLAS_NUM_THREADS=1 python -m benchmarks.simulate [--minutes N] [--json] [--keep]
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.record import keep
from expertmesh.actors.cli import plan_files, simulate_files
from expertmesh.cluster.load_following import LoadFollower
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.simulator import simulate
from expertmesh.cluster.simulation.step_time import StepClock

WANTED_S = 120.0
RATE = 100_000.0


def main() -> int:
    """Time the cases, print and return 1 if the hour took longer than wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of traffic of the second and third case")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    part_s = arguments.minutes * 60
    cases = {
        "hour": case(144, 3600.0, weights_period_s=15.0, rebalance_period_s=300.0),
        "server's periods": case(144, part_s, weights_period_s=3.0, rebalance_period_s=30.0),
        "1024 GPUs": case(1024, part_s, weights_period_s=0.0, rebalance_period_s=0.0, skew=0.0),
    }
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
                f"    balancedness {found['balancedness']['mean']:.3f}, step p50 {found['step_s']['p50'] * 1e3:.2f} ms"
            )
    if arguments.keep:
        path = keep("simulate", result)
        if not arguments.json:
            print(f"kept in {path}")
    return int(cases["hour"]["processor_s"] > WANTED_S)


def case(
    num_gpus: int, duration_s: float, *, weights_period_s: float, rebalance_period_s: float, skew: float = 0.8
) -> dict[str, Any]:
    """Simulate, and return the figures and where the time went."""
    shape, machine = plan_files.load_shape("deepseek-v3"), plan_files.load_hardware("gb200-nvl72", num_gpus)
    plan = Plan(attention_tp=1, attention_dp=num_gpus, ep=num_gpus, expert_tp=1)
    clock = StepClock(shape, machine, plan, Workload(), find_format("fp8"))
    rate = simulate_files.read_rate(f"{RATE:g}")
    traffic = simulate_files.made_up(shape, rate, duration_s, skew=skew, topic_s=0.0, seed=0)
    settings = SimulationSettings(
        rack_shards=72, weights_period_s=weights_period_s, rebalance_period_s=rebalance_period_s
    )
    periods = {"weights_period_s": weights_period_s, "rebalance_period_s": rebalance_period_s}
    spent: Counter[str] = Counter()
    loops = {name: getattr(LoadFollower, name) for name in ("level", "rebalance")}
    start_s = time.process_time()
    for name, loop in loops.items():
        setattr(LoadFollower, name, timed(name, loop, spent))
    try:
        found = simulate(clock, traffic.layers, traffic.intervals(), settings, duration_s=duration_s)
    finally:
        for name, loop in loops.items():
            setattr(LoadFollower, name, loop)
    took_s = time.process_time() - start_s
    parts_s = {**{name: spent[name] / 1e9 for name in loops}, "steps and the rest": took_s - spent.total() / 1e9}
    return {**found.summary(), "virtual_s": duration_s, "processor_s": took_s, "parts_s": parts_s, "periods": periods}


def timed(name: str, loop: Callable[..., Any], spent: Counter[str]) -> Callable[..., Any]:
    """Return a look that adds up its nanoseconds."""

    def look(*arguments: Any) -> Any:
        start_ns = time.process_time_ns()
        try:
            return loop(*arguments)
        finally:
            spent[name] += time.process_time_ns() - start_ns

    return look


if __name__ == "__main__":
    sys.exit(main())
