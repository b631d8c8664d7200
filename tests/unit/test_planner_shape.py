"""What a config.json is counted to, against transformers' own models, published counts, and sums done by hand."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertmesh.actors.cli import plan_files
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.config_reader import read_shape
from expertmesh.cluster.planner.dtypes import find_format
from tests.families import _COMMON, FAMILIES
from tests.planner import CONFIG, shipped_shape, small_shape

CARDS = plan_files.card_names()
BF16 = find_format("bf16")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_counts_what_was_published(name: str) -> None:
    """The tolerances stand in the card: 1 % of all parameters (1.5 % of kimi-k2, told to two digits), 2 to 5 % of the
    active ones, of which authors do and do not count the embedding; 20 % of Qwen3-Next's, told to one digit."""
    published, shape = plan_files.load_card(name)["published"], shipped_shape(name)
    total = shape.total_params + (shape.mtp_params if published.get("counts_mtp") else 0)
    active = shape.active_params + (shape.embedding_params if published.get("embedding_is_active") else 0)
    assert total == pytest.approx(published["total_params"], rel=published["total_tolerance"])
    assert active == pytest.approx(published["active_params"], rel=published["active_tolerance"])
    assert published["total_tolerance"] <= 0.015


@pytest.mark.parametrize("name", CARDS)
def test_a_card_counts_what_transformers_builds(name: str) -> None:
    config = {**plan_files.load_card(name)["config"], "num_hidden_layers": 8}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:8]
    family = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert read_shape(name, config).total_params == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_served_family_is_counted(family: str) -> None:
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], "hidden_size": 512, "vocab_size": 4096})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(family, json.loads(config.to_json_string(use_diff=False)))
    parameters = dict(model.named_parameters())
    experts = sum(tensor.numel() for name, tensor in parameters.items() if ".experts." in name)
    assert shape.routed_params == experts
    assert shape.total_params == pytest.approx(sum(tensor.numel() for tensor in parameters.values()), rel=5e-3)


def test_a_small_model_by_hand() -> None:
    shape = small_shape()
    assert shape.expert_params == 3 * 64 * 32
    assert shape.routed_params == 4 * 16 * 3 * 64 * 32
    assert shape.attention_params == 4 * (2 * 64 * 128 + 2 * 64 * 64)
    assert shape.router_params == 4 * 64 * 16
    assert shape.active_params == shape.total_params - shape.embedding_params - 4 * 14 * shape.expert_params
    assert shape.kv_bytes(10, BF16) == 4 * 10 * 2 * 4 * 16 * 2


def test_keys_and_values_as_published() -> None:
    """DeepSeek-V3's and Qwen3's bytes a token: 70.272 KB (arXiv 2505.09343, table 1), and 2 x 94 x 4 x 128 x 2."""
    assert shipped_shape("deepseek-v3").kv_bytes(1, BF16) == pytest.approx(70_272)
    assert shipped_shape("qwen3-235b-a22b").kv_bytes(1, BF16) == 2 * 94 * 4 * 128 * 2


def test_windows_and_linear_layers_keep_less() -> None:
    windowed, linear = shipped_shape("gpt-oss-120b"), shipped_shape("qwen3-next-80b-a3b")
    each = 2 * 8 * 64 * 2
    assert windowed.kv_bytes(10_000, BF16) == 18 * each * (10_000 + 128)
    assert windowed.attention.attended_tokens(10_000, 36) == (10_000 + 128) / 2
    growth = linear.kv_bytes(1001, BF16) - linear.kv_bytes(1000, BF16)
    assert growth == 12 * 2 * 2 * 256 * 2
    assert shipped_shape("glm-5").attention.attended_tokens(100_000, 78) == 2048


def test_operations_of_attention() -> None:
    """DeepSeek-V3: 128 heads over a latent of 512 + 64, or over keys of 192 and values of 128."""
    latent, grouped = shipped_shape("deepseek-v3").attention, shipped_shape("mixtral-8x7b").attention
    assert latent.flop_per_pair(on_latent=True) == 2 * 128 * (512 + 64 + 512)
    assert latent.flop_per_pair(on_latent=False) == 2 * 128 * (192 + 128)
    assert grouped.flop_per_pair(on_latent=True) == grouped.flop_per_pair(on_latent=False) == 4 * 32 * 128


def test_dense_layers_are_told_in_three_ways() -> None:
    dense = {"intermediate_size": 48}
    assert small_shape(first_k_dense_replace=3, **dense).num_moe_layers == 1
    assert small_shape(decoder_sparse_step=2, **dense).num_moe_layers == 2
    assert small_shape(mlp_only_layers=[0, 2], **dense).num_moe_layers == 2
    assert small_shape(mlp_layer_types=["dense", "sparse", "sparse", "sparse"], **dense).num_moe_layers == 3
    assert small_shape(first_k_dense_replace=3, **dense).dense_ffn_params == 3 * 3 * 64 * 48


def test_a_tied_head_counts_once() -> None:
    untied, tied = small_shape(), small_shape(tie_word_embeddings=True)
    assert untied.total_params - tied.total_params == 100 * 64
    assert untied.active_params == tied.active_params


def test_the_text_part_of_a_composite_model_is_counted() -> None:
    assert read_shape("small", {"text_config": CONFIG, "model_type": "vision"}) == small_shape()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "no n_routed_experts or num_local_experts or num_experts"),
        ({"num_experts_per_tok": None}, "no num_experts_per_tok"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 is above the number of experts, 16"),
        ({"first_k_dense_replace": 4, "intermediate_size": 8}, "no layer has experts: first_k_dense_replace=4"),
        ({"first_k_dense_replace": 1}, "no intermediate_size"),
        ({"kv_lora_rank": 8}, "no qk_nope_head_dim"),
        ({"linear_num_key_heads": 2}, "no linear_num_value_heads"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="small: ") as caught:
        small_shape(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
