"""The spans of a sequence's stay at a worker: waiting, its prompt, its tokens, made when the stay is over.

What they need is noted when a sequence comes, begins, has its first token and ends; a step, a layer or a token costs
nothing. Only sequences whose request is sampled are noted.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from expertmesh.actors.tracing import TraceHeaders, Tracing, context_of
from expertmesh.cluster.requests import SequenceRequest, request_id_of

# Seconds that steps waited for experts, and layers asked for again, since the process began.
Counters = tuple[float, int]


@dataclass
class _Stay:
    """What is known of a stay. Times are nanoseconds since 1970, 0: not yet."""

    request: SequenceRequest
    arrived_ns: int
    begun_ns: int = 0
    first_ns: int = 0
    first_step: int = 0
    before: Counters = (0.0, 0)


class StayTracer:
    """The stays of one worker. Calls but `arrived` and `gone` come from the engine's thread; each is short."""

    def __init__(self, tracing: Tracing, worker: str, counters: Callable[[], Counters]) -> None:
        """Note stays at a worker; counters: of its dispatcher."""
        self._tracing = tracing
        self._worker = worker
        self._counters = counters
        self._stays: dict[str, _Stay] = {}
        self._new: dict[str, _Stay] = {}  # those without a token yet

    def arrived(self, request: SequenceRequest) -> None:
        """Note that a sequence came."""
        if request.traceparent:
            stay = _Stay(request, time.time_ns())
            self._stays[request.sequence_id] = self._new[request.sequence_id] = stay

    def begins(self, step: int, sequence_ids: Iterable[str]) -> None:
        """Note that a step is about to compute these."""
        if not self._new:
            return
        for sequence_id in sequence_ids:
            stay = self._new.get(sequence_id)
            if stay is not None and not stay.begun_ns:
                stay.begun_ns, stay.first_step, stay.before = time.time_ns(), step, self._counters()

    def drawn(self, sequence_ids: Iterable[str]) -> None:
        """Note that these have new tokens."""
        if not self._new:
            return
        for sequence_id in sequence_ids:
            stay = self._new.pop(sequence_id, None)
            if stay is not None:
                stay.first_ns = time.time_ns()

    def gone(self, sequence_id: str, step: int, *, num_output_tokens: int, outcome: str) -> None:
        """Make the spans of a stay that is over."""
        self._new.pop(sequence_id, None)
        stay = self._stays.pop(sequence_id, None)
        if stay is not None:
            self._make(stay, step, num_output_tokens, outcome)

    def _make(self, stay: _Stay, step: int, num_output_tokens: int, outcome: str) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        ended_ns, tracer = time.time_ns(), self._tracing.tracer
        expert_s, num_retries = (now - then for now, then in zip(self._counters(), stay.before, strict=True))
        span = tracer.start_span(
            "expertmesh.sequence",
            context=context_of(TraceHeaders(stay.request.traceparent)),
            kind=SpanKind.SERVER,
            start_time=stay.arrived_ns,
            attributes={
                "expertmesh.worker": self._worker,
                "expertmesh.sequence.id": stay.request.sequence_id,
                "gen_ai.response.id": request_id_of(stay.request.sequence_id),
                "gen_ai.usage.input_tokens": len(stay.request.prompt_ids),
                "gen_ai.usage.output_tokens": num_output_tokens,
                "gen_ai.response.finish_reasons": [outcome],
            },
        )
        if stay.begun_ns:
            span.set_attribute("expertmesh.first_step", stay.first_step)
            span.set_attribute("expertmesh.last_step", step)
            # Of the steps that the sequence was in, and of those in which it was preempted.
            span.set_attribute("expertmesh.expert_wait_s", round(expert_s, 6))
            span.set_attribute("expertmesh.retried_layers", num_retries)
        parent = set_span_in_context(span, Context())
        marks_ns = [stay.arrived_ns, stay.begun_ns, stay.first_ns]
        for number, name in enumerate(("expertmesh.queue", "expertmesh.prefill", "expertmesh.decode")):
            if marks_ns[number]:
                later = [mark_ns for mark_ns in marks_ns[number + 1 :] if mark_ns]
                part = tracer.start_span(name, context=parent, start_time=marks_ns[number])
                part.end(later[0] if later else ended_ns)
        if outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)
