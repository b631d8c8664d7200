"""Ray's own autoscaler brings a node when a shard has no room, and ends it when the shard is gone."""

import json
import time
from collections.abc import Callable, Iterator

import pytest

from expertmesh.v1.admin_pb2 import ScaleRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.fake_nodes import HEAD_ID, Cluster, autoscaling_cluster
from tests.integration.test_scale import NUM_STREAMS, Streams, cli, finished

pytestmark = pytest.mark.timeout(240)  # a cluster and a server are started, and nodes come and go
ROOM_TIMEOUT_S = 15


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Its head has room for two shards and a worker, and one node may come."""
    with autoscaling_cluster(head_cpus=3, node_cpus=1, max_nodes=1) as started:
        yield started


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("nodes")
    config = home / "serve.toml"
    config.write_text(f"member_cpus = 1\nroom_timeout_s = {ROOM_TIMEOUT_S}\nrebalance_period_s = 0\n")
    options = ("--address", cluster.address, "--shards", "2", "--dtype", "float32", "--config", str(config))
    with serving(POCKET, home, *options, env=cluster.env) as started:
        yield started
    assert not cluster.placement_groups(), "what was reserved was not given back"


def nodes_of(server: Server) -> dict[str, str]:
    status = server.status()
    return {shard.id: shard.node for shard in status.shards} | {worker.id: worker.node for worker in status.workers}


def wait_until(what: Callable[[], bool], server: Server, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.3)


def test_demand_launches_a_node_and_a_drained_shards_node_goes(cluster: Cluster, server: Server) -> None:
    assert nodes_of(server) == dict.fromkeys(["shard-0", "shard-1", "worker-0"], HEAD_ID)
    assert list(cluster.raylets()) == [HEAD_ID]
    streams = Streams(server)
    expected = {number: streams.generate(number) for number in range(NUM_STREAMS)}
    with streams.running():
        done = cli(server, "scale", "--shards", "3", "--wait", "--json")
        assert done.returncode == 0, done.stderr + server.log.read_text()
        assert json.loads(done.stdout)["phase"] == "DONE"
        (node,) = cluster.raylets().keys() - {HEAD_ID}
        assert nodes_of(server)["shard-2"] == node
        assert all(shard.num_slots for shard in server.status().shards)
        time.sleep(5)  # longer than an idle node lives
        assert node in cluster.raylets()
        drained = cli(server, "drain", "shard-2", "--wait", "--json")
        assert drained.returncode == 0, drained.stderr + server.log.read_text()
        assert set(nodes_of(server)) == {"shard-0", "shard-1", "worker-0"}
        wait_until(lambda: node not in cluster.raylets(), server)
    assert not streams.errors
    for number, outputs in streams.outputs.items():
        assert len(outputs) > 1
        assert all(output == expected[number] for output in outputs)


def test_where_no_node_comes_all_is_as_before_and_nothing_is_demanded_any_more(
    cluster: Cluster, server: Server
) -> None:
    before = server.status()
    groups = sorted(cluster.placement_groups())
    with server.channel() as channel:
        operation = AdminStub(channel).Scale(ScaleRequest(shards=4), timeout=20)
    ended = finished(server, operation)
    assert ended.phase == "ROLLED_BACK"
    assert f"no node with {{'CPU': 1.0}} free within {ROOM_TIMEOUT_S} s" in ended.error
    after = server.status()
    assert [(shard.id, shard.pid) for shard in after.shards] == [(shard.id, shard.pid) for shard in before.shards]
    assert after.epoch == before.epoch
    assert sorted(cluster.placement_groups()) == groups
    wait_until(lambda: list(cluster.raylets()) == [HEAD_ID], server)
