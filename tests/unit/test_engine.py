"""The engine over a model whose next token depends on every token before, and over a fleet that is short of pages."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from expertmesh.actors.worker.engine import Engine
from expertmesh.actors.worker.queue_times import QueueTimes
from expertmesh.cluster.dispatch_hash import identity_hash, token_keys
from expertmesh.cluster.errors import CapacityError, InputError, NoReplicaError
from expertmesh.cluster.requests import FinishReason, SamplingParams, SequenceRequest, TokenEvent
from expertmesh.cluster.scheduler import Chunk, Scheduler, SchedulerConfig
from expertmesh.kernels.reference_sampling import sample_row
from expertmesh.kernels.sampling import SamplingSettings
from expertmesh.models.runners import StepRunner
from tests.families import random_prompts, write_checkpoint
from tests.fleet import LocalFleet, greedy

VOCAB_SIZE = 40
PAGE_SIZE = 4
NUM_PAGES = 64
SEEDED = SamplingParams(max_tokens=12, temperature=0.9, seed=5)
GREEDY = SamplingParams(max_tokens=12)
PENALISED = SamplingParams(max_tokens=12, temperature=0.7, top_k=20, repetition_penalty=1.3, seed=9)


def logits_of(prefix: int) -> Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(prefix % 2**63)) * 2


class HashRunner(StepRunner):
    """A model whose logits are drawn by a hash of all tokens up to a position.

    It keeps the hash of each prefix in the pages that the engine gives it, as attention keeps keys and values: a page
    that is wrong, or not computed, gives other tokens.
    """

    def __init__(self) -> None:
        self.before: Callable[[Sequence[Chunk]], None] = lambda _chunks: None
        self.non_finite: set[str] = set()
        self.kept: set[str] = set()
        self._cache: dict[tuple[int, int], int] = {}

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        self.kept.update(chunk.sequence_id for chunk in chunks)
        self.before(chunks)
        rows = [self._logits(chunk) for chunk in chunks]
        # What was cancelled meanwhile is kept again, as by a model that had it in hand.
        self.kept.update(chunk.sequence_id for chunk in chunks)
        sampled = [row for row, chunk in zip(rows, chunks, strict=True) if chunk.samples]
        return torch.stack(sampled) if sampled else torch.zeros(0, VOCAB_SIZE)

    def forget(self, sequence_id: str) -> None:
        self.kept.discard(sequence_id)

    def _logits(self, chunk: Chunk) -> Tensor:
        prefix = self._cache[self._place(chunk, chunk.start - 1)] if chunk.start else 0
        for offset, token in enumerate(chunk.token_ids):
            prefix = hash((prefix, token))
            self._cache[self._place(chunk, chunk.start + offset)] = prefix
        if chunk.sequence_id in self.non_finite and chunk.samples:
            return torch.full((VOCAB_SIZE,), math.nan)
        return logits_of(prefix)

    def _place(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.pages[position // PAGE_SIZE], position % PAGE_SIZE


class Bench:
    """An engine over a HashRunner, and the events that it handed out."""

    def __init__(
        self,
        *,
        max_batch_tokens: int = 16,
        max_sequences: int = 8,
        num_pages: int = NUM_PAGES,
        max_queue: int = 16,
        max_context: int = 100,
    ) -> None:
        self.runner = HashRunner()
        self.events: list[TokenEvent] = []
        self.keys: list[npt.NDArray[np.uint64]] = []
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                num_pages=num_pages,
                page_size=PAGE_SIZE,
                max_context=max_context,
            )
        )
        self.engine = Engine(
            self.scheduler,
            self.runner,
            max_queue=max_queue,
            begin_step=lambda _step, keys_T, _: self.keys.append(keys_T),
            on_events=self.events.extend,
        )

    def run(self, requests: Sequence[SequenceRequest]) -> dict[str, list[int]]:
        """Run sequences to their end, and return the new tokens of each."""
        self.engine.submit(requests)
        self.finish()
        return {request.sequence_id: self.tokens(request.sequence_id) for request in requests}

    def finish(self) -> None:
        for _ in range(500):
            if not self.engine.num_running + self.engine.num_waiting:
                break
            self.engine.step()
        assert self.engine.num_running == self.engine.num_waiting == 0
        assert self.engine.num_free_pages == self.scheduler._pool.num_pages, "pages are lost"
        assert not self.runner.kept, "the runner keeps sequences that have ended"

    def tokens(self, name: str) -> list[int]:
        return [e.token_id for e in self.of(name) if e.token_id is not None]

    def of(self, name: str) -> list[TokenEvent]:
        return [event for event in self.events if event.sequence_id == name]

    def end(self, name: str) -> TokenEvent:
        """Return the sequence's last event, the only one that ends it."""
        *others, last = self.of(name)
        assert all(event.finish_reason is None for event in others)
        assert last.finish_reason is not None
        return last


