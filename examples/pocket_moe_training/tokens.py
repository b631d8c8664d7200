"""From text to token streams: a byte-level BPE tokenizer trained on the corpus, and windows drawn from all kinds.

B windows in a batch, S tokens a window.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.pocket_moe_training.corpus import Corpus, Document

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARS_PER_KIND = 1_500_000

Stream = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Streams:
    """The token ids of each kind, documents joined by the end-of-text token."""

    train: dict[str, Stream]
    validation: dict[str, Stream]


def train_tokenizer(corpus: Corpus, *, vocab_size: int, max_position: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on an even share of each kind. All 256 bytes are tokens, so any UTF-8 text survives it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "".join(document.text for document in documents if not document.held_out)[:TOKENIZER_CHARS_PER_KIND]
        for documents in corpus.documents.values()
    ]
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=max_position,
    )


def encode_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Streams:
    """Encode all documents, the held-out ones apart."""
    end = int(tokenizer.eos_token_id)

    def encode(documents: list[Document]) -> Stream:
        encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
        return np.fromiter((token for ids in encoded for token in (*ids, end)), dtype=np.uint16)

    kinds = corpus.documents.items()
    return Streams(
        train={kind: encode([document for document in found if not document.held_out]) for kind, found in kinds},
        validation={kind: encode([document for document in found if document.held_out]) for kind, found in kinds},
    )


def draw_batch(
    streams: dict[str, Stream], rows_per_kind: int, window: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows at random, as many of each kind.

    Returns:
        inputs_BS and targets_BS, int64; targets are the inputs one token on.
    """
    rows = [
        stream[start : start + window + 1]
        for stream in streams.values()
        for start in rng.integers(0, len(stream) - window - 1, rows_per_kind)
    ]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return ids[:, :-1], ids[:, 1:]
