"""Typed ids with a log-friendly text form."""

from typing import NamedTuple, NewType

ShardId = NewType("ShardId", str)
WorkerId = NewType("WorkerId", str)


class ExpertKey(NamedTuple):
    """An expert of a layer. layer is the decoder layer's index in the model, dense layers counted."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}"
