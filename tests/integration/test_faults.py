"""Real signals to real processes: what dies does not change or lose a stream that others can carry."""

import os
import signal
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server, serving

PROMPT = TokenIds(ids=[40, 41, 42, 43])
NUM_TOKENS = 300


def _stream(server: Server, into: list[int], num_tokens: int = NUM_TOKENS) -> None:
    request = GenerateRequest(token_ids=PROMPT, max_tokens=num_tokens, ignore_eos=True)
    with server.channel() as channel:
        for response in InferenceStub(channel).Generate(request, timeout=90):
            into.extend(response.token_ids)


def _kill_during_a_stream(server: Server, pid: int) -> list[int]:
    tokens: list[int] = []
    thread = threading.Thread(target=_stream, args=(server, tokens))
    thread.start()
    while len(tokens) < NUM_TOKENS // 10:
        assert thread.is_alive()
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    thread.join(90)
    return tokens


def _serving(server: Server) -> bool:
    with server.channel() as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def server(tmp_path: Path):  # type: ignore[no-untyped-def]  # a generator fixture of a context manager
    with serving(
        POCKET, tmp_path, "--shards", "2", "--replicas", "2", "--workers", "2", "--dtype", "float32"
    ) as started:
        yield started


def test_controller_worker_and_shard_killed_one_after_the_other(server: Server) -> None:
    expected: list[int] = []
    _stream(server, expected)
    assert len(expected) == NUM_TOKENS

    before = server.status()
    assert _kill_during_a_stream(server, before.controller.pid) == expected
    deadline_s = time.monotonic() + 60
    while True:  # Ray restarts the controller, which finds its actors and its placement again
        try:
            after = server.status()
            if after.ready:
                break
        except grpc.RpcError:
            assert time.monotonic() < deadline_s, "the controller did not come back"
        time.sleep(0.2)
    assert after.controller.pid != before.controller.pid
    assert after.epoch == before.epoch
    assert [s.pid for s in after.shards] == [s.pid for s in before.shards]

    # A worker: its stream goes on at the other one. The stream may be at either; kill one, then see.
    assert _kill_during_a_stream(server, after.workers[0].pid) == expected

    assert _serving(server)
    assert _kill_during_a_stream(server, after.shards[0].pid) == expected
    assert _serving(server), "every expert has a replica on the other shard"

    os.kill(after.shards[1].pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 30
    while _serving(server):
        assert time.monotonic() < deadline_s, "health stays SERVING with no shard alive"
        time.sleep(0.1)
    status = server.status()
    assert not status.ready
    assert "no live replica" in status.not_ready_reason
    with server.channel() as channel, pytest.raises(grpc.RpcError) as error:
        InferenceStub(channel).GenerateOnce(GenerateRequest(token_ids=PROMPT, max_tokens=2), timeout=30)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE, error.value.details()
