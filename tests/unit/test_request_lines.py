"""One line a request at a gateway, whatever becomes of it; and no prompt, no output and no key in any line."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.actors.gateway.request_log import refusals_told
from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.models.tokenizer import Tokenizer
from tests.log_lines import Lines, logged
from tests.unit import openai_server
from tests.unit.gateway_fakes import FakeWorker, fake_text, save_tokenizer
from tests.unit.gateway_server import error_of, request, running, sampling, until
from tests.unit.test_openai_http import chat, completion

SECRET_WORDS = " ".join(("correct", "horse", "battery", "staple"))
SECRET_IDS = (201, 202, 203, 204, 205)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


async def ended(lines: Lines, count: int = 1) -> list[dict[str, Any]]:
    """Wait until so many requests have ended: a server learns later than its client that it is over."""
    await until(lambda: len(lines.of("request_ended")) >= count)
    return lines.of("request_ended")


async def test_a_request_has_one_line_at_its_end() -> None:
    with logged("info") as lines:
        async with running(FakeWorker("a")) as up:
            await up.inference.GenerateOnce(request(max_tokens=12, n=2, request_id="r-1"))
            (line,) = await ended(lines)
    assert (line["request_id"], line["outcome"], line["worker"]) == ("r-1", "OK", "a")
    assert (line["prompt_tokens"], line["output_tokens"], line["samples"], line["moves"]) == (3, 24, 2, 0)
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert [r["event"] for r in lines.records if r.get("request_id")] == ["request_ended"], "none for each token"


async def test_a_request_that_moves_is_named_with_worker_and_reason() -> None:
    workers = FakeWorker("a", die_after=4), FakeWorker("b", die_after=4), FakeWorker("c")
    with logged("info") as lines:
        async with running(*workers) as up:
            await up.inference.GenerateOnce(request(max_tokens=40, request_id="r-2"))
            (line,) = await ended(lines)
    moved = lines.of("request_moved")
    assert line["moves"] == len(moved)
    assert {m["request_id"] for m in moved} <= {"r-2"}
    assert [m["worker"] for m in moved] == [m["worker"] for m in lines.of("worker_lost")]


@pytest.mark.parametrize(
    ("fields", "outcome", "field"),
    [({"max_tokens": 100_000}, "INVALID_ARGUMENT", "max_tokens"), ({"top_p": 7.0}, "INVALID_ARGUMENT", "top_p")],
)
async def test_a_refusal_has_its_reason(fields: dict[str, Any], outcome: str, field: str) -> None:
    with logged("info") as lines:
        async with running(FakeWorker("a")) as up:
            error = await error_of(up.inference.GenerateOnce(request(request_id="r-3", **fields)))
    (line,) = lines.of("request_rejected")
    assert (line["request_id"], line["outcome"], line["field"]) == ("r-3", outcome, field)
    assert line["reason"] == error.details()
    assert not lines.of("request_ended")


async def test_full_workers_are_a_refusal_too() -> None:
    with logged("info") as lines:
        async with running(FakeWorker("a", submit_error=CapacityError("no room"))) as up:
            await error_of(up.inference.Generate(request(request_id="r-4")))
    (line,) = lines.of("request_rejected")
    assert (line["request_id"], line["outcome"], line["reason"]) == ("r-4", "RESOURCE_EXHAUSTED", "no room")


def test_an_error_that_quotes_a_librarys_words_is_named_by_their_kind() -> None:
    error = InputError(f"the chat template refuses these messages: {SECRET_WORDS}")
    error.__cause__ = ValueError(SECRET_WORDS)
    with logged("info") as lines, pytest.raises(InputError), refusals_told("r-7"):
        raise error
    (line,) = lines.of("request_rejected")
    assert line["reason"] == "ValueError"
    assert SECRET_WORDS not in lines.text


async def test_a_client_that_goes_away_is_cancelled() -> None:
    with logged("info") as lines:
        async with running(FakeWorker("a")) as up:
            call = up.inference.Generate(request(max_tokens=400, request_id="r-5"))
            await call.read()
            call.cancel()
            (line,) = await ended(lines)
    assert (line["request_id"], line["outcome"]) == ("r-5", "CANCELLED")
    assert 0 < line["output_tokens"] < 400


async def test_neither_prompt_nor_output_is_in_a_log(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At debug, over both fronts, for requests that end, fail, are refused and move."""
    outputs = [fake_text(tokenizer.encode(SECRET_WORDS), sampling(seed, 30)) for seed in (1, 2)]
    with logged() as lines:
        broken = FakeWorker("broken", failed="a cause")
        async with running(FakeWorker("a", die_after=9), FakeWorker("b"), tokenizer=tokenizer) as up:
            for seed in (1, 2):
                asked = request(max_tokens=30, seed=seed, request_id=f"g-{seed}")
                asked.text = SECRET_WORDS
                assert (await up.inference.GenerateOnce(asked)).outputs[0].text == outputs[seed - 1]
            for fields in ({"top_p": 7.0}, {"max_tokens": 10_000}, {"stop": [SECRET_WORDS] * 99}):
                asked = request(**fields)
                asked.text = SECRET_WORDS
                await error_of(up.inference.GenerateOnce(asked))
            await error_of(up.inference.GenerateOnce(request(*SECRET_IDS, 999, request_id="ids")))
        async with running(broken, tokenizer=tokenizer) as up:
            await error_of(up.inference.GenerateOnce(request(*SECRET_IDS)))
        await _over_http(tokenizer)
    assert len(lines.of("request_ended")) >= 4
    assert len(lines.of("request_rejected")) >= 6
    for secret in (SECRET_WORDS, *outputs, "201, 202", "horse"):
        assert secret not in lines.text, next(line for line in lines.text.splitlines() if secret in line)


async def _over_http(tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("c"), tokenizer=tokenizer) as up:
        await up.client.completions.create(**completion(prompt=SECRET_WORDS))
        for fields in ({"top_p": 7.0}, {"max_tokens": 9999}, {"stop": [SECRET_WORDS] * 99}, {"temperature": "hot"}):
            with pytest.raises(Exception, match=r"Error code: 4\d\d"):
                await up.client.completions.create(**completion(prompt=SECRET_WORDS, **fields))
        await up.client.chat.completions.create(**chat(SECRET_WORDS))


async def test_a_call_that_ends_at_its_deadline_is_told(tokenizer: Tokenizer) -> None:
    with logged("info") as lines:
        async with running(FakeWorker("a", hang_after=2), tokenizer=tokenizer) as up:
            with pytest.raises(grpc.aio.AioRpcError):
                await up.inference.GenerateOnce(request(max_tokens=100, request_id="r-6"), timeout=0.5)
            (line,) = await ended(lines)
            up.engine.pool.set_workers([])
            await asyncio.sleep(0)
    assert (line["request_id"], line["outcome"]) == ("r-6", "CANCELLED")
