"""Requests of the load benchmarks: known ones, whose outputs are compared, and the times of their tokens."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc

from expertmesh.v1.admin_pb2 import ModelStatus
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds

CALL_TIMEOUT_S = 600.0


@dataclass
class Tally:
    """What came of the requests of one phase. Times are in seconds."""

    outputs: list[tuple[int, list[int]]] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def num_different(self, right: dict[int, list[int]]) -> int:
        """Return how many whole outputs are not those of an undisturbed run."""
        return sum(tokens != right[number] for number, tokens in self.outputs)


def make_requests(model: ModelStatus, count: int, num_prompt: int, num_new: int) -> list[GenerateRequest]:
    """Return different requests of token ids, half greedy, half sampled with a seed."""
    return [
        GenerateRequest(
            token_ids=TokenIds(ids=[(7919 * number + 31 * at * at) % model.vocab_size for at in range(num_prompt)]),
            max_tokens=num_new,
            ignore_eos=True,
            temperature=0.8 if number % 2 else 0.0,
            seed=number,
        )
        for number in range(count)
    ]


async def send(stub: Any, request: GenerateRequest, number: int, tally: Tally) -> None:
    """Send a request, read its stream to the end, and note what came of it."""
    started_s = time.perf_counter()
    tokens: list[int] = []
    times_s: list[float] = []
    try:
        async for message in stub.Generate(request, timeout=CALL_TIMEOUT_S):
            tokens += message.token_ids
            times_s.append(time.perf_counter())
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            tally.refusals_s.append(time.perf_counter() - started_s)
            tally.delays_s.append(int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) / 1000)
        else:
            tally.failures[f"{error.code().name}: {error.details()}"] += 1
        return
    tally.outputs.append((number, tokens))
    tally.first_s.append(times_s[0] - started_s)
    tally.gaps_s += [after - before for before, after in pairwise(times_s)]


async def undisturbed(stub: Any, requests: Sequence[GenerateRequest]) -> dict[int, list[int]]:
    """Return the output of each request, run by itself."""
    tally = Tally()
    for number, request in enumerate(requests):
        await send(stub, request, number, tally)
    assert len(tally.outputs) == len(requests), f"an idle server failed: {tally.failures or 'refused'}"
    return dict(tally.outputs)


async def closed_loop(
    stub: Any, requests: Sequence[GenerateRequest], num_clients: int, seconds: float, tally: Tally
) -> None:
    """Have clients send one request after the other until the time is over, and wait for the last ones."""
    end_s = time.monotonic() + seconds

    async def client(first: int) -> None:
        number = first
        while time.monotonic() < end_s:
            await send(stub, requests[number % len(requests)], number % len(requests), tally)
            number += num_clients

    await asyncio.gather(*(client(first) for first in range(num_clients)))


async def open_loop(
    stub: Any, requests: Sequence[GenerateRequest], rate_per_s: float, seconds: float, tally: Tally
) -> int:
    """Send requests at a rate, whatever becomes of them, and wait for the last ones. Return how many were sent."""
    tasks: set[asyncio.Task[None]] = set()
    began_s = time.monotonic()
    num_sent = 0
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        while num_sent < elapsed_s * rate_per_s:
            number = num_sent % len(requests)
            task = asyncio.create_task(send(stub, requests[number], number, tally))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            num_sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return num_sent


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that so large a part does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
