"""A link between two processes of one host that share memory: payloads lie there, a Unix socket carries the headers.

On a socket each payload is copied twice, into the kernel and out of it. Here the sender writes it where the receiver
reads it. Each direction has room for one payload: the next one goes over the socket if the last is not released yet, or
if it is too small or too large (docs/performance.md has the round trips).
"""

import fcntl
import mmap
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from expertmesh.actors.links.base import Channel
from expertmesh.actors.links.ends import LinkAddress
from expertmesh.actors.links.local import LocalLink, bytes_of
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader

# Laid out as in kernels/cpu/memory.h: two counts on cache lines of their own, and the payload from the next page on.
_WRITTEN, _RELEASED, FRONT_BYTES = 0, 8, 4096  # the counts in words of 8 bytes
# Pages that no payload touches take no memory.
ROOM_BYTES = 32 << 20
# Smaller ones are sent as fast by the socket.
LEAST_BYTES = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedLink(LocalLink):
    """Two ends that send each other headers, and small payloads, over a Unix socket and write large ones to memory."""

    _holds = False  # a payload that the other end must not overwrite yet

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """See Link.send."""
        self._release()
        size = sum(part.numel() * part.element_size() for part in parts)
        if not (LEAST_BYTES <= size <= ROOM_BYTES and self._outgoing.is_free):
            super().send(header, parts)
            return
        assert size == header.payload_bytes, f"{size} bytes of payload, the header says {header.payload_bytes}"
        self._write(parts)
        self._outgoing.count_written()
        self._send(replace(header, in_memory=True), (), 0)

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """See Link.recv."""
        self._release()
        return super().recv(timeout_s)

    def channel(self, timeout_s: float | None = None) -> Channel | None:
        """See Link.channel."""
        channel = super().channel(timeout_s)
        if channel is None:
            return None
        self._release()
        return channel._replace(outgoing=self._outgoing.address, incoming=self._incoming.address, room_bytes=ROOM_BYTES)

    def _meet(self, address: LinkAddress) -> None:
        try:
            self._outgoing, descriptor = Memory.create()
            with closing(os.fdopen(descriptor)):
                socket.send_fds(self._socket, [b"m"], [descriptor])
            _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            if len(descriptors) != 1:
                raise LinkError("it shares no memory")
            with closing(os.fdopen(descriptors[0])):
                self._incoming = Memory.open(descriptors[0])
        except (OSError, LinkError) as error:
            raise LinkError(f"link {address.name}: the other end did not come: {error}") from error

    def _from_memory(self, header: PacketHeader) -> tuple[PacketHeader, Tensor]:
        if header.payload_bytes > ROOM_BYTES:
            raise self._broken("receive failed", f"{header.payload_bytes} bytes of payload in memory of {ROOM_BYTES}")
        self._holds = True
        return replace(header, in_memory=False), self._read_payload(header.payload_bytes)

    def _write(self, parts: Sequence[Tensor]) -> None:
        """Write a payload where the other end reads it."""
        at = 0
        for part in parts:
            block = bytes_of(part)
            self._outgoing.payload[at : at + len(block)] = block
            at += len(block)

    def _read_payload(self, size: int) -> Tensor:
        """Return the payload that the other end wrote, on this end's device."""
        payload = torch.frombuffer(self._incoming.payload, dtype=torch.uint8, count=size)
        return payload if self._device.type == "cpu" else payload.to(self._device)

    def _release(self) -> None:
        """Let the other end write again, if a payload is held."""
        if self._holds:
            self._holds = False
            self._incoming.count_released()


class Memory:
    """One direction's memory, mapped by both ends, with room for one payload."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, FRONT_BYTES + ROOM_BYTES)
        self._counts = np.frombuffer(self._map, dtype=np.uint64, count=FRONT_BYTES // 8)
        self.address = int(self._counts.ctypes.data)
        self.front = memoryview(self._map)[:FRONT_BYTES]  # the counts and what else the ends tell each other
        self.payload = memoryview(self._map)[FRONT_BYTES:]

    @classmethod
    def create(cls) -> "tuple[Memory, int]":
        """Return new memory and the descriptor with which another process opens it.

        Nobody can make it smaller: a process that reads mapped memory which is no more is killed.
        """
        descriptor = os.memfd_create("expertmesh-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, FRONT_BYTES + ROOM_BYTES)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor), descriptor
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, descriptor: int) -> "Memory":
        """Map what another process created.

        Raises:
            LinkError: it is not of this size, or might be made smaller.
        """
        size = os.fstat(descriptor).st_size
        if size != FRONT_BYTES + ROOM_BYTES or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise LinkError(f"it shares memory of {size} bytes, or not for good")
        return cls(descriptor)

    @property
    def is_free(self) -> bool:
        """Whether the payload written last was released."""
        return bool(self._counts[_WRITTEN] == self._counts[_RELEASED])

    def count_written(self) -> None:
        """Count a payload, which must have found the memory free."""
        self._counts[_WRITTEN] += 1

    def count_released(self) -> None:
        """Count a payload that was read."""
        self._counts[_RELEASED] += 1
