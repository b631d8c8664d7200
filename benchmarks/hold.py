"""Many streams at once for minutes: none fails, no token is lost or wrong.

usage: python -m benchmarks.hold [MODEL] [--streams 256] [--seconds 120] [--json] [--keep]

As many clients as `--streams`, each with one stream open all the time: when it has ended it opens the next. All are in
the batch at once. Each output is compared with that of the same request run by itself, to the bit (the server is
deterministic).
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc

from benchmarks.load_clients import Tally, closed_loop, make_requests, quantile, undisturbed
from benchmarks.load_server import LoadedServer, running, until_idle, watching
from benchmarks.overload import POCKET
from benchmarks.record import keep
from expertmesh.v1.inference_pb2_grpc import InferenceStub

# A connection takes 100 streams at once unless its server says otherwise; more wait in the client.
STREAMS_A_CHANNEL = 64
# Each is run by itself first.
NUM_DIFFERENT = 6


def main() -> int:
    """Measure, print, keep if asked. The exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=POCKET)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "hold.toml"
        config.write_text(f"max_sequences = {asked.streams}\n")
        with running(asked.model, ["--config", str(config), "--deterministic", "--no-http"]) as server:
            result = asyncio.run(measure(server, asked))
    print(json.dumps(result) if asked.json else "\n".join(f"{key:20}{value}" for key, value in result.items()))
    if asked.keep:
        print(f"kept in {keep('hold', result)}", file=sys.stderr)
    return int(bool(result["different"] or result["refused"] or result["failures"]))


async def measure(server: LoadedServer, asked: argparse.Namespace) -> dict[str, Any]:
    """Hold the streams, and return what came of them."""
    model = server.status().model
    requests = make_requests(model, NUM_DIFFERENT, asked.prompt, asked.new)
    num_channels = -(-asked.streams // STREAMS_A_CHANNEL)
    # Without a pool of its own each channel would share one connection with the others.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.address, options=options) for _ in range(num_channels)]
    tallies = [Tally() for _ in channels]
    try:
        stubs = [InferenceStub(channel) for channel in channels]
        right = await undisturbed(stubs[0], requests)
        with watching(server.pid) as watch:
            await asyncio.gather(
                *(
                    closed_loop(stub, requests, len(range(index, asked.streams, num_channels)), asked.seconds, tally)
                    for index, (stub, tally) in enumerate(zip(stubs, tallies, strict=True))
                )
            )
    finally:
        for channel in channels:
            await channel.close()
    until_idle(server)
    gaps_s = [gap for tally in tallies for gap in tally.gaps_s]
    return {
        "model": asked.model.name,
        "streams": asked.streams,
        "seconds": watch.times_s[-1],
        "requests": sum(len(tally.outputs) for tally in tallies),
        "tokens": sum(len(tokens) for tally in tallies for _, tokens in tally.outputs),
        "different": sum(tally.num_different(right) for tally in tallies),
        "refused": sum(len(tally.refusals_s) for tally in tallies),
        "failures": {text: count for tally in tallies for text, count in tally.failures.items()},
        "gap_p50_ms": 1e3 * quantile(gaps_s, 0.5),
        "gap_p99_ms": 1e3 * quantile(gaps_s, 0.99),
        "gap_longest_ms": 1e3 * max(gaps_s),
    }


if __name__ == "__main__":
    sys.exit(main())
