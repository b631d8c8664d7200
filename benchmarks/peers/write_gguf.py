"""Writes a qwen3_moe checkpoint of make_checkpoint.py, which has no tokenizer, as llama.cpp reads it, bf16.

usage: write_gguf.py CHECKPOINT FILE.gguf
"""

import json
import sys
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import torch
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# What llama.cpp wants in float32.
IN_FLOAT32 = ("norm", "ffn_gate_inp")


def main() -> None:
    """Write the file."""
    source, target = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    with safe_open(source / "model.safetensors", "pt") as file:
        for ours, theirs in OTHERS.items():
            add(writer, f"{theirs}.weight", file.get_tensor(f"{ours}.weight"))
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for ours, theirs in NAMES.items():
                add(writer, f"blk.{layer}.{theirs}.weight", file.get_tensor(f"{prefix}{ours}.weight"))
            for part in ("gate", "up", "down"):
                experts = [
                    file.get_tensor(f"{prefix}mlp.experts.{expert}.{part}_proj.weight")
                    for expert in range(config["num_local_experts"])
                ]
                add(writer, f"blk.{layer}.ffn_{part}_exps.weight", torch.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor under llama.cpp's name."""
    if any(word in name for word in IN_FLOAT32):
        writer.add_tensor(name, tensor.float().numpy())
        return
    halves = tensor.contiguous().view(torch.int16).numpy().view("uint16")
    shape = (*halves.shape[:-1], halves.shape[-1] * 2)
    writer.add_tensor(name, halves.view("uint8"), raw_shape=shape, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main()
