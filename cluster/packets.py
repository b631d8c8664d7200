"""The header of every message on a link: of a fixed size, so that it can be read before anything else is known."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from expertmesh.cluster.errors import LinkError

HEADER_BYTES = 64
_MAGIC = 0x31584D45  # "EMX1"
_LAYOUT = struct.Struct("<IBBHIQQIIIIQ")
_BY_PAIR, _IN_MEMORY = 1, 2
# Of a packet's number: its place among the packets of its step. The bits above are the step's number.
_PLACE_BITS = 24
_PADDING = bytes(HEADER_BYTES - _LAYOUT.size)


def first_sequence(step: int) -> int:
    """Return the number below those of a step's packets, which count up from it."""
    return step << _PLACE_BITS


def step_of(sequence: int) -> int:
    """Return the worker's step that a packet with this number belongs to."""
    return sequence >> _PLACE_BITS


class PacketKind(IntEnum):
    """What a message is."""

    DISPATCH = 1  # worker to shard: rows of a layer and the (row, expert, weight) pairs
    COMBINE = 2  # shard to worker: one summed row for each row asked, or one row for each pair
    NOT_HERE = (
        3  # shard to worker: at least one expert asked for is not hosted; epoch says which placement the shard has
    )
    FAILED = 4  # shard to worker: computing failed; the payload is the reason in UTF-8
    CLOSE = 5  # either end: no more messages will come
    FETCH = 6  # shard to shard: an expert's weights are asked for; see actors/shard/copying.py
    EXPERT = 7  # shard to shard: the expert's parameters, in the order of their names
    PACKED_EXPERT = 8  # shard to shard: the expert's weights as the asking shard's kernel lays them out


class WireDtype(IntEnum):
    """Element type of the rows of a packet."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PacketHeader:
    """A message's header.

    generation: of the link, so that a packet of a former life is dropped. sequence: number of the request, repeated in
    its answer; a worker's has its step in it, see `step_of`. num_rows rows of hidden elements of dtype, and num_pairs
    pairs, make up payload_bytes. by_pair: the answer is to have, or has, each pair's output by itself, not weighted.
    in_memory: the payload does not follow, it is in the memory that the link's ends share.
    """

    kind: PacketKind
    generation: int
    sequence: int
    epoch: int
    layer: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    hidden: int = 0
    dtype: WireDtype = WireDtype.FLOAT32
    payload_bytes: int = 0
    by_pair: bool = False
    in_memory: bool = False

    def pack(self) -> bytes:
        """Return the header as HEADER_BYTES bytes."""
        return (
            _LAYOUT.pack(
                _MAGIC,
                self.kind,
                self.dtype,
                self.by_pair * _BY_PAIR | self.in_memory * _IN_MEMORY,
                self.generation,
                self.sequence,
                self.epoch,
                self.layer,
                self.num_rows,
                self.num_pairs,
                self.hidden,
                self.payload_bytes,
            )
            + _PADDING
        )

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "PacketHeader":
        """Read a header.

        Raises:
            LinkError: not a header of this protocol.
        """
        if len(data) != HEADER_BYTES:
            raise LinkError(f"a header has {HEADER_BYTES} bytes, not {len(data)}")
        magic, kind, dtype, flags, generation, sequence, epoch, *numbers = _LAYOUT.unpack_from(data)
        layer, rows, pairs, hidden, size = numbers
        if magic != _MAGIC:
            raise LinkError(f"a header begins with {_MAGIC:#x}, not {magic:#x}")
        if flags & ~(_BY_PAIR | _IN_MEMORY):
            raise LinkError(f"a header with unknown flags {flags:#x}")
        try:
            return cls(
                kind=PacketKind(kind),
                dtype=WireDtype(dtype),
                generation=generation,
                sequence=sequence,
                epoch=epoch,
                layer=layer,
                num_rows=rows,
                num_pairs=pairs,
                hidden=hidden,
                payload_bytes=size,
                by_pair=bool(flags & _BY_PAIR),
                in_memory=bool(flags & _IN_MEMORY),
            )
        except ValueError as error:
            raise LinkError(f"a header with an unknown field: {error}") from error
