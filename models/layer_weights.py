"""The weights of some experts of one layer, by slot, in the layout that computes: stacked for torch, packed for CPUs.

Shape suffixes: R rows, H hidden, P (row, slot) pairs, U up-projection width, W expert width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.cpu.expert_mlp import (
    Activation,
    PackedExpert,
    PackedSizes,
    PackedSlots,
    can_pack,
    pack_expert,
    recognise,
    unpack_expert,
)
from expertmesh.kernels.cpu.huge_pages import empty_bf16
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, grouped_mlp, grouped_mlp_pairs
from expertmesh.models.architecture import expert_math

# An expert's tensors by parameter name, as `CheckpointWeights.load_expert` returns them; or as the CPU kernel has them,
# for a layer that says of what sizes.
ExpertTensors = Mapping[str, Tensor] | PackedExpert
ReadExpert = Callable[[], ExpertTensors]
# The field of SlotWeights of each expert parameter of transformers.
_STORED_AS = {
    "gate_up_proj": "up_SUH",
    "up_proj": "up_SUH",
    "down_proj": "down_SHW",
    "gate_up_proj_bias": "up_bias_SU",
    "up_proj_bias": "up_bias_SU",
    "down_proj_bias": "down_bias_SH",
}


class LayerWeights(ABC):
    """Experts in slots 0, 1, ... Never changed but replaced: a computation goes on with what it began with."""

    @abstractmethod
    def run(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor, weight_P: Tensor) -> Tensor:
        """Return each row's weighted sum of its experts, float32 [R, H]; see `grouped_mlp`."""

    @abstractmethod
    def run_pairs(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        """Return each pair's output by itself, [P, H] in the dtype of the rows; see `grouped_mlp_pairs`."""

    @abstractmethod
    def grown(self, reads: Sequence[ReadExpert]) -> "LayerWeights":
        """Return these and new experts behind them, read one at a time; raises what a read raises."""

    @abstractmethod
    def kept(self, slots: Sequence[int]) -> "LayerWeights":
        """Return the experts of these slots alone, in that order."""

    @abstractmethod
    def expert(self, slot: int) -> dict[str, Tensor]:
        """Return an expert's tensors by parameter name, as they were read."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all weights."""

    @property
    def packed(self) -> PackedSlots | None:
        """The same experts as the CPU kernel takes them; None: they are not in its layout."""
        return None

    @property
    def packed_sizes(self) -> PackedSizes | None:
        """Of an expert in that layout; None: `grown` takes experts by parameter alone."""
        return None


def no_weights(module: Any, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> LayerWeights:
    """Return the weights of no expert, in the layout that suits a layer.

    Args:
        module: the layer's experts module.
        shapes: of one expert's parameters by name.
        dtype: of them.
        device: that computes.
    """
    math = expert_math(module)
    down = shapes["down_proj"]
    width, hidden = down if math.is_transposed else down[::-1]
    if math.post_norm is None and can_pack(hidden, width, dtype, device):
        # alpha, limit and the like are numbers that the module keeps.
        numbers = sorted({v for v in vars(module).values() if isinstance(v, float)})
        activation = recognise(math.activate, numbers)
        if activation is not None:
            return PackedWeights(PackedSlots((), hidden, width, activation), shapes, is_transposed=math.is_transposed)
    return StackedWeights(None, shapes, math, dtype, device)


class StackedWeights(LayerWeights):
    """One tensor for each parameter, the slots its first dimension: what torch computes with, on any device."""

    def __init__(
        self,
        weights: SlotWeights | None,
        shapes: Mapping[str, torch.Size],
        math: ExpertMath,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._weights = weights
        self._shapes = shapes
        self._math = math
        self._dtype = dtype
        self._device = device

    def run(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor, weight_P: Tensor) -> Tensor:
        """See LayerWeights."""
        assert self._weights is not None, "run() without experts"
        return grouped_mlp(rows_RH, row_P=row_P, slot_P=slot_P, weight_P=weight_P, slots=self._weights, math=self._math)

    def run_pairs(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        """See LayerWeights."""
        assert self._weights is not None, "run_pairs() without experts"
        return grouped_mlp_pairs(rows_RH, row_P=row_P, slot_P=slot_P, slots=self._weights, math=self._math)

    def grown(self, reads: Sequence[ReadExpert]) -> "StackedWeights":
        """See LayerWeights. All are copied once: that much memory is needed more."""
        old = self._named
        num_old = len(next(iter(old.values()))) if old else 0
        stacked = {
            _STORED_AS[name]: torch.empty((num_old + len(reads), *shape), dtype=self._dtype, device=self._device)
            for name, shape in self._shapes.items()
        }
        for slot, read in enumerate(reads, start=num_old):
            tensors = read()
            assert not isinstance(tensors, PackedExpert), "packed weights for a layer that computes with others"
            for name, tensor in tensors.items():
                stacked[_STORED_AS[name]][slot].copy_(tensor)
        for name, tensor in old.items():
            stacked[name][:num_old].copy_(tensor)
        return self._with(stacked)

    def kept(self, slots: Sequence[int]) -> "StackedWeights":
        """See LayerWeights. They are copied once."""
        index = torch.tensor(slots, device=self._device)
        return self._with({name: tensor.index_select(0, index) for name, tensor in self._named.items()})

    def expert(self, slot: int) -> dict[str, Tensor]:
        """See LayerWeights."""
        return {name: self._named[_STORED_AS[name]][slot] for name in self._shapes}

    @property
    def num_bytes(self) -> int:
        """See LayerWeights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._named.values())

    @property
    def _named(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        if self._weights is None:
            return {}
        named = {field.name: getattr(self._weights, field.name) for field in fields(self._weights)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _with(self, tensors: dict[str, Tensor]) -> "StackedWeights":
        return StackedWeights(SlotWeights(**tensors), self._shapes, self._math, self._dtype, self._device)


class PackedWeights(LayerWeights):
    """Each expert by itself in the CPU kernel's layout: one that comes or goes moves no other."""

    def __init__(self, slots: PackedSlots, shapes: Mapping[str, torch.Size], *, is_transposed: bool) -> None:
        self._slots = slots
        self._shapes = shapes
        self._is_transposed = is_transposed

    def run(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor, weight_P: Tensor) -> Tensor:
        """See LayerWeights."""
        return self._slots.run(rows_RH, row_P, slot_P, weight_P)

    def run_pairs(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        """See LayerWeights."""
        return self._slots.run(rows_RH, row_P, slot_P, None).to(rows_RH.dtype)

    def grown(self, reads: Sequence[ReadExpert]) -> "PackedWeights":
        """See LayerWeights."""
        size = sum(shape.numel() for shape in self._shapes.values() if len(shape) == 2)
        # All memory is mapped before any is used, see empty_bf16.
        packed = [self._pack(read(), into) for read, into in zip(reads, empty_bf16([size] * len(reads)), strict=True)]
        return self._with((*self._slots.experts, *packed))

    def kept(self, slots: Sequence[int]) -> "PackedWeights":
        """See LayerWeights."""
        return self._with([self._slots.experts[slot] for slot in slots])

    def expert(self, slot: int) -> dict[str, Tensor]:
        """See LayerWeights."""
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in self._shapes.items()}
        fields = self._by_field(tensors)
        unpack_expert(
            self._slots.experts[slot],
            fields["up_SUH"],
            fields["down_SHW"],
            self._activation,
            fields.get("up_bias_SU"),
            fields.get("down_bias_SH"),
        )
        return tensors

    @property
    def num_bytes(self) -> int:
        """See LayerWeights."""
        return sum(tensor.numel() * tensor.element_size() for expert in self._slots.experts for tensor in expert.parts)

    @property
    def packed(self) -> PackedSlots:
        """See LayerWeights."""
        return self._slots

    @property
    def packed_sizes(self) -> PackedSizes:
        """See LayerWeights."""
        sizes = {_STORED_AS[name]: shape.numel() for name, shape in self._shapes.items()}
        return PackedSizes(
            up=sizes["up_SUH"],
            down=sizes["down_SHW"],
            up_bias=sizes.get("up_bias_SU", 0),
            down_bias=sizes.get("down_bias_SH", 0),
        )

    @property
    def _activation(self) -> Activation:
        return self._slots.activation

    def _pack(self, tensors: ExpertTensors, into: Tensor) -> PackedExpert:
        if isinstance(tensors, PackedExpert):
            return tensors.copy(into)
        fields = self._by_field(tensors)
        return pack_expert(
            fields["up_SUH"],
            fields["down_SHW"],
            self._activation,
            fields.get("up_bias_SU"),
            fields.get("down_bias_SH"),
            into=into,
        )

    def _by_field(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an expert's tensors by field of SlotWeights, matrices as [out, in]."""
        fields = {_STORED_AS[name]: tensor for name, tensor in tensors.items()}
        if self._is_transposed:
            fields |= {name: fields[name].T for name in ("up_SUH", "down_SHW")}
        return fields

    def _with(self, experts: Sequence[PackedExpert]) -> "PackedWeights":
        slots = PackedSlots(experts, self._slots.hidden, self._slots.width, self._activation)
        return PackedWeights(slots, self._shapes, is_transposed=self._is_transposed)
