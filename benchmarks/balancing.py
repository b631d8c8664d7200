"""The balancer from scratch and after a change of topic, beside a greedy baseline with even split.

The baseline is this file's own short form of the method of EPLB (github.com/deepseek-ai/EPLB): replicate the expert
with the largest load for each replica, pack replicas largest first where there is most room, split evenly. It may put
two replicas of an expert on one shard, and promises no second replica.

With 256 experts on 32 shards of 9 slots a perfect balance is possible for any load (see cluster/packing.py); what ours
lacks of it is the rounding of weights to 1/4096.

usage: python -m benchmarks.balancing [--layers N] [--json] [--keep]

Shape suffixes: L layers, E experts, S shards, R replicas in all slots of a layer.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.record import keep
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.balancer import balance, rebalance
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, ShardFacts
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement

NUM_EXPERTS, NUM_SHARDS, SLOTS_A_LAYER = 256, 32, 9
EXPONENTS = (1.0, 1.2, 1.4, 1.6)
EXPERT_BYTES = 3 * 7168 * 2048  # DeepSeek-V3, 8-bit weights
WINDOW_S, HORIZON_S, EXPERT_TIME_S = 300, 300, 100
EXAMPLE_LE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EXAMPLE_PUBLISHED_LR = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
T = TypeVar("T")


def main() -> int:
    """Measure the parts and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    shape = {"layers": arguments.layers, "experts": NUM_EXPERTS, "shards": NUM_SHARDS, "slots": SLOTS_A_LAYER}
    result = {
        "shape": shape,
        "public_example": example(),
        "from_scratch": [from_scratch(arguments.layers, exponent, 1) for exponent in EXPONENTS],
        "from_scratch_two_replicas": [from_scratch(arguments.layers, exponent, 2) for exponent in EXPONENTS],
        "topic_switch": [row for exponent in EXPONENTS for row in topic_switch(arguments.layers, exponent)],
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            ", ".join(f"{count} {name}" for name, count in shape.items()) + " a shard and layer (two replicas: twice)"
        )
        for name, rows in result.items():
            if isinstance(rows, list):
                print_table(name, rows)
    if arguments.keep:
        path = keep("balancing", result)
        print(f"kept in {path}", file=sys.stderr)
    return 0


def example() -> list[Row]:
    """EPLB's worked example: the largest GPU load by layer, with even split and with weights."""
    load_LE = np.array(EXAMPLE_LE, dtype=np.float64)
    placement = balance(load_LE, fleet(8, 4), layers=range(2), num_experts=12, epoch=0)
    even = Placement(epoch=0, num_experts=12, layers=(0, 1), shards=placement.shards)
    published_LS = [even_load_S(load_LE[layer], np.array(EXAMPLE_PUBLISHED_LR[layer]), 8) for layer in range(2)]
    largest = {
        "published, even split": np.max(published_LS, axis=1),
        "ours, even split": shard_load_LS(load_LE, even).max(axis=1),
        "ours, weights": shard_load_LS(load_LE, placement).max(axis=1),
        "mean: nobody can be below": load_LE.sum(axis=1) / 8,
    }
    return [{"placement": name, "layer 0": two[0], "layer 1": two[1]} for name, two in largest.items()]


def from_scratch(num_layers: int, exponent: float, min_replicas: int) -> Row:
    """Ours and the baseline on one Zipf load; `whole` is what nobody can exceed with one replica an expert."""
    load_LE, shards = zipf(num_layers, exponent, seed=0), fleet(NUM_SHARDS, num_layers * SLOTS_A_LAYER * min_replicas)
    placement, ours_s = timed(
        lambda: balance(
            load_LE, shards, layers=range(num_layers), num_experts=NUM_EXPERTS, epoch=0, min_replicas=min_replicas
        )
    )
    baseline_LS, baseline_s = timed(lambda: greedy_LS(load_LE, SLOTS_A_LAYER * min_replicas))
    mean_L = load_LE.sum(axis=1) / NUM_SHARDS
    return {
        "exponent": exponent,
        "ours": balancedness(shard_load_LS(load_LE, placement)),
        "ours_s": ours_s,
        "greedy": balancedness(baseline_LS),
        "greedy_s": baseline_s,
        "whole": float(mean_L.sum() / np.maximum(load_LE.max(axis=1), mean_L).sum()),
    }