def request_of(name: str, sampling: SamplingParams = GREEDY, length: int = 7, seed: int = 0) -> SequenceRequest:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    prompt_ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
    return SequenceRequest(sequence_id=name, prompt_ids=tuple(prompt_ids), sampling=sampling)


def alone(request: SequenceRequest) -> list[int]:
    """Return the tokens of a request that has an engine for itself."""
    return Bench().run([request])[request.sequence_id]


def plain_loop(request: SequenceRequest) -> list[int]:
    """Return the tokens of a request as the slow twin of sampling draws them: by absolute position, one at a time."""
    sampling, tokens, prefix = request.sampling, list(request.prompt_ids), 0
    settings = SamplingSettings(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
    )
    for token in tokens:
        prefix = hash((prefix, token))
    for _ in range(sampling.max_tokens):
        token, _, _ = sample_row(logits_of(prefix).tolist(), settings, len(tokens), tokens)
        tokens.append(token)
        prefix = hash((prefix, token))
    return tokens[len(request.prompt_ids) :]


MIXED = [
    request_of(f"{kind}-{length}", sampling, length)
    for kind, sampling in (("greedy", GREEDY), ("seeded", SEEDED), ("penalised", PENALISED))
    for length in (1, 7, 30)
]


def test_tokens_end_at_max_tokens() -> None:
    bench = Bench()
    tokens = bench.run([request_of("a")])["a"]
    assert len(tokens) == 12
    assert [event.index for event in bench.of("a")] == list(range(12))
    assert bench.end("a").finish_reason is FinishReason.LENGTH
    assert len(set(tokens)) > 4, "a model that repeats itself shows little"
    assert (bench.engine.num_tokens, bench.engine.num_steps) == (12, 12)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED])
def test_a_stop_token_ends_a_sequence(sampling: SamplingParams) -> None:
    tokens = alone(request_of("a", sampling))
    stop = tokens[5]
    bench = Bench()
    got = bench.run([request_of("a", replace(sampling, stop_token_ids=(VOCAB_SIZE - 1, stop)))])["a"]
    cut = min(tokens.index(token) for token in (stop, VOCAB_SIZE - 1) if token in tokens)
    assert got == tokens[: cut + 1]
    assert bench.end("a").finish_reason is FinishReason.STOP


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    tokens = alone(request_of("a"))
    last = next(n for n in reversed(range(12)) if tokens[n] not in tokens[:n])
    bench = Bench()
    bench.run([request_of("a", replace(GREEDY, max_tokens=last + 1, stop_token_ids=(tokens[last],)))])
    assert (bench.end("a").finish_reason, bench.end("a").index) == (FinishReason.STOP, last)


