"""A link between two processes of one host: a Unix stream socket. Payloads of GPU tensors pass through host memory.

A blocking call in the kernel wakes the other process directly; Gloo passes each message through a thread of its own at
both ends (docs/performance.md has both round trips).
"""

import errno
import os
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Sequence
from contextlib import closing, suppress

import torch
from torch import Tensor

from expertmesh.actors.links.base import Channel, Link
from expertmesh.actors.links.ends import SHARD_RANK, LinkAddress
from expertmesh.actors.links.rendezvous import RendezvousStore
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import HEADER_BYTES, PacketHeader, PacketKind

# Payloads up to this size share one buffer; a larger one gets memory of its own, which goes with it.
KEPT_BYTES = 4 << 20
# What the kernel may hold of a message that the peer does not read yet (it takes at most net.core.wmem_max).
_SEND_BUFFER_BYTES = 4 << 20
# A peer that is busy for longer than this sees a broken link instead of CLOSE.
_CLOSE_S = 1.0
_KEY = "socket"


class LocalLink(Link):
    """Two ends that send each other messages over a Unix socket."""

    def __init__(self, address: LinkAddress, device: torch.device) -> None:
        """Meet the other end.

        Raises:
            LinkError: it did not come within address.timeout_s.
        """
        super().__init__(address.generation)
        self._name = address.name
        self._timeout_s = address.timeout_s
        self._device = device
        self._make_room(HEADER_BYTES + KEPT_BYTES)
        self._ahead = b""  # of the next message, read with the last one
        try:
            self._socket = _listen(address) if address.rank == SHARD_RANK else _connect(address)
        except (OSError, LinkError) as error:
            raise LinkError(f"link {address.name}: the other end did not come: {error}") from error
        # Only once nobody uses the link any more: another thread may be about to read from this descriptor.
        weakref.finalize(self, self._socket.close)
        self._meet(address)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket.settimeout(None)
        self._set_timeout(socket.SO_SNDTIMEO, self._timeout_s)
        self._recv_timeout_s = 0.0

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """See Link.send."""
        blocks = [bytes_of(part) for part in parts if part.numel()]
        size = sum(len(block) for block in blocks)
        assert size == header.payload_bytes, f"{size} bytes of payload, the header says {header.payload_bytes}"
        self._send(header, blocks, size)

    def _meet(self, address: LinkAddress) -> None:
        """Agree on more with the other end, over the socket."""

    def _send(self, header: PacketHeader, blocks: Sequence[memoryview], size: int) -> None:
        try:
            sent = self._socket.sendmsg([header.pack(), *blocks])
        except OSError as error:
            raise self._broken("send failed", error) from error
        if sent < HEADER_BYTES + size:
            raise self._broken("send failed", f"{sent} of {HEADER_BYTES + size} bytes taken in {self._timeout_s:g} s")

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """See Link.recv."""
        got = len(self._ahead)
        if got > len(self._view):
            self._make_room(got)
        self._view[:got] = self._ahead
        self._wait_at_most(self._timeout_s if timeout_s is None else timeout_s)
        # A message is there as a whole, most often: one call takes header and payload.
        while got < HEADER_BYTES:
            got += self._read(self._view[got:], 0)
        try:
            header = PacketHeader.unpack(self._view[:HEADER_BYTES])
        except LinkError as error:
            raise self._broken("receive failed", error) from error
        if header.generation != self.generation:
            raise self._broken(
                "receive failed", f"a packet of generation {header.generation} on generation {self.generation}"
            )
        if header.in_memory:
            self._ahead = self._view[HEADER_BYTES:got].tobytes()
            return self._from_memory(header)
        size = header.payload_bytes
        end = HEADER_BYTES + size
        self._ahead = self._view[end:got].tobytes()
        if size <= KEPT_BYTES:
            payload, view = self._buffer[HEADER_BYTES:end], self._view[HEADER_BYTES:end]
        else:
            payload = torch.empty(size, dtype=torch.uint8)
            view = payload.numpy().data
            view[: min(got, end) - HEADER_BYTES] = self._view[HEADER_BYTES : min(got, end)]
        if got < end:
            self._read(view[got - HEADER_BYTES :], socket.MSG_WAITALL)
        return header, payload if self._device.type == "cpu" else payload.to(self._device)

    def channel(self, timeout_s: float | None = None) -> Channel | None:
        """See Link.channel."""
        if self._ahead or self._device.type != "cpu":
            return None
        self._wait_at_most(self._timeout_s if timeout_s is None else timeout_s)
        return Channel(self._socket.fileno())

    def unread(self, data: bytes) -> None:
        """See Link.unread."""
        self._ahead = data

    def failed(self, doing: str, fault: int, got: int = 0) -> LinkError:
        """See Link.failed."""
        if fault in (errno.EAGAIN, errno.EWOULDBLOCK):
            waited_s = self._timeout_s if doing == "send" else self._recv_timeout_s
            return self._broken(f"{doing} failed", f"nothing went in {waited_s:g} s")
        if fault:
            return self._broken(f"{doing} failed", os.strerror(fault))
        if doing == "send":
            return self._broken("send failed", f"not all was taken in {self._timeout_s:g} s")
        return self._broken("receive failed", f"the peer ended after {got} bytes")

    def close(self) -> None:
        """See Link.close."""
        header = PacketHeader(kind=PacketKind.CLOSE, generation=self.generation, sequence=0, epoch=0)
        # A peer that is gone already is what closing is for.
        with suppress(LinkError, OSError):
            self._set_timeout(socket.SO_SNDTIMEO, min(self._timeout_s, _CLOSE_S))
            self.send(header)
            self._socket.shutdown(socket.SHUT_WR)

    def _from_memory(self, header: PacketHeader) -> tuple[PacketHeader, Tensor]:
        raise self._broken("receive failed", "a payload in shared memory, of which this link has none")

    def _make_room(self, size: int) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8)
        self._view = self._buffer.numpy().data

    def _wait_at_most(self, timeout_s: float) -> None:
        """Set the time that one reading call may wait."""
        if timeout_s == self._recv_timeout_s:
            return
        try:
            self._set_timeout(socket.SO_RCVTIMEO, timeout_s)
        except OSError as error:
            raise self._broken("receive failed", error) from error
        self._recv_timeout_s = timeout_s

    def _read(self, buffer: memoryview, flags: int) -> int:
        """Read into the buffer, with MSG_WAITALL all of it; return how many bytes."""
        try:
            got = self._socket.recv_into(buffer, len(buffer), flags)
        except BlockingIOError as error:
            raise self._broken("receive failed", f"nothing came in {self._recv_timeout_s:g} s") from error
        except OSError as error:
            raise self._broken("receive failed", error) from error
        if got < (len(buffer) if flags else 1):
            raise self._broken("receive failed", f"the peer ended after {got} of {len(buffer)} bytes")
        return got

    def _set_timeout(self, option: int, timeout_s: float) -> None:
        """Bound each call in the kernel: cheaper than Python's own timeouts, which poll before every call."""
        seconds, part_s = divmod(max(timeout_s, 1e-6), 1.0)  # 0 would be no bound at all
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(part_s * 1e6)))

    def _broken(self, what: str, reason: object) -> LinkError:
        """Break both ends, as a stream that lost its place cannot be used again."""
        with suppress(OSError):  # broken before
            self._socket.shutdown(socket.SHUT_RDWR)
        return LinkError(f"link {self._name}: {what}: {reason}")


