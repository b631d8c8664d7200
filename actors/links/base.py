"""What a link is, and the registry of the kinds there are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.actors.links.ends import LinkAddress
from expertmesh.cluster.errors import LinkError, UnknownNameError
from expertmesh.cluster.packets import PacketHeader

# An idle link is no error: a reader waits this long for the next request, and again.
IDLE_S = 7 * 24 * 3600.0


class Channel(NamedTuple):
    """What carries a link's messages.

    descriptor: of a stream socket. outgoing, incoming: addresses of the memory that the ends share, one for each
    direction (actors/links/shared.py), 0: there is none. room_bytes: of payload in each.
    """

    descriptor: int
    outgoing: int = 0
    incoming: int = 0
    room_bytes: int = 0


class Link(ABC):
    """Joins exactly two ends. Every wait has a deadline; after any LinkError the link is broken for good.

    One thread at a time may send, and one may receive.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation

    @abstractmethod
    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """Send one message: the header and the parts, one after another.

        May return before it has arrived, and may wait until the peer takes what no buffer on the way holds.

        Args:
            header: its payload_bytes is the sum of the parts' bytes.
            parts: contiguous tensors.

        Raises:
            LinkError: the peer is gone, or the deadline passed, for this message or the one before.
        """

    @abstractmethod
    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """Receive one message.

        Args:
            timeout_s: how long to wait for it; None is the link's own timeout.

        Returns:
            The header and its payload as uint8; the payload is valid until this end's next recv or send.

        Raises:
            LinkError: the peer is gone, the deadline passed, or the message is not of this protocol.
        """

    def channel(self, timeout_s: float | None = None) -> Channel | None:
        """Return what carries this link's messages as they are, for compiled code to use in place of the link.

        Its socket blocks, as long as send() and recv(timeout_s) would. None: there is none, or part of a message was
        read.
        """
        return None

    def unread(self, data: bytes) -> None:
        """Have what was read from the channel's socket be read again by recv()."""
        raise NotImplementedError(f"{type(self).__name__} has no channel")

    def failed(self, doing: str, fault: int, got: int = 0) -> LinkError:
        """Break the link, and return the error: compiled code failed at "send" or "receive".

        Args:
            doing: one of the two.
            fault: errno; 0: a part was sent within the deadline, or the peer ended.
            got: bytes that had been received.
        """
        raise NotImplementedError(f"{type(self).__name__} has no channel")

    @abstractmethod
    def close(self) -> None:
        """Tell the peer, if it still listens, and let go."""


_KINDS = {
    "cuda_ipc": "expertmesh.actors.links.cuda_ipc:CudaIpcLink",
    "gloo": "expertmesh.actors.links.gloo:GlooLink",
    "local": "expertmesh.actors.links.local:LocalLink",
    "nccl": "expertmesh.actors.links.nccl:NcclLink",
    "shared": "expertmesh.actors.links.shared:SharedLink",
}


def open_link(kind: str, address: LinkAddress, device: torch.device) -> Link:
    """Form one end of a link; blocks until the other end has come, at most address.timeout_s.

    Raises:
        UnknownNameError: no such kind.
        LinkError: the other end did not come.
    """
    if kind not in _KINDS:
        raise UnknownNameError(f"link kind {kind!r} is not one of {', '.join(_KINDS)}")
    module, _, name = _KINDS[kind].partition(":")
    link: Link = getattr(import_module(module), name)(address, device)
    return link
