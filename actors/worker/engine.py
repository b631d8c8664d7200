"""The attention worker's loop: take in requests, plan a step, compute it, draw tokens, hand them out.

The engine knows neither Ray nor gateways: `submit` and `cancel` may be called from any thread, `on_events` gets what is
new.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.actors.worker.queue_times import QueueTimes
from expertmesh.actors.worker.step import Step
from expertmesh.actors.worker.step_log import StepLog
from expertmesh.cluster.dispatch_hash import identity_hash, token_keys
from expertmesh.cluster.errors import CapacityError, InputError, UnavailableError
from expertmesh.cluster.requests import FinishReason, SequenceRequest, TokenEvent, TokenLogprob
from expertmesh.cluster.scheduler import Chunk, Scheduler, StepPlan
from expertmesh.kernels.sampling import NonFiniteLogitsError, SampledTokens, SamplingSettings, sample
from expertmesh.models.runners import StepRunner

BeginStep = Callable[[Step, npt.NDArray[np.uint64], npt.NDArray[np.bool_]], None]


@dataclass
class _Live:
    """A sequence that the engine works on."""

    request: SequenceRequest
    settings: SamplingSettings
    hash: int
    output_ids: list[int] = field(default_factory=list)


class Engine:
    """Runs sequences in steps. `step` does one; `run_forever` is the thread's loop around it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        max_queue: int,
        begin_step: BeginStep,
        on_events: Callable[[list[TokenEvent]], None],
        log: StepLog | None = None,
    ) -> None:
        """Make an engine.

        Args:
            scheduler: decides what a step computes.
            runner: computes it.
            max_queue: most sequences that may be live; `submit` refuses more.
            begin_step: told, before a step is computed, which it is, the key of each token, and whether it is one of
                decoding.
            on_events: gets each step's events, from the engine's thread.
            log: told of sequences and steps; None: one of its own.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._max_queue = max_queue
        self._begin_step = begin_step
        self._on_events = on_events
        self._log = log or StepLog()
        self._num_begun = 0  # steps, those that failed too
        self._live: dict[str, _Live] = {}
        self._queue_times = QueueTimes()
        self._lock = threading.Condition()
        self._stopping = False
        self.num_steps = 0
        self.num_tokens = 0
        self.busy_s = 0.0  # in steps, since the start

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return self._scheduler.num_waiting

    @property
    def num_free_pages(self) -> int:
        """KV pages that can be had."""
        return self._scheduler.num_free_pages

    @property
    def num_outstanding_tokens(self) -> int:
        """Tokens that the live sequences may still ask for."""
        with self._lock:
            return sum(live.request.sampling.max_tokens - len(live.output_ids) for live in self._live.values())

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Take on all of these sequences, or none.

        Raises:
            InputError: one can never run here, or is live already.
            CapacityError: the queue is full.
        """
        with self._lock:
            if len(self._live) + len(requests) > self._max_queue:
                raise CapacityError(f"{len(self._live)} sequences are live, {self._max_queue} is the most")
            taken: list[str] = []
            try:
                for request in requests:
                    live = _live(request)
                    self._scheduler.add(request)
                    self._live[request.sequence_id] = live
                    self._queue_times.arrived(request.sequence_id, time.monotonic())
                    taken.append(request.sequence_id)
                    self._log.taken(request)
            except (InputError, ValueError) as error:
                for sequence_id in taken:
                    self._drop(sequence_id, FinishReason.CANCELLED)
                raise InputError(str(error)) from error
            self._lock.notify_all()

    def cancel(self, sequence_ids: Sequence[str]) -> None:
        """Drop sequences; unknown ones are passed over. Their pages are free for the next step."""
        with self._lock:
            for sequence_id in sequence_ids:
                if sequence_id in self._live:
                    self._drop(sequence_id, FinishReason.CANCELLED)

    def take_queue_times(self) -> list[float]:
        """Return how many seconds each sequence waited that has begun since the last call."""
        with self._lock:
            return self._queue_times.take()

    def stop(self) -> None:
        """Let `run_forever` return after the step under way."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def run_forever(self) -> None:
        """Do steps while there is work; wait while there is none."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopping or bool(self._live))
                if self._stopping:
                    return
            self.step()

    def step(self) -> None:
        """Plan, compute and hand out one step. A failure ends the sequences of the step, not the engine."""
        with self._lock:
            plan = self._scheduler.plan()
            if plan is None:
                return
            contexts = [self._live[chunk.sequence_id] for chunk in plan.chunks]
            self._num_begun += 1
            step = Step(self._num_begun, plan.chunks)
            started_s = time.monotonic()
            self._queue_times.begun((chunk.sequence_id for chunk in plan.chunks), started_s)
        try:
            with torch.inference_mode():
                self._log.begins(step)
                self._begin_step(step, *_tokens(plan.chunks, contexts))
                sampled, failed = self._draw(plan, contexts, self._runner.run(plan.chunks))
        except Exception as error:  # noqa: BLE001 - it is logged, and the step's sequences are told
            self._log.failed(step, time.monotonic() - started_s, error)
            self._fail(plan, contexts, error)
        else:
            self._log.drawn(sampled)
            self._commit(plan, contexts, sampled, failed)
            self._log.done(step, time.monotonic() - started_s)
        self.busy_s += time.monotonic() - started_s

    def _draw(
        self, plan: StepPlan, contexts: list[_Live], logits_NV: Tensor
    ) -> tuple[dict[str, tuple[int, TokenEvent]], dict[str, str]]:
        """Draw the new tokens. Return them with their events by sequence, and the sequences without usable logits."""
        rows = [(c.sequence_id, live) for c, live in zip(plan.chunks, contexts, strict=True) if c.samples]
        failed: dict[str, str] = {}
        keep = list(range(len(rows)))
        while keep:
            lives = [rows[n][1] for n in keep]
            try:
                tokens = sample(
                    logits_NV[keep] if failed else logits_NV,
                    [live.settings for live in lives],
                    [len(live.request.prompt_ids) + len(live.output_ids) for live in lives],
                    [(*live.request.prompt_ids, *live.output_ids) for live in lives]
                    if any(live.settings.repetition_penalty != 1 for live in lives)
                    else None,
                )
            except NonFiniteLogitsError as error:
                for row in error.rows:
                    failed[rows[keep[row]][0]] = "the model gave no finite logits"
                keep = [n for row, n in enumerate(keep) if row not in error.rows]
                continue
            return {
                rows[n][0]: (tokens.token_ids[row], _event(rows[n][0], rows[n][1], tokens, row))
                for row, n in enumerate(keep)
            }, failed
        return {}, failed

    def _commit(
        self,
        plan: StepPlan,
        contexts: list[_Live],
        sampled: dict[str, tuple[int, TokenEvent]],
        failed: dict[str, str],
    ) -> None:
        """Tell the scheduler, hand out the events, and let go of what ended."""
        events: list[TokenEvent] = []
        with self._lock:
            lives = self._still_live(plan, contexts)
            for sequence_id in failed.keys() & lives.keys():
                self._drop(sequence_id, FinishReason.ERROR)
                events.append(_end(sequence_id, failed[sequence_id]))
            self._scheduler.commit(plan, {sequence_id: token for sequence_id, (token, _) in sampled.items()})
            for sequence_id, (token, event) in sampled.items():
                live = lives.get(sequence_id)
                if live is None:
                    continue
                live.output_ids.append(token)
                events.append(event)
                if event.finish_reason is not None:
                    self._scheduler.finish(sequence_id)
                    self._forget(sequence_id, event.finish_reason)
            for chunk in plan.chunks:
                if chunk.sequence_id not in self._live:
                    self._runner.forget(chunk.sequence_id)  # it may have been cancelled while the step was computed
            self.num_steps += 1
            self.num_tokens += len(sampled)
        if events:
            self._on_events(events)

    def _fail(self, plan: StepPlan, contexts: list[_Live], error: Exception) -> None:
        with self._lock:
            lives = self._still_live(plan, contexts)
            for sequence_id in lives:
                self._drop(sequence_id, FinishReason.ERROR)
            for chunk in plan.chunks:
                if chunk.sequence_id not in self._live:
                    self._runner.forget(chunk.sequence_id)
        unavailable = isinstance(error, UnavailableError)
        self._on_events([_end(sequence_id, str(error), unavailable=unavailable) for sequence_id in lives])

    def _still_live(self, plan: StepPlan, contexts: list[_Live]) -> dict[str, _Live]:
        """Return the sequences of a step that were not cancelled meanwhile; an id that was taken again is another."""
        pairs = zip(plan.chunks, contexts, strict=True)
        return {chunk.sequence_id: live for chunk, live in pairs if self._live.get(chunk.sequence_id) is live}

    def _drop(self, sequence_id: str, why: FinishReason) -> None:
        self._scheduler.cancel(sequence_id)
        self._forget(sequence_id, why)

    def _forget(self, sequence_id: str, why: FinishReason) -> None:
        live = self._live.pop(sequence_id)
        self._log.gone(sequence_id, self._num_begun, num_output_tokens=len(live.output_ids), outcome=why)
        self._queue_times.gone(sequence_id)
        self._runner.forget(sequence_id)


