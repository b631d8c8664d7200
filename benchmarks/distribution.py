"""The price of being distributed: one engine with its experts in process, the same with them on shard processes.

No Ray and no gateway on either side: only the place of the experts differs. Interleaved rounds, sampled at
temperature 1.

With --workers the shards serve several engines at once, each with its part of the streams.

usage: python -m benchmarks.distribution CHECKPOINT [--batch 8,32] [--shards 2] [--expert-tp 1,2] [--breakdown] [--keep]
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.breakdown import Steps, table
from benchmarks.record import keep

PROMPT, NEW = 32, 64
HOST = "127.0.0.1"
# Of an engine's cache: more than any benchmark's streams need; pages that are not used take no memory.
_NUM_PAGES, _MAX_CONTEXT = 4096, 16384


def main() -> int:
    """Time both engines in turns and print the ratio of their rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--expert-tp", default="1", help="slices of an expert, such as 1 or 1,2: a fleet for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-threads", type=int, default=1)
    parser.add_argument("--link", default="shared", help="kind of link, shared, local or gloo")
    parser.add_argument("--no-pin", action="store_true", help="leave the shards' cores to the kernel")
    parser.add_argument("--breakdown", action="store_true", help="say where the time goes with shards")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    batches = [int(part) for part in arguments.batch.split(",")]
    cores, checkpoint = os.cpu_count() or 1, arguments.checkpoint
    # A process that has the cores to itself is fastest when its threads spin.
    engines = {"in process": [_start(_engine, cores, checkpoint, [], "", 0, policy="ACTIVE")]}
    shards: dict[str, list[Connection]] = {"in process": []}
    for expert_tp in map(int, arguments.expert_tp.split(",")):
        name = f"{arguments.shards} shards" + (f" of {expert_tp} slices an expert" if expert_tp > 1 else "")
        shards[name] = [_start_shard(arguments, index, expert_tp) for index in range(arguments.shards)]
        ports = [pipe.recv() for pipe in shards[name]]
        engines[name] = [
            _start(
                _engine,
                arguments.worker_threads,
                checkpoint,
                ports,
                arguments.link,
                number,
                expert_tp,
                policy="PASSIVE",
            )
            for number in range(arguments.workers)
        ]
    layers = {pipe.recv() for pipes in engines.values() for pipe in pipes}.pop()
    results: dict[int, dict[str, list[float]]] = {batch: {name: [] for name in engines} for batch in batches}
    tables: dict[tuple[int, str], list[dict[str, float]]] = {(b, name): [] for b in batches for name in engines}
    for number in range(arguments.rounds + 1):
        for batch, (name, pipes) in itertools.product(batches, engines.items()):
            rate, steps, expert_s = _decode(pipes, shards[name], batch, number * 1000 + batch, PROMPT, NEW)
            print(f"round {number}, batch {batch}, {name}: {rate:.1f} tokens/s", flush=True)
            if number:
                results[batch][name].append(rate)
                tables[batch, name].append(table(steps, layers, expert_s))
    rows = []
    for batch, apart in itertools.product(batches, list(engines)[1:]):
        here, there = (statistics.median(results[batch][name]) for name in ("in process", apart))
        parts = {part: statistics.median(t[part] for t in tables[batch, apart]) for part in tables[batch, apart][0]}
        rows.append(
            {"batch": batch, "fleet": apart, "in_process_tokens_per_s": here, "shards_tokens_per_s": there}
            | {"ratio": there / here, "us_a_layer": parts}
        )
        print(f"batch {batch}: in process {here:.1f}, {apart} {there:.1f} tokens/s, ratio {there / here:.2f}")
        if arguments.breakdown:
            print("  us a layer: " + ", ".join(f"{part} {us:.0f}" for part, us in parts.items()))
    if arguments.keep:
        settings = {
            name: getattr(arguments, name)
            for name in (
                "shards",
                "workers",
                "expert_tp",
                "rounds",
                "worker_threads",
                "shard_threads",
                "link",
                "no_pin",
            )
        }
        print(f"kept in {keep('distribution', {**settings, 'rows': rows})}")
    return 0


def _start_shard(arguments: argparse.Namespace, index: int, expert_tp: int) -> Connection:
    return _start(
        _shard,
        arguments.shard_threads,
        arguments.checkpoint,
        index,
        arguments.shards,
        arguments.workers,
        arguments.link,
        not arguments.no_pin,
        expert_tp,
        policy="PASSIVE",
    )


