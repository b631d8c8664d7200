"""How fast experts come to a shard: a replica copied from another shard, and a shard's own reading at its start.

usage: python -m benchmarks.moving CHECKPOINT [--rounds N] [--keep]

Each expert is fetched over a link from a shard in another process and put in its layer; beside it, in turns, copies of
as many bytes from memory to memory that was used before, and to memory that is new, as an expert's is. A shard's start
is a process of its own: imports, then half of all experts read and packed; beside it, as many bytes of the files read.
Files are in memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.distribution import HOST, _address, _open, _start
from benchmarks.record import keep
from expertmesh.models.layer_weights import ExpertTensors

# What a process does that becomes a shard, as the shard's actor does it.
START = """
import json, sys, time
from pathlib import Path
import torch
from benchmarks.distribution import _open
from expertmesh.models.expert_slots import ExpertSlots
weights, placement = _open(Path(sys.argv[1]), 2)
opened_s = time.perf_counter()
slots = ExpertSlots(weights, placement.shards[0].experts, torch.device("cpu"))
loaded_s = time.perf_counter()
print(json.dumps([loaded_s - opened_s, slots.weight_bytes]))
"""


def main() -> int:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    replica = _replicas(arguments.checkpoint, arguments.rounds)
    print(
        f"a replica of one expert, {replica['bytes'] / 2**20:.1f} MiB: {replica['replica_s'] * 1e3:.2f} ms, of which "
        f"fetching {replica['fetch_s'] * 1e3:.2f}; a copy {replica['copy_s'] * 1e3:.2f} ms: "
        f"{replica['copy_s'] / replica['replica_s']:.2f} of its bandwidth (wanted 0.6); a copy to new memory "
        f"{replica['new_copy_s'] * 1e3:.2f} ms: {replica['new_copy_s'] / replica['replica_s']:.2f}"
    )
    start = _shard_start(arguments.checkpoint, arguments.rounds)
    ready_s, least_s = start["load_s"] + start["process_s"], start["read_s"] + start["process_s"]
    print(
        f"a shard of {start['bytes'] / 2**30:.2f} GiB ready after {ready_s:.2f} s: process and checkpoint "
        f"{start['process_s']:.2f}, experts {start['load_s']:.2f}; reading their bytes {start['read_s']:.2f}: "
        f"{ready_s / least_s:.2f} times process and reading (wanted at most 1.5)"
    )
    if arguments.keep:
        print(f"kept in {keep('moving', {'rounds': arguments.rounds, 'replica': replica, 'shard': start})}")
    return 0


def _source(pipe: Any, threads: int, checkpoint: Path) -> None:
    """The shard that hosts the experts."""
    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import SHARD_RANK
    from expertmesh.actors.links.rendezvous import RendezvousServer
    from expertmesh.actors.shard.server import ShardServer
    from expertmesh.models.expert_slots import ExpertSlots

    torch.set_num_threads(threads)
    weights, placement = _open(checkpoint, 2)
    server = ShardServer(ExpertSlots(weights, placement.shards[0].experts, torch.device("cpu")), placement.epoch)
    rendezvous = RendezvousServer(HOST)
    pipe.send(rendezvous.port)
    link = open_link("shared", _address(rendezvous.port, SHARD_RANK), torch.device("cpu"))
    threading.Thread(target=server.serve, args=(link,), daemon=True).start()
    pipe.recv()


def _replicas(checkpoint: Path, rounds: int) -> dict[str, float]:
    """Return medians over all experts of the other shard."""
    from expertmesh.actors.links.base import open_link
    from expertmesh.actors.links.ends import WORKER_RANK
    from expertmesh.actors.shard.copying import fetch_expert
    from expertmesh.cluster.ids import ExpertKey
    from expertmesh.kernels.cpu.huge_pages import empty_bf16
    from expertmesh.models.expert_slots import ExpertSlots

    cpu = torch.device("cpu")
    source = _start(_source, 1, checkpoint, policy="PASSIVE")
    weights, placement = _open(checkpoint, 2)
    link = open_link("shared", _address(source.recv(), WORKER_RANK), cpu)
    slots = ExpertSlots(weights, [], cpu)
    dtype = weights.architecture.dtype
    fetches, adds, copies, new_copies = list[float](), list[float](), list[float](), list[float]()
    keys = sorted(placement.shards[0].experts)
    num_bytes = sum(shape.numel() for shape in weights.expert_shapes(keys[0].layer).values()) * dtype.itemsize
    buffers = torch.ones((64, num_bytes), dtype=torch.uint8)  # more than the caches hold
    targets = torch.ones_like(buffers)

    def fetch(key: ExpertKey) -> ExpertTensors:
        started_s = time.perf_counter()
        tensors = fetch_expert(
            link, key, weights.expert_shapes(key.layer), dtype, len(fetches) + 1, slots.packed_sizes(key.layer)
        )
        fetches.append(time.perf_counter() - started_s)
        return tensors

    for number, key in enumerate(keys * rounds):
        started_s = time.perf_counter()
        slots.add(key.layer, [key.expert], fetch)
        adds.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        targets[number % 64].copy_(buffers[number % 64])
        copies.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        empty_bf16([num_bytes // 2])[0].view(torch.uint8).copy_(buffers[(number + 32) % 64])
        new_copies.append(time.perf_counter() - started_s)
        if len(slots.keys) == len(keys) // 4:
            slots.keep([])
    source.send("done")
    medians = {"replica_s": adds, "fetch_s": fetches, "copy_s": copies, "new_copy_s": new_copies}
    return {"bytes": num_bytes, **{name: statistics.median(seconds) for name, seconds in medians.items()}}


def _shard_start(checkpoint: Path, rounds: int) -> dict[str, float]:
    """Return medians of a shard's start, and of reading as many bytes from the same files."""
    figures: dict[str, list[float]] = {"process_s": [], "load_s": [], "read_s": []}
    num_bytes = 0
    for _ in range(rounds):
        started_s = time.perf_counter()
        command = [sys.executable, "-c", START, str(checkpoint)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        wall_s = time.perf_counter() - started_s
        load_s, num_bytes = json.loads(done.stdout.splitlines()[-1])
        figures["load_s"].append(load_s)
        figures["process_s"].append(wall_s - load_s)
        figures["read_s"].append(_read_s(checkpoint, num_bytes))
    return {"bytes": num_bytes, **{name: statistics.median(seconds) for name, seconds in figures.items()}}


def _read_s(checkpoint: Path, num_bytes: int) -> float:
    """Read so many bytes of the checkpoint's tensors into memory of their own."""
    target = memoryview(bytearray(num_bytes))
    started_s = time.perf_counter()
    got = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while got < num_bytes and (part := file.readinto(target[got:])):
                got += part
    assert got == num_bytes, f"the files hold {got} bytes, a shard {num_bytes}"
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.exit(main())
