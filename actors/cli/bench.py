"""`expertmesh bench serve`: tokens per second, latencies and peak memory of a server, through its gRPC front."""

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.child_server import child_server
from expertmesh.actors.cli.client import JsonOption
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub

_CALL_TIMEOUT_S = 600.0


def bench(
    what: Annotated[str, typer.Argument(help="What to measure: serve.")],
    model: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    batch: Annotated[str, typer.Option(help="Numbers of streams at once.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 32,
    new: Annotated[int, typer.Option(help="Tokens to generate for each.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of all batches; medians are shown.", min=1)] = 3,
    shards: Annotated[int, typer.Option(help="Expert shards.", min=1)] = 2,
    workers: Annotated[int, typer.Option(help="Attention workers.", min=1)] = 1,
    replicas: Annotated[int, typer.Option(help="Shards that hold each expert.", min=1)] = 1,
    config: Annotated[Path | None, typer.Option(help="TOML file for the server.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve MODEL, send streams of random prompts sampled at temperature 1, and print what came of it."""
    if what != "serve":
        raise InputError(f"bench {what!r} is not known; there is: bench serve MODEL")
    options = ["--shards", str(shards), "--workers", str(workers), "--replicas", str(replicas)]
    options += ["--config", str(config)] if config else []
    with child_server(model, options) as address:
        result = asyncio.run(measure(address, parse_batches(batch), prompt, new, rounds))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(result)


def parse_batches(text: str) -> list[int]:
    """Read "1,8,32".

    Raises:
        InputError: not positive integers between commas.
    """
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {text!r} is not a list of numbers such as 1,8,32") from error
    if min(batches) < 1:
        raise InputError(f"--batch {text!r}: a batch has at least one stream")
    return batches


@dataclass
class Round:
    """One batch, once. Times are in seconds from the moment that its requests were sent."""

    prompt_tokens: int
    token_times_s: list[list[float]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return rates and latencies of this round."""
        firsts = [times[0] for times in self.token_times_s]
        all_started_s = max(firsts)
        end_s = max(times[-1] for times in self.token_times_s)
        decoded = sum(1 for times in self.token_times_s for t in times if t > all_started_s)
        gaps = sorted(b - a for times in self.token_times_s for a, b in pairwise(times))
        return {
            "prefill_tokens_per_s": self.prompt_tokens / all_started_s,
            "decode_tokens_per_s": decoded / (end_s - all_started_s),
            "ttft_s": statistics.median(firsts),
            "itl_p50_s": gaps[len(gaps) // 2],
            "itl_p99_s": gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)],
        }


async def measure(address: str, batches: list[int], prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Measure a running server: each round goes through all batches, after one round that is not counted."""
    async with grpc.aio.insecure_channel(address) as channel:
        status = await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=30)
        if prompt + new > status.model.max_context:
            raise InputError(
                f"--prompt {prompt} and --new {new} exceed the model's context of {status.model.max_context}"
            )
        figures: dict[int, list[dict[str, float]]] = {b: [] for b in batches}
        for number in range(rounds + 1):
            for batch in batches:
                one = await run_round(channel, status.model.vocab_size, batch, prompt, new, seed=number * 1000 + batch)
                if number:
                    figures[batch].append(one.figures())
        status = await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=30)
    return {
        "model": status.model.name,
        "plan": status.plan,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "rounds": rounds,
        "batches": [
            {"batch": b, **{name: statistics.median(f[name] for f in figures[b]) for name in figures[b][0]}}
            for b in batches
        ],
        "peak_memory_bytes": peak_memory(status),
    }


async def run_round(channel: grpc.aio.Channel, vocab_size: int, batch: int, prompt: int, new: int, seed: int) -> Round:
    """Send `batch` streams at once and note when each token came."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt)] for _ in range(batch)]
    result = Round(prompt_tokens=batch * prompt)
    started_s = time.monotonic()

    async def stream(index: int) -> list[float]:
        request = GenerateRequest(
            token_ids=TokenIds(ids=prompts[index]), max_tokens=new, temperature=1.0, seed=seed + index, ignore_eos=True
        )
        times: list[float] = []
        async for response in InferenceStub(channel).Generate(request, timeout=_CALL_TIMEOUT_S):
            times += [time.monotonic() - started_s] * len(response.token_ids)
        if len(times) != new:
            raise UnavailableError(f"a stream ended after {len(times)} of {new} tokens")
        return times

    result.token_times_s = list(await asyncio.gather(*(stream(i) for i in range(batch))))
    return result


def peak_memory(status: StatusResponse) -> dict[str, int]:
    """Return the peak resident bytes of each process of a server on this machine, by its role."""
    pids = {"controller": status.controller.pid}
    pids |= {shard.id: shard.pid for shard in status.shards}
    pids |= {worker.id: worker.pid for worker in status.workers}
    return {role: _peak_bytes(pid) for role, pid in pids.items()}


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise UnavailableError(f"process {pid} has no peak memory in /proc")


def _print(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['model']}: {result['plan']}; prompts of {result['prompt_tokens']} tokens, "
        f"{result['new_tokens']} new, medians of {result['rounds']} rounds"
    )
    table = Table("batch", "prefill tokens/s", "decode tokens/s", "first token ms", "gap p50 ms", "gap p99 ms")
    for row in result["batches"]:
        table.add_row(
            str(row["batch"]),
            f"{row['prefill_tokens_per_s']:.1f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['ttft_s'] * 1000:.1f}",
            f"{row['itl_p50_s'] * 1000:.1f}",
            f"{row['itl_p99_s'] * 1000:.1f}",
        )
    console.print(table)
    peaks = ", ".join(f"{role} {size / 2**20:.0f} MiB" for role, size in result["peak_memory_bytes"].items())
    console.print(f"peak memory: {peaks}")
