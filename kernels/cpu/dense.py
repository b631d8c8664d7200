"""The dense half of a decoder layer on CPU, bf16: attention, what is around it, and the router in one compiled call.

Shape suffixes: T rows (tokens of a step), H hidden, A attention heads, G KV heads, D head size, R rotated elements of
a head, N sequences, P pages, E experts, K choices a token.
"""

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from expertmesh.kernels.cpu.isa import Isa
from expertmesh.kernels.cpu.linear import PackedLinear, at, how, library

_LANES = 16  # of a vector
_MOST_SHARED_HEADS, _MOST_HEAD_SIZE = 16, 256


class QkNorm(IntEnum):
    """What of a query or a key is normalised before it is rotated."""

    NONE = 0
    EACH_HEAD = 1
    ALL_HEADS = 2


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """What one layer's attention is made of, bf16, with the norms before and after it.

    The norms are RMS norms with their epsilons; scale, window (tokens; None: all), softcap and sinks_A (float32) are
    those of `paged_attention.AttentionOptions`.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_H: Tensor
    norm_epsilon: float
    qkv: PackedLinear
    qk_norm: QkNorm
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_epsilon: float
    out: PackedLinear
    next_norm_H: Tensor
    next_epsilon: float
    scale: float
    window: int | None
    softcap: float | None
    sinks_A: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Router:
    """Chooses a token's experts: softmax in float32 over bf16 scores, the largest top_k; ties as `torch.topk` on a CPU.

    linear: has an output for each expert, and others behind them up to a multiple of 32. normalise: the chosen ones'
    weights add up to 1. rounded: to bf16.
    """

    linear: PackedLinear
    num_experts: int
    top_k: int
    normalise: bool
    rounded: bool


def can_attend(num_heads: int, num_kv_heads: int, head_size: int, rope_size: int) -> bool:
    """Say whether the kernel has room for heads like these."""
    return (
        head_size % _LANES == 0
        and head_size <= _MOST_HEAD_SIZE
        and rope_size <= head_size
        and rope_size % (2 * _LANES) == 0
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= _MOST_SHARED_HEADS
    )


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """What all layers need to know of a step.

    write_T: cache row of each token. sequence_T: its sequence's row in pages_NP. length_T: keys it attends to, itself
    the last. All int64. query_TAD and attended_TAD: what the layers write; they follow each other. scores_TO (bf16, one
    for each output of the router's linear layer), ids_TK (int64) and weights_TK (float32): what routers write.
    """

    cos_TR: Tensor
    sin_TR: Tensor
    write_T: Tensor
    sequence_T: Tensor
    length_T: Tensor
    pages_NP: Tensor
    query_TAD: Tensor
    attended_TAD: Tensor
    scores_TO: Tensor | None = None
    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None

    @cached_property
    def record(self) -> "_Step":
        """The same as the library reads it; a layer fills in what it reads and writes."""
        return _Step(
            rows=self.write_T.shape[0],
            most_pages=self.pages_NP.shape[1],
            **{
                name: at(tensor)
                for name, tensor in (
                    ("cos", self.cos_TR),
                    ("sin", self.sin_TR),
                    ("write_T", self.write_T),
                    ("sequence_T", self.sequence_T),
                    ("length_T", self.length_T),
                    ("pages", self.pages_NP),
                    ("query", self.query_TAD),
                    ("attended", self.attended_TAD),
                    ("scores", self.scores_TO),
                    ("ids", self.ids_TK),
                    ("weights", self.weights_TK),
                )
            },
        )


class AttentionLayer:
    """One layer's attention over its paged cache, from the norm before it to the norm and the router behind it."""

    def __init__(
        self,
        weights: AttentionWeights,
        keys_CGD: Tensor,
        values_CGD: Tensor,
        page_size: int,
        rope_size: int,
        router: Router | None = None,
    ) -> None:
        """Lay out a layer; the cache's tensors are kept and written to. router: None: something else comes next."""
        self.weights = weights
        self.router = router
        self._kept = (keys_CGD, values_CGD)  # the structure below holds addresses alone
        self.num_heads = weights.num_heads
        self.head_size = weights.head_size
        self.rope_size = rope_size
        self._router = None if router is None else _router(router)
        self._layer = _Layer(
            hidden=weights.norm_H.numel(),
            heads=weights.num_heads,
            kv_heads=weights.num_kv_heads,
            head_size=weights.head_size,
            rope_size=rope_size,
            page_size=page_size,
            window=weights.window or 0,
            qk_norm=weights.qk_norm,
            eps=weights.norm_epsilon,
            qk_eps=weights.qk_epsilon,
            next_eps=weights.next_epsilon,
            scale=weights.scale,
            softcap=weights.softcap or 0.0,
            norm=at(weights.norm_H),
            qkv=at(weights.qkv.weight),
            qkv_bias=at(weights.qkv.bias_O),
            q_norm=at(weights.q_norm),
            k_norm=at(weights.k_norm),
            out=at(weights.out.weight),
            out_bias=at(weights.out.bias_O),
            next_norm=at(weights.next_norm_H),
            sinks=at(weights.sinks_A),
            keys=at(keys_CGD),
            values=at(values_CGD),
            router=None if self._router is None else ctypes.addressof(self._router),
        )

    def run(
        self,
        x_TH: Tensor,
        step: AttentionStep,
        isa: Isa | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer's attention, and write the step's keys and values; with a router its ids and weights too.

        Args:
            x_TH: bf16, contiguous.
            step: where its rows belong.
            isa: instruction set; None: the best.

        Returns:
            bf16 [T, H] each: x plus the attention's output, and that normalised for what comes next.
        """
        assert x_TH.is_contiguous(), "rows must follow each other"
        assert x_TH.shape[0] == step.write_T.shape[0], "a step of another number of rows"
        assert self.router is None or self._has_room(step), "a step without room for what the router chooses"
        residual_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        record = step.record
        record.x, record.residual, record.normed = x_TH.data_ptr(), residual_TH.data_ptr(), normed_TH.data_ptr()
        library().dense_layer(ctypes.byref(self._layer), ctypes.byref(record), *how(isa))
        return residual_TH, normed_TH

    @property
    def address(self) -> int:
        """Where the layer's record is, for other compiled code; valid as long as this object."""
        return ctypes.addressof(self._layer)

    def _has_room(self, step: AttentionStep) -> bool:
        tensors, router, rows = (step.scores_TO, step.ids_TK, step.weights_TK), self.router, step.write_T.shape[0]
        assert router is not None
        sizes = router.linear.num_outputs, router.top_k, router.top_k
        return all(t is not None and t.shape == (rows, n) for t, n in zip(tensors, sizes, strict=True))


class _Router(ctypes.Structure):
    """Router of dense.cpp."""

    _fields_ = tuple((n, ctypes.c_int64) for n in ("experts", "outs", "top_k", "normalise", "rounded")) + tuple(
        (n, ctypes.c_void_p) for n in ("weight", "bias")
    )


def _router(router: Router) -> _Router:
    return _Router(
        experts=router.num_experts,
        outs=router.linear.num_outputs,
        top_k=router.top_k,
        normalise=router.normalise,
        rounded=router.rounded,
        weight=at(router.linear.weight),
        bias=at(router.linear.bias_O),
    )


class _Layer(ctypes.Structure):
    """Layer of dense.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("hidden", "heads", "kv_heads", "head_size", "rope_size", "page_size", "window")]
        + [("qk_norm", ctypes.c_int64)]
        + [(n, ctypes.c_float) for n in ("eps", "qk_eps", "next_eps", "scale", "softcap", "unused")]
        + [(n, ctypes.c_void_p) for n in ("norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias")]
        + [(n, ctypes.c_void_p) for n in ("next_norm", "sinks", "keys", "values", "router")]
    )


class _Step(ctypes.Structure):
    """Step of dense.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("rows", "most_pages")]
        + [(n, ctypes.c_void_p) for n in ("x", "cos", "sin", "write_T", "sequence_T", "length_T", "pages")]
        + [(n, ctypes.c_void_p) for n in ("query", "attended", "residual", "normed", "scores", "ids", "weights")]
    )
