"""Layers that run compiled attention give what transformers' code gives, and layers that are of another kind are left.

Shape suffix: N sequences, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertmesh.cluster.scheduler import Chunk
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.models import hooks, runners
from expertmesh.models.architecture import find_experts
from expertmesh.models.layer_watch import decoder_layers, mlp_of
from expertmesh.models.runners import PagedRunner
from tests.families import BATCHED, VOCAB_SIZE

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
CPU = torch.device("cpu")
PAGE_SIZE = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
# Layers of three that are of the common kind; others differ in what the comment says.
COMPILED = {
    "mixtral": 3,
    "qwen2_moe": 3,
    "qwen3_moe": 3,
    "olmoe": 3,
    "granitemoe": 3,
    "gpt_oss": 3,
    "phimoe": 0,  # layer norms
    "glm4_moe": 0,  # half of a head of 32 is rotated: less than a vector
    "ernie4_5_moe": 0,  # neighbouring elements are rotated
    "deepseek_v2": 0,  # latent attention
    "deepseek_v3": 0,
    "minimax_m2": 0,  # as glm4_moe
}
# Of these, the families whose routers are of the common kind and whose blocks add nothing to their experts.
ROUTED = {"mixtral": 3, "qwen3_moe": 3, "olmoe": 3, "granitemoe": 3, "gpt_oss": 3}
# bf16 has 8 bits; three layers add up.
TOLERANCE = 0.04


def make_model(family: str, **changes: object) -> PreTrainedModel:
    """Return a random bf16 model whose experts are to be attached."""
    hooks.register()
    latent = {**BATCHED[family], "head_dim": BATCHED[family].get("qk_rope_head_dim")}
    sizes = latent if family.startswith("deepseek") else {}
    config = AutoConfig.for_model(family, **{**SIZES, **BATCHED[family], **SIZES, **sizes, **changes})
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=hooks.IMPLEMENTATION)
    model.set_experts_implementation(hooks.IMPLEMENTATION)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 0.15, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def run_steps(runner: PagedRunner) -> list[Tensor]:
    """Run a prompt, then two others beside its next tokens; return the logits [N, V] of each step."""
    ids = torch.randint(3, VOCAB_SIZE, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    first, second, third = (2, 0, 1, 3), (6, 7, 5), (4,)
    steps = [
        [Chunk("first", 0, tuple(ids[:19]), first, samples=True)],
        [
            Chunk("first", 19, (ids[19],), first, samples=True),
            Chunk("second", 0, tuple(ids[30:42]), second, samples=False),
            Chunk("third", 0, (ids[50],), third, samples=True),
        ],
        [
            Chunk("first", 20, (ids[20],), first, samples=True),
            Chunk("second", 12, tuple(ids[42:50]), second, samples=True),
            Chunk("third", 1, (ids[51],), third, samples=True),
        ],
    ]
    with torch.inference_mode():
        return [runner.run(chunks).float() for chunks in steps]


def _do_little(_layer: int, hidden_TH: Tensor, _ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return (hidden_TH * weights_TK.sum(1, keepdim=True)).to(hidden_TH.dtype)


def make_runner(model: PreTrainedModel, num_pages: int = 8) -> PagedRunner:
    """Return a runner whose experts do almost nothing."""
    hooks.attach_experts(find_experts(model), _do_little)
    runner = PagedRunner(model, PAGE_SIZE, CPU)
    runner.allocate(num_pages)
    return runner


def runners_of(model: PreTrainedModel) -> tuple[PagedRunner, PagedRunner]:
    """Return a model's runner as transformers computes it, and compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "speed_up_layers", lambda *_: 0)
        patch.setattr(runners, "pack_linears", lambda _: None)
        plain = make_runner(copy.deepcopy(model))
    return plain, make_runner(model)


