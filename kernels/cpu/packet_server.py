"""A shard's loop over one link, compiled: see packet_server.cpp.

Shape suffixes: E experts of a layer.
"""

import ctypes
import functools
import math
import os

from torch import Tensor

from expertmesh.kernels.cpu.build import load_expert_mlp, load_packet_server
from expertmesh.kernels.cpu.exchange import Memory
from expertmesh.kernels.cpu.expert_mlp import PackedSlots
from expertmesh.kernels.cpu.isa import best_isa
from expertmesh.kernels.cpu.threads import num_threads

_ADDRESS = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _ADDRESS) for name in ("slot_E", "up", "down", "up_bias", "down_bias")),
        *((name, ctypes.c_int64) for name in ("experts", "slots", "hidden", "width")),
        *((name, ctypes.c_int32) for name in ("has_gate", "kind")),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "shift")),
    )


class LastPacket(ctypes.Structure):
    """The last packet that came over a link. seconds: until its answer was sent, 0 before."""

    _fields_ = (("sequence", ctypes.c_uint64), ("layer", ctypes.c_uint32), ("seconds", ctypes.c_double))


class PacketServer:
    """Answers dispatch packets in bf16 from packed experts, on the thread of each link that calls `serve`.

    Any thread may call any method.
    """

    def __init__(self, num_layers: int) -> None:
        """Make a server without experts; layers are numbered below num_layers."""
        library, experts = _library(), load_expert_mlp()
        assert library is not None, "PacketServer() without compiled kernels"
        assert experts is not None, "PacketServer() without compiled kernels"
        self._library = library
        run = ctypes.cast(experts.expert_mlp, _ADDRESS)
        # Never freed: a link's thread may be inside it when the process ends.
        self._server = library.packet_server_new(run, best_isa(), num_threads(), num_layers)
        self._kept: dict[int, tuple[PackedSlots, Tensor]] = {}

    def forget_layer(self, layer: int) -> None:
        """Answer with none of this layer's experts any more; returns when none is in use."""
        self._library.packet_server_set_layer(self._server, layer, None)
        self._kept.pop(layer, None)

    def set_layer(self, layer: int, packed: PackedSlots, slot_E: Tensor) -> None:
        """Answer with these experts from now on; returns when no packet is computed with those they replace.

        Args:
            layer: its number.
            packed: the experts.
            slot_E: int64, the slot of each expert, -1: it has none.
        """
        how = packed.activation
        record = _Layer(
            slot_E=slot_E.data_ptr(),
            **{name: ctypes.cast(table, _ADDRESS) for name, table in packed.tables().items() if table is not None},
            experts=len(slot_E),
            slots=len(packed.experts),
            hidden=packed.hidden,
            width=packed.width,
            has_gate=how.has_gate,
            kind=how.kind,
            alpha=how.alpha,
            limit=how.limit,
            shift=how.shift,
        )
        self._library.packet_server_set_layer(self._server, layer, ctypes.byref(record))
        self._kept[layer] = packed, slot_E

    def set_epoch(self, epoch: int) -> None:
        """Name this epoch in answers."""
        self._library.packet_server_set_epoch(self._server, epoch)

    def counters(self) -> tuple[int, int, float, float]:
        """Return packets answered, batches in which, seconds computing, and seconds that packets waited for that."""
        values = (ctypes.c_double * 4)()
        self._library.packet_server_counters(self._server, values)
        return int(values[0]), int(values[1]), values[2], values[3]

    def serve(
        self,
        descriptor: int,
        memory: Memory,
        generation: int,
        *,
        last: LastPacket | None = None,
        slow_s: float = math.inf,
    ) -> bytes:
        """Answer a link's packets until one comes that is not for this server, one was slow, or the peer is gone.

        Args:
            descriptor: a stream socket that blocks, with deadlines of its own.
            memory: the link's.
            generation: of the link.
            last: tells the link's last packet afterwards.
            slow_s: return after the answer of a packet that took longer.

        Returns:
            What was read and not answered.

        Raises:
            OSError: an answer was not taken within the deadline, or the peer is gone.
        """
        left, left_bytes = _ADDRESS(), ctypes.c_int64()
        fault = self._library.packet_server_serve(
            self._server,
            descriptor,
            memory,
            generation,
            slow_s,
            ctypes.byref(LastPacket() if last is None else last),
            ctypes.byref(left),
            ctypes.byref(left_bytes),
        )
        if fault:
            raise OSError(fault, os.strerror(fault) if fault > 0 else "an answer was not taken in time")
        return ctypes.string_at(left, left_bytes.value) if left_bytes.value else b""


def can_serve() -> bool:
    """Say whether there are compiled kernels."""
    return _library() is not None and load_expert_mlp() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_packet_server()
    if library is None:
        return None
    number, address = ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
    library.packet_server_new.argtypes = [_ADDRESS, ctypes.c_int, ctypes.c_int, number]
    library.packet_server_new.restype = _ADDRESS
    library.packet_server_set_layer.argtypes = [_ADDRESS, number, ctypes.POINTER(_Layer)]
    library.packet_server_set_layer.restype = None
    library.packet_server_set_epoch.argtypes = [_ADDRESS, ctypes.c_uint64]
    library.packet_server_set_epoch.restype = None
    library.packet_server_counters.argtypes = [_ADDRESS, ctypes.POINTER(ctypes.c_double)]
    library.packet_server_counters.restype = None
    library.packet_server_serve.argtypes = [
        *(_ADDRESS, ctypes.c_int, ctypes.POINTER(Memory), ctypes.c_uint32, ctypes.c_double),
        *(ctypes.POINTER(LastPacket), address, ctypes.POINTER(number)),
    ]
    return library
