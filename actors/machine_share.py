"""What of this machine may this process use? In a container less than what the machine has: its control groups' limits.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; scheduler/sched-bwc.rst for version 1.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")
# Version 2 says "max" where there is no limit, version 1 -1 for cores, and for memory a number above any machine's.
_NO_LIMIT = ("max", "-1")


@dataclass(frozen=True)
class MemoryShare:
    """Bytes that this process may have, and those of them that are free or can be made free at once."""

    total_bytes: int
    available_bytes: int


def num_usable_cores(root: Path = _ROOT) -> int:
    """Return how many cores' time this process may use, at least 1: by affinity, and by the quota if that is less."""
    quota = _cores_of_quota(root)
    return _affinity() if quota is None else max(1, min(_affinity(), int(quota)))


def has_cores_of_its_own(root: Path = _ROOT) -> bool:
    """Return whether it has the cores of its affinity whole: with a quota below them others use them too."""
    quota = _cores_of_quota(root)
    return quota is None or quota >= _affinity()


def usable_memory(root: Path = _ROOT) -> MemoryShare:
    """Return the least of what the machine and the groups of this process leave it.

    The page cache of files that were not read lately counts as free, as in the machine's own figure.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, (limit_name, usage_name, inactive_name) in _memory_groups(root):
        limit = _number(folder / limit_name)
        if limit is None or limit >= machine.total:
            continue
        used = (_number(folder / usage_name) or 0) - _field(folder / "memory.stat", inactive_name)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return MemoryShare(total, available)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_of_quota(root: Path) -> float | None:
    quotas = []
    for folder in _groups(root, ""):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] not in _NO_LIMIT:
            quotas.append(int(words[0]) / int(words[1]))
    for folder in _groups(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    for folder in _groups(root, ""):
        yield folder, ("memory.max", "memory.current", "inactive_file")
    for folder in _groups(root, "memory"):
        yield folder, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups that hold it; controller "" is version 2.

    In a container its own group may be all that is mounted, and the path that the kernel names is then not there.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inner = Path(path.lstrip("/"))
            yield from (mount / part for part in (inner, *inner.parents) if (mount / part).is_dir())


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text and text not in _NO_LIMIT else None


def _field(file: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _read(file).splitlines() if line.split()[0] == name), 0)


def _read(file: Path) -> str:
    """Return what a file of the kernel says; nothing where this kernel has it not."""
    try:
        return file.read_text()
    except OSError:
        return ""