@pytest.mark.parametrize("max_batch_tokens", [3, 16, 64])
@pytest.mark.parametrize("max_sequences", [1, 3, 9])
def test_tokens_do_not_depend_on_the_batch(max_batch_tokens: int, max_sequences: int) -> None:
    bench = Bench(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
    assert bench.run(MIXED) == {request.sequence_id: plain_loop(request) for request in MIXED}
    for request in MIXED:
        assert [event.index for event in bench.of(request.sequence_id)] == list(range(12))


def test_seeds_decide() -> None:
    requests = [request_of(f"seed-{seed}", replace(SEEDED, seed=seed)) for seed in range(4)]
    twin = replace(requests[2], sequence_id="twin")
    tokens = Bench().run([*requests, twin])
    assert tokens["twin"] == tokens["seed-2"]
    assert len({tuple(tokens[request.sequence_id]) for request in requests}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(sampling: SamplingParams) -> None:
    whole = request_of("whole", sampling, length=9)
    tokens = alone(whole)
    resumed = [replace(whole, sequence_id=str(cut), output_ids=tuple(tokens[:cut])) for cut in range(12)]
    bench = Bench()
    got = bench.run(resumed)
    for cut in range(12):
        assert got[str(cut)] == tokens[cut:]
        assert [event.index for event in bench.of(str(cut))] == list(range(cut, 12))


def test_a_sequence_with_all_its_tokens_is_refused() -> None:
    request = replace(request_of("a"), output_ids=tuple(alone(request_of("a"))))
    with pytest.raises(InputError, match="12 of max_tokens=12 are generated"):
        Bench().engine.submit([request])


def test_logprobs_are_handed_out() -> None:
    bench = Bench()
    bench.run([request_of("top", replace(GREEDY, logprobs=3)), request_of("chosen", replace(GREEDY, logprobs=0))])
    for event in bench.of("top"):
        assert len(event.top_logprobs) == 3
        assert (event.top_logprobs[0].token_id, event.top_logprobs[0].logprob) == (event.token_id, event.logprob)
        assert event.logprob is not None
        assert event.logprob < 0
    assert all(event.logprob is not None and not event.top_logprobs for event in bench.of("chosen"))
    plain = Bench()
    plain.run([request_of("plain")])
    assert all(event.logprob is None for event in plain.events)


def test_each_step_is_told_of_its_tokens() -> None:
    bench = Bench()
    bench.run([request_of("a", replace(GREEDY, max_tokens=3), length=6), request_of("b", GREEDY, length=2)])
    a, b = (np.full(9, identity_hash(name), dtype=np.uint64) for name in ("a", "b"))
    assert bench.keys[0].tolist() == [*token_keys(a[:6], np.arange(6)), *token_keys(b[:2], np.arange(2))]
    assert bench.keys[1].tolist() == [*token_keys(a[:1], [6]), *token_keys(b[:1], [2])]
    assert bench.keys[3].tolist() == [*token_keys(b[:1], [4])]


def test_cancelled_between_steps() -> None:
    bench = Bench()
    a, b = request_of("a", SEEDED), request_of("b", SEEDED, seed=1)
    bench.engine.submit([a, b])
    for _ in range(3):
        bench.engine.step()
    bench.engine.cancel(["a", "unknown"])
    bench.finish()
    assert bench.tokens("a") == alone(a)[:3]
    assert bench.tokens("b") == alone(b)


def test_cancelled_during_a_step() -> None:
    bench = Bench()
    a, b = request_of("a", SEEDED), request_of("b", SEEDED, seed=1)
    bench.engine.submit([a, b])
    bench.engine.step()
    bench.runner.before = lambda _chunks: bench.engine.cancel(["a"])
    bench.engine.step()
    bench.finish()
    assert bench.tokens("a") == alone(a)[:1]
    assert bench.tokens("b") == alone(b)


def test_an_id_that_is_taken_again_during_a_step_is_another_sequence() -> None:
    bench = Bench()
    old, new = request_of("a", SEEDED), request_of("a", SEEDED, length=9)
    bench.engine.submit([old])
    bench.engine.step()

    def replace_it(_chunks: Sequence[Chunk]) -> None:
        bench.runner.before = lambda _chunks: None
        bench.engine.cancel(["a"])
        bench.engine.submit([new])

    bench.runner.before = replace_it
    bench.events.clear()
    bench.finish()
    assert bench.tokens("a") == alone(new)
    assert [event.index for event in bench.of("a")] == list(range(12))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of memory"), NoReplicaError("expert L1E2 has no live replica"), IndexError("out of range")],
    ids=lambda error: type(error).__name__,
)
def test_a_step_that_raises_ends_its_sequences_and_no_other(error: Exception) -> None:
    bench = Bench(max_sequences=2)
    requests = [request_of(name, SEEDED, seed=n) for n, name in enumerate(["a", "b", "later"])]

    def fail(chunks: Sequence[Chunk]) -> None:
        if any(chunk.sequence_id == "b" and chunk.start > 8 for chunk in chunks):
            raise error

    bench.runner.before = fail
    bench.run(requests)
    for name, request in zip("ab", requests, strict=False):
        assert bench.tokens(name) == alone(request)[:3]
        assert (bench.end(name).finish_reason, bench.end(name).error) == (FinishReason.ERROR, str(error))
    assert bench.tokens("later") == alone(requests[2])
    assert bench.end("later").finish_reason is FinishReason.LENGTH


def test_cancelled_during_a_step_that_raises() -> None:
    bench = Bench()

    def cancel_and_fail(_chunks: Sequence[Chunk]) -> None:
        bench.engine.cancel(["a"])
        bench.runner.kept.add("a")
        raise RuntimeError("too late")

    bench.engine.submit([request_of("a"), request_of("b", seed=1)])
    bench.runner.before = cancel_and_fail
    bench.finish()
    assert bench.of("a") == []
    assert bench.end("b").error == "too late"


def test_logits_that_are_not_finite_end_only_their_sequence() -> None:
    bench = Bench()
    requests = [request_of(name, SEEDED, seed=n) for n, name in enumerate("abc")]
    bench.engine.submit(requests)
    bench.engine.step()
    bench.engine.step()
    bench.runner.non_finite = {"b"}
    bench.finish()
    assert bench.tokens("b") == alone(requests[1])[:2]
    assert (bench.end("b").finish_reason, bench.end("b").error) == (
        FinishReason.ERROR,
        "the model gave no finite logits",
    )
    for request in (requests[0], requests[2]):
        assert bench.tokens(request.sequence_id) == alone(request)


def test_logits_that_are_not_finite_in_every_row() -> None:
    bench = Bench()
    bench.runner.non_finite = {"a", "b"}
    bench.run([request_of("a"), request_of("b", SEEDED)])
    assert bench.end("a").error == bench.end("b").error == "the model gave no finite logits"
    assert bench.tokens("a") == bench.tokens("b") == []


def test_a_full_queue_takes_nothing() -> None:
    bench = Bench(max_queue=3, max_sequences=1)
    bench.engine.submit([request_of("a"), request_of("b")])
    bench.engine.step()
    with pytest.raises(CapacityError, match="2 sequences are live, 3 is the most"):
        bench.engine.submit([request_of("c"), request_of("d")])
    assert (bench.engine.num_running, bench.engine.num_waiting) == (1, 1)
    bench.engine.submit([request_of("c")])
    bench.finish()
    assert bench.of("d") == []
    assert bench.tokens("c") == alone(request_of("c"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(request_of("bad"), prompt_ids=()), "empty prompt"),
        (request_of("bad", replace(GREEDY, temperature=-1.0)), "temperature must be at least 0"),
        (request_of("bad", replace(GREEDY, max_tokens=0)), "max_tokens=0"),
        (request_of("bad", replace(GREEDY, max_tokens=100)), "exceed the context of 100 tokens"),
        (request_of("good"), "sequence good is live already"),
        (request_of("before"), "sequence before is live already"),
    ],
)
def test_a_list_with_a_bad_request_takes_nothing(bad: SequenceRequest, message: str) -> None:
    bench = Bench()
    bench.engine.submit([request_of("before", SEEDED)])
    with pytest.raises(InputError, match=message):
        bench.engine.submit([request_of("good"), bad, request_of("after")])
    assert (bench.engine.num_running, bench.engine.num_waiting) == (0, 1)
    bench.run([request_of("good")])
    assert {event.sequence_id for event in bench.events} == {"before", "good"}
    assert bench.tokens("before") == alone(request_of("before", SEEDED))


