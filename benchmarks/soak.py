"""Minutes of clients that come, cancel, vanish and are refused: does memory, descriptors and pages return?

usage: python -m benchmarks.soak [MODEL] [--seconds 600] [--clients 24] [--plot FILE.png] [--json] [--keep]

Clients of all kinds (benchmarks/rude_clients.py) come one after the other, over gRPC and HTTP. Before and after the
server is idle: what its processes have then, by role, is compared; the first look comes after a minute, or a fifth of
the time, of the same clients, when everything has been used once.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.load_server import LoadedServer, Usage, Watch, look, running, until_idle, watching
from benchmarks.overload import POCKET
from benchmarks.record import keep
from benchmarks.rude_clients import RudeClients
from expertmesh.v1.inference_pb2_grpc import InferenceStub

WARM_UP_S = 60.0
SETTLE_S = 10.0
CURVE_STEP = 5  # looks between two that are kept
MIB = 2**20


def main() -> int:
    """Run it, print, draw and keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=POCKET)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=24, help="at once")
    parser.add_argument("--plot", type=Path, help="where to write the curves")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "soak.toml"
        config.write_text(f"max_sequences = {asked.clients // 2}\nmax_queue = {asked.clients + 4}\n")
        with running(asked.model, ["--config", str(config), "--http-port", "0"]) as server:
            result, watch = asyncio.run(soak(server, asked.seconds, asked.clients))
    result = {"model": asked.model.name, **result}
    print(json.dumps(result) if asked.json else table(result))
    if asked.plot:
        draw(asked.plot, watch)
    if asked.keep:
        print(f"kept in {keep('soak', {**result, 'curves': curves(watch)})}", file=sys.stderr)
    return 0


async def soak(server: LoadedServer, seconds: float, num_clients: int) -> tuple[dict[str, Any], Watch]:
    """Have clients come and go; return what they saw, and what the server's processes had before and after."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        model = server.status().model
        clients = RudeClients(server.address, server.http_url, model, InferenceStub(channel))
        settle_s = min(SETTLE_S, seconds / 10)
        await crowd(clients, num_clients, min(WARM_UP_S, seconds / 5), seed=1)
        before = await at_rest(server, settle_s)
        clients.seen.clear()
        with watching(server.pid) as watch:
            await crowd(clients, num_clients, seconds, seed=2)
        after = await at_rest(server, settle_s)
    # Of the second half of the time under load: what grows there goes on growing.
    half = len(watch.times_s) // 2
    growth = {
        role: slope([usage.rss_bytes for usage in watch.series(role)[half:]], watch.times_s[half:]) * 60 / MIB
        for role in watch.roles
    }
    roles = {
        role: {
            "rss_mib_before": before[role].rss_bytes / MIB,
            "rss_mib_after": after[role].rss_bytes / MIB,
            "rss_mib_a_minute": growth.get(role, 0.0),
            "fds_before": before[role].num_fds,
            "fds_after": after[role].num_fds,
        }
        for role in sorted(before.keys() & after.keys())
    }
    seen = dict(sorted(clients.seen.items()))
    return {"seconds": seconds, "clients": num_clients, "seen": seen, "roles": roles}, watch


async def crowd(clients: RudeClients, num_clients: int, seconds: float, *, seed: int) -> None:
    """Have so many clients at once, each of a kind drawn anew, until the time is over; wait for the last ones."""
    end_s = time.monotonic() + seconds
    kinds = sorted(clients.kinds)
    # A process that is to be killed takes a core for a second to start: few of them.
    weights = [1 if kind == "is killed" else 8 for kind in kinds]

    async def one(rng: random.Random) -> None:
        while time.monotonic() < end_s:
            await clients.run(rng.choices(kinds, weights)[0], rng)

    await asyncio.gather(*(one(random.Random(1000 * seed + index)) for index in range(num_clients)))


async def at_rest(server: LoadedServer, settle_s: float) -> dict[str, Usage]:
    """Wait until nothing is live and all pages are free, and some seconds more; return what the processes have."""
    await asyncio.to_thread(until_idle, server)
    await asyncio.sleep(settle_s)
    return look(server.pid)


def slope(values: list[int], times_s: list[float]) -> float:
    """Return the growth a second of the straight line that fits best; 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float(statistics.linear_regression(times_s, values).slope)


def table(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"{result['model']}: {result['clients']} clients for {result['seconds']:g} s"]
    lines += [f"  {count:6} {what}" for what, count in result["seen"].items()]
    lines.append(f"{'':20}{'MiB before':>12}{'after':>8}{'a minute':>10}{'fds before':>12}{'after':>7}")
    lines += [
        f"{role:20}{at['rss_mib_before']:>12.1f}{at['rss_mib_after']:>8.1f}{at['rss_mib_a_minute']:>10.2f}"
        f"{at['fds_before']:>12}{at['fds_after']:>7}"
        for role, at in result["roles"].items()
    ]
    return "\n".join(lines)


def curves(watch: Watch) -> dict[str, Any]:
    """Return what was seen every tenth second or so: times, and by role memory and descriptors."""
    roles = {
        role: {
            "mib": [round(usage.rss_bytes / MIB, 1) for usage in watch.series(role)[::CURVE_STEP]],
            "fds": [usage.num_fds for usage in watch.series(role)[::CURVE_STEP]],
        }
        for role in watch.roles
    }
    return {"times_s": [round(time_s) for time_s in watch.times_s[::CURVE_STEP]], **roles}


def draw(file: Path, watch: Watch) -> None:
    """Write the curves of memory and descriptors under load to a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(10, 6), layout="constrained")
    for role in watch.roles:
        usages = watch.series(role)
        above.plot(watch.times_s, [(usage.rss_bytes - usages[0].rss_bytes) / MIB for usage in usages], label=role)
        below.plot(watch.times_s, [usage.num_fds for usage in usages], label=role)
    above.set_ylabel("MiB beyond the first look")
    below.set_ylabel("descriptors")
    below.set_xlabel("seconds")
    above.legend(fontsize=8, ncols=3)
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
