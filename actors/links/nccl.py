"""A link between two GPUs: the header as a doorbell over Gloo, the payload over an NCCL communicator of two ranks.

NCCL waits for ever when a peer dies, so every payload's end is polled against a deadline and the communicator is
aborted (not destroyed, which would wait too) when it passes.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import LinkAddress
from expertmesh.actors.links.gloo import GlooLink
from expertmesh.actors.links.rendezvous import RendezvousStore
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader

_POLL_S = 20e-6


class NcclLink(Link):
    """Two ends on two GPUs."""

    def __init__(self, address: LinkAddress, device: torch.device) -> None:
        """Meet the other end.

        Raises:
            LinkError: it did not come within address.timeout_s.
        """
        super().__init__(address.generation)
        self._doorbell = GlooLink(address, torch.device("cpu"))
        self._peer = 1 - address.rank
        self._name = address.name
        self._device = device
        self._timeout_s = address.timeout_s
        # NCCL forms its communicator at the first payload, so the store stays as long as the group.
        self._store = RendezvousStore(address.host, address.port, f"{address.name}/nccl", address.timeout_s)
        self._group = dist.ProcessGroupNCCL(self._store, address.rank, 2, dist.ProcessGroupNCCL.Options())
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """See Link.send."""
        payload = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]) if parts else None
        self._doorbell.send_header(header)
        if payload is not None:
            work = self._group.send([payload], self._peer, 0)  # type: ignore[attr-defined]  # torch's stubs leave it out
            self._wait(work, payload)

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """See Link.recv."""
        header = self._doorbell.recv_header(timeout_s)
        payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._device)
        if header.payload_bytes:
            work = self._group.recv([payload], self._peer, 0)  # type: ignore[attr-defined]  # torch's stubs leave it out
            self._wait(work, payload)
        return header, payload

    def close(self) -> None:
        """See Link.close."""
        self._doorbell.close()
        self._group.abort()
        self._store.close()

    def _wait(self, work: dist.Work, payload: Tensor) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        work.block_current_stream()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline_s:
                self._group.abort()
                raise LinkError(f"link {self._name}: {payload.numel()} bytes not done in {self._timeout_s} s")
            time.sleep(_POLL_S)
