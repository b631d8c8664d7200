"""What the autoscaler is told of the fleet, from what shards and workers say of themselves."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from expertmesh.actors.controller.queues import Backlog
from expertmesh.cluster.autoscaler import ShardInputs, WorkerInputs
from expertmesh.cluster.counters import CLOCK, Growth
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId

Id = TypeVar("Id", ShardId, WorkerId)
Facts = Mapping[str, Any]
NO_BACKLOG = Backlog()
# What a member said last, and by how much its counters grew since the look before.
News = Sequence[tuple[Facts, dict[str, float]]]


class Measuring:
    """Looks at a fleet now and then. Members that are not ready, or said nothing new, are not counted."""

    def __init__(self) -> None:
        self._shard_growth, self._worker_growth = Growth(), Growth()
        self._tokens_per_s = 0.0

    def look(
        self,
        shards: Mapping[ShardId, Facts],
        workers: Mapping[WorkerId, Facts],
        *,
        needed_bytes: int,
        backlog: Backlog = NO_BACKLOG,
    ) -> tuple[ShardInputs, WorkerInputs]:
        """Return what is known of the time since the last look.

        Args:
            shards: what `ShardActor.describe` answered last, by id.
            workers: what `WorkerActor.describe` answered last, by id.
            needed_bytes: of all experts with their fewest replicas.
            backlog: what waits at the gateways.

        Raises:
            UnavailableError: no shard, or no worker, said anything new; the first look, for one.
        """
        shard_news, worker_news = _news(self._shard_growth, shards), _news(self._worker_growth, workers)
        for tier, news in (("shard", shard_news), ("worker", worker_news)):
            if not news:
                raise UnavailableError(f"no {tier} said anything new")
        busy = [min(1.0, grown["busy_s"] / grown[CLOCK]) for _, grown in shard_news]
        waiting = [min(1.0, grown["expert_s"] / grown[CLOCK]) for _, grown in worker_news]
        num_packets = sum(grown["num_packets"] for _, grown in shard_news)
        shard_inputs = ShardInputs(
            current=len(busy),
            busiest_utilisation=max(busy),
            # A sum of equal numbers may round to more than them all.
            mean_utilisation=min(max(busy), sum(busy) / len(busy)),
            worker_wait_fraction=sum(waiting) / len(waiting),
            queue_s=sum(grown["queue_s"] for _, grown in shard_news) / max(1.0, num_packets),
            needed_bytes=needed_bytes,
            shard_bytes=max(1, _room_bytes([facts for facts, _ in shard_news])),
        )
        return shard_inputs, self._worker_inputs(worker_news, backlog)

    def _worker_inputs(self, news: News, backlog: Backlog) -> WorkerInputs:
        busy_s = sum(grown["busy_s"] for _, grown in news)
        if busy_s > 0:
            # Of the time in steps alone: what a worker makes while it has something to do.
            self._tokens_per_s = sum(grown["num_tokens"] for _, grown in news) / busy_s
        num_pages = sum(facts["num_pages"] for facts, _ in news)
        return WorkerInputs(
            current=len(news),
            outstanding_tokens=sum(facts["outstanding_tokens"] for facts, _ in news) + backlog.num_tokens,
            tokens_per_s=self._tokens_per_s,
            # A model that keeps its own cache has no pages to run out of.
            free_page_fraction=sum(facts["free_pages"] for facts, _ in news) / num_pages if num_pages else 1.0,
            num_waiting=sum(facts["waiting"] for facts, _ in news) + backlog.num_sequences,
        )


def _news(growth: Growth, members: Mapping[Id, Facts]) -> News:
    # The process id tells two lives of a member apart.
    ready = {f"{member}@{facts['pid']}": facts for member, facts in members.items() if facts["state"] == "ready"}
    grown = growth.look({life: facts["counters"] for life, facts in ready.items()})
    return [(ready[life], grown[life]) for life in grown]


def _room_bytes(shards: Sequence[Facts]) -> int:
    """Return what experts may take on the shard with the least room; those of a node's memory, or a GPU's, share it."""
    places: defaultdict[Any, list[Facts]] = defaultdict(list)
    for facts in shards:
        places[facts["link_end"]].append(facts)
    return min(
        int(min(f["free_bytes"] for f in there) + sum(f["weight_bytes"] for f in there)) // len(there)
        for there in places.values()
    )