def _live(request: SequenceRequest) -> _Live:
    sampling = request.sampling
    return _Live(
        request=request,
        settings=SamplingSettings(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
        ),
        # What follows "~" names one stay at one worker: a resumed sequence must choose the same replicas.
        hash=identity_hash(request.sequence_id.partition("~")[0]),
        output_ids=list(request.output_ids),
    )


def _tokens(chunks: Sequence[Chunk], contexts: Sequence[_Live]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Return each token's key, and whether its chunk is one generated token."""
    lengths = [len(chunk.token_ids) for chunk in chunks]
    hashes_T = np.repeat(np.array([live.hash for live in contexts], dtype=np.uint64), lengths)
    positions_T = np.concatenate([np.arange(c.start, c.start + n) for c, n in zip(chunks, lengths, strict=True)])
    pairs = zip(chunks, contexts, strict=True)
    is_decode = [len(c.token_ids) == 1 and c.start >= len(live.request.prompt_ids) for c, live in pairs]
    return token_keys(hashes_T, positions_T), np.repeat(is_decode, lengths)


def _event(sequence_id: str, live: _Live, tokens: SampledTokens, row: int) -> TokenEvent:
    token_id, index, sampling = tokens.token_ids[row], len(live.output_ids), live.request.sampling
    reason = None
    if token_id in sampling.stop_token_ids:
        reason = FinishReason.STOP
    elif index + 1 >= sampling.max_tokens:
        reason = FinishReason.LENGTH
    return TokenEvent(
        sequence_id=sequence_id,
        index=index,
        token_id=token_id,
        logprob=tokens.logprob[row],
        top_logprobs=tuple(TokenLogprob(token_id=t, logprob=p) for t, p in tokens.top[row]),
        finish_reason=reason,
    )


def _end(sequence_id: str, reason: str, *, unavailable: bool = False) -> TokenEvent:
    return TokenEvent(
        sequence_id=sequence_id,
        index=-1,
        token_id=None,
        finish_reason=FinishReason.ERROR,
        error=reason,
        unavailable=unavailable,
    )