def _decode(
    pipes: list[Connection], shards: list[Connection], batch: int, seed: int, prompt: int, new: int
) -> tuple[float, Steps, float]:
    """Have engines decode, each its part of a batch of prompts and new tokens.

    Returns:
        Tokens a second of all, the first one's steps, and how long the busiest shard computed for all, in seconds.
    """
    parts = [len(range(number, batch, len(pipes))) for number in range(len(pipes))]
    asked = [(pipe, part) for pipe, part in zip(pipes, parts, strict=True) if part]
    for number, (pipe, part) in enumerate(asked):
        pipe.send((part, seed + 100 * number, prompt, new))
    for pipe, _ in asked:
        pipe.recv()  # the prompts are done
    before_s = _busy_s(shards)
    for pipe, _ in asked:
        pipe.send("decode")
    all_steps: list[Steps] = [pipe.recv() for pipe, _ in asked]
    spent_s = [after - before for after, before in zip(_busy_s(shards), before_s, strict=True)]
    for pipe, _ in asked:
        pipe.send("finish")
    for pipe, _ in asked:
        pipe.recv()
    return sum(steps.num_tokens / steps.wall_s for steps in all_steps), all_steps[0], max(spent_s, default=0.0)


def _busy_s(shards: list[Connection]) -> list[float]:
    """Return how long each shard has computed so far, in seconds."""
    for pipe in shards:
        pipe.send("busy_s")
    return [pipe.recv() for pipe in shards]


def _start(target, threads: int, *values, policy: str) -> Connection:  # type: ignore[no-untyped-def]
    """Start a process with its own OpenMP settings, and return our end of a pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(32 << 20)
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 30)
    os.environ["OMP_WAIT_POLICY"] = policy
    if policy == "ACTIVE":
        del os.environ["OMP_WAIT_POLICY"]
    context.Process(target=target, args=(theirs, threads, *values), daemon=True).start()
    return ours


def _asked(pipe: Connection) -> Iterator[Any]:
    """Yield what the other end sends, until it is gone."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def _shard(
    pipe: Connection,
    threads: int,
    checkpoint: Path,
    index: int,
    num_shards: int,
    num_workers: int,
    kind: str,
    pin: bool,
    expert_tp: int = 1,
) -> None:
    """One shard process: serves a link to each worker, and says how long it computed."""
    import torch

    from expertmesh.actors.cores import claim_cores, other_cores, use_cores
    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import SHARD_RANK
    from expertmesh.actors.links.rendezvous import RendezvousServer
    from expertmesh.actors.shard.server import ShardServer
    from expertmesh.kernels.cpu.threads import start_helpers
    from expertmesh.models.expert_slots import ExpertSlots

    torch.set_num_threads(threads)
    # Held as long as the process lives; fleets that are timed in turns may have the same cores.
    cores = claim_cores(threads, f"benchmark of {num_shards} by {expert_tp}") if pin else None
    if cores is not None:
        use_cores(None)
        start_helpers(min(threads, other_cores(cores)))
    use_cores(cores)
    weights, placement = _open(checkpoint, num_shards, expert_tp=expert_tp)
    slots = ExpertSlots(weights, placement.shards[index].experts, torch.device("cpu"))
    rendezvous = RendezvousServer(HOST)
    pipe.send(rendezvous.port)
    server = ShardServer(slots, placement.epoch)

    def serve(number: int) -> None:
        server.serve(open_link(kind, _address(rendezvous.port, SHARD_RANK, number), torch.device("cpu")))

    for number in range(num_workers):
        threading.Thread(target=serve, args=(number,), daemon=True).start()
    for _ in _asked(pipe):
        pipe.send(server.counted.busy_s)


