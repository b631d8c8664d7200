"""Load, to autoscaler, to placement group, to Ray's autoscaler, to node; and all the way back when the load is gone."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import POCKET, serving
from tests.integration.fake_nodes import HEAD_ID, autoscaling_cluster
from tests.integration.test_autoscaling import ready, wait_for
from tests.integration.test_scale import NUM_STREAMS, Streams

pytestmark = pytest.mark.timeout(240)  # a cluster and a server are started, and a node comes and goes
SETTINGS = """
rebalance_period_s = 0
member_cpus = 1
[autoscale]
period_s = 0.5
[autoscale.shards]
max_count = 2
target_utilisation = 0.02
up_delay_s = 1
down_delay_s = 3
cooldown_s = 2
[autoscale.workers]
max_count = 1
"""


def test_load_brings_a_node_and_calm_ends_it(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(SETTINGS)
    options = ("--shards", "1", "--dtype", "float32", "--config", str(config))
    with (
        autoscaling_cluster(head_cpus=2, node_cpus=1, max_nodes=1) as cluster,
        serving(POCKET, tmp_path, "--address", cluster.address, *options, env=cluster.env) as server,
    ):
        streams = Streams(server)
        with streams.running():
            busy = wait_for(server, lambda status: ready(status) == (2, 1))
            (node,) = cluster.raylets().keys() - {HEAD_ID}
            assert {shard.node for shard in busy.shards} == {HEAD_ID, node}
        wait_for(server, lambda status: len(status.shards) == 1 and list(cluster.raylets()) == [HEAD_ID])
        assert not streams.errors
        for outputs in streams.outputs.values():
            assert all(output == outputs[0] for output in outputs)
        assert len(streams.outputs) == NUM_STREAMS
        lines = cluster.lines_of(busy.controller.pid)
    records = [json.loads(line) for line in lines if line.startswith("{")]
    decisions = [json.loads(record["decision"]) for record in records if record["event"] == "autoscale_decision"]
    wanted = [decision["shards"]["wanted"] for decision in decisions]
    assert wanted[0] == 1
    assert {1, 2} == set(wanted)
    grown = next(decision for decision in decisions if decision["shards"]["wanted"] == 2)
    assert grown["inputs"]["shards"]["mean_utilisation"] > 0.02
