"""The price of deterministic mode: tokens/s of prefill and of decoding, with it and without it, on shard processes.

Two engines with shards of their own, in turns. No Ray and no gateway. Sampled at temperature 1. That the deterministic
engine's tokens are those of one stream by itself is checked in passing.

usage: python -m benchmarks.deterministic CHECKPOINT [--streams 1,8,32] [--prompt 512] [--rounds 3] [--keep]
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.distribution import HOST, _address, _asked, _open, _start
from benchmarks.record import keep

PROMPT, NEW = 32, 32
MODES = {"off": False, "on": True}


def main() -> int:
    """Time both engines in turns and print their rates and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt whose prefill is timed")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    # Prompt tokens, new tokens, streams. The rate of a prefill counts prompt tokens, that of decoding the new ones.
    cases = {f"prefill {arguments.prompt}": (arguments.prompt, 1, 1)}
    cases |= {f"decode {n}": (PROMPT, NEW, int(n)) for n in arguments.streams.split(",")}
    engines = {name: _start_engine(arguments, mode) for name, mode in MODES.items()}
    rates: dict[str, dict[str, list[float]]] = {case: {name: [] for name in engines} for case in cases}
    tokens: dict[tuple[str, int], Any] = {}
    for number in range(arguments.rounds + 1):
        for case, sizes in cases.items():
            for name, pipe in engines.items():
                pipe.send((*sizes, number))
                rate, first_tokens = pipe.recv()
                print(f"round {number}, {case}, deterministic {name}: {rate:.1f} tokens/s", flush=True)
                if number:  # the first round warms up
                    rates[case][name].append(rate)
                if name == "on" and sizes[1] > 1:
                    assert tokens.setdefault(("tokens", number), first_tokens) == first_tokens, f"{case}: other tokens"
    rows = []
    for case in cases:
        off, on = (statistics.median(rates[case][name]) for name in engines)
        rows.append({"case": case, "off_tokens_per_s": off, "on_tokens_per_s": on, "ratio": on / off})
        print(f"{case}: without {off:.1f}, with {on:.1f} tokens/s, ratio {on / off:.2f}")
    if arguments.keep:
        settings = {name: getattr(arguments, name) for name in ("shards", "rounds", "dtype")}
        print(f"kept in {keep('deterministic', {**settings, 'rows': rows})}")
    return 0


def _start_engine(arguments: argparse.Namespace, deterministic: bool) -> Connection:
    """Start an engine and its shards; return the pipe to the engine once it is ready."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    common = (arguments.checkpoint, arguments.dtype, deterministic)
    shards = [_start(_shard, 1, *common, i, arguments.shards, policy="PASSIVE") for i in range(arguments.shards)]
    ports = [pipe.recv() for pipe in shards]
    engine = _start(_engine, threads, *common, ports, policy="PASSIVE")
    engine.recv()
    return engine


def _shard(
    pipe: Connection, threads: int, checkpoint: Path, dtype: str, deterministic: bool, index: int, num_shards: int
) -> None:
    """One shard process: serves the link of its engine."""
    import torch

    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import SHARD_RANK
    from expertmesh.actors.links.rendezvous import RendezvousServer
    from expertmesh.actors.shard.server import ShardServer
    from expertmesh.models.deterministic import deterministic_math
    from expertmesh.models.expert_slots import ExpertSlots

    torch.set_num_threads(threads)
    weights, placement = _open(checkpoint, num_shards, dtype)
    slots = ExpertSlots(weights, placement.shards[index].experts, torch.device("cpu"))
    rendezvous = RendezvousServer(HOST)
    pipe.send(rendezvous.port)
    link = open_link("shared", _address(rendezvous.port, SHARD_RANK), torch.device("cpu"))
    with deterministic_math() if deterministic else contextlib.nullcontext():
        ShardServer(slots, placement.epoch).serve(link)


def _engine(
    pipe: Connection, threads: int, checkpoint: Path, dtype: str, deterministic: bool, ports: list[int]
) -> None:
    """One engine process: runs what the pipe asks for; answers with the rate and the first stream's tokens."""
    import torch

    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import WORKER_RANK
    from expertmesh.actors.worker.dispatcher import Dispatcher
    from expertmesh.actors.worker.engine import Engine
    from expertmesh.actors.worker.fleet import Fleet
    from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
    from expertmesh.cluster.scheduler import Scheduler, SchedulerConfig
    from expertmesh.models import hooks
    from expertmesh.models.deterministic import deterministic_math
    from expertmesh.models.runners import PagedRunner

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    weights, placement = _open(checkpoint, len(ports), dtype)
    architecture = weights.architecture
    dispatcher = Dispatcher(architecture.moe_layers, architecture.num_experts, recovery_s=0, by_pair=deterministic)
    peers = zip(placement.shards, ports, strict=True)
    links = {slots.shard: open_link("shared", _address(port, WORKER_RANK), cpu) for slots, port in peers}
    dispatcher.set_fleet(Fleet(placement, links))
    model = weights.load_dense(cpu)
    hooks.attach_experts(architecture.experts_by_layer, dispatcher.run)
    events: list[TokenEvent] = []
    config = SchedulerConfig(max_batch_tokens=2048, max_sequences=256, num_pages=512, page_size=16, max_context=2048)
    with deterministic_math() if deterministic else contextlib.nullcontext():
        runner = PagedRunner(model, 16, cpu, deterministic=deterministic)
        runner.allocate(config.num_pages)
        engine = Engine(
            Scheduler(config), runner, max_queue=256, begin_step=dispatcher.begin_step, on_events=events.extend
        )
        pipe.send("ready")
        for prompt, new, streams, seed in _asked(pipe):
            rng = random.Random(f"{prompt} {seed}")
            vocab_size = architecture.config.vocab_size
            engine.submit(
                [
                    SequenceRequest(
                        sequence_id=f"{i}",
                        prompt_ids=tuple(rng.randrange(vocab_size) for _ in range(prompt)),
                        sampling=SamplingParams(max_tokens=new, temperature=1.0, seed=i),
                    )
                    for i in range(streams)
                ]
            )
            started_s = time.perf_counter()
            engine.step()
            counted = prompt * streams
            if new > 1:
                started_s, counted = time.perf_counter(), streams * (new - 1)
            while engine.num_running or engine.num_waiting:
                engine.step()
            wall_s = time.perf_counter() - started_s
            pipe.send((counted / wall_s, [event.token_id for event in events if event.sequence_id == "0"]))
            events.clear()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
