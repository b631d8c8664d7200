"""One layer of textbook expert parallelism beside our dispatch over links, without Ray, interleaved, medians.

Two ranks that hold half of the experts and half of the tokens each, over Gloo (`kernels/expert_parallel.py`), and a
worker that holds all tokens with two shards of half of the experts each. The same experts, the same tokens, the same
cores. "experts" is what the busier rank or shard computed, "way" the rest: there and back, sorting and summing, and,
where both ranks take part in every exchange, waiting for each other. The two sides compute experts with kernels of
their own (ours packed), so the ways are what is to be compared.

usage: python -m benchmarks.make_checkpoint DIR --small
       python -m benchmarks.expert_parallel DIR [--tokens 2,8,32,256] [--link shared] [--keep]
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.distribution import _address, _asked, _busy_s, _open, _shard, _start
from benchmarks.record import keep

RANKS = 2
Times = tuple[float, float]  # seconds in all, and in the experts of the busier rank or shard
Ask = Callable[[int, int], Times]  # of a number of tokens and the number of the round
_WARM_UP = 3
_TIMEOUT = timedelta(seconds=120)


def main() -> int:
    """Time them in turns and print a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", default="2,8,32,256", help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--capacity-factor", type=float, default=1.25, help="of equal splits; 0: exact ones alone")
    parser.add_argument("--link", default="shared", help="kind of link, shared, local or gloo")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    factors = {"exact": None, **({"equal": arguments.capacity_factor} if arguments.capacity_factor else {})}
    with tempfile.TemporaryDirectory() as folder:
        sides = _start_sides(arguments.checkpoint, arguments.link, factors, f"{folder}/store")
        rows: list[dict[str, Any]] = []
        print(f"{'ms a layer':>10} | " + " | ".join(f"{name:>32}" for name in sides))
        for tokens in map(int, arguments.tokens.split(",")):
            rows.append({"tokens": tokens, **_time(sides, tokens, arguments.rounds)})
            cells = (
                f"{m['total_ms']:7.2f} experts {m['experts_ms']:6.2f} way {m['way_ms']:6.2f}"
                for name, m in rows[-1].items()
                if name != "tokens"
            )
            print(f"{tokens:>10} | " + " | ".join(cells), flush=True)
    if arguments.keep:
        asked = {name: getattr(arguments, name) for name in ("rounds", "capacity_factor", "link")}
        print(f"kept in {keep('expert-parallel', {**asked, 'rows': rows})}")
    return 0


def _start_sides(checkpoint: Path, link: str, factors: dict[str, float | None], store: str) -> dict[str, Ask]:
    """Start all processes; return what runs a layer on each side and answers with its seconds."""
    shards = [_start(_shard, 1, checkpoint, index, RANKS, 1, link, False, policy="PASSIVE") for index in range(RANKS)]
    ports = [pipe.recv() for pipe in shards]
    worker = _start(_worker, 1, checkpoint, ports, link, policy="PASSIVE")
    ranks = [_start(_rank, 1, checkpoint, rank, store, policy="PASSIVE") for rank in range(RANKS)]
    for pipe in (worker, *ranks):
        pipe.recv()
    sides: dict[str, Ask] = {f"links ({link})": partial(_ask_worker, worker, shards)}
    return sides | {
        f"all-to-all, {splits} splits": partial(_ask_ranks, ranks, splits, factor) for splits, factor in factors.items()
    }


