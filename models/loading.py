"""Weights of a checkpoint: the dense half for a worker, single experts for a shard; both converted by transformers."""

import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from expertmesh.cluster.errors import CorruptCheckpointError, InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.models.architecture import Architecture, expert_count
from expertmesh.models.cpu_linears import speed_up_linears
from expertmesh.models.slicing import slicing_of
from expertmesh.models.tensor_files import TensorFiles

# How much of mapped files may stay with this process while experts are read.
_RELEASE_BYTES = 256 << 20


@dataclass
class _Source:
    """Checkpoint tensors that make up one parameter, by source pattern, each list in the order of the experts."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class CheckpointWeights:
    """The weights of one checkpoint. Opening reads headers only; each call reads what it returns."""

    def __init__(self, architecture: Architecture, expert_tp: int = 1) -> None:
        """Open the files and sort their tensors into dense ones and those of experts.

        Args:
            architecture: of the checkpoint.
            expert_tp: slices that each expert is cut in; what the other methods call an expert is then a slice, number
                expert * expert_tp + slice of its layer.

        Raises:
            CheckpointError, CorruptCheckpointError: see `TensorFiles`; or an expert's tensor is missing.
            InputError: experts cannot be cut so.
        """
        self.architecture = architecture
        self.num_slices = architecture.num_experts * expert_tp
        self._slicings = {layer: slicing_of(m, expert_tp) for layer, m in architecture.experts_by_layer.items()}
        self.files = TensorFiles(architecture.directory)
        self._unreleased_bytes = 0
        # Deep copies: transformers' converters collect tensors while they work.
        self._mapping = get_model_conversion_mapping(architecture.model)
        self._expert_parameters = _expert_parameters(architecture)
        self._sources: dict[str, _Source] = {}
        self._dense_names: list[str] = []
        self._sort_names()
        self._check_experts()
        self._slice_shapes = {
            layer: self._slicings[layer].shapes(self._whole_shapes(layer)) for layer in self._slicings
        }

    def load_dense(self, device: torch.device) -> PreTrainedModel:
        """Load the dense half into the architecture's model. The experts' parameters are removed, never materialised.

        Raises:
            CorruptCheckpointError: a tensor is missing, has another shape, or cannot be read.
        """
        model = self.architecture.model
        strip_experts(model, self.architecture.experts_by_layer)
        state = {name: self.files.slice(name) for name in self._dense_names}
        config = LoadStateDictConfig(
            device_map={"": device}, dtype=self.architecture.dtype, weight_mapping=deepcopy(self._mapping)
        )
        info, _ = convert_and_load_state_dict_in_model(model, state, config)
        missing = sorted(set(info.missing_keys) - set(model.all_tied_weights_keys))
        wrong = [f"missing {name}" for name in missing] + [f"another shape: {m}" for m in info.mismatched_keys]
        wrong += [f"{name}: {error}" for name, error in info.conversion_errors.items()]
        if wrong:
            raise CorruptCheckpointError(f"{self.architecture.directory}: {len(wrong)} tensors are wrong: {wrong[0]}")
        # Buffers that no checkpoint holds (rotary frequencies) are computed by transformers' own initialisation.
        model.mark_tied_weights_as_initialized(info)
        model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), config.device_map, None, None)
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        if device.type == "cpu":
            _copy_all(model)
        self.files.release()
        speed_up_linears(model)
        return model.requires_grad_(False).eval()

    def load_expert(self, key: ExpertKey) -> dict[str, Tensor]:
        """Read one expert.

        Returns:
            Its tensors by parameter name ("gate_up_proj", "down_proj", biases), without the expert dimension, in the
            architecture's dtype.

        Raises:
            InputError: no such expert.
            CorruptCheckpointError: a tensor has a shape that does not fit, or cannot be read.
        """
        if key.layer not in self._expert_parameters or not 0 <= key.expert < self.num_slices:
            raise InputError(
                f"{key}: the model has layers {self.architecture.moe_layers}, experts 0 to {self.num_slices - 1}"
            )
        slicing = self._slicings[key.layer]
        expert, index = divmod(key.expert, slicing.expert_tp)
        tensors = {
            short: self._read_parameter(full, expert, shape)
            for short, (full, shape) in self._expert_parameters[key.layer].items()
        }
        if slicing.expert_tp > 1:
            tensors = slicing.cut(tensors, index)
        self._unreleased_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._unreleased_bytes > _RELEASE_BYTES:
            self.release()
        return tensors

    def release(self) -> None:
        """Let go of the memory of what was read, but for what tensors still refer to."""
        self.files.release()
        self._unreleased_bytes = 0

    def expert_shapes(self, layer: int) -> dict[str, torch.Size]:
        """Return the shapes of the parameters of one expert of a layer, by name, without the expert dimension."""
        return self._slice_shapes[layer]

    def expert_bytes(self) -> int:
        """Return the bytes of one expert of the first MoE layer, in the architecture's dtype."""
        shapes = self._slice_shapes[self.architecture.moe_layers[0]]
        return sum(shape.numel() for shape in shapes.values()) * self.architecture.dtype.itemsize

    def expert_width(self) -> int:
        """Return the width of an expert of the first MoE layer, between its matrices."""
        layer = self.architecture.moe_layers[0]
        return self._slicings[layer].width(self._whole_shapes(layer))

    def dense_bytes(self) -> int:
        """Return the bytes of the dense half's parameters as they are served; tied ones once."""
        experts = {full for layer in self._expert_parameters.values() for full, _ in layer.values()}
        parameters = self.architecture.model.named_parameters()
        return sum(p.numel() * p.element_size() for name, p in parameters if name not in experts)

    def _whole_shapes(self, layer: int) -> dict[str, torch.Size]:
        return {short: shape[1:] for short, (_, shape) in self._expert_parameters[layer].items()}

    def _read_parameter(self, full_name: str, expert: int, shape: torch.Size) -> Tensor:
        source = self._sources[full_name]
        value: Tensor
        try:
            if source.converter is None:
                value = self.files.slice(next(iter(source.names.values()))[0])[expert : expert + 1]
            else:
                value = self._convert(source.converter, source.names, full_name, expert)
        except (SafetensorError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise CorruptCheckpointError(
                f"{self.architecture.directory}: {full_name}, expert {expert}: {error}"
            ) from error
        if tuple(value.shape) != (1, *shape[1:]):
            raise CorruptCheckpointError(
                f"{self.architecture.directory}: {full_name}, expert {expert}: the files hold shape "
                f"{tuple(value.shape[1:])}, the configuration asks for {tuple(shape[1:])}"
            )
        return value[0].to(self.architecture.dtype)

    def _convert(
        self, converter: WeightConverter, names_by_pattern: dict[str, list[str]], full_name: str, expert: int
    ) -> Tensor:
        """Run the family's conversion on the tensors of one expert: every operation keeps dimension 0 apart."""
        converter = deepcopy(converter)
        for pattern, names in names_by_pattern.items():
            if len(names) == self.architecture.num_experts:
                converter.add_tensor(full_name, names[expert], pattern, self.files.slice(names[expert])[...])
            else:
                converter.add_tensor(full_name, names[0], pattern, self.files.slice(names[0])[expert : expert + 1])
        model = self.architecture.model
        result = converter.convert(full_name, model=model, config=model.config)
        value = result[full_name]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _sort_names(self) -> None:
        model = self.architecture.model
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        experts = {full for layer in self._expert_parameters.values() for full, _ in layer.values()}
        for name in sorted(self.files.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            targets = {target}
            if pattern is not None:
                converter = by_pattern[pattern]
                targets = {target.replace(converter.target_patterns[0], t) for t in converter.target_patterns}
            if targets & experts:
                for full in targets & experts:
                    source = self._sources.setdefault(full, _Source(by_pattern[pattern] if pattern else None))
                    source.names[pattern or name].append(name)
            else:
                self._dense_names.append(name)

    def _check_experts(self) -> None:
        for layer, parameters in self._expert_parameters.items():
            for short, (full, shape) in parameters.items():
                source = self._sources.get(full)
                if source is None:
                    raise CorruptCheckpointError(
                        f"{self.files.directory}: layer {layer}: no tensor for experts' {short}"
                    )
                wanted = source.converter.source_patterns if source.converter else list(source.names)
                for pattern in wanted:
                    wrong = self._find_fault(source.names.get(pattern, []), shape[0])
                    if wrong:
                        raise CorruptCheckpointError(
                            f"{self.files.directory}: layer {layer}: experts' {pattern}: {wrong}"
                        )

    def _find_fault(self, names: list[str], num_experts: int) -> str:
        """Say why these tensors are not those of all experts: one that holds all, or one for each in their order."""
        numbers = [int(number) for name in names for number in re.findall(r"experts\.(\d+)\.", name)]
        if len(names) == 1 and not numbers:
            found = (self.files.slice(names[0]).get_shape() or [0])[0]
            return "" if found == num_experts else f"{names[0]} holds {found} experts, there are {num_experts}"
        if numbers == list(range(num_experts)):
            return ""
        missing, extra = set(range(num_experts)) - set(numbers), set(numbers) - set(range(num_experts))
        return f"{len(names)} of {num_experts} tensors are there" + "".join(
            f"; {what} are those of experts {sorted(experts)[:8]}"
            for what, experts in (("missing", missing), ("too many", extra))
            if experts
        )


def _expert_parameters(architecture: Architecture) -> dict[int, dict[str, tuple[str, torch.Size]]]:
    """Map layer -> short parameter name -> (full name, shape with the expert dimension first)."""
    names = {id(p): name for name, p in architecture.model.named_parameters()}
    return {
        layer: {short: (names[id(p)], p.shape) for short, p in module.named_parameters()}
        for layer, module in architecture.experts_by_layer.items()
    }


def _copy_all(model: nn.Module) -> None:
    """Copy what lies in mapped files: one tensor that refers to a file would keep all that was read of it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()


def strip_experts(model: nn.Module, experts_by_layer: dict[int, nn.Module]) -> None:
    """Take the routed experts' parameters out of a model, leaving the modules that call them."""
    for module in experts_by_layer.values():
        assert expert_count(module) > 0
        for name in list(module._parameters):
            module._parameters[name] = None
        # Nothing is left to initialise; transformers' initialisation would touch the parameters.
        module._is_hf_initialized = True  # type: ignore[assignment]
