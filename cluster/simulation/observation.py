"""What the fleet's loops get to see in virtual time: load windows, time spent on experts, how busy shards were.

Shape suffixes: L MoE layers, E experts of a layer.
"""

from collections import deque

import numpy as np

from expertmesh.cluster.autoscaler import ShardInputs
from expertmesh.cluster.load_windows import Load, LoadWindows
from expertmesh.cluster.simulation.step_time import StepTime
from expertmesh.cluster.simulation.traffic import Interval


class Observation:
    """Counts steps, and tells as the load collector and the measuring of the controller do."""

    def __init__(self, num_layers: int, num_experts: int, *, slow_s: float) -> None:
        self._windows = LoadWindows(num_layers, num_experts, slow_s=slow_s)
        self._chosen_LE = np.zeros((num_layers, num_experts))
        self._told_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._slow_s = slow_s
        self._expert_s: deque[tuple[float, float]] = deque()
        self._new_expert_s = 0.0
        self._looked_s = 0.0
        self._busy_s = self._mean_busy_s = self._wait_s = 0.0
        self._tokens = 0

    def step(self, time: StepTime, tokens: int, backlog_s: float, copies: int) -> None:
        """Count a step.

        Args:
            time: of it.
            tokens: of it.
            backlog_s: how long those that it had no room for are behind it.
            copies: of attention, each of which waits for the experts.
        """
        self._new_expert_s += time.expert_s * copies
        self._busy_s += time.step_s
        self._mean_busy_s += time.step_s - time.expert_s + time.mean_expert_s
        self._wait_s += backlog_s * tokens
        self._tokens += tokens

    def chosen(self, interval: Interval, tokens: int) -> None:
        """Count the choices of so many tokens of an interval."""
        if interval.tokens:
            self._chosen_LE += interval.load_LE * (tokens / interval.tokens)

    def collect(self, now_s: float) -> None:
        """Put what is new into the windows."""
        whole_LE = np.rint(self._chosen_LE).astype(np.int64)
        new_LE = whole_LE - self._told_LE
        self._told_LE = whole_LE
        self._windows.add(now_s, np.zeros_like(new_LE), new_LE)
        self._expert_s.append((now_s, self._new_expert_s))
        self._new_expert_s = 0.0
        while self._expert_s[0][0] <= now_s - self._slow_s:
            self._expert_s.popleft()

    def fast(self, now_s: float) -> Load:
        """Return the fast window."""
        return self._windows.fast(now_s)

    def slow(self, now_s: float) -> Load:
        """Return the slow window."""
        return self._windows.slow(now_s)

    @property
    def expert_s(self) -> float:
        """Seconds that the copies of attention waited for experts in the slow window."""
        return sum(seconds for _, seconds in self._expert_s)

    def shard_inputs(self, now_s: float, *, current: int, needed_bytes: int, shard_bytes: int) -> ShardInputs:
        """Return how busy shards were since the last call.

        A shard's GPUs compute attention too, so none waits for the other: a shard is busy for as long as steps take,
        but for its waits for the busiest one.
        """
        passed_s = max(now_s - self._looked_s, 1e-9)
        busiest = min(1.0, self._busy_s / passed_s)
        inputs = ShardInputs(
            current=current,
            busiest_utilisation=busiest,
            mean_utilisation=min(busiest, self._mean_busy_s / passed_s),
            worker_wait_fraction=0.0,
            queue_s=self._wait_s / max(1, self._tokens),
            needed_bytes=needed_bytes,
            shard_bytes=shard_bytes,
        )
        self._looked_s = now_s
        self._busy_s = self._mean_busy_s = self._wait_s = 0.0
        self._tokens = 0
        return inputs
