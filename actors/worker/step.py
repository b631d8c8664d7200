"""Which step a worker is in, for those who tell of it: its number and whose sequences it computes."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.cluster.requests import request_id_of
from expertmesh.cluster.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Step:
    """A step. number: counts from 1 with each step that the worker begins; the packets of a step carry it.

    chunks: what it computes.
    """

    number: int
    chunks: Sequence[Chunk] = ()

    @property
    def request_ids(self) -> list[str]:
        """Of the sequences in it, each once."""
        return list(dict.fromkeys(request_id_of(chunk.sequence_id) for chunk in self.chunks))


NO_STEP = Step(0)  # what a runner computes before there are requests
