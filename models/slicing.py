"""An expert cut across its width: slices that are experts themselves, and whose outputs add up to its own.

Tensor parallelism of experts needs nothing else: activations work on each unit of the width by itself, so
down(act(up(x))) is the sum over slices of down_s(act(up_s(x))). A slice is placed, copied and computed as an expert is.

Shape suffixes: U up-projection width (2W with a gate, W without), W expert width, H hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.cluster.model_info import require_divisible

_UP = ("gate_up_proj", "up_proj")


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """How the experts of a layer are cut: in expert_tp slices of equal width.

    is_transposed: matrices are stored [in, out]. has_gate: the up projection holds gates and values, the gates first
    or, if is_interleaved, in turns.
    """

    expert_tp: int
    is_transposed: bool = False
    has_gate: bool = True
    is_interleaved: bool = False

    def shapes(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Return the shapes of a slice's parameters, given the expert's, by name.

        Raises:
            InputError: the width cannot be divided so.
        """
        require_divisible(self.width(shapes), self.expert_tp)
        whole = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tensor.shape for name, tensor in self.cut(whole, 0).items()}

    def width(self, shapes: Mapping[str, torch.Size]) -> int:
        """Return the width of the expert, given its parameters' shapes by name."""
        return shapes["down_proj"][0 if self.is_transposed else 1]

    def cut(self, tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Return the parameters of slice `index` of an expert, by name; they may share its memory."""
        return {name: self._cut(name, tensor, index) for name, tensor in tensors.items()}

    def _cut(self, name: str, tensor: Tensor, index: int) -> Tensor:
        if name == "down_proj_bias":  # added once: it is no part of the sum over the width
            return tensor if index == 0 else torch.zeros_like(tensor)
        is_up = name.removesuffix("_bias") in _UP
        dim = 0 if tensor.dim() == 1 or is_up != self.is_transposed else 1
        if is_up and self.has_gate and not self.is_interleaved:
            return torch.cat([self._part(half, dim, index) for half in tensor.chunk(2, dim)], dim)
        return self._part(tensor, dim, index)

    def _part(self, tensor: Tensor, dim: int, index: int) -> Tensor:
        size = tensor.shape[dim] // self.expert_tp
        return tensor.narrow(dim, index * size, size)


def slicing_of(module: Any, expert_tp: int) -> Slicing:
    """Return how the experts of an experts module are cut; the flags are those of transformers' experts interface."""
    return Slicing(
        expert_tp=expert_tp,
        is_transposed=bool(module.is_transposed),
        has_gate=bool(module.has_gate),
        is_interleaved=not module.is_concatenated,
    )
