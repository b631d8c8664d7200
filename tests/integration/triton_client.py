"""Run by an interpreter that has tritonclient, unchanged from the index: asks a server for all that it serves.

triton_client.py ADDRESS MODEL PROMPT      prints JSON of what came
"""

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client
from tritonclient.utils import InferenceServerException

PARAMETERS = {"max_tokens": 24, "ignore_eos": True}
# As the client of Triton's vLLM backend writes them: numbers in quotes.
SAMPLING = {"max_tokens": "24", "temperature": "0", "ignore_eos": True}
TIMEOUT_S = 120


def tensor(name: str, datatype: str, values: list[Any], dtype: Any = np.object_) -> Any:
    given = sync_client.InferInput(name, [len(values)], datatype)
    given.set_data_from_numpy(np.array(values, dtype=dtype))
    return given


def prompt(text: str) -> Any:
    return tensor("text_input", "BYTES", [text.encode()])


def streamed() -> Any:
    return tensor("stream", "BOOL", [True], bool)


def read(result: Any) -> dict[str, Any]:
    """Return the tensors of a response, its id and its parameters."""
    response = result.get_response(as_json=True)
    tensors = {name: result.as_numpy(name) for name in ("text_output", "output_ids", "finish_reason")}
    return {
        "id": response.get("id", ""),
        "parameters": response.get("parameters", {}),
        **{
            name: None if values is None else [v.decode() if isinstance(v, bytes) else int(v) for v in values]
            for name, values in tensors.items()
        },
    }


def describe(client: Any, model: str) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready(name) for name in (model, "other")],
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(model, as_json=True),
        "config": client.get_model_config(model, as_json=True)["config"],
    }


def infer(client: Any, model: str, text: str) -> dict[str, Any]:
    whole = client.infer(model, [prompt(text)], parameters=PARAMETERS, request_id="whole")
    sampling = tensor("sampling_parameters", "BYTES", [json.dumps(SAMPLING)])
    echo = tensor("exclude_input_in_output", "BOOL", [False], bool)
    echoed = client.infer(model, [prompt(text), sampling, echo], model_version="1", compression_algorithm="gzip")
    chosen = [sync_client.InferRequestedOutput("output_ids")]
    ids = tensor("input_ids", "INT64", [5, 6, 7], np.int64)
    by_ids = client.infer(model, [ids], outputs=chosen, parameters=PARAMETERS)
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.async_infer(
        model, [prompt(text)], parameters=PARAMETERS, callback=lambda result, error: came.put((result, error))
    )
    result, error = came.get(timeout=TIMEOUT_S)
    assert error is None, error
    return {"whole": read(whole), "echoed": read(echoed), "by_ids": read(by_ids), "async": read(result)}


def refusals(client: Any, model: str, text: str) -> list[tuple[str, str]]:
    """Return status and message of requests that cannot be served."""
    calls = [
        partial(client.infer, "other", [prompt(text)]),
        partial(client.infer, model, [prompt(text)], model_version="2"),
        partial(client.infer, model, [prompt(text)], parameters={"max_tokens": 0}),
        partial(client.infer, model, [prompt(text), tensor("top_k", "BYTES", [b"5"])]),
        partial(client.infer, model, [tensor("input_ids", "INT32", [10**6], np.int32)]),
        partial(client.infer, model, [prompt(text), streamed()]),
        partial(client.get_model_metadata, "other"),
    ]
    seen = []
    for call in calls:
        try:
            call()
        except InferenceServerException as error:
            seen.append((str(error.status()), str(error.message())))
    return seen


def stream(client: Any, model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return the responses and errors of one stream: a request for each text, and a wrong one."""
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: came.put((result, error)))
    for index, text in enumerate(texts):
        client.async_stream_infer(
            model,
            [prompt(text), streamed()],
            request_id=str(index),
            parameters=PARAMETERS,
            enable_empty_final_response=True,
        )
    client.async_stream_infer(model, [prompt("a")], request_id="wrong", parameters={"max_tokens": -1})
    # Waits until all are answered.
    client.stop_stream()
    return [read(result) if error is None else {"error": str(error)} for result, error in came.queue]


def abandon_a_stream(client: Any, model: str, text: str) -> int:
    """Begin a long request, and cancel the stream after its first piece."""
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: came.put((result, error)))
    client.async_stream_infer(model, [prompt(text), streamed()], parameters={"max_tokens": 1500, "ignore_eos": True})
    result, error = came.get(timeout=TIMEOUT_S)
    assert error is None, error
    client.stop_stream(cancel_requests=True)
    return len(read(result)["output_ids"])


async def aio_stream(address: str, model: str, texts: list[str]) -> dict[str, Any]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, text in enumerate(texts):
            yield {
                "model_name": model,
                "inputs": [prompt(text), streamed()],
                "request_id": str(index),
                "parameters": PARAMETERS,
            }

    async with aio_client.InferenceServerClient(address) as client:
        pieces = []
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            pieces.append(read(result))
        whole = await client.infer(model, [prompt(texts[0])], parameters=PARAMETERS)
        return {"live": await client.is_server_live(), "pieces": pieces, "whole": read(whole)}


def main() -> None:
    address, model, *texts = sys.argv[1:]
    with sync_client.InferenceServerClient(address) as client:
        seen = {
            **describe(client, model),
            "infer": infer(client, model, texts[0]),
            "refusals": refusals(client, model, texts[0]),
            "stream": stream(client, model, texts),
            "abandoned": abandon_a_stream(client, model, texts[0]),
        }
    seen["aio"] = asyncio.run(aio_stream(address, model, texts))
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
