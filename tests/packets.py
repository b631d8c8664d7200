"""Dispatch packets as tests make them, from rows and pairs of their own."""

from typing import Any

from torch import Tensor

from expertmesh.actors.wire import dispatch_header
from expertmesh.cluster.packets import PacketHeader
from expertmesh.kernels.dispatch import ShardPairs, request_of


def dispatch_packet(rows_RH: Tensor, pairs: ShardPairs, **numbers: Any) -> tuple[PacketHeader, list[Tensor]]:
    """Return the header and parts of a request; numbers: layer, generation, sequence, epoch, by_pair."""
    request = request_of(0, rows_RH, pairs)
    return dispatch_header(request, hidden=rows_RH.shape[1], dtype=rows_RH.dtype, **numbers), request.parts
