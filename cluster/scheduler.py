"""Which tokens of which sequences the next step computes: continuous batching over paged KV.

Each step takes the decoding sequences first, then chunks of the prompts that are under way, then admits from the queue
in order of arrival. A sequence is admitted when pages are free for all its known tokens and a page of growth for each
running sequence, and when the forecast (`page_forecast`) has pages for all until they end. It counts what those before
it leave; else it waits, rather than be computed twice. A forecast may be wrong: a decoding sequence that finds no page
preempts the youngest, which goes to the front of the queue, keeps its outputs, and is computed again later. Two rules
make every sequence finish: the oldest running sequence is never preempted for another, and `add` refuses what would
not fit alone.

Without pages (page_size 0) the engine keeps its own caches: each step is one sequence's whole chunk, in turn.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kv_pages import PagePool
from expertmesh.cluster.live_sequence import LiveSequence
from expertmesh.cluster.output_lengths import OutputLengths
from expertmesh.cluster.page_forecast import pages_suffice, stays_of
from expertmesh.cluster.requests import SequenceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Bounds of a step and of the cache.

    max_batch_tokens bounds the tokens of a step (not without pages), max_sequences the sequences that run at once,
    max_context the prompt and generated tokens of a sequence; page_size is in tokens. num_pages and page_size are both
    positive, or both 0 for an engine without pages.
    """

    max_batch_tokens: int
    max_sequences: int
    num_pages: int
    page_size: int
    max_context: int

    def __post_init__(self) -> None:
        if min(self.max_batch_tokens, self.max_sequences, self.max_context) < 1:
            raise InputError(f"max_batch_tokens, max_sequences and max_context must be at least 1: {self}")
        if min(self.num_pages, self.page_size) < 0 or (self.num_pages == 0) != (self.page_size == 0):
            raise InputError(f"num_pages and page_size must both be positive or both 0: {self}")


