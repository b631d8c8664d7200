"""What a worker's log tells of steps, and of the sequences that come and go with them."""

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.requests import SequenceRequest, TokenEvent, request_id_of

_log = EventLog(__name__)


class StepLog:
    """Tells of steps. slow_log_s: one that takes longer is told of at any level; 0: none."""

    def __init__(self, slow_log_s: float) -> None:
        self._slow_log_s = slow_log_s

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

    @staticmethod
    def taken(request: SequenceRequest) -> None:
        """Tell of a sequence that came."""
        _log.tell(
            "sequence_taken",
            request_id=request_id_of(request.sequence_id),
            sequence_id=request.sequence_id,
            prompt_tokens=len(request.prompt_ids),
            output_tokens=len(request.output_ids),
        )

    @staticmethod
    def ended(event: TokenEvent, step: int) -> None:
        """Tell of a sequence that had its last token in a step."""
        _log.tell(
            "sequence_ended",
            request_id=request_id_of(event.sequence_id),
            sequence_id=event.sequence_id,
            outcome=event.finish_reason,
            step=step,
            output_tokens=event.index + 1,
        )
