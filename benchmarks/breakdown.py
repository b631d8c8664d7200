"""Where a decode step's time goes, by layer: the worker's hash, packing, sending, waiting and adding.

Timers are put around the functions that the worker calls, so each figure includes what its function calls. Part of
`benchmarks.distribution --breakdown`, which leaves prefill steps out.
"""

import functools
import time
from collections.abc import Callable
from typing import Any


class Timers:
    """Adds up the seconds spent in some functions, until `take` asks for them."""

    def __init__(self) -> None:
        self.total_s: dict[str, float] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Time every call of owner.name from now on."""
        function: Callable[..., Any] = getattr(owner, name)
        self.total_s[label] = 0.0

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.total_s[label] += time.perf_counter() - started_s

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Return the seconds by label since the last call, and begin again."""
        taken = dict(self.total_s)
        self.total_s = dict.fromkeys(self.total_s, 0.0)
        return taken


def watch_worker(kind: str) -> Timers:
    """Put timers around the worker's part of a layer."""
    from expertmesh.actors.links import gloo, local
    from expertmesh.actors.worker import dispatcher, engine
    from expertmesh.cluster.dispatch_hash import DispatchTable
    from expertmesh.kernels.cpu import dense, exchange, linear

    timers = Timers()
    timers.watch(dense.AttentionLayer, "run", "attention, router")
    timers.watch(linear.PackedLinear, "__call__", "head")
    timers.watch(engine, "sample", "sample")
    link = {"gloo": gloo.GlooLink, "local": local.LocalLink}[kind]
    timers.watch(dispatcher.Dispatcher, "run", "experts, all")
    timers.watch(dispatcher, "count_tokens", "count loads")
    timers.watch(DispatchTable, "choose", "hash")
    timers.watch(exchange.Exchange, "run", "compiled: pack, send, wait, receive, add")
    timers.watch(dispatcher, "requests_for_shards", "pack")
    timers.watch(dispatcher, "dispatch_header", "headers")
    timers.watch(link, "send", "send")
    timers.watch(link, "recv", "wait and receive")
    timers.watch(dispatcher, "add_rows", "add")
    return timers


def report(taken: dict[str, float], *, steps: int, layers: int, step_s: float) -> str:
    """Return one line: microseconds a layer by label, and what of a step is left for the dense half."""
    parts = ", ".join(f"{label} {seconds / steps / layers * 1e6:.0f}" for label, seconds in taken.items())
    known_s = sum(taken[label] for label in ("experts, all", "attention, router", "head", "sample"))
    rest_us = (step_s - known_s / steps) / layers * 1e6
    counting = taken["count loads"] / steps / step_s
    return (
        f"step {step_s * 1e3:.1f} ms, {counting:.2%} of it counting loads; us a layer: {parts}; "
        f"the rest {rest_us:.0f}"
    )
