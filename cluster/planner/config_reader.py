"""A ModelShape from the content of a config.json, whatever names the family has for its fields."""

from collections.abc import Mapping
from typing import Any

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.attention_shape import AttentionShape, LatentAttention, LinearAttention
from expertmesh.cluster.planner.model_shape import ModelShape

NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")
NUM_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")
MODELS_WITHOUT_GATE = ("nemotron_h",)  # two matrices an expert
MODELS_WITH_OUTPUT_GATE = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")  # queries twice as wide


def read_shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Count a model's parts from its config.json.

    Raises:
        InputError: a field is missing or no positive whole number; the model has no routed experts.
    """
    # Composite models keep their text part one level down, where the experts are.
    text = config.get("text_config")
    fields = _Fields(name, text if isinstance(text, Mapping) else config)
    num_layers = fields.number("num_hidden_layers")
    num_experts = fields.number(*NUM_EXPERTS, what="a MoE model has one of these")
    top_k = fields.number(*TOP_K)
    if top_k > num_experts:
        raise InputError(f"{name}: {TOP_K[0]}={top_k} is above the number of experts, {num_experts}")
    model_type = str(fields.config.get("model_type", ""))
    num_moe_layers = _num_moe_layers(fields, num_layers)
    expert_width = fields.number(*EXPERT_WIDTH)
    is_all_moe = num_moe_layers == num_layers
    return ModelShape(
        name=name,
        hidden_size=fields.number("hidden_size"),
        vocab_size=fields.number("vocab_size"),
        num_layers=num_layers,
        num_moe_layers=num_moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_width=expert_width,
        attention=_attention(fields, num_layers, model_type),
        shared_width=fields.optional(*SHARED_WIDTH) or fields.optional(*NUM_SHARED) * expert_width,
        dense_width=0 if is_all_moe else fields.number("intermediate_size"),
        num_matrices=2 if model_type in MODELS_WITHOUT_GATE else 3,
        has_expert_bias=model_type == "gpt_oss",
        is_head_tied=bool(fields.config.get("tie_word_embeddings", False)),
        num_mtp_layers=fields.optional("num_nextn_predict_layers"),
    )


class _Fields:
    """Numbers of a configuration, by the first of their names that is there."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self.config = name, config

    def number(self, *names: str, what: str = "") -> int:
        """Return a positive whole number."""
        found = next((known for known in names if self.config.get(known) is not None), None)
        if found is None:
            why = f": {what}" if what else ""
            raise InputError(f"{self.name}: config.json has no {' or '.join(names)}{why}")
        value = self.config[found]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{self.name}: {found} is {value!r}, and must be a positive whole number")
        return value

    def optional(self, *names: str) -> int:
        """Return a whole number, 0 where it is missing, null or 0."""
        there = [known for known in names if self.config.get(known) not in (None, 0)]
        return self.number(there[0]) if there else 0


def _num_moe_layers(fields: _Fields, num_layers: int) -> int:
    """Count the layers with experts: listed by type, or all but the first few, or each n-th."""
    types = fields.config.get("mlp_layer_types")
    if types:
        return sum(kind == "sparse" for kind in types)
    first = fields.optional("first_k_dense_replace", "moe_layer_start_index")
    step = fields.optional("decoder_sparse_step") or 1
    # transformers' rule for qwen2_moe, qwen3_moe: layer i has experts where (i + 1) % step == 0.
    dense = set(fields.config.get("mlp_only_layers") or ())
    layers = [i for i in range(num_layers) if i >= first and i not in dense and (i + 1) % step == 0]
    if not layers:
        raise InputError(f"{fields.name}: no layer has experts: first_k_dense_replace={first}, {num_layers} layers")
    return len(layers)


def _attention(fields: _Fields, num_layers: int, model_type: str) -> AttentionShape:
    num_heads = fields.number("num_attention_heads")
    types = fields.config.get("layer_types") or ()
    window = fields.optional("sliding_window") if "sliding_attention" in types else 0
    latent = None
    if fields.config.get("kv_lora_rank") is not None:
        latent = LatentAttention(
            query_rank=fields.optional("q_lora_rank"),
            kv_rank=fields.number("kv_lora_rank"),
            nope_dim=fields.number("qk_nope_head_dim"),
            rope_dim=fields.number("qk_rope_head_dim"),
            value_dim=fields.number("v_head_dim"),
        )
    head_dim = fields.optional("head_dim") or fields.number("hidden_size") // num_heads
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=fields.optional("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        latent=latent,
        linear=_linear(fields, num_layers, types),
        has_bias=bool(fields.config.get("attention_bias", False)),
        has_output_gate=model_type in MODELS_WITH_OUTPUT_GATE,
        num_window_layers=sum(kind == "sliding_attention" for kind in types),
        window=window,
        index_top_k=fields.optional("index_topk"),
        index_heads=fields.optional("index_n_heads"),
        index_head_dim=fields.optional("index_head_dim"),
    )


def _linear(fields: _Fields, num_layers: int, types: Any) -> LinearAttention | None:
    if not fields.optional("linear_num_key_heads"):
        return None
    listed = sum(kind == "linear_attention" for kind in types)
    interval = fields.optional("full_attention_interval") or 4  # transformers' default for qwen3_next
    return LinearAttention(
        num_layers=listed or num_layers - num_layers // interval,
        num_key_heads=fields.number("linear_num_key_heads"),
        num_value_heads=fields.number("linear_num_value_heads"),
        key_head_dim=fields.number("linear_key_head_dim"),
        value_head_dim=fields.number("linear_value_head_dim"),
        conv_width=fields.number("linear_conv_kernel_dim"),
    )
