"""A gateway whose time is over: what is left fails at once as UNAVAILABLE, so that clients go on elsewhere."""

import asyncio
import random
from collections.abc import Mapping
from math import inf

import grpc
import pytest

from expertmesh.actors.gateway import node_end
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.node_end import until_node_ends
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.cluster.errors import UnavailableError
from tests.log_lines import logged
from tests.unit.gateway_fakes import FakeWorker
from tests.unit.gateway_server import error_of, request, running, sampling, until

PROMPT = (10, 20, 30)


async def finish(engine: Engine) -> None:
    valid = ValidRequest(request_id="r", prompt_ids=PROMPT, sampling=(sampling(6, 500),), stop=())
    async for _ in engine.generate(valid):
        pass


async def test_running_and_waiting_requests_are_told_that_the_gateway_ends() -> None:
    worker = FakeWorker("a", step_s=0.01)
    engine = Engine(tokenizer=None, rng=random.Random(1), batch_sequences=1, max_queue=4)
    engine.pool.set_workers([worker])
    requests = [asyncio.create_task(finish(engine)) for _ in range(4)]
    await until(lambda: len(worker.live_ids) == 2 and engine.admission.num_waiting == 2)
    engine.end()
    for result in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(result, UnavailableError)
        assert "another one may go on" in str(result)
    await until(lambda: not worker.live_ids)
    assert (engine.num_live_requests, engine.admission.num_waiting) == (0, 0)
    await engine.pool.close()


async def test_who_waits_for_a_worker_is_told_too() -> None:
    engine = Engine(tokenizer=None, rng=random.Random(1))
    waiting = asyncio.create_task(finish(engine))
    await until(lambda: engine.num_live_requests == 1)
    engine.end()
    with pytest.raises(UnavailableError):
        await waiting
    await engine.pool.close()


@pytest.mark.parametrize("fields", [{}, {"idempotency_key": "k"}])
async def test_calls_that_take_longer_than_the_grace_are_unavailable(fields: dict[str, str]) -> None:
    async with running(FakeWorker("a", step_s=0.01)) as up:
        streamed = asyncio.create_task(error_of(up.inference.Generate(request(max_tokens=500, **fields))))
        whole = asyncio.create_task(error_of(up.inference.GenerateOnce(request(max_tokens=500))))
        await until(lambda: up.engine.num_live_requests == 2)
        await up.server.stop(grace_s=0.2)
        codes = [(await error).code() for error in (streamed, whole)]
    assert codes == [grpc.StatusCode.UNAVAILABLE] * 2


async def test_the_end_of_a_node_is_noticed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_end, "_PERIOD_S", 0)
    now_s = 1000.0
    answers: list[Mapping[str, float]] = [{}, {"other": 1000}, {"mine": inf}, {"mine": 1066}, {"mine": 1065}]
    asked = iter(answers)
    await until_node_ends("mine", 65, lambda _timeout_s: next(asked), now_s=lambda: now_s)
    assert list(asked) == []


async def test_a_head_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_end, "_PERIOD_S", 0)
    num_asked = 0

    def deadlines(_timeout_s: float) -> Mapping[str, float]:
        nonlocal num_asked
        num_asked += 1
        if num_asked < 3:
            raise RuntimeError("no answer")
        return {"mine": 1.0}

    with logged() as lines:
        await until_node_ends("mine", 65, deadlines, now_s=lambda: 0.0)
    assert [line["reason"] for line in lines.of("node_end_unknown")] == ["no answer"]
