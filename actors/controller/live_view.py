"""What the live page is told of the fleet: one answer with all that is new, and what happened lately.

Shape suffixes: L MoE layers, E experts (or slices of experts, where these are cut).
"""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.recent_events import RecentEvents
from expertmesh.cluster.events import EventKind, MemberWatch
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.load_following import shard_facts
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import ShardSlots
from expertmesh.cluster.placement_lists import placement_fields

MAX_OPERATIONS = 20


class LiveView:
    """Hears of what happens in a fleet, asks nobody. Any thread may call; `look` is the keeper's thread's."""

    def __init__(
        self,
        model: ModelInfo,
        keeper: Keeper,
        collector: LoadCollector,
        operator: Operator,
        *,
        spare_slots: float,
        events: RecentEvents | None = None,
    ) -> None:
        """Hear of nothing yet.

        Args:
            model: what is served.
            keeper: of the fleet.
            collector: of its loads.
            operator: of its operations.
            spare_slots: see ServeSettings.
            events: the log to keep; None: a new one.
        """
        self._model, self._keeper, self._collector, self._operator = model, keeper, collector, operator
        self._spare_slots = spare_slots
        self._events = events or RecentEvents()
        self._members = MemberWatch()
        self._placed: tuple[ShardSlots, ...] = ()

    def note(self, line: str) -> None:
        """Hear what the controller says of its own steps."""
        self._events.add(EventKind.MEMBER, line)

    def look(self) -> None:
        """See how the members are, after they were asked."""
        keeper = self._keeper
        facts = (*keeper.shards.in_order(), *keeper.workers.in_order())
        states = {str(each["id"]): str(each["state"]) for each in facts}
        members = {*map(str, keeper.shard_ids), *map(str, keeper.worker_ids)}
        for kind, text in self._members.look(time.monotonic(), states, members):
            self._events.add(kind, text)

    def lost_link(self, worker: WorkerId, shard: ShardId) -> None:
        """Hear from a worker that its link to a shard broke."""
        self._events.add(EventKind.LINK, f"{worker} lost its link to {shard}; its tokens go to other replicas")

    def moved(self, duration_s: float, why: str) -> None:
        """Hear that another placement is in force."""
        placement = self._keeper.placement
        assert placement is not None, "a move to no placement"
        reason = f": {why}" if why else ""
        kind = EventKind.WEIGHTS if placement.shards == self._placed else EventKind.PLACEMENT
        self._placed = placement.shards
        self._events.add(kind, f"epoch {placement.epoch} in force after {duration_s:.2f} s{reason}")

    def operation(self, operation: Operation) -> None:
        """Hear that an operation began, went on or ended."""
        self._events.add(_kind(operation), _words(operation))

    def remember(self) -> None:
        """Take in the operations of a former life."""
        for operation in self._operator.all():
            if operation.is_over:
                self._events.add(_kind(operation), _words(operation), operation.ended_s)
            else:
                self._events.add(EventKind.OPERATION, _words(operation), operation.started_s)

    def view(self, status: Mapping[str, Any], epoch: int, after: int, life: int) -> dict[str, Any]:
        """Return what the page shows.

        Args:
            status: see Controller.status.
            epoch: of the placement that the asker has; 0: none.
            after: number of the last event that the asker has.
            life: of the answer that these come from; another life's numbers mean nothing here.

        Returns:
            life: of this process. status: as given. slots: experts that each shard has room for.
            load_LE: int64 [L, whole experts], tokens routed since the workers began, of those that are there.
            computed_tokens, decoded_tokens: put through the model since then; the second generated ones alone.
            placement: see placement_lists.placement_fields; None if the asker has it.
            operations: the latest, as facts, the newest last.
            events: those that the asker does not have.
        """
        placement = self._keeper.placement
        has_it = placement is None or (life == os.getpid() and epoch == placement.epoch)
        load_LE, decode_LE = (self._counted(kind) for kind in ("load_LE", "decode_LE"))
        return {
            "life": os.getpid(),
            "status": dict(status),
            "slots": self._slots(),
            "load_LE": load_LE,
            "computed_tokens": int(load_LE[0].sum()) // self._model.top_k,
            "decoded_tokens": int(decode_LE[0].sum()) // self._model.top_k,
            "placement": None if has_it or placement is None else placement_fields(placement),
            "operations": [operation.facts() for operation in self._operator.all()[-MAX_OPERATIONS:]],
            "events": [tuple(event) for event in self._events.after(after if life == os.getpid() else 0)],
        }

    def _counted(self, kind: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        none_LE = np.zeros((len(self._model.moe_layers), self._model.num_slices), dtype=np.int64)
        # Every slice of an expert computes for the same tokens.
        return sum((counters[kind] for counters in self._collector.latest()), none_LE)[:, :: self._model.expert_tp]

    def _slots(self) -> dict[str, int]:
        keeper = self._keeper
        if keeper.placement is None or not keeper.shard_ids:
            return {}
        shards = list(keeper.shard_ids)
        nodes = {shard: keeper.shards.nodes.get(shard, "") for shard in shards}
        facts = shard_facts(keeper.placement, shards, nodes, replicas=keeper.replicas, spare_slots=self._spare_slots)
        return {str(fact.shard): fact.num_slots for fact in facts}


def _kind(operation: Operation) -> EventKind:
    return EventKind.FAULT if operation.phase is Phase.ROLLED_BACK else EventKind.OPERATION


def _words(operation: Operation) -> str:
    said = operation.error or operation.progress
    return f"{operation.id}, {operation.request}: {operation.phase}" + (f", {said}" if said else "")
