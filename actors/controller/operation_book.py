"""The operations of a deployment, kept in the store as far as it is there, and told to who wants to hear of them."""

import threading
import time
from collections.abc import Callable

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.state import StateStore
from expertmesh.cluster.errors import InputError, StateError, UnavailableError
from expertmesh.cluster.operations import Operation

_log = EventLog(__name__)


class OperationBook:
    """All operations by id, in the order in which they began. Any thread may call."""

    def __init__(self, store: StateStore) -> None:
        """Make an empty book that is kept in a store."""
        self._store = store
        self._operations: dict[str, Operation] = {}
        self._writing = threading.Lock()
        # Told of each operation that begins, goes on or ends.
        self.on_noted: Callable[[Operation], None] = lambda _: None

    def load(self) -> None:
        """Read the operations of a former life. Without a store there are none."""
        try:
            kept = self._store.load_operations()
        except (StateError, UnavailableError) as error:
            _log.tell("record_lost", what="the operations", reason=reason_of(error))
            return
        self._operations = {operation.id: operation for operation in reversed(kept)}

    def get(self, operation_id: str) -> Operation:
        """Return one operation.

        Raises:
            InputError: there is none of that id.
        """
        if operation_id not in self._operations:
            raise InputError(f"there is no operation {operation_id!r}")
        return self._operations[operation_id]

    def all(self) -> list[Operation]:
        """Return all operations, the newest last."""
        return list(self._operations.values())

    @property
    def names_in_use(self) -> frozenset[str]:
        """Members that an operation which is not over brings or takes away: nobody else may be called so."""
        return frozenset(name for o in self.all() if not o.is_over for name in (*o.adding, *o.removing))

    def note(self, operation: Operation) -> None:
        """Keep an operation as it is now. Without a store it goes on in memory."""
        with self._writing:
            self._operations = {**self._operations, operation.id: operation}
            self.on_noted(operation)
            _log.tell(
                "operation_phase",
                operation=operation.id,
                request=operation.request,
                phase=operation.phase,
                progress=operation.progress,
                reason=operation.error,
                duration_s=time.time() - operation.started_s,
            )
            try:
                self._store.save_operation(operation)
            except UnavailableError as error:
                _log.tell("record_unsaved", what=operation.id, reason=reason_of(error))
