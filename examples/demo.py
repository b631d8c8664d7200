"""The demo: serve the pocket model from two expert shards, stream three unlike prompts, show which experts ran hot."""

import os
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.text import Text

from expertmesh.actors.cli.child_server import child_server
from expertmesh.cluster.errors import ExpertMeshError
from expertmesh.v1.admin_pb2 import GetLoadsRequest, GetStatusRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub

MODEL = Path(__file__).parent / "pocket-moe"
PROMPTS = (
    ("Python source", "class Cache:\n    def __init__(self, size):\n"),
    ("licence text", "Redistribution and use in source and binary forms, with or without"),
    ("a table of characters", "U+00E9 LATIN SMALL LETTER E WITH ACUTE\nU+00EA LATIN"),
)
NUM_TOKENS = 96
# Colours of the 256-colour palette from cold to hot.
SHADES = (234, 235, 237, 52, 88, 124, 160, 202, 214, 226)

console = Console(highlight=False)


def main() -> int:
    """Run the demo and return an exit code."""
    console.print(
        "[bold]ExpertMesh demo[/]: a small MoE model on 2 expert shards and 1 attention worker, on this machine"
    )
    started_s = time.monotonic()
    try:
        with child_server(MODEL, ["--shards", "2", "--workers", "1"]) as address:
            console.print(f"[dim]ready on {address} after {time.monotonic() - started_s:.1f} s[/]")
            with grpc.insecure_channel(address) as channel:
                for title, prompt in PROMPTS:
                    show(channel, title, prompt)
                show_fleet(channel)
    except (ExpertMeshError, grpc.RpcError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    left = psutil.Process(os.getpid()).children(recursive=True)
    console.print(f"stopped; processes left behind: {len(left)}")
    return 1 if left else 0


def show(channel: grpc.Channel, title: str, prompt: str) -> None:
    """Stream one prompt, then draw the experts that its tokens went to."""
    before_LE = loads(channel)
    console.rule(f"[bold]{title}")
    console.print(Text(prompt, style="bold"), end="")
    request = GenerateRequest(text=prompt, max_tokens=NUM_TOKENS, temperature=0.7, top_p=0.95, seed=7)
    started_s = time.monotonic()
    first_s = None
    num_tokens = 0
    for response in InferenceStub(channel).Generate(request, timeout=120):
        if response.token_ids and first_s is None:
            first_s = time.monotonic() - started_s
        num_tokens += len(response.token_ids)
        console.print(Text(response.text), end="", soft_wrap=True)
    elapsed_s = time.monotonic() - started_s
    console.print()
    if first_s is None or num_tokens < 2:
        raise ExpertMeshError(f"{title}: {num_tokens} tokens came")
    console.print(
        f"[cyan]{(num_tokens - 1) / (elapsed_s - first_s):.0f} tokens/s, first token after {first_s * 1000:.0f} ms, "
        f"{num_tokens} tokens[/]"
    )
    heat_map(loads(channel) - before_LE)


def loads(channel: grpc.Channel) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the tokens of each expert since start, [layers, experts]."""
    response = AdminStub(channel).GetLoads(GetLoadsRequest(), timeout=10)
    return np.array([list(layer.tokens) for layer in response.layers], dtype=np.int64)


def heat_map(load_LE: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    """Draw one row a layer and one cell an expert, its share of the layer's tokens in per cent."""
    share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    header = "experts  " + "".join(f"{expert:4d}" for expert in range(load_LE.shape[1])) + "   hottest, % of tokens"
    console.print(Text(header, style="dim"), soft_wrap=True)
    for layer, share_E in enumerate(share_LE):
        row = Text(f"layer {layer:2d} ")
        for share in share_E:
            shade = SHADES[min(len(SHADES) - 1, int(share / share_LE.max() * (len(SHADES) - 1) + 0.5))]
            row.append(f"{share * 100:4.0f}", style=f"color({231 if shade < 200 else 16}) on color({shade})")
        hottest = np.argsort(-share_E, kind="stable")[:3]
        row.append("   " + ", ".join(f"E{e} {share_E[e] * 100:.0f}%" for e in hottest), style="dim")
        console.print(row, soft_wrap=True)


def show_fleet(channel: grpc.Channel) -> None:
    """Say what served the prompts."""
    status = AdminStub(channel).GetStatus(GetStatusRequest(), timeout=10)
    console.rule("[bold]the fleet")
    for shard in status.shards:
        console.print(
            f"{shard.id}: {shard.num_slots} expert slots, {shard.weight_bytes / 2**20:.2f} MiB, process {shard.pid}"
        )
    for worker in status.workers:
        console.print(f"{worker.id}: dense half of {worker.dense_bytes / 2**20:.2f} MiB, process {worker.pid}")
    console.print(f"balancedness {status.balancedness:.2f}, placement epoch {status.epoch}")


if __name__ == "__main__":
    sys.exit(main())
