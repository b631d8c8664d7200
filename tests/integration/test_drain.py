"""Nodes that are drained under live streams: what runs on them moves before they end, or is replaced after."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.integration.ray_nodes import RayNodes, ray_nodes
from tests.integration.streams import LiveStreams, is_serving, is_whole, status_when
from tests.integration.test_application import free_port

pytestmark = pytest.mark.timeout(400)  # seven nodes and a fleet are started
GRACE_S = 120
CONFIG = """
member_cpus = 1
worker_timeout_s = 15
recovery_s = 120
rebalance_period_s = 0
weights_period_s = 0
[nodes]
shards = { tier = "experts" }
workers = { tier = "attention" }
"""
# Of these none is logged where members move in time.
FAULTS = {
    "member_lost",
    "link_lost",
    "link_lost_reported",
    "step_retried",
    "step_waits",
    "step_failed",
    "request_failed",
}


@dataclass
class Fleet:
    """A server on a cluster, and the raylets of its nodes by their addresses."""

    nodes: RayNodes
    server: Server
    streams: LiveStreams
    raylets: dict[str, psutil.Process] = field(default_factory=dict)

    def start(self, tier: str, cpus: int) -> str:
        """Start a node of a tier, and return its address."""
        host = f"127.0.0.{len(self.raylets) + 2}"
        self.raylets[host] = self.nodes.start(cpus, host=host, labels={"tier": tier})
        return host

    def leave(self, host: str, grace_s: float) -> subprocess.CompletedProcess[str]:
        """Run `expertmesh leave` for a node, and wait until it has ended."""
        options = ["--address", self.nodes.address, "--node-ip", host, "--grpc-port", str(free_port())]
        return subprocess.run(
            [*CLI, "leave", *options, "--grace-s", str(grace_s)],
            env={**os.environ, **self.nodes.env},
            capture_output=True,
            text=True,
            timeout=grace_s + 120,
            check=False,
        )

    def kill(self, host: str) -> None:
        """End a node at once, unless Ray has ended it because nothing was left on it."""
        with suppress(psutil.NoSuchProcess):
            self.raylets[host].kill()

    def events(self) -> list[dict[str, Any]]:
        """Return what all processes have logged."""
        logs = (self.nodes.directory / "session_latest" / "logs").glob("*.err")
        lines = [line for path in logs for line in path.read_text().splitlines() if line.startswith('{"time"')]
        return sorted((json.loads(line) for line in lines), key=lambda event: str(event["time"]))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two shards on one node and a worker on another; every expert is on one shard alone."""
    home = tmp_path_factory.mktemp("drain")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    options = ("--shards", "2", "--workers", "1", "--dtype", "float32", "--config", str(config))
    with ray_nodes(quick=True) as nodes:
        nodes.start(0)
        hosts = {
            f"127.0.0.{n}": nodes.start(cpus, host=f"127.0.0.{n}", labels={"tier": tier}) for n, tier, cpus in FIRST
        }
        with serving(POCKET, home, *options, "--address", nodes.address, env=nodes.env) as server:
            yield Fleet(nodes, server, LiveStreams(server), hosts)


FIRST = ((2, "experts", 2), (3, "attention", 1))


def addresses(status: StatusResponse) -> set[str]:
    return {shard.address for shard in status.shards} | {worker.address for worker in status.workers}


def test_members_move_off_nodes_before_these_end_and_nothing_happens_to_the_streams(fleet: Fleet) -> None:
    server, (shards_host, worker_host) = fleet.server, fleet.raylets
    with fleet.streams.running() as record:
        for host, tier, cpus in ((shards_host, "experts", 2), (worker_host, "attention", 1)):
            new = fleet.start(tier, cpus)
            left = fleet.leave(host, GRACE_S)
            assert left.returncode == 0, left.stderr + server.log.read_text()
            status = server.status()
            assert host not in addresses(status)
            assert new in addresses(status)
            assert (len(status.shards), len(status.workers)) == (2, 1)
            fleet.kill(host)
            status_when(server, lambda status: is_whole(status) and is_serving(server))
            seen = len(record.token_times_s)
            status_when(server, lambda _, seen=seen: len(record.token_times_s) > seen + 16)  # type: ignore[misc]
    events = fleet.events()
    assert not [event for event in events if event["event"] in FAULTS]
    assert not [event for event in events if event["event"] == "placement_changed" and event["urgent"]][1:]
    moved = [event["reason"] for event in events if event["event"] == "request_moved"]
    assert set(moved) <= {"it is to leave"}
    said = [event["line"] for event in events if event["event"] == "fleet_progress"]
    assert sum("is to end in" in line for line in said) == 2
    assert sum(" moved off node " in line for line in said) == 2


def test_members_that_find_no_room_are_replaced_after_their_node(fleet: Fleet) -> None:
    server = fleet.server
    before = server.status()
    (host,) = {shard.address for shard in before.shards}
    with fleet.streams.running():
        left = fleet.leave(host, 4)
        assert left.returncode == 1
        assert f"still on {host} after 4 s: " + ", ".join(sorted(s.id for s in before.shards)) in left.stderr
        stayed = {shard.pid for shard in server.status().shards if shard.address == host}
        assert stayed == {shard.pid for shard in before.shards}, "they serve for as long as their node is there"
        fleet.kill(host)
        new = fleet.start("experts", 2)
        after = status_when(server, lambda s: is_whole(s) and is_serving(server) and new in addresses(s), 120)
    assert [shard.id for shard in after.shards] == [shard.id for shard in before.shards]
    assert {shard.address for shard in after.shards} == {new}
