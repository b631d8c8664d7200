"""What is kept of the fleet in the store: who is to be there, and the placement. Written again when the store lost it.

Without a store the fleet goes on from memory: nothing here raises because of it.
"""

import time
from collections.abc import Callable, Collection

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.state import StateStore
from expertmesh.cluster.errors import StateError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement

_log = EventLog(__name__)
# A store that was emptied gets its records back after at most this.
_CHECK_PERIOD_S = 5.0
Members = tuple[list[ShardId], list[WorkerId]]


class FleetRecords:
    """Members and placement in the store. One thread at a time."""

    def __init__(self, store: StateStore, model: ModelInfo) -> None:
        self._store = store
        self._model = model
        self._is_saved = False
        self._checked_s = 0.0
        # Brings the store back if it is ours to do so; says whether it had to.
        self.ensure_store: Callable[[], bool] = lambda: False

    def members(self) -> Members | None:
        """Return who is to be there; None when it is not known."""
        try:
            return self._store.load_members()
        except (StateError, UnavailableError) as error:
            _log.tell("record_unusable", what="members", reason=reason_of(error))
            return None

    def placement(self, shards: Collection[ShardId], newest_epoch: int) -> Placement | None:
        """Return the placement if it is of this model and these shards, and no older than what is in use."""
        stored = self._placement()
        if stored is None:
            return None
        fits = stored.layers == self._model.moe_layers and stored.num_experts == self._model.num_slices
        named = {slots.shard for slots in stored.shards}
        if fits and named <= set(shards) and stored.epoch >= newest_epoch:
            return stored
        there, in_use = ", ".join(sorted(named)), ", ".join(shards)
        reason = f"epoch {stored.epoch} on {there}, in use are epoch {newest_epoch} and {in_use}"
        _log.tell("record_unusable", what="placement", reason=reason)
        return None

    def save(self, placement: Placement, members: Members) -> None:
        """Keep them. Without a store, `keep` tries again."""
        try:
            self._store.save_placement(placement)
            self._store.save_members(*members)
            self._is_saved = True
        except UnavailableError as error:
            _log.tell("record_unsaved", what=f"the placement of epoch {placement.epoch}", reason=reason_of(error))
            self._is_saved = False

    def keep(self, placement: Placement, members: Members) -> None:
        """Save them if the store has lost them, or could not take them before. Call it now and then."""
        try:
            if self.ensure_store():
                _log.tell("redis_restarted")
                self._is_saved = False
        except UnavailableError as error:
            _log.tell("redis_gone", reason=reason_of(error))
        now_s = time.monotonic()
        if now_s > self._checked_s + _CHECK_PERIOD_S:
            self._checked_s = now_s
            stored = self._placement()
            self._is_saved = self._is_saved and stored is not None and stored.epoch == placement.epoch
        if not self._is_saved:
            self.save(placement, members)

    def _placement(self) -> Placement | None:
        try:
            return self._store.load_placement()
        except (StateError, UnavailableError) as error:
            _log.tell("record_unusable", what="placement", reason=reason_of(error))
            return None
