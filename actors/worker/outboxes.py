"""Which gateway is told of which sequence, and what becomes of those whose gateway is gone."""

from collections.abc import Callable, Iterable, Sequence

from expertmesh.actors.worker.outbox import Outbox
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.requests import TokenEvent

# A gateway that lives asks again as soon as it is answered. One that was silent for so long has moved its requests.
SILENCE_S = 60.0


class Outboxes:
    """The outboxes of one worker's gateways. Lives on one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Know no gateway; clock gives seconds that do not step back."""
        self._clock = clock
        self._outboxes: dict[str, Outbox] = {}
        self._heard_s: dict[str, float] = {}
        self._gateway_of: dict[str, str] = {}

    def assign(self, gateway_id: str, sequence_ids: Iterable[str]) -> None:
        """Tell this gateway of these sequences."""
        self._heard_s.setdefault(gateway_id, self._clock())
        self._gateway_of.update(dict.fromkeys(sequence_ids, gateway_id))

    def release(self, sequence_ids: Iterable[str]) -> None:
        """Tell nobody of these sequences any more; unknown ones are passed over."""
        for sequence_id in sequence_ids:
            self._gateway_of.pop(sequence_id, None)

    def put(self, events: Sequence[TokenEvent]) -> None:
        """Sort a step's events by gateway; those of released sequences fall away."""
        by_gateway: dict[str, list[TokenEvent]] = {}
        for event in events:
            gateway_id = self._gateway_of.get(event.sequence_id)
            if gateway_id is None:
                continue
            by_gateway.setdefault(gateway_id, []).append(event)
            if event.finish_reason is not None:
                del self._gateway_of[event.sequence_id]
        for gateway_id, own_events in by_gateway.items():
            self._outboxes.setdefault(gateway_id, Outbox()).put(own_events)

    async def poll(self, gateway_id: str, after: int, timeout_s: float) -> tuple[int, list[TokenEvent]]:
        """See Outbox.poll.

        Raises:
            UnavailableError: the gateway was given up, and with it what it should have heard of.
        """
        if after and gateway_id not in self._heard_s:
            raise UnavailableError(f"{gateway_id} was silent for {SILENCE_S} s and is forgotten")
        self._heard_s[gateway_id] = self._clock()
        answer = await self._outboxes.setdefault(gateway_id, Outbox()).poll(after, timeout_s)
        self._heard_s[gateway_id] = self._clock()
        return answer

    def give_up_silent(self) -> list[str]:
        """Forget the gateways that were silent for SILENCE_S; return their sequences, which nobody reads."""
        now_s = self._clock()
        silent = {gateway_id for gateway_id, heard_s in self._heard_s.items() if now_s - heard_s > SILENCE_S}
        for gateway_id in silent:
            del self._heard_s[gateway_id]
            self._outboxes.pop(gateway_id, None)
        abandoned = [sequence_id for sequence_id, gateway_id in self._gateway_of.items() if gateway_id in silent]
        self.release(abandoned)
        return abandoned
