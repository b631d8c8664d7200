import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kv_pages import TokenChain
from expertmesh.cluster.requests import SamplingParams, SequenceRequest
from expertmesh.cluster.scheduler import Chunk, Scheduler, SchedulerConfig, StepPlan


def config_of(
    *, batch: int = 8, sequences: int = 4, pages: int = 16, size: int = 4, context: int = 64
) -> SchedulerConfig:
    return SchedulerConfig(
        max_batch_tokens=batch, max_sequences=sequences, num_pages=pages, page_size=size, max_context=context
    )


def request_of(
    name: str, prompt: tuple[int, ...], max_tokens: int = 4, outputs: tuple[int, ...] = ()
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens), output_ids=outputs
    )


def next_token(token_ids: tuple[int, ...]) -> int:
    """A toy model with few tokens, so that sequences meet in the same prefixes."""
    return hash(token_ids) % 3


@dataclass
class Engine:
    """Computes plans as an attention worker would, on a cache whose entries are the whole prefix that they stand for.

    It reads a sequence's cache only through the block table of its chunk, so that a wrong page, a page that was
    written by two sequences, or a position computed out of order or not at all gives a wrong entry.
    """

    config: SchedulerConfig
    requests: dict[str, SequenceRequest] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    num_computed_tokens: int = 0
    cache: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)

    def add(self, request: SequenceRequest) -> None:
        self.scheduler.add(request)
        self.requests[request.sequence_id] = request
        self.outputs[request.sequence_id] = list(request.output_ids)

    def cancel(self, name: str) -> None:
        assert self.scheduler.cancel(name)
        del self.requests[name], self.outputs[name]

    def compute(self, plan: StepPlan) -> dict[str, int]:
        assert len({chunk.sequence_id for chunk in plan.chunks}) == len(plan.chunks) <= self.config.max_sequences
        num_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        assert 0 < num_tokens <= self.config.max_batch_tokens
        self.num_computed_tokens += num_tokens
        self.check_write_ranges(plan)
        known = {chunk: self.write(chunk) for chunk in plan.chunks}
        return {chunk.sequence_id: next_token(known[chunk]) for chunk in plan.chunks if chunk.samples}

    def check_write_ranges(self, plan: StepPlan) -> None:
        size = self.config.page_size
        written = [set(chunk.pages[chunk.start // size :]) for chunk in plan.chunks]
        for index, pages in enumerate(written):
            for other, chunk in enumerate(plan.chunks):
                assert other == index or not pages & set(chunk.pages)

    def write(self, chunk: Chunk) -> tuple[int, ...]:
        size, end = self.config.page_size, chunk.start + len(chunk.token_ids)
        request = self.requests[chunk.sequence_id]
        known = (*request.prompt_ids, *self.outputs[chunk.sequence_id])
        assert len(chunk.pages) == -(-end // size)
        assert chunk.token_ids == known[chunk.start : end]
        assert chunk.samples == (end == len(known))
        for position in range(chunk.start, end):
            self.cache[chunk.pages[position // size], position % size] = known[: position + 1]
        for position in range(end):
            assert self.cache[chunk.pages[position // size], position % size] == known[: position + 1]
        return known

    def commit(self, plan: StepPlan, new_tokens: Mapping[str, int]) -> None:
        self.scheduler.commit(plan, new_tokens)
        for name, token in new_tokens.items():
            if name in self.requests:
                self.outputs[name].append(token)
                if len(self.outputs[name]) == self.requests[name].sampling.max_tokens:
                    self.scheduler.finish(name)

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.commit(plan, self.compute(plan))
        return plan

    def check_outputs(self) -> None:
        """Every sequence that was not cancelled got the tokens that it would get alone."""
        for name, request in self.requests.items():
            tokens = (*request.prompt_ids, *request.output_ids)
            while len(tokens) < len(request.prompt_ids) + request.sampling.max_tokens:
                tokens = (*tokens, next_token(tokens))
            assert (*request.prompt_ids, *self.outputs[name]) == tokens


@st.composite
def workloads(draw: st.DrawFn) -> tuple[SchedulerConfig, list[SequenceRequest]]:
    size = draw(st.integers(1, 4))
    pages = draw(st.integers(2, 12))
    capacity = size * pages
    config = config_of(
        batch=draw(st.integers(1, 12)), sequences=draw(st.integers(1, 5)), pages=pages, size=size, context=capacity + 1
    )
    requests = []
    for index in range(draw(st.integers(1, 9))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=min(capacity, 14)))
        max_tokens = draw(st.integers(1, min(10, capacity + 1 - len(prompt))))
        outputs = draw(st.lists(st.integers(0, 1), max_size=min(2, max_tokens - 1)))
        requests.append(request_of(f"s{index}", tuple(prompt), max_tokens, tuple(outputs)))
    return config, requests


def run(
    config: SchedulerConfig, arrivals: list[tuple[int, SequenceRequest]], cancels: Mapping[int, SequenceRequest]
) -> Scheduler:
    """Run sequences that arrive, and are cancelled during a step, at given rounds, to the end; check what must hold."""
    engine = Engine(config)
    scheduler = engine.scheduler
    requests = [request for _, request in arrivals]
    pending = sorted(arrivals, key=lambda pair: pair[0])
    # Each new token preempts at most every other running sequence, each of which is then computed again.
    num_preemptions = sum(request.sampling.max_tokens for request in requests) * config.max_sequences
    num_tokens = sum(len(request.prompt_ids) + request.sampling.max_tokens for request in requests)
    for now in range(20 + num_tokens + num_preemptions * config.max_context):
        while pending and pending[0][0] <= now:
            engine.add(pending.pop(0)[1])
        plan = scheduler.plan()
        assert (plan is None) == (scheduler.num_running + scheduler.num_waiting == 0)
        new_tokens = {} if plan is None else engine.compute(plan)
        if now in cancels and cancels[now].sequence_id in scheduler:
            engine.cancel(cancels[now].sequence_id)
        if plan is not None:
            engine.commit(plan, new_tokens)
        elif not pending:
            break
    else:
        pytest.fail("sequences are live after more rounds than they can need")
    engine.check_outputs()
    assert scheduler.num_free_pages == config.num_pages
    return scheduler


@settings(max_examples=200, deadline=None)
@given(workload=workloads(), data=st.data())
def test_every_sequence_ends_with_its_own_tokens(
    workload: tuple[SchedulerConfig, list[SequenceRequest]], data: st.DataObject
) -> None:
    config, requests = workload
    arrivals = [(data.draw(st.integers(0, 6)), request) for request in requests]
    run(config, arrivals, data.draw(st.dictionaries(st.integers(0, 12), st.sampled_from(requests), max_size=3)))


def test_every_sequence_ends_with_its_own_tokens_when_pages_are_scarce() -> None:
    num_preempted = num_reused_tokens = 0
    for seed in range(150):
        random = Random(seed)
        pages, size = random.randint(3, 10), random.randint(1, 4)
        config = config_of(batch=random.randint(3, 16), sequences=6, pages=pages, size=size, context=pages * size + 1)
        requests = []
        for index in range(12):
            prompt = tuple(random.choices((0, 1), k=random.randint(1, max(1, pages * size // 3))))
            requests.append(request_of(f"s{index}", prompt, random.randint(1, pages * size + 1 - len(prompt))))
        # After so many curt answers little is expected of the others, and too many are admitted.
        curt = [request_of(f"c{index}", (9,), 1) for index in range(20)]
        arrivals = [(0, request) for request in curt] + [(random.randint(5, 25), request) for request in requests]
        scheduler = run(config, arrivals, {random.randint(0, 40): request for request in requests[:2]})
        num_preempted += scheduler.num_preempted
        num_reused_tokens += scheduler.num_reused_tokens
    assert num_preempted > 200
    assert num_reused_tokens > 500


def test_decodes_come_first_then_running_prompts_then_the_queue() -> None:
    engine = Engine(config_of(batch=6))
    engine.add(request_of("short", (1, 2)))
    engine.add(request_of("long", tuple(range(20, 32))))
    engine.add(request_of("last", (3,)))
    plans = [engine.step() for _ in range(4)]
    lengths = [[(c.sequence_id, c.start, len(c.token_ids)) for c in plan.chunks] for plan in plans if plan]
    assert lengths == [
        [("short", 0, 2), ("long", 0, 4)],
        [("short", 2, 1), ("long", 4, 5)],
        [("short", 3, 1), ("long", 9, 3), ("last", 0, 1)],
        [("short", 4, 1), ("long", 12, 1), ("last", 1, 1)],
    ]


def test_sequences_start_in_the_order_in_which_they_came() -> None:
    engine = Engine(config_of(batch=5, sequences=2, pages=6))
    names = [f"s{index}" for index in range(9)]
    for index, name in enumerate(names):
        engine.add(request_of(name, (100 + index,) * (1 + 7 * index % 5), max_tokens=1 + index % 3))
    started: dict[str, None] = {}
    while plan := engine.step():
        started.update(dict.fromkeys(chunk.sequence_id for chunk in plan.chunks))
    assert list(started) == names


def test_the_youngest_is_preempted_keeps_its_outputs_and_comes_back_before_the_queue() -> None:
    engine = Engine(config_of(batch=16, sequences=2, pages=4, size=2))
    engine.add(request_of("curt", (9,), max_tokens=1))
    engine.step()  # so little is expected of the others
    engine.add(request_of("old", (1, 2, 3), max_tokens=5))
    engine.add(request_of("young", (5,), max_tokens=4))
    engine.add(request_of("late", (7,), max_tokens=1))
    steps: list[list[tuple[str, int, int]]] = []
    while plan := engine.step():
        steps.append([(chunk.sequence_id, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks])
    assert engine.scheduler.num_preempted == 1
    assert steps == [
        [("old", 0, 3), ("young", 0, 1)],
        [("old", 3, 1), ("young", 1, 1)],
        [("old", 4, 1)],  # takes the last page; young would need another for its third token
        [("old", 5, 1)],
        [("old", 6, 1)],
        [("young", 0, 3), ("late", 0, 1)],  # its page was evicted: prompt and outputs anew
        [("young", 3, 1)],
    ]
    engine.check_outputs()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_generates_what_is_expected_of_it_is_never_preempted(data: st.DataObject) -> None:
    """Where all ask for as many tokens and stop nowhere, as many are expected of each."""
    size, sequences, max_tokens = (data.draw(st.integers(1, most)) for most in (4, 5, 10))
    least = -(-(14 + max_tokens) // size)
    pages = data.draw(st.integers(least, 2 * least))
    config = config_of(
        batch=data.draw(st.integers(sequences + 1, 20)), sequences=sequences, pages=pages, size=size, context=100
    )
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14)
    arrivals = [
        (data.draw(st.integers(0, 20)), request_of(f"s{index}", tuple(data.draw(prompts)), max_tokens))
        for index in range(data.draw(st.integers(1, 12)))
    ]
    assert run(config, arrivals, {}).num_preempted == 0


def test_a_sequence_begins_when_the_pages_that_others_leave_will_do_and_not_before() -> None:
    engine = Engine(config_of(batch=32, pages=7, size=2))
    engine.add(request_of("first", (1, 2, 3), max_tokens=6, outputs=(1, 1, 1, 1)))  # has 4 pages for two tokens more
    engine.add(request_of("second", (4, 5, 6), max_tokens=6))  # needs 2 pages, and 2 of the first's later
    engine.add(request_of("third", (7, 8, 9, 10, 11), max_tokens=6))  # one too many would be needed beside the second
    started: dict[str, int] = {}
    for number in range(20):
        plan = engine.step()
        for chunk in plan.chunks if plan else ():
            started.setdefault(chunk.sequence_id, number)
    assert started == {"first": 0, "second": 0, "third": 6}
    assert engine.scheduler.num_preempted == 0


def test_a_sequence_that_waits_for_pages_is_weighed_again_only_when_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(config_of(batch=16, pages=6, size=2))
    looks: list[int] = []
    match_prefix = engine.scheduler._pool.match_prefix

    def look(chain: TokenChain) -> list[int]:
        looks.append(len(chain.tokens))
        return match_prefix(chain)

    monkeypatch.setattr(engine.scheduler._pool, "match_prefix", look)
    engine.add(request_of("first", (1, 2, 3), max_tokens=8))
    engine.add(request_of("second", (4, 5, 6, 7), max_tokens=8))
    while engine.step():
        pass
    assert looks == [3, 4, 4]


def test_none_is_admitted_into_the_pages_that_the_running_ones_need_next() -> None:
    engine = Engine(config_of(batch=16, pages=4, size=2))
    engine.add(request_of("old", (1, 2, 3), max_tokens=2))
    engine.add(request_of("large", (4, 5, 6), max_tokens=1))
    plans = [engine.step(), engine.step(), engine.step()]
    assert [[chunk.sequence_id for chunk in plan.chunks] for plan in plans if plan] == [["old"], ["old"], ["large"]]


def test_samples_of_one_prompt_compute_it_once() -> None:
    engine = Engine(config_of(batch=8, sequences=8, pages=32))
    prompt = tuple(range(100, 117))  # four full pages and one token
    for index in range(4):
        engine.add(request_of(f"s{index}", prompt, max_tokens=1))
    engine.add(request_of("other", (7, 8, 9), max_tokens=1))
    first = engine.step()
    assert first is not None
    assert [chunk.sequence_id for chunk in first.chunks] == ["s0"]
    second = engine.step()
    third = engine.step()
    assert second is not None
    assert third is not None
    assert [chunk.sequence_id for chunk in second.chunks] == ["s0"]
    assert [chunk.sequence_id for chunk in third.chunks] == ["s0", "s1", "s2", "s3", "other"]
    assert engine.scheduler.plan() is None
    assert engine.num_computed_tokens == 17 + 3 + 3
    assert engine.scheduler.num_reused_tokens == 3 * 16


def test_siblings_are_passed_over_by_others_that_need_not_wait() -> None:
    engine = Engine(config_of(batch=8))
    prompt = (1, 2, 3, 4, 5)
    for name, ids in (("a", prompt), ("b", prompt), ("c", (9,))):
        engine.add(request_of(name, ids))
    plan = engine.step()
    assert plan is not None
    assert [chunk.sequence_id for chunk in plan.chunks] == ["a", "c"]


def test_a_sibling_goes_on_alone_when_the_one_it_waits_for_is_cancelled() -> None:
    engine = Engine(config_of(batch=4))
    for name in ("a", "b"):
        engine.add(request_of(name, (1, 2, 3, 4, 5, 6)))
    plan = engine.scheduler.plan()
    assert plan is not None
    new_tokens = engine.compute(plan)
    engine.cancel("a")
    engine.commit(plan, new_tokens)
    while engine.step():
        pass
    engine.check_outputs()
    assert list(engine.outputs) == ["b"]


def test_an_id_that_is_cancelled_and_added_again_during_a_step_starts_anew() -> None:
    engine = Engine(config_of())
    engine.add(request_of("a", (1, 2, 3, 6, 7)))
    plan = engine.scheduler.plan()
    assert plan is not None
    engine.compute(plan)
    engine.cancel("a")
    engine.add(request_of("a", (4, 5)))
    engine.scheduler.commit(plan, {"a": 1})
    while engine.step():
        pass
    engine.check_outputs()


def test_a_plan_that_is_not_committed_does_no_harm_and_an_old_one_cannot_be() -> None:
    engine = Engine(config_of())
    engine.add(request_of("a", (1, 2, 3)))
    dropped = engine.scheduler.plan()
    assert dropped is not None
    plan = engine.scheduler.plan()
    assert plan == dropped
    with pytest.raises(AssertionError, match="only the last plan"):
        engine.scheduler.commit(dropped, engine.compute(dropped))
    while engine.step():
        pass
    engine.check_outputs()


def test_tokens_that_do_not_belong_to_the_plan_are_caught() -> None:
    engine = Engine(config_of(batch=2))
    engine.add(request_of("a", (1, 2, 3)))
    plan = engine.scheduler.plan()
    assert plan is not None
    with pytest.raises(AssertionError, match="samples=False"):
        engine.scheduler.commit(plan, {"a": 1})
    assert not engine.scheduler.cancel("b")
    with pytest.raises(AssertionError, match="b is not live"):
        engine.scheduler.finish("b")


def test_a_resumed_sequence_goes_on_after_its_outputs() -> None:
    engine = Engine(config_of())
    tokens: tuple[int, ...] = (1, 2, 3)
    outputs = (next_token(tokens), next_token((*tokens, next_token(tokens))))
    engine.add(request_of("a", tokens, max_tokens=4, outputs=outputs))
    plan = engine.step()
    assert plan is not None
    assert plan.chunks[0].token_ids == tokens + outputs
    while engine.step():
        pass
    engine.check_outputs()
    assert len(engine.outputs["a"]) == 4


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (request_of("a", ()), "empty prompt"),
        (request_of("a", (1,), max_tokens=0), "0 of max_tokens=0"),
        (request_of("a", (1,), max_tokens=2, outputs=(1, 2)), "2 of max_tokens=2"),
        (request_of("a", (1,) * 30, max_tokens=3), "exceed the context of 32"),
        (request_of("a", (1,) * 25, max_tokens=5), "need 8 pages of 4 tokens, and there are 7"),
        (request_of("live", (1,)), "live already"),
    ],
)
def test_what_cannot_run_is_refused(request_: SequenceRequest, text: str) -> None:
    scheduler = Scheduler(config_of(pages=7, context=32))
    scheduler.add(request_of("live", (1,) * 25, max_tokens=4))  # the largest that fits
    with pytest.raises(InputError, match=text):
        scheduler.add(request_)
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("change", [{"pages": 0}, {"size": 0}, {"pages": -1, "size": -1}, {"batch": 0}, {"context": 0}])
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"SchedulerConfig\("):
        config_of(**change)


def test_without_pages_each_step_is_one_sequence_in_turn() -> None:
    scheduler = Scheduler(config_of(batch=2, sequences=2, pages=0, size=0))
    for name in ("a", "b", "c"):
        scheduler.add(request_of(name, (1, 2, 3, 4, 5), max_tokens=2))
    chunks: list[Chunk] = []
    while plan := scheduler.plan():
        (chunk,) = plan.chunks
        chunks.append(chunk)
        scheduler.commit(plan, {chunk.sequence_id: 9})
        if chunk.start:
            scheduler.finish(chunk.sequence_id)
    whole, one = ((0, (1, 2, 3, 4, 5)), (5, (9,)))
    assert [(c.sequence_id, (c.start, c.token_ids)) for c in chunks] == [
        ("a", whole),
        ("b", whole),
        ("a", one),
        ("b", one),
        ("c", whole),
        ("c", one),
    ]
    assert all(chunk.samples and chunk.pages == () for chunk in chunks)
    assert scheduler.num_free_pages == 0


def test_planning_a_decode_step_costs_the_same_whatever_the_length() -> None:
    def seconds_a_plan(num_prompt: int) -> float:
        scheduler = Scheduler(config_of(batch=32 * num_prompt, sequences=32, pages=40_000, size=16, context=20_000))
        for index in range(32):
            scheduler.add(request_of(f"s{index}", (index, *range(num_prompt - 1)), max_tokens=100))
        durations = []
        for _ in range(60):
            start = time.perf_counter()
            plan = scheduler.plan()
            durations.append(time.perf_counter() - start)
            assert plan is not None
            scheduler.commit(plan, {chunk.sequence_id: 1 for chunk in plan.chunks})
        return min(durations)

    short, long = seconds_a_plan(16), seconds_a_plan(8192)
    assert long < 3 * short, f"{long * 1e6:.0f} us a plan with long prompts, {short * 1e6:.0f} us with short ones"
