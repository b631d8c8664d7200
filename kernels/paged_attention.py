"""Paged KV cache and attention over a flattened batch of sequences of unlike lengths.

Shape suffixes: T tokens of a step (all sequences one after another), N sequences, Q a sequence's new tokens, L a
context's length, A attention heads, G KV heads, D key size, V value size, C cache rows (pages times page size).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.invariant_attention import invariant_attention

# Queries whose logits are in memory at once, where the whole chunk's are not left to torch.
_QUERIES_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one layer keeps for a token: G heads of a key of D and a value of V elements."""

    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in this layer."""
        return self.num_heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ChunkSpan:
    """One sequence's part of a step: rows [start, start + length) of the batch, after context tokens in the cache.

    pages are the sequence's pages; they cover context + length tokens.
    """

    start: int
    length: int
    context: int
    pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Where each token of a step goes in the cache, and what each sequence may look at.

    Made once a step, used by all layers. write_T: cache row of each token. For kernels that go by row: sequence_T, each
    row's place in pages_NP (padded with 0), and length_T, how many tokens it attends to, itself the last. The rest is
    made for the layers that ask for it.
    """

    spans: tuple[ChunkSpan, ...]
    page_size: int
    write_T: Tensor
    sequence_T: Tensor
    length_T: Tensor
    pages_NP: Tensor

    @cached_property
    def decode_rows_N(self) -> Tensor:  # noqa: N802  # a shape suffix
        """Rows in the batch of the sequences with one new token, which are taken together."""
        return self._tensor([s.start for s in self._decodes])

    @cached_property
    def decode_length_N(self) -> Tensor:  # noqa: N802  # a shape suffix
        """How many tokens each of them attends to."""
        return self._tensor([s.context + 1 for s in self._decodes])

    @cached_property
    def decode_read_NL(self) -> Tensor:  # noqa: N802  # a shape suffix
        """Their cache rows, padded to the longest."""
        lengths = [s.context + 1 for s in self._decodes]
        read_NL = torch.zeros((len(lengths), max(lengths, default=0)), dtype=torch.int64)
        for n, (span, length) in enumerate(zip(self._decodes, lengths, strict=True)):
            rows_L = self._cache_rows(span)
            # Padded with its own first row: masked weights are zero, but zero times a NaN of another sequence is not.
            read_NL[n] = rows_L[0]
            read_NL[n, :length] = rows_L
        return read_NL.to(self.write_T.device)

    @cached_property
    def prefill(self) -> tuple[tuple[ChunkSpan, Tensor], ...]:
        """The other sequences, with their cache rows [L]."""
        return tuple((s, self._cache_rows(s).to(self.write_T.device)) for s in self.spans if s.length > 1)

    @cached_property
    def _decodes(self) -> list[ChunkSpan]:
        return [s for s in self.spans if s.length == 1]

    def _cache_rows(self, span: ChunkSpan) -> Tensor:
        pages = torch.tensor(span.pages).unsqueeze(1) * self.page_size
        return (pages + torch.arange(self.page_size)).flatten()[: span.context + span.length]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.write_T.device)


