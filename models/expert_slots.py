"""The expert slots of one shard: weights of some experts of each layer, and the MLP over them.

Shape suffixes: R rows, H hidden, P (row, expert) pairs, E experts of a layer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, grouped_mlp, grouped_mlp_pairs
from expertmesh.models.architecture import expert_math
from expertmesh.models.loading import CheckpointWeights

# The field of SlotWeights of each expert parameter of transformers.
_STORED_AS = {
    "gate_up_proj": "up_SUH",
    "up_proj": "up_SUH",
    "down_proj": "down_SHW",
    "gate_up_proj_bias": "up_bias_SU",
    "up_proj_bias": "up_bias_SU",
    "down_proj_bias": "down_bias_SH",
}


@dataclass(frozen=True)
class LayerSlots:
    """One layer's slots, never changed: a computation goes on with those that it began with.

    experts names the expert of each slot; slot_E (int64) is the inverse, -1 where an expert has no slot.
    """

    experts: tuple[int, ...]
    weights: SlotWeights
    slot_E: Tensor
    math: ExpertMath

    def hosts(self, expert_P: Tensor) -> bool:
        """Say whether every expert of expert_P (int64) has a slot here."""
        return bool((self.slot_E[expert_P] >= 0).all())

    def run(self, rows_RH: Tensor, row_P: Tensor, expert_P: Tensor, weight_P: Tensor) -> Tensor:
        """Run experts over pairs of rows and experts; see `grouped_mlp`. All experts must be hosted.

        Returns:
            float32 [R, H], each row's weighted sum.
        """
        slot_P = self.slot_E[expert_P]
        return grouped_mlp(rows_RH, row_P=row_P, slot_P=slot_P, weight_P=weight_P, slots=self.weights, math=self.math)

    def run_pairs(self, rows_RH: Tensor, row_P: Tensor, expert_P: Tensor) -> Tensor:
        """Run experts over pairs of rows and experts; see `grouped_mlp_pairs`. All experts must be hosted.

        Returns:
            [P, H], each pair's output by itself, dtype of the rows.
        """
        slot_P = self.slot_E[expert_P]
        return grouped_mlp_pairs(rows_RH, row_P=row_P, slot_P=slot_P, slots=self.weights, math=self.math)


class ExpertSlots:
    """Experts held by one process: nothing else of the model.

    One thread at a time may change them; others may compute meanwhile.
    """

    def __init__(self, weights: CheckpointWeights, keys: Iterable[ExpertKey], device: torch.device) -> None:
        """Read the experts of all keys.

        Raises:
            InputError: a key twice, or not of this model.
            CorruptCheckpointError: a tensor cannot be read.
        """
        self.device = device
        self._architecture = weights.architecture
        self._math = {layer: expert_math(experts) for layer, experts in weights.architecture.experts_by_layer.items()}
        self._shapes = {layer: weights.expert_shapes(layer) for layer in self._math}
        self._layers: dict[int, LayerSlots] = {}
        for layer, experts in sorted(_by_layer(keys).items()):
            self.add(layer, experts, weights.load_expert)

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """The experts held."""
        return frozenset(ExpertKey(layer, e) for layer, held in self._layers.items() for e in held.experts)

    def add(self, layer: int, experts: Sequence[int], read: Callable[[ExpertKey], dict[str, Tensor]]) -> None:
        """Take experts of a layer that it does not hold yet. The layer is copied once: that much memory is needed more.

        Args:
            layer: index in the model.
            experts: all different.
            read: returns an expert's tensors by parameter name, as `CheckpointWeights.load_expert` does.

        Raises:
            InputError: an expert twice, or not of this model.
            What `read` raises. Nothing has changed then.
        """
        old = self._layers.get(layer)
        held = old.experts if old else ()
        if layer not in self._math or len({*held, *experts}) < len(held) + len(experts):
            raise InputError(f"layer {layer}: cannot add experts {sorted(experts)} to {sorted(held)}")
        tensors = self._grow(_named(old.weights) if old else {}, layer, len(held), experts, read)
        self._layers[layer] = self._build(layer, (*held, *experts), tensors)

    def keep(self, keys: Collection[ExpertKey]) -> None:
        """Let go of all experts but these. A layer that loses some is copied once."""
        wanted = _by_layer(keys)
        for layer, old in list(self._layers.items()):
            stay = [slot for slot, expert in enumerate(old.experts) if expert in wanted.get(layer, ())]
            if not stay:
                del self._layers[layer]
            elif len(stay) < len(old.experts):
                index = torch.tensor(stay, device=self.device)
                tensors = {name: t.index_select(0, index) for name, t in _named(old.weights).items()}
                self._layers[layer] = self._build(layer, tuple(old.experts[slot] for slot in stay), tensors)

    @property
    def num_slots(self) -> int:
        """Number of (layer, expert) slots held."""
        return sum(len(held.experts) for held in self._layers.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(
            t.numel() * t.element_size() for held in self._layers.values() for t in _named(held.weights).values()
        )

    def expert(self, key: ExpertKey) -> dict[str, Tensor] | None:
        """Return an expert's tensors by parameter name, as `CheckpointWeights.load_expert` does; None: not held."""
        held = self._layers.get(key.layer)
        if held is None or key.expert not in held.experts:
            return None
        slot = held.experts.index(key.expert)
        stored = _named(held.weights)
        return {name: stored[_STORED_AS[name]][slot] for name in self._shapes[key.layer]}

    def layer(self, layer: int) -> LayerSlots | None:
        """Return the slots of a layer as they are now; None where it has none."""
        return self._layers.get(layer)

    def _grow(
        self,
        old: dict[str, Tensor],
        layer: int,
        num_held: int,
        experts: Sequence[int],
        read: Callable[[ExpertKey], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the stacked tensors with the new experts behind the old, read one at a time."""
        stacked: dict[str, Tensor] = {}
        for slot, expert in enumerate(experts, start=num_held):
            for name, tensor in read(ExpertKey(layer, expert)).items():
                field = _STORED_AS[name]
                if field not in stacked:
                    shape = (num_held + len(experts), *tensor.shape)
                    stacked[field] = torch.empty(shape, dtype=tensor.dtype, device=self.device)
                stacked[field][slot].copy_(tensor)
        assert not old or old.keys() == stacked.keys(), f"layer {layer}: {sorted(stacked)} beside {sorted(old)}"
        for name, tensor in old.items():
            stacked[name][:num_held].copy_(tensor)
        return stacked

    def _build(self, layer: int, experts: tuple[int, ...], tensors: dict[str, Tensor]) -> LayerSlots:
        slot_E = torch.full((self._architecture.num_experts,), -1, dtype=torch.int64)
        slot_E[list(experts)] = torch.arange(len(experts))
        return LayerSlots(experts, SlotWeights(**tensors), slot_E.to(self.device), self._math[layer])


def _by_layer(keys: Iterable[ExpertKey]) -> dict[int, list[int]]:
    by_layer: dict[int, list[int]] = {}
    for key in keys:
        by_layer.setdefault(key.layer, []).append(key.expert)
    return by_layer


def _named(slots: SlotWeights) -> dict[str, Tensor]:
    """Return the tensors that are there, by field."""
    named = {field.name: getattr(slots, field.name) for field in fields(slots)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
