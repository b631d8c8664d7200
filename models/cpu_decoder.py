"""Let decoder layers of the common kind run their attention and router in one compiled call, on CPUs in bf16.

A layer is recognised by its parts, and then by what it computes: the compiled call takes its place only if it gives
what transformers' own code gives, on the layer's own weights. Any other layer keeps transformers' code.
"""

import logging
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.cluster.scheduler import Chunk
from expertmesh.kernels.cpu.dense import AttentionLayer, AttentionWeights, QkNorm, Router, can_attend
from expertmesh.kernels.cpu.linear import can_pack_linear, pack_linear
from expertmesh.kernels.paged_attention import PagedKVCache
from expertmesh.models.compiled_attention import CompiledAttention
from expertmesh.models.compiled_router import chooses_alike, recognise_router
from expertmesh.models.compiled_stack import join_layers
from expertmesh.models.layer_watch import (
    NUM_PAGES,
    PAGE_SIZE,
    Seen,
    decoder_layers,
    experts_of,
    hidden_of,
    mlp_of,
    steps_to_watch,
    watch,
)

_log = logging.getLogger(__name__)
# What the compiled call may differ by, of the length of a tensor: it rounds to bf16 in other places.
_TOLERANCE = 0.02


def speed_up_layers(model: nn.Module, cache: PagedKVCache, run_step: Callable[[Sequence[Chunk]], Tensor]) -> int:
    """Replace the forward of each decoder layer that can be.

    Args:
        model: on a CPU, in bf16, its experts attached to whatever.
        cache: its cache, allocated and not yet in use.
        run_step: computes a step with it.

    Returns:
        How many layers were replaced.
    """
    layers = list(decoder_layers(model))
    is_half = any(shape.dtype == torch.bfloat16 for shape in cache.shapes.values())
    if not layers or not is_half or cache.num_pages < NUM_PAGES or cache.page_size < PAGE_SIZE:
        return 0
    shared = CompiledAttention(cache)
    steps = [watch(model, layers, cache, run_step, chunks) for chunks in steps_to_watch(model, cache.page_size)]
    compiled: list[AttentionLayer] = []
    for layer in layers:
        seen = [step[layer] for step in steps if layer in step]
        attention = _replace(layer, seen, shared, cache) if len(seen) == len(steps) else None
        compiled += [] if attention is None else [attention]
    cache.layout = None
    if len(compiled) == len(layers) and join_layers(layers, compiled, steps, shared):
        _log.info("the layers follow each other in compiled code")
    return len(compiled)


def _replace(layer: Any, seen: Sequence[Seen], shared: CompiledAttention, cache: PagedKVCache) -> AttentionLayer | None:
    """Give a layer the compiled attention if it does what was seen, and return it."""
    index = layer.self_attn.layer_idx
    for attention in _recognise(layer, seen[0], cache, recognise_router(layer, seen)):
        if all(_agrees(attention, index, step, shared, cache) for step in seen):
            break
    else:
        _log.info("layer %s is not of the common kind: it keeps transformers' code", index)
        return None

    experts = experts_of(layer)

    def forward(
        self: Any,
        hidden_states: Tensor,
        *_args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_kwargs: object,
    ) -> Tensor:
        residual_TH, normed_TH, step = shared.run(attention, hidden_states, position_embeddings)
        if attention.router is None:
            behind: Tensor = hidden_of(mlp_of(self)(normed_TH.unsqueeze(0)))
        else:
            behind = experts.expertmesh_run(experts.expertmesh_layer, normed_TH, step.ids_TK, step.weights_TK)
        return residual_TH.unsqueeze(0) + behind

    layer.forward = MethodType(forward, layer)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer.self_attn, name).weight = None  # they are packed by now
    return attention


