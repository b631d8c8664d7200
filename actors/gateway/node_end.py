"""When does the node of this process end? As Ray was told, by `expertmesh leave` or whoever else drains nodes."""

import asyncio
import time
from collections.abc import Callable, Mapping

from expertmesh.actors.logs import EventLog, reason_of

_log = EventLog(__name__)
_PERIOD_S = 0.5
_TIMEOUT_S = 2.0

# Returns, within so many seconds, when each node that is to end may end: see runtime.draining_nodes.
Deadlines = Callable[[float], Mapping[str, float]]


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
            end_s = (await asyncio.to_thread(deadlines, _TIMEOUT_S)).get(node_id)
            told = False
        except Exception as error:  # noqa: BLE001 - Ray's own are of many kinds; it is asked again
            if not told:
                _log.tell("node_end_unknown", reason=reason_of(error))
            told, end_s = True, None
        if end_s is not None and end_s - now_s() <= within_s:
            return
        await asyncio.sleep(_PERIOD_S)
