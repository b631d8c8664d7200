"""The model card: what was trained, from what, and what it is worth, measured on the checkpoint as it was saved.

L layers, E experts.
"""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.pocket_moe_training.evaluate import PROMPTS, continue_text, evaluate_kind, total_variation
from examples.pocket_moe_training.tokens import Streams

EVALUATION_WINDOWS = 16
SAMPLE_TOKENS = 120
HOTTEST = 4


def write_card(folder: Path, streams: Streams, *, seed: int, window: int, training: str) -> str:
    """Evaluate the checkpoint in folder and write its README.md.

    Args:
        folder: A saved checkpoint; it is loaded again, so that the card is about the bfloat16 weights that are shipped.
        streams: Token streams by kind; the validation part is measured.
        seed: Seed of the training.
        window: Tokens a training window had at the end.
        training: A line about the training's length.

    Returns:
        The measured part of the card.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses: dict[str, float] = {}
    shares: dict[str, npt.NDArray[np.float64]] = {}
    for kind, stream in streams.validation.items():
        losses[kind], shares[kind] = evaluate_kind(model, stream, num_windows=EVALUATION_WINDOWS, window=window)
    samples = {
        kind: continue_text(model, tokenizer, prompt, num_tokens=SAMPLE_TOKENS)
        for kind, prompt in PROMPTS.items()
        if kind in streams.train
    }
    measured = "\n".join(
        [
            f"Seed {seed}; {training}",
            "",
            *_loss_table(losses, {kind: len(stream) for kind, stream in streams.train.items()}),
            "",
            *_expert_tables(shares),
            "",
            *_sample_section(samples),
        ]
    )
    size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    head = HEAD.format(parameters=num_parameters / 1e6, megabytes=size_bytes / 1e6, window=window)
    (folder / "README.md").write_text(head + measured + "\n")
    return measured


def _loss_table(losses: dict[str, float], train_tokens: dict[str, int]) -> list[str]:
    rows = [f"| {kind} | {train_tokens[kind]:,} | {loss:.2f} |" for kind, loss in losses.items()]
    return ["| kind | training tokens | held-out loss, nats a token |", "|---|---|---|", *rows]


def _expert_tables(shares: dict[str, npt.NDArray[np.float64]]) -> list[str]:
    """Tabulate each kind's hottest experts, how unlike the kinds are, and the coldest expert of all kinds together."""
    num_layers = next(iter(shares.values())).shape[0]
    lines = [
        f"The {HOTTEST} hottest experts of each kind, as expert:percent of the layer's choices (even: 6%):",
        "",
        "| kind | " + " | ".join(f"layer {layer}" for layer in range(num_layers)) + " |",
        "|---" * (num_layers + 1) + "|",
    ]
    for kind, shares_LE in shares.items():
        cells = [
            " ".join(f"{expert}:{100 * shares_E[expert]:.0f}" for expert in np.argsort(-shares_E)[:HOTTEST])
            for shares_E in shares_LE
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    pairs = ", ".join(
        f"{a} and {b} {total_variation(shares[a], shares[b]):.2f}" for a, b in itertools.combinations(shares, 2)
    )
    coldest = np.mean(list(shares.values()), axis=0).min()
    return [
        *lines,
        "",
        f"Total variation distance of expert shares, mean over layers: {pairs}.",
        f"The coldest expert of any layer takes {100 * coldest:.1f}% of the layer's choices, all kinds together.",
    ]


def _sample_section(samples: dict[str, str]) -> list[str]:
    lines = [f"Greedy samples, {SAMPLE_TOKENS} tokens:"]
    for kind, text in samples.items():
        lines += ["", f"*{kind}*", "", "~~~~~text", f"{PROMPTS[kind]}[...]{text}", "~~~~~"]
    return lines


HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Pocket MoE

A Mixture-of-Experts language model of {parameters:.2f} million parameters, {megabytes:.1f} MB with its tokenizer,
trained from nothing on one CPU core: `Qwen3MoeForCausalLM`, 4 layers, 16 experts a layer of which 4 work on a token,
bfloat16. It is there so that a Mixture-of-Experts server can be started, tested and shown without downloading anything:
it has real routing (kinds of text heat different experts) and writes text that looks like its sources. It knows
nothing; use it for nothing else.

Made by `python -m examples.pocket_moe_training.train`. The text, five kinds in equal parts, is what a Debian or Ubuntu
machine with Python has on its disk: the Python standard library's source (code), licence texts (legal), Python's
language reference and docstrings (prose), man pages in roff (manual), a table of Unicode characters (table). Those
files keep their own licences. Mail addresses were replaced before training. One document in twenty was held out for
validation; paragraphs of legal text are told apart only by their exact words, so near twins remain on both sides.

Training windows were {window} tokens long in the last quarter of the time, half of that before. Positions go up to
2048; quality falls beyond the training length.
Greedy decoding soon repeats itself in code and prose, and drifts from one licence's words into another's.

## Training

"""
