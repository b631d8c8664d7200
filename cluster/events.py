"""What happens in a deployment that people want to be told of, and which changes of its members are that."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import NamedTuple

_FAULTS = {"dead": "is dead; it is started again", "unresponsive": "does not answer"}


class EventKind(StrEnum):
    """What an event is about.

    FAULT: something is worse than before; RECOVERY: it is as before. PLACEMENT: experts moved; WEIGHTS: none did, and
    their replicas share tokens otherwise, which is routine.
    """

    FAULT = "fault"
    RECOVERY = "recovery"
    LINK = "link"
    OPERATION = "operation"
    PLACEMENT = "placement"
    WEIGHTS = "weights"
    MEMBER = "member"


class Event(NamedTuple):
    """One thing that happened. number rises with each event of a log; time_s is seconds since 1970."""

    number: int
    time_s: float
    kind: EventKind
    text: str


class MemberWatch:
    """Tells what changed between two looks at the members' states. One thread at a time."""

    def __init__(self) -> None:
        self._states: dict[str, str] | None = None
        self._faulty_since_s: dict[str, float] = {}

    def look(self, now_s: float, states: Mapping[str, str], members: Collection[str]) -> list[tuple[EventKind, str]]:
        """Return what changed since the last look, in order of name; the first look is what later ones compare with.

        Args:
            now_s: seconds of a clock that does not step back.
            states: a word for each shard and worker that is known of.
            members: those that are to be there. One that is missing in states is being replaced.
        """
        before, self._states = self._states, dict(states)
        if before is None:
            return []
        changes: list[tuple[EventKind, str]] = []
        for member in sorted(states.keys() | before.keys() | self._faulty_since_s.keys()):
            state = states.get(member)
            if state is None:
                if member not in members:
                    self._faulty_since_s.pop(member, None)
                    changes.append((EventKind.MEMBER, f"{member} has left"))
            elif state != before.get(member):
                changes += self._changed(now_s, member, state)
        return changes

    def _changed(self, now_s: float, member: str, state: str) -> list[tuple[EventKind, str]]:
        since_s = self._faulty_since_s.get(member)
        if state in _FAULTS:
            self._faulty_since_s.setdefault(member, now_s)
            return [(EventKind.FAULT, f"{member} {_FAULTS[state]}")]
        if state == "ready" and since_s is not None:
            del self._faulty_since_s[member]
            return [(EventKind.RECOVERY, f"{member} is ready again after {now_s - since_s:.1f} s")]
        # How one that is replaced starts is a part of its recovery.
        return [] if since_s is not None else [(EventKind.MEMBER, f"{member} is {state}")]
