"""From a valid request to pieces of its samples, whatever happens to the workers meanwhile."""

import logging
import random
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from expertmesh.actors.gateway.journal import Inbox, Journal, LiveRequest, LiveSample
from expertmesh.actors.gateway.metrics import RequestMeter
from expertmesh.actors.gateway.text import TextStream
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.gateway.worker_client import WorkerLost
from expertmesh.actors.gateway.worker_pool import WorkerPool
from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, UnavailableError
from expertmesh.cluster.requests import FinishReason, TokenEvent
from expertmesh.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
# Of a piece at most: a message must stay below what clients take, 4 MiB unless they say otherwise.
MOST_EVENTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next tokens of one sample. finish_reason is set on its last piece, whose num_output_tokens counts all."""

    index: int
    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: FinishReason | None
    num_output_tokens: int


class Engine:
    """Runs requests of one gateway. Make and use it inside one event loop."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        rng: random.Random,
        max_requests: int = 1024,
        max_queue: int | None = None,
        call_timeout_s: float = 30.0,
    ) -> None:
        """Start with no workers; see WorkerPool and Journal for the arguments. max_queue: of a worker, if known."""
        self._tokenizer = tokenizer
        self._max_queue = max_queue
        self.meter = RequestMeter()
        self._journal = Journal(max_requests=max_requests, rng=rng)
        self.pool = WorkerPool(self._journal, rng=rng, call_timeout_s=call_timeout_s)

    @property
    def num_live_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._journal)

    def report(self, metrics: Metrics) -> None:
        """Hand on what was counted since the last call."""
        self.meter.report(metrics, num_live=self.num_live_requests, num_failovers=self.pool.num_failovers)

    def require_room(self) -> None:
        """Refuse at once what would be refused later: before anybody reads its prompt, or asks a worker.

        Raises:
            CapacityError: the gateway or all workers are full.
        """
        self._journal.require_room()
        num_workers = len(self.pool.routable)
        if self._max_queue is None or not num_workers:
            return
        num_live, most = self._journal.num_sequences, self._max_queue * num_workers
        if num_live >= most:
            raise CapacityError(f"{num_live} sequences are live at {num_workers} workers, {most} is the most")

    async def generate(self, request: ValidRequest) -> AsyncGenerator[Piece, None]:
        """Yield pieces as tokens come; those of different samples interleave.

        Close the generator (contextlib.aclosing) when the client goes away: its sequences then leave the batch at once.

        Raises:
            InputError: no worker can ever run it.
            CapacityError: the gateway or all workers are full.
            ExpertMeshError: a worker could not go on.
        """
        with self.meter.request() as times:
            live = self._journal.open(request)
            texts = [TextStream(self._tokenizer, request.stop) for _ in live.samples]
            try:
                await self.pool.place(live)
                while live.unfinished:
                    for item in await _arrived(live.inbox):
                        if isinstance(item, WorkerLost):
                            if item.link is live.link:
                                await self.pool.place(live)
                            continue
                        for sample, events in _by_sample(live, item):
                            piece = self._absorb(live, sample, texts[sample.index], events)
                            if piece.tokens:
                                times.tokens_came(sample.index)
                            yield piece
            finally:
                times.is_complete = not live.unfinished
                self.pool.release(live)

    def _absorb(self, live: LiveRequest, sample: LiveSample, text: TextStream, events: list[TokenEvent]) -> Piece:
        """Enter a sample's events into the journal and turn them into a piece."""
        parts: list[str] = []
        tokens: list[TokenEvent] = []
        finish_reason: FinishReason | None = None
        for event in events:
            if event.finish_reason is FinishReason.ERROR:
                kind = UnavailableError if event.unavailable else ExpertMeshError
                raise kind(f"{event.sequence_id} failed at its worker: {event.error}")
            matched = False
            if event.token_id is not None:
                expected = len(sample.output_ids)
                assert event.index == expected, f"{event.sequence_id}: token {event.index} came, {expected} is next"
                sample.output_ids.append(event.token_id)
                tokens.append(event)
                part, matched = text.push(event.token_id)
                parts.append(part)
            if event.finish_reason is not None and not matched:
                part, matched = text.flush()
                parts.append(part)
            if matched or event.finish_reason is not None:
                finish_reason = FinishReason.STOP if matched else event.finish_reason
                self.pool.finish(live, sample, at_worker=event.finish_reason is not None)
                break
        return Piece(
            index=sample.index,
            text="".join(parts),
            tokens=tuple(tokens),
            finish_reason=finish_reason,
            num_output_tokens=len(sample.output_ids),
        )


async def _arrived(inbox: Inbox) -> list[list[TokenEvent] | WorkerLost]:
    """Wait for what comes next. What lies there already, as a client reads slowly, is taken together."""
    first = await inbox.get()
    items = [first]
    num_events = 0 if isinstance(first, WorkerLost) else len(first)
    while num_events < MOST_EVENTS and not inbox.empty():
        item = inbox.get_nowait()
        last = items[-1]
        if isinstance(item, WorkerLost) or isinstance(last, WorkerLost):
            items.append(item)
        else:
            last.extend(item)
        num_events += 0 if isinstance(item, WorkerLost) else len(item)
    return items


def _by_sample(live: LiveRequest, events: Iterable[TokenEvent]) -> list[tuple[LiveSample, list[TokenEvent]]]:
    """Sort events by sample; those of a former stay or of an ended sample fall away."""
    current = {sample.sequence_id: sample for sample in live.unfinished}
    groups: dict[str, list[TokenEvent]] = {}
    for event in events:
        if event.sequence_id in current:
            groups.setdefault(event.sequence_id, []).append(event)
    return [(current[sequence_id], group) for sequence_id, group in groups.items()]
