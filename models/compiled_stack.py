"""Let a model's decoder layers follow each other in compiled code, where all of them are of the common kind."""

import itertools
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.cpu.dense import AttentionLayer
from expertmesh.kernels.cpu.stack import Carrier, Stack, Stop, can_stack
from expertmesh.models.compiled_attention import CompiledAttention
from expertmesh.models.layer_watch import Seen, experts_of


def join_layers(
    layers: Sequence[Any],
    attentions: Sequence[AttentionLayer],
    steps: Sequence[Mapping[Any, Seen]],
    shared: CompiledAttention,
) -> bool:
    """Let the first layer's forward go through all, if that is what they did in the steps seen; say whether it does.

    Args:
        layers: in their order, each with its compiled attention.
        attentions: these.
        steps: what the layers did in some steps.
        shared: what the layers share in a step.
    """
    carrier: Carrier | None = getattr(experts_of(layers[0]), "expertmesh_carrier", None)
    if carrier is None or not can_stack(attentions) or not all(_follow_each_other(layers, step) for step in steps):
        return False
    stack = Stack(attentions, [experts_of(layer).expertmesh_layer for layer in layers])

    def forward(
        _self: Any,
        hidden_states: Tensor,
        *_args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_kwargs: object,
    ) -> Tensor:
        step = stack.begin(hidden_states[0], shared.step(attentions[0], position_embeddings))
        while step.at < step.num_layers:
            route = carrier.route(hidden_states.shape[1])
            if route is None:
                step.run_dense()
                step.finish_with(step.run_experts(carrier))
                continue
            stop = step.run(route)
            if stop is Stop.EXPERTS:
                step.finish_with(step.run_experts(carrier))
            elif stop is Stop.UNFINISHED:
                step.finish_with(step.resume(carrier, route))
        return step.hidden_TH.unsqueeze(0)

    layers[0].forward = MethodType(forward, layers[0])
    for layer in layers[1:]:
        layer.forward = MethodType(_pass_on, layer)
    return True


def _pass_on(_self: Any, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden_states


def _follow_each_other(layers: Sequence[Any], step: Mapping[Any, Seen]) -> bool:
    """Say whether each layer got what the one before gave, to the bit, and all the same cosines."""
    seen = [step[layer] for layer in layers]
    return all(
        torch.equal(before.output, after.input_1TH)
        and before.rope[0] is after.rope[0]
        and before.rope[1] is after.rope[1]
        for before, after in itertools.pairwise(seen)
    )
