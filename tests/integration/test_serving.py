"""A served model as clients see it: parity, streams at once, cancel, deadline, health, bad input."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmesh.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.families import generate
from tests.integration.conftest import CLI, POCKET, Server

PROMPTS = ("def main():", "This program is free software", "The value", "U+0041 LATIN")
NUM_TOKENS = 48


def _tokens(server: Server, prompt_ids: list[int], **fields: Any) -> list[int]:
    request = GenerateRequest(token_ids=TokenIds(ids=prompt_ids), ignore_eos=True, **fields)
    with server.channel() as channel:
        return [t for r in InferenceStub(channel).Generate(request, timeout=60) for t in r.token_ids]


def _eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def _idle(server: Server) -> bool:
    return all(w.running == w.waiting == 0 for w in server.status().workers)


def test_greedy_text_equals_transformers_with_streams_at_once(pocket: Server) -> None:
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    expected = [generate(model, tokenizer(prompt).input_ids, NUM_TOKENS) for prompt in PROMPTS]
    got: dict[int, tuple[list[int], str]] = {}

    def stream(index: int) -> None:
        request = GenerateRequest(text=PROMPTS[index], max_tokens=NUM_TOKENS, ignore_eos=True)
        with pocket.channel() as channel:
            responses = list(InferenceStub(channel).Generate(request, timeout=60))
        assert responses[-1].finish_reason == FINISH_REASON_LENGTH
        assert responses[-1].usage.completion_tokens == NUM_TOKENS
        got[index] = ([t for r in responses for t in r.token_ids], "".join(r.text for r in responses))

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    for index, tokens in enumerate(expected):
        assert got[index] == (tokens, tokenizer.decode(tokens, skip_special_tokens=True))


def test_seeded_sampling_does_not_depend_on_worker_or_company(pocket: Server) -> None:
    alone = _tokens(pocket, [5, 6, 7], max_tokens=24, temperature=1.0, seed=11)
    together: dict[int, list[int]] = {}

    def stream(index: int) -> None:
        together[index] = _tokens(pocket, [5, 6, 7], max_tokens=24, temperature=1.0, seed=11 if index < 3 else index)

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert together[0] == together[1] == together[2] == alone
    assert together[5] != alone


def test_generate_once_with_samples_stop_and_logprobs(pocket: Server) -> None:
    request = GenerateRequest(
        text="def main():", max_tokens=12, n=3, temperature=0.8, seed=3, logprobs=2, ignore_eos=True
    )
    with pocket.channel() as channel:
        response = InferenceStub(channel).GenerateOnce(request, timeout=60)
        text = response.outputs[0].text
        cut = GenerateRequest(
            text="def main():", max_tokens=12, temperature=0.8, seed=3, stop=[text[2:5]], ignore_eos=True
        )
        stopped = InferenceStub(channel).GenerateOnce(cut, timeout=60).outputs[0]
    assert [o.index for o in response.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in response.outputs}) > 1
    for output in response.outputs:
        assert len(output.logprobs) == 12
        assert all(len(p.top) == 2 and p.top[0].logprob >= p.logprob for p in output.logprobs)
    assert stopped.finish_reason == FINISH_REASON_STOP
    assert stopped.text == text[: text.index(text[2:5])]


def test_cancel_and_deadline_free_the_request_at_once(pocket: Server) -> None:
    long = GenerateRequest(text="def main():", max_tokens=1500, ignore_eos=True)
    with pocket.channel() as channel:
        call = InferenceStub(channel).Generate(long, timeout=60)
        next(call)
        call.cancel()
        assert _eventually(lambda: _idle(pocket)), pocket.status()
        with pytest.raises(grpc.RpcError) as error:
            list(InferenceStub(channel).Generate(long, timeout=0.3))
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert _eventually(lambda: _idle(pocket)), pocket.status()
    assert all(w.free_pages == w.num_pages for w in pocket.status().workers)


BAD: dict[str, dict[str, Any]] = {
    "prompt longer than the context": {"token_ids": TokenIds(ids=[5] * 5000)},
    "max_tokens 0": {"text": "a", "max_tokens": 0},
    "max_tokens negative": {"text": "a", "max_tokens": -3},
    "temperature negative": {"text": "a", "temperature": -0.5},
    "empty prompt": {"text": ""},
    "no prompt": {},
    "token id out of range": {"token_ids": TokenIds(ids=[1, 10**6])},
    "top_p 0": {"text": "a", "top_p": 0.0},
    "n 0": {"text": "a", "n": 0},
}


def test_bad_input_is_refused_and_disturbs_nobody(pocket: Server) -> None:
    undisturbed = _tokens(pocket, [9, 8, 7], max_tokens=150)
    got: list[list[int]] = []
    thread = threading.Thread(target=lambda: got.append(_tokens(pocket, [9, 8, 7], max_tokens=150)))
    thread.start()
    with pocket.channel() as channel:
        for name, fields in BAD.items():
            with pytest.raises(grpc.RpcError) as error:
                InferenceStub(channel).GenerateOnce(GenerateRequest(**fields), timeout=30)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert error.value.details(), name
    thread.join(60)
    assert got == [undisturbed]


def test_health_and_reflection(pocket: Server) -> None:
    with pocket.channel() as channel:
        for service in ("", "expertmesh.v1.Inference"):
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests, timeout=10))
    names = {service.name for service in answer.list_services_response.service}
    assert {"expertmesh.v1.Inference", "expertmesh.v1.Admin", "grpc.health.v1.Health"} <= names


def test_status_json_is_the_contract_and_memory_adds_up(pocket: Server) -> None:
    output = subprocess.run(
        [*CLI, "status", "--url", pocket.address, "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    status = json.loads(output.stdout)
    assert status["epoch"] == 1
    assert status["controller"]["pid"] > 0
    assert status["grpc_address"] == pocket.address
    assert 0 < status["balancedness"] <= 1
    assert {"id", "pid", "node", "state", "num_slots", "weight_bytes"} <= set(status["shards"][0])
    assert {"id", "pid", "state", "dense_bytes", "running", "waiting"} <= set(status["workers"][0])
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    experts = sum(p.numel() * 4 for n, p in model.named_parameters() if ".experts." in n)
    dense = sum(p.numel() * 4 for n, p in model.named_parameters() if ".experts." not in n)
    assert sum(shard["weight_bytes"] for shard in status["shards"]) == 2 * experts
    assert sum(shard["num_slots"] for shard in status["shards"]) == 2 * 4 * 16
    assert [worker["dense_bytes"] for worker in status["workers"]] == [dense, dense]
    assert all(row["dispatch_bytes"] > 0 and row["combine_bytes"] > 0 for row in status["layer_traffic"])


def test_what_computes_has_the_cores_before_what_does_not(pocket: Server) -> None:
    processes = psutil.Process(pocket.process.pid).children(recursive=True)
    niceness = {" ".join(process.cmdline()): process.nice() for process in processes}
    computing = [nice for name, nice in niceness.items() if "ShardActor" in name or "WorkerActor" in name]
    assert len(computing) >= 2
    others = {nice for name, nice in niceness.items() if any(other in name for other in ("gcs_server", "gateway"))}
    assert set(computing) == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert others == {max(10, *computing)}


def test_generate_command(pocket: Server) -> None:
    command = [*CLI, "generate", "def main():", "--url", pocket.address, "--max-tokens", "10", "--json"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"] <= 10
    assert answer["ttft_s"] > 0
    assert answer["finish_reason"] in ("length", "stop")
