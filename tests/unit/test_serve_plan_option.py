"""`serve --plan`: what it puts into the settings, and `auto` on machines that were measured so or so."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.actors.cli import plan_files
from expertmesh.actors.cli.serving_plan import with_plan
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import ServeSettings

POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket-moe"
# Two cores that read 20 GB/s each, joined by a link of 5 GB/s.
TIER: dict[str, Any] = {
    "name": "memory",
    "domain_size": 64,
    "bytes_per_s": 5e9,
    "latency_s": 1e-5,
    "source": "made up",
}
MACHINE: dict[str, Any] = {
    "name": "this-machine",
    "num_gpus": 4,
    "memory_bytes": 8e9,
    "memory_bytes_per_s": 2e10,
    "memory_efficiency": 1.0,
    "compute_efficiency": 1.0,
    "flop_per_s": {"bf16": 4e11},
    "row_tile": 1,
    "column_tile": 32,
    "tiers": [TIER],
}


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(**{"model": POCKET, "shards": 4, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def measured(**changes: Any) -> None:
    path = plan_files.measured_hardware()
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({**MACHINE, **changes}))


def planned(plan: str, **changes: Any) -> tuple[ServeSettings, list[str]]:
    said: list[str] = []
    return with_plan(settings(**changes), plan, said.append), said


@pytest.mark.parametrize(("plan", "expert_tp"), [("ep", 1), ("tpxep", 2), ("tp", 4)])
def test_kinds_change_the_slices_alone(plan: str, expert_tp: int) -> None:
    assert planned(plan, workers=3, replicas=2)[0] == settings(workers=3, replicas=2, expert_tp=expert_tp)


def test_a_file_brings_its_members(tmp_path: Path) -> None:
    plan = {"attention_tp": 1, "attention_dp": 2, "ep": 3, "expert_tp": 2, "pp": 1, "instances": 2}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found, said = planned(str(tmp_path / "plan.json"))
    assert found == settings(shards=12, workers=4, expert_tp=2, replicas=2)
    assert "ep=3, expert_tp=2, 2 replicas, attention_dp=4" in said[0]


@pytest.mark.parametrize(
    ("content", "complaint"), [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object, found list")]
)
def test_a_damaged_file_is_refused(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match=complaint):
        planned(str(tmp_path / "plan.json"))


def test_a_file_beyond_the_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"attention_dp": 1, "ep": 2000, "expert_tp": 1}))
    with pytest.raises(InputError, match="--shards: Input should be less than or equal to 1024, got 2000"):
        planned(str(tmp_path / "plan.json"))


def test_auto_needs_a_measured_machine() -> None:
    with pytest.raises(InputError, match="this machine was not measured; run `expertmesh doctor --measure` first"):
        planned("auto")


def test_auto_takes_whole_experts_where_links_are_slow() -> None:
    """Slices send each token to more shards: over slow links that is dear, and the prediction is said."""
    measured(tiers=[{**TIER, "bytes_per_s": 2e7}])
    found, said = planned("auto")
    assert found.expert_tp == 1
    assert "expert_tp=1; a step of 8 sequences is predicted to take" in said[0]
    assert "ms with expert_tp=4" in said[0]


def test_auto_takes_slices_where_they_are_faster_by_more_than_predictions_err(tmp_path: Path) -> None:
    """Reading experts takes nearly all of the step, and few whole ones of many fall unevenly on the shards."""
    sizes = {"num_local_experts": 64, "num_experts_per_tok": 1, "moe_intermediate_size": 4096, "vocab_size": 64}
    config = json.loads((POCKET / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    measured(tiers=[{**TIER, "bytes_per_s": 1e12, "latency_s": 0.0}])
    assert planned("auto", model=tmp_path)[0].expert_tp == 4
