"""Attention workers that need no model: each token is a fixed function of prompt, seed and position."""

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from expertmesh.cluster.errors import CapacityError, ConflictError, InputError, UnavailableError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.requests import FinishReason, SamplingParams, SequenceRequest, TokenEvent, TokenLogprob
from expertmesh.models.tokenizer import Tokenizer, open_tokenizer

EOS_ID = 256
LETTERS = "abcdefghijklmnopqrstuvwxyz "
MODEL = ModelInfo(
    name="fake",
    architecture="FakeMoeForCausalLM",
    dtype="float32",
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    vocab_size=257,
    max_context=512,
    eos_token_ids=(EOS_ID,),
    has_tokenizer=True,
)

STATUS: dict[str, object] = {
    "plan": "2 shards, 1 worker",
    "epoch": 3,
    "balancedness": 0.875,
    "recent_balancedness": 0.5,
    "controller": {"pid": 11, "node": "n0"},
    "shards": [
        {
            "id": f"s{index}",
            "pid": 20 + index,
            "node": "n0",
            "state": "ready",
            "num_slots": 4,
            "weight_bytes": 2**33,
            "experts_copied": 1,
            "experts_read": 3,
            "address": "h",
        }
        for index in range(2)
    ],
    "workers": [
        {
            "id": "w0",
            "pid": 30,
            "node": "n0",
            "state": "ready",
            "dense_bytes": 2**32,
            "running": 2,
            "waiting": 1,
            "free_pages": 60,
            "num_pages": 64,
            "tokens_generated": 2**35,
            "address": "h",
            "dropped_pairs": 7,
        }
    ],
    "grpc_address": "127.0.0.1:50051",
    "model": asdict(MODEL),
    "layer_traffic": [{"layer": 0, "dispatch_bytes": 100, "combine_bytes": 200, "reduce_bytes": 2**36}],
    "ready": True,
    "not_ready_reason": "",
    "warnings": [],
    "capacity_factor": 1.25,
    "dropped_pairs": 7,
    "drops": [{"layer": 0, "pairs": [0, 5, 0, 0]}, {"layer": 1, "pairs": [0, 0, 0, 2]}],
    "autoscaler": {"shards": 3, "workers": 1, "reasons": ["shards go from 2 to 3: busy"], "age_s": 1.5, "problem": ""},
}


