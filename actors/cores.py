"""Cores of this machine for a computing process of a CPU shard.

A shard that sleeps until a packet comes must start at once when it does. Left alone, the kernel wakes it on the core of
the worker that sent the packet, where it takes the place of that worker, who still has packets for other shards to send
(docs/performance.md has what each half of this is worth).
"""

import os
import shlex
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil

_T = TypeVar("_T")
_STEPPED_BACK = 10


@dataclass(frozen=True)
class ClaimedCores:
    """Cores that no other claim on this machine holds, as long as this object lives."""

    cores: tuple[int, ...]
    _locks: tuple[socket.socket, ...]

    def release(self) -> None:
        """Let other processes claim the cores."""
        for lock in self._locks:
            lock.close()


def claim_cores(count: int, realm: str = "expertmesh") -> ClaimedCores | None:
    """Claim cores that this process may use; None when fewer than count are unclaimed.

    A claim is an abstract Unix socket's name: the kernel grants it to one process and takes it back when that dies.
    Claims of another realm are not seen.
    """
    locks: dict[int, socket.socket] = {}
    for core in sorted(os.sched_getaffinity(0)):
        if len(locks) == count:
            break
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0{realm}-core-{core}")
        except OSError:
            lock.close()  # another process has it
            continue
        locks[core] = lock
    claimed = ClaimedCores(tuple(locks), tuple(locks.values()))
    if len(locks) == count:
        return claimed
    claimed.release()
    return None


def other_cores(claimed: ClaimedCores) -> int:
    """Return how many cores this process may use beside those that it claimed."""
    return len(os.sched_getaffinity(0) - set(claimed.cores))


def use_cores(claimed: ClaimedCores | None) -> None:
    """Keep the threads that the calling thread starts from now on, and itself, on these cores; None: on any.

    They never take a core from a running thread by waking up (SCHED_BATCH): their work is long, the worker's is short.
    """
    if claimed is not None:
        os.sched_setaffinity(0, claimed.cores)
    with suppress(PermissionError):  # a container may forbid it; it costs speed alone
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def give_way() -> None:
    """Have the calling thread, and those it starts, run only where no other wants the core. It stays so."""
    with suppress(PermissionError):  # as above
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def can_resume() -> bool:
    """Return whether a thread of this process that gave way may take part again: not every container allows it."""

    def give_way_and_resume() -> bool:
        give_way()
        try:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        except PermissionError:
            return False
        return True

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(give_way_and_resume).result()


def resume(pid: int) -> None:
    """Have all threads of a process take part again. A thread, or a process, that ends meanwhile needs nothing."""
    with suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def resume_tree(pid: int) -> None:
    """Have a process and its children, and theirs, take part again."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            resume(one.pid)


def in_background(call: Callable[[], _T]) -> _T:
    """Run a call on a thread of its own that gives way to all others; return what it returns, raise what it raises."""
    with ThreadPoolExecutor(1, "background", initializer=give_way) as pool:
        return pool.submit(call).result()


def yield_soon() -> None:
    """Have this process's threads hand on the interpreter after 0.5 ms, not 5 ms: a step takes a few milliseconds.

    With it the 99th percentile of the gaps between tokens is 1.12 to 1.22 times as long while experts move, without
    1.19 to 1.26 times (`expertmesh chaos`, 2 cores).
    """
    sys.setswitchinterval(0.0005)


def step_back(pid: int = 0) -> None:
    """Have a process, by default this one, give its cores to those that compute where both want them (niceness 10).

    Each wake-up of a process that does little interrupts one that streams weights through the same core's caches.
    """
    process = pid or os.getpid()
    with suppress(FileNotFoundError):  # it has ended
        for thread in map(int, os.listdir(f"/proc/{process}/task")):
            with suppress(ProcessLookupError):
                if os.getpriority(os.PRIO_PROCESS, thread) < _STEPPED_BACK:  # further back it stays
                    os.setpriority(os.PRIO_PROCESS, thread, _STEPPED_BACK)


def python_that_gives_way(limit_s: float = 20.0) -> str:
    """Return the shell's words for a Python that gives way to all others until `take_part`, where that is possible.

    What is started beside running requests spends seconds on imports that nobody waits for.

    Args:
        limit_s: after it the process takes part. Starting takes 3 to 10 s of one core; a machine without any to spare
            gives it then.
    """
    python = shlex.quote(sys.executable)
    return f"{python} -m expertmesh.actors.giving_way {limit_s}" if can_resume() else python
