"""Two hosts with a network between them that delays, loses and parts, a Ray node on each, sixteen live streams."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.hosts import Hosts, two_hosts, why_no_hosts
from tests.integration.ray_nodes import ray_nodes
from tests.integration.streams import LiveStreams, is_serving, is_whole, member_pids, status_when
from tests.unit.api_keys import bearer, key, write_keys

CONFIG = """
link_timeout_s = 2.0
worker_timeout_s = 3.0
recovery_s = 60
rebalance_period_s = 0
weights_period_s = 0
"""
# Each takes four exchanges over the wire.
NUM_TOKENS = 16

pytestmark = pytest.mark.skipif(bool(why_no_hosts()), reason=f"no hosts on this machine: {why_no_hosts()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[Server]:
    """A shard and a worker on each host, each expert on one shard. Ray fills the emptier node."""
    home = tmp_path_factory.mktemp("network")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    with ray_nodes() as nodes:
        for host, address in enumerate(hosts.addresses):
            nodes.start(2, host=address, within=hosts.within(host))
        options = ("--shards", "2", "--workers", "2", "--dtype", "float32", "--config", str(config))
        # It is asked for its status from outside, which needs a key.
        keys = write_keys(home / "keys.toml", key("root", "admin"))
        where = ("--address", nodes.address, "--grpc-host", hosts.outer_address, "--keys", str(keys))
        with serving(POCKET, home, *options, *where, env=nodes.env, within=hosts.within(0)) as started:
            started.metadata = bearer("root")
            yield started


@pytest.fixture(scope="module")
def streams(server: Server, hosts: Hosts) -> LiveStreams:
    status = server.status()
    for tier in ([shard.address for shard in status.shards], [worker.address for worker in status.workers]):
        assert sorted(tier) == hosts.addresses, status
    return LiveStreams(server, NUM_TOKENS)


@contextmanager
def wire(hosts: Hosts, *, delay_s: float = 0.0, loss: float = 0.0) -> Iterator[None]:
    hosts.set_wire(delay_s=delay_s, loss=loss)
    try:
        yield
    finally:
        hosts.set_wire()


def await_whole(server: Server, before: StatusResponse) -> None:
    """Wait until all is ready again, with the same processes."""
    same = member_pids(before)
    status_when(server, lambda status: member_pids(status) == same and is_whole(status) and is_serving(server))


def test_a_delay_of_50_ms(server: Server, hosts: Hosts, streams: LiveStreams) -> None:
    before = server.status()
    with wire(hosts, delay_s=0.05), streams.running() as rough:
        time.sleep(3)
    await_whole(server, before)
    gaps_s = sorted(gap_s for _, gap_s in rough.gaps)
    assert gaps_s[len(gaps_s) // 2] > 0.1, "a token's way is there and back over the wire, at least once"


def test_a_loss_of_5_percent(server: Server, hosts: Hosts, streams: LiveStreams) -> None:
    before, lost_before = server.status(), hosts.set_wire()
    with wire(hosts, loss=0.05), streams.running():
        time.sleep(3)
    assert hosts.set_wire() > lost_before
    await_whole(server, before)


def test_a_partition(server: Server, hosts: Hosts, streams: LiveStreams) -> None:
    before = server.status()
    beyond = {shard.id for shard in before.shards if shard.address == hosts.addresses[1]}
    with streams.running():
        time.sleep(0.5)
        with wire(hosts, loss=1.0):
            time.sleep(3)
        await_whole(server, before)
        with wire(hosts, loss=1.0):
            status_when(
                server,
                lambda status: (
                    status.ready and {shard.id for shard in status.shards if shard.state == "unresponsive"} == beyond
                ),
            )
        await_whole(server, before)
