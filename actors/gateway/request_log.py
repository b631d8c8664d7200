"""What a gateway's log tells of a request: one line when it ended, or when it was refused. No prompt, no output."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from expertmesh.actors.gateway.callers import caller_name
from expertmesh.actors.gateway.journal import LiveRequest
from expertmesh.actors.gateway.metrics import RequestTimes, code_of
from expertmesh.actors.gateway.openai_errors import HttpError
from expertmesh.actors.gateway.request_trace import RequestTrace
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import ExpertMeshError

_log = EventLog(__name__)


@dataclass
class Story:
    """A request under way, what traces it, and the name of its key. live: None until the journal has it."""

    trace: RequestTrace
    caller: str
    live: LiveRequest | None = None


@contextmanager
def told(request: ValidRequest, times: RequestTimes, trace: RequestTrace) -> Iterator[Story]:
    """Tell how the block ends as how a request ended, under the name of the gRPC status that its client gets."""
    story = Story(trace, caller_name())
    _log.tell(
        "request_accepted",
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_ids),
        samples=len(request.sampling),
        max_tokens=request.sampling[0].max_tokens,
    )
    try:
        yield story
    except BaseException as error:
        _tell_end(request, times, story, error)
        raise
    _tell_end(request, times, story, None)


@contextmanager
def refusals_told(request_id: str) -> Iterator[None]:
    """Tell of a request that is refused inside, before it is one."""
    try:
        yield
    except (ExpertMeshError, HttpError) as error:
        tell_refusal(request_id, error)
        raise


def tell_refusal(request_id: str, error: BaseException) -> None:
    """Tell why a request is not served."""
    field = error.fields.param if isinstance(error, HttpError) else getattr(error, "field", None)
    # What quotes another library's words may quote the prompt in them.
    reason = reason_of(error) if error.__cause__ is None else type(error.__cause__).__name__
    outcome = str(error.status) if isinstance(error, HttpError) else code_of(error)
    _log.tell(
        "request_rejected",
        request_id=request_id,
        caller=caller_name(),
        outcome=outcome,
        reason=reason,
        field=field or None,
    )


def _tell_end(request: ValidRequest, times: RequestTimes, story: Story, error: BaseException | None) -> None:
    live = story.live
    outcome = "OK" if error is None or times.is_complete else code_of(error)
    num_output_tokens = live.num_output_tokens - live.num_former_tokens if live else 0
    reasons = [sample.finish_reason for sample in live.samples if sample.finish_reason] if live else []
    story.trace.end(outcome, num_output_tokens=num_output_tokens, first_s=times.first_s, reasons=reasons)
    if isinstance(error, ExpertMeshError) and (live is None or not live.admitted):
        tell_refusal(request.request_id, error)
        return
    has_gone = isinstance(error, GeneratorExit | asyncio.CancelledError)
    _log.tell(
        "request_ended",
        request_id=request.request_id,
        caller=story.caller,
        outcome=outcome,
        prompt_tokens=len(request.prompt_ids),
        output_tokens=num_output_tokens,
        samples=len(request.sampling),
        ttft_s=times.first_s,
        duration_s=times.age_s,
        worker=live.link.worker_id if live and live.link else None,
        moves=live.num_moves if live else 0,
        reason=None if error is None or outcome == "OK" or has_gone else reason_of(error),
    )
