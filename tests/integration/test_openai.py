"""OpenAI's own client against a real server, over Ray Serve's proxy."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import openai
import pytest

from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server, serving

MODEL = "chatty"
PROMPT = "def main():"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The pocket model with a chat template."""
    home = tmp_path_factory.mktemp("openai")
    directory = Path(shutil.copytree(POCKET, home / MODEL))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    with serving(directory, home, "--http-port", "0", "--dtype", "float32") as server:
        yield server


@pytest.fixture
def client(chatty: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chatty.http_url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def grpc_text(server: Server, text: str, max_tokens: int) -> str:
    with server.channel() as channel:
        request = GenerateRequest(text=text, max_tokens=max_tokens, ignore_eos=True)
        return str(InferenceStub(channel).GenerateOnce(request, timeout=60).outputs[0].text)


def test_greedy_text_equals_that_of_grpc_whole_and_streamed(chatty: Server, client: openai.OpenAI) -> None:
    expected = grpc_text(chatty, PROMPT, 24)
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    ignore = {"ignore_eos": True}
    whole = client.completions.create(**fields, logprobs=2, extra_body=ignore)  # type: ignore[call-overload]
    stream = client.completions.create(  # type: ignore[call-overload]
        **fields, stream=True, stream_options={"include_usage": True}, extra_body=ignore
    )
    chunks = list(stream)
    assert whole.choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert whole.usage == chunks[-1].usage
    assert whole.usage.completion_tokens == 24
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == expected
    assert len(logprobs.top_logprobs) == 24
    assert all(
        max(top.values()) == own for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )


def test_a_chat_is_its_template_whole_and_streamed(chatty: Server, client: openai.OpenAI) -> None:
    expected = grpc_text(chatty, f"user: {PROMPT}\nassistant: ", 16)
    fields = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 16}
    extra = {"temperature": 0, "logprobs": True, "top_logprobs": 1, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**fields, **extra)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**fields, **extra, stream=True))  # type: ignore[call-overload]
    assert whole.choices[0].message.content == expected
    assert "".join(entry.token for entry in whole.choices[0].logprobs.content) == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "length")


def test_samples_seeds_and_stop_strings(client: openai.OpenAI) -> None:
    def texts(**fields: object) -> list[str]:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "n": 2, "seed": 3, **fields}
        return [choice.text for choice in client.completions.create(**asked).choices]  # type: ignore[call-overload]

    first = texts()
    assert first == texts()
    assert first[0] != first[1]
    stop = first[0][2:5]
    assert texts(n=1, stop=stop) == [first[0][: first[0].index(stop)]]


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100_000)
    with pytest.raises(openai.BadRequestError) as hot:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=3)
    assert unknown.value.code == "model_not_found"
    assert long.value.code == "context_length_exceeded"
    assert hot.value.param == "temperature"


def test_models_health_readiness_and_description(chatty: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert httpx2.get(chatty.http_url + path).status_code == 200, path


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_pages(stream: bool, chatty: Server, client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    if stream:
        with closing(client.completions.create(**fields, stream=True)) as chunks:  # type: ignore[call-overload]
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).completions.create(**fields)  # type: ignore[call-overload]
    deadline_s = time.monotonic() + 30
    while not all(w.running == 0 and w.free_pages == w.num_pages for w in chatty.status().workers):
        assert time.monotonic() < deadline_s, chatty.status().workers
        time.sleep(0.05)
