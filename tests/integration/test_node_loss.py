"""A Ray node lost with the shards and the worker on it, under sixteen live streams."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.ray_nodes import members_on, ray_nodes
from tests.integration.streams import LiveStreams, is_serving, is_whole, member_pids, status_when

CONFIG = """
link_timeout_s = 1.0
recovery_s = 60
rebalance_period_s = 0
weights_period_s = 0
"""


@dataclass
class TwoNodes:
    """A server on two nodes, and their raylets."""

    server: Server
    head: psutil.Process
    other: psutil.Process


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    home = tmp_path_factory.mktemp("node-loss")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    options = ("--shards", "2", "--workers", "2", "--dtype", "float32", "--config", str(config))
    with ray_nodes(quick=True) as nodes:
        head, other = nodes.start(2), nodes.start(2)
        with serving(POCKET, home, *options, "--address", nodes.address, env=nodes.env) as server:
            yield TwoNodes(server, head, other)


def test_a_node_lost_with_all_that_runs_on_it(two: TwoNodes) -> None:
    server = two.server
    streams = LiveStreams(server)
    before = member_pids(server.status())
    lost = {member for member, pid in before.items() if pid in members_on(two.other)}
    assert sorted(member.partition("-")[0] for member in lost) == ["shard", "worker"], f"{lost} of {before}"
    with streams.running():
        time.sleep(0.5)
        psutil.Process(two.other.pid).kill()

        def is_replaced(status: StatusResponse) -> bool:
            now = member_pids(status)
            # The gateway hears of new members a moment after the controller.
            return is_whole(status) and {m for m in now if now[m] != before[m]} == lost and is_serving(server)

        after = status_when(server, is_replaced)
        assert set(member_pids(after).values()) <= members_on(two.head)
