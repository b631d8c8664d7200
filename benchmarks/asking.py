"""A process of a peer, in an environment of its own, that is asked and answers in lines of JSON."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Peer:
    """What a running peer is asked with."""

    _questions: IO[str]
    _answers: IO[str]

    def ask(self, question: dict[str, Any]) -> dict[str, float]:
        """Send a question and return the answer to it."""
        print(json.dumps(question), file=self._questions, flush=True)
        return self.read()

    def read(self) -> dict[str, float]:
        """Return the next line that the peer writes."""
        answer: dict[str, float] = json.loads(self._answers.readline())
        return answer


@contextlib.contextmanager
def running_peer(command: Sequence[str]) -> Iterator[Peer]:
    """Start a peer and end it with the block: it ends by itself once nobody can ask any more."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Peer(process.stdin, process.stdout)
        finally:
            process.stdin.close()
            process.wait(timeout=60)
