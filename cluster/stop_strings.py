"""Where does a text that arrives in pieces reach one of its stop strings?"""

from expertmesh.cluster.errors import InputError


class StopMatcher:
    """Passes text on until one of the stop strings is complete; neither it nor what follows is passed on.

    The cut is before the stop string that is completed first; of several completed by the same character, before the
    longest. It depends on the text alone, not on the pieces it came in. A character costs amortised constant time for
    each stop string (Knuth, Morris and Pratt, "Fast pattern matching in strings", SIAM Journal on Computing 6, 1977).
    """

    def __init__(self, stop: tuple[str, ...]):
        """Start on an empty text; stop may be empty.

        Raises:
            InputError: A stop string is empty.
        """
        if "" in stop:
            raise InputError(f"a stop string must not be empty, got {list(stop)}")
        self._stop = stop
        self._borders = [_borders(string) for string in stop]
        # For each stop string: how many of its first characters the text ends with.
        self._matched_lengths = [0] * len(stop)
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is safe to pass on, and whether a stop string has been completed.

        Text that may be the beginning of a stop string is held back. After a match all further text is cut.
        """
        if not self._stop:
            return text, False
        if self._matched:
            return "", True
        held = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            completed = self._step(character)
            if completed:
                self._held, self._matched = "", True
                return held[: index - completed], True
        safe = len(held) - max(self._matched_lengths, default=0)
        self._held = held[safe:]
        return held[:safe], False

    def flush(self) -> str:
        """Return the text held back; for when the sequence ends without a stop string. The next begins."""
        held, self._held = self._held, ""
        self._matched_lengths = [0] * len(self._stop)
        return held

    def _step(self, character: str) -> int:
        """Move every stop string on by one character; return the length of the longest that is complete, else 0."""
        completed = 0
        for i, (string, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            length = self._matched_lengths[i]
            while length and string[length] != character:
                length = borders[length]
            if string[length] == character:
                length += 1
            self._matched_lengths[i] = length
            if length == len(string):
                completed = max(completed, length)
        return completed


def _borders(string: str) -> list[int]:
    """Return for each prefix length the length of its longest proper prefix that is also its suffix."""
    borders = [0, 0]
    for end in range(1, len(string)):
        length = borders[end]
        while length and string[length] != string[end]:
            length = borders[length]
        borders.append(length + 1 if string[length] == string[end] else 0)
    return borders
