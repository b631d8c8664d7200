"""`expertmesh plan --kubernetes`: groups with room for the plan's members, as a patch of the manifests."""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.actors.cli import main
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.memory import GpuMemory
from expertmesh.cluster.planner.worker_groups import POD_BYTES, PROCESS_BYTES, worker_groups
from expertmesh.cluster.serving_plan import ServingPlan

RAYSERVICE = Path(__file__).resolve().parents[2] / "k8s" / "base" / "rayservice.yaml"
GIB = 1 << 30
MEMORY = GpuMemory(
    attention_weight_bytes=2 * GIB, table_bytes=GIB, expert_weight_bytes=10 * GIB, kv_bytes=9 * GIB, buffer_bytes=GIB
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "plan", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


@given(shards=st.integers(1, 500), workers=st.integers(1, 500), gpus_per_pod=st.integers(1, 16))
def test_groups_have_room_for_all_and_no_pod_too_many(shards: int, workers: int, gpus_per_pod: int) -> None:
    for group, members in zip(
        worker_groups(ServingPlan(shards=shards, workers=workers), MEMORY, gpus_per_pod), (workers, shards), strict=True
    ):
        assert group.members == members
        assert group.gpus <= gpus_per_pod
        assert (group.pods - 1) * group.gpus < members <= group.pods * group.gpus


def test_the_worked_example() -> None:
    """Ten shards of 10 GiB, two workers of 3 GiB, hosts of four GPUs."""
    attention, experts = worker_groups(ServingPlan(shards=10, workers=2), MEMORY, 4)
    assert (attention.tier, attention.pods, attention.gpus) == ("attention", 1, 2)
    assert (experts.tier, experts.pods, experts.gpus) == ("experts", 3, 4)
    assert attention.memory_bytes == POD_BYTES + 2 * (PROCESS_BYTES + 3 * GIB)
    assert experts.memory_bytes == POD_BYTES + 4 * (PROCESS_BYTES + 10 * GIB)


def test_no_pod_without_gpus() -> None:
    with pytest.raises(InputError, match="gpus-per-pod is 0"):
        worker_groups(ServingPlan(shards=1, workers=1), MEMORY, 0)


def value_at(document: Any, path: str) -> Any:
    for step in path.strip("/").split("/"):
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document


def test_the_patch_fits_the_manifests_and_the_settings_the_plan(run: Run) -> None:
    code, out, err = run(
        "mixtral-8x7b", "--hardware", "hgx-h100", "--gpus", "16", "--kubernetes", "--gpus-per-pod", "4"
    )
    assert (code, err) == (0, "")
    (service,) = yaml.safe_load_all(RAYSERVICE.read_text())
    sizes: dict[tuple[str, str], Any] = {}
    for operation in yaml.safe_load(out):
        assert operation["op"] == "replace"
        value_at(service, operation["path"])  # a path that is not there is refused by kustomize
        index, _, field = operation["path"].removeprefix("/spec/rayClusterConfig/workerGroupSpecs/").partition("/")
        sizes[service["spec"]["rayClusterConfig"]["workerGroupSpecs"][int(index)]["groupName"], field] = operation[
            "value"
        ]
    settings = tomllib.loads("\n".join(line.removeprefix("#") for line in out.splitlines() if " = " in line))
    assert settings["replicas"] == 1
    for group, members in (("attention", settings["workers"]), ("experts", settings["shards"])):
        resources = sizes[group, "template/spec/containers/0/resources"]
        assert resources["requests"] == resources["limits"]
        assert sizes[group, "replicas"] * int(resources["limits"]["nvidia.com/gpu"]) == members
        assert sizes[group, "minReplicas"] == sizes[group, "replicas"] == sizes[group, "maxReplicas"]
    assert "faster, and not served" in out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--kubernetes", "--json"), 2, "give one"),
        (("--kubernetes", "--gpus-per-pod", "0"), 2, "gpus-per-pod is 0"),
        (("--kubernetes", "--gpus", "1"), 1, "no plan fits"),
    ],
)
def test_what_cannot_be_printed_is_said_in_a_line(run: Run, options: tuple[str, ...], code: int, message: str) -> None:
    got, out, err = run("deepseek-v3", "--hardware", "hgx-h100", "--gpus", "64", "--dtype", "fp8", *options)
    assert got == code
    assert not out
    assert message in err
    assert err.count("\n") == 1