def test_the_loop_survives_a_failure_and_ends_when_told() -> None:
    bench = Bench()
    thread = threading.Thread(target=bench.engine.run_forever)
    thread.start()

    def fail_once(_chunks: Sequence[Chunk]) -> None:
        bench.runner.before = lambda _chunks: None
        raise ValueError("once")

    def await_end(name: str) -> None:
        deadline_s = time.monotonic() + 5
        while not any(event.finish_reason for event in bench.of(name)):
            assert time.monotonic() < deadline_s, f"{name} has not ended"
            time.sleep(0.002)

    bench.runner.before = fail_once
    bench.engine.submit([request_of("a")])
    await_end("a")
    assert bench.end("a").error == "once"
    bench.engine.submit([request_of("b")])
    await_end("b")
    assert bench.tokens("b") == alone(request_of("b"))
    bench.engine.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_preempted_sequences_draw_the_same_tokens() -> None:
    bench = Bench(num_pages=16)
    for n in range(3):
        bench.run([request_of(f"curt {n}", replace(GREEDY, max_tokens=1), length=1)])  # so little is expected of all
    assert bench.run(MIXED) == {request.sequence_id: alone(request) for request in MIXED}
    assert bench.scheduler.num_preempted > 0


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("mixtral")
    write_checkpoint("mixtral", directory)
    return directory


