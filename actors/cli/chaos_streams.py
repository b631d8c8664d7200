"""Streams for `expertmesh chaos`: the same requests again and again, each token with its time, each output compared."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise

import grpc

from expertmesh.v1.admin_pb2 import ModelStatus
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub

_TIMEOUT_S = 300.0
_TEXTS = (
    "def main():\n    ",
    "Redistribution and use in source and binary forms",
    "| U+00E9 | LATIN SMALL LETTER",
    "class Node:\n    def __init__(self",
    "Permission is hereby granted, free of charge",
    "import os\nimport sys\n\n",
)
# Between the beginnings of requests of the undisturbed runs; see `unsteady`.
_APART_S = (0.0, 0.0, 0.01, 0.03, 0.1)
# What the streams are about: all of it, or one thing alone.
TOPICS = {"mixed": _TEXTS, "code": (_TEXTS[0], _TEXTS[3], _TEXTS[5]), "tables": (_TEXTS[2],)}


@dataclass
class Record:
    """What the streams gave. Times are time.monotonic(). An output is that of a topic's request."""

    outputs: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)
    token_times_s: list[list[float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """When each gap between two tokens of a stream ended, and how long it was, in seconds."""
        return [(b, b - a) for times in self.token_times_s for a, b in pairwise(times)]

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between two tokens of any stream."""
        return max((gap for _, gap in self.gaps), default=0.0)

    @property
    def p99_gap_s(self) -> float:
        """The gap that one in a hundred exceeds."""
        gaps = sorted(gap for _, gap in self.gaps)
        return gaps[len(gaps) * 99 // 100] if gaps else 0.0


class Streams:
    """A fixed set of requests: half greedy, half sampled with a seed, prompts of several topics.

    topic: what requests that begin from now on are about.
    """

    def __init__(
        self,
        address: str,
        model: ModelStatus,
        count: int,
        new_tokens: int,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._address = address
        self._metadata = metadata
        self._requests = {
            topic: [_request(model, number, new_tokens, texts, at) for number in range(count)]
            for at, (topic, texts) in enumerate(TOPICS.items())
        }
        self.topic = "mixed"

    async def run_calm(self, record: Record) -> None:
        """Send all requests several times, each time other ones together in a batch."""
        over = asyncio.Event()
        over.set()
        for apart_s in _APART_S:
            await self.run_until(over, record, apart_s)

    async def run_until(self, done: asyncio.Event, record: Record, apart_s: float = 0.0) -> None:
        """Send all requests, apart_s after one another, and each again when it has ended, until `done`; once each."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            count = len(self._requests[self.topic])
            streams = (self._repeat(channel, number, done, record, number * apart_s) for number in range(count))
            await asyncio.gather(*streams)

    async def _repeat(
        self, channel: grpc.aio.Channel, number: int, done: asyncio.Event, record: Record, wait_s: float
    ) -> None:
        await asyncio.sleep(wait_s)
        first = True
        while first or not done.is_set():
            first = False
            topic = self.topic
            tokens: list[int] = []
            times: list[float] = []
            record.token_times_s.append(times)
            try:
                async for response in InferenceStub(channel).Generate(
                    self._requests[topic][number], metadata=self._metadata, timeout=_TIMEOUT_S
                ):
                    tokens += response.token_ids
                    times += [time.monotonic()] * len(response.token_ids)
            except grpc.RpcError as error:
                record.errors.append(f"{error.code().name}: {error.details()}")
                continue
            record.outputs.setdefault((topic, number), []).append(tokens)


def _request(
    model: ModelStatus, number: int, new_tokens: int, texts: tuple[str, ...], topic_at: int
) -> GenerateRequest:
    request = GenerateRequest(
        max_tokens=new_tokens,
        ignore_eos=True,
        temperature=0.8 if number % 2 else 0.0,
        seed=number,
    )
    if model.has_tokenizer:
        request.text = texts[number % len(texts)] + " " * (number // len(texts))
    else:
        rng = random.Random(1000 * topic_at + number)
        request.token_ids.CopyFrom(TokenIds(ids=[rng.randrange(model.vocab_size) for _ in range(16)]))
    return request


def mismatches(calm: Record, rough: Record) -> list[str]:
    """Say which outputs of `rough` are none of those that the same request gave in `calm`, and from which token on."""
    found: list[str] = []
    for (topic, number), outputs in sorted(rough.outputs.items()):
        for output in outputs:
            right = calm.outputs[topic, number]
            if output not in right:
                agreed = max(_agreement(one, output) for one in right)
                kind = "sampled" if number % 2 else "greedy"
                found.append(f"request {number} ({topic}, {kind}) differs from token {agreed} on; {len(output)} came")
    return found


def unsteady(calm: Record) -> int:
    """Return how many requests gave more than one output undisturbed.

    Sums of floating-point numbers depend on who else is in the batch, and now and then two tokens are that close.
    """
    return sum(len({tuple(output) for output in outputs}) > 1 for outputs in calm.outputs.values())


def _agreement(right: list[int], output: list[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    pairs = zip(right, output, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(right), len(output)))
