"""How much waits at the gateways, which no worker knows of."""

from typing import NamedTuple

# A gateway tells twice a second; one that is silent for longer has gone, and its queue with it.
_SILENCE_S = 5.0


class Backlog(NamedTuple):
    """Sequences that wait, and the most tokens that they may ask for."""

    num_sequences: int = 0
    num_tokens: int = 0


class GatewayQueues:
    """What each gateway said last. Any thread may call."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, Backlog]] = {}

    def hear(self, gateway_id: str, backlog: Backlog, now_s: float) -> None:
        """Take down what waits at a gateway now."""
        self._told = {**self._recent(now_s), gateway_id: (now_s, backlog)}

    def sum(self, now_s: float) -> Backlog:
        """Return what waits at all gateways."""
        waiting = [backlog for _, backlog in self._recent(now_s).values()]
        return Backlog(sum(one.num_sequences for one in waiting), sum(one.num_tokens for one in waiting))

    def _recent(self, now_s: float) -> dict[str, tuple[float, Backlog]]:
        return {gateway: told for gateway, told in self._told.items() if now_s - told[0] <= _SILENCE_S}
