"""ExpertMesh through its gRPC front beside transformers' own generate: one machine, interleaved, temperature 1.

usage: python benchmarks/against_transformers.py CHECKPOINT [--batch 1,8,32] [--rounds 3] [--keep]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.record import keep
from expertmesh.actors.cli.bench import peak_memory, run_round
from expertmesh.actors.cli.child_server import child_server
from expertmesh.v1.admin_pb2 import GetStatusRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub

FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def main() -> int:
    """Run the comparison and print its figures; with --peer, be the transformers side of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--peer", action="store_true", help="internal: be the transformers process")
    arguments = parser.parse_args()
    if arguments.peer:
        return _peer(arguments)
    batches = [int(part) for part in arguments.batch.split(",")]
    command = [sys.executable, "-m", "benchmarks.against_transformers", str(arguments.checkpoint), "--peer"]
    command += ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    with child_server(arguments.checkpoint.resolve(), ["--shards", "2", "--workers", "1"]) as address:
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            rows, memory = asyncio.run(_compare(address, peer, batches, arguments))
        finally:
            peer.kill()
    for row in rows:
        ours, theirs = row["expertmesh"], row["transformers"]
        print(
            f"batch {row['batch']}: decode {ours['decode_tokens_per_s']:.1f} against "
            f"{theirs['decode_tokens_per_s']:.1f} tokens/s ({row['decode_ratio']:.2f}x); prefill "
            f"{ours['prefill_tokens_per_s']:.1f} against {theirs['prefill_tokens_per_s']:.1f}; gap p50 "
            f"{ours['itl_p50_s'] * 1000:.1f} ms, p99 {ours['itl_p99_s'] * 1000:.1f} ms"
        )
    print("peak memory: " + ", ".join(f"{role} {size / 2**20:.0f} MiB" for role, size in memory.items()))
    if arguments.keep:
        sizes = {"prompt_tokens": arguments.prompt, "new_tokens": arguments.new, "rounds": arguments.rounds}
        print(f"kept in {keep('against-transformers', {**sizes, 'rows': rows, 'peak_memory_bytes': memory})}")
    return 0


async def _compare(
    address: str, peer: subprocess.Popen[str], batches: list[int], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    ours: dict[int, list[dict[str, float]]] = {b: [] for b in batches}
    theirs: dict[int, list[dict[str, float]]] = {b: [] for b in batches}
    async with grpc.aio.insecure_channel(address) as channel:
        status = await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=60)
        _ask(peer, None)
        for number in range(arguments.rounds + 1):
            for batch in batches:
                one = await run_round(
                    channel, status.model.vocab_size, batch, arguments.prompt, arguments.new, number * 1000 + batch
                )
                figures, other = one.figures(), _ask(peer, (batch, number * 1000 + batch))
                print(
                    f"round {number}, batch {batch}: decode {figures['decode_tokens_per_s']:.1f} against "
                    f"{other['decode_tokens_per_s']:.1f} tokens/s",
                    flush=True,
                )
                if number:
                    ours[batch].append(figures)
                    theirs[batch].append(other)
        memory = peak_memory(await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=60))
    memory["transformers"] = int(_ask(peer, "memory")["bytes"])
    rows = []
    for batch in batches:
        mine = {name: statistics.median(f[name] for f in ours[batch]) for name in ours[batch][0]}
        other = {name: statistics.median(f[name] for f in theirs[batch]) for name in FIGURES}
        ratio = statistics.median(
            a["decode_tokens_per_s"] / b["decode_tokens_per_s"] for a, b in zip(ours[batch], theirs[batch], strict=True)
        )
        rows.append({"batch": batch, "expertmesh": mine, "transformers": other, "decode_ratio": ratio})
    return rows, memory


def _ask(peer: subprocess.Popen[str], what: object) -> dict[str, float]:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(json.dumps(what) + "\n")
    peer.stdin.flush()
    answer: dict[str, float] = json.loads(peer.stdout.readline())
    return answer


def _peer(arguments: argparse.Namespace) -> int:
    """Answer each line of stdin with figures of transformers' generate.

    It has all cores and grouped_mm experts, its fastest here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype="auto", experts_implementation="grouped_mm"
    ).eval()
    for line in sys.stdin:
        what = json.loads(line)
        if what is None:
            print(json.dumps({}), flush=True)
            continue
        if what == "memory":
            status = Path("/proc/self/status").read_text()
            print(json.dumps({"bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024}), flush=True)
            continue
        batch, seed = what
        torch.manual_seed(seed)
        prompts = torch.randint(0, model.config.vocab_size, (batch, arguments.prompt))
        one, all_s = (_timed(model, prompts, n) for n in (1, arguments.new))
        figures = {
            "prefill_tokens_per_s": batch * arguments.prompt / one,
            "decode_tokens_per_s": batch * (arguments.new - 1) / (all_s - one),
        }
        print(json.dumps(figures), flush=True)
    return 0


def _timed(model: Any, prompts: Any, num_tokens: int) -> float:
    """Return the seconds that generate takes for exactly num_tokens."""
    import torch

    started_s = time.perf_counter()
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=0,
    )
    assert output.shape[1] == prompts.shape[1] + num_tokens
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.exit(main())