def _time(sides: dict[str, Ask], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Run a layer on each side in turns; return the medians of each."""
    times: dict[str, list[Times]] = {name: [] for name in sides}
    for number in range(rounds + _WARM_UP):
        for name, ask in sides.items():
            times[name].append(ask(tokens, number))
    return {name: _medians(found[_WARM_UP:]) for name, found in times.items()}


def _medians(times: list[Times]) -> dict[str, float]:
    """Return medians, in ms, of what took so many seconds in all and in the experts."""
    return {
        "total_ms": 1e3 * statistics.median(total_s for total_s, _ in times),
        "experts_ms": 1e3 * statistics.median(experts_s for _, experts_s in times),
        "way_ms": 1e3 * statistics.median(total_s - experts_s for total_s, experts_s in times),
    }


def _ask_worker(worker: Connection, shards: list[Connection], tokens: int, number: int) -> Times:
    before_s = _busy_s(shards)
    worker.send((tokens, number))
    total_s: float = worker.recv()
    return total_s, max(after - before for after, before in zip(_busy_s(shards), before_s, strict=True))


def _ask_ranks(ranks: list[Connection], splits: str, factor: float | None, tokens: int, number: int) -> Times:
    for pipe in ranks:
        pipe.send((tokens, number, splits, factor))
    found: list[Times] = [pipe.recv() for pipe in ranks]
    return max(total_s for total_s, _ in found), max(experts_s for _, experts_s in found)


def _batch(tokens: int, number: int, hidden: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """Return hidden states, choices and weights of all tokens: the same in every process."""
    generator = torch.Generator().manual_seed(number)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids_TK = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    return hidden_TH, ids_TK, torch.rand(tokens, top_k, generator=generator)


def _worker(pipe: Connection, threads: int, checkpoint: Path, ports: list[int], kind: str) -> None:
    """The worker's process: runs a layer as the pipe asks, and answers with its seconds."""
    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import WORKER_RANK
    from expertmesh.actors.worker.dispatcher import Dispatcher
    from expertmesh.actors.worker.fleet import Fleet
    from expertmesh.actors.worker.step import Step
    from expertmesh.cluster.dispatch_hash import token_keys
    from expertmesh.models.describe import describe_model

    torch.set_num_threads(threads)
    weights, placement = _open(checkpoint, len(ports))
    info, config = describe_model(weights.architecture), weights.architecture.config
    dispatcher = Dispatcher(info.moe_layers, info.num_experts, recovery_s=0)
    links = {
        slots.shard: open_link(kind, _address(port, WORKER_RANK), torch.device("cpu"))
        for slots, port in zip(placement.shards, ports, strict=True)
    }
    dispatcher.set_fleet(Fleet(placement, links))
    pipe.send("ready")
    for tokens, number in _asked(pipe):
        batch = _batch(tokens, number, config.hidden_size, info.num_experts, info.top_k)
        keys_T = token_keys(np.full(tokens, number, dtype=np.uint64), np.arange(tokens))
        dispatcher.begin_step(Step(number), keys_T, np.ones(tokens, dtype=np.bool_))
        started_s = time.perf_counter()
        dispatcher.run(info.moe_layers[number % len(info.moe_layers)], *batch)
        pipe.send(time.perf_counter() - started_s)


def _rank(pipe: Connection, threads: int, checkpoint: Path, rank: int, store: str) -> None:
    """A rank's process: runs its part of a layer, and answers with its seconds in all and in its experts."""
    import torch.distributed as dist

    from expertmesh.kernels.expert_parallel import ExpertParallelLayer
    from expertmesh.models.describe import describe_model

    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=_TIMEOUT)
    weights, _ = _open(checkpoint, 1)
    info, config = describe_model(weights.architecture), weights.architecture.config
    parts = _parts(weights, info, rank)
    spent_s = [0.0]
    run_experts = ExpertParallelLayer._run_experts

    def timed(layer: ExpertParallelLayer, *values: torch.Tensor) -> torch.Tensor:
        started_s = time.perf_counter()
        out = run_experts(layer, *values)
        spent_s[0] = time.perf_counter() - started_s
        return out

    ExpertParallelLayer._run_experts = timed  # type: ignore[method-assign,assignment]
    pipe.send("ready")
    for tokens, number, splits, factor in _asked(pipe):
        slots, math = parts[info.moe_layers[number % len(info.moe_layers)]]
        layer = ExpertParallelLayer(
            slots=slots, math=math, num_experts=info.num_experts, capacity_factor=factor, splits=splits
        )
        batch = _batch(tokens, number, config.hidden_size, info.num_experts, info.top_k)
        mine = [part[rank::RANKS] for part in batch]
        dist.barrier()
        started_s = time.perf_counter()
        with torch.no_grad():
            layer.run(*mine)
        pipe.send((time.perf_counter() - started_s, spent_s[0]))


def _parts(weights, info, rank: int):  # type: ignore[no-untyped-def]
    """Read a rank's experts of each layer, as one tensor for each parameter."""
    from expertmesh.cluster.ids import ExpertKey
    from expertmesh.kernels.grouped_mlp import SlotWeights
    from expertmesh.models.architecture import expert_math

    num_slots, parts = info.num_experts // RANKS, {}
    for layer in info.moe_layers:
        read = [weights.load_expert(ExpertKey(layer, e)) for e in range(rank * num_slots, (rank + 1) * num_slots)]
        up_SUH, down_SHW = (torch.stack([e[name] for e in read]) for name in ("gate_up_proj", "down_proj"))
        module = weights.architecture.experts_by_layer[layer]
        parts[layer] = (SlotWeights(up_SUH=up_SUH, down_SHW=down_SHW), expert_math(module))
    return parts


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
