"""Running one step of the dense half.

All sequences of a step are flattened into one batch over the paged cache; families that keep transformers' own cache
run one sequence a step.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertmesh.cluster.scheduler import Chunk
from expertmesh.kernels.paged_attention import ChunkSpan, PagedKVCache, step_layout
from expertmesh.models import hooks
from expertmesh.models.cpu_decoder import speed_up_layers
from expertmesh.models.cpu_linears import pack_linears
from expertmesh.models.deterministic import known_operators

_log = logging.getLogger(__name__)


class StepRunner(ABC):
    """Computes the chunks of a step."""

    @abstractmethod
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step.

        Returns:
            Logits [N, V] of the N chunks that sample, in the order of the chunks.
        """

    @abstractmethod
    def forget(self, sequence_id: str) -> None:
        """Let go of what is kept for a sequence; unknown ids are passed over."""


class PagedRunner(StepRunner):
    """Runs a model whose attention layers keep their keys and values in one paged cache."""

    def __init__(
        self, model: PreTrainedModel, page_size: int, device: torch.device, *, deterministic: bool = False
    ) -> None:
        """Attach a cache to the model; `allocate` must be called before the first `run`.

        Args:
            model: the dense half; its experts must be attached already, as the probe runs them.
            page_size: tokens a page.
            device: where the model is.
            deterministic: have a token's logits be the same to the bit in every batch; within `deterministic_math`.

        Raises:
            UnsupportedModelError: the model cannot be deterministic.
        """
        self._model = model
        self._device = device
        self.num_compiled = 0  # layers whose attention runs in one compiled call
        self._cache = PagedKVCache(page_size=page_size, device=device, is_invariant=deterministic)
        hooks.attach_cache(model, self._cache)
        with known_operators() if deterministic else nullcontext():
            self._probe()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes in all layers."""
        return self._cache.bytes_per_token

    def allocate(self, num_pages: int) -> None:
        """Take memory for num_pages pages; on a CPU the layers that can be are compiled then."""
        self._cache.allocate(num_pages)
        if self._device.type == "cpu" and not self._cache.is_invariant:
            with torch.inference_mode():
                self.num_compiled = speed_up_layers(self._model, self._cache, self.run)
            pack_linears(self._model)
            _log.info("%d layers run compiled attention", self.num_compiled)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See StepRunner.run."""
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        spans: list[ChunkSpan] = []
        for chunk in chunks:
            length = len(chunk.token_ids)
            spans.append(ChunkSpan(start=len(token_ids), length=length, context=chunk.start, pages=chunk.pages))
            token_ids += chunk.token_ids
            positions += range(chunk.start, chunk.start + length)
            if chunk.samples:
                last_rows.append(len(token_ids) - 1)
        self._cache.layout = step_layout(tuple(spans), self._cache.page_size, self._device)
        return self._forward(token_ids, positions, last_rows)

    def forget(self, sequence_id: str) -> None:
        """Pages are the scheduler's; there is nothing to let go of."""

    def _forward(self, token_ids: list[int], positions: list[int], last_rows: list[int]) -> Tensor:
        # logits_to_keep may not be empty: a step that samples nothing keeps one row and drops it.
        keep = torch.tensor(last_rows or [0], device=self._device)
        output = self._model(
            torch.tensor([token_ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=keep,
        )
        logits_NV: Tensor = output.logits[0][: len(last_rows)]
        return logits_NV

    def _probe(self) -> None:
        """Run one token, so that the cache learns each layer's shapes."""
        with torch.inference_mode():
            self._forward([0], [0], [0])


class OwnCacheRunner(StepRunner):
    """Runs a family with linear, state-space or indexed attention: each sequence has a cache of transformers."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._caches: dict[str, Any] = {}

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See StepRunner.run; a chunk holds the whole prompt or one token."""
        rows = [self._step(chunk) for chunk in chunks]
        return torch.cat([row for row, chunk in zip(rows, chunks, strict=True) if chunk.samples])

    def forget(self, sequence_id: str) -> None:
        """See StepRunner.forget."""
        self._caches.pop(sequence_id, None)

    def _step(self, chunk: Chunk) -> Tensor:
        positions = torch.arange(chunk.start, chunk.start + len(chunk.token_ids), device=self._device)
        output = self._model(
            torch.tensor([chunk.token_ids], device=self._device),
            position_ids=positions.unsqueeze(0),
            past_key_values=self._caches.get(chunk.sequence_id) if chunk.start else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self._caches[chunk.sequence_id] = output.past_key_values
        logits_1V: Tensor = output.logits[:, -1]
        return logits_1V
