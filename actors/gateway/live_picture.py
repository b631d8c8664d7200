"""From what controller and gateway count to what the live page shows: differences, rates, the last minutes.

Shape suffixes: L MoE layers, E experts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertmesh.actors.gateway.live_times import TimesSummary
from expertmesh.cluster.model_info import ModelInfo

Message = dict[str, object]
MAX_HISTORY = 300  # looks, one a second
MAX_EVENTS = 500
# Counted since start, long, and of no part of the page.
_LEFT_OUT = frozenset({"layer_traffic", "drops", "plan"})


@dataclass(frozen=True, kw_only=True)
class GatewayFigures:
    """What the gateway itself knows. is_serving: what health says. events: of its log, those that are new."""

    is_serving: bool
    live_requests: int
    times: TimesSummary
    events: Sequence[tuple[int, float, str, str]]


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What was counted at a time of a clock that does not step back. generated: by worker and process."""

    at_s: float
    load_LE: "np.ndarray[Any, np.dtype[np.int64]]"
    computed_tokens: int
    decoded_tokens: int
    generated: Mapping[tuple[str, int], int]


class LivePicture:
    """What is known now. `seen` and `away` take in one look and return a message with what is new."""

    def __init__(self, model: ModelInfo) -> None:
        """Know the model alone."""
        self._model = {name: _plain(getattr(model, name)) for name in model.__slots__}
        self._known: Message = {"model": self._model}
        self._counted: _Counted | None = None
        self._history: deque[Message] = deque(maxlen=MAX_HISTORY)
        self._events: deque[Message] = deque(maxlen=MAX_EVENTS)
        self.life = 0
        self.epoch = 0
        self.last_event = 0

    def begin(self) -> None:
        """Forget what is only true of a moment: nobody has looked for some time."""
        self._counted = None
        for name in ("status", "tokens", "time_s", "away"):
            self._known.pop(name, None)

    @property
    def is_current(self) -> bool:
        """Whether there was a look since it began."""
        return "time_s" in self._known

    def seen(self, view: Mapping[str, Any], figures: GatewayFigures, *, wall_s: float, clock_s: float) -> Message:
        """Take in the controller's view.

        Args:
            view: see LiveView.view.
            figures: of the gateway, of the same moment.
            wall_s: seconds since 1970.
            clock_s: seconds of a clock that does not step back.
        """
        status = view["status"]
        counted = _Counted(
            at_s=clock_s,
            load_LE=view["load_LE"],
            computed_tokens=view["computed_tokens"],
            decoded_tokens=view["decoded_tokens"],
            generated={(worker["id"], worker.get("pid", 0)): _tokens(worker) for worker in status["workers"]},
        )
        before, self._counted = self._counted, counted
        message: Message = {
            "away": "",
            "status": {name: value for name, value in status.items() if name not in _LEFT_OUT},
            "slots": view["slots"],
            "operations": [_plain_fields(operation) for operation in view["operations"]],
            **_grown(before, counted),
        }
        if view["placement"]:
            message["placement"] = view["placement"]
            self.epoch = view["placement"]["epoch"]
        self.life = view["life"]
        events = [_event(f"controller-{self.life}", event) for event in view["events"]]
        self.last_event = max((event[0] for event in view["events"]), default=self.last_event)
        return self._with_figures(message, events, figures, wall_s)

    def away(self, reason: str, figures: GatewayFigures, *, wall_s: float) -> Message:
        """Take in that the controller did not answer: what was seen of it stays, and what it counted is not known."""
        self._counted = None
        message: Message = {"away": reason, "tokens": None, "interval_s": None}
        message |= {"generated_per_s": None, "prompt_per_s": None}
        return self._with_figures(message, [], figures, wall_s)

    def whole(self) -> Message:
        """Return all that is known, for who has seen nothing yet."""
        return {**self._known, "history": list(self._history), "events": list(self._events)}

    def _with_figures(self, message: Message, events: list[Message], figures: GatewayFigures, wall_s: float) -> Message:
        message |= {
            "time_s": wall_s,
            "is_serving": figures.is_serving,
            "live_requests": figures.live_requests,
            **figures.times._asdict(),
        }
        self._known |= message
        shown = ("time_s", "generated_per_s", "prompt_per_s", "gap_p50_s", "gap_p99_s", "live_requests")
        self._history.append({name: message[name] for name in shown})
        events += [_event("gateway", event) for event in figures.events]
        self._events.extend(events)
        return {**message, "events": events}


def _grown(before: _Counted | None, now: _Counted) -> Message:
    """Return what was counted in between; None where that is not known: a worker left, or began anew."""
    unknown: Message = {"interval_s": None, "tokens": None, "generated_per_s": None, "prompt_per_s": None}
    if before is None or before.load_LE.shape != now.load_LE.shape:
        return unknown
    interval_s = now.at_s - before.at_s
    tokens_LE = now.load_LE - before.load_LE
    decoded = now.decoded_tokens - before.decoded_tokens
    prompt = now.computed_tokens - before.computed_tokens - decoded
    if interval_s <= 0 or tokens_LE.min() < 0 or decoded < 0:
        return unknown
    generated = sum(max(0, count - before.generated.get(worker, count)) for worker, count in now.generated.items())
    return {
        "interval_s": interval_s,
        "tokens": tokens_LE.tolist(),
        "generated_per_s": generated / interval_s,
        "prompt_per_s": max(0, prompt) / interval_s,
    }


def _tokens(worker: Mapping[str, Any]) -> int:
    return int(worker.get("tokens_generated", 0))


def _event(source: str, event: tuple[int, float, str, str]) -> Message:
    number, time_s, kind, text = event
    return {"id": f"{source}-{number}", "time_s": time_s, "kind": str(kind), "text": text}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _plain_fields(fields: Mapping[str, object]) -> Message:
    return {name: _plain(value) for name, value in fields.items()}