def topic_switch(num_layers: int, exponent: float) -> list[Row]:
    """Plans from a placement for one load to another load, under several caps, and from scratch."""
    shards = fleet(NUM_SHARDS, num_layers * SLOTS_A_LAYER)
    old_LE, new_LE = (zipf(num_layers, exponent, seed=seed) for seed in (0, 1))
    current = balance(old_LE, shards, layers=range(num_layers), num_experts=NUM_EXPERTS, epoch=0)
    rows: list[Row] = []
    for num_moves_a_layer in (5, 10, 20, 1000):
        settings = BalanceSettings(max_moves=num_moves_a_layer * num_layers)
        plan, plan_s = timed(partial(plan_for, current, new_LE, shards, settings))
        row: Row = {
            "exponent": exponent,
            "cap": num_moves_a_layer * num_layers,
            "before": plan.balancedness_before,
            "after": plan.balancedness_after,
            "moves": len(plan.moves),
            "GB": plan.bytes_moved / 1e9,
            "cost_s": plan.cost_s,
            "plan_s": plan_s,
        }
        rows.append(row)
    again = plan_for(plan.placement, new_LE, shards, settings)
    rows[-1]["again"] = "proposed" if again.is_worthwhile else "declined"
    scratch = balance(new_LE, shards, layers=range(num_layers), num_experts=NUM_EXPERTS, epoch=1)
    moves = len(replicas(scratch) - replicas(current))
    return [*rows, {"exponent": exponent, "cap": "scratch", "moves": moves, "GB": moves * EXPERT_BYTES / 1e9}]


def plan_for(current: Placement, load_LE: Floats, shards: list[ShardFacts], settings: BalanceSettings) -> BalancePlan:
    """Plan under this benchmark's sizes and times."""
    return rebalance(
        current,
        load_LE,
        shards,
        epoch=current.epoch + 1,
        expert_bytes=EXPERT_BYTES,
        expert_time_s=EXPERT_TIME_S,
        window_s=WINDOW_S,
        horizon_s=HORIZON_S,
        settings=settings,
    )


def replicas(placement: Placement) -> set[tuple[ShardId, ExpertKey]]:
    """Return each (shard, expert) of a placement."""
    return {(slots.shard, key) for slots in placement.shards for key in slots.experts}


def greedy_LS(load_LE: Floats, num_slots: int) -> Floats:  # noqa: N802
    """Return the loads of the baseline's placement: greedy replication, greedy packing, even split."""
    load_LS = np.zeros((len(load_LE), NUM_SHARDS))
    for layer, load_E in enumerate(load_LE):
        count_E = np.ones(NUM_EXPERTS)
        for _ in range(NUM_SHARDS * num_slots - NUM_EXPERTS):
            count_E[(load_E / count_E).argmax()] += 1
        piece_R = np.sort(np.repeat(load_E / count_E, count_E.astype(np.int64)))[::-1]
        used_S = np.zeros(NUM_SHARDS, dtype=np.int64)
        for piece in piece_R:
            shard = np.where(used_S < num_slots, load_LS[layer], np.inf).argmin()
            load_LS[layer, shard] += piece
            used_S[shard] += 1
    return load_LS


def even_load_S(load_E: Floats, expert_R: npt.NDArray[np.int64], num_shards: int) -> Floats:  # noqa: N802
    """Return the shards' loads when the slots, shard after shard, hold these experts and replicas share evenly."""
    piece_R = load_E[expert_R] / np.bincount(expert_R)[expert_R]
    return np.asarray(piece_R.reshape(num_shards, -1).sum(axis=1))


def zipf(num_layers: int, exponent: float, *, seed: int) -> Floats:
    """Return a million tokens a layer by Zipf's law, the experts' ranks permuted in each layer."""
    random = np.random.default_rng(seed)
    share_E = np.arange(1, NUM_EXPERTS + 1) ** -exponent
    return np.array([random.permutation(1e6 * share_E / share_E.sum()) for _ in range(num_layers)])


def fleet(num_shards: int, num_slots: int) -> list[ShardFacts]:
    """Return equal shards, 8 (of 8 shards: 4) a node that is also a domain."""
    size = max(num_shards // 4, 4)
    return [
        ShardFacts(shard=ShardId(f"s{i}"), num_slots=num_slots, node=f"n{i // size}", domain=f"d{i // size}")
        for i in range(num_shards)
    ]


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what a call returns and its processor seconds."""
    started_s = time.process_time()
    value = call()
    return value, time.process_time() - started_s


def print_table(title: str, rows: list[Row]) -> None:
    """Print rows with the columns of all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    widths = [max(len(name), *(len(cell(row.get(name, ""))) for row in rows)) for name in names]
    print(f"\n{title}\n" + "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for row in rows:
        cells = (f"{cell(row.get(name, '')):>{width}}" for name, width in zip(names, widths, strict=True))
        print("  ".join(cells), flush=True)


def cell(value: object) -> str:
    """Return a value as it stands in a table."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
