"""A container's share of its machine: made-up trees of control groups, of both versions."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from expertmesh.actors import machine_share
from expertmesh.actors.machine_share import has_cores_of_its_own, num_usable_cores, usable_memory

GIB = 2**30
MACHINE = SimpleNamespace(total=64 * GIB, available=40 * GIB)
POD = "kubepods.slice/kubepods-burstable.slice/pod1"


@pytest.fixture(autouse=True)
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: MACHINE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def tree(root: Path, groups: str, files: Mapping[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_without_groups_it_is_the_whole_machine(tmp_path: Path) -> None:
    assert num_usable_cores(tmp_path) == 16
    assert has_cores_of_its_own(tmp_path)
    assert usable_memory(tmp_path) == machine_share.MemoryShare(64 * GIB, 40 * GIB)


def test_groups_without_limits_are_the_whole_machine(tmp_path: Path) -> None:
    version_1 = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    version_1 |= {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"}
    version_2 = {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "5\n"}
    root = tree(tmp_path, "4:memory:/\n1:cpu,cpuacct:/\n0::/\n", version_1 | version_2)
    assert (num_usable_cores(root), has_cores_of_its_own(root)) == (16, True)
    assert usable_memory(root).available_bytes == 40 * GIB


@pytest.mark.parametrize("is_namespaced", [True, False])
def test_version_2_limits_a_pod(tmp_path: Path, is_namespaced: bool) -> None:
    """In a pod its own group is the root of what is mounted; the host's agent sees it below its parents."""
    prefix = "" if is_namespaced else f"{POD}/"
    files = {
        f"{prefix}cpu.max": "450000 100000\n",
        f"{prefix}memory.max": f"{8 * GIB}\n",
        f"{prefix}memory.current": f"{3 * GIB}\n",
        f"{prefix}memory.stat": f"anon 7\nactive_file 9\ninactive_file {GIB}\n",
    }
    root = tree(tmp_path, f"0::/{prefix}\n", files)
    assert (num_usable_cores(root), has_cores_of_its_own(root)) == (4, False)
    assert usable_memory(root) == machine_share.MemoryShare(8 * GIB, 6 * GIB)


def test_version_1_limits_a_pod_whose_path_is_not_mounted(tmp_path: Path) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "50000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{GIB}\n",
        "memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        "memory/memory.stat": "cache 1\ninactive_file 1\ntotal_inactive_file 4096\n",
    }
    root = tree(tmp_path, f"9:cpu,cpuacct:/{POD}\n8:memory:/{POD}\n", files)
    assert num_usable_cores(root) == 1, "half a core is none less than one"
    assert not has_cores_of_its_own(root)
    assert usable_memory(root) == machine_share.MemoryShare(GIB, 0)


def test_the_tightest_of_all_groups_holds(tmp_path: Path) -> None:
    files = {
        f"{POD}/cpu.max": "max 100000\n",
        "kubepods.slice/cpu.max": "600000 100000\n",
        f"{POD}/memory.max": f"{32 * GIB}\n",
        f"{POD}/memory.current": f"{GIB}\n",
        "kubepods.slice/memory.max": f"{48 * GIB}\n",
        "kubepods.slice/memory.current": f"{47 * GIB}\n",
    }
    root = tree(tmp_path, f"0::/{POD}\n", files)
    assert num_usable_cores(root) == 6
    assert usable_memory(root) == machine_share.MemoryShare(32 * GIB, GIB)


def test_this_machine_is_read_without_complaint() -> None:
    share = usable_memory()
    assert 0 <= share.available_bytes <= share.total_bytes
    assert num_usable_cores() >= 1
