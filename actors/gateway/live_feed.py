"""One look at the fleet a second, shared by all who watch the live page; none while nobody does."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.gateway_events import GatewayEvents
from expertmesh.actors.gateway.live_picture import GatewayFigures, LivePicture, Message
from expertmesh.actors.gateway.live_times import TokenTimes
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import CapacityError, UnavailableError
from expertmesh.cluster.model_info import ModelInfo

_log = EventLog(__name__)
PERIOD_S = 1.0
# Longer than the controller waits for workers before it answers without them.
TIMEOUT_S = 4.0
MAX_VIEWERS = 64
# Messages that may wait for a viewer. One that is further behind is let go; its page comes back and begins anew.
MAX_BEHIND = 8

# Asked with (epoch, last event, life) of what is known: see LiveView.view.
Ask = Callable[[int, int, int], Awaitable[Mapping[str, Any]]]


class LiveFeed:
    """What the live page is fed with. Use it inside one event loop.

    events: those of this gateway.
    """

    def __init__(
        self,
        model: ModelInfo,
        engine: Engine,
        ask: Ask,
        *,
        is_serving: Callable[[], bool],
        period_s: float = PERIOD_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Look at nothing yet.

        Args:
            model: what is served.
            engine: of this gateway.
            ask: asks the controller.
            is_serving: what the health service says.
            period_s: seconds between two looks.
            timeout_s: longest wait for the controller.
        """
        self._engine, self._ask, self._is_serving = engine, ask, is_serving
        self._period_s, self._timeout_s = period_s, timeout_s
        self._picture = LivePicture(model)
        self._times = TokenTimes()
        self.events = GatewayEvents()
        self._last_event = 0
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._one_look = asyncio.Lock()
        self._is_closed = False
        engine.meter.on_report = self._times.add
        engine.pool.on_failover = self.events.failed_over

    @property
    def num_viewers(self) -> int:
        """How many watch."""
        return len(self._viewers)

    async def state(self) -> bytes:
        """Return all that is known as JSON. Looks at the fleet if nobody watches it just now, or has not yet.

        Returns:
            The fields of LivePicture.seen, with `model`, `placement`, `history`, all events that are kept, and
            `viewers`: how many watch.
        """
        if not self._viewers:
            self._picture.begin()
        if not self._picture.is_current:
            # Of who has just begun to watch it may be the first look: what is new in it is for them too.
            self._hand_out(_event("tick", await asyncio.to_thread(_to_json, await self._look())))
        return await asyncio.to_thread(_to_json, {**self._picture.whole(), "viewers": self.num_viewers})

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: `state` first, with all that is known, then a `tick` with each look.

        Raises:
            CapacityError: too many watch.
            UnavailableError: the feed is closed.
        """
        if self._is_closed:
            raise UnavailableError("the gateway is stopping")
        if len(self._viewers) >= MAX_VIEWERS:
            raise CapacityError(f"{MAX_VIEWERS} pages watch this gateway already")
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND)
        if not self._viewers:
            self._picture.begin()
            self._times.is_wanted = True
        self._viewers.add(queue)
        try:
            yield _event("state", await asyncio.to_thread(_to_json, self._picture.whole()))
            if self._poller is None:
                self._poller = asyncio.create_task(self._poll(), name="live page")
            while (frame := await queue.get()) is not None:
                yield frame
        finally:
            self._viewers.discard(queue)
            if not self._viewers:
                self._stop()

    async def close(self) -> None:
        """End all streams; others are refused."""
        self._is_closed = True
        for queue in tuple(self._viewers):
            self._let_go(queue)
        poller = self._poller
        self._stop()
        if poller is not None:
            await asyncio.gather(poller, return_exceptions=True)

    async def _poll(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                frame = _event("tick", await asyncio.to_thread(_to_json, await self._look()))
            except Exception as error:  # noqa: BLE001  it is told, and the next look may do
                _log.tell("live_look_failed", error)
            else:
                self._hand_out(frame)
            await asyncio.sleep(max(0.0, self._period_s - (time.monotonic() - began_s)))

    def _hand_out(self, frame: bytes) -> None:
        for queue in tuple(self._viewers):
            if queue.full():
                _log.tell("viewer_let_go", num_messages=queue.qsize())
                self._let_go(queue)
            else:
                queue.put_nowait(frame)

    def _let_go(self, queue: "asyncio.Queue[bytes | None]") -> None:
        self._viewers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)

    def _stop(self) -> None:
        self._times.is_wanted = False
        if self._poller is not None:
            self._poller.cancel()
            self._poller = None

    async def _look(self) -> Message:
        """Ask the controller and the gateway. A controller that is away is a part of the picture."""
        picture = self._picture
        async with self._one_look:
            try:
                async with asyncio.timeout(self._timeout_s):
                    view = await self._ask(picture.epoch, picture.last_event, picture.life)
            except TimeoutError:
                return picture.away(f"no answer for {self._timeout_s:g} s", self._figures(), wall_s=time.time())
            except UnavailableError as error:
                return picture.away(str(error), self._figures(), wall_s=time.time())
            # A matrix of thousands of experts takes some milliseconds, in which tokens go on.
            return await asyncio.to_thread(
                picture.seen, view, self._figures(), wall_s=time.time(), clock_s=time.monotonic()
            )

    def _figures(self) -> GatewayFigures:
        events = self.events.after(self._last_event)
        self._last_event = max((event.number for event in events), default=self._last_event)
        return GatewayFigures(
            is_serving=self._is_serving(),
            live_requests=self._engine.num_live_requests,
            times=self._times.summary(),
            events=events,
        )


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _to_json(message: Message) -> bytes:
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