def _engine(
    pipe: Connection,
    threads: int,
    checkpoint: Path,
    ports: list[int],
    kind: str,
    number: int,
    expert_tp: int = 1,
) -> None:
    """One engine process: runs batches that the pipe asks for, and answers with the Steps that decoded."""
    import torch

    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import WORKER_RANK
    from expertmesh.actors.worker import engine as engine_module
    from expertmesh.actors.worker.dispatcher import Dispatcher
    from expertmesh.actors.worker.engine import Engine
    from expertmesh.actors.worker.fleet import Fleet
    from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
    from expertmesh.cluster.scheduler import Scheduler, SchedulerConfig
    from expertmesh.kernels.cpu.linear import PackedLinear
    from expertmesh.kernels.cpu.threads import set_num_threads
    from expertmesh.models import hooks
    from expertmesh.models.expert_slots import ExpertSlots
    from expertmesh.models.runners import PagedRunner

    set_num_threads(threads)
    torch.set_num_threads(max(1, threads // 2))
    timers = {"head": _timed(PackedLinear, "__call__"), "sample": _timed(engine_module, "sample")}
    cpu = torch.device("cpu")
    weights, placement = _open(checkpoint, max(1, len(ports)), expert_tp=expert_tp)
    architecture = weights.architecture
    dispatcher = Dispatcher(architecture.moe_layers, weights.num_slices, expert_tp=expert_tp, recovery_s=0)
    if ports:
        links = {
            slots.shard: open_link(kind, _address(port, WORKER_RANK, number), cpu)
            for slots, port in zip(placement.shards, ports, strict=True)
        }
        run: Callable[..., torch.Tensor] = dispatcher.run
        dispatcher.set_fleet(Fleet(placement, links))
    else:
        local = ExpertSlots(weights, placement.shards[0].experts, cpu)

        def run_here(layer: int, hidden: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(ids.shape[0]).repeat_interleave(ids.shape[1])
            slots = local.layer(layer)
            assert slots is not None
            slot_P = slots.slots_of(ids.flatten())
            assert slot_P is not None
            return slots.run(hidden, rows, slot_P, topk_weights.flatten().float()).to(hidden.dtype)

        run = run_here

    model = weights.load_dense(cpu)
    hooks.attach_experts(architecture.experts_by_layer, run, dispatcher if ports else None)
    runner = PagedRunner(model, 16, cpu)
    runner.allocate(_NUM_PAGES)
    config = SchedulerConfig(
        max_batch_tokens=2048, max_sequences=256, num_pages=_NUM_PAGES, page_size=16, max_context=_MAX_CONTEXT
    )
    events: list[TokenEvent] = []
    engine = Engine(Scheduler(config), runner, max_queue=256, begin_step=dispatcher.begin_step, on_events=events.extend)
    pipe.send(len(architecture.moe_layers))
    for batch, seed, prompt, new in _asked(pipe):
        rng = random.Random(seed)
        vocab_size = architecture.config.vocab_size
        engine.submit(
            [
                SequenceRequest(
                    sequence_id=f"{seed}-{i}",
                    prompt_ids=tuple(rng.randrange(vocab_size) for _ in range(prompt)),
                    sampling=SamplingParams(max_tokens=new, temperature=1.0, seed=seed + i),
                )
                for i in range(batch)
            ]
        )
        while len({event.sequence_id for event in events}) < batch:
            engine.step()
        pipe.send("prompted")
        pipe.recv()
        before = _seconds(dispatcher, timers)
        started_s, first, steps = time.perf_counter(), len(events), 0
        while engine.num_running == batch:
            engine.step()
            steps += 1
        wall_s = time.perf_counter() - started_s
        parts_s = {part: after - before[part] for part, after in _seconds(dispatcher, timers).items()}
        pipe.send(Steps(num_steps=steps, num_tokens=len(events) - first, wall_s=wall_s, parts_s=parts_s))
        pipe.recv()
        while engine.num_running:  # those whose prompts were done last
            engine.step()
        events.clear()
        pipe.send("finished")


def _timed(owner: Any, name: str) -> list[float]:
    """Time every call of owner.name from now on; return where its seconds are added up."""
    function: Callable[..., Any] = getattr(owner, name)
    total_s = [0.0]

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            total_s[0] += time.perf_counter() - started_s

    setattr(owner, name, timed)
    return total_s


def _seconds(dispatcher: Any, timers: dict[str, list[float]]) -> dict[str, float]:
    from expertmesh.kernels.cpu.stack import PARTS

    compiled = dict(zip(PARTS, dispatcher.spent_s.tolist(), strict=True))
    return compiled | {part: total_s[0] for part, total_s in timers.items()}


def _open(checkpoint: Path, num_shards: int, dtype: str = "auto", expert_tp: int = 1):  # type: ignore[no-untyped-def]
    from expertmesh.cluster.ids import ShardId
    from expertmesh.cluster.placement import initial_placement
    from expertmesh.models.architecture import open_architecture
    from expertmesh.models.loading import CheckpointWeights

    weights = CheckpointWeights(open_architecture(checkpoint, dtype), expert_tp)
    architecture = weights.architecture
    shards = [ShardId(f"shard-{i}") for i in range(num_shards)]
    return weights, initial_placement(architecture.moe_layers, weights.num_slices, shards, 1, epoch=1)


def _address(port: int, rank: int, number: int = 0):  # type: ignore[no-untyped-def]
    from expertmesh.actors.links.ends import LinkAddress

    return LinkAddress(
        host=HOST, port=port, name=f"bench-{number}", generation=1, rank=rank, interface=HOST, timeout_s=60
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