def _recognise(layer: Any, seen: Seen, cache: PagedKVCache, router: Router | None) -> list[AttentionLayer]:
    """Return what a layer's attention may be, compiled, if it has the parts; how they are used is not known yet."""
    attention, index = layer.self_attn, layer.self_attn.layer_idx
    linears: list[Any] = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    qk_norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    if index not in cache.shapes or any(type(linear) is not nn.Linear for linear in linears):
        return []
    if not (isinstance(seen.rope, tuple) and all(isinstance(x, Tensor) and x.dim() == 3 for x in seen.rope)):
        return []
    if any(_epsilon(norm) is None for norm in (*norms, *qk_norms)):
        return []
    # Short steps need not reach the bounds that some OLMoE checkpoints put on queries, keys and values.
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        return []
    shape, options = cache.shapes[index], cache.options[index]
    q, k, v, out = linears
    size, groups, angles = shape.key_size, shape.num_heads, seen.rope[0].shape[-1]
    heads = q.weight.shape[0] // size
    kinds = {
        (): QkNorm.NONE,
        (size, size): QkNorm.EACH_HEAD,
        (heads * size, groups * size): QkNorm.ALL_HEADS,
    }
    qk_norm = kinds.get(tuple(norm.weight.numel() for norm in qk_norms))
    rope_sizes = [rope_size for rope_size in (angles, 2 * angles) if can_attend(heads, groups, size, rope_size)]
    fits = (
        len(rope_sizes) > 0
        and shape.dtype == torch.bfloat16
        and shape.value_size == size
        and k.weight.shape[0] == v.weight.shape[0] == groups * size
        and out.weight.shape == (q.weight.shape[1], heads * size)
        and all(can_pack_linear(linear.weight) for linear in linears)
        and len({linear.bias is None for linear in (q, k, v)}) == 1
        and all(norm.weight.numel() == q.weight.shape[1] for norm in norms)
    )
    if not fits or qk_norm is None:
        return []
    weights = AttentionWeights(
        num_heads=heads,
        num_kv_heads=groups,
        head_size=size,
        norm_H=norms[0].weight,
        norm_epsilon=_epsilon(norms[0]) or 0.0,
        qkv=pack_linear([q.weight, k.weight, v.weight], [q.bias, k.bias, v.bias]),
        qk_norm=qk_norm,
        q_norm=qk_norms[0].weight if qk_norms else None,
        k_norm=qk_norms[1].weight if qk_norms else None,
        qk_epsilon=(_epsilon(qk_norms[0]) or 0.0) if qk_norms else 0.0,
        out=pack_linear([out.weight], [out.bias]),
        next_norm_H=norms[1].weight,
        next_epsilon=_epsilon(norms[1]) or 0.0,
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
        sinks_A=None if options.sinks_A is None else options.sinks_A.float().contiguous(),
    )
    return [AttentionLayer(weights, *cache.tensors(index), cache.page_size, size, router) for size in rope_sizes]


def _epsilon(norm: Any) -> float | None:
    """Return an RMS norm's epsilon; None: it is another thing."""
    if not isinstance(getattr(norm, "weight", None), Tensor) or norm.weight.dtype != torch.bfloat16:
        return None
    if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
        return None
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _agrees(attention: AttentionLayer, index: int, seen: Seen, shared: CompiledAttention, cache: PagedKVCache) -> bool:
    """Say whether the compiled attention does what was seen."""
    blocks = (seen.projected, seen.joined, seen.mlp_output, seen.output)
    if seen.written is None or not all(isinstance(block, Tensor) for block in blocks):
        return False
    # Sums of two, to the bit: anything else that a layer adds would be small beside the hidden state.
    if not torch.equal(seen.joined, seen.input_1TH + seen.projected):
        return False
    if not torch.equal(seen.output, seen.joined + seen.mlp_output.view_as(seen.joined)):
        return False
    cache.layout = seen.layout
    _, normed_TH, step = shared.run(attention, seen.input_1TH, seen.rope)
    keys, values = (cached[seen.layout.write_T] for cached in cache.tensors(index))
    pairs = [
        (keys, seen.written[0]),
        (values, seen.written[1]),
        (step.attended_TAD.flatten(1), seen.attended),
        (attention.weights.out(seen.attended), seen.projected),
        (normed_TH, seen.normed),
    ]
    if attention.router is not None and not chooses_alike(attention.router, step):
        return False
    return all(
        other is not None and float((mine - other).float().norm()) <= _TOLERANCE * float(other.float().norm())
        for mine, other in pairs
    )
