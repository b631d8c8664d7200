"""Each key its share of the tokens, whoever floods: bounds of the paper, order, and what the queue refuses."""

import random
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.fair_queue import FairQueue


def push(queue: FairQueue[str], flow: str, item: str, *, weight: float = 1.0, size: int = 1, prompt: int = 1) -> None:
    queue.push(flow, item, weight=weight, num_sequences=size, num_prompt_tokens=prompt)


def pop_all(queue: FairQueue[str]) -> list[str]:
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
    return popped


def test_one_flow_is_first_come_first_served() -> None:
    queue = FairQueue[str](100)
    items = [f"a{index}" for index in range(50)]
    for index, item in enumerate(items):
        push(queue, "a", item, prompt=50 - index)
    assert len(queue) == queue.num_sequences == 50
    assert pop_all(queue) == items
    assert queue.pop() is None


def test_worked_example() -> None:
    """Two flows of weights 1 and 2; each prompt has 10 tokens: counters grow by 10 and 5."""
    queue = FairQueue[str](100)
    for index in range(4):
        push(queue, "a", f"a{index}", prompt=10)
    for index in range(4):
        push(queue, "b", f"b{index}", prompt=10, weight=2)
    # a: 0, 10, 20, 30; b: 0, 5, 10, 15; of equal ones a, which waited first.
    assert pop_all(queue) == ["a0", "b0", "b1", "a1", "b2", "b3", "a2", "a3"]


def test_output_counts_as_it_comes() -> None:
    queue = FairQueue[str](100)
    for index in range(2):
        push(queue, "a", f"a{index}")
        push(queue, "b", f"b{index}")
    assert [queue.pop(), queue.pop()] == ["a0", "b0"]
    queue.charge("a", 100)
    assert pop_all(queue) == ["b1", "a1"]


def test_who_was_idle_has_saved_up_nothing() -> None:
    queue = FairQueue[str](100)
    for _ in range(100):
        queue.pass_by("a", weight=1, num_prompt_tokens=10)
    for index in range(3):
        push(queue, "b", f"b{index}", prompt=10)
    push(queue, "a", "a0", prompt=10)
    push(queue, "a", "a1", prompt=10)
    assert pop_all(queue) == ["b0", "a0", "b1", "a1", "b2"]


def test_who_leaves_the_queue_is_charged_nothing() -> None:
    queue = FairQueue[str](100)
    for flow in ("a", "b"):
        for index in range(3):
            push(queue, flow, f"{flow}{index}", prompt=10)
    queue.remove("a", "a0")
    queue.remove("a", "a2")
    assert queue.num_sequences == 4
    assert pop_all(queue) == ["a1", "b0", "b1", "b2"]


def test_a_full_queue_refuses() -> None:
    queue = FairQueue[str](4)
    push(queue, "a", "a0", size=3)
    with pytest.raises(CapacityError, match="3 sequences wait at this gateway and 2 more are asked for; 4 is the most"):
        push(queue, "a", "a1", size=2)
    push(queue, "a", "a2")
    assert pop_all(queue) == ["a0", "a2"]


def test_no_flow_fills_a_shared_queue() -> None:
    queue = FairQueue[str](12, is_shared=True)

    def fill(flow: str, num_taken: int) -> None:
        for number in range(num_taken):
            push(queue, flow, f"{flow}{number}")
        with pytest.raises(CapacityError, match=f"{num_taken} sequences of this API key wait"):
            push(queue, flow, "one too many")

    for flow, num_taken in (("a", 6), ("b", 3), ("c", 2)):
        fill(flow, num_taken)
    for number in range(3):
        queue.remove("a", f"a{number}")
    push(queue, "d", "d0")


def test_a_flow_that_is_forgotten_begins_anew() -> None:
    queue = FairQueue[str](10)
    queue.pass_by("a", weight=1, num_prompt_tokens=10)
    push(queue, "a", "a0")
    queue.forget("a")
    assert pop_all(queue) == ["a0"], "one that waits is kept"
    queue.forget("a")
    queue.forget("nobody")


