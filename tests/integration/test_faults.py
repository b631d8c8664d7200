"""Real signals to real processes: what dies does not change or lose a stream that others can carry."""

import signal
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.streams import is_serving, is_whole, status_when

PROMPT = TokenIds(ids=[40, 41, 42, 43])
NUM_TOKENS = 300


def _stream(server: Server, into: list[int], num_tokens: int = NUM_TOKENS) -> None:
    request = GenerateRequest(token_ids=PROMPT, max_tokens=num_tokens, ignore_eos=True)
    with server.channel() as channel:
        for response in InferenceStub(channel).Generate(request, timeout=90):
            into.extend(response.token_ids)


def _kill_during_a_stream(server: Server, pid: int) -> list[int]:
    return _signal_during_a_stream(server, pid, signal.SIGKILL)


def _signal_during_a_stream(server: Server, pid: int, number: signal.Signals) -> list[int]:
    tokens: list[int] = []
    thread = threading.Thread(target=_stream, args=(server, tokens))
    thread.start()
    while len(tokens) < NUM_TOKENS // 10:
        assert thread.is_alive()
        time.sleep(0.005)
    psutil.Process(pid).send_signal(number)
    thread.join(90)
    return tokens


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
    deadline_s = time.monotonic() + 120
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

    status_when(server, lambda _: is_serving(server))
    assert _kill_during_a_stream(server, after.shards[0].pid) == expected
    status_when(server, lambda _: is_serving(server))  # every expert has a replica on the other shard
    revived = status_when(
        server, lambda status: status.shards[0].pid not in (0, after.shards[0].pid) and is_whole(status)
    )
    assert revived.epoch > after.epoch
    assert [s.num_slots for s in revived.shards] == [s.num_slots for s in before.shards]
    assert revived.workers[0].pid not in (0, after.workers[0].pid)
    assert _kill_during_a_stream(server, revived.shards[1].pid) == expected, "the revived shard's copies are used"
