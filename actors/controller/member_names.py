"""The names of members: whose tier one is, and new ones."""

from collections.abc import Collection
from itertools import count, islice
from typing import Any

from expertmesh.cluster.ids import ShardId, WorkerId


def is_worker(member: str) -> bool:
    """Say whether it is a worker's name, and no shard's."""
    return member.startswith("worker-")


def typed(member: str) -> Any:
    """Return a name as the id of its tier."""
    return WorkerId(member) if is_worker(member) else ShardId(member)


def new_names(prefix: str, taken: Collection[str], number: int) -> list[str]:
    """Return so many names that are not taken, the smallest numbers first; none for a negative number."""
    free = (name for name in (f"{prefix}{index}" for index in count()) if name not in taken)
    return list(islice(free, max(0, number)))
