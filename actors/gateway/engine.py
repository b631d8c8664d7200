"""From a valid request to pieces of its samples, whatever happens to the workers meanwhile."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from expertmesh.actors.gateway.admission import Admission, Ticket
from expertmesh.actors.gateway.callers import CALLER, Caller
from expertmesh.actors.gateway.journal import Arrival, Inbox, Journal, LiveRequest, LiveSample
from expertmesh.actors.gateway.metrics import RequestMeter, RequestTimes
from expertmesh.actors.gateway.received import take_up
from expertmesh.actors.gateway.request_log import told
from expertmesh.actors.gateway.request_trace import RequestTracer
from expertmesh.actors.gateway.text import TextStream
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.gateway.worker_client import GATEWAY_ENDS, GatewayEnds, NotRead, WorkerLost
from expertmesh.actors.gateway.worker_pool import WorkerPool
from expertmesh.actors.logs import EventLog
from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, UnavailableError
from expertmesh.cluster.requests import FinishReason, TokenEvent
from expertmesh.cluster.token_budget import TokenBudget, num_tokens
from expertmesh.models.tokenizer import Tokenizer

# Of a piece at most: a message must stay below what clients take, 4 MiB unless they say otherwise.
MOST_EVENTS = 256

# The text of more tokens is made in a thread: meanwhile the streams of the others go on.
MANY_TOKENS = 1024

NOT_READ = "the stream was not read as fast as it was generated, and holds more tokens than any other"

_log = EventLog(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next tokens of one sample. finish_reason is set on its last piece, whose num_output_tokens counts all.

    Of a request that came with tokens received elsewhere, those count in num_output_tokens and are in no piece.
    """

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
        batch_sequences: int | None = None,
        max_queue: int | None = None,
        call_timeout_s: float = 30.0,
        max_unread_tokens: int = 1_000_000,
        tracer: RequestTracer | None = None,
    ) -> None:
        """Start with no workers; see WorkerPool, Journal, Admission and TokenBudget for the arguments.

        max_queue: sequences that may live at a worker, and of those that may wait here; None: that is not known.
        tracer: None: nothing is traced.
        """
        self.unread = TokenBudget(max_unread_tokens)
        self._tracer = tracer or RequestTracer()
        self._tokenizer = tokenizer
        # With bounded batches what a worker would refuse waits here.
        self._max_queue = max_queue if batch_sequences is None else None
        self._nobody = Caller()
        self.meter = RequestMeter()
        self._journal = Journal(max_requests=max_requests, rng=rng)
        self.admission = Admission(
            num_workers=lambda: len(self.pool.routable),
            batch_sequences=batch_sequences,
            max_sequences=max_requests,
            max_queue=max_requests if max_queue is None else max_queue,
            clock=self.meter.clock,
            counts=self.meter.by_key,
        )
        on_workers = self.admission.pump
        self.pool = WorkerPool(self._journal, rng=rng, call_timeout_s=call_timeout_s, on_workers=on_workers)

    @property
    def num_live_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._journal)

    def report(self, metrics: Metrics) -> None:
        """Hand on what was counted since the last call."""
        self.meter.report(metrics, num_live=self.num_live_requests, num_failovers=self.pool.num_failovers)
        self.admission.report(metrics)

    def require_room(self) -> None:
        """Refuse at once what would be refused later: before anybody reads its prompt, or asks a worker.

        Raises:
            CapacityError: the gateway or all workers are full, or the caller is above its limits.
        """
        self._journal.require_room()
        self.admission.require_room(self._caller)
        num_workers = len(self.pool.routable)
        if self._max_queue is None or not num_workers:
            return
        num_live, most = self._journal.num_sequences, self._max_queue * num_workers
        if num_live >= most:
            raise CapacityError(f"{num_live} sequences are live at {num_workers} workers, {most} is the most")

    def end(self) -> None:
        """Let all requests that are alive fail with UnavailableError: the gateway's time is over."""
        self.admission.end()
        self.pool.end()

    async def generate(self, request: ValidRequest) -> AsyncGenerator[Piece, None]:
        """Yield pieces as tokens come; those of different samples interleave.

        Close the generator (contextlib.aclosing) when the client goes away: its sequences then leave the batch at once.

        Raises:
            InputError: no worker can ever run it, the limits of its key never allow it, or what was received of it goes
                on after a stop string.
            CapacityError: the gateway or all workers are full, its key is above its limits, or too many tokens waited
                to be read.
            UnavailableError: the gateway's time is over.
            ExpertMeshError: a worker could not go on.
        """
        async with self._admitted(request) as (times, live, ticket):
            texts = [TextStream(self._tokenizer, request.stop) for _ in live.samples]
            for piece in await self._take_up(live, texts):
                self.admission.sample_ended(ticket)
                yield piece
            if live.unfinished:
                await self.pool.place(live)
            while live.unfinished:
                for item in await _arrived(live.inbox):
                    if isinstance(item, NotRead):
                        raise CapacityError(NOT_READ)
                    if isinstance(item, GatewayEnds):
                        raise UnavailableError(GATEWAY_ENDS)
                    if isinstance(item, WorkerLost):
                        if item.link is live.link:
                            await self.pool.place(live)
                        continue
                    live.unread.take(num_tokens(item))
                    for sample, events in _by_sample(live, item):
                        piece = self._absorb(live, sample, texts[sample.index], events)
                        if piece.tokens:
                            times.tokens_came(sample.index)
                            self.admission.served(ticket, len(piece.tokens))
                        if piece.finish_reason is not None:
                            self.admission.sample_ended(ticket)
                        yield piece

    @asynccontextmanager
    async def _admitted(self, request: ValidRequest) -> AsyncIterator[tuple[RequestTimes, LiveRequest, Ticket]]:
        """Hold a live request while the block lasts, which begins when its turn has come."""
        with self.meter.request() as times, told(request, times, self._tracer.begin(request)) as story:
            live = story.live = self._journal.open(request, story.trace)
            live.unread = self.unread.open(partial(self.pool.give_up, live))
            try:
                async with self.admission.entered(self._caller, request) as ticket:
                    yield times, live, ticket
            finally:
                times.is_complete = not live.unfinished
                live.unread.close()
                self.pool.release(live)

    async def _take_up(self, live: LiveRequest, texts: list[TextStream]) -> list[Piece]:
        """Go on from the tokens that a request came with; return the last pieces of samples that have all of theirs."""
        if not live.num_former_tokens:
            return []
        _log.tell("request_taken_up", request_id=live.request_id, former_tokens=live.num_former_tokens)
        pieces: list[Piece] = []
        for sample in live.unfinished:
            if not sample.output_ids:
                continue
            take = partial(take_up, texts[sample.index], sample.sampling, sample.output_ids, index=sample.index)
            text, finish_reason = await asyncio.to_thread(take) if sample.num_former > MANY_TOKENS else take()
            if finish_reason is not None:
                sample.finish_reason = finish_reason
                self.pool.finish(live, sample, at_worker=True)
                pieces.append(_last_piece(sample, text, finish_reason))
        return pieces

    @property
    def _caller(self) -> Caller:
        return CALLER.get(self._nobody)

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
                finish_reason = sample.finish_reason = FinishReason.STOP if matched else event.finish_reason
                self.pool.finish(live, sample, at_worker=event.finish_reason is not None)
                break
        return Piece(
            index=sample.index,
            text="".join(parts),
            tokens=tuple(tokens),
            finish_reason=finish_reason,
            num_output_tokens=len(sample.output_ids),
        )


