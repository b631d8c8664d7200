"""Text to token ids and back: a checkpoint's tokenizer, and the decoding of tokens that come one at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

from expertmesh.cluster.errors import CorruptCheckpointError, InputError, UnsupportedModelError
from expertmesh.models.tokenizer_backend import Backend, open_backend

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# What a decoder writes for bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UTF8_BYTES = 4


def open_tokenizer(directory: Path) -> "Tokenizer | None":
    """Open the tokenizer of a checkpoint directory from its files alone; return None if it has none.

    Raises:
        CorruptCheckpointError: A tokenizer file is damaged; the message names it.
        UnsupportedModelError: The files are of a kind that cannot be read here, such as one without tokenizer.json that
            needs another library.
    """
    names = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not names:
        return None
    for name in names:
        if name.endswith(".json"):
            _check_json(directory / name)
    try:
        return Tokenizer(open_backend(directory, names))
    except Exception as error:
        # Its libraries raise bare exceptions of many kinds for a file whose content is not what they expect.
        found = f"{type(error).__name__}: {error}"
        if "tokenizer.json" in names:
            raise CorruptCheckpointError(f"{directory / 'tokenizer.json'} cannot be loaded: {found}") from error
        raise UnsupportedModelError(f"{directory} has {names}, but no tokenizer.json is there: {found}") from error


def _check_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._byte_ids = self._find_byte_ids()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of the text, with the special tokens that the tokenizer adds unless told not to.

        Raises:
            InputError: The text holds half of a surrogate pair, which no encoding has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text is not valid Unicode: {error}") from error
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids: special tokens and ids outside the vocabulary left out, no spaces cleaned up."""
        return self._backend.decode(list(ids))

    def has_text(self, token_id: int) -> bool:
        """Say whether decode() does not leave this token out."""
        return token_id not in self._backend.special_ids and self._backend.name(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """Return what a token adds to a text, or its name in the vocabulary if that is not whole characters."""
        # Decoded behind itself: some decoders drop the space before the first token of a text.
        alone = self.decode([token_id])
        text = self.decode([token_id, token_id])[len(alone) :]
        if self.has_text(token_id) and _REPLACEMENT not in text:
            return text
        return self._backend.name(token_id) or ""

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the tokens <0x00> to <0xFF> where the decoder reads them as bytes (byte fallback), else empty.

        Such a decoder takes a run of byte tokens as a whole: one bad byte turns each byte of the run into U+FFFD.
        """
        return self._byte_ids

    def _find_byte_ids(self) -> frozenset[int]:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = [token_id for name in names if (token_id := self._backend.token_id(name)) is not None]
        if [self._backend.name(token_id) for token_id in ids] != names:
            return frozenset()
        # The names alone prove nothing: some vocabularies hold them as plain text.
        return frozenset(ids) if self.decode(ids[byte] for byte in "é".encode()) == "é" else frozenset()


class IncrementalDecoder:
    """Decodes one sequence token by token: the pieces, with flush() at the end, join to decode() of all its ids.

    A piece never changes later and never holds half a character: tokens are held back while the text ends in an
    unfinished character, and in a run of byte-fallback tokens until the run ends: until then it may still turn out bad.

    How a token reads may depend on those before it (the first loses its space), so each is decoded behind the tokens
    of the last piece, and what those read as alone is taken off: the technique of text-generation servers, such as
    `detokenize_incrementally` in vLLM. A token costs amortised constant time, however long the sequence.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The tokens of the last piece, num_read of them, reading as read_text alone; then those held back.
        self._window: list[int] = []
        self._num_read = 0
        self._read_text = ""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is complete now, often none."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._release_oldest(text)
        piece = text[len(self._read_text) :]
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._tokenizer.decode(self._window)
        return piece

    def flush(self) -> str:
        """Return the text of the tokens held back; for when the sequence has ended. The next token starts another."""
        piece = self._tokenizer.decode(self._window)[len(self._read_text) :]
        self._window, self._num_read, self._read_text = [], 0, ""
        return piece

    def _release_oldest(self, text: str) -> str:
        """Pass on what is held if it is too much for one unfinished character: some of its bytes are bad for good.

        A place between two tokens is inside a character exactly if the two sides decoded apart read otherwise than
        together; and of four places in a row one is not inside.
        """
        size = len(self._window)
        if size - self._num_read <= _MAX_UTF8_BYTES:
            return ""
        for place in range(size - 1, size - 1 - _MAX_UTF8_BYTES, -1):
            left = self._tokenizer.decode(self._window[:place])
            if left + self._tokenizer.decode(self._window[place:]) == text:
                piece = left[len(self._read_text) :]
                self._window, self._num_read, self._read_text = self._window[place:], 0, ""
                return piece
        return ""
