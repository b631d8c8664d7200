"""Whether all gateways know that a worker is to leave, so that none gives it a request that it cannot finish."""

from collections.abc import Collection

# A gateway asks twice a second; one that is silent for longer has gone.
_SILENCE_S = 5.0


class Handover:
    """What each gateway was told last. Any thread may call."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, frozenset[str]]] = {}

    def inform(self, gateway_id: str, leaving: Collection[str], now_s: float) -> None:
        """Note that a gateway is told now which workers leave."""
        self._told = {**self._recent(now_s), gateway_id: (now_s, frozenset(leaving))}

    def is_known(self, worker: str, now_s: float) -> bool:
        """Say whether each gateway that is there was told that a worker leaves."""
        return all(worker in leaving for _, leaving in self._recent(now_s).values())

    def _recent(self, now_s: float) -> dict[str, tuple[float, frozenset[str]]]:
        return {gateway: told for gateway, told in self._told.items() if now_s - told[0] <= _SILENCE_S}
