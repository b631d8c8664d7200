"""The expert slots of one shard: weights of some experts of each layer, and the MLP over them.

Shape suffixes: R rows, H hidden, P (row, expert) pairs, E experts of a layer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, grouped_mlp
from expertmesh.models.architecture import expert_math
from expertmesh.models.loading import CheckpointWeights

_UP, _UP_BIAS = ("gate_up_proj", "up_proj"), ("gate_up_proj_bias", "up_proj_bias")
_DOWN, _DOWN_BIAS = ("down_proj",), ("down_proj_bias",)


class ExpertSlots:
    """Experts held by one process: nothing else of the model."""

    def __init__(self, weights: CheckpointWeights, keys: Iterable[ExpertKey], device: torch.device) -> None:
        """Read the experts of all keys.

        Raises:
            InputError: a key twice, or not of this model.
            CorruptCheckpointError: a tensor cannot be read.
        """
        self.device = device
        by_layer: dict[int, list[int]] = {}
        for key in keys:
            by_layer.setdefault(key.layer, []).append(key.expert)
        architecture = weights.architecture
        self._math: dict[int, ExpertMath] = {}
        self._slots: dict[int, SlotWeights] = {}
        self._slot_of_expert: dict[int, Tensor] = {}
        for layer, experts in sorted(by_layer.items()):
            if len(set(experts)) < len(experts):
                raise InputError(f"layer {layer}: an expert has two slots on one shard: {sorted(experts)}")
            self._math[layer] = expert_math(architecture.experts_by_layer[layer])
            self._slots[layer] = _load_layer(weights, layer, experts, device)
            slot_E = torch.full((architecture.num_experts,), -1, dtype=torch.int64)
            slot_E[experts] = torch.arange(len(experts))
            self._slot_of_expert[layer] = slot_E.to(device)

    @property
    def num_slots(self) -> int:
        """Number of (layer, expert) slots held."""
        return sum(slots.up_SUH.shape[0] for slots in self._slots.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(
            t.numel() * t.element_size()
            for slots in self._slots.values()
            for t in (slots.up_SUH, slots.down_SHW, slots.up_bias_SU, slots.down_bias_SH)
            if t is not None
        )

    def hosts(self, layer: int, expert_P: Tensor) -> bool:
        """Say whether every expert of expert_P (int64) has a slot here."""
        slot_E = self._slot_of_expert.get(layer)
        return slot_E is not None and bool((slot_E[expert_P] >= 0).all())

    def run(self, layer: int, rows_RH: Tensor, row_P: Tensor, expert_P: Tensor, weight_P: Tensor) -> Tensor:
        """Run the layer's experts over pairs of rows and experts; see `grouped_mlp`. All experts must be hosted.

        Returns:
            float32 [R, H], each row's weighted sum.
        """
        slot_P = self._slot_of_expert[layer][expert_P]
        return grouped_mlp(
            rows_RH, row_P=row_P, slot_P=slot_P, weight_P=weight_P, slots=self._slots[layer], math=self._math[layer]
        )


def _load_layer(weights: CheckpointWeights, layer: int, experts: list[int], device: torch.device) -> SlotWeights:
    """Read one layer's experts into stacked tensors, one expert at a time, so that no second copy of a layer exists."""
    stacked: dict[str, Tensor] = {}
    for slot, expert in enumerate(experts):
        for name, tensor in weights.load_expert(ExpertKey(layer, expert)).items():
            if slot == 0:
                stacked[name] = torch.empty((len(experts), *tensor.shape), dtype=tensor.dtype, device=device)
            stacked[name][slot].copy_(tensor)

    def take(names: tuple[str, ...]) -> Tensor | None:
        return next((stacked.pop(name) for name in names if name in stacked), None)

    up, down, up_bias, down_bias = take(_UP), take(_DOWN), take(_UP_BIAS), take(_DOWN_BIAS)
    assert up is not None, f"layer {layer}: no up projection"
    assert down is not None, f"layer {layer}: no down projection"
    assert not stacked, f"layer {layer}: unknown expert parameters {sorted(stacked)}"
    return SlotWeights(up_SUH=up, down_SHW=down, up_bias_SU=up_bias, down_bias_SH=down_bias)