def num_routed(runner: PagedRunner) -> int:
    """Return how many layers choose their experts in compiled code: transformers' block is not called."""
    called: list[Any] = []
    layers = list(decoder_layers(runner._model))
    handles = [mlp_of(layer).register_forward_pre_hook(lambda block, _: called.append(block)) for layer in layers]
    run_steps(runner)
    for handle in handles:
        handle.remove()
    return len(layers) - len(set(map(id, called)))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_layers_compute_what_transformers_computes(family: str) -> None:
    # Granite's scores are not scaled by default, and so large ones make much of a rounding.
    plain, compiled = runners_of(make_model(family, **{"attention_multiplier": 0.1} if family == "granitemoe" else {}))
    assert plain.num_compiled == 0
    assert compiled.num_compiled == COMPILED[family]
    assert num_routed(compiled) == ROUTED.get(family, 0)
    for got, wanted in zip(run_steps(compiled), run_steps(plain), strict=True):
        assert relative_error(got, wanted) < TOLERANCE


def test_window_and_sinks_are_kept() -> None:
    plain, compiled = runners_of(make_model("gpt_oss", sliding_window=5))
    for got, wanted in zip(run_steps(compiled), run_steps(plain), strict=True):
        assert relative_error(got, wanted) < TOLERANCE


def turned_slower(_layer: Any, args: Any, kwargs: Any) -> Any:
    cos, sin = kwargs["position_embeddings"]
    angles = torch.atan2(sin.float(), cos.float()) / 2
    return args, {**kwargs, "position_embeddings": (angles.cos().bfloat16(), angles.sin().bfloat16())}


def test_layers_may_be_given_cosines_of_their_own() -> None:
    """As in families whose sliding layers turn at another rate."""
    model = make_model("qwen3_moe")
    model.model.layers[1].register_forward_pre_hook(turned_slower, with_kwargs=True)
    plain, compiled = runners_of(model)
    assert compiled.num_compiled == 3
    for got, wanted in zip(run_steps(compiled), run_steps(plain), strict=True):
        assert relative_error(got, wanted) < TOLERANCE


def scaled_attention(layer: Any) -> None:
    forward: Callable[..., Any] = layer.self_attn.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        return out * 0.8, weights

    layer.self_attn.forward = scaled


def turned_keys(layer: Any) -> None:
    norm = layer.self_attn.k_norm
    layer.self_attn.k_norm.forward = lambda x: type(norm).forward(norm, x).flip(-1)


def other_norm(layer: Any) -> None:
    norm = layer.post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) + 0.1


def more_behind(layer: Any) -> None:
    forward: Callable[..., Any] = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) + 0.01 * hidden


def doubled_weights(layer: Any) -> None:
    layer.mlp.gate.register_forward_hook(lambda _gate, _args, out: (out[0], out[1] * 2, out[2]))


def more_than_experts(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda _block, args, out: out + 0.01 * args[0])


@pytest.mark.parametrize("change", [doubled_weights, more_than_experts])
def test_a_router_that_only_looks_common_is_left_alone(change: Callable[[Any], None]) -> None:
    model = make_model("qwen3_moe")
    change(model.model.layers[1])
    plain, compiled = runners_of(model)
    assert compiled.num_compiled == 3
    assert num_routed(compiled) == 2
    for got, wanted in zip(run_steps(compiled), run_steps(plain), strict=True):
        assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.parametrize("change", [scaled_attention, turned_keys, other_norm, more_behind])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_layer_that_only_looks_common_is_left_alone(change: Callable[[Any], None], scale: float) -> None:
    """However small beside the hidden state what it does otherwise is."""
    model = make_model("qwen3_moe")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
    change(model.model.layers[1])
    assert make_runner(model).num_compiled == 2


def test_bounds_that_short_steps_need_not_reach_are_seen() -> None:
    _, compiled = runners_of(make_model("olmoe", clip_qkv=50.0))
    assert compiled.num_compiled == 0


def test_residuals_that_are_multiplied_are_left_alone() -> None:
    _, compiled = runners_of(make_model("granitemoe", residual_multiplier=0.5))
    assert compiled.num_compiled == 0


def test_too_small_a_cache_to_compare_in_compiles_nothing() -> None:
    assert make_runner(make_model("qwen3_moe"), num_pages=2).num_compiled == 0
