"""How a dispatch and its answer lie in a packet: rows first, then the pairs' rows, experts and weights.

Shape suffixes: R rows, H hidden, P (row, expert) pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind, WireDtype
from expertmesh.kernels.dispatch import PAIR_BYTES, ShardRequest, read_pairs

_TORCH_DTYPE = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.FLOAT16: torch.float16,
}
_WIRE_DTYPE = {dtype: wire for wire, dtype in _TORCH_DTYPE.items()}


def wire_dtype(dtype: torch.dtype) -> WireDtype:
    """Return how a header names a dtype."""
    return _WIRE_DTYPE[dtype]


def torch_dtype(header: PacketHeader) -> torch.dtype:
    """Return the dtype that a header names."""
    return _TORCH_DTYPE[header.dtype]


class Dispatch(NamedTuple):
    """A request as a shard reads it: rows [R, H], and int64, int64 and float32 pairs."""

    rows_RH: Tensor
    row_P: Tensor
    expert_P: Tensor
    weight_P: Tensor


def dispatch_header(
    request: ShardRequest,
    *,
    hidden: int,
    dtype: torch.dtype,
    layer: int,
    generation: int,
    sequence: int,
    epoch: int,
    by_pair: bool = False,
) -> PacketHeader:
    """Return the header of a request to a shard; by_pair asks for each pair's output by itself."""
    return PacketHeader(
        kind=PacketKind.DISPATCH,
        generation=generation,
        sequence=sequence,
        epoch=epoch,
        layer=layer,
        num_rows=request.num_rows,
        num_pairs=request.num_pairs,
        hidden=hidden,
        dtype=_WIRE_DTYPE[dtype],
        payload_bytes=request.payload_bytes,
        by_pair=by_pair,
    )


def read_dispatch(header: PacketHeader, payload: Tensor) -> Dispatch:
    """Read a request.

    Raises:
        LinkError: there are no pairs, the payload's size or its rows are not what the header says, or an expert is
            negative.
    """
    dtype = _TORCH_DTYPE[header.dtype]
    row_bytes = header.num_rows * header.hidden * dtype.itemsize
    if not header.num_pairs or payload.numel() != row_bytes + header.num_pairs * PAIR_BYTES:
        raise LinkError(f"a dispatch of {payload.numel()} bytes does not fit its header {header}")
    rows_RH = payload[:row_bytes].view(dtype).view(header.num_rows, header.hidden)
    try:
        return Dispatch(rows_RH, *read_pairs(payload[row_bytes:], header.num_pairs, header.num_rows))
    except ValueError as error:
        raise LinkError(f"a dispatch names {error}") from error


def combine_packet(request: PacketHeader, rows_RH: Tensor, epoch: int) -> tuple[PacketHeader, list[Tensor]]:
    """Return the header and parts of an answer: a row for each row or pair asked, in the request's dtype."""
    rows_RH = rows_RH.to(_TORCH_DTYPE[request.dtype])
    header = PacketHeader(
        kind=PacketKind.COMBINE,
        generation=request.generation,
        sequence=request.sequence,
        epoch=epoch,
        layer=request.layer,
        num_rows=rows_RH.shape[0],
        hidden=rows_RH.shape[1],
        dtype=request.dtype,
        payload_bytes=rows_RH.numel() * rows_RH.element_size(),
        by_pair=request.by_pair,
    )
    return header, [rows_RH]


def read_combine(header: PacketHeader, payload: Tensor) -> Tensor:
    """Read an answer: rows [R, H].

    Raises:
        LinkError: the payload's size is not what the header says.
    """
    dtype = _TORCH_DTYPE[header.dtype]
    if payload.numel() != header.num_rows * header.hidden * dtype.itemsize:
        raise LinkError(f"an answer of {payload.numel()} bytes does not fit its header {header}")
    return payload.view(dtype).view(header.num_rows, header.hidden)
