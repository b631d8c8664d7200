"""When does a request go on to the workers? Within the limits of its key, and in the order of the fair queue.

Requests go on while fewer sequences are there than fill the workers' batches and a few more, so that a worker has the
next at hand when one ends. The others wait here and not at a worker, whose queue is first come, first served: so a key
that sends a thousand requests at once takes its share and not all.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from expertmesh.actors.gateway.callers import Caller
from expertmesh.actors.gateway.key_metrics import KeyCounts
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.gateway.worker_client import GATEWAY_ENDS
from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.fair_queue import FairQueue

# Of a batch, and one at least, that may wait at each worker.
_SPARE_PART = 8


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """A request that waits or runs. num_left: its sequences that have not ended. turn: set when it may go on."""

    caller: Caller
    num_left: int
    num_prompt_tokens: int
    most_tokens: int
    turn: "asyncio.Future[None] | None" = None
    runs: bool = False


class Admission:
    """The requests of one gateway, from their arrival to their end. Use it inside one event loop.

    Guarantees:
        - Of one flow requests go on in the order in which they came; none waits while there is room.
        - A request whose task is cancelled while it waits leaves the queue at once.
    """

    def __init__(
        self,
        *,
        num_workers: Callable[[], int],
        batch_sequences: int | None,
        max_sequences: int,
        max_queue: int,
        clock: Callable[[], float],
        counts: KeyCounts,
    ) -> None:
        """Begin with no request.

        Args:
            num_workers: returns how many take requests now; call `pump` when there are more.
            batch_sequences: sequences in a worker's batch; None: no request waits here.
            max_sequences: most that go on to workers at once, however many there are.
            max_queue: most sequences that wait here, and that live at a worker.
            clock: seconds that do not step back.
            counts: told what each key is served.
        """
        self._num_workers = num_workers
        self._a_worker = None if batch_sequences is None else _most_at_worker(batch_sequences, max_queue)
        self._max_sequences = max_sequences
        self._clock = clock
        self._queue = FairQueue[Ticket](max_queue)
        self._waiting: set[Ticket] = set()
        self._num_running = 0
        self._counts = counts

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self._queue.num_sequences

    @property
    def waiting_tokens(self) -> int:
        """Most tokens of output that the waiting requests may ask for."""
        return sum(ticket.most_tokens for ticket in self._waiting)

    def set_keys(self, names: Iterable[str]) -> None:
        """Make these the API keys that there are."""
        known = set(names)
        self._queue.is_shared = len(known) > 1
        for gone in self._counts.follow(known):
            self._queue.forget(gone)

    def require_room(self, caller: Caller) -> None:
        """Refuse what `entered` would refuse whatever the request is.

        Raises:
            CapacityError: the queue is full, or the caller is above its limits.
        """
        if self._would_wait:
            self._queue.require_room(caller.name, 1)
        caller.limiter.require_room(1, self._clock())

    @asynccontextmanager
    async def entered(self, caller: Caller, request: ValidRequest) -> AsyncIterator[Ticket]:
        """Hold a request while the block lasts, which begins when its turn has come.

        Raises:
            CapacityError: the queue is full, or the caller is above its limits.
            InputError: the caller's limits never allow it.
        """
        ticket = self._enter(caller, request)
        try:
            if ticket.turn is not None:
                await ticket.turn
            yield ticket
        finally:
            self._leave(ticket)

    def served(self, ticket: Ticket, num_tokens: int) -> None:
        """Count new tokens of a request. It is on every message's way."""
        caller = ticket.caller
        self._queue.charge(caller.name, num_tokens)
        if caller.limiter.tokens is not None:
            caller.limiter.spend(num_tokens, self._clock())
        self._counts.output(caller.name, num_tokens)

    def sample_ended(self, ticket: Ticket) -> None:
        """Note that one of a request's sequences has ended; there is room for another."""
        ticket.num_left -= 1
        self._num_running -= 1
        ticket.caller.limiter.release(1)
        self.pump()

    def pump(self) -> None:
        """Let those go on for which there is room."""
        while self._has_room and (ticket := self._queue.pop()) is not None:
            self._waiting.remove(ticket)
            self._run(ticket)
            assert ticket.turn is not None
            if not ticket.turn.done():  # a cancelled task's is, until it gets to leave
                ticket.turn.set_result(None)

    def end(self) -> None:
        """Let nobody wait any more: it is told that the gateway ends."""
        for ticket in self._waiting:
            assert ticket.turn is not None
            if not ticket.turn.done():
                ticket.turn.set_exception(UnavailableError(GATEWAY_ENDS))

    def report(self, metrics: Metrics) -> None:
        """Hand on how many wait."""
        metrics.set("expertmesh_queued_sequences", self.num_waiting)

    @property
    def _has_room(self) -> bool:
        if self._a_worker is None:
            return True
        return self._num_running < min(self._max_sequences, self._num_workers() * self._a_worker)

    @property
    def _would_wait(self) -> bool:
        return self.num_waiting > 0 or not self._has_room

    def _enter(self, caller: Caller, request: ValidRequest) -> Ticket:
        ticket = Ticket(
            caller=caller,
            num_left=len(request.tokens_left),
            num_prompt_tokens=len(request.prompt_ids),
            most_tokens=sum(request.tokens_left),
        )
        name, weight, num_prompt_tokens = caller.name, caller.weight, ticket.num_prompt_tokens
        waits = self._would_wait
        if waits:
            self._queue.push(
                name, ticket, weight=weight, num_sequences=ticket.num_left, num_prompt_tokens=num_prompt_tokens
            )
        try:
            caller.limiter.admit(
                num_sequences=ticket.num_left, num_prompt_tokens=num_prompt_tokens, now_s=self._clock()
            )
        except BaseException:
            if waits:
                self._queue.remove(name, ticket)
            raise
        if waits:
            ticket.turn = asyncio.get_running_loop().create_future()
            self._waiting.add(ticket)
        else:
            self._queue.pass_by(name, weight=weight, num_prompt_tokens=num_prompt_tokens)
            self._run(ticket)
        return ticket

    def _run(self, ticket: Ticket) -> None:
        ticket.runs = True
        self._num_running += ticket.num_left
        self._counts.prompt(ticket.caller.name, ticket.num_prompt_tokens)

    def _leave(self, ticket: Ticket) -> None:
        ticket.caller.limiter.release(ticket.num_left)
        if ticket.runs:
            self._num_running -= ticket.num_left
            self.pump()
        else:
            self._queue.remove(ticket.caller.name, ticket)
            self._waiting.remove(ticket)


def _most_at_worker(batch_sequences: int, max_queue: int) -> int:
    return min(max_queue, batch_sequences + max(1, batch_sequences // _SPARE_PART))
