"""What the gateway adds to gRPC: unary calls and streams beside a bare grpc.aio server, interleaved.

usage: python -m benchmarks.front [--rounds N] [--streams N] [--tokens N] [--json] [--keep] [--profile FILE]

Three processes of this machine: the gateway with its server, its tokenizer and all that lies between (no Ray); a server
that answers the same messages and does nothing else; and the one client of both, on asyncio. In the gateway's process a
worker without a model answers at once, a token of each stream a step, and makes the next step when the last is on its
way. Rates say what the client sees; processor time, of each server, what a call or a message costs there.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import psutil

from benchmarks.front_servers import MODEL_DIR, Server, running_server
from benchmarks.record import keep
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub

PROMPT = "def main():"
WANTED_RATIO = 2.0
Figures = dict[str, float]


def main() -> int:
    """Measure both in turns, print a table, keep it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200, help="unary calls of a round")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100, help="messages of a stream")
    parser.add_argument("--profile", help="where to write what cProfile says of the gateway")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    asked = parser.parse_args()
    with contextlib.ExitStack() as servers:
        pair = {
            "bare": servers.enter_context(running_server("bare")),
            "gateway": servers.enter_context(running_server("gateway", asked.profile)),
        }
        rounds = asyncio.run(measure(pair, asked))
    result = summary(rounds, asked)
    print(json.dumps(result) if asked.json else table(result))
    if asked.keep:
        print(f"kept in {keep('front', result)}", file=sys.stderr)
    return 0


async def measure(pair: dict[str, Server], asked: argparse.Namespace) -> dict[str, list[Figures]]:
    """Return each server's figures of each round but the first."""
    found: dict[str, list[Figures]] = {name: [] for name in pair}
    async with contextlib.AsyncExitStack() as channels:
        stubs = {
            name: InferenceStub(await channels.enter_async_context(grpc.aio.insecure_channel(server.address)))
            for name, server in pair.items()
        }
        for number in range(asked.rounds + 1):
            for name in sorted(pair, reverse=bool(number % 2)):
                figures = await unary(stubs[name], pair[name].pid, asked.calls)
                figures |= await streams(stubs[name], pair[name].pid, asked.streams, asked.tokens)
                if number:
                    found[name].append(figures)
    return found


async def unary(stub: Any, pid: int, num_calls: int) -> Figures:
    """Call one after the other; return milliseconds, and microseconds of the server's processor time a call."""
    request = GenerateRequest(text=PROMPT, max_tokens=1, ignore_eos=True)
    times_s: list[float] = []

    async def call_all() -> None:
        for _ in range(num_calls):
            started_s = time.perf_counter()
            answer = await stub.GenerateOnce(request)
            times_s.append(time.perf_counter() - started_s)
            assert answer.usage.completion_tokens == 1

    spent_s = await _processor_s(pid, call_all)
    cuts = statistics.quantiles(times_s, n=100)
    return {"unary_p50_ms": 1e3 * cuts[49], "unary_p99_ms": 1e3 * cuts[98], "unary_cpu_us": 1e6 * spent_s / num_calls}


async def streams(stub: Any, pid: int, num_streams: int, num_tokens: int) -> Figures:
    """Read streams at once; return messages a second, and microseconds of the server's processor time a message."""
    request = GenerateRequest(text=PROMPT, max_tokens=num_tokens, ignore_eos=True)
    num_messages = 0

    async def read() -> None:
        nonlocal num_messages
        got = 0
        async for message in stub.Generate(request):
            num_messages += 1
            got += len(message.token_ids)
        assert got == num_tokens, f"{got} of {num_tokens} tokens came"

    async def read_all() -> None:
        await asyncio.gather(*(read() for _ in range(num_streams)))

    started_s = time.perf_counter()
    spent_s = await _processor_s(pid, read_all)
    wall_s = time.perf_counter() - started_s
    return {
        "stream_messages_per_s": num_messages / wall_s,
        "stream_tokens_per_message": num_streams * num_tokens / num_messages,
        "stream_cpu_us": 1e6 * spent_s / num_messages,
    }


async def _processor_s(pid: int, work: Callable[[], Awaitable[None]]) -> float:
    """Do some work, and return what a process spent on it."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    await work()
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system


def summary(rounds: dict[str, list[Figures]], asked: argparse.Namespace) -> dict[str, Any]:
    """Return medians over the rounds, and medians of the rounds' ratios, above 1 where the gateway is slower."""
    medians = {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in rounds.items()
    }
    ratios = {}
    for key in medians["bare"]:
        pairs = zip(rounds["gateway"], rounds["bare"], strict=True)
        ratios[key] = statistics.median(
            bare[key] / ours[key] if key.endswith("_per_s") else ours[key] / bare[key] for ours, bare in pairs
        )
    settings = {name: getattr(asked, name) for name in ("rounds", "calls", "streams", "tokens")}
    return {**settings, "tokenizer": MODEL_DIR.name, "servers": medians, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"{'':26}{'bare':>12}{'gateway':>12}{'ratio':>8}  (wanted at most {WANTED_RATIO:g})"]
    servers = result["servers"]
    lines += [
        f"{key:26}{servers['bare'][key]:>12.2f}{servers['gateway'][key]:>12.2f}{ratio:>8.2f}"
        for key, ratio in result["ratios"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
