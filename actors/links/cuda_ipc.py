"""A link between two processes on one GPU: payloads lie in its memory, which both map; headers go over a Unix socket.

NCCL refuses two ranks on one GPU, and through the host a payload would be copied four times. As on a link that shares
the host's memory each direction has room for one payload, and the counts say whether it is free. A payload is announced
once the GPU has written it, and released once the GPU has done what the receiver asked of it.
"""

import weakref
from collections.abc import Sequence

from torch import Tensor

from expertmesh.actors.links.ends import LinkAddress
from expertmesh.actors.links.shared import ROOM_BYTES, SharedLink
from expertmesh.cluster.errors import LinkError
from expertmesh.kernels.gpu import ipc

# Of the front page, behind the counts.
_HANDLE = slice(1024, 1024 + ipc.HANDLE_BYTES)


class CudaIpcLink(SharedLink):
    """Two ends on one GPU."""

    def _meet(self, address: LinkAddress) -> None:
        super()._meet(address)
        try:
            own, handle = ipc.DeviceBytes.allocate(ROOM_BYTES, self._device)
            weakref.finalize(self, own.close)
            self._outgoing.front[_HANDLE] = handle
            # Whoever says so has written its handle.
            self._socket.sendall(b"h")
            if self._socket.recv(1) != b"h":
                raise LinkError("it shares no memory of the GPU")
            theirs = ipc.DeviceBytes.open(bytes(self._incoming.front[_HANDLE]), ROOM_BYTES, self._device)
        except ImportError as error:
            raise LinkError(f"link {address.name} needs CuPy (pip install 'expertmesh[gpu]'): {error}") from error
        except (OSError, RuntimeError, LinkError) as error:
            raise LinkError(f"link {address.name}: the other end did not come: {error}") from error
        weakref.finalize(self, theirs.close)
        self._own_bytes, self._their_bytes = own.tensor, theirs.tensor

    def _write(self, parts: Sequence[Tensor]) -> None:
        at = 0
        for part in parts:
            block = part.reshape(-1).view(self._own_bytes.dtype)
            self._own_bytes[at : at + block.numel()] = block
            at += block.numel()
        ipc.finish(self._device)

    def _read_payload(self, size: int) -> Tensor:
        return self._their_bytes[:size]

    def _release(self) -> None:
        if self._holds:
            ipc.finish(self._device)
        super()._release()