def test_a_fleet_short_of_pages_gives_the_same_tokens(mixtral: Path) -> None:
    prompts = random_prompts((20, 22, 25, 30))
    sampled = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    requests = [
        replace(greedy(str(n), prompt, 24), sampling=sampled if n % 2 else SamplingParams(max_tokens=24))
        for n, prompt in enumerate(prompts)
    ]
    with LocalFleet(mixtral) as plenty, LocalFleet(mixtral, num_pages=15) as few:
        expected = plenty.run(requests)
        for n in range(3):
            few.run([greedy(f"curt {n}", prompts[0][:1], 1)])  # so little is expected of all
        assert few.run(requests) == expected
        assert plenty.scheduler.num_preempted == 0
        assert few.scheduler.num_preempted > 0


def test_a_fleet_reuses_a_prefix_and_gives_the_same_tokens(mixtral: Path) -> None:
    (prompt,) = random_prompts((37,))
    with LocalFleet(mixtral) as fleet:
        first = fleet.run([greedy("first", prompt, 12)])["first"]
        assert fleet.scheduler.num_reused_tokens == 0
        second = fleet.run([greedy("second", prompt, 12)])["second"]
        assert fleet.scheduler.num_reused_tokens == 32  # of 37 tokens, the full pages of 8
        longer = fleet.run([greedy("longer", prompt + first, 6)])["longer"]
    with LocalFleet(mixtral) as fresh:
        assert longer == fresh.run([greedy("longer", prompt + first, 6)])["longer"]
    assert second == first


def test_the_time_in_the_queue_is_told_once_for_each_sequence() -> None:
    bench = Bench(max_sequences=1)
    bench.engine.submit([request_of("first"), request_of("second"), request_of("gone")])
    bench.engine.cancel(["gone"])
    bench.engine.step()
    (first_s,) = bench.engine.take_queue_times()
    assert bench.engine.take_queue_times() == []
    bench.finish()
    (second_s,) = bench.engine.take_queue_times()
    assert 0 <= first_s < second_s


def test_a_wait_ends_with_the_first_step() -> None:
    times = QueueTimes()
    times.arrived("a", 100.0)
    times.arrived("b", 101.0)
    times.arrived("c", 101.5)
    times.begun(["a"], 102.0)
    times.gone("c")
    times.begun(["a", "b", "c"], 105.0)
    assert times.take() == [2.0, 4.0]
    times.arrived("a", 110.0)  # an id that is taken again
    times.begun(["a"], 110.5)
    assert times.take() == [0.5]
