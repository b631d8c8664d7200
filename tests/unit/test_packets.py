import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import HEADER_BYTES, PacketHeader, PacketKind, WireDtype

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
HEADER = PacketHeader(kind=PacketKind.DISPATCH, generation=1, sequence=2, epoch=3)


@given(
    st.builds(
        PacketHeader,
        kind=st.sampled_from(PacketKind),
        generation=UINT32,
        sequence=UINT64,
        epoch=UINT64,
        layer=UINT32,
        num_rows=UINT32,
        num_pairs=UINT32,
        hidden=UINT32,
        dtype=st.sampled_from(WireDtype),
        payload_bytes=UINT64,
        by_pair=st.booleans(),
        in_memory=st.booleans(),
    )
)
def test_a_header_survives_the_wire(header: PacketHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert PacketHeader.unpack(packed) == header


def test_the_layout_is_fixed() -> None:
    """Another release reads the same bytes: little endian, these offsets, zeros at the end."""
    header = PacketHeader(
        kind=PacketKind.COMBINE,
        generation=0x0A0B0C0D,
        sequence=1,
        epoch=2,
        layer=3,
        num_rows=4,
        num_pairs=5,
        hidden=6,
        dtype=WireDtype.FLOAT16,
        payload_bytes=7,
        by_pair=True,
    )
    numbers = struct.pack("<QQIIIIQ", 1, 2, 3, 4, 5, 6, 7)
    assert header.pack() == b"EMX1" + bytes([2, 2, 1, 0]) + b"\x0d\x0c\x0b\x0a" + numbers + bytes(12)


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_another_size_is_refused(size: int) -> None:
    data = (HEADER.pack() + bytes(1))[:size]
    with pytest.raises(LinkError, match=f"{HEADER_BYTES} bytes, not {size}"):
        PacketHeader.unpack(data)


@given(st.integers(0, 3), st.integers(1, 255))
def test_another_magic_is_refused(offset: int, flipped: int) -> None:
    data = bytearray(HEADER.pack())
    data[offset] ^= flipped
    with pytest.raises(LinkError, match="a header begins with 0x31584d45, not"):
        PacketHeader.unpack(bytes(data))


@pytest.mark.parametrize(("offset", "value"), [(4, 0), (4, 9), (4, 255), (5, 3), (5, 255)])
def test_an_unknown_kind_or_dtype_is_refused(offset: int, value: int) -> None:
    data = bytearray(HEADER.pack())
    data[offset] = value
    with pytest.raises(LinkError, match=f"unknown field: {value} is not a valid"):
        PacketHeader.unpack(bytes(data))


def test_unknown_flags_are_refused() -> None:
    data = bytearray(HEADER.pack())
    data[6] = 4
    with pytest.raises(LinkError, match="unknown flags 0x4"):
        PacketHeader.unpack(bytes(data))
