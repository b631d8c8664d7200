"""The clients against a real server over fake workers, through a connection that a test cuts."""

import asyncio
import subprocess
import sys
from typing import Any

import grpc
import pytest

from expertmesh.client import AsyncClient, Client, connection
from expertmesh.client.requests import FIRST_PAUSE_S, LONGEST_PAUSE_S, Received, generate_request, pause_s
from expertmesh.cluster.settings import GrpcSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse
from tests.relay import relayed
from tests.unit.gateway_fakes import FakeWorker, fake_output, fake_text, letter_id, save_tokenizer
from tests.unit.gateway_server import running, sampling, until

PROMPT = (10, 20, 30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tokens(messages: list[GenerateResponse], index: int = 0) -> list[int]:
    return [token for one in messages if one.index == index for token in one.token_ids]


async def test_a_cut_stream_is_resumed_with_each_token_once(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", step_s=0.005)
    async with (
        running(worker, tokenizer=tokenizer) as up,
        relayed(up.server.port) as relay,
        AsyncClient(relay.address) as client,
    ):
        got = []
        async for message in client.generate(PROMPT, max_tokens=100, seed=6, n=2):
            got.append(message)
            if len(got) in (5, 20):
                relay.cut()
    assert relay.num_connections == 3
    assert tokens(got) == fake_output(PROMPT, sampling(6, 100))
    assert "".join(one.text for one in got if one.index == 0) == fake_text(PROMPT, sampling(6, 100))
    assert len(tokens(got, 1)) == 100
    assert len(worker.submitted) == 2, "one request, of two samples"


async def test_the_client_for_threads_resumes_too() -> None:
    worker = FakeWorker("a", step_s=0.005)

    def stream() -> list[GenerateResponse]:
        with Client(relay.address) as client:
            got = []
            for message in client.generate(PROMPT, max_tokens=100, seed=6):
                got.append(message)
                if len(got) == 5:
                    loop.call_soon_threadsafe(relay.cut)
            return got

    async with running(worker) as up, relayed(up.server.port) as relay:
        loop = asyncio.get_running_loop()
        got = await asyncio.to_thread(stream)
    assert relay.num_connections == 2
    assert tokens(got) == fake_output(PROMPT, sampling(6, 100))
    assert len(worker.submitted) == 1


async def test_a_closed_stream_leaves_the_batch_at_once() -> None:
    worker = FakeWorker("a", step_s=0.005)
    async with running(worker) as up, AsyncClient(up.server.address) as client:
        stream = client.generate(PROMPT, max_tokens=500)
        await anext(stream)
        await stream.aclose()
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)


async def test_a_full_server_is_asked_again_when_it_says(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", capacity=0)
    async with running(worker, tokenizer=tokenizer) as up, AsyncClient(up.server.address) as client:
        asyncio.get_running_loop().call_later(0.2, lambda: setattr(worker, "capacity", None))
        answer = await client.generate_once("abc", max_tokens=5, seed=6)
    assert len(answer.outputs[0].token_ids) == 5


async def test_the_other_calls(tokenizer: Tokenizer) -> None:
    def ask(address: str) -> tuple[list[int], str, str]:
        with Client(address) as client:
            token_ids = client.tokenize("ab")
            assert len(client.generate_once(token_ids, max_tokens=3).outputs[0].token_ids) == 3
            return token_ids, client.detokenize(token_ids), client.status().plan

    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        token_ids, text, plan = await asyncio.to_thread(ask, up.server.address)
        async with AsyncClient(up.server.address) as client:
            assert await client.tokenize("ab") == token_ids == [letter_id("a"), letter_id("b")]
            assert (await client.detokenize(token_ids), (await client.status()).plan) == (text, plan)
    assert (text, plan) == ("ab", "2 shards, 1 worker")


async def test_what_is_wrong_is_not_tried_again() -> None:
    async with running(FakeWorker("a")) as up, AsyncClient(up.server.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate_once(PROMPT, max_tokens=0)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(ValueError, match="no_such"):
            await client.generate_once(PROMPT, no_such=1)  # type: ignore[call-arg]


async def test_a_server_that_is_away_is_given_up_after_the_retries() -> None:
    async with AsyncClient("127.0.0.1:1", retries=2) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.status()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_pauses_double_up_to_the_longest() -> None:
    class Away(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    pauses = [pause_s(Away(), number, 8) for number in range(1, 10)]
    assert pauses == [FIRST_PAUSE_S, 0.2, 0.4, 0.8, 1.6, *[LONGEST_PAUSE_S] * 3, None]


def test_the_client_imports_neither_ray_nor_torch() -> None:
    code = "import sys, expertmesh.client; print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


async def test_a_stream_goes_on_at_another_gateway_wherever_it_breaks(tokenizer: Tokenizer) -> None:
    """Sampled without a seed, two samples, each cut after one more message than the last."""
    first, second = FakeWorker("a", step_s=0.002), FakeWorker("b")
    async with running(first, tokenizer=tokenizer) as old, running(second, tokenizer=tokenizer) as new:
        # The seeds that its gateway draws are not those of the other.
        await all_of(AsyncClient(new.server.address), max_tokens=1)
        for num_before in range(0, 24, 3):
            async with relayed(old.server.port) as relay, AsyncClient(relay.address) as client:
                got: list[GenerateResponse] = []
                async for message in client.generate(PROMPT, max_tokens=12, n=2, temperature=1, stop=["zzz"]):
                    got.append(message)
                    if len(got) == num_before + 1:
                        relay.server_address = new.server.address
                        relay.cut()
            drawn = [sequence.sampling for sequence in first.submitted[-2:]]
            assert [tokens(got, index) for index in (0, 1)] == [fake_output(PROMPT, one) for one in drawn]
            for index, one in enumerate(drawn):
                assert "".join(m.text for m in got if m.index == index) == fake_text(PROMPT, one)
            assert sorted(m.usage.completion_tokens for m in got if m.finish_reason) == [12, 12]
    assert len(second.submitted) > 8, "most were cut before their end"


async def all_of(client: AsyncClient, **options: Any) -> list[GenerateResponse]:
    async with client:
        return [message async for message in client.generate(PROMPT, **options)]


async def test_a_stream_goes_from_gateway_to_gateway_and_back(tokenizer: Tokenizer) -> None:
    workers = FakeWorker("a", step_s=0.005), FakeWorker("b", step_s=0.005)
    async with running(workers[0], tokenizer=tokenizer) as one, running(workers[1], tokenizer=tokenizer) as other:
        addresses = [one.server.address, other.server.address]
        async with relayed(one.server.port) as relay, AsyncClient(relay.address) as client:
            got = []
            async for message in client.generate(PROMPT, max_tokens=200, seed=6):
                got.append(message)
                if len(got) in (5, 20, 35, 50):
                    addresses.reverse()
                    relay.server_address = addresses[0]
                    relay.cut()
    assert tokens(got) == fake_output(PROMPT, sampling(6, 200))
    assert "".join(m.text for m in got) == fake_text(PROMPT, sampling(6, 200))
    assert got[-1].usage.completion_tokens == 200


async def test_the_client_for_threads_goes_on_at_another_gateway_too(tokenizer: Tokenizer) -> None:
    def stream() -> list[GenerateResponse]:
        with Client(relay.address) as client:
            got = []
            for message in client.generate(PROMPT, max_tokens=100, seed=6):
                got.append(message)
                if len(got) == 5:
                    relay.server_address = new.server.address
                    loop.call_soon_threadsafe(relay.cut)
            return got

    worker = FakeWorker("b")
    async with (
        running(FakeWorker("a", step_s=0.005)) as old,
        running(worker) as new,
        relayed(old.server.port) as relay,
    ):
        loop = asyncio.get_running_loop()
        got = await asyncio.to_thread(stream)
    assert tokens(got) == fake_output(PROMPT, sampling(6, 100))
    assert len(worker.submitted) == 1


async def test_a_gateway_that_ends_in_order_lets_its_streams_go_on_elsewhere(tokenizer: Tokenizer) -> None:
    """It gives them less time than they need."""
    worker = FakeWorker("b")
    async with (
        running(FakeWorker("a", step_s=0.005)) as old,
        running(worker) as new,
        relayed(old.server.port) as relay,
        AsyncClient(relay.address) as client,
    ):
        got = []
        async for message in client.generate(PROMPT, max_tokens=300, seed=6):
            got.append(message)
            if len(got) == 5:
                relay.server_address = new.server.address
                ending = asyncio.create_task(old.server.stop(grace_s=0.1))
        await ending
    assert tokens(got) == fake_output(PROMPT, sampling(6, 300))
    assert len(worker.submitted) == 1


@pytest.mark.timeout(45)  # less than the minute that gRPC takes by itself
async def test_a_gateway_that_vanishes_without_a_word_is_missed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEPALIVE_S", 0.3)
    monkeypatch.setattr(connection, "KEEPALIVE_TIMEOUT_S", 0.3)
    worker, often = FakeWorker("b"), GrpcSettings(min_ping_s=0.1)
    async with (
        running(FakeWorker("a", step_s=0.005), settings=often) as old,
        running(worker, settings=often) as new,
        relayed(old.server.port) as relay,
        AsyncClient(relay.address) as client,
    ):
        got = []
        async for message in client.generate(PROMPT, max_tokens=300, seed=6):
            got.append(message)
            if len(got) == 5:
                relay.server_address = new.server.address
                relay.silence()
    assert tokens(got) == fake_output(PROMPT, sampling(6, 300))
    assert len(worker.submitted) == 1


def test_a_request_that_samples_gets_a_seed() -> None:
    greedy, sampled = generate_request("a", {}), generate_request("a", {"temperature": 0.5})
    assert (greedy.HasField("seed"), sampled.HasField("seed")) == (False, True)
    assert generate_request("a", {"temperature": 0.5}).seed != sampled.seed
    assert generate_request("a", {"temperature": 0.5, "seed": 0}).seed == 0


def test_a_request_that_may_be_at_two_gateways_is_not_resumed_by_number_alone() -> None:
    """Their messages may end at different tokens."""
    received = Received(generate_request(PROMPT, {"n": 2}))
    assert isinstance(received.next_call(), GenerateRequest)
    assert isinstance(received.next_call(), GenerateRequest)  # nothing came of the first
    received.add(GenerateResponse(index=1, token_ids=[7, 8]))
    call = received.next_call()
    assert isinstance(call, GenerateRequest)
    assert [list(one.token_ids) for one in call.received] == [[], [7, 8]]
