"""A layer's way to its shards and back in one compiled call: see dispatch_exchange in dispatch.cpp.

Shape suffixes: T tokens, H hidden, K choices a token, S shards.
"""

import ctypes
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_dispatch
from expertmesh.kernels.cpu.threads import num_threads

_ADDRESS = ctypes.c_void_p
_WIRE_DTYPE = {torch.float32: 0, torch.bfloat16: 1}


class State(IntEnum):
    """What became of a shard's packet."""

    NOT_ASKED = 0
    DONE = 1
    OTHER_ANSWER = 2  # it is under way, and not what was asked for
    NOT_SENT = 3
    NOT_RECEIVED = 4


class Memory(ctypes.Structure):
    """Where a link's payloads may lie: addresses and room in bytes, see memory.h; all 0: it shares no memory."""

    _fields_ = (("outgoing", _ADDRESS), ("incoming", _ADDRESS), ("room_bytes", ctypes.c_int64))


class _Record(ctypes.Structure):
    _fields_ = (
        *((name, _ADDRESS) for name in ("hidden_TH", "ids_TK", "weights_TK", "shard_TK")),
        *((name, _ADDRESS) for name in ("residual_TH", "out_TH", "sum_TH")),
        *(
            (name, _ADDRESS)
            for name in ("fd_S", "memory_S", "generation_S", "state_S", "errno_S", "left_S", "left_bytes_S")
        ),
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "shards", "hidden")),
        *((name, ctypes.c_uint64) for name in ("epoch", "sequence")),
        *((name, ctypes.c_int64) for name in ("sent_bytes", "received_bytes")),
        *((name, ctypes.c_double) for name in ("pack_s", "send_s", "wait_s", "add_s")),
        *((name, ctypes.c_uint32) for name in ("layer", "dtype")),
        ("threads", ctypes.c_int32),
    )


def can_exchange(hidden_TH: Tensor) -> bool:
    """Say whether these rows can be sent by compiled code."""
    is_plain = hidden_TH.device.type == "cpu" and hidden_TH.dtype in _WIRE_DTYPE and hidden_TH.is_contiguous()
    return is_plain and load_dispatch() is not None


class Exchange:
    """Sends a layer's tokens to a number of shards over sockets, and adds up their answers; one thread at a time.

    After `run`: state_S (State of each shard), sent_bytes and received_bytes of payloads.
    """

    def __init__(self, num_shards: int) -> None:
        library = load_dispatch()
        assert library is not None, "Exchange() without a compiled kernel"
        self.function = library.dispatch_exchange
        self.function.argtypes = [ctypes.POINTER(_Record)]
        self._fd_S = (ctypes.c_int32 * num_shards)()
        self._memory_S = (Memory * num_shards)()
        self._generation_S = (ctypes.c_uint32 * num_shards)()
        self.state_S = (ctypes.c_int32 * num_shards)()
        self._errno_S = (ctypes.c_int32 * num_shards)()
        self._left_S = (_ADDRESS * num_shards)()
        self._left_bytes_S = (ctypes.c_int64 * num_shards)()
        self._record = _Record(
            fd_S=ctypes.addressof(self._fd_S),
            memory_S=ctypes.addressof(self._memory_S),
            generation_S=ctypes.addressof(self._generation_S),
            state_S=ctypes.addressof(self.state_S),
            errno_S=ctypes.addressof(self._errno_S),
            left_S=ctypes.addressof(self._left_S),
            left_bytes_S=ctypes.addressof(self._left_bytes_S),
            shards=num_shards,
        )

    def set_shards(
        self, descriptors: list[int], memories: list[tuple[int, int, int]], generations: list[int], epoch: int
    ) -> None:
        """Say where the shards are.

        Args:
            descriptors: of each one's stream socket, which blocks, with deadlines of its own; -1: it is not asked.
            memories: of each one's link, what `Memory` holds.
            generations: of each one's link.
            epoch: the placement's.
        """
        self._fd_S[:] = descriptors  # type: ignore[assignment]
        self._memory_S[:] = memories  # type: ignore[assignment]
        self._generation_S[:] = generations  # type: ignore[assignment]
        self._record.epoch = epoch

    def lay_out(
        self,
        hidden_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        shard_TK: Tensor,
        *,
        sum_TH: Tensor,
        out_TH: Tensor,
        residual_TH: Tensor | None = None,
    ) -> ctypes.Structure:
        """Say what is sent and where the answers go, all contiguous; return the record for other compiled code.

        Args:
            hidden_TH: bf16 or float32.
            ids_TK: the experts chosen, int64.
            weights_TK: the router's weights, float32.
            shard_TK: who runs each pair, int32; -1: nobody.
            sum_TH: float32, the sum of the answers that came, in the order of the shards, where some did not.
            out_TH: the sum in the dtype of hidden_TH where all came.
            residual_TH: bf16, what that is added to; hidden_TH is bf16 too then.
        """
        record = self._record
        record.tokens, record.choices = shard_TK.shape
        record.hidden, record.dtype = hidden_TH.shape[1], _WIRE_DTYPE[hidden_TH.dtype]
        record.hidden_TH, record.ids_TK, record.weights_TK = (t.data_ptr() for t in (hidden_TH, ids_TK, weights_TK))
        record.shard_TK, record.sum_TH, record.out_TH = (t.data_ptr() for t in (shard_TK, sum_TH, out_TH))
        record.residual_TH = None if residual_TH is None else residual_TH.data_ptr()
        record.threads = num_threads()
        return record

    def run(
        self,
        hidden_TH: Tensor,
        ids_TK: npt.NDArray[np.int64],
        weights_TK: npt.NDArray[np.float32],
        shard_TK: npt.NDArray[np.int32],
        sum_TH: Tensor,
        *,
        layer: int,
        sequence: int,
    ) -> Tensor | None:
        """Send, receive and add, as `lay_out` describes it, for layer `layer`.

        The first shard's packet has number `sequence`; the others count up from it.

        Returns:
            The sum in the dtype of hidden_TH once all is done, else None.
        """
        ids, weights, shards = (torch.from_numpy(np.ascontiguousarray(a)) for a in (ids_TK, weights_TK, shard_TK))
        out_TH = torch.empty_like(hidden_TH)
        self.lay_out(hidden_TH, ids, weights, shards, sum_TH=sum_TH, out_TH=out_TH)
        self._record.layer, self._record.sequence = layer, sequence
        return out_TH if self.function(self._record) else None

    @property
    def sent_bytes(self) -> int:
        """Of the payloads sent."""
        return int(self._record.sent_bytes)

    @property
    def received_bytes(self) -> int:
        """Of the payloads added up."""
        return int(self._record.received_bytes)

    def fault(self, shard: int) -> int:
        """Return errno of a packet NOT_SENT or NOT_RECEIVED; 0: it was cut short."""
        return int(self._errno_S[shard])

    def left(self, shard: int) -> bytes:
        """Return what was read of an answer that was not added up; before the next `run`."""
        return ctypes.string_at(self._left_S[shard] or 0, self._left_bytes_S[shard])
