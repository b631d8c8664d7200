"""What a checkpoint directory holds: its configuration, its model class on the meta device, its MoE layers.

Nothing here reads weights. What cannot be served is refused here, with what was found and what is supported.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from expertmesh.cluster.errors import CheckpointError, UnsupportedModelError
from expertmesh.kernels.grouped_mlp import ExpertMath
from expertmesh.models import hooks
from expertmesh.models.config_file import read_config_file

SUPPORTED = (
    "supported are the causal language models of transformers whose MoE layers use its experts interface "
    "(mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, deepseek_v2, deepseek_v3, gpt_oss and some 50 more)"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Layer types whose keys and values the paged cache can hold; a model with any other keeps its own cache.
PAGED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Sparse attention chooses keys by an index of its own (deepseek_v32, glm_moe_dsa), which the paged cache does not hold.
OWN_CACHE_MARKS = ("indexer", "linear_attn", "mamba", "conv1d")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A checkpoint's structure.

    experts_by_layer maps a decoder layer's index to its experts module, on the meta device; each has num_experts.
    uses_own_cache: the family cannot run in the paged engine and keeps transformers' cache, one request a step.
    """

    directory: Path
    config: Any
    model: PreTrainedModel
    dtype: torch.dtype
    experts_by_layer: dict[int, nn.Module]
    num_experts: int
    uses_own_cache: bool

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have routed experts."""
        return tuple(self.experts_by_layer)

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 4096)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence, from generation_config.json, else config.json.

        Raises:
            CheckpointError: generation_config.json cannot be read.
        """
        eos = self.config.eos_token_id
        path = self.directory / "generation_config.json"
        if path.is_file():
            try:
                eos = GenerationConfig.from_pretrained(self.directory).eos_token_id or eos
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def open_architecture(directory: Path, dtype: str = "auto") -> Architecture:
    """Open a checkpoint directory's structure.

    Args:
        directory: holds config.json.
        dtype: "auto" (what the checkpoint says), "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: no such directory, or no config.json from which a model can be made.
        UnsupportedModelError: a model that is not served.
    """
    config = _read_config(directory)
    hooks.register()
    torch_dtype = _pick_dtype(directory, config, dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype, attn_implementation=hooks.IMPLEMENTATION, trust_remote_code=False
            )
    except ValueError as error:
        # transformers answers with a list of every known class; the first line says what is wrong.
        reason = str(error).splitlines()[0].split(" Model type should be one of")[0]
        if getattr(config, "auto_map", None):
            reason = "brings its own code (auto_map), which is never run"
        raise UnsupportedModelError(f"{directory}: model_type {config.model_type!r}: {reason}; {SUPPORTED}") from error
    except Exception as error:
        raise _unusable_config(directory, error) from error
    _keep_float32(model, torch_dtype)
    experts_by_layer = find_experts(model)
    if not experts_by_layer:
        raise UnsupportedModelError(
            f"{directory}: {type(model).__name__} (model_type {config.model_type!r}) has no MoE layers with routed "
            f"experts in its {config.num_hidden_layers} layers; {SUPPORTED}"
        )
    num_experts = _uniform_expert_count(directory, experts_by_layer)
    model.set_experts_implementation(hooks.IMPLEMENTATION)
    uses_own_cache = needs_own_cache(model)
    if uses_own_cache:
        model.set_attn_implementation("eager" if not model._supports_sdpa else "sdpa")
    return Architecture(
        directory=directory,
        config=config,
        model=model.eval(),
        dtype=torch_dtype,
        experts_by_layer=experts_by_layer,
        num_experts=num_experts,
        uses_own_cache=uses_own_cache,
    )


def find_experts(model: nn.Module) -> dict[int, nn.Module]:
    """Return each decoder layer's experts module: those that transformers' experts interface decorates."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            layer = re.search(r"\.(\d+)\.", name)
            assert layer is not None, f"experts module {name} lies in no numbered layer"
            found[int(layer.group(1))] = module
    return found


def expert_count(module: nn.Module) -> int:
    """Return the number of experts that an experts module holds."""
    return int(next(p for n, p in module.named_parameters() if n.endswith("down_proj")).shape[0])


def expert_math(module: Any) -> ExpertMath:
    """Return what one expert of a family computes, taken from its experts module."""
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{type(module).__name__}: a norm after each expert is not served")
    return ExpertMath(
        activate=module._apply_gate if module.has_gate else module.act_fn, is_transposed=bool(module.is_transposed)
    )


def needs_own_cache(model: nn.Module) -> bool:
    """Say whether a model must keep transformers' own cache: linear, state-space or indexed attention."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - PAGED_LAYER_TYPES:
        return True
    return any(name.rsplit(".", 1)[-1] in OWN_CACHE_MARKS for name, _ in model.named_modules())


def _read_config(directory: Path) -> Any:
    raw = read_config_file(directory)
    model_type = raw.get("model_type")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{directory}: model_type {model_type!r} brings its own code (auto_map), which is never run; "
                f"{SUPPORTED}"
            ) from error
        raise UnsupportedModelError(
            f"{directory}: model_type {model_type!r} is not known to transformers; {SUPPORTED}"
        ) from error
    except Exception as error:
        raise _unusable_config(directory, error) from error


def _unusable_config(directory: Path, error: Exception) -> CheckpointError:
    """Say what transformers makes of a configuration that is no model's: bad values raise errors of many kinds."""
    found = " ".join(str(error).split())
    return CheckpointError(f"{directory / 'config.json'}: makes no model: {type(error).__name__}: {found}")


def _pick_dtype(directory: Path, config: Any, dtype: str) -> torch.dtype:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{directory}: quantised checkpoints (quantization_config: {method}) are not served yet; give one in "
            "float32, bfloat16 or float16"
        )
    if dtype != "auto":
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    found = getattr(config, "dtype", None) or torch.float32
    if found not in DTYPES.values():
        raise UnsupportedModelError(f"{directory}: config.json asks for dtype {found}; served are {', '.join(DTYPES)}")
    return found


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give those tensors float32 that a family never computes in half precision, as from_pretrained does.

    Routing biases are such: in half precision the router chooses other experts. Loading keeps each tensor's dtype.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)


def _uniform_expert_count(directory: Path, experts_by_layer: dict[int, nn.Module]) -> int:
    counts = {layer: expert_count(module) for layer, module in experts_by_layer.items()}
    if len(set(counts.values())) > 1:
        raise UnsupportedModelError(f"{directory}: layers with unlike numbers of experts are not served: {counts}")
    return next(iter(counts.values()))
