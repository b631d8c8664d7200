"""OpenAI's own client against the HTTP front: answers, streams, errors, clients that go away."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from expertmesh.cluster.requests import SamplingParams
from expertmesh.models.tokenizer import Tokenizer
from tests.unit.gateway_fakes import LETTERS, MODEL, FakeWorker, fake_text, letter_id, save_tokenizer
from tests.unit.openai_server import NOW_S, running

PROMPT = [10, 20, 30]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text_of(prompt_ids: list[int], seed: int, max_tokens: int = 12) -> str:
    return fake_text(prompt_ids, SamplingParams(max_tokens=max_tokens, seed=seed))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fakes tell nobody
            await asyncio.sleep(0.001)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL.name, "prompt": PROMPT, "max_tokens": 12, "seed": 6, **fields}


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL.name, "messages": messages, "max_completion_tokens": 12, "seed": 6, **fields}


async def test_a_completion_has_text_reason_and_usage(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a")
    async with running(worker, tokenizer=tokenizer) as up:
        answer = await up.client.completions.create(**completion(), temperature=0.5, top_p=0.75)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, text_of(PROMPT, 6), "length")
    assert (answer.object, answer.model, answer.created) == ("text_completion", MODEL.name, NOW_S)
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 12, 15)
    assert (worker.submitted[0].sampling.temperature, worker.submitted[0].sampling.top_p) == (0.5, 0.75)


async def test_prompts_and_samples_number_the_choices(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answer = await up.client.completions.create(**completion(prompt=["ab", "cd"], n=2))
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == text_of(tokenizer.encode("ab"), 6)
    assert answer.choices[2].text == text_of(tokenizer.encode("cd"), 6)
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 48)


async def test_a_completion_streams_and_counts_when_asked(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        stream = await up.client.completions.create(**completion(), stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == text_of(PROMPT, 6)
    assert [chunk.choices[0].finish_reason for chunk in parts[-2:]] == [None, "length"]
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 12)
    assert {chunk.id for chunk in chunks} == {last.id}


async def test_a_stream_is_events_up_to_done(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answer = await up.http.post("/v1/completions", json=completion(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "usage" not in chunks[-1]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_a_chat_is_the_template_of_its_messages(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a")
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    async with running(worker, tokenizer=tokenizer) as up:
        answer = await up.client.chat.completions.create(**{**chat(), "messages": messages})
    prompt_ids = tokenizer.encode("<system>be brief<user>hi<assistant>")
    assert list(worker.submitted[0].prompt_ids) == prompt_ids
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text_of(prompt_ids, 6))
    assert (answer.object, choice.finish_reason) == ("chat.completion", "length")


async def test_an_answers_message_can_be_sent_back(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        first = await up.client.chat.completions.create(**chat())
        messages = [first.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
        second = await up.client.chat.completions.create(**{**chat(), "messages": messages})
    assert second.choices[0].message.content


async def test_a_chat_goes_on_to_the_end_of_the_context(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        body = chat()
        del body["max_completion_tokens"]
        answer = await up.client.chat.completions.create(**body)
    assert answer.usage is not None
    assert answer.usage.total_tokens == MODEL.max_context


async def test_a_chat_streams_its_role_first_and_its_reason_last(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        whole = await up.client.chat.completions.create(**chat(), n=2)
        stream = await up.client.chat.completions.create(**chat(), n=2, stream=True)
        chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in mine[-2:]] == [None, "length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_are_parallel_lists(stream: bool, tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        body = completion(logprobs=2, stream=stream)
        answer: Any = await up.client.completions.create(**body)
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    text = text_of(PROMPT, 6)
    assert [token for choice in choices for token in choice.logprobs.tokens] == list(text)
    assert [offset for choice in choices for offset in choice.logprobs.text_offset] == list(range(12))
    assert [value for choice in choices for value in choice.logprobs.token_logprobs] == [-0.25 * i for i in range(12)]
    top = [entry for choice in choices for entry in choice.logprobs.top_logprobs]
    assert top[3] == {text[3]: -0.75, tokenizer.token_text(0): 0.0, tokenizer.token_text(1): -1.0}


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_are_an_entry_for_each_token(stream: bool, tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        body = chat(logprobs=True, top_logprobs=1, stream=stream)
        answer: Any = await up.client.chat.completions.create(**body)
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    text = text_of(tokenizer.encode("<user>hi<assistant>"), 6)
    assert [entry.token for entry in content] == list(text)
    assert [bytes(entry.bytes) for entry in content] == [letter.encode() for letter in text]
    assert [entry.logprob for entry in content] == [-0.25 * index for index in range(12)]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [(tokenizer.token_text(0), 0.0)]


async def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    text = text_of(PROMPT, 6)
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answers = [
            await up.client.completions.create(**completion(stop=stop)) for stop in (text[4:6], [text[4:6], "#"])
        ]
    assert [(answer.choices[0].text, answer.choices[0].finish_reason) for answer in answers] == [
        (text[: text.index(text[4:6])], "stop")
    ] * 2


async def test_seeds_repeat_and_none_is_drawn_anew(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:

        async def text(seed: int | None) -> str:
            return str((await up.client.completions.create(**completion(seed=seed))).choices[0].text)

        texts = [await text(seed) for seed in (-1, -1, (1 << 63) - 1, None, None)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts)) == 3


async def test_our_own_fields_reach_the_engine(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a")
    extra = {"top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "ignore_eos": True, "stop_token_ids": [255]}
    async with running(worker, tokenizer=tokenizer) as up:
        await up.client.completions.create(**completion(), extra_body=extra)
    sampling = worker.submitted[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.25, 1.5)
    assert sampling.stop_token_ids == (255,)


async def test_what_changes_nothing_is_taken(tokenizer: Tokenizer) -> None:
    both: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
    of_completions = completion(**both, best_of=1, echo=False, suffix="")
    of_chats = {"response_format": {"type": "text"}, "tools": [], "store": False, "metadata": {"a": "b"}}
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answers = [
            await up.http.post("/v1/completions", json=of_completions),
            await up.http.post("/v1/chat/completions", json={**chat(**both), **of_chats}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"model": "gpt"}, "model", "model_not_found", "'gpt' does not exist"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter", "nonsense"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter", "x"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "stream to be true"),
        ({"temperature": 2.5}, "temperature", "invalid_value", "2"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "number"),
        ({"top_p": 0}, "top_p", "invalid_value", "greater than 0"),
        ({"n": 0}, "n", "invalid_value", "1"),
        ({"n": 65}, "n", "invalid_value", "64"),
        ({"n": 33, "prompt": ["a", "b"]}, "n", None, "66 choices"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "1"),
        ({"max_tokens": 510}, "prompt", "context_length_exceeded", "512"),
        ({"prompt": [1] * 512, "max_tokens": None}, "prompt", "context_length_exceeded", "512"),
        ({"prompt": {}}, "prompt", "invalid_value", "string"),
        ({"prompt": []}, "prompt", "invalid_value", "at least 1"),
        ({"prompt": ""}, "prompt", None, "prompt is empty"),
        ({"prompt": [999]}, "prompt", None, "999 is outside the vocabulary"),
        ({"logprobs": 21}, "logprobs", "invalid_value", "20"),
        ({"stop": [""]}, "stop", None, "a stop string is empty"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "not served"),
        ({"echo": True}, "echo", "unsupported_parameter", "not served"),
        ({"best_of": 2}, "best_of", "unsupported_parameter", "not served"),
    ],
)
async def test_wrong_completions_are_refused_by_field(
    fields: dict[str, Any], param: str | None, code: str | None, message: str, tokenizer: Tokenizer
) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answer = await up.http.post("/v1/completions", json=completion(**fields))
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages", "required"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to be true"),
        ({"tools": [{"type": "function"}]}, "tools", "not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
        ({"max_completion_tokens": 500}, "messages", "512"),
    ],
)
async def test_wrong_chats_are_refused_by_field(
    fields: dict[str, Any], param: str, message: str, tokenizer: Tokenizer
) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        answer = await up.http.post("/v1/chat/completions", json=chat(**fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


async def test_a_missing_field_a_body_that_is_no_json_and_an_unknown_path(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        missing = await up.http.post("/v1/completions", json={"model": MODEL.name})
        broken = await up.http.post("/v1/completions", content="{", headers={"content-type": "application/json"})
        a_list = await up.http.post("/v1/completions", json=[1])
        unknown = await up.http.get("/v1/nothing")
        method = await up.http.get("/v1/completions")
    assert missing.json()["error"]["code"] == "missing_required_parameter"
    assert missing.json()["error"]["param"] == "prompt"
    assert [answer.status_code for answer in (missing, broken, a_list, unknown, method)] == [400, 400, 400, 404, 405]
    assert "JSON" in broken.json()["error"]["message"]
    assert unknown.json()["error"]["code"] == "unknown_url"


async def test_without_a_template_a_chat_is_refused_and_a_completion_is_not(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer, template=None) as up:
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions") as caught:
            await up.client.chat.completions.create(**chat())
        await up.client.completions.create(**completion())
    assert caught.value.code == "no_chat_template"


async def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused() -> None:
    async with running(FakeWorker("a")) as up:
        answer = await up.client.completions.create(**completion(logprobs=0))
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            await up.client.completions.create(**completion(prompt="text"))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert [LETTERS[[letter_id(letter) for letter in LETTERS].index(int(token))] for token in logprobs.tokens] == list(
        text_of(PROMPT, 6)
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_full_workers_are_429_with_a_time_to_come_back(stream: bool, tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a", capacity=0), tokenizer=tokenizer) as up:
        with pytest.raises(openai.RateLimitError) as caught:
            await up.client.completions.create(**completion(stream=stream))
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.type == "rate_limit_error"


async def test_one_refused_prompt_ends_the_others(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", capacity=2)
    async with running(worker, tokenizer=tokenizer) as up:
        with pytest.raises(openai.RateLimitError):
            await up.client.completions.create(**completion(prompt=[[1], [2], [3]], max_tokens=400))
        await until(lambda: not worker.live_ids)


async def test_what_is_not_ready_is_503(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        up.readiness[0] = False
        with pytest.raises(openai.InternalServerError) as caught:
            await up.client.completions.create(**completion())
        answers = [await up.http.get(path) for path in ("/ready", "/health")]
        up.readiness[0] = True
        answers.append(await up.http.get("/ready"))
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    assert caught.value.response.headers["retry-after"] == "1"
    assert [answer.status_code for answer in answers] == [503, 200, 200]


async def test_a_fault_is_500_with_the_request_id_and_the_cause_in_the_log_only(
    caplog: pytest.LogCaptureFixture, tokenizer: Tokenizer
) -> None:
    async with running(FakeWorker("a", failed="secret cause"), tokenizer=tokenizer) as up:
        answer = await up.http.post("/v1/completions", json=completion())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "cmpl-" in answer.text
    assert "secret" not in answer.text
    assert "secret cause" in caplog.text


async def test_a_fault_within_a_stream_is_an_event_and_no_done(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker, tokenizer=tokenizer) as up:
        stream = await up.client.completions.create(**completion(max_tokens=400), stream=True)
        await anext(aiter(stream))
        worker.failed = "broken"
        with pytest.raises(openai.APIError, match="internal error"):
            _ = [chunk async for chunk in stream]


@pytest.mark.parametrize("kind", ["stream", "whole", "several"])
async def test_a_client_that_goes_away_frees_its_sequences(kind: str, tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", step_s=0.01)
    prompt = [[1], [2]] if kind == "several" else PROMPT
    async with running(worker, tokenizer=tokenizer) as up:
        body = completion(max_tokens=500, prompt=prompt, stream=kind != "whole")
        asking = asyncio.create_task(up.client.completions.create(**body))
        if kind == "whole":
            await until(lambda: len(worker.live_ids) == 1)
            asking.cancel()
        else:
            stream: Any = await asking
            await anext(aiter(stream))
            await stream.close()
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
    assert sorted(worker.cancelled) == sorted(request.sequence_id for request in worker.submitted)


async def test_models_are_the_one_that_is_served(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        assert [model.id async for model in up.client.models.list()] == [MODEL.name]
        assert (await up.client.models.retrieve(MODEL.name)).owned_by == "expertmesh"
        with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
            await up.client.models.retrieve("other")


async def test_the_paths_are_described_and_422_is_not_among_their_answers() -> None:
    async with running() as up:
        description = (await up.http.get("/openapi.json")).json()
        docs = await up.http.get("/docs")
    assert docs.status_code == 200
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/ready"} <= set(description["paths"])
    answers = {
        status for path in description["paths"].values() for call in path.values() for status in call["responses"]
    }
    assert answers <= {"200", "4XX", "5XX"}
    assert "top_k" in description["components"]["schemas"]["CompletionBody"]["properties"]


async def test_a_long_body_is_read_beside_the_loop(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        with pytest.raises(openai.BadRequestError, match="the prompt has 10000"):
            await up.client.completions.create(**completion(prompt="x" * 10_000))
