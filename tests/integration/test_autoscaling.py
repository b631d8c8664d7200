"""The load decides how many shards and workers there are, and no stream notices."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.integration.test_scale import Streams, cli

pytestmark = pytest.mark.timeout(240)  # two servers are started, one after the other
COUNT = 8
# Under any load shards are busier, and a worker's pages fuller, than these targets; without load they are not.
SETTINGS = """
rebalance_period_s = 0
kv_tokens = 2048
[autoscale]
period_s = 0.5
[autoscale.shards]
target_utilisation = 0.02
up_delay_s = 1
down_delay_s = 3
cooldown_s = 2
[autoscale.workers]
target_utilisation = 0.1
up_delay_s = 1
down_delay_s = 3
cooldown_s = 2
"""
BOUNDS = ("--autoscale", "--max-shards", "2", "--max-workers", "2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """What a server gives that never changes."""
    with serving(POCKET, tmp_path_factory.mktemp("still"), "--shards", "1", "--dtype", "float32") as still:
        streams = Streams(still)
        with ThreadPoolExecutor(COUNT) as pool:
            return dict(enumerate(pool.map(streams.generate, range(COUNT))))


@pytest.fixture(scope="module")
def server(expected: dict[int, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home: Path = tmp_path_factory.mktemp("autoscaling")
    config = home / "serve.toml"
    config.write_text(SETTINGS)
    with serving(POCKET, home, "--shards", "1", "--dtype", "float32", *BOUNDS, "--config", str(config)) as started:
        yield started


def wait_for(server: Server, what: Callable[[StatusResponse], bool], timeout_s: float = 120) -> StatusResponse:
    deadline_s = time.monotonic() + timeout_s
    while not what(status := server.status()):
        assert time.monotonic() < deadline_s, f"{status}\n{server.log.read_text()}"
        time.sleep(0.3)
    return status


def ready(status: StatusResponse) -> tuple[int, int]:
    return tuple(sum(m.state == "ready" for m in tier) for tier in (status.shards, status.workers))  # type: ignore[return-value]


def test_load_brings_members_and_calm_takes_them_again(server: Server, expected: dict[int, list[int]]) -> None:
    streams = Streams(server, COUNT)
    with streams.running():
        busy = wait_for(server, lambda status: ready(status) == (2, 2))
        assert (busy.autoscaler.shards, busy.autoscaler.workers) == (2, 2)
        assert busy.autoscaler.age_s < 30
        assert [reason.split()[0] for reason in busy.autoscaler.reasons] == ["shards", "workers"]
        time.sleep(3)  # under the new members
    calm = wait_for(server, lambda status: ready(status) == (1, 1) and len(status.shards) == len(status.workers) == 1)
    assert (calm.autoscaler.shards, calm.autoscaler.workers) == (1, 1)
    assert not calm.autoscaler.problem
    assert calm.ready
    assert not calm.warnings
    assert not streams.errors
    for number, outputs in streams.outputs.items():
        assert outputs
        assert all(output == expected[number] for output in outputs)
    operations = json.loads(cli(server, "ops", "--json").stdout)
    assert {operation["phase"] for operation in operations} == {"DONE"}


def test_status_prints_the_decision(server: Server) -> None:
    # The decision printed may be the last one made while the second shard was being taken away.
    wait_for(server, lambda status: "shards stay 1: 1 are busy" in status.autoscaler.reasons[0])
    printed = " ".join(cli(server, "status").stdout.split())
    assert "1 shards and 1 workers wanted" in printed
    assert re.search(r"shards stay 1: 1 are busy for 0\.\d", printed), printed


def test_what_is_out_of_bounds_is_refused_and_what_is_within_is_done(server: Server) -> None:
    refused = cli(server, "scale", "--workers", "3")
    assert refused.returncode == 2
    assert "cannot scale to 3 workers; the autoscaler keeps 1 to 2" in refused.stderr
    done = cli(server, "scale", "--workers", "2", "--wait")
    assert done.returncode == 0, done.stderr
    wait_for(server, lambda status: len(status.workers) == 1)  # there is no load for the second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--autoscale", "--max-workers", "2"), "--max-shards: Field required"),
        (("--autoscale", "--max-shards", "0", "--max-workers", "2"), "--max-shards: Input should be greater than"),
        (("--autoscale", "--max-shards", "1", "--max-workers", "2"), "shards=2 is above the most"),
        (("--max-shards", "4"), "--max-shards is for --autoscale"),
    ],
)
def test_bounds_that_cannot_be_are_one_line(options: tuple[str, ...], message: str) -> None:
    refused = subprocess.run(
        [*CLI, "serve", str(POCKET), *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
