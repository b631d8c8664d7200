"""How requests ended and how long their tokens took, as a gateway counts them."""

import asyncio
from contextlib import aclosing

import pytest

from expertmesh.actors.gateway.metrics import CODES, RequestMeter, code_of
from expertmesh.cluster.errors import CapacityError, CheckpointError, InputError, UnavailableError
from tests.recorded_metrics import Recorded
from tests.unit.gateway_fakes import FakeWorker
from tests.unit.gateway_server import error_of, request
from tests.unit.gateway_server import running as served
from tests.unit.test_gateway_failover import collect, running, valid


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_times_of_tokens() -> None:
    clock, recorded = Clock(), Recorded()
    meter = RequestMeter(clock)
    with meter.request() as times:
        for sample, after_s in ((0, 0.5), (1, 0.25), (0, 0.25), (0, 1.0), (1, 0.0)):
            clock.now_s += after_s
            times.tokens_came(sample)
    meter.report(recorded.metrics, num_live=2, num_failovers=3)
    assert recorded.observed["expertmesh_time_to_first_token_seconds"] == [0.5], "of a request, not of each sample"
    assert recorded.observed["expertmesh_inter_token_seconds"] == [0.5, 1.0, 1.25]
    assert recorded.value("live_requests") == 2
    assert recorded.value("request_failovers_total") == 3
    assert recorded.value("requests_total", code="OK") == 1
    meter.report(recorded.metrics, num_live=0, num_failovers=3)
    assert len(recorded.observed["expertmesh_inter_token_seconds"]) == 3, "each is told once"
    assert recorded.value("request_failovers_total") == 3
    assert {series["code"] for series in recorded.series("requests_total")} == set(CODES)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no"), "INVALID_ARGUMENT"),
        (CapacityError("full"), "RESOURCE_EXHAUSTED"),
        (UnavailableError("gone"), "UNAVAILABLE"),
        (asyncio.CancelledError(), "CANCELLED"),
        (GeneratorExit(), "CANCELLED"),
        (CheckpointError("odd"), "INTERNAL"),
        (ValueError("a defect"), "INTERNAL"),
    ],
)
def test_an_error_is_counted_by_its_status(error: BaseException, code: str) -> None:
    meter = RequestMeter()
    with pytest.raises(type(error)), meter.request():
        raise error
    assert code_of(error) == code
    assert meter.ended == {**dict.fromkeys(CODES, 0), code: 1}


async def test_requests_of_an_engine_are_counted() -> None:
    async with running([FakeWorker("a")]) as engine:
        await collect(engine, valid(max_tokens=5))
        assert engine.meter.ended["OK"] == 1
        assert len(engine.meter.first_s) == 1
        assert len(engine.meter.gaps_s) <= 4, "tokens that come together have no gap between them"
        async with aclosing(engine.generate(valid(max_tokens=400))) as pieces:
            await anext(pieces)
        assert engine.meter.ended["CANCELLED"] == 1
        async with aclosing(engine.generate(valid(max_tokens=1))) as pieces:
            assert (await anext(pieces)).finish_reason is not None
        assert engine.meter.ended["OK"] == 2, "it had all come when the client went away"


async def test_full_and_failed_requests_are_counted() -> None:
    async with running([FakeWorker("a", capacity=0)]) as engine:
        with pytest.raises(CapacityError):
            await collect(engine, valid())
        assert engine.meter.ended["RESOURCE_EXHAUSTED"] == 1


async def test_the_counted_status_is_the_one_that_the_client_sees() -> None:
    async with served(FakeWorker("a", failed="a defect")) as up:
        seen = [
            (await error_of(up.inference.Generate(request(max_tokens=0)))).code().name,
            (await error_of(up.inference.GenerateOnce(request()))).code().name,
        ]
        assert seen == ["INVALID_ARGUMENT", "INTERNAL"]
        assert {code: count for code, count in up.engine.meter.ended.items() if count} == dict.fromkeys(seen, 1)
