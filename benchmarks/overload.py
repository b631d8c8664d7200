"""A server at its capacity, then at many times that: gaps between tokens, refusals, memory, and the tokens themselves.

usage: python -m benchmarks.overload [MODEL] [--seconds 40] [--times 10] [--max-sequences 16] [--json] [--keep]

First each request runs by itself: those are the right tokens, to the bit, as the server is deterministic. Capacity: as
many clients as the batch has places, each with one request after the other. Then requests arrive at a fixed rate,
`--times` that at which they ended before, whatever becomes of them. The queue holds half a batch.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc

from benchmarks.load_clients import Tally, closed_loop, make_requests, open_loop, quantile, undisturbed
from benchmarks.load_server import LoadedServer, Watch, running, until_idle, watching
from benchmarks.record import keep
from expertmesh.v1.inference_pb2_grpc import InferenceStub

POCKET = Path(__file__).resolve().parents[1] / "examples" / "pocket-moe"
WANTED_RATIO = 1.5


def main() -> int:
    """Measure, print, keep if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=POCKET)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each of the two phases")
    parser.add_argument("--times", type=float, default=10.0, help="how many times its capacity arrives")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = server_options(Path(folder), asked.max_sequences)
        with running(asked.model, [*options, "--no-http"]) as server:
            result = asyncio.run(measure(server, asked))
    print(json.dumps(result) if asked.json else table(result))
    if asked.keep:
        print(f"kept in {keep('overload', result)}", file=sys.stderr)
    return 0


def server_options(folder: Path, max_sequences: int) -> list[str]:
    """Return options of a server with so many places in its batch, and a queue of half as many."""
    config = folder / "overload.toml"
    config.write_text(f"max_sequences = {max_sequences}\nmax_queue = {max_sequences + max_sequences // 2}\n")
    return ["--config", str(config), "--deterministic"]


async def measure(server: LoadedServer, asked: argparse.Namespace) -> dict[str, Any]:
    """Run the three phases against a server; see the file's docstring."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = InferenceStub(channel)
        requests = make_requests(server.status().model, 2 * asked.max_sequences, asked.prompt, asked.new)
        right = await undisturbed(stub, requests)
        await closed_loop(stub, requests, asked.max_sequences, min(5.0, asked.seconds), Tally())
        calm, flood = Tally(), Tally()
        with watching(server.pid, 1.0) as calm_watch:
            await closed_loop(stub, requests, asked.max_sequences, asked.seconds, calm)
        rate_per_s = len(calm.outputs) / calm_watch.times_s[-1]
        with watching(server.pid, 1.0) as flood_watch:
            num_sent = await open_loop(stub, requests, asked.times * rate_per_s, asked.seconds, flood)
    until_idle(server)
    phases = {"capacity": (calm, calm_watch), "overload": (flood, flood_watch)}
    return {
        "model": asked.model.name,
        **{name: getattr(asked, name) for name in ("seconds", "times", "max_sequences", "prompt", "new")},
        "served_per_s": rate_per_s,
        "sent": num_sent,
        "phases": {name: figures(tally, right, watch) for name, (tally, watch) in phases.items()},
    }


def figures(tally: Tally, right: dict[int, list[int]], watch: Watch) -> dict[str, Any]:
    """Return the figures of a phase."""
    memory = {role: [usage.rss_bytes / 2**20 for usage in watch.series(role)] for role in watch.roles}
    return {
        "served": len(tally.outputs),
        "different": tally.num_different(right),
        "refused": len(tally.refusals_s),
        "failures": dict(tally.failures),
        "gap_p50_ms": 1e3 * quantile(tally.gaps_s, 0.5),
        "gap_p99_ms": 1e3 * quantile(tally.gaps_s, 0.99),
        "gap_longest_ms": 1e3 * max(tally.gaps_s, default=0.0),
        "first_token_p50_ms": 1e3 * quantile(tally.first_s, 0.5),
        "first_token_p99_ms": 1e3 * quantile(tally.first_s, 0.99),
        "refusal_p50_ms": 1e3 * quantile(tally.refusals_s, 0.5),
        "refusal_p99_ms": 1e3 * quantile(tally.refusals_s, 0.99),
        "told_to_wait_p50_s": quantile(tally.delays_s, 0.5),
        "memory_mib": {role: {"first": at[0], "last": at[-1], "most": max(at)} for role, at in memory.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    calm, flood = result["phases"]["capacity"], result["phases"]["overload"]
    lines = [
        f"{result['model']}: {result['served_per_s']:.1f} requests/s served at capacity, {result['sent']} sent in "
        f"{result['seconds']:g} s at {result['times']:g} times that",
        f"{'':22}{'capacity':>12}{'overload':>12}",
    ]
    lines += [f"{key:22}{calm[key]:>12.4g}{flood[key]:>12.4g}" for key in calm if isinstance(calm[key], int | float)]
    ratio = flood["gap_p99_ms"] / calm["gap_p99_ms"] if calm["gap_p99_ms"] else 0.0
    lines.append(f"gap p99 {ratio:.2f} times that at capacity (wanted {WANTED_RATIO:g}); failures {flood['failures']}")
    for role, at in flood["memory_mib"].items():
        before = calm["memory_mib"].get(role, at)
        lines.append(f"  {role}: {before['first']:.0f} MiB, {at['first']:.0f} to {at['last']:.0f} under overload")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