def step_layout(spans: tuple[ChunkSpan, ...], page_size: int, device: torch.device) -> StepLayout:
    """Lay out a step over pages of page_size tokens."""
    counts_N = np.array([s.length for s in spans])
    sequence_T = np.repeat(np.arange(len(spans)), counts_N)
    # A row's position: its sequence's context, and how many rows of the sequence are before it.
    first_N = np.cumsum(counts_N) - counts_N
    contexts_N = np.array([s.context for s in spans])
    position_T = np.arange(len(sequence_T)) + (contexts_N - first_N)[sequence_T]
    pages_NP = np.zeros((len(spans), max(len(s.pages) for s in spans)), dtype=np.int64)
    for n, span in enumerate(spans):
        pages_NP[n, : len(span.pages)] = span.pages
    write_T = pages_NP[sequence_T, position_T // page_size] * page_size + position_T % page_size
    tensors = (torch.from_numpy(array).to(device) for array in (write_T, sequence_T, position_T + 1, pages_NP))
    write, sequence, length, pages = tensors
    return StepLayout(
        spans=spans, page_size=page_size, write_T=write, sequence_T=sequence, length_T=length, pages_NP=pages
    )


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How a layer attends: softmax scale, window in tokens (None: all), logit soft cap, a sink logit per head [A]."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_A: Tensor | None = None


# (query, key, value, allowed, options) -> output; see _attention.
_Attention = Callable[[Tensor, Tensor, Tensor, Tensor, AttentionOptions], Tensor]


@dataclass
class PagedKVCache:
    """The KV cache of all layers of one model.

    Before `allocate` it is in probe mode: attention runs over the new tokens alone and notes each layer's shapes, so
    that no family's head layout need be known in advance: shapes and options are what it saw of each layer.
    is_invariant: a token's result is to be the same to the bit whatever else is in its step, and however its sequence
    is cut into steps.
    """

    page_size: int
    device: torch.device
    is_invariant: bool = False
    shapes: dict[int, KVShape] = field(default_factory=dict)
    options: dict[int, AttentionOptions] = field(default_factory=dict)
    layout: StepLayout | None = None
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_pages(self) -> int:
        """Pages there is memory for; 0 before `allocate`."""
        return len(next(iter(self._keys.values()))) // self.page_size if self._keys else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in all layers."""
        return sum(shape.bytes_per_token for shape in self.shapes.values())

    def allocate(self, num_pages: int) -> None:
        """Take memory for num_pages pages in every layer that the probe saw."""
        assert self.shapes, "allocate() before any probe forward"
        rows = num_pages * self.page_size
        # Not cleared: a row is written before it is read, and memory that no sequence ever used is never taken.
        for layer, shape in self.shapes.items():
            key_size = (rows, shape.num_heads, shape.key_size)
            value_size = (rows, shape.num_heads, shape.value_size)
            self._keys[layer] = torch.empty(key_size, dtype=shape.dtype, device=self.device)
            self._values[layer] = torch.empty(value_size, dtype=shape.dtype, device=self.device)

    def attend(
        self, layer: int, query_1ATD: Tensor, key_1GTD: Tensor, value_1GTV: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Write the step's keys and values, and attend over each sequence's own context.

        Returns:
            [1, T, A, V], dtype of the query.
        """
        query_TAD, key_TGD, value_TGV = (x[0].transpose(0, 1) for x in (query_1ATD, key_1GTD, value_1GTV))
        if layer not in self._keys:
            self.options[layer] = options
            self.shapes[layer] = KVShape(
                num_heads=key_TGD.shape[1],
                key_size=key_TGD.shape[2],
                value_size=value_TGV.shape[2],
                dtype=value_TGV.dtype,
            )
            return self._attend_chunk(query_TAD, key_TGD, value_TGV, 0, options).unsqueeze(0)
        assert self.layout is not None, "attend() without a step layout"
        layout, keys_CGD, values_CGV = self.layout, self._keys[layer], self._values[layer]
        keys_CGD.index_copy_(0, layout.write_T, key_TGD.to(keys_CGD.dtype))
        values_CGV.index_copy_(0, layout.write_T, value_TGV)
        out_TAV = query_TAD.new_empty((query_TAD.shape[0], query_TAD.shape[1], value_TGV.shape[2]))
        if layout.decode_rows_N.numel():
            rows_N, read_NL = layout.decode_rows_N, layout.decode_read_NL
            out_TAV[rows_N] = _attend_decode(
                query_TAD[rows_N],
                _gather(keys_CGD, read_NL),
                _gather(values_CGV, read_NL),
                layout.decode_length_N,
                options,
                invariant_attention if self.is_invariant else _attention,
            )
        for span, read_L in layout.prefill:
            end = span.start + span.length
            out_TAV[span.start : end] = self._attend_chunk(
                query_TAD[span.start : end],
                _gather(keys_CGD, read_L),
                _gather(values_CGV, read_L),
                span.context,
                options,
            )
        return out_TAV.unsqueeze(0)

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys [C, G, D] and values [C, G, V], for a kernel that reads and writes them itself."""
        return self._keys[layer], self._values[layer]

    def _attend_chunk(
        self, query_QAD: Tensor, key_LGD: Tensor, value_LGV: Tensor, context: int, options: AttentionOptions
    ) -> Tensor:
        if not self.is_invariant:
            return _attend_chunk(query_QAD, key_LGD, value_LGV, context, options, _attention)
        key_LGD, value_LGV = key_LGD.float(), value_LGV.float()
        parts = []
        for part_QAD in torch.split(query_QAD, _QUERIES_AT_ONCE):
            end = context + part_QAD.shape[0]
            parts.append(_attend_chunk(part_QAD, key_LGD[:end], value_LGV[:end], context, options, invariant_attention))
            context = end
        return torch.cat(parts)


def _gather(cache_CGX: Tensor, rows: Tensor) -> Tensor:
    """Return the cache rows of an index of any shape. On CPU index_select copies whole rows, cache[rows] elements."""
    return cache_CGX.flatten(1).index_select(0, rows.flatten()).view(*rows.shape, *cache_CGX.shape[1:])


def _attend_chunk(
    query_QAD: Tensor,
    key_LGD: Tensor,
    value_LGV: Tensor,
    context: int,
    options: AttentionOptions,
    attention: _Attention,
) -> Tensor:
    """Causal attention of Q new tokens, the first of them at position context, over L = context + Q keys."""
    positions_Q = torch.arange(context, context + query_QAD.shape[0], device=query_QAD.device)
    positions_L = torch.arange(key_LGD.shape[0], device=query_QAD.device)
    allowed_QL = positions_L <= positions_Q.unsqueeze(1)
    if options.window is not None:
        allowed_QL &= positions_L > positions_Q.unsqueeze(1) - options.window
    out_1AQV = attention(
        query_QAD.transpose(0, 1).unsqueeze(0),
        key_LGD.transpose(0, 1).unsqueeze(0),
        value_LGV.transpose(0, 1).unsqueeze(0),
        allowed_QL,
        options,
    )
    return out_1AQV[0].transpose(0, 1)


def _attend_decode(
    query_NAD: Tensor,
    key_NLGD: Tensor,
    value_NLGV: Tensor,
    length_N: Tensor,
    options: AttentionOptions,
    attention: _Attention,
) -> Tensor:
    """Attention of one new token a sequence over its own length_N keys."""
    positions_L = torch.arange(key_NLGD.shape[1], device=query_NAD.device)
    allowed_NL = positions_L < length_N.unsqueeze(1)
    if options.window is not None:
        allowed_NL &= positions_L >= length_N.unsqueeze(1) - options.window
    out_NA1V = attention(
        query_NAD.unsqueeze(2),
        key_NLGD.transpose(1, 2),
        value_NLGV.transpose(1, 2),
        allowed_NL[:, None, None, :],
        options,
    )
    return out_NA1V[:, :, 0]


def _attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, options: AttentionOptions) -> Tensor:
    """Masked attention of [N, A, Q, D] over [N, G, L, D] and [N, G, L, V]; A is a multiple of G."""
    if options.sinks_A is None and options.softcap is None:
        return F.scaled_dot_product_attention(
            query, key.to(query.dtype), value, attn_mask=allowed, scale=options.scale, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    logits = torch.matmul(query, key.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    logits = logits.masked_fill(~allowed, float("-inf"))
    if options.sinks_A is not None:
        # A sink is one more logit that takes part in the softmax and has no value (gpt_oss).
        sink = options.sinks_A.float().reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        return torch.matmul(torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1].to(value.dtype), value)
    return torch.matmul(torch.softmax(logits, dim=-1).to(value.dtype), value)
