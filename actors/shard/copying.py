"""Experts' weights from one shard to another over a link: one message asks for an expert, one brings it."""

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.wire import torch_dtype, wire_dtype
from expertmesh.cluster.errors import LinkError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketHeader, PacketKind

_EXPERT = struct.Struct("<I")


def fetch_expert(
    link: Link, key: ExpertKey, shapes: Mapping[str, torch.Size], dtype: torch.dtype, sequence: int
) -> dict[str, Tensor]:
    """Ask the shard at the other end for an expert.

    Args:
        link: to a shard.
        key: of the expert.
        shapes: of its parameters, by name, without the expert dimension.
        dtype: of its parameters.
        sequence: a number that no other message on this link has.

    Returns:
        The parameters by name; valid until the next message on the link.

    Raises:
        UnavailableError: the shard does not host it.
        LinkError: the link broke, or what came is not that expert.
    """
    payload = torch.frombuffer(bytearray(_EXPERT.pack(key.expert)), dtype=torch.uint8)
    header = PacketHeader(
        kind=PacketKind.FETCH,
        generation=link.generation,
        sequence=sequence,
        epoch=0,
        layer=key.layer,
        payload_bytes=payload.numel(),
    )
    link.send(header, [payload])
    answer, data = link.recv()
    if answer.sequence != sequence or answer.layer != key.layer:
        raise LinkError(f"asked for {key} as message {sequence}, got {answer}")
    if answer.kind is PacketKind.NOT_HERE:
        raise UnavailableError(f"the shard does not host {key}")
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    if answer.kind is not PacketKind.EXPERT or torch_dtype(answer) != dtype or data.numel() != size:
        raise LinkError(f"asked for {key}, {size} bytes of {dtype}, got {answer}")
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, shape in sorted(shapes.items()):
        end = start + shape.numel() * dtype.itemsize
        tensors[name] = data[start:end].view(dtype).view(shape)
        start = end
    return tensors


def asked_expert(header: PacketHeader, payload: Tensor) -> ExpertKey:
    """Read which expert a FETCH asks for.

    Raises:
        LinkError: it is damaged.
    """
    data = bytes(payload.cpu().numpy())
    if len(data) != _EXPERT.size:
        raise LinkError(f"{len(data)} bytes do not name an expert: {header}")
    return ExpertKey(header.layer, _EXPERT.unpack(data)[0])


def expert_packet(
    request: PacketHeader, tensors: Mapping[str, Tensor], epoch: int
) -> tuple[PacketHeader, list[Tensor]]:
    """Return the header and parts that bring an expert, its parameters in the order of their names."""
    parts = [tensor for _, tensor in sorted(tensors.items())]
    header = PacketHeader(
        kind=PacketKind.EXPERT,
        generation=request.generation,
        sequence=request.sequence,
        epoch=epoch,
        layer=request.layer,
        dtype=wire_dtype(parts[0].dtype),
        payload_bytes=sum(part.numel() * part.element_size() for part in parts),
    )
    return header, parts
