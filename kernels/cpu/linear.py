"""Linear layers on CPU, bf16, of weights that are packed once; and how the dense half's compiled functions are called.

Shape suffixes: T rows, I input, O output.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_dense, load_expert_mlp
from expertmesh.kernels.cpu.expert_mlp import pack_matrix
from expertmesh.kernels.cpu.huge_pages import empty_bf16
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import num_threads

_BLOCK = 32  # inputs, and outputs, of a block of packed weights


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
            library().dense_linear(
                at(x_TI),
                ctypes.c_int64(x_TI.shape[0]),
                ctypes.c_int64(self.num_inputs),
                at(self.weight),
                at(self.bias_O),
                ctypes.c_int64(self.num_outputs),
                at(out),
                *how(isa),
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


def padded_outputs(num_outputs: int) -> int:
    """Return how many outputs a linear layer has once rows of zeros make it one that can be packed."""
    return -(-num_outputs // _BLOCK) * _BLOCK


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


def library() -> ctypes.CDLL:
    """Return the compiled dense half, without which nothing is packed."""
    compiled = load_dense()
    assert compiled is not None, "packed layers without a compiled kernel"
    return compiled


def how(isa: Isa | None) -> tuple[ctypes.c_int, ctypes.c_int]:
    """Return the last two arguments of the library's functions: instruction set (None: the best) and threads."""
    return ctypes.c_int(best_isa() if isa is None else isa), ctypes.c_int(num_threads())


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's elements are; null of None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
