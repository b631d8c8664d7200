"""The two functions through which every transformers family runs on ExpertMesh: one for experts, one for attention.

They keep no state of their own: what a layer needs hangs on its module, put there by `attach_experts` and
`attach_cache`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from expertmesh.cluster.errors import UnsupportedModelError
from expertmesh.kernels.cpu.stack import Carrier
from expertmesh.kernels.paged_attention import AttentionOptions, PagedKVCache

IMPLEMENTATION = "expertmesh"

# (layer, hidden_TH, topk_ids_TK, topk_weights_TK) -> [T, H]
RunExperts = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def register() -> None:
    """Make the implementation known to transformers. Calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _no_mask)


def attach_experts(experts_by_layer: Mapping[int, nn.Module], run: RunExperts, carrier: Carrier | None = None) -> None:
    """Let each MoE layer's experts be computed by `run`; carrier: who can take many layers there in compiled code."""
    for layer, module in experts_by_layer.items():
        module.expertmesh_run = run  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules
        module.expertmesh_layer = layer  # type: ignore[assignment]
        module.expertmesh_carrier = carrier  # type: ignore[assignment]


@contextmanager
def other_experts(model: nn.Module, run: RunExperts) -> Iterator[None]:
    """Let all experts of a model be computed by `run` for a while."""
    own = [(module, module.expertmesh_run) for module in model.modules() if hasattr(module, "expertmesh_run")]
    try:
        for module, _ in own:
            module.expertmesh_run = run  # type: ignore[assignment]
        yield
    finally:
        for module, before in own:
            module.expertmesh_run = before


def attach_cache(model: nn.Module, cache: PagedKVCache) -> None:
    """Let each attention layer of the model keep its keys and values in `cache`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.expertmesh_cache = cache  # type: ignore[assignment]


def _experts_forward(module: Any, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    output: Tensor = module.expertmesh_run(module.expertmesh_layer, hidden_TH, topk_ids_TK, topk_weights_TK)
    return output


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_other: object,
) -> tuple[Tensor, None]:
    """Attend over the paged cache. Arguments are those that transformers passes to every attention function.

    Raises:
        UnsupportedModelError: the layer is a sliding one by the config, and its family does not say so here.
    """
    assert attention_mask is None, "the paged engine masks by sequence itself"
    if sliding_window is None and _slides(module):
        raise UnsupportedModelError(
            f"layer {module.layer_idx} is of sliding attention, but {type(module).__name__} passes no sliding_window:"
            " it would attend to everything"
        )
    options = AttentionOptions(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks_A=s_aux,
    )
    return module.expertmesh_cache.attend(module.layer_idx, query, key, value, options), None


def _slides(module: Any) -> bool:
    layer_types: list[str] = getattr(getattr(module, "config", None), "layer_types", None) or []
    return bool(layer_types) and layer_types[module.layer_idx] == "sliding_attention"


def _no_mask(*_args: object, **_kwargs: object) -> torch.Tensor | None:
    return None