class Chunk(NamedTuple):
    """The part of one sequence that a step computes.

    start tokens are in the cache already; token_ids are computed now, at positions start, start+1, ...; pages is the
    block table that covers start + len(token_ids) tokens (empty without pages). samples: the chunk reaches the last
    known token, so the step yields a new one.
    """

    sequence_id: str
    start: int
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step, at most one for each sequence."""

    chunks: tuple[Chunk, ...]


class Scheduler:
    """Plan the steps of one attention worker: `plan`, compute, `commit`, `finish` what ended, again.

    Not thread-safe. Pages given back by `cancel` or `finish` are handed out by the next `plan` and not before, so a
    step under way may go on writing them.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._pool = PagePool(config.num_pages, config.page_size)
        self._sequences: dict[str, LiveSequence] = {}
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []  # oldest first; without pages: next first
        self._plan: StepPlan | None = None
        self._planned: list[LiveSequence] = []
        self._lengths = OutputLengths()
        self._kept_out: LiveSequence | None = None  # until a sequence ends, or another is first in the queue
        self._num_preempted = 0
        self._num_reused_tokens = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones among them."""
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had, those kept only for reuse among them."""
        return self._pool.num_free

    @property
    def num_preempted(self) -> int:
        """Preemptions so far."""
        return self._num_preempted

    @property
    def num_reused_tokens(self) -> int:
        """Tokens found in the cache on admission so far, those of preempted sequences among them."""
        return self._num_reused_tokens

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._sequences

    def add(self, request: SequenceRequest) -> None:
        """Put a sequence at the end of the queue. The output_ids of a resumed one are known tokens, like its prompt.

        Raises:
            InputError: the id is live, there is no prompt, nothing to generate, or it exceeds max_context or the pages.
        """
        config, sequence_id = self._config, request.sequence_id
        if sequence_id in self._sequences:
            raise InputError(f"sequence {sequence_id} is live already")
        num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise InputError(f"sequence {sequence_id} has an empty prompt")
        if max_tokens <= len(request.output_ids):
            raise InputError(
                f"sequence {sequence_id}: {len(request.output_ids)} of max_tokens={max_tokens} are generated"
            )
        if num_prompt + max_tokens > config.max_context:
            raise InputError(
                f"sequence {sequence_id}: {num_prompt} prompt tokens and max_tokens={max_tokens} exceed "
                f"the context of {config.max_context} tokens"
            )
        # The last token that is generated is never computed.
        num_pages = self._pages_for(num_prompt + max_tokens - 1)
        if num_pages > config.num_pages:
            raise InputError(
                f"sequence {sequence_id}: {num_prompt} prompt tokens and max_tokens={max_tokens} need "
                f"{num_pages} pages of {config.page_size} tokens, and there are {config.num_pages}"
            )
        sequence = LiveSequence(request, config.page_size)
        self._sequences[sequence_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        """Drop a sequence, at any time, also between `plan` and `commit`. Return whether it was live."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._pool.release(sequence.pages)
        self._kept_out = None
        # A client that leaves, or a stop string that is found elsewhere, ends a sequence like any other end.
        if sequence.num_generated:
            self._lengths.add(sequence.num_generated)
        return True

    def finish(self, sequence_id: str) -> None:
        """Release a sequence that has ended. Call it after `commit`, so that what was computed can be reused."""
        was_live = self.cancel(sequence_id)
        assert was_live, f"sequence {sequence_id} is not live and cannot finish"

    def plan(self) -> StepPlan | None:
        """Return the next step, or None when no sequence is live. A plan that is never committed does no harm."""
        self._planned = []
        chunks = self._plan_paged() if self._config.page_size else self._plan_in_turn()
        self._plan = StepPlan(tuple(chunks)) if chunks else None
        assert chunks or not self._sequences, f"{len(self._sequences)} sequences are live and none can go on"
        return self._plan

    def commit(self, plan: StepPlan, new_tokens: Mapping[str, int]) -> None:
        """Record that the last plan was computed, with the new token of each chunk that samples.

        Chunks and tokens of sequences cancelled since the plan are ignored.
        """
        assert plan is self._plan, "only the last plan can be committed, and only once"
        self._plan = None
        for sequence, chunk in zip(self._planned, plan.chunks, strict=True):
            sequence_id, start = chunk.sequence_id, chunk.start
            if self._sequences.get(sequence_id) is not sequence:
                continue
            sequence.num_computed = start + len(chunk.token_ids)
            if self._config.page_size:
                self._pool.publish(sequence.chain, sequence.pages, num_before=start, num_computed=sequence.num_computed)
            assert chunk.samples == (sequence_id in new_tokens), f"sequence {sequence_id}: samples={chunk.samples}"
            if chunk.samples:
                sequence.chain.append(new_tokens[sequence_id])

    def _plan_in_turn(self) -> list[Chunk]:
        while self._waiting and len(self._running) < self._config.max_sequences:
            self._running.append(self._waiting.popleft())
        if not self._running:
            return []
        sequence = self._running.pop(0)
        self._running.append(sequence)
        return [self._chunk(sequence, sequence.num_left)]

    def _plan_paged(self) -> list[Chunk]:
        budget = self._config.max_batch_tokens
        chunks: list[Chunk] = []
        prefilling: list[LiveSequence] = []
        index = 0
        # _grow shortens the list from its young end only, so what lies before index has its pages and keeps them.
        while index < len(self._running):
            sequence = self._running[index]
            index += 1
            if sequence.num_left > 1:
                prefilling.append(sequence)
            elif budget and self._grow(sequence):
                chunks.append(self._chunk(sequence, 1))
                budget -= 1
        for sequence in prefilling:
            if budget:
                chunks.append(self._chunk(sequence, min(budget, sequence.num_left)))
                budget -= len(chunks[-1].token_ids)
        if self._waiting and budget:
            self._admit(budget, chunks, prefilling)
        return chunks

    def _admit(self, budget: int, chunks: list[Chunk], prefilling: list[LiveSequence]) -> None:
        """Start waiting sequences in order. Siblings that wait for a prefix are passed over, and so is no one else."""
        index = 0
        # The bound on index keeps a long queue of siblings from being searched at each step.
        while index < min(len(self._waiting), self._config.max_sequences):
            sequence = self._waiting[index]
            if len(self._running) == self._config.max_sequences or not budget:
                return
            if any(self._computes_next_page_of(sequence, other) for other in prefilling):
                index += 1
                continue
            if not self._start(sequence):
                return
            del self._waiting[index]
            prefilling.append(sequence)
            chunks.append(self._chunk(sequence, min(budget, sequence.num_left)))
            budget -= len(chunks[-1].token_ids)

    def _computes_next_page_of(self, waiting: LiveSequence, other: LiveSequence) -> bool:
        """Whether the other is about to compute a full page that the waiting one could reuse.

        What the other has computed is published, so its first unpublished page is the first that a match would miss.
        """
        index = other.num_computed // self._config.page_size
        num_matchable = (len(waiting.tokens) - 1) // self._config.page_size
        return (
            index < min(num_matchable, len(other.chain.keys)) and waiting.chain.keys[index] == other.chain.keys[index]
        )

    def _start(self, sequence: LiveSequence) -> bool:
        """Give a waiting sequence the pages of all its known tokens, if they and room for the others are free."""
        if sequence is self._kept_out:
            return False
        matched = tuple(self._pool.match_prefix(sequence.chain))
        num_new = self._pages_for(len(sequence.tokens)) - len(matched)
        num_left = self._pool.num_free - num_new
        sequence.pages, sequence.num_computed = matched, len(matched) * self._config.page_size
        if num_left < len(self._running) or not self._pages_last([*self._running, sequence], num_left):
            # The prefix was looked at and thereby became the last to be evicted, as it should: it is wanted next.
            self._pool.release(matched)
            sequence.pages, sequence.num_computed = (), 0
            self._kept_out = sequence
            return False
        new = self._pool.allocate(num_new)
        assert new is not None, f"{num_new} pages are not there, and {num_left} would have been left"
        sequence.pages += tuple(new)
        self._num_reused_tokens += sequence.num_computed
        self._running.append(sequence)
        return True

    def _pages_last(self, sequences: list[LiveSequence], num_free: int) -> bool:
        stays = stays_of(
            sequences, self._lengths, page_size=self._config.page_size, max_batch_tokens=self._config.max_batch_tokens
        )
        return pages_suffice(stays, self._pool.num_shared, num_free=num_free, page_size=self._config.page_size)

    def _grow(self, sequence: LiveSequence) -> bool:
        """Make sure of a page for the next token, preempting the youngest until there is one. False: it was itself."""
        if sequence.num_computed < len(sequence.pages) * self._config.page_size:
            return True
        while (new := self._pool.allocate(1)) is None:
            assert len(self._running) > 1, f"sequence {sequence.sequence_id} does not fit, and add() took it"
            youngest = self._running.pop()
            self._pool.release(youngest.pages)
            youngest.pages = ()
            self._waiting.appendleft(youngest)
            self._num_preempted += 1
            if youngest is sequence:
                return False
        sequence.pages += tuple(new)
        return True

    def _chunk(self, sequence: LiveSequence, num_tokens: int) -> Chunk:
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        num_known = len(sequence.tokens)
        assert sequence.num_generated < sequence.max_tokens, (
            f"sequence {sequence.sequence_id} has all its tokens: finish() it"
        )
        pages = sequence.pages
        if self._config.page_size:
            for index in range(start // self._config.page_size, self._pages_for(end)):
                self._pool.assert_writable(pages[index])
            if len(pages) > self._pages_for(end):
                pages = pages[: self._pages_for(end)]
        self._planned.append(sequence)
        return Chunk(sequence.sequence_id, start, tuple(sequence.tokens[start:end]), pages, end == num_known)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.page_size) if self._config.page_size else 0
