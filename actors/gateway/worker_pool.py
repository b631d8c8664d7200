"""Which worker runs which live request, and what happens when a worker comes, empties or dies."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence

from expertmesh.actors.gateway.journal import Journal, LiveRequest, LiveSample
from expertmesh.actors.gateway.router import choose_worker
from expertmesh.actors.gateway.worker_client import (
    GATEWAY_ENDS,
    GatewayEnds,
    NotRead,
    WorkerClient,
    WorkerLink,
    WorkerLost,
)
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import CapacityError, UnavailableError
from expertmesh.cluster.requests import TokenEvent
from expertmesh.cluster.token_budget import num_tokens

_log = EventLog(__name__)


class WorkerPool:
    """The attention workers known to one gateway: one poll loop each, and the placing of requests.

    Guarantees:
        - Each live request hears of the tokens of its current stay in order, then, if its worker is lost, WorkerLost.
        - A worker that raises, or does not answer within call_timeout_s, is lost; it is used again only when
          `set_workers` names it anew, and if it had hung only after it has answered.
        - A worker that `set_workers` no longer names gets no new requests and keeps those that it has.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        rng: random.Random,
        call_timeout_s: float = 30.0,
        retry_delay_s: float = 0.2,
        on_workers: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with no workers.

        Args:
            journal: of this gateway.
            rng: for the router.
            call_timeout_s: longest wait for a worker's answer; above the time that a poll waits at the worker.
            retry_delay_s: pause before a resumed request asks full workers again.
            on_workers: called when there may be more that new requests may go to.
        """
        self._journal = journal
        self._rng = rng
        self._call_timeout_s = call_timeout_s
        self._retry_delay_s = retry_delay_s
        self._on_workers = on_workers
        self._links: dict[str, WorkerLink] = {}
        self._polls: dict[WorkerLink, asyncio.Task[None]] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._hung: dict[str, WorkerClient] = {}
        self._changed = asyncio.Event()
        self._has_ended = False
        self.num_failovers = 0
        # Told the worker that is lost, how many of its requests move, and why.
        self.on_failover: Callable[[str, int, str], None] = lambda _worker_id, _num_requests, _why: None

    @property
    def routable(self) -> list[WorkerLink]:
        """The workers that new requests may go to."""
        return [link for link in self._links.values() if link.routable]

    def set_workers(self, workers: Sequence[WorkerClient]) -> None:
        """Make these the workers that new requests may go to; a known id with another client is a restarted worker.

        Call it inside the event loop, at each change and now and then: a worker lost to a passing fault is tried again.
        """
        named = {worker.worker_id: worker for worker in workers}
        for worker_id, link in tuple(self._links.items()):
            if worker_id not in named:
                link.named = False
                self._drop_if_empty(link)
            elif link.client is not named[worker_id]:
                self._lose(link, "it was restarted")
        for worker_id, worker in named.items():
            suspect = self._hung.get(worker_id) is worker
            link = self._links.setdefault(worker_id, WorkerLink(worker, suspect=suspect))
            link.named = True
            if link not in self._polls:
                _log.tell("worker_found", worker=worker_id)
                self._polls[link] = asyncio.create_task(self._poll(link), name=f"poll {worker_id}")
        self._hung = {worker_id: worker for worker_id, worker in self._hung.items() if worker_id in named}
        self._tell()

    def evacuate(self, worker_id: str) -> None:
        """Let the requests of a worker that is to leave go on at others; none is lost. Unknown ids are passed over."""
        if worker_id in self._links:
            self._lose(self._links[worker_id], "it is to leave")

    async def place(self, live: LiveRequest) -> None:
        """Submit the request's unfinished samples to a worker; wait as long as there is none.

        Raises:
            InputError: no worker can ever run it.
            CapacityError: all workers are full and the request is new; a resumed request waits for room.
            UnavailableError: there is none, and the gateway's time is over.
        """
        full: set[str] = set()
        while True:
            link = await self._choose(live, full)
            self._journal.move(live, link)
            live.trace.begin_stay(link.worker_id, live.num_output_tokens)
            try:
                async with asyncio.timeout(self._call_timeout_s):
                    await link.client.submit(live.sequences())
            except UnavailableError as error:
                self._lose(link, f"submit: {error}")
            except TimeoutError:
                self._lose(link, f"no answer to submit in {self._call_timeout_s} s", hung=True)
            except CapacityError:
                live.link = None
                live.trace.end_stay("full")
                full.add(link.worker_id)
                if self.routable and all(other.worker_id in full for other in self.routable):
                    if not live.admitted:
                        raise
                    full.clear()
                    await asyncio.sleep(self._retry_delay_s)
            else:
                live.admitted = True
                _log.tell("request_placed", request_id=live.request_id, worker=link.worker_id)
                return

    def finish(self, live: LiveRequest, sample: LiveSample, *, at_worker: bool) -> None:
        """Note that a sample ended; unless it ended at its worker, have the worker drop it."""
        if not at_worker and live.link is not None:
            self._cancel(live.link, [sample.sequence_id])
        self._journal.finish(sample)

    def release(self, live: LiveRequest) -> None:
        """Forget a request, and have its worker drop at once what has not ended."""
        link = live.link
        if link is not None and live.unfinished:
            self._cancel(link, [sample.sequence_id for sample in live.unfinished])
        self._journal.close(live)
        if link is not None:
            self._drop_if_empty(link)

    def give_up(self, live: LiveRequest) -> None:
        """Drop what waits for a request's reader, at its worker too; the reader hears of it when it comes."""
        link, live.link = live.link, None
        if link is not None and live.unfinished:
            self._cancel(link, [sample.sequence_id for sample in live.unfinished])
        self._journal.forget_sequences(live)
        while not live.inbox.empty():
            live.inbox.get_nowait()
        live.inbox.put_nowait(NotRead())
        if link is not None:
            self._drop_if_empty(link)

    def end(self) -> None:
        """Tell all requests that are alive, and those that come, that the gateway's time is over."""
        self._has_ended = True
        self._changed.set()
        for live in self._journal:
            live.inbox.put_nowait(GatewayEnds())

    async def close(self) -> None:
        """Stop all loops; requests that are alive hear nothing more."""
        tasks = [*self._polls.values(), *self._cancels]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._polls.clear()
        self._links.clear()

    async def _choose(self, live: LiveRequest, full: set[str]) -> WorkerLink:
        while not self.routable:
            if self._has_ended:
                raise UnavailableError(GATEWAY_ENDS)
            self._changed.clear()
            await self._changed.wait()
        # If all that are left now are full, ask one again: the caller decides when to give up.
        links = [link for link in self.routable if link.worker_id not in full] or self.routable
        if len(links) == 1:
            return links[0]  # however many requests there are to weigh
        outstanding = {link.worker_id: 0 for link in links}
        for other in self._journal:
            if other is not live and other.link is not None and other.link.worker_id in outstanding:
                outstanding[other.link.worker_id] += other.outstanding_tokens
        return self._links[choose_worker(live.prompt_ids, outstanding, self._rng)]

    async def _poll(self, link: WorkerLink) -> None:
        cursor = 0
        try:
            while True:
                async with asyncio.timeout(self._call_timeout_s):
                    cursor, events = await link.client.poll(cursor)
                self._deliver(events)
                if link.suspect:
                    link.suspect = False
                    self._hung.pop(link.worker_id, None)
                    self._tell()
        except UnavailableError as error:
            self._lose(link, f"poll: {error}")
        except TimeoutError:
            self._lose(link, f"no answer to poll in {self._call_timeout_s} s", hung=True)
        except Exception as error:  # noqa: BLE001 - it is logged, and the worker is left
            _log.tell("worker_call_failed", error, worker=link.worker_id, call="poll")
            self._lose(link, "poll failed")

    def _tell(self) -> None:
        self._changed.set()
        self._on_workers()

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        by_request: dict[LiveRequest, list[TokenEvent]] = {}
        for event in events:
            found = self._journal.find(event.sequence_id)
            if found is not None:
                by_request.setdefault(found[0], []).append(event)
        for live, own_events in by_request.items():
            live.inbox.put_nowait(own_events)
            live.unread.add(num_tokens(own_events))

    def _lose(self, link: WorkerLink, why: str, *, hung: bool = False) -> None:
        if self._links.get(link.worker_id) is not link:
            return
        if hung:
            self._hung[link.worker_id] = link.client
        stranded = self._journal.at(link)
        _log.tell("worker_lost", worker=link.worker_id, reason=why, num_requests=len(stranded), hung=hung)
        self._forget(link)
        self.num_failovers += len(stranded)
        self.on_failover(link.worker_id, len(stranded), why)
        # It may only be slow: then it must not go on with what now runs elsewhere.
        sequence_ids = [sample.sequence_id for live in stranded for sample in live.unfinished]
        if sequence_ids:
            self._cancel(link, sequence_ids)
        for live in stranded:
            live.num_moves += 1
            live.trace.end_stay(why)
            _log.tell(
                "request_moved",
                request_id=live.request_id,
                worker=link.worker_id,
                output_tokens=live.num_output_tokens,
                reason=why,
            )
            live.inbox.put_nowait(WorkerLost(link))

    def _drop_if_empty(self, link: WorkerLink) -> None:
        if not link.named and self._links.get(link.worker_id) is link and not self._journal.at(link):
            _log.tell("worker_left", worker=link.worker_id)
            self._forget(link)

    def _forget(self, link: WorkerLink) -> None:
        del self._links[link.worker_id]
        task = self._polls.pop(link)
        if task is not asyncio.current_task():
            task.cancel()

    def _cancel(self, link: WorkerLink, sequence_ids: list[str]) -> None:
        task = asyncio.create_task(self._cancel_at_worker(link, sequence_ids))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel_at_worker(self, link: WorkerLink, sequence_ids: list[str]) -> None:
        try:
            async with asyncio.timeout(self._call_timeout_s):
                await link.client.cancel(sequence_ids)
        except (UnavailableError, TimeoutError) as error:
            reason = reason_of(error)
            _log.tell("cancel_unheard", worker=link.worker_id, num_sequences=len(sequence_ids), reason=reason)
        except Exception as error:  # noqa: BLE001 - it is logged; the worker's poll tells whether it lives
            _log.tell("worker_call_failed", error, worker=link.worker_id, call="cancel")
