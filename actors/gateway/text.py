"""What text do these tokens add, and has a stop string come?"""

from expertmesh.cluster.stop_strings import StopMatcher
from expertmesh.models.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """One sample's text, token by token: whole characters only, special tokens left out, cut before a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
        """Begin with no text; without a tokenizer there never is any."""
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Return the text that is certain now, and whether a stop string came; after one nothing may be pushed."""
        if self._decoder is None:
            return "", False
        return self._matcher.push(self._decoder.push(token_id))

    def flush(self) -> tuple[str, bool]:
        """Return the text held back, and whether a stop string came with it; the sample has ended."""
        if self._decoder is None:
            return "", False
        text, matched = self._matcher.push(self._decoder.flush())
        return (text, True) if matched else (text + self._matcher.flush(), False)
