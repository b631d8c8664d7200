"""A process of a peer, in an environment of its own, that is asked and answers in lines of JSON."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil


@dataclass(frozen=True)
class Peer:
    """What a running peer is asked with."""

    _questions: IO[str]
    _answers: IO[str]
    _pid: int

    def ask(self, question: dict[str, Any]) -> dict[str, float]:
        """Send a question and return the answer to it."""
        print(json.dumps(question), file=self._questions, flush=True)
        return self.read()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Have its processes stand still meanwhile: threads that wait for work take cores too."""
        process = psutil.Process(self._pid)
        family = [process, *process.children(recursive=True)]
        for one in family:
            one.suspend()
        try:
            yield
        finally:
            for one in family:
                one.resume()

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
            yield Peer(process.stdin, process.stdout, process.pid)
        finally:
            process.stdin.close()
            process.wait(timeout=60)
