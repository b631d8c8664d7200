"""Experts' weights from one shard to another over a link: one message asks for an expert, one brings it.

They come as the asking shard's CPU kernel lays them out where the other one has them so too, else by parameter.
"""

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.wire import torch_dtype, wire_dtype
from expertmesh.cluster.errors import LinkError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketHeader, PacketKind
from expertmesh.kernels.cpu.expert_mlp import LAYOUT, PackedExpert, PackedSizes
from expertmesh.models.layer_weights import ExpertTensors

# The payload of a FETCH: the expert's number in its layer, and the kernel layout in which it may come, 0: in none.
_QUESTION = struct.Struct("<II")


def fetch_expert(
    link: Link,
    key: ExpertKey,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    sequence: int,
    packed: PackedSizes | None = None,
) -> ExpertTensors:
    """Ask the shard at the other end for an expert.

    Args:
        link: to a shard.
        key: of the expert.
        shapes: of its parameters, by name, without the expert dimension.
        dtype: of its parameters.
        sequence: a number that no other message on this link has.
        packed: its sizes in the CPU kernel's layout, if it may come in that.

    Returns:
        The parameters by name, or the packed expert; valid until the next message on the link.

    Raises:
        UnavailableError: the shard does not host it.
        LinkError: the link broke, or what came is not that expert.
    """
    payload = torch.frombuffer(bytearray(_QUESTION.pack(key.expert, LAYOUT if packed else 0)), dtype=torch.uint8)
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
    is_packed = packed is not None and answer.kind is PacketKind.PACKED_EXPERT
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    if not (is_packed or answer.kind is PacketKind.EXPERT) or torch_dtype(answer) != dtype or data.numel() != size:
        raise LinkError(f"asked for {key}, {size} bytes of {dtype}, got {answer}")
    if packed is not None and is_packed:
        return packed.split(data.view(dtype))
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, shape in sorted(shapes.items()):
        end = start + shape.numel() * dtype.itemsize
        tensors[name] = data[start:end].view(dtype).view(shape)
        start = end
    return tensors


def asked_expert(header: PacketHeader, payload: Tensor) -> tuple[ExpertKey, bool]:
    """Read which expert a FETCH asks for, and whether it may be answered in this kernel's layout.

    Raises:
        LinkError: it is damaged.
    """
    data = bytes(payload.cpu().numpy())
    if len(data) != _QUESTION.size:
        raise LinkError(f"{len(data)} bytes do not name an expert: {header}")
    expert, layout = _QUESTION.unpack(data)
    return ExpertKey(header.layer, expert), layout == LAYOUT


def expert_packet(request: PacketHeader, expert: ExpertTensors, epoch: int) -> tuple[PacketHeader, list[Tensor]]:
    """Return the header and parts that bring an expert, its parameters in the order of their names or packed."""
    if isinstance(expert, PackedExpert):
        kind, parts = PacketKind.PACKED_EXPERT, expert.parts
    else:
        kind, parts = PacketKind.EXPERT, [tensor for _, tensor in sorted(expert.items())]
    header = PacketHeader(
        kind=kind,
        generation=request.generation,
        sequence=request.sequence,
        epoch=epoch,
        layer=request.layer,
        dtype=wire_dtype(parts[0].dtype),
        payload_bytes=sum(part.numel() * part.element_size() for part in parts),
    )
    return header, parts
