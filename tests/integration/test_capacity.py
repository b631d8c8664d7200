"""A served model with a capacity factor drops, counts, and shows what it dropped; without one nothing is dropped."""

import json
import subprocess
from pathlib import Path
from typing import Any

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET, Server, serving


def _generate(server: Server) -> list[int]:
    """Run a prompt long enough that some expert is chosen by more than half of an even share."""
    request = GenerateRequest(token_ids=TokenIds(ids=list(range(5, 85))), max_tokens=8, ignore_eos=True)
    with server.channel() as channel:
        return [t for r in InferenceStub(channel).Generate(request, timeout=60) for t in r.token_ids]


def _status(server: Server, *options: str) -> str:
    command = [*CLI, "status", "--url", server.address, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_tight_factor_drops_and_the_drops_are_counted_and_shown(tmp_path: Path) -> None:
    options = ("--shards", "2", "--workers", "1", "--dtype", "float32", "--capacity-factor", "0.5")
    with serving(POCKET, tmp_path, *options) as server:
        assert len(_generate(server)) == 8
        state: dict[str, Any] = json.loads(_status(server, "--json"))
        shown = " ".join(_status(server).split())
    dropped = {row["layer"]: row["pairs"] for row in state["drops"]}
    assert state["capacity_factor"] == 0.5
    assert list(dropped) == state["model"]["moe_layers"]
    assert {len(pairs) for pairs in dropped.values()} == {state["model"]["num_experts"]}
    assert all(sum(pairs) > 0 for pairs in dropped.values())
    assert state["dropped_pairs"] == sum(map(sum, dropped.values()))
    assert f"{state['dropped_pairs']} pairs of a token and an expert, beyond a capacity factor of 0.5" in shown


def test_without_a_factor_nothing_is_dropped(pocket: Server) -> None:
    assert len(_generate(pocket)) == 8
    state = json.loads(_status(pocket, "--json"))
    assert (state["capacity_factor"], state["dropped_pairs"], state["drops"]) == (None, 0, [])
    assert [worker["dropped_pairs"] for worker in state["workers"]] == [0, 0]
    assert "capacity" not in _status(pocket)
