"""Requests wait at the gateway only when workers are full, each key gets its share, and who leaves leaves no trace."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.actors.gateway.admission import Admission
from expertmesh.actors.gateway.callers import CALLER, Caller
from expertmesh.actors.gateway.engine import Engine, Piece
from expertmesh.actors.gateway.key_metrics import KeyCounts
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.cluster.errors import CapacityError, InputError, RateLimitError
from expertmesh.cluster.rate_limits import Limits, RateLimiter
from expertmesh.cluster.requests import SamplingParams
from tests.recorded_metrics import Recorded
from tests.unit.gateway_fakes import FakeWorker, fake_output

PROMPT = (10, 20, 30)


def request(name: str = "r", *, samples: int = 1, max_tokens: int = 8, seed: int = 3) -> ValidRequest:
    sampling = tuple(SamplingParams(max_tokens=max_tokens, seed=seed + index) for index in range(samples))
    return ValidRequest(request_id=name, prompt_ids=PROMPT, sampling=sampling, stop=())


@asynccontextmanager
async def running(*workers: FakeWorker, batch: int = 2, max_queue: int = 1000) -> AsyncIterator[Engine]:
    """An engine whose workers have batches of 2: 3 sequences a worker go on, one of them to be at hand."""
    engine = Engine(tokenizer=None, rng=random.Random(1), batch_sequences=batch, max_queue=max_queue)
    engine.pool.set_workers(workers)
    try:
        yield engine
        assert engine.num_live_requests == engine.admission.num_waiting == 0
    finally:
        await engine.pool.close()


def send(engine: Engine, what: ValidRequest, caller: Caller | None = None) -> "asyncio.Task[list[Piece]]":
    async def collect() -> list[Piece]:
        if caller is not None:
            CALLER.set(caller)
        async with aclosing(engine.generate(what)) as pieces:
            return [piece async for piece in pieces]

    return asyncio.create_task(collect())


def submitted(worker: FakeWorker) -> list[str]:
    """Return the ids of the requests that a worker was given, in order."""
    return [sequence.sequence_id.partition("#")[0] for sequence in worker.submitted]


def tokens(pieces: Sequence[Piece]) -> list[int | None]:
    return [event.token_id for piece in pieces for event in piece.tokens]


async def until_waiting(engine: Engine, num_sequences: int) -> None:
    async with asyncio.timeout(20):
        while engine.admission.num_waiting != num_sequences:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


async def test_without_keys_it_is_first_come_first_served_and_nobody_waits_while_there_is_room() -> None:
    worker = FakeWorker("a")
    most_live = 0

    def watched(prompt_ids: Sequence[int], sampling: SamplingParams, position: int) -> int:
        nonlocal most_live
        most_live = max(most_live, len(worker.live_ids))
        return fake_output(prompt_ids, sampling)[position]

    worker.token = watched
    async with running(worker) as engine:
        names = [f"r{number}" for number in range(12)]
        sent = [send(engine, request(name, seed=number)) for number, name in enumerate(names)]
        await until_waiting(engine, 9)
        answers = await asyncio.gather(*sent)
    assert submitted(worker) == names
    assert most_live == 3
    assert [tokens(pieces) for pieces in answers] == [
        fake_output(PROMPT, request(seed=number).sampling[0]) for number in range(12)
    ]


async def test_a_key_that_floods_delays_another_no_more_than_its_share() -> None:
    worker, flood, other = FakeWorker("a"), Caller(name="flood"), Caller(name="other")
    async with running(worker) as engine:
        sent = [send(engine, request(f"flood-{number}"), flood) for number in range(60)]
        await until_waiting(engine, 57)
        num_before = len(worker.submitted)
        sent += [send(engine, request(f"other-{number}"), other) for number in range(10)]
        await asyncio.gather(*sent)
    order = submitted(worker)[num_before:]
    places = [place for place, name in enumerate(order) if name.startswith("other")]
    assert len(places) == 10
    # Equal shares are one of the other's for each of the flood's; what was under way and the spare one come first.
    assert all(place <= 2 * number + 4 for number, place in enumerate(places)), order


async def test_a_weight_of_three_is_served_three_times_as_much() -> None:
    worker, light, heavy = FakeWorker("a"), Caller(name="light"), Caller(name="heavy", weight=3)
    async with running(worker) as engine:
        sent = [send(engine, request(f"light-{number}"), light) for number in range(40)]
        sent += [send(engine, request(f"heavy-{number}"), heavy) for number in range(40)]
        await asyncio.gather(*sent)
    first = submitted(worker)[8:40]
    num_heavy = sum(name.startswith("heavy") for name in first)
    assert 22 <= num_heavy <= 26, first


async def test_who_is_cancelled_while_waiting_leaves_at_once_and_never_reaches_a_worker() -> None:
    worker = FakeWorker("a")
    async with running(worker) as engine:
        sent = [send(engine, request(f"r{number}", max_tokens=400)) for number in range(5)]
        await until_waiting(engine, 2)
        sent[3].cancel()
        await asyncio.gather(sent[3], return_exceptions=True)
        assert (engine.admission.num_waiting, engine.num_live_requests) == (1, 4)
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
    assert submitted(worker) == ["r0", "r1", "r2"]


def admission(room: int, **options: int) -> Admission:
    return Admission(
        num_workers=lambda: 1,
        batch_sequences=room - 1,
        max_sequences=options.get("max_sequences", 100),
        max_queue=options.get("max_queue", 100),
        clock=lambda: 0.0,
        counts=KeyCounts(("OK",)),
    )


async def test_who_is_cancelled_in_the_moment_of_its_turn_gives_the_room_back() -> None:
    gate, caller = admission(2), Caller()

    async def enter() -> None:
        async with gate.entered(caller, request()):
            raise AssertionError("it was cancelled before it ran")

    async with gate.entered(caller, request(samples=2)):
        waiting = asyncio.create_task(enter())
        await asyncio.sleep(0)
        assert gate.num_waiting == 1
    assert gate.num_waiting == 0, "its turn has come, and its task has not run yet"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with gate.entered(caller, request(samples=2)):
        assert gate.num_waiting == 0
    assert caller.limiter.num_sequences == 0


async def test_each_sample_that_ends_makes_room() -> None:
    gate, caller = admission(3), Caller()
    entered: list[str] = []

    async def enter() -> None:
        async with gate.entered(caller, request()):
            entered.append("in")

    async with gate.entered(caller, request(samples=3)) as ticket:
        waiting = [asyncio.create_task(enter()) for _ in range(2)]
        await asyncio.sleep(0)
        assert gate.num_waiting == 2
        gate.sample_ended(ticket)
        assert gate.num_waiting == 1
        await waiting[0]
    await waiting[1]
    assert entered == ["in", "in"]


async def test_a_request_of_many_samples_goes_on_with_room_for_one() -> None:
    gate, caller = admission(3), Caller()
    async with gate.entered(caller, request(samples=2)), gate.entered(caller, request(samples=64)):
        assert gate.num_waiting == 0


async def test_there_is_room_for_no_more_than_the_gateway_has_however_many_workers_there_are() -> None:
    gate, caller = admission(50, max_sequences=2), Caller()
    async with gate.entered(caller, request()), gate.entered(caller, request()):
        waiting = asyncio.create_task(enter(gate, caller))
        await asyncio.sleep(0)
        assert gate.num_waiting == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert gate.num_waiting == 0


async def enter(gate: Admission, caller: Caller) -> None:
    async with gate.entered(caller, request()):
        pass


async def test_a_full_queue_refuses_at_once_and_no_key_fills_it() -> None:
    worker, flood, other = FakeWorker("a"), Caller(name="flood"), Caller(name="other")
    async with running(worker, max_queue=8) as engine:
        engine.admission.set_keys(["flood", "other"])
        sent = [send(engine, request(f"flood-{number}"), flood) for number in range(12)]
        others = [send(engine, request(f"other-{number}"), other) for number in range(2)]
        answers = await asyncio.gather(*sent, *others, return_exceptions=True)
    refused = [str(answer) for answer in answers[:12] if isinstance(answer, CapacityError)]
    assert len(refused) == 5, "3 go on, 4 of the 8 places may be its own"
    assert all("4 sequences of this API key wait" in message for message in refused)
    assert not any(isinstance(answer, BaseException) for answer in answers[12:])


async def test_what_is_full_refuses_before_the_request_is_read() -> None:
    worker, busy, free = FakeWorker("a"), Caller(name="busy"), Caller(name="free")
    busy.limiter = RateLimiter(Limits(max_concurrent=4))
    async with running(worker, max_queue=3) as engine:
        sent = [send(engine, request(f"r{number}"), busy) for number in range(4)]
        await until_waiting(engine, 1)
        token = CALLER.set(busy)
        with pytest.raises(RateLimitError, match="it may have 4 at once"):
            engine.require_room()
        CALLER.set(free)
        engine.require_room()
        sent += [send(engine, request(f"s{number}"), free) for number in range(2)]
        await until_waiting(engine, 3)
        with pytest.raises(CapacityError, match="3 sequences wait at this gateway"):
            engine.require_room()
        CALLER.reset(token)
        await asyncio.gather(*sent)


async def test_one_key_alone_may_fill_the_queue() -> None:
    worker, caller = FakeWorker("a"), Caller(name="only")
    async with running(worker, max_queue=8) as engine:
        engine.admission.set_keys(["only"])
        sent = [send(engine, request(f"r{number}"), caller) for number in range(13)]
        answers = await asyncio.gather(*sent, return_exceptions=True)
    assert [str(answer) for answer in answers if isinstance(answer, Exception)] == [
        "8 sequences wait at this gateway and 1 more are asked for; 8 is the most"
    ] * 2


async def test_requests_wait_for_the_first_worker_and_go_on_when_there_are_more() -> None:
    first, second = FakeWorker("a", step_s=0.01), FakeWorker("b", step_s=0.01)
    async with running() as engine:
        sent = [send(engine, request(f"r{number}", max_tokens=30)) for number in range(8)]
        await until_waiting(engine, 8)
        engine.pool.set_workers([first])
        assert engine.admission.num_waiting == 5
        engine.pool.set_workers([first, second])
        assert engine.admission.num_waiting == 2
        await asyncio.gather(*sent)


async def test_a_request_that_moves_does_not_queue_again() -> None:
    dying, survivor = FakeWorker("a", step_s=0.005), FakeWorker("b", step_s=0.005)
    async with running(dying, survivor) as engine:
        sent = [send(engine, request(f"r{number}", max_tokens=30, seed=number)) for number in range(12)]
        await until_waiting(engine, 6)
        before = [name for worker in (dying, survivor) for name in submitted(worker)]
        dying.kill()
        answers = await asyncio.gather(*sent)
    assert sorted(before) == [f"r{number}" for number in range(6)]
    moved = [name for name in submitted(survivor) if name in submitted(dying)]
    assert moved, "the other one had some"
    order = submitted(survivor)
    assert max(order.index(name) for name in moved) < min(order.index(f"r{number}") for number in range(6, 12))
    assert [tokens(pieces) for pieces in answers] == [
        fake_output(PROMPT, request(max_tokens=30, seed=number).sampling[0]) for number in range(12)
    ]


async def test_limits_of_a_key_hold_for_it_alone() -> None:
    worker, limited, free = FakeWorker("a"), Caller(name="limited"), Caller(name="free")
    limited.limiter = RateLimiter(Limits(max_concurrent=2, tokens_per_minute=100_000))
    async with running(worker, batch=20) as engine:
        sent = [send(engine, request(f"r{number}"), limited) for number in range(3)]
        sent += [send(engine, request(f"s{number}"), free) for number in range(5)]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        assert [type(answer) for answer in answers if isinstance(answer, Exception)] == [RateLimitError]
        with pytest.raises(InputError, match="n is 3"):
            await send(engine, request(samples=3), limited)
        assert tokens(await send(engine, request("again"), limited))
        assert limited.limiter.num_sequences == 0
        assert limited.limiter.tokens is not None
        # Three requests of a prompt of 3 and an output of 8; the bucket fills again meanwhile.
        assert limited.limiter.tokens.level(0) >= 100_000 - 33


async def test_what_a_key_was_served_is_counted() -> None:
    recorded, alice, bob = Recorded(), Caller(name="alice"), Caller(name="bob", limiter=RateLimiter(Limits()))
    bob.limiter = RateLimiter(Limits(max_concurrent=1))
    async with running(FakeWorker("a")) as engine:
        engine.admission.set_keys(["alice", "bob"])
        await asyncio.gather(*(send(engine, request(samples=2), alice) for _ in range(3)))
        await send(engine, request())
        with suppress(InputError):
            await send(engine, request(samples=2), bob)
        for _ in range(2):
            engine.report(recorded.metrics)
    assert recorded.value("key_requests_total", key="alice", code="OK") == 3
    assert recorded.value("key_requests_total", key="bob", code="OK") == 0, "shown from the start"
    assert recorded.value("key_requests_total", key="bob", code="INVALID_ARGUMENT") == 1
    assert recorded.value("key_requests_total", key="-", code="OK") == 1
    assert recorded.value("key_tokens_total", key="alice", kind="prompt") == 9
    assert recorded.value("key_tokens_total", key="alice", kind="output") == 48
    assert recorded.value("key_tokens_total", key="bob", kind="output") == 0
    assert recorded.value("queued_sequences") == 0


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from(["a", "b"])), min_size=1, max_size=30)
)
def test_whoever_comes_and_goes_nothing_is_left(sizes: list[tuple[int, bool, str]]) -> None:
    async def come_and_go() -> None:
        gate, callers = admission(3), {name: Caller(name=name) for name in "ab"}

        async def enter(samples: int, name: str) -> None:
            async with gate.entered(callers[name], request(samples=samples)) as ticket:
                await asyncio.sleep(0)
                gate.served(ticket, 1)
                gate.sample_ended(ticket)

        tasks = []
        for samples, is_cancelled, name in sizes:
            tasks.append(asyncio.create_task(enter(samples, name)))
            await asyncio.sleep(0)
            if is_cancelled:
                random.Random(samples).choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.num_waiting == gate.waiting_tokens == 0
        assert [caller.limiter.num_sequences for caller in callers.values()] == [0, 0]
        async with gate.entered(callers["a"], request(samples=2)), gate.entered(callers["b"], request()):
            assert gate.num_waiting == 0

    asyncio.run(come_and_go())
