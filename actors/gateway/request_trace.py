"""The spans of a request at its gateway: one of the request, and in it one for each stay at a worker.

Names of attributes are those of OpenTelemetry's semantic conventions for generative AI, status Development in release
1.37, https://github.com/open-telemetry/semantic-conventions/tree/main/docs/gen-ai; ours begin with `expertmesh.`.
"""

from typing import TYPE_CHECKING

from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.tracing import Tracing, context_of, traceparent_of
from expertmesh.cluster.requests import FinishReason

if TYPE_CHECKING:
    from opentelemetry.trace import Span

PROVIDER = "expertmesh"


class RequestTrace:
    """A request that is not traced: every call does nothing. traceparent: what its worker goes on from."""

    traceparent = ""

    def begin_stay(self, worker: str, num_output_tokens: int) -> None:
        """Begin a stay at a worker, after that many tokens."""

    def end_stay(self, why: str = "") -> None:
        """End the stay under way, if there is one; why: it did not go well."""

    def end(self, outcome: str, *, num_output_tokens: int, first_s: float | None, reasons: list[FinishReason]) -> None:
        """End the request.

        Args:
            outcome: the name of its gRPC status.
            num_output_tokens: of all samples.
            first_s: seconds to its first token; None: there was none.
            reasons: why samples ended.
        """


UNTRACED = RequestTrace()


class SpanTrace(RequestTrace):
    """A request that is traced."""

    def __init__(self, tracing: Tracing, request: ValidRequest, model: str) -> None:
        """Begin the request's span."""
        from opentelemetry.trace import SpanKind

        self._tracing = tracing
        self._stay: Span | None = None
        self._former: Span | None = None
        self._span = tracing.tracer.start_span(
            f"{request.operation} {model}",
            context=context_of(request.trace),
            kind=SpanKind.SERVER,
            attributes=_attributes(request, model),
        )

    def begin_stay(self, worker: str, num_output_tokens: int) -> None:
        """See RequestTrace."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, SpanKind, set_span_in_context

        self.end_stay()
        former = self._former
        self._stay = self._former = self._tracing.tracer.start_span(
            "expertmesh.stay",
            context=set_span_in_context(self._span, Context()),
            kind=SpanKind.CLIENT,
            links=() if former is None else (Link(former.get_span_context()),),
            attributes={"expertmesh.worker": worker, "expertmesh.former_output_tokens": num_output_tokens},
        )
        self.traceparent = traceparent_of(self._stay)

    def end_stay(self, why: str = "") -> None:
        """See RequestTrace."""
        if self._stay is not None:
            _fail(self._stay, why)
            self._stay.end()
            self._stay = None

    def end(self, outcome: str, *, num_output_tokens: int, first_s: float | None, reasons: list[FinishReason]) -> None:
        """See RequestTrace."""
        is_ok = outcome == "OK"
        self.end_stay("" if is_ok else outcome)
        span = self._span
        span.set_attribute("gen_ai.usage.output_tokens", num_output_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", [str(reason) for reason in reasons])
        if first_s is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", first_s)
        if not is_ok:
            span.set_attribute("error.type", outcome)
            _fail(span, outcome)
        span.end()


class RequestTracer:
    """Begins traces of one gateway's requests. model: its name; tracing: None: none is traced."""

    def __init__(self, tracing: Tracing | None = None, model: str = "") -> None:
        self._tracing = tracing
        self._model = model

    def begin(self, request: ValidRequest) -> RequestTrace:
        """Begin a request's trace."""
        return UNTRACED if self._tracing is None else SpanTrace(self._tracing, request, self._model)


def _attributes(request: ValidRequest, model: str) -> dict[str, str | int | float]:
    sampling = request.sampling[0]
    return {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": len(request.sampling),
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
    }


def _fail(span: "Span", why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    if why:
        span.set_status(Status(StatusCode.ERROR, why))
