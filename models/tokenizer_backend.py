"""What encodes and decodes for a Tokenizer: the tokenizers library alone where that is the same, else transformers.

Transformers takes seconds to import, and what it makes of most checkpoints' files is one object of the tokenizers
library. That object is kept in this machine's cache, by the content of the files: transformers is needed but once.
"""

import hashlib
import importlib.metadata
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from expertmesh.kernels.cache_folder import cache_folder, keep

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """A tokenizer: text to ids, ids to text without special tokens."""

    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer adds unless told not to."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens and ids outside the vocabulary are left out, no spaces cleaned up."""

    def name(self, token_id: int) -> str | None:
        """Return the token as the vocabulary names it; None: not in it."""

    def token_id(self, name: str) -> int | None:
        """Return the id of a token's name; None: not in the vocabulary."""


class LibraryBackend:
    """See Backend; an object of the tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See Backend."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Backend."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def name(self, token_id: int) -> str | None:
        """See Backend."""
        name: str | None = self._tokenizer.id_to_token(token_id)
        return name

    def token_id(self, name: str) -> int | None:
        """See Backend."""
        token_id: int | None = self._tokenizer.token_to_id(name)
        return token_id


class TransformersBackend:
    """See Backend; a tokenizer of transformers that does more than the library's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See Backend."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Backend."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def name(self, token_id: int) -> str | None:
        """See Backend."""
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return name

    def token_id(self, name: str) -> int | None:
        """See Backend."""
        token_id: int | None = self._tokenizer.convert_tokens_to_ids(name)
        return token_id


def open_backend(directory: Path, names: Sequence[str]) -> Backend:
    """Open the tokenizer of a checkpoint directory, from the cache if it is there.

    Args:
        directory: of the checkpoint.
        names: of its tokenizer's files.

    Raises:
        Exception: of any kind: what transformers raises for files that it cannot read.
    """
    kept = cache_folder() / f"tokenizer-{_key(directory, names)}.json"
    if kept.is_file():
        try:
            return LibraryBackend(tokenizers.Tokenizer.from_file(str(kept)))
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower; the checkpoint has it all
            _log.warning("%s is damaged and made anew: %s", kept, error)
    # Late, so that whoever finds a kept one does not load transformers.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    if not _is_library_alone(tokenizer):
        return TransformersBackend(tokenizer)
    library = tokenizer.backend_tokenizer
    library.no_truncation()
    library.no_padding()
    _keep(library, kept)
    return LibraryBackend(library)


def _is_library_alone(tokenizer: Any) -> bool:
    """Say whether a tokenizer of transformers encodes and decodes by the library's alone, as most families' do."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    own = ("encode", "decode", "_encode_plus", "_decode", "convert_ids_to_tokens", "convert_tokens_to_ids")
    return (
        isinstance(tokenizer, TokenizersBackend)
        and all(getattr(kind, name) is getattr(TokenizersBackend, name) for name in own)
        and not tokenizer.split_special_tokens
    )


def _key(directory: Path, names: Sequence[str]) -> str:
    """Return a key of all that the tokenizer depends on: its files, the model's type, the libraries."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted({*names, "config.json", "special_tokens_map.json", "added_tokens.json"}):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    for library in ("transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def _keep(library: tokenizers.Tokenizer, path: Path) -> None:
    try:
        keep(path, lambda file: library.save(str(file)))
    except OSError as error:
        _log.warning("the tokenizer is not kept for the next start: %s", error)
