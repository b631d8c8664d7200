"""Two things at once, and what hangs, under sixteen live streams: no request fails, the tokens stay, all comes back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from expertmesh.actors.cli.chaos_streams import Record
from expertmesh.cluster.placement import Placement, ShardSlots
from expertmesh.v1.admin_pb2 import (
    GetPlacementRequest,
    ListOperationsRequest,
    PlacementRecord,
    ScaleRequest,
    StatusResponse,
)
from expertmesh.v1.admin_pb2_grpc import AdminStub
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.streams import NUM_STREAMS, LiveStreams, is_serving, is_whole, member_pids, status_when
from tests.integration.test_scale import finished

CONFIG = """
link_timeout_s = 1.0
worker_timeout_s = 2.0
recovery_s = 60
rebalance_period_s = 0
weights_period_s = 0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three shards with a sole copy of each expert, the harder case, and two workers."""
    home = tmp_path_factory.mktemp("double")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    options = ("--shards", "3", "--workers", "2", "--dtype", "float32", "--config", str(config))
    with serving(POCKET, home, *options) as started:
        yield started


@pytest.fixture(scope="module")
def streams(server: Server) -> LiveStreams:
    return LiveStreams(server)


def pids(status: StatusResponse) -> dict[str, int]:
    return {**member_pids(status), "controller": status.controller.pid}


def kill(server: Server, *members: str) -> None:
    """Kill members at once."""
    found = pids(server.status())
    for member in members:
        psutil.Process(found[member]).kill()


def await_new(server: Server, before: dict[str, int], *members: str) -> None:
    """Wait until these have new processes, the others the old ones, all is whole, and health says so."""

    def done(status: StatusResponse) -> bool:
        now = pids(status)
        renewed = {member for member in now if now[member] != before.get(member)}
        return renewed == set(members) and is_whole(status) and is_serving(server)

    status_when(server, done)


def await_other(server: Server, member: str, pid: int) -> None:
    """Wait until a member has another process, and all is whole."""
    status_when(server, lambda status: pids(status).get(member, pid) != pid and is_whole(status))


@pytest.mark.parametrize("members", [("shard-1", "worker-0"), ("controller", "shard-0")])
def test_killed_at_once(server: Server, streams: LiveStreams, members: tuple[str, ...]) -> None:
    before = pids(status_when(server))
    with streams.running():
        time.sleep(0.3)
        kill(server, *members)
        await_new(server, before, *members)


def test_shards_killed_while_another_recovers(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running():
        time.sleep(0.3)
        psutil.Process(before["shard-0"]).kill()
        time.sleep(0.2)  # the survivors are about to read its experts
        psutil.Process(before["shard-1"]).kill()
        time.sleep(0.5)  # the last one is about to have all
        psutil.Process(before["shard-2"]).kill()
        await_new(server, before, "shard-0", "shard-1", "shard-2")


REQUESTS = [("mixed", number) for number in range(NUM_STREAMS)]


def turned(record: bytes) -> PlacementRecord:
    """Return a placement in which every shard has the experts of another."""
    placement = Placement.from_bytes(record)
    names = [slots.shard for slots in placement.shards]
    moved = tuple(
        ShardSlots(shard=name, experts=slots.experts)
        for name, slots in zip([*names[1:], names[0]], placement.shards, strict=True)
    )
    target = Placement(epoch=0, num_experts=placement.num_experts, layers=placement.layers, shards=moved)
    return PlacementRecord(record=target.to_bytes())


@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_a_shard_killed_while_experts_move(server: Server, streams: LiveStreams, delay_s: float) -> None:
    before = pids(status_when(server))
    with streams.running():
        with server.channel() as channel:
            admin = AdminStub(channel)
            record = admin.GetPlacement(GetPlacementRequest(), timeout=20).record
            operation = admin.SetPlacement(turned(record), timeout=20)
            asked = ListOperationsRequest(id=operation.id)
            while admin.ListOperations(asked, timeout=20).operations[0].phase == "PREPARE":
                time.sleep(0.002)
        time.sleep(delay_s)
        psutil.Process(before["shard-1"]).kill()
        ended = finished(server, operation)
        assert ended.phase == "DONE" or ended.error
        await_new(server, before, "shard-1")


def test_a_shard_killed_while_the_fleet_grows_and_shrinks(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running():
        for shards in (4, 3):
            with server.channel() as channel:
                operation = AdminStub(channel).Scale(ScaleRequest(shards=shards), timeout=20)
            kill(server, "shard-0")
            ended = finished(server, operation)
            assert ended.phase == "DONE" or ended.error
            await_other(server, "shard-0", before["shard-0"])
            before = pids(status_when(server))
        if len(server.status().shards) == 4:  # it was rolled back: the fault was first
            with server.channel() as channel:
                assert finished(server, AdminStub(channel).Scale(ScaleRequest(shards=3), timeout=20)).phase == "DONE"


def test_a_shard_that_hangs_is_left_out_and_joined_again(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running() as rough:
        time.sleep(0.3)
        with stopped(before["shard-0"]):
            # The gateway hears of it a little later than the controller knows it.
            status_when(server, lambda s: s.shards[0].state == "unresponsive" and s.ready and is_serving(server))
            await_outputs(rough)
        await_new(server, before)


def test_the_streams_of_a_worker_that_hangs_go_on_elsewhere(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running() as rough:
        time.sleep(0.3)
        with stopped(before["worker-0"]):
            await_outputs(rough)
        await_new(server, before)


def test_a_worker_and_a_shard_that_hang_and_a_shard_that_dies(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running() as rough:
        time.sleep(0.3)
        with stopped(before["worker-1"]), stopped(before["shard-1"]):
            psutil.Process(before["shard-0"]).kill()
            status_when(server, lambda status: status.shards[0].pid not in (0, before["shard-0"]) and status.ready)
            await_outputs(rough)
        await_new(server, before, "shard-0")


def test_a_controller_that_hangs_is_not_missed(server: Server, streams: LiveStreams) -> None:
    before = pids(status_when(server))
    with streams.running() as rough:
        time.sleep(0.3)
        with stopped(before["controller"]):
            time.sleep(3)
            psutil.Process(before["worker-0"]).kill()
            await_outputs(rough)
            assert is_serving(server)
        await_new(server, before, "worker-0")


def test_the_embedded_redis_killed_and_then_the_controller(server: Server, streams: LiveStreams) -> None:
    before = server.status()
    controller = psutil.Process(before.controller.pid)
    (redis,) = redis_of(controller)
    with streams.running():
        psutil.Process(redis).kill()
        deadline_s = time.monotonic() + 120
        while not redis_of(controller) - {redis}:
            assert time.monotonic() < deadline_s, "Redis was not started again"
            time.sleep(0.1)
        kill(server, "controller")
        await_new(server, pids(before), "controller")
    assert server.status().epoch == before.epoch, "the placement was found"


def redis_of(controller: psutil.Process) -> set[int]:
    return {child.pid for child in controller.children(recursive=True) if "redis" in child.name()}


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process while the block lasts."""
    psutil.Process(pid).suspend()
    try:
        yield
    finally:
        psutil.Process(pid).resume()


def await_outputs(rough: Record) -> None:
    """Wait until every request has come to its end once more."""
    before = {request: len(rough.outputs.get(request, [])) for request in REQUESTS}
    deadline_s = time.monotonic() + 120
    while waiting := [request for request, count in before.items() if len(rough.outputs.get(request, [])) == count]:
        assert time.monotonic() < deadline_s, f"the streams of the requests {waiting} do not go on"
        time.sleep(0.05)
