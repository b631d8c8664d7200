"""What a worker's log tells of steps, and of the sequences that come and go with them."""

from collections.abc import Callable, Iterable

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.tracing import open_tracing
from expertmesh.actors.worker.stay_trace import Counters, StayTracer
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.requests import FinishReason, SequenceRequest, request_id_of
from expertmesh.cluster.settings import ServeSettings

_log = EventLog(__name__)


def open_step_log(settings: ServeSettings, worker: str, node: str, counters: Callable[[], Counters]) -> "StepLog":
    """Return the log of a worker's steps, as settings have it.

    Args:
        settings: what is slow, and where traces are sent.
        worker: its id.
        node: on which it runs.
        counters: of its dispatcher.
    """
    tracing = open_tracing(settings, worker, node)
    return StepLog(settings.slow_log_s, None if tracing is None else StayTracer(tracing, worker, counters))


class StepLog:
    """Tells of steps, and traces stays. slow_log_s: a step that takes longer is told of at any level; 0: none."""

    def __init__(self, slow_log_s: float = 0.0, stays: StayTracer | None = None) -> None:
        self._slow_log_s = slow_log_s
        self._stays = stays

    def begins(self, step: Step) -> None:
        """Note that a step is about to be computed."""
        if self._stays is not None:
            self._stays.begins(step.number, (chunk.sequence_id for chunk in step.chunks))

    def drawn(self, sequence_ids: Iterable[str]) -> None:
        """Note that these sequences have a new token each."""
        if self._stays is not None:
            self._stays.drawn(sequence_ids)

    def done(self, step: Step, duration_s: float) -> None:
        """Tell of a step that was computed; most often nothing is to be told."""
        is_slow = 0 < self._slow_log_s < duration_s
        event = "step_slow" if is_slow else "step_done"
        if _log.is_told(event):
            num_tokens = sum(len(chunk.token_ids) for chunk in step.chunks)
            _log.tell(
                event,
                step=step.number,
                num_tokens=num_tokens,
                num_sequences=len(step.chunks),
                duration_s=duration_s,
                request_ids=step.request_ids,
            )

    @staticmethod
    def failed(step: Step, duration_s: float, error: Exception) -> None:
        """Tell of a step that failed, and with it its sequences."""
        _log.tell(
            "step_failed",
            error,
            step=step.number,
            num_sequences=len(step.chunks),
            duration_s=duration_s,
            request_ids=step.request_ids,
            reason=reason_of(error),
        )

    def taken(self, request: SequenceRequest) -> None:
        """Tell of a sequence that came."""
        if self._stays is not None:
            self._stays.arrived(request)
        _log.tell(
            "sequence_taken",
            request_id=request_id_of(request.sequence_id),
            sequence_id=request.sequence_id,
            prompt_tokens=len(request.prompt_ids),
            output_tokens=len(request.output_ids),
        )

    def gone(self, sequence_id: str, step: int, *, num_output_tokens: int, outcome: FinishReason) -> None:
        """Tell of a sequence that is over, at this step or before it."""
        _log.tell(
            "sequence_ended",
            request_id=request_id_of(sequence_id),
            sequence_id=sequence_id,
            outcome=outcome,
            step=step,
            output_tokens=num_output_tokens,
        )
        if self._stays is not None:
            self._stays.gone(sequence_id, step, num_output_tokens=num_output_tokens, outcome=outcome)
