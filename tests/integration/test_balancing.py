"""Hot experts get replicas, weights follow the load, placements are saved and loaded; the streams stay the same."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, initial_placement
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.test_scale import NUM_STREAMS, Streams, cli

CONFIG = """
spare_slots = 0.5
rebalance_period_s = 0
weights_period_s = 1
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("balancing")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    with serving(POCKET, home, "--shards", "4", "--dtype", "float32", "--config", str(config)) as started:
        yield started


def plan_of(server: Server, *options: str) -> dict[str, Any]:
    done = cli(server, "rebalance", "--json", *options)
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def skewed(record: bytes) -> bytes:
    """Give nearly all of each replicated expert's tokens to its first replica."""
    level = Placement.from_bytes(record)
    counts = {key: len(level.replicas(key)) for shard in level.shards for key in shard.experts}
    weights = {key: (EVEN_WEIGHT, *[1] * (count - 1)) for key, count in counts.items() if count > 1}
    return replace(level, weights=weights).to_bytes()


def weights_of(server: Server, tmp_path: Path) -> Mapping[ExpertKey, tuple[int, ...]]:
    file = tmp_path / "now"
    assert cli(server, "placement", "save", str(file)).returncode == 0
    return Placement.from_bytes(file.read_bytes()).weights


def test_hot_experts_are_replicated_and_the_way_back_is_open(server: Server, tmp_path: Path) -> None:
    streams = Streams(server)
    expected = {number: streams.generate(number) for number in range(NUM_STREAMS)}
    file = tmp_path / "placement"
    assert cli(server, "placement", "save", str(file)).returncode == 0
    with streams.running():
        time.sleep(3)
        dry = plan_of(server, "--dry-run")
        before = server.status()
        assert dry["moves"]
        assert dry["balancedness_after"] > dry["balancedness_before"]
        assert dry["is_worthwhile"], dry
        assert sum(s.num_slots for s in before.shards) == 64, "a dry run moves nothing"

        assert plan_of(server, "--wait")["phase"] == "DONE"
        after = server.status()
        assert after.epoch > before.epoch
        assert sum(s.num_slots for s in after.shards) > 64
        assert after.balancedness > before.balancedness

        assert sum(s.experts_copied for s in after.shards) >= sum(s.num_slots for s in after.shards) - 64
        assert sum(s.experts_read for s in after.shards) == 64, "read when the server started, and not again"

        assert cli(server, "placement", "save", str(tmp_path / "level")).returncode == 0
        (tmp_path / "skewed").write_bytes(skewed((tmp_path / "level").read_bytes()))
        assert cli(server, "placement", "load", str(tmp_path / "skewed"), "--wait").returncode == 0
        deadline_s = time.monotonic() + 120
        # They follow the load of the last seconds, at times before the command above has returned.
        while weights_of(server, tmp_path) == Placement.from_bytes((tmp_path / "skewed").read_bytes()).weights:
            assert time.monotonic() < deadline_s, "the weights never changed"

        assert cli(server, "placement", "load", str(file), "--wait").returncode == 0
        assert [s.num_slots for s in server.status().shards] == [16, 16, 16, 16]
    assert not streams.errors
    for number, outputs in streams.outputs.items():
        assert outputs
        assert all(output == expected[number] for output in outputs)


def test_a_placement_of_another_model_or_a_damaged_one_is_refused(server: Server, tmp_path: Path) -> None:
    before = server.status().epoch
    other = initial_placement((0, 1), 8, [ShardId("shard-0")], 1)
    strange = initial_placement((0, 1, 2, 3), 16, [ShardId("shard-77")], 1)
    whole = initial_placement((0, 1, 2, 3), 16, [ShardId("shard-0")], 1).to_bytes()
    for record, message in (
        (other.to_bytes(), "of a model with 8 experts"),
        (strange.to_bytes(), "names unknown shards: shard-77"),
        (whole[:-3], "damaged placement record"),
        (b"nothing of the kind", "not a placement record"),
    ):
        file = tmp_path / "placement"
        file.write_bytes(record)
        refused = cli(server, "placement", "load", str(file))
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert server.status().epoch == before