def _last_piece(sample: LiveSample, text: str, finish_reason: FinishReason) -> Piece:
    return Piece(
        index=sample.index,
        text=text,
        tokens=(),
        finish_reason=finish_reason,
        num_output_tokens=len(sample.output_ids),
    )


async def _arrived(inbox: Inbox) -> list[Arrival]:
    """Wait for what comes next. What lies there already, as a client reads slowly, is taken together."""
    first = await inbox.get()
    items = [first]
    num_events = len(first) if isinstance(first, list) else 0
    while num_events < MOST_EVENTS and not inbox.empty():
        item = inbox.get_nowait()
        last = items[-1]
        if isinstance(item, list) and isinstance(last, list):
            last.extend(item)
        else:
            items.append(item)
        num_events += len(item) if isinstance(item, list) else 0
    return items


def _by_sample(live: LiveRequest, events: Iterable[TokenEvent]) -> list[tuple[LiveSample, list[TokenEvent]]]:
    """Sort events by sample; those of a former stay or of an ended sample fall away."""
    current = {sample.sequence_id: sample for sample in live.unfinished}
    groups: dict[str, list[TokenEvent]] = {}
    for event in events:
        if event.sequence_id in current:
            groups.setdefault(event.sequence_id, []).append(event)
    return [(current[sequence_id], group) for sequence_id, group in groups.items()]
