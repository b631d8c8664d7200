"""The expert slots of one shard: weights of some experts of each layer, and the MLP over them.

Shape suffixes: R rows, H hidden, P (row, expert) pairs, E experts of a layer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.kernels.cpu.expert_mlp import PackedExpert, PackedSizes
from expertmesh.models.layer_weights import ExpertTensors, LayerWeights, no_weights
from expertmesh.models.loading import CheckpointWeights


@dataclass(frozen=True)
class LayerSlots:
    """One layer's slots, never changed: a computation goes on with those that it began with.

    experts names the expert of each slot; slot_E (int64) is the inverse, -1 where an expert has no slot.
    """

    experts: tuple[int, ...]
    weights: LayerWeights
    slot_E: Tensor

    def slots_of(self, expert_P: Tensor) -> Tensor | None:
        """Return the slots of experts (int64); None: one of them has none here."""
        slot_P = self.slot_E.index_select(0, expert_P)
        return slot_P if int(slot_P.min()) >= 0 else None

    def run(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor, weight_P: Tensor) -> Tensor:
        """Run the experts of slots over pairs of rows and slots; see `grouped_mlp`.

        Returns:
            float32 [R, H], each row's weighted sum.
        """
        return self.weights.run(rows_RH, row_P, slot_P, weight_P)

    def run_pairs(self, rows_RH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        """Run the experts of slots over pairs of rows and slots; see `grouped_mlp_pairs`.

        Returns:
            [P, H], each pair's output by itself, dtype of the rows.
        """
        return self.weights.run_pairs(rows_RH, row_P, slot_P)


# Told a layer and its slots, None where it has none any more.
Watcher = Callable[[int, LayerSlots | None], None]


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
        architecture = weights.architecture
        self._num_experts = weights.num_slices
        self._empty = {
            layer: no_weights(module, weights.expert_shapes(layer), architecture.dtype, device)
            for layer, module in architecture.experts_by_layer.items()
        }
        self._layers: dict[int, LayerSlots] = {}
        self._watchers: list[Watcher] = []
        for layer, experts in sorted(_by_layer(keys).items()):
            self.add(layer, experts, weights.load_expert)

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """The experts held."""
        return frozenset(ExpertKey(layer, e) for layer, held in self._layers.items() for e in held.experts)

    def add(self, layer: int, experts: Sequence[int], read: Callable[[ExpertKey], ExpertTensors]) -> None:
        """Take experts of a layer that it does not hold yet.

        Args:
            layer: index in the model.
            experts: all different.
            read: returns an expert's tensors by parameter name, as `CheckpointWeights.load_expert` does; or packed, of
                the layer's `packed_sizes`.

        Raises:
            InputError: an expert twice, or not of this model.
            What `read` raises. Nothing has changed then.
        """
        old = self._layers.get(layer)
        held = old.experts if old else ()
        if layer not in self._empty or len({*held, *experts}) < len(held) + len(experts):
            raise InputError(f"layer {layer}: cannot add experts {sorted(experts)} to {sorted(held)}")
        weights = old.weights if old else self._empty[layer]
        grown = weights.grown([partial(read, ExpertKey(layer, expert)) for expert in experts])
        self._put(layer, self._build((*held, *experts), grown))

    def keep(self, keys: Collection[ExpertKey]) -> None:
        """Let go of all experts but these."""
        wanted = _by_layer(keys)
        for layer, old in list(self._layers.items()):
            stay = [slot for slot, expert in enumerate(old.experts) if expert in wanted.get(layer, ())]
            if not stay:
                self._put(layer, None)
            elif len(stay) < len(old.experts):
                experts = tuple(old.experts[slot] for slot in stay)
                self._put(layer, self._build(experts, old.weights.kept(stay)))

    def watch(self, watcher: Watcher) -> None:
        """Tell of the slots of each layer now, and whenever they change, before those that they replace are let go."""
        self._watchers.append(watcher)
        for layer, held in self._layers.items():
            watcher(layer, held)

    @property
    def num_layers(self) -> int:
        """One more than the index of the last layer that may have slots."""
        return max(self._empty) + 1

    @property
    def are_packed(self) -> bool:
        """Whether the slots of some layer are in the CPU kernel's layout."""
        return any(empty.packed is not None for empty in self._empty.values())

    @property
    def num_slots(self) -> int:
        """Number of (layer, expert) slots held."""
        return sum(len(held.experts) for held in self._layers.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(held.weights.num_bytes for held in self._layers.values())

    def expert(self, key: ExpertKey) -> dict[str, Tensor] | None:
        """Return an expert's tensors by parameter name, as `CheckpointWeights.load_expert` does; None: not held."""
        held = self._holder(key)
        return None if held is None else held.weights.expert(held.experts.index(key.expert))

    def packed_expert(self, key: ExpertKey) -> PackedExpert | None:
        """Return an expert as the CPU kernel has it; None: it is not held, or not in that layout."""
        held = self._holder(key)
        packed = None if held is None else held.weights.packed
        return None if held is None or packed is None else packed.experts[held.experts.index(key.expert)]

    def packed_sizes(self, layer: int) -> PackedSizes | None:
        """Return the sizes of a layer's packed experts; None: it takes them by parameter alone."""
        return self._empty[layer].packed_sizes

    def layer(self, layer: int) -> LayerSlots | None:
        """Return the slots of a layer as they are now; None where it has none."""
        return self._layers.get(layer)

    def _holder(self, key: ExpertKey) -> LayerSlots | None:
        held = self._layers.get(key.layer)
        return held if held is not None and key.expert in held.experts else None

    def _put(self, layer: int, held: LayerSlots | None) -> None:
        old = self._layers.pop(layer, None) if held is None else self._layers.get(layer)
        if held is not None:
            self._layers[layer] = held
        for watcher in self._watchers:
            watcher(layer, held)
        del old  # not before everybody was told

    def _build(self, experts: tuple[int, ...], weights: LayerWeights) -> LayerSlots:
        slot_E = torch.full((self._num_experts,), -1, dtype=torch.int64)
        slot_E[list(experts)] = torch.arange(len(experts))
        return LayerSlots(experts, weights, slot_E.to(self.device))


def _by_layer(keys: Iterable[ExpertKey]) -> dict[int, list[int]]:
    by_layer: dict[int, list[int]] = {}
    for key in keys:
        by_layer.setdefault(key.layer, []).append(key.expert)
    return by_layer
