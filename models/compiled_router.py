"""Let a layer's router run in the compiled call of its attention, where it is of the common kind.

Like attention, a router is recognised by what it computes: softmax over one linear layer's scores, the largest, their
weights made to add up to 1 or not, rounded or not. Any other keeps transformers' code.

Shape suffixes: T rows, H hidden, E experts, K choices a token, O outputs of the packed linear layer.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.cpu.dense import AttentionStep, Router
from expertmesh.kernels.cpu.linear import can_pack_linear, pack_linear, padded_outputs
from expertmesh.models.layer_watch import Seen, experts_of, mlp_of

# Of weights, relative: float32 sums in another order; and one rounding to bf16.
_TOLERANCE, _TOLERANCE_ROUNDED = 1e-5, 2.0**-7


def recognise_router(layer: Any, seen: Sequence[Seen]) -> Router | None:
    """Return the router behind a layer's attention, if its experts' output is all that its block adds.

    Args:
        layer: a decoder layer.
        seen: what it did in some steps.
    """
    experts = experts_of(layer)
    if experts is None or not all(_is_experts_alone(step) for step in seen):
        return None
    inner = {id(parameter) for parameter in experts.parameters()}
    own = [parameter for parameter in mlp_of(layer).parameters() if id(parameter) not in inner]
    hidden = seen[0].normed.shape[-1]
    matrices = [parameter for parameter in own if parameter.dim() == 2 and parameter.shape[1] == hidden]
    biases = [parameter for parameter in own if parameter.dim() == 1]
    if len(matrices) != 1 or len(biases) > 1 or len(own) > 2:
        return None
    weight_EH, bias_E = matrices[0], biases[0] if biases else None
    if bias_E is not None and bias_E.shape != weight_EH.shape[:1]:
        return None
    num_experts = weight_EH.shape[0]
    padding = padded_outputs(num_experts) - num_experts
    padded_OH = F.pad(weight_EH, (0, 0, 0, padding))
    if not can_pack_linear(padded_OH):
        return None
    for normalise, rounded in itertools.product((True, False), repeat=2):
        if all(_explains(step, weight_EH, bias_E, normalise, rounded) for step in seen):
            return Router(
                linear=pack_linear([padded_OH], [None if bias_E is None else F.pad(bias_E, (0, padding))]),
                num_experts=num_experts,
                top_k=_choices(seen[0])[0].shape[1],
                normalise=normalise,
                rounded=rounded,
            )
    return None


def choose(scores_TE: Tensor, top_k: int, *, normalise: bool, rounded: bool) -> tuple[Tensor, Tensor]:
    """Return ids and weights [T, K] as a `Router` gives them, by torch."""
    weights_TK, ids_TK = torch.topk(torch.softmax(scores_TE.float(), dim=-1), top_k)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK, weights_TK.bfloat16().float() if rounded else weights_TK


def chooses_alike(router: Router, step: AttentionStep) -> bool:
    """Say whether the compiled router chose by its scores as torch does."""
    assert step.scores_TO is not None, "a step without room for routers"
    assert step.ids_TK is not None, "a step without room for routers"
    assert step.weights_TK is not None, "a step without room for routers"
    scores_TE = step.scores_TO[:, : router.num_experts]
    ids_TK, weights_TK = choose(scores_TE, router.top_k, normalise=router.normalise, rounded=router.rounded)
    return torch.equal(ids_TK, step.ids_TK) and _is_close(step.weights_TK, weights_TK, rounded=router.rounded)


def _is_experts_alone(step: Seen) -> bool:
    """Say whether the block gave what its experts gave, and they got what the block got, to the bit."""
    if step.routed is None or not isinstance(step.mlp_output, Tensor) or not isinstance(step.normed, Tensor):
        return False
    hidden_TH = step.normed.flatten(0, -2)
    return torch.equal(step.routed[0], hidden_TH) and torch.equal(step.mlp_output.view_as(hidden_TH), hidden_TH)


def _choices(step: Seen) -> tuple[Tensor, Tensor]:
    assert step.routed is not None
    return step.routed[1], step.routed[2].float()


def _explains(step: Seen, weight_EH: Tensor, bias_E: Tensor | None, normalise: bool, rounded: bool) -> bool:
    ids_TK, weights_TK = _choices(step)
    scores_TE = F.linear(step.normed.flatten(0, -2), weight_EH, bias_E)
    if ids_TK.shape[1] > scores_TE.shape[1]:
        return False
    wanted_TK, right_TK = choose(scores_TE, ids_TK.shape[1], normalise=normalise, rounded=rounded)
    if not torch.equal(ids_TK, wanted_TK):
        return False
    if rounded and not torch.equal(weights_TK, weights_TK.bfloat16().float()):
        return False
    return _is_close(weights_TK, right_TK, rounded=rounded)


def _is_close(weights_TK: Tensor, right_TK: Tensor, *, rounded: bool) -> bool:
    return torch.allclose(weights_TK, right_TK, rtol=_TOLERANCE_ROUNDED if rounded else _TOLERANCE, atol=0)
