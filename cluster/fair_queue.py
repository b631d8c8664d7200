"""Which of the waiting requests goes next, so that each API key gets its share of the tokens: virtual token counters.

Sheng et al., "Fairness in serving large language models", OSDI 2024, algorithms 2 and 4. Each flow (an API key) has a
counter of the tokens that it was served, over its weight. The waiting flow with the lowest counter is next; within a
flow it is first come, first served. A flow that begins to wait is lifted to the lowest counter among those that wait,
so nobody saves up for later what was not asked for. Unlike start-time fair queueing (Goyal, Vin and Cheng, 1996) this
needs no length of a request beforehand: output is counted as it comes.

What holds (the paper's lemma 4.3 and theorem 4.4, with weights):

- Counters of waiting flows differ by at most U, the most tokens over weight that a flow may still be charged for after
  its last request went: that one's prompt, and the rest of all its output that is under way.
- Over an interval in which two flows always wait, what they are served, over their weights, differs by at most 2 U.
- Work-conserving: while a request waits, `pop` gives one.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from expertmesh.cluster.errors import CapacityError

Item = TypeVar("Item")


class _Size(NamedTuple):
    num_sequences: int
    num_prompt_tokens: int


@dataclass(eq=False, slots=True)
class _Flow(Generic[Item]):
    """counter: tokens served over weight. num_sequences: of all that wait."""

    weight: float = 1.0
    counter: float = 0.0
    num_sequences: int = 0
    waiting: OrderedDict[Item, _Size] = field(default_factory=OrderedDict)


class FairQueue(Generic[Item]):
    """Waiting requests of several flows. Items are hashable, and each is there once.

    is_shared: several flows may come, so none may fill the queue by itself. A flow then waits with fewer sequences than
    are still free: alone it gets half of the queue, two get a third each, and there is always room for a newcomer.
    Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM
    Transactions on Networking 6(2), 1998, with alpha 1.
    """

    def __init__(self, max_sequences: int, *, is_shared: bool = False) -> None:
        """Have room for this many sequences; a request has one for each sample."""
        self.is_shared = is_shared
        self.num_sequences = 0
        self._max_sequences = max_sequences
        self._flows: dict[str, _Flow[Item]] = {}
        self._waiting: dict[str, _Flow[Item]] = {}  # in the order in which they began to wait
        self._last: _Flow[Item] | None = None  # the last that ceased to wait

    def __len__(self) -> int:
        return sum(len(flow.waiting) for flow in self._waiting.values())

    def require_room(self, flow_name: str, num_sequences: int) -> None:
        """Refuse what `push` would.

        Raises:
            CapacityError: the queue, or the flow's part of it, is full.
        """
        flow = self._flow(flow_name)
        free = self._max_sequences - self.num_sequences
        if num_sequences > free:
            raise CapacityError(
                f"{self.num_sequences} sequences wait at this gateway and {num_sequences} more are asked for; "
                f"{self._max_sequences} is the most"
            )
        if self.is_shared and flow.num_sequences + num_sequences > free:
            raise CapacityError(
                f"{flow.num_sequences} sequences of this API key wait and {num_sequences} more are asked for; it may "
                f"not have more than are still free in the queue, which are {free}"
            )

    def push(self, flow_name: str, item: Item, *, weight: float, num_sequences: int, num_prompt_tokens: int) -> None:
        """Let a request wait behind the others of its flow.

        Raises:
            CapacityError: the queue, or the flow's part of it, is full.
        """
        self.require_room(flow_name, num_sequences)
        flow = self._flow(flow_name)
        flow.weight = weight
        if not flow.waiting:
            self._lift(flow)
            self._waiting[flow_name] = flow
        flow.waiting[item] = _Size(num_sequences, num_prompt_tokens)
        flow.num_sequences += num_sequences
        self.num_sequences += num_sequences

    def pass_by(self, flow_name: str, *, weight: float, num_prompt_tokens: int) -> None:
        """Count a request that goes at once, as none waits: as if it had been pushed and popped."""
        assert not self._waiting, "a request went past those that wait"
        flow = self._flow(flow_name)
        flow.weight = weight
        self._lift(flow)
        self._last = flow
        self.charge(flow_name, num_prompt_tokens)

    def pop(self) -> Item | None:
        """Take out the request that goes next and charge its flow for the prompt; None when none waits."""
        if not self._waiting:
            return None
        # Of equal ones the first that began to wait.
        name = min(self._waiting, key=lambda waiting: self._waiting[waiting].counter)
        item, size = next(iter(self._waiting[name].waiting.items()))
        self.remove(name, item)
        self.charge(name, size.num_prompt_tokens)
        return item

    def remove(self, flow_name: str, item: Item) -> None:
        """Take out a request that waits, and charge nothing."""
        flow = self._waiting[flow_name]
        size = flow.waiting.pop(item)
        flow.num_sequences -= size.num_sequences
        self.num_sequences -= size.num_sequences
        if not flow.waiting:
            del self._waiting[flow_name]
            self._last = flow

    def charge(self, flow_name: str, num_tokens: int) -> None:
        """Count tokens that a flow was served."""
        flow = self._flow(flow_name)
        flow.counter += num_tokens / flow.weight

    def forget(self, flow_name: str) -> None:
        """Drop the counter of a flow that will not come again; while it waits it stays."""
        if flow_name not in self._waiting:
            self._flows.pop(flow_name, None)

    def _flow(self, flow_name: str) -> _Flow[Item]:
        flow = self._flows.get(flow_name)
        if flow is None:
            flow = self._flows[flow_name] = _Flow()
        return flow

    def _lift(self, flow: _Flow[Item]) -> None:
        """Begin where those that wait are, or, when none does, where the last was."""
        if self._waiting:
            flow.counter = max(flow.counter, min(other.counter for other in self._waiting.values()))
        elif self._last is not None:
            flow.counter = max(flow.counter, self._last.counter)
