"""Tiny random checkpoints of the families that must be served, written by transformers' own save_pretrained.

A family's sizes are chosen so that its own features are in play: groups, shared experts, windows shorter than the
sequences, head sizes that differ between keys and values, dense layers before the first MoE layer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
_INDEXED: dict[str, Any] = {**_LATENT, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}

# Served in the batched engine over the paged cache.
BATCHED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_LATENT, "n_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 2},
}
# Served one request a step through transformers' own cache.
OWN_CACHE: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "kimi_linear": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "glm_moe_dsa": {**_INDEXED, "n_group": 1},
    "deepseek_v32": {**_INDEXED, "n_group": 2},
}
FAMILIES = BATCHED | OWN_CACHE


def write_checkpoint(
    family: str, directory: Path, *, seed: int = 0, max_shard_size: str = "50GB", **changes: Any
) -> PreTrainedModel:
    """Write a random float32 checkpoint of a family, with changes to its config; return the model that was written.

    Weights are far larger than trained ones, so that experts and positions matter and greedy output does not settle on
    one token.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 0.15, generator=generator)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(0, 0.1, generator=generator)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model.eval()


def random_prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Return prompts of these lengths in tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def generate(model: PreTrainedModel, prompt_ids: list[int], max_tokens: int) -> list[int]:
    """Return transformers' own greedy continuation."""
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones((1, len(prompt_ids)), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt_ids) :].tolist()
    return tokens
