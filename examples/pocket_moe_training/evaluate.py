"""What the trained model is worth: validation loss, expert shares and a sample, each by kind.

B windows, S tokens a window, V vocabulary, T tokens, L layers, E experts.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from examples.pocket_moe_training.tokens import Stream, draw_batch

PROMPTS = {
    "code": "class Queue:\n    def __init__(self, maxsize=0):\n",
    "legal": "Permission is hereby granted, free of charge, to any person",
    "prose": "Return a new list that contains",
    "manual": ".SH OPTIONS\n.TP\n\\fB\\-\\-help\\fR\n",
    "table": "| U+0041 | A | LATIN CAPITAL LETTER A | Lu |\n",
}


@torch.inference_mode()
def evaluate_kind(
    model: Qwen3MoeForCausalLM, stream: Stream, *, num_windows: int, window: int
) -> tuple[float, npt.NDArray[np.float64]]:
    """Measure one kind on windows drawn with a fixed seed.

    Returns:
        Mean loss in nats a token, and shares_LE: the share of its choices that each layer's tokens gave each expert
        (each row sums to 1).
    """
    inputs_BS, targets_BS = draw_batch({"": stream}, num_windows, window, np.random.default_rng(0))
    output = model(input_ids=inputs_BS, use_cache=False, output_router_logits=True)
    loss = functional.cross_entropy(output.logits.float().flatten(0, 1), targets_BS.flatten())
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    shares_LE = []
    for logits_TE in output.router_logits:
        counts_E = logits_TE.topk(top_k, dim=-1).indices.flatten().bincount(minlength=num_experts)
        shares_LE.append((counts_E / counts_E.sum()).double().numpy())
    return float(loss), np.stack(shares_LE)


@torch.inference_mode()
def continue_text(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, num_tokens: int
) -> str:
    """Continue a prompt greedily by up to num_tokens tokens; return the new text alone."""
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def total_variation(shares_a_LE: npt.NDArray[np.float64], shares_b_LE: npt.NDArray[np.float64]) -> float:
    """Total variation distance between two rows of shares, mean over layers: 0 the same experts, 1 none in common."""
    return float(np.abs(shares_a_LE - shares_b_LE).sum(axis=1).mean() / 2)
