"""Which requests are alive, and what is needed to go on with each of them on another worker."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from expertmesh.actors.gateway.request_trace import UNTRACED, RequestTrace
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.gateway.worker_client import GatewayEnds, NotRead, WorkerLink, WorkerLost
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.requests import FinishReason, SamplingParams, SequenceRequest, TokenEvent
from expertmesh.cluster.token_budget import Account

Arrival: TypeAlias = list[TokenEvent] | WorkerLost | NotRead | GatewayEnds
Inbox: TypeAlias = asyncio.Queue[Arrival]


@dataclass(eq=False, kw_only=True, slots=True)
class LiveSample:
    """One sample of a live request: a sequence at a worker, and all tokens received of it.

    num_former: of output_ids, those that the request came with.
    """

    index: int
    sampling: SamplingParams
    sequence_id: str = ""
    output_ids: list[int] = field(default_factory=list)
    num_former: int = 0
    finished: bool = False
    finish_reason: FinishReason | None = None


@dataclass(eq=False, kw_only=True, slots=True)
class LiveRequest:
    """A request that has not ended. Its unfinished samples all live at one worker, so that they share the prompt.

    link: None until it is placed. admitted: whether any worker ever took it. num_moves: workers that it left. inbox:
    what the link's poll loop brings, in order. unread: counts the tokens in it.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    samples: tuple[LiveSample, ...]
    link: WorkerLink | None = None
    admitted: bool = False
    num_moves: int = 0
    trace: RequestTrace = UNTRACED
    inbox: Inbox = field(default_factory=asyncio.Queue)
    unread: Account = field(init=False)

    @property
    def unfinished(self) -> list[LiveSample]:
        """The samples that have not ended."""
        return [sample for sample in self.samples if not sample.finished]

    @property
    def outstanding_tokens(self) -> int:
        """Most tokens that its worker still has to compute: the prompt once, then each sample's rest."""
        rests = [sample.sampling.max_tokens - len(sample.output_ids) for sample in self.unfinished]
        started = any(sample.output_ids for sample in self.samples)
        return sum(rests) + (0 if started else len(self.prompt_ids))

    @property
    def num_output_tokens(self) -> int:
        """Tokens received of all samples."""
        return sum(len(sample.output_ids) for sample in self.samples)

    @property
    def num_former_tokens(self) -> int:
        """Of these, the tokens that the request came with."""
        return sum(sample.num_former for sample in self.samples)

    def sequences(self) -> list[SequenceRequest]:
        """Return what a worker must be told to go on with the unfinished samples after the tokens received."""
        return [
            SequenceRequest(
                sequence_id=sample.sequence_id,
                prompt_ids=self.prompt_ids,
                sampling=sample.sampling,
                output_ids=tuple(sample.output_ids),
                traceparent=self.trace.traceparent,
            )
            for sample in self.unfinished
        ]


class Journal:
    """The live requests of one gateway, by the ids of their sequences.

    Each stay of a sequence at a worker has its own id, `<request_id>#<sample>~<random>`. So late events and late
    cancels of a former stay touch nothing, even at the same worker, and a client may use a request id again.
    """

    def __init__(self, *, max_requests: int, rng: random.Random) -> None:
        self._max_requests = max_requests
        self._rng = rng
        self._requests: dict[LiveRequest, None] = {}
        self._by_sequence: dict[str, tuple[LiveRequest, LiveSample]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(tuple(self._requests))

    @property
    def num_sequences(self) -> int:
        """Sequences that live at workers."""
        return len(self._by_sequence)

    def require_room(self) -> None:
        """Refuse a new request that `open` would refuse.

        Raises:
            CapacityError: as many requests are alive as this gateway allows.
        """
        if len(self._requests) >= self._max_requests:
            raise CapacityError(f"{len(self._requests)} requests are alive at this gateway, as many as it allows")

    def open(self, request: ValidRequest, trace: RequestTrace = UNTRACED) -> LiveRequest:
        """Enter a new request, and what traces it.

        Raises:
            CapacityError: as many requests are alive as this gateway allows.
        """
        self.require_room()
        samples = tuple(
            LiveSample(
                index=index,
                sampling=sampling,
                output_ids=list(so_far.token_ids),
                num_former=len(so_far.token_ids),
                finished=so_far.has_ended,
            )
            for index, (sampling, so_far) in enumerate(zip(request.sampling, request.so_far, strict=True))
        )
        live = LiveRequest(request_id=request.request_id, prompt_ids=request.prompt_ids, samples=samples, trace=trace)
        self._requests[live] = None
        return live

    def move(self, live: LiveRequest, link: WorkerLink) -> None:
        """Note that the request's unfinished samples begin a stay at `link`, under new sequence ids."""
        self.forget_sequences(live)
        live.link = link
        for sample in live.unfinished:
            sample.sequence_id = f"{live.request_id}#{sample.index}~{self._rng.getrandbits(32):08x}"
            self._by_sequence[sample.sequence_id] = (live, sample)

    def find(self, sequence_id: str) -> tuple[LiveRequest, LiveSample] | None:
        """Return the request and sample that now have this sequence id; None for one that ended or moved."""
        return self._by_sequence.get(sequence_id)

    def at(self, link: WorkerLink) -> list[LiveRequest]:
        """Return the requests that live on a link."""
        return [live for live in self._requests if live.link is link]

    def finish(self, sample: LiveSample) -> None:
        """Note that a sample ended."""
        sample.finished = True
        self._by_sequence.pop(sample.sequence_id, None)

    def close(self, live: LiveRequest) -> None:
        """Forget a request."""
        self.forget_sequences(live)
        del self._requests[live]

    def forget_sequences(self, live: LiveRequest) -> None:
        """Let nothing more come of a request."""
        for sample in live.samples:
            self._by_sequence.pop(sample.sequence_id, None)
