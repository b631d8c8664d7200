"""One request followed through the logs of gateway, worker and shard, while they are stopped and killed."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from expertmesh.actors.cli.logs import Choice, LogFiles
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.integration.streams import status_when

NUM_TOKENS = 400
Line = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    config = home / "serve.toml"
    config.write_text('log_level = "debug"\nlink_timeout_s = 1.0\nworker_timeout_s = 8.0\n')
    options = ["--shards", "2", "--replicas", "2", "--workers", "2", "--config", str(config)]
    with serving(POCKET, home, *options) as started:
        yield started


def stream(server: Server, request_id: str, disturb: Callable[[], None]) -> int:
    """Generate, and disturb the server when a part has come; return how many tokens came."""
    request = GenerateRequest(
        token_ids=TokenIds(ids=[40, 41, 42]), max_tokens=NUM_TOKENS, ignore_eos=True, request_id=request_id
    )
    count = 0
    disturbing = threading.Thread(target=disturb)
    with server.channel() as channel:
        for response in InferenceStub(channel).Generate(request, timeout=90):
            before, count = count, count + len(response.token_ids)
            if before < NUM_TOKENS // 10 <= count:
                disturbing.start()
    disturbing.join()
    return count


def lines_of(home: Path, request_id: str, holds: Callable[[list[Line]], bool]) -> list[Line]:
    """Return what `expertmesh logs` shows of a request, once that holds."""
    deadline_s = time.monotonic() + 120
    while True:
        lines = shown(home, "--request", request_id)
        if holds(lines):
            return lines
        assert time.monotonic() < deadline_s, lines
        time.sleep(0.5)


def shown(home: Path, *options: str) -> list[Line]:
    """Return the lines that `expertmesh logs` shows."""
    env = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    command = [*CLI, "logs", "--json", *options]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


def events(lines: list[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def test_a_request_is_followed_to_the_step_that_a_stopped_shard_was_in(server: Server, home: Path) -> None:
    shard = server.status().shards[0]
    try:
        assert stream(server, "stopped-shard", lambda: psutil.Process(shard.pid).suspend()) == NUM_TOKENS
    finally:
        psutil.Process(shard.pid).resume()
    # Once it goes on it finds that the worker has left.
    lines = lines_of(home, "stopped-shard", lambda found: bool(events(found, "peer_gone")))
    (ended,) = events(lines, "request_ended")
    assert (ended["outcome"], ended["output_tokens"], ended["moves"]) == ("OK", NUM_TOKENS, 0)
    assert ended["process"].startswith("gateway-")
    (lost,) = events(lines, "link_lost")
    assert (lost["process"], lost["shard"], lost["request_ids"]) == (ended["worker"], shard.id, ["stopped-shard"])
    (retried,) = events(lines, "step_retried")
    assert (retried["step"], retried["shards"]) == (lost["step"], [shard.id])
    gone = events(lines, "peer_gone")[0]
    assert (gone["process"], gone["peer"], gone["step"]) == (shard.id, ended["worker"], lost["step"])
    (begun,), (over,) = events(lines, "sequence_taken"), events(lines, "sequence_ended")
    assert begun["process"] == over["process"] == ended["worker"]
    assert over["step"] > lost["step"]
    steps = [line["step"] for line in events(lines, "step_done")]
    assert len(set(steps)) == len(steps) == NUM_TOKENS, "one for each token, the prompt's gives the first"
    assert {line["node"] for line in lines} == {ended["node"]}


def test_a_request_is_followed_from_a_killed_worker_to_another(server: Server, home: Path) -> None:
    status = status_when(server)

    def kill() -> None:
        (record,) = (home / "state" / "expertmesh").glob("running-*.json")
        lines = Choice("killed-worker", "debug").of(LogFiles().read(Path(json.loads(record.read_text())["logs"])))
        placed_at = events(lines, "request_placed")[0]["worker"]
        psutil.Process(next(worker.pid for worker in status.workers if worker.id == placed_at)).kill()

    assert stream(server, "killed-worker", kill) == NUM_TOKENS
    lines = lines_of(home, "killed-worker", lambda found: bool(events(found, "request_ended")))
    (moved,), (ended,) = events(lines, "request_moved"), events(lines, "request_ended")
    first, second = (line["worker"] for line in events(lines, "request_placed"))
    assert first != second
    assert (moved["worker"], ended["worker"], ended["moves"], ended["outcome"]) == (first, second, 1, "OK")
    assert moved["output_tokens"] < ended["output_tokens"] == NUM_TOKENS
    taken = events(lines, "sequence_taken")
    assert [line["process"] for line in taken] == [first, second]
    assert taken[1]["output_tokens"] == moved["output_tokens"], "it goes on after what was sent"
    assert any(line["process"] == first for line in events(lines, "step_done"))
    assert any(line["process"] == second for line in events(lines, "step_done"))


def test_every_process_tells_of_its_start_and_of_the_fleet(server: Server, home: Path) -> None:
    lines = shown(home)
    told = {line["event"] for line in lines}
    assert {"process_started", "model_loaded", "link_made", "peer_joined", "experts_taken", "placement_changed"} <= told
    assert {"worker_found", "readiness_changed", "member_joined", "fleet_progress", "epoch_settled"} <= told
    assert {line["process"].partition("-")[0] for line in lines} == {"gateway", "controller", "worker", "shard"}
