"""The compiled attention of a model's layers over its paged cache, and what the layers share in a step.

Shape suffixes: T tokens of a step, A heads, D head size, R rotated elements, O outputs of a router, K choices a token.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.cpu.dense import AttentionLayer, AttentionStep
from expertmesh.kernels.paged_attention import PagedKVCache, StepLayout


class CompiledAttention:
    """The attention of all layers that were recognised, and what they share in a step."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        # What the step was made of; kept, so that nothing else can be taken for it.
        self._made_for: tuple[StepLayout, Tensor, int, tuple[int, int], tuple[int, int]] | None = None
        self._step: AttentionStep | None = None

    def run(self, attention: AttentionLayer, hidden_1TH: Tensor, rope: Any) -> tuple[Tensor, Tensor, AttentionStep]:
        """Run a layer's attention; see `AttentionLayer.run`. rope: cosines and sines [1, T, R]."""
        step = self.step(attention, rope)
        return (*attention.run(hidden_1TH[0].contiguous(), step), step)

    def step(self, attention: AttentionLayer, rope: Any) -> AttentionStep:
        """Return what the layers need to know of the cache's current step; made by the first that asks.

        Layers share it as long as they are of one shape and get the same cosines, which some families make by kind.
        """
        cos_1TR, sin_1TR = rope
        layout = self._cache.layout
        assert layout is not None, "a layer ran without a step layout"
        head_shape = (attention.num_heads, attention.head_size)
        router = attention.router
        router_shape = (0, 0) if router is None else (router.linear.num_outputs, router.top_k)
        made_for = (layout, cos_1TR, attention.rope_size, head_shape, router_shape)
        is_same = self._made_for is not None and all(
            a is b if isinstance(a, Tensor | StepLayout) else a == b
            for a, b in zip(made_for, self._made_for, strict=True)
        )
        if self._step is None or not is_same:
            rows = len(layout.sequence_T)
            size = (rows, *head_shape)
            self._made_for = made_for
            self._step = AttentionStep(
                cos_TR=_whole(cos_1TR, attention.rope_size),
                sin_TR=_whole(sin_1TR, attention.rope_size),
                write_T=layout.write_T,
                sequence_T=layout.sequence_T,
                length_T=layout.length_T,
                pages_NP=layout.pages_NP,
                query_TAD=torch.empty(size, dtype=torch.bfloat16),
                attended_TAD=torch.empty(size, dtype=torch.bfloat16),
                scores_TO=torch.empty((rows, router_shape[0]), dtype=torch.bfloat16),
                ids_TK=torch.empty((rows, router_shape[1]), dtype=torch.int64),
                weights_TK=torch.empty((rows, router_shape[1])),
            )
        return self._step


def _whole(rope_1TR: Tensor, rope_size: int) -> Tensor:
    """Return cosines or sines of every rotated element, float32 [T, R]; some families make them of half of these."""
    rope_TR = rope_1TR[0].float()
    return (rope_TR if rope_TR.shape[1] == rope_size else torch.cat([rope_TR, rope_TR], dim=1)).contiguous()