def save_tokenizer(directory: Path) -> Tokenizer:
    """Write and open a tokenizer with one token for each byte, and <eos>."""
    alphabet = sorted(ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    inner.add_special_tokens(["<eos>"])
    inner.save(str(directory / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    (directory / "tokenizer_config.json").write_text(config)
    tokenizer = open_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def letter_id(letter: str) -> int:
    """Return the token id of an ASCII letter or the space (which byte-level text writes as U+0120)."""
    return sorted(ByteLevel.alphabet()).index("\u0120" if letter == " " else letter)


LETTER_IDS = tuple(letter_id(letter) for letter in LETTERS)


def fake_token(prompt_ids: Sequence[int], sampling: SamplingParams, position: int) -> int:
    """Return the token at `position` of the output: a letter."""
    return LETTER_IDS[zlib.crc32(repr((tuple(prompt_ids), sampling.seed, position)).encode()) % len(LETTERS)]


def fake_output(prompt_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """Return all tokens that an undisturbed worker would give, whatever the stop tokens."""
    return [fake_token(prompt_ids, sampling, position) for position in range(sampling.max_tokens)]


def fake_text(prompt_ids: Sequence[int], sampling: SamplingParams) -> str:
    """Return the text of fake_output."""
    return "".join(LETTERS[LETTER_IDS.index(token_id)] for token_id in fake_output(prompt_ids, sampling))


@dataclass
class FakeWorker:
    """A worker that gives every sequence one token a step; it dies, hangs or fails where a test says.

    die_after and hang_after count steps; tokens of the last step before are made but cannot be fetched any more.
    token: replaces fake_token. capacity: sequences that it takes before it raises CapacityError.
    """

    worker_id: str
    die_after: int | None = None
    hang_after: int | None = None
    capacity: int | None = None
    submit_error: Exception | None = None
    step_s: float = 0.001
    token: Callable[[Sequence[int], SamplingParams, int], int] = fake_token
    submitted: list[SequenceRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    poll_error: Exception | None = None
    cancel_error: Exception | None = None
    failed: str = ""
    unavailable: bool = False
    _live: dict[str, tuple[SequenceRequest, int]] = field(default_factory=dict)
    _events: list[TokenEvent] = field(default_factory=list)
    _num_steps: int = 0
    _task: "asyncio.Task[None] | None" = None

    @property
    def dead(self) -> bool:
        """Whether all calls fail."""
        return self.die_after is not None and self._num_steps >= self.die_after

    @property
    def hung(self) -> bool:
        """Whether all calls wait; they go on when the test sets hang_after to None."""
        return self.hang_after is not None and self._num_steps >= self.hang_after

    @property
    def live_ids(self) -> list[str]:
        """Sequences in the batch."""
        return list(self._live)

    async def submit(self, requests: list[SequenceRequest]) -> None:
        """Take sequences; the fakes' own errors first."""
        await self._gate()
        if self.submit_error is not None:
            raise self.submit_error
        if self.capacity is not None and len(self._live) + len(requests) > self.capacity:
            raise CapacityError(f"{self.worker_id} is full with {len(self._live)} sequences")
        self.submitted.extend(requests)
        self._live.update({request.sequence_id: (request, len(request.output_ids)) for request in requests})
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def cancel(self, sequence_ids: list[str]) -> None:
        """Drop sequences."""
        await self._gate()
        if self.cancel_error is not None:
            raise self.cancel_error
        self.cancelled.extend(sequence_ids)
        for sequence_id in sequence_ids:
            self._live.pop(sequence_id, None)

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        """Wait for new events as a long poll does, a short one."""
        for _ in range(20):
            await asyncio.sleep(self.step_s)
            await self._gate()
            if self.poll_error is not None:
                raise self.poll_error
            if len(self._events) > after:
                break
        return len(self._events), self._events[after:]

    def kill(self) -> None:
        """Die now."""
        self.die_after = 0

    async def _gate(self) -> None:
        if self.dead:
            raise UnavailableError(f"{self.worker_id} died")
        while self.hung:  # noqa: ASYNC110 - a test ends it by setting hang_after
            await asyncio.sleep(self.step_s)

    async def _run(self) -> None:
        while self._live and not self.dead and not self.hung:
            await asyncio.sleep(self.step_s)
            self._num_steps += 1
            # What is made in the step in which it dies never leaves it: poll raises before it looks.
            for sequence_id, (request, position) in list(self._live.items()):
                self._events.append(self._event(sequence_id, request, position))
                self._live[sequence_id] = (request, position + 1)
                if self._events[-1].finish_reason is not None:
                    del self._live[sequence_id]

    def _event(self, sequence_id: str, request: SequenceRequest, position: int) -> TokenEvent:
        if self.failed:
            return TokenEvent(
                sequence_id=sequence_id,
                index=position,
                token_id=None,
                finish_reason=FinishReason.ERROR,
                error=self.failed,
                unavailable=self.unavailable,
            )
        sampling = request.sampling
        token_id = self.token(request.prompt_ids, sampling, position)
        finish_reason = None
        if token_id in sampling.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif position + 1 == sampling.max_tokens:
            finish_reason = FinishReason.LENGTH
        wanted = sampling.logprobs
        return TokenEvent(
            sequence_id=sequence_id,
            index=position,
            token_id=token_id,
            logprob=None if wanted is None else 0.25 * -position,
            top_logprobs=tuple(TokenLogprob(token_id=other, logprob=float(-other)) for other in range(wanted or 0)),
            finish_reason=finish_reason,
        )


class FakeOperations:
    """Operations that end at the second look, save drains of "shard-9", which roll back."""

    def __init__(self) -> None:
        self.begun: list[dict[str, object]] = []
        self.record = b"a placement"

    async def scale(self, shards: int | None, workers: int | None) -> dict[str, object]:
        if shards == 99:
            raise ConflictError("op-0 is under way: drain shard-1")
        return self._begin(f"scale to {shards} shards and {workers} workers")

    async def drain(self, member: str) -> dict[str, object]:
        if member not in ("shard-1", "shard-9"):
            raise InputError(f"there is no {member!r}")
        return self._begin(f"drain {member}")

    async def rebalance(self, dry_run: bool) -> dict[str, object]:
        plan: dict[str, object] = {
            "moves": [{"layer": 1, "expert": 5, "source": "shard-0", "target": "shard-1"}],
            "bytes_moved": 4096,
            "balancedness_before": 0.5,
            "balancedness_after": 0.75,
            "gain_s": 10.0,
            "cost_s": 0.5,
            "is_worthwhile": True,
            "reason": "saves a third",
        }
        return plan if dry_run else {**plan, "operation": self._begin("rebalance")}

    async def placement_record(self) -> bytes:
        return self.record

    async def load_placement(self, record: bytes) -> dict[str, object]:
        if record != self.record:
            raise InputError("not a placement record")
        return self._begin("load placement")

    async def operations(self, operation_id: str) -> list[dict[str, object]]:
        for operation in self.begun:
            rolled_back = operation["request"] == "drain shard-9"
            operation.update(phase="ROLLED_BACK" if rolled_back else "DONE", ended_s=12.5)
            operation["error"] = "it died" if rolled_back else ""
        return [operation for operation in self.begun if operation_id in ("", operation["id"])]

    def _begin(self, request: str) -> dict[str, object]:
        self.begun.append(
            {"id": f"op-{len(self.begun) + 1}", "request": request, "phase": "PREPARE", "adding": ["shard-2"]}
            | {"progress": "starting shard-2", "started_s": 10.0}
        )
        return dict(self.begun[-1])
