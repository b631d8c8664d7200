"""A link over a Gloo process group of two ranks. Payloads of GPU tensors pass through host memory."""

from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import LinkAddress
from expertmesh.actors.links.rendezvous import RendezvousStore
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import HEADER_BYTES, PacketHeader, PacketKind

# Payloads up to this size travel in one message with their header: Gloo lets a shorter message fill part of a longer
# buffer, so the receiver need not know the size. A larger one follows in a message of its own exact size.
INLINE_BYTES = 4 << 20
# A send ends only when the peer receives: one that is busy for longer than this sees a broken link instead of CLOSE.
_CLOSE_S = 1.0


class GlooLink(Link):
    """Two ends that send each other messages over Gloo."""

    def __init__(self, address: LinkAddress, device: torch.device) -> None:
        """Meet the other end.

        Raises:
            LinkError: it did not come within address.timeout_s.
        """
        super().__init__(address.generation)
        self._peer = 1 - address.rank
        self._name = address.name
        self._timeout_s = address.timeout_s
        self._device = device
        self._group = gloo_group(address)
        self._send_buffer = torch.empty(HEADER_BYTES + INLINE_BYTES, dtype=torch.uint8)
        self._recv_buffer = torch.empty(HEADER_BYTES + INLINE_BYTES, dtype=torch.uint8)
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """See Link.send."""
        self._finish_sending()
        self._write_header(header)
        inline = header.payload_bytes <= INLINE_BYTES
        size = header.payload_bytes
        body = self._send_buffer[HEADER_BYTES:] if inline else torch.empty(size, dtype=torch.uint8)
        start = 0
        for part in parts:
            flat = part.reshape(-1).view(torch.uint8)
            body[start : start + flat.numel()].copy_(flat)
            start += flat.numel()
        assert start == size, f"{start} bytes of payload, the header says {size}"
        if inline:
            self._send_tensor(self._send_buffer[: HEADER_BYTES + size])
        else:
            self._send_tensor(self._send_buffer[:HEADER_BYTES])
            self._send_tensor(body)

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """See Link.recv."""
        header = self.recv_header(timeout_s)
        if header.payload_bytes <= INLINE_BYTES:
            payload = self._recv_buffer[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
        else:
            payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
            self._recv_tensor(payload, self._timeout_s)
        return header, payload if self._device.type == "cpu" else payload.to(self._device)

    def send_header(self, header: PacketHeader) -> None:
        """Send a header alone, whatever payload_bytes says: the payload takes another way."""
        self._finish_sending()
        self._write_header(header)
        self._send_tensor(self._send_buffer[:HEADER_BYTES])

    def recv_header(self, timeout_s: float | None = None) -> PacketHeader:
        """Receive a message and return its header; a payload that came in the same message stays in the buffer."""
        self._recv_tensor(self._recv_buffer, self._timeout_s if timeout_s is None else timeout_s)
        header = PacketHeader.unpack(self._recv_buffer[:HEADER_BYTES].numpy().tobytes())
        if header.generation != self.generation:
            raise LinkError(
                f"link {self._name}: a packet of generation {header.generation} on generation {self.generation}"
            )
        return header

    def close(self) -> None:
        """See Link.close."""
        header = PacketHeader(kind=PacketKind.CLOSE, generation=self.generation, sequence=0, epoch=0)
        try:
            self._timeout_s = min(self._timeout_s, _CLOSE_S)
            self.send(header)
            self._finish_sending()
        except LinkError:
            return  # the peer is gone already, which is what closing is for

    def _write_header(self, header: PacketHeader) -> None:
        self._send_buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)

    def _send_tensor(self, tensor: Tensor) -> None:
        """Begin to send. The end is waited for before the next send; till then the caller goes on with other links."""
        try:
            work = self._group.send([tensor], self._peer, 0)  # type: ignore[attr-defined]  # torch's stubs leave it out
            self._sending.append((work, tensor))
        except RuntimeError as error:
            raise LinkError(f"link {self._name}: send failed: {_reason(error)}") from error

    def _finish_sending(self) -> None:
        """Wait until what was sent has left the buffers, which are then free for the next message."""
        try:
            while self._sending:
                self._sending.pop()[0].wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise LinkError(f"link {self._name}: send failed: {_reason(error)}") from error

    def _recv_tensor(self, tensor: Tensor, timeout_s: float) -> None:
        try:
            work = self._group.recv([tensor], self._peer, 0)  # type: ignore[attr-defined]  # torch's stubs leave it out
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise LinkError(f"link {self._name}: receive failed: {_reason(error)}") from error


def gloo_group(address: LinkAddress) -> dist.ProcessGroupGloo:
    """Form a group of two ranks at the address.

    Raises:
        LinkError: the other end did not come within address.timeout_s.
    """
    try:
        with closing(RendezvousStore(address.host, address.port, address.name, address.timeout_s)) as store:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs leave it out
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address.interface)]
            options._timeout = timedelta(seconds=address.timeout_s)
            options._threads = 1
            return dist.ProcessGroupGloo(store, address.rank, 2, options)
    except LinkError as error:
        raise LinkError(f"link {address.name}: the other end did not come: {error}") from error
    except RuntimeError as error:  # torch's DistError is one
        raise LinkError(f"link {address.name}: the other end did not come: {_reason(error)}") from error


def _reason(error: RuntimeError) -> str:
    """Return the first line of a torch error, without its C++ file and line."""
    return str(error).splitlines()[0].rpartition("] ")[2]
