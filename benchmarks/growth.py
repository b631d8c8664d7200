"""How a decode step grows with the batch, the context, the experts of a layer and the shards; curves with the limit.

A model of two layers that is otherwise that of make_checkpoint.py, on shard processes without Ray. The limit is the
larger of reading what a step must read once and of multiplying, at the rates of benchmarks.expert_mlp on this machine.

usage: python -m benchmarks.growth [--rounds 3] [--plot FILE.png] [--keep]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.breakdown import table
from benchmarks.distribution import _decode, _engine, _shard, _start
from benchmarks.expert_mlp import multiply_rate, read_rate
from benchmarks.make_checkpoint import SMALL
from benchmarks.record import keep

mpl.use("Agg")
from matplotlib import pyplot as plt

LAYERS, NEW, BF16_BYTES = 2, 16, 2
MS_TICKS = (2, 5, 10, 20, 50)  # of the curves
TOKENS_PER_STEP = 2048  # of prompts, at most, as the engine of benchmarks.distribution has it


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step's surroundings. context: tokens of the prompt."""

    batch: int = 8
    context: int = 128
    experts: int = 32
    shards: int = 2


SWEEPS = {
    "batch": [Point(batch=batch) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
    "context": [Point(context=context) for context in (128, 512, 2048, 8000)],
    "experts": [Point(experts=experts) for experts in (8, 16, 32, 64, 128, 256)],
    "shards": [Point(shards=shards) for shards in (1, 2, 4, 8)],
}


def main() -> int:
    """Measure all sweeps, print them, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="where to write the curves")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    rates = read_rate(), multiply_rate()
    print(f"read {rates[0] / 1e9:.1f} GB/s, bf16 product {rates[1] / 1e9:.0f} GFLOP/s", flush=True)
    points = sorted(
        {p for sweep in SWEEPS.values() for p in sweep}, key=lambda p: (p.experts, p.shards, p.context, p.batch)
    )
    found: dict[Point, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for experts, shards in sorted({(p.experts, p.shards) for p in points}):
            checkpoint = make(Path(folder) / str(experts), experts)
            with fleet(checkpoint, shards) as (engine, servers):
                for point in (p for p in points if (p.experts, p.shards) == (experts, shards)):
                    found[point] = measure(engine, servers, point, asked.rounds)
                    limit = limit_ms(point, *rates)
                    parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found[point].items())
                    print(f"{point}: limit {limit:.2f} ms, {parts}", flush=True)
    rows = [
        {"sweep": name, **vars(p), "ms": found[p], "limit_ms": limit_ms(p, *rates)}
        for name, sweep in SWEEPS.items()
        for p in sweep
    ]
    if asked.plot:
        draw(asked.plot, rows)
    if asked.keep:
        print(f"kept in {keep('growth', {'rounds': asked.rounds, 'rows': rows})}")
    return 0


def make(directory: Path, experts: int) -> Path:
    """Write the checkpoint with so many experts unless it is there."""
    if not directory.exists():
        torch.manual_seed(0)
        sizes = {**SMALL, "num_hidden_layers": LAYERS, "num_experts": experts}
        config = Qwen3MoeConfig(**sizes, max_position_embeddings=16384)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@contextlib.contextmanager
def fleet(checkpoint: Path, num_shards: int) -> Iterator[tuple[Connection, list[Connection]]]:
    """Yield pipes to an engine and to its shards. They end when the pipes are closed."""
    servers = [
        _start(_shard, 1, checkpoint, index, num_shards, 1, "shared", True, policy="PASSIVE")
        for index in range(num_shards)
    ]
    ports = [pipe.recv() for pipe in servers]
    engine = _start(_engine, os.cpu_count() or 1, checkpoint, ports, "shared", 0, policy="PASSIVE")
    engine.recv()
    try:
        yield engine, servers
    finally:
        for pipe in (engine, *servers):
            pipe.close()


def measure(engine: Connection, servers: list[Connection], point: Point, rounds: int) -> dict[str, float]:
    """Return a decode step's milliseconds and those of its parts, medians of some rounds after a first."""
    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        # The first prompts that are done decode while the last are read: all have NEW tokens to go then.
        reading = -(-point.batch * point.context // TOKENS_PER_STEP)
        _, steps, expert_s = _decode([engine], servers, point.batch, number, point.context, NEW + reading)
        parts = table(steps, 1, expert_s)
        found.append({"step": 1e3 * steps.wall_s / steps.num_steps} | {part: us / 1e3 for part, us in parts.items()})
    return {part: statistics.median(one[part] for one in found[1:]) for part in found[0]}


def limit_ms(point: Point, read_bytes_s: float, multiply_flop_s: float) -> float:
    """Return the least that a step can take.

    Experts touched: with routers that choose evenly, E (1 - (1 - k/E)^batch) of each layer.
    """
    hidden, width, heads, kv_heads = (
        SMALL[name] for name in ("hidden_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    top_k, head_size = SMALL["num_experts_per_tok"], SMALL["head_dim"]
    expert = 3 * hidden * width
    dense = hidden * head_size * (2 * heads + 2 * kv_heads)
    head = hidden * SMALL["vocab_size"]
    touched = point.experts * (1 - (1 - top_k / point.experts) ** point.batch)
    tokens_seen = point.batch * (point.context + NEW / 2)
    read = LAYERS * (touched * expert + dense + tokens_seen * 2 * kv_heads * head_size) + head
    multiplied = LAYERS * (point.batch * (top_k * expert + dense) + tokens_seen * 2 * heads * head_size)
    multiplied += point.batch * head
    return 1e3 * max(BF16_BYTES * read / read_bytes_s, 2 * multiplied / multiply_flop_s)


def draw(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the curves of all sweeps to a PNG."""
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(14, 3.6), sharey=True, layout="constrained")
    for one, name in zip(axes, SWEEPS, strict=True):
        sweep = [row for row in rows if row["sweep"] == name]
        at = [row[name] for row in sweep]
        one.loglog(at, [row["ms"]["step"] for row in sweep], marker="o", label="step")
        one.loglog(at, [row["limit_ms"] for row in sweep], linestyle="--", color="0.5", label="limit")
        one.set_xlabel(name)
        one.set_xticks(at, [f"{x:g}" for x in at])
        one.set_yticks(MS_TICKS, [f"{ms}" for ms in MS_TICKS])
        one.minorticks_off()
        one.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("decode step, ms")
    axes[0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