def _listen(address: LinkAddress) -> socket.socket:
    """Wait for the worker on a socket of a random abstract name: no file is left behind."""
    deadline_s = time.monotonic() + address.timeout_s
    name = f"expertmesh-{secrets.token_hex(16)}"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        closing(RendezvousStore(address.host, address.port, address.name, address.timeout_s)) as store,
    ):
        listener.bind(f"\0{name}")
        listener.listen()
        store.set(_KEY, name)
        while True:
            listener.settimeout(max(deadline_s - time.monotonic(), 1e-6))
            connection, _ = listener.accept()
            if _is_ours(connection):
                return connection
            connection.close()


def _connect(address: LinkAddress) -> socket.socket:
    with closing(RendezvousStore(address.host, address.port, address.name, address.timeout_s)) as store:
        name = store.get(_KEY).decode()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(address.timeout_s)
        connection.connect(f"\0{name}")
        if not _is_ours(connection):
            raise LinkError("another user's process listens there")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ours(connection: socket.socket) -> bool:
    """Return whether the peer runs as our user: anybody on the host can see and reach an abstract name."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def bytes_of(part: Tensor) -> memoryview:
    """Return a tensor's bytes; one on a GPU is copied to the host."""
    if part.dtype != torch.uint8 or part.dim() != 1:
        part = part.reshape(-1).view(torch.uint8)
    return part.cpu().numpy().data
