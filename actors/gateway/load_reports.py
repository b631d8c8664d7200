"""What was counted between two looks at the loads, for whoever watches them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import cast

from expertmesh.cluster.errors import InputError

Loads = Sequence[Mapping[str, object]]

DEFAULT_PERIOD_S = 1.0
MIN_PERIOD_S = 0.1
MAX_PERIOD_S = 3600.0


async def load_reports(
    get_loads: Callable[[], Awaitable[Loads]], period_s: float
) -> AsyncIterator[tuple[float, list[dict[str, object]]]]:
    """Yield, each period, its length in seconds and what each layer's counts grew by in it, without end.

    An interval in which a count fell is passed over: a worker left or began anew, and what it counted went with it.

    Args:
        get_loads: returns the fields of LayerLoad by name, counted since start, in order of layer.
        period_s: seconds.

    Raises:
        InputError: the period is out of range.
        UnavailableError: the loads cannot be had.
    """
    if not MIN_PERIOD_S <= period_s <= MAX_PERIOD_S:
        message = f"period_s is {period_s}; it must be from {MIN_PERIOD_S} to {MAX_PERIOD_S:g} seconds"
        raise InputError(message, field="period_s")
    last, last_s = await get_loads(), time.monotonic()
    while True:
        await asyncio.sleep(period_s)
        loads, now_s = await get_loads(), time.monotonic()
        grown = [_grown(layer, before) for layer, before in zip(loads, last, strict=True)]
        if all(layer is not None for layer in grown):
            yield now_s - last_s, [layer for layer in grown if layer is not None]
        last, last_s = loads, now_s


def _grown(now: Mapping[str, object], before: Mapping[str, object]) -> dict[str, object] | None:
    counts, earlier = cast(list[int], now["tokens"]), cast(list[int], before["tokens"])
    tokens = [count - less for count, less in zip(counts, earlier, strict=True)]
    decode_tokens = cast(int, now["decode_tokens"]) - cast(int, before["decode_tokens"])
    if min(tokens, default=0) < 0 or decode_tokens < 0:
        return None
    return {"layer": now["layer"], "tokens": tokens, "decode_tokens": decode_tokens}
