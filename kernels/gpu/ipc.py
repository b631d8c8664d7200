"""Memory of a GPU that two processes of one host share: CUDA's inter-process handles, through CuPy."""

from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64


class DeviceBytes:
    """Bytes of a GPU, as a tensor that is valid until close()."""

    def __init__(self, address: int, num_bytes: int, device: torch.device, *, is_own: bool) -> None:
        cupy = _cupy()
        self._address, self._device, self._is_own = address, device, is_own
        memory = cupy.cuda.UnownedMemory(address, num_bytes, self, device.index or 0)
        array = cupy.ndarray((num_bytes,), dtype=cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
        self.tensor: Tensor = torch.as_tensor(array, device=device)

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device) -> "tuple[DeviceBytes, bytes]":
        """Return new memory, and the handle with which another process of this host opens it.

        Not from torch's allocator: a handle is of a whole allocation, of which torch gives out parts.
        """
        runtime = _cupy().cuda.runtime
        with _cupy().cuda.Device(device.index or 0):
            address: int = runtime.malloc(num_bytes)
            return cls(address, num_bytes, device, is_own=True), bytes(runtime.ipcGetMemHandle(address))

    @classmethod
    def open(cls, handle: bytes, num_bytes: int, device: torch.device) -> "DeviceBytes":
        """Return another process's memory."""
        with _cupy().cuda.Device(device.index or 0):
            address: int = _cupy().cuda.runtime.ipcOpenMemHandle(handle)
            return cls(address, num_bytes, device, is_own=False)

    def close(self) -> None:
        """Free it, or let go of what another process frees."""
        runtime = _cupy().cuda.runtime
        with _cupy().cuda.Device(self._device.index or 0):
            (runtime.free if self._is_own else runtime.ipcCloseMemHandle)(self._address)


def finish(device: torch.device) -> None:
    """Wait until the GPU has done what the calling thread asked of it."""
    torch.cuda.current_stream(device).synchronize()


def _cupy() -> Any:
    import cupy

    return cupy
