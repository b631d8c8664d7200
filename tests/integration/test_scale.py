"""Both tiers change size while streams run: no stream ends, none changes a token."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import psutil
import pytest

from expertmesh.v1.admin_pb2 import DrainRequest, ListOperationsRequest, Operation, ScaleRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET, Server, serving

NUM_TOKENS = 200
NUM_STREAMS = 4


class Streams:
    """Streams that begin again as soon as they end, and what each gave."""

    def __init__(self, server: Server, count: int = NUM_STREAMS) -> None:
        self._server = server
        self._stopping = threading.Event()
        self.outputs: dict[int, list[list[int]]] = {number: [] for number in range(count)}
        self.errors: list[grpc.RpcError] = []

    def generate(self, number: int) -> list[int]:
        request = GenerateRequest(
            token_ids=TokenIds(ids=[40 + number, 41, 42]),
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            temperature=0.8 if number % 2 else 0.0,
            seed=number,
        )
        tokens: list[int] = []
        with self._server.channel() as channel:
            for response in InferenceStub(channel).Generate(request, timeout=90):
                tokens.extend(response.token_ids)
        return tokens

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._repeat, args=(number,)) for number in self.outputs]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join(120)

    def _repeat(self, number: int) -> None:
        while not self._stopping.is_set():
            try:
                self.outputs[number].append(self.generate(number))
            except grpc.RpcError as error:
                self.errors.append(error)


def cli(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments, "--url", server.address], capture_output=True, text=True, timeout=120, check=False
    )


def finished(server: Server, operation: Operation, timeout_s: float = 120) -> Operation:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with server.channel() as channel:
                listed = AdminStub(channel).ListOperations(ListOperationsRequest(id=operation.id), timeout=20)
            if listed.operations[0].phase in ("DONE", "ROLLED_BACK"):
                return listed.operations[0]
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:  # the controller may be away
                raise
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("scale")
    config = home / "serve.toml"
    config.write_text("rebalance_period_s = 0\n")  # so that the slots can be counted
    with serving(POCKET, home, "--shards", "2", "--dtype", "float32", "--config", str(config)) as started:
        yield started


def test_streams_go_on_with_the_same_tokens_through_every_change(server: Server) -> None:
    streams = Streams(server)
    expected = {number: streams.generate(number) for number in range(NUM_STREAMS)}
    before = server.status()
    slots = sum(shard.num_slots for shard in before.shards)
    with streams.running():
        for arguments in (
            ("scale", "--shards", "4"),
            ("scale", "--workers", "2"),
            ("drain", "shard-1"),
            ("drain", "worker-0"),
            ("scale", "--shards", "2", "--workers", "2"),
            ("scale", "--shards", "1", "--workers", "1"),
        ):
            done = cli(server, *arguments, "--wait", "--json")
            assert done.returncode == 0, done.stderr + server.log.read_text()
            assert json.loads(done.stdout)["phase"] == "DONE"
            status = server.status()
            assert status.ready, status.not_ready_reason
            assert f"ep={len(status.shards)} " in status.plan
            assert sum(shard.num_slots for shard in status.shards) == slots
    assert not streams.errors
    for number, outputs in streams.outputs.items():
        assert len(outputs) > 1
        assert all(output == expected[number] for output in outputs)
    after = server.status()
    assert [shard.id for shard in after.shards] == ["shard-0"]
    assert [worker.id for worker in after.workers] == ["worker-1"]
    assert after.epoch > before.epoch
    assert cli(server, "ops").stdout.count("DONE") == 6


def test_a_second_operation_is_refused_and_asking_twice_is_asking_once(server: Server) -> None:
    with server.channel() as channel:
        admin = AdminStub(channel)
        first = admin.Scale(ScaleRequest(shards=2, workers=2), timeout=20)
        assert admin.Scale(ScaleRequest(shards=2, workers=2), timeout=20).id == first.id
        with pytest.raises(grpc.RpcError) as error:
            admin.Drain(DrainRequest(id="shard-0"), timeout=20)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{first.id} is under way: scale to 2 shards and 2 workers" in str(error.value.details())
    assert finished(server, first).phase == "DONE"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale", "--shards", "0"], "must be at least 1"),
        (["scale", "--shards", "5000"], "cannot scale to 5000 shards; 1 to 1024 can be asked for"),
        (["scale"], "scale to how many shards, how many workers?"),
        (["drain", "shard-77"], "there is no 'shard-77'; there are shard-0"),
    ],
)
def test_what_cannot_be_done_changes_nothing(server: Server, arguments: list[str], message: str) -> None:
    before = server.status()
    refused = cli(server, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    after = server.status()
    assert after.epoch == before.epoch
    assert [s.pid for s in after.shards] == [s.pid for s in before.shards]


def test_an_operation_survives_the_controller(server: Server) -> None:
    streams = Streams(server)
    expected = {number: streams.generate(number) for number in range(NUM_STREAMS)}
    with streams.running():
        with server.channel() as channel:
            operation = AdminStub(channel).Scale(ScaleRequest(shards=3), timeout=20)
        psutil.Process(server.status().controller.pid).kill()
        ended = finished(server, operation)
        deadline_s = time.monotonic() + 120
        wanted = 3 if ended.phase == "DONE" else 2
        while len(server.status().shards) != wanted or not server.status().ready:
            assert time.monotonic() < deadline_s, f"{ended}\n{server.status()}"
            time.sleep(0.2)
    assert not streams.errors
    assert all(output == expected[number] for number, outputs in streams.outputs.items() for output in outputs)


def test_a_shard_that_dies_before_it_takes_part_rolls_the_operation_back(server: Server) -> None:
    before = server.status()
    with server.channel() as channel:
        operation = AdminStub(channel).Scale(ScaleRequest(shards=len(before.shards) + 1), timeout=20)
    new = operation.adding[0]
    deadline_s = time.monotonic() + 120
    while not (pid := next((s.pid for s in server.status().shards if s.id == new), 0)):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    psutil.Process(pid).kill()
    ended = finished(server, operation)
    after = server.status()
    if ended.phase == "ROLLED_BACK":
        assert ended.error
        assert [s.pid for s in after.shards] == [s.pid for s in before.shards]
        assert after.epoch == before.epoch
        return
    assert ended.phase == "DONE"  # it had taken part already, and is started again
    while not (after.ready and all(s.num_slots for s in after.shards)):
        assert time.monotonic() < deadline_s + 30, after
        time.sleep(0.2)
        after = server.status()
    assert next(s.pid for s in after.shards if s.id == new) != pid
