"""Write the random checkpoint that the benchmarks serve: qwen3_moe, 1.385 billion parameters, bf16, no tokenizer.

usage: python benchmarks/make_checkpoint.py DIRECTORY [--small]
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": False,
}
SMALL = {**SIZES, "num_hidden_layers": 4, "vocab_size": 4096}


def main() -> int:
    """Make the model and write it to the directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--small", action="store_true", help="4 layers and 4,096 tokens, to try a benchmark out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**(SMALL if arguments.small else SIZES), max_position_embeddings=8192)
    print(f"making random weights of {'the small' if arguments.small else 'the'} model ...", flush=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(f"writing {sum(p.numel() for p in model.parameters()) / 1e9:.3f} billion parameters ...", flush=True)
    model.save_pretrained(arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
