"""ExpertMesh through its gRPC front beside other servers of the same checkpoint: one machine, temperature 1.

One peer after another is started beside our server and asked in turns with it, so that each ratio is of rounds that
follow each other; with the ratio its spread. A peer has all cores while it is asked, and so have we: its processes are
stopped meanwhile. Ours, which are several and watch each other, idle while a peer is asked.

usage: python -m benchmarks.against_peers CHECKPOINT [--peer NAME=COMMAND ...] [--batch 1,8,32] [--rounds 3] [--keep]
       a COMMAND speaks the protocol of benchmarks/peers/protocol.py; transformers is always there.
       benchmarks/peers/install.sh FOLDER installs the others and says what to give.
"""

import argparse
import asyncio
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.asking import Peer, running_peer
from benchmarks.record import keep
from expertmesh.actors.cli.bench import peak_memory, run_round
from expertmesh.actors.cli.child_server import child_server
from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub

PROMPT, NEW = 32, 64
LONG_PROMPT, LONG_BATCHES = 512, (1, 8)
# Threads of a peer spin for up to 200 ms after their work (Intel's KMP_BLOCKTIME): the next to be timed waits for that.
_SPIN_S = 0.25


def main() -> int:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--shards", default="2")
    parser.add_argument("--workers", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    batches = [int(part) for part in asked.batch.split(",")]
    script = Path(__file__).parent / "peers" / "transformers_generate.py"
    commands = {"transformers": f"{sys.executable} {script} {asked.checkpoint}"}
    commands |= dict(pair.split("=", 1) for pair in asked.peer)
    rows: list[dict[str, Any]] = []
    memory: dict[str, float] = {}
    started_s = time.perf_counter()
    options = ["--shards", asked.shards, "--workers", asked.workers]
    with child_server(asked.checkpoint.resolve(), options) as address:
        ready_s = {"expertmesh": time.perf_counter() - started_s}
        vocab_size = asyncio.run(_status(address)).model.vocab_size
        for name, command in commands.items():
            peer_started_s = time.perf_counter()
            with running_peer(shlex.split(command)) as peer:
                peer.read()
                ready_s[name] = time.perf_counter() - peer_started_s
                rows += _compare(address, vocab_size, name, peer, batches, asked.rounds)
                memory[name] = peer.ask({"memory": True})["bytes"]
        memory["expertmesh"] = sum(peak_memory(asyncio.run(_status(address))).values())
    for name, seconds in ready_s.items():
        print(f"{name}: ready after {seconds:.1f} s, peak memory {memory[name] / 2**30:.2f} GiB")
    if asked.keep:
        figures = {"rounds": asked.rounds, "rows": rows, "ready_s": ready_s, "peak_memory_bytes": memory}
        print(f"kept in {keep('against-peers', figures)}")
    return 0


def _compare(
    address: str, vocab_size: int, name: str, peer: Peer, batches: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Ask both in turns; return a row for each batch of decoding and of prefill."""
    cases = [("decode", batch) for batch in batches] + [("prefill", batch) for batch in LONG_BATCHES]
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for kind, batch in cases:
            # Prompts that nobody has seen: our prefix cache would know those of another peer's rounds.
            seed = random.Random(f"{name} {number} {kind} {batch}").randrange(1 << 31)
            time.sleep(_SPIN_S)
            with peer.stopped():
                ours = asyncio.run(_ours(address, vocab_size, kind, batch, seed))
            theirs = _theirs(peer, vocab_size, kind, batch, seed)
            print(f"round {number}, {kind} at {batch}: {ours:.1f} against {name}'s {theirs:.1f} tokens/s", flush=True)
            if number:
                rates[kind, batch].append((ours, theirs))
    rows = []
    for (kind, batch), pairs in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows.append({"peer": name, "kind": kind, "batch": batch, "ours": ours, "theirs": theirs, "ratios": ratios})
        print(
            f"{kind} at {batch}: {ours:.1f} against {name}'s {theirs:.1f} tokens/s, "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
    return rows


async def _status(address: str) -> StatusResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        status: StatusResponse = await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=60)
        return status


async def _ours(address: str, vocab_size: int, kind: str, batch: int, seed: int) -> float:
    async with grpc.aio.insecure_channel(address) as channel:
        prompt, new = (PROMPT, NEW) if kind == "decode" else (LONG_PROMPT, 2)
        one = await run_round(channel, vocab_size, batch, prompt, new, seed)
        return one.figures()[f"{kind}_tokens_per_s"]


def _theirs(peer: Peer, vocab_size: int, kind: str, batch: int, seed: int) -> float:
    rng = random.Random(seed)
    length = PROMPT if kind == "decode" else LONG_PROMPT
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]
    first_s = peer.ask({"prompts": prompts, "new": 1, "seed": seed})["seconds"]
    if kind == "prefill":
        return batch * length / first_s
    return batch * (NEW - 1) / (peer.ask({"prompts": prompts, "new": NEW, "seed": seed})["seconds"] - first_s)


if __name__ == "__main__":
    sys.exit(main())
