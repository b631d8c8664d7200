"""When does the node of this process end? As Ray was told, by `expertmesh leave` or whoever else drains nodes."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from expertmesh.actors.logs import EventLog, reason_of

_log = EventLog(__name__)
_PERIOD_S = 0.5
_TIMEOUT_S = 2.0

# Returns, by the node's id, Unix milliseconds of its end; 0: nobody knows.
Deadlines = Callable[[], Mapping[str, float]]


async def until_node_ends(
    node_id: str, within_s: float, deadlines: Deadlines, *, now_s: Callable[[], float] = time.time
) -> None:
    """Return when a node is to end in so many seconds or less.

    Args:
        node_id: of the node.
        within_s: how long before its end.
        deadlines: asks for the nodes that are to end; it may block, and raise anything.
        now_s: Unix time.
    """
    told = False
    while True:
        try:
            end_ms = (await asyncio.to_thread(deadlines)).get(node_id)
            told = False
        except Exception as error:  # noqa: BLE001 - Ray's own are of many kinds; it is asked again
            if not told:
                _log.tell("node_end_unknown", reason=reason_of(error))
            told, end_ms = True, None
        if end_ms and end_ms / 1000 - now_s() <= within_s:
            return
        await asyncio.sleep(_PERIOD_S)


def ray_deadlines(gcs_address: str) -> Deadlines:
    """Return a way to ask the head of a Ray cluster. Ray Serve asks in the same way; Ray's stubs leave it out."""

    @cache
    def client() -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return GcsClient(address=gcs_address)

    def ask() -> Mapping[str, float]:
        found: Mapping[str, float] = client().get_draining_nodes(timeout=_TIMEOUT_S)
        return found

    return ask
