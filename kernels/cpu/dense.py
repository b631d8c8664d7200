"""The dense half of a decoder layer on CPU, bf16: packed linear layers, and a layer's whole attention in one call.

Shape suffixes: T rows (tokens of a step), H hidden, I input, O output, A attention heads, G KV heads, D head size, R
rotated elements of a head, N sequences, P pages.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_dense, load_expert_mlp
from expertmesh.kernels.cpu.expert_mlp import pack_matrix
from expertmesh.kernels.cpu.huge_pages import empty_bf16
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import num_threads

# Of a block of packed weights, and of a vector.
_BLOCK, _LANES = 32, 16
_MOST_SHARED_HEADS, _MOST_HEAD_SIZE = 16, 256


class QkNorm(IntEnum):
    """What of a query or a key is normalised before it is rotated."""

    NONE = 0
    EACH_HEAD = 1
    ALL_HEADS = 2


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """A linear layer whose weights are packed once: x W^T + b."""

    weight: Tensor
    bias_O: Tensor | None
    num_inputs: int
    num_outputs: int

    def __call__(self, x: Tensor, isa: Isa | None = None) -> Tensor:
        """Return [..., O] for [..., I], bf16. isa: instruction set; None: the best."""
        x_TI = x.reshape(-1, self.num_inputs).contiguous()
        out = torch.empty((*x.shape[:-1], self.num_outputs), dtype=torch.bfloat16)
        if x_TI.shape[0]:
            _library().dense_linear(
                _at(x_TI),
                ctypes.c_int64(x_TI.shape[0]),
                ctypes.c_int64(self.num_inputs),
                _at(self.weight),
                _at(self.bias_O),
                ctypes.c_int64(self.num_outputs),
                _at(out),
                *_how(isa),
            )
        return out


def can_pack_linear(weight_OI: Tensor) -> bool:
    """Say whether the kernel can do a linear layer with these weights."""
    return (
        weight_OI.dtype == torch.bfloat16
        and weight_OI.device.type == "cpu"
        and not any(size % _BLOCK for size in weight_OI.shape)
        and load_expert_mlp() is not None
        and load_dense() is not None
    )


def pack_linear(weights_OI: Sequence[Tensor], biases_O: Sequence[Tensor | None] = (None,)) -> PackedLinear:
    """Pack one linear layer, or several of the same input as one whose outputs follow each other."""
    num_inputs, num_outputs = weights_OI[0].shape[1], sum(weight.shape[0] for weight in weights_OI)
    (packed,) = empty_bf16([num_inputs * num_outputs])
    start = 0
    for weight_OI in weights_OI:
        pack_matrix(weight_OI, packed[start : start + weight_OI.numel()])
        start += weight_OI.numel()
    biases = [bias for bias in biases_O if bias is not None]
    assert len(biases) in (0, len(weights_OI)), "some of the joined layers have no bias"
    bias_O = torch.cat(biases) if biases else None
    return PackedLinear(weight=packed, bias_O=bias_O, num_inputs=num_inputs, num_outputs=num_outputs)


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
    the last. All int64. query_TAD and attended_TAD: what the layers write; they follow each other.
    """

    cos_TR: Tensor
    sin_TR: Tensor
    write_T: Tensor
    sequence_T: Tensor
    length_T: Tensor
    pages_NP: Tensor
    query_TAD: Tensor
    attended_TAD: Tensor


class AttentionLayer:
    """One layer's attention over its paged cache: norm, projections, rotation, attention, residual, next norm."""

    def __init__(
        self, weights: AttentionWeights, keys_CGD: Tensor, values_CGD: Tensor, page_size: int, rope_size: int
    ) -> None:
        """Lay out a layer; the cache's tensors are kept and written to."""
        self.weights = weights
        self._kept = (keys_CGD, values_CGD)  # the structure below holds addresses alone
        self.num_heads = weights.num_heads
        self.head_size = weights.head_size
        self.rope_size = rope_size
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
            norm=_at(weights.norm_H),
            qkv=_at(weights.qkv.weight),
            qkv_bias=_at(weights.qkv.bias_O),
            q_norm=_at(weights.q_norm),
            k_norm=_at(weights.k_norm),
            out=_at(weights.out.weight),
            out_bias=_at(weights.out.bias_O),
            next_norm=_at(weights.next_norm_H),
            sinks=_at(weights.sinks_A),
            keys=_at(keys_CGD),
            values=_at(values_CGD),
        )

    def run(
        self,
        x_TH: Tensor,
        step: AttentionStep,
        isa: Isa | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer's attention, and write the step's keys and values.

        Args:
            x_TH: bf16, contiguous.
            step: where its rows belong.
            isa: instruction set; None: the best.

        Returns:
            bf16 [T, H] each: x plus the attention's output, and that normalised for what comes next.
        """
        assert x_TH.is_contiguous(), "rows must follow each other"
        assert x_TH.shape[0] == step.write_T.shape[0], "a step of another number of rows"
        residual_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        call = _Step(
            rows=x_TH.shape[0],
            most_pages=step.pages_NP.shape[1],
            x=_at(x_TH),
            cos=_at(step.cos_TR),
            sin=_at(step.sin_TR),
            write_T=_at(step.write_T),
            sequence_T=_at(step.sequence_T),
            length_T=_at(step.length_T),
            pages=_at(step.pages_NP),
            query=_at(step.query_TAD),
            attended=_at(step.attended_TAD),
            residual=_at(residual_TH),
            normed=_at(normed_TH),
        )
        _library().dense_layer(ctypes.byref(self._layer), ctypes.byref(call), *_how(isa))
        return residual_TH, normed_TH


class _Layer(ctypes.Structure):
    """Layer of dense.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("hidden", "heads", "kv_heads", "head_size", "rope_size", "page_size", "window")]
        + [("qk_norm", ctypes.c_int64)]
        + [(n, ctypes.c_float) for n in ("eps", "qk_eps", "next_eps", "scale", "softcap", "unused")]
        + [(n, ctypes.c_void_p) for n in ("norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias")]
        + [(n, ctypes.c_void_p) for n in ("next_norm", "sinks", "keys", "values")]
    )


class _Step(ctypes.Structure):
    """Step of dense.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("rows", "most_pages")]
        + [(n, ctypes.c_void_p) for n in ("x", "cos", "sin", "write_T", "sequence_T", "length_T", "pages")]
        + [(n, ctypes.c_void_p) for n in ("query", "attended", "residual", "normed")]
    )


def _library() -> ctypes.CDLL:
    library = load_dense()
    assert library is not None, "packed layers without a compiled kernel"
    return library


def _how(isa: Isa | None) -> tuple[ctypes.c_int, ctypes.c_int]:
    return ctypes.c_int(best_isa() if isa is None else isa), ctypes.c_int(num_threads())


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
