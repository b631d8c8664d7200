"""Streams of a real server in deterministic mode: the same to the bit alone, together and when processes are killed."""

import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.families import write_checkpoint
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.integration.streams import is_whole, status_when
from tests.integration.test_scale import cli

pytestmark = pytest.mark.timeout(240)  # six streams alone, then together, three times

NUM_TOKENS = 90
# (token, logprob, [(token, logprob), ...]) of each position.
Stream = list[tuple[int, float, list[tuple[int, float]]]]


def _request(number: int) -> GenerateRequest:
    """Return one of several requests of unlike lengths: every second one is drawn with a seed."""
    request = GenerateRequest(
        token_ids=TokenIds(ids=range(40 + number, 43 + 30 * (number % 3) + 2 * number)),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=3,
    )
    if number % 2:
        request.temperature, request.top_p, request.seed = 1.0, 0.95, number
    return request


def _stream(server: Server, number: int, into: Stream) -> None:
    with server.channel() as channel:
        for response in InferenceStub(channel).Generate(_request(number), timeout=90):
            into += [
                (item.token_id, item.logprob, [(top.token_id, top.logprob) for top in item.top])
                for item in response.logprobs
            ]


def _together(server: Server, numbers: list[int], pid: int = 0) -> dict[int, Stream]:
    """Run requests at once; kill a process when a third of the first one's tokens are there."""
    streams: dict[int, Stream] = {number: [] for number in numbers}
    threads = [threading.Thread(target=_stream, args=(server, n, into)) for n, into in streams.items()]
    for thread in threads:
        thread.start()
    while pid and len(streams[numbers[0]]) < NUM_TOKENS // 3:
        assert threads[0].is_alive()
        time.sleep(0.002)
    if pid:
        psutil.Process(pid).kill()
    for thread in threads:
        thread.join(100)
    return streams


def test_alone_together_and_under_faults_the_bits_are_the_same(tmp_path: Path) -> None:
    numbers = list(range(6))
    options = ("--shards", "2", "--replicas", "2", "--workers", "2", "--deterministic")
    with serving(POCKET, tmp_path, *options) as server:
        expected = {number: _together(server, [number])[number] for number in numbers}
        assert all(len(stream) == NUM_TOKENS for stream in expected.values())
        assert _together(server, numbers) == expected
        status = server.status()
        assert _together(server, numbers, status.shards[0].pid) == expected
        # With one worker killed, what it had goes on at the other; its half of the streams is prefilled there.
        assert _together(server, numbers[::-1], status.workers[0].pid) == expected
        status_when(server, is_whole)
        for number in ("3", "1"):
            assert cli(server, "scale", "--shards", number, "--wait").returncode == 0
            assert _together(server, numbers) == expected, f"{number} shards"


def test_a_family_that_cannot_be_deterministic_is_refused_at_once(tmp_path: Path) -> None:
    write_checkpoint("qwen3_next", tmp_path / "model")
    command = [*CLI, "serve", str(tmp_path / "model"), "--grpc-port", "0", "--no-http", "--deterministic"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 2
    assert "keeps transformers' own cache (linear, state-space or indexed attention)" in result.stderr.splitlines()[-1]
