"""transformers' generate on all cores, with grouped_mm experts, its fastest on CPU. usage: ... CHECKPOINT."""

import sys

import torch
from protocol import Generate, serve  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def load() -> Generate:
    """Load the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", experts_implementation="grouped_mm").eval()

    def generate(prompts: list[list[int]], new: int, seed: int) -> None:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
        )
        assert output.shape[1] == ids.shape[1] + new

    return generate


if __name__ == "__main__":
    serve(load)
