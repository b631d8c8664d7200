"""Collects what the workers count into load windows, and keeps the windows in the store.

Counts are asked for since the beginning of each worker's process and only differences are added, so a report that is
lost or asked for twice changes nothing, and what was counted while the controller was away is not lost.
"""

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.actors.controller.tiers import Tier, wait_for
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.state import StateStore
from expertmesh.cluster.errors import StateError, UnavailableError
from expertmesh.cluster.ids import WorkerId
from expertmesh.cluster.load_windows import Load, LoadWindows
from expertmesh.cluster.model_info import ModelInfo

_log = EventLog(__name__)
_CALL_TIMEOUT_S = 2.0
_SAVE_PERIOD_S = 5.0


class LoadCollector:
    """The load windows of one deployment. Any thread may call."""

    def __init__(self, model: ModelInfo, store: StateStore, workers: Tier[WorkerId]) -> None:
        self._model = model
        self._store = store
        self._workers = workers
        self._last: dict[WorkerId, dict[str, Any]] = {}
        self._saved_s = 0.0
        kept = self._kept(model)
        # Workers that a former controller has heard may have counted long ago: what it missed cannot be dated.
        self._may_be_old = kept is not None
        self._windows = kept or LoadWindows(len(model.moe_layers), model.num_slices)
        self._expert_s = _SlidingSum(self._windows.slow_s)
        self._lock = threading.Lock()

    @property
    def slow_s(self) -> float:
        """Seconds of the slow window."""
        return self._windows.slow_s

    @property
    def expert_s(self) -> float:
        """Seconds that the workers' steps spent on experts in the slow window, summed."""
        with self._lock:
            return self._expert_s.total

    def slow(self, now_s: float) -> Load:
        """Return the slow window; now_s is wall-clock seconds, as in all calls."""
        with self._lock:
            return self._windows.slow(now_s)

    def fast(self, now_s: float) -> Load:
        """Return the fast window."""
        with self._lock:
            return self._windows.fast(now_s)

    def latest(self) -> list[dict[str, Any]]:
        """Return what each worker that is there counted when it last answered."""
        with self._lock:
            return [counters for worker, counters in self._last.items() if worker in self._workers.handles]

    def dropped_LE(self) -> npt.NDArray[np.int64]:  # noqa: N802  # a shape suffix
        """Return the pairs that those workers left out since they began; none without a capacity factor."""
        counted = [counters["dropped_LE"] for counters in self.latest() if counters["dropped_LE"] is not None]
        return sum(counted, np.zeros((len(self._model.moe_layers), self._model.num_experts), dtype=np.int64))

    def collect(self, now_s: float) -> None:
        """Ask each ready worker and add what is new.

        Raises:
            UnavailableError: a worker or the store did not answer; the other workers' counts are added.
        """
        handles = {w: handle for w, handle in tuple(self._workers.handles.items()) if w in self._workers.ready}
        asked = {worker: handle.counters.remote() for worker, handle in handles.items()}
        failed: UnavailableError | None = None
        deadline_s = time.monotonic() + _CALL_TIMEOUT_S
        for worker, reference in asked.items():
            try:
                counters = wait_for([reference], max(0.01, deadline_s - time.monotonic()))[0]
            except UnavailableError as error:
                failed = error
                continue
            with self._lock:
                self._add(worker, counters, now_s)
        if now_s >= self._saved_s + _SAVE_PERIOD_S:
            with self._lock:
                self._store.save_windows(self._windows)
                self._saved_s = now_s
        if failed is not None:
            raise failed

    def _add(self, worker: WorkerId, counters: dict[str, Any], now_s: float) -> None:
        last = self._last.get(worker)
        if last is None and self._may_be_old:
            self._last[worker] = counters
            return
        if last is None or last["life"] != counters["life"]:
            last = {"load_LE": 0, "decode_LE": 0, "expert_s": 0.0}
        load_LE, decode_LE = counters["load_LE"] - last["load_LE"], counters["decode_LE"] - last["decode_LE"]
        if (load_LE < 0).any() or (decode_LE < 0).any():
            return  # an answer that was overtaken by a later one
        self._last[worker] = counters
        # The worker counts on while its counters are copied, one array after the other.
        self._windows.add(now_s, np.maximum(load_LE - decode_LE, 0), decode_LE)
        self._expert_s.add(now_s, counters["expert_s"] - last["expert_s"])

    def _kept(self, model: ModelInfo) -> LoadWindows | None:
        try:
            kept = self._store.load_windows()
        except (StateError, UnavailableError) as error:
            _log.tell("record_lost", what="the load windows", reason=reason_of(error))
            return None
        shape = (len(model.moe_layers), model.num_slices)
        return kept if kept is not None and (kept.num_layers, kept.num_experts) == shape else None


class _SlidingSum:
    """A sum over the last window_s seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._parts: list[tuple[float, float]] = []

    def add(self, now_s: float, value: float) -> None:
        """Add a value as of now."""
        self._parts = [part for part in self._parts if part[0] > now_s - self._window_s]
        self._parts.append((now_s, value))

    @property
    def total(self) -> float:
        """The sum as of the last `add`."""
        return sum(value for _, value in self._parts)
