"""What an operator asked for, as a record that outlives the controller: who joins, who leaves, how far it is.

PREPARE starts processes, COMMIT moves experts and publishes, DRAIN ends what left. Up to COMMIT it can go back to
ROLLED_BACK, which leaves everything as it was; from DRAIN on it only goes forward.
"""

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import msgpack

from expertmesh.cluster.errors import StateError

_VERSION = 2


class Phase(StrEnum):
    """How far an operation is."""

    PREPARE = "PREPARE"
    COMMIT = "COMMIT"
    DRAIN = "DRAIN"
    DONE = "DONE"
    ROLLED_BACK = "ROLLED_BACK"


_NEXT = {
    Phase.PREPARE: (Phase.COMMIT, Phase.ROLLED_BACK),
    Phase.COMMIT: (Phase.DRAIN, Phase.ROLLED_BACK),
    Phase.DRAIN: (Phase.DONE,),
    Phase.DONE: (),
    Phase.ROLLED_BACK: (),
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation. request is what was asked, in words that say it again when it is asked twice.

    adding and removing are ids of shards and workers; target is the placement to go to, as `Placement.to_bytes` packs
    it, where one was asked for and until it is in force. Times are seconds since the epoch; ended_s is 0 until it
    ended; past deadline_s it rolls back, if it still can. node is the one that a member is moved off because it is to
    end: then adding is its successor.
    """

    id: str
    request: str
    adding: tuple[str, ...]
    removing: tuple[str, ...]
    phase: Phase
    progress: str
    error: str
    started_s: float
    ended_s: float
    deadline_s: float
    target: bytes = b""
    node: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens."""
        return self.phase in (Phase.DONE, Phase.ROLLED_BACK)

    def advanced(self, phase: Phase, progress: str, *, now_s: float, error: str = "") -> "Operation":
        """Return it in the next phase.

        Args:
            phase: one that may follow.
            progress: what happens now, in words.
            now_s: seconds since the epoch.
            error: why it goes back.
        """
        assert phase in _NEXT[self.phase], f"operation {self.id} cannot go from {self.phase} to {phase}"
        ended_s = now_s if not _NEXT[phase] else 0.0
        target = self.target if phase is Phase.COMMIT else b""
        return replace(self, phase=phase, progress=progress, error=error, ended_s=ended_s, target=target)

    def facts(self) -> dict[str, Any]:
        """Return what is to be shown of it, by name."""
        return {name: value for name, value in asdict(self).items() if name not in ("target", "node")}

    def to_bytes(self) -> bytes:
        """Pack it into a versioned record."""
        record: bytes = msgpack.packb([_VERSION, asdict(self)])
        return record

    @classmethod
    def from_bytes(cls, record: bytes) -> "Operation":
        """Unpack what `to_bytes` packed.

        Raises:
            StateError: the record is damaged or of another version.
        """
        try:
            version, fields = msgpack.unpackb(record)
            if version != _VERSION:
                raise StateError(f"an operation's record of version {version}; this release reads {_VERSION}")
            return cls(**_typed(fields))
        except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
            raise StateError(f"a damaged operation's record: {error}") from error


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields,
        "phase": Phase(fields["phase"]),
        "adding": tuple(fields["adding"]),
        "removing": tuple(fields["removing"]),
    }