@dataclass
class Fleet:
    """Requests of some flows in virtual time: workers with room for so many, each token of output one event."""

    weights: list[float]
    room: int
    most_prompt: int
    most_output: int
    rng: random.Random
    queue: FairQueue[int] = field(default_factory=lambda: FairQueue[int](10**9))
    running: dict[int, int] = field(default_factory=dict)  # request: tokens of output left
    requests: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # flow, prompt, output
    waiting: list[int] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    popped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting, self.served = [0] * len(self.weights), [0.0] * len(self.weights)

    @property
    def most_outstanding(self) -> float:
        """The paper's U: a prompt and all output under way, over the smallest weight."""
        return (self.most_prompt + self.room * self.most_output) / min(self.weights)

    def arrive(self, flow: int) -> None:
        number = len(self.requests)
        prompt, output = self.rng.randint(1, self.most_prompt), self.rng.randint(1, self.most_output)
        self.requests[number] = (flow, prompt, output)
        weight = self.weights[flow]
        self.queue.push(str(flow), number, weight=weight, num_sequences=1, num_prompt_tokens=prompt)
        self.waiting[flow] += 1
        self.fill()

    def token(self) -> None:
        if not self.running:
            return
        number = self.rng.choice(list(self.running))
        self.running[number] -= 1
        flow = self.requests[number][0]
        self.queue.charge(str(flow), 1)
        self.served[flow] += 1 / self.weights[flow]
        if not self.running[number]:
            del self.running[number]
            self.fill()

    def fill(self) -> None:
        while len(self.running) < self.room:
            number = self.queue.pop()
            # Work-conserving: room is left only where nobody waits.
            assert (number is None) == (sum(self.waiting) == 0)
            if number is None:
                return
            flow, prompt, output = self.requests[number]
            self.popped.append(number)
            self.running[number] = output
            self.waiting[flow] -= 1
            self.served[flow] += prompt / self.weights[flow]


FLEETS = st.builds(
    Fleet,
    weights=st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    room=st.integers(1, 3),
    most_prompt=st.integers(1, 6),
    most_output=st.integers(1, 4),
    rng=st.integers(0, 2**32).map(random.Random),
)


def run(fleet: Fleet, num_events: int, popularity: list[int]) -> "list[tuple[list[float], list[bool]]]":
    """Let requests come, more of popular flows, faster than they are served; return what was seen after each event."""
    seen = []
    for _ in range(num_events):
        if fleet.rng.random() < 0.4:
            fleet.arrive(fleet.rng.choices(range(len(popularity)), popularity)[0])
        else:
            fleet.token()
        seen.append((list(fleet.served), [count > 0 for count in fleet.waiting]))
    return seen


@settings(max_examples=60, deadline=None)
@given(fleet=FLEETS, flood=st.integers(1, 30))
def test_flows_that_both_wait_are_served_alike(fleet: Fleet, flood: int) -> None:
    seen = run(fleet, 1200, [flood, *[1] * (len(fleet.weights) - 1)])
    for one, other in combinations(range(len(fleet.weights)), 2):
        low = high = None
        for served, waits in seen:
            difference = served[one] - served[other]
            both = waits[one] and waits[other]
            low = (difference if low is None else min(low, difference)) if both else None
            high = (difference if high is None else max(high, difference)) if both else None
            if low is not None and high is not None:
                assert high - low <= 2 * fleet.most_outstanding + 1e-9


@settings(max_examples=60, deadline=None)
@given(fleet=FLEETS, flood=st.integers(1, 30))
def test_no_flow_starves(fleet: Fleet, flood: int) -> None:
    """While a flow waits in vain, another gets at most what is under way, the difference of counters, and one more."""
    popularity = [flood, *[1] * (len(fleet.weights) - 1)]
    begun: list[list[float] | None] = [None] * len(popularity)
    num_popped = 0
    for _ in range(1200):
        run(fleet, 1, popularity)
        for flow in {fleet.requests[number][0] for number in fleet.popped[num_popped:]}:
            begun[flow] = None
        num_popped = len(fleet.popped)
        for flow, since in enumerate(begun):
            if not fleet.waiting[flow]:
                begun[flow] = None
            elif since is None:
                begun[flow] = list(fleet.served)
            else:
                grown = [now - before for now, before in zip(fleet.served, since, strict=True)]
                assert max(grown) <= 4 * fleet.most_outstanding + 1e-9


@settings(max_examples=30, deadline=None)
@given(fleet=FLEETS, num_requests=st.integers(1, 60))
def test_all_that_came_goes_and_each_flow_in_its_order(fleet: Fleet, num_requests: int) -> None:
    for _ in range(num_requests):
        fleet.arrive(fleet.rng.randrange(len(fleet.weights)))
    while fleet.running:
        fleet.token()
    assert sorted(fleet.popped) == list(range(num_requests))
    for flow in range(len(fleet.weights)):
        own = [number for number in fleet.popped if fleet.requests[number][0] == flow]
        assert own == sorted(own)
