"""Serves packets: one reader thread a link, one computing at a time, packets of a layer that wait meanwhile taken together.

Shape suffixes: R rows, H hidden, P (row, expert) pairs.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.gloo import IDLE_S
from expertmesh.actors.wire import Dispatch, combine_packet, read_dispatch
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind
from expertmesh.models.expert_slots import ExpertSlots

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Packet:
    link: Link
    header: PacketHeader
    dispatch: Dispatch
    done: bool = False


class ShardServer:
    """Answers the packets of all links from one shard's slots. Keeps nothing of a request once it is answered."""

    def __init__(self, slots: ExpertSlots, epoch: int) -> None:
        self.slots = slots
        self.epoch = epoch
        self.num_packets = 0
        self.num_batches = 0
        self._waiting: deque[_Packet] = deque()
        self._queue_lock = threading.Lock()
        self._compute_lock = threading.Lock()

    def serve(self, link: Link) -> None:
        """Answer a link's packets until the peer closes it or is gone. Runs on a thread of its own."""
        try:
            while True:
                header, payload = link.recv(IDLE_S)
                if header.kind is PacketKind.CLOSE:
                    return
                if header.kind is not PacketKind.DISPATCH:
                    raise LinkError(f"a packet of kind {header.kind.name} sent to a shard")
                self.handle(link, header, payload)
        except LinkError as error:
            _log.info("link of generation %d ended: %s", link.generation, error)

    def handle(self, link: Link, header: PacketHeader, payload: Tensor) -> None:
        """Answer one packet; returns when its answer is sent.

        Whoever holds the lock computes for all that wait: with one link no thread is ever woken for another, with several
        the packets that arrive during a computation make up the next one.
        """
        packet = _Packet(link, header, read_dispatch(header, payload))
        with self._queue_lock:
            self._waiting.append(packet)
        with self._compute_lock:
            while not packet.done:
                self._answer(self._take_batch())

    def _take_batch(self) -> list[_Packet]:
        """Take the oldest packet, and all others of its layer and dtype."""
        with self._queue_lock:
            first = self._waiting[0].header
            batch = [p for p in self._waiting if p.header.layer == first.layer and p.header.dtype == first.dtype]
            self._waiting = deque(p for p in self._waiting if p not in batch)
        return batch

    def _answer(self, batch: list[_Packet]) -> None:
        here = [p for p in batch if self.slots.hosts(p.header.layer, p.dispatch.expert_P)]
        for packet in batch:
            if packet not in here:
                self._reply_empty(packet, PacketKind.NOT_HERE)
        if here:
            try:
                outputs = self._compute([p.dispatch for p in here], here[0].header.layer)
            except RuntimeError as error:
                _log.exception("computing layer %d for %d packets failed", here[0].header.layer, len(here))
                for packet in here:
                    self._reply_empty(packet, PacketKind.FAILED, str(error))
            else:
                for packet, rows_RH in zip(here, outputs, strict=True):
                    self._send(packet, *combine_packet(packet.header, rows_RH, self.epoch))
        self.num_packets += len(batch)
        self.num_batches += 1
        for packet in batch:
            packet.done = True

    @torch.inference_mode()
    def _compute(self, dispatches: list[Dispatch], layer: int) -> list[Tensor]:
        """Run one grouped MLP over several packets. Return each packet's rows, float32."""
        sizes = [d.rows_RH.shape[0] for d in dispatches]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        out_RH = self.slots.run(
            layer,
            torch.cat([d.rows_RH for d in dispatches]),
            torch.cat([d.row_P + start for d, start in zip(dispatches, starts, strict=True)]),
            torch.cat([d.expert_P for d in dispatches]),
            torch.cat([d.weight_P for d in dispatches]),
        )
        return list(out_RH.split(sizes))

    def _reply_empty(self, packet: _Packet, kind: PacketKind, reason: str = "") -> None:
        payload = torch.frombuffer(bytearray(reason.encode() or b" "), dtype=torch.uint8)
        header = PacketHeader(
            kind=kind,
            generation=packet.header.generation,
            sequence=packet.header.sequence,
            epoch=self.epoch,
            layer=packet.header.layer,
            payload_bytes=payload.numel(),
        )
        self._send(packet, header, [payload])

    def _send(self, packet: _Packet, header: PacketHeader, parts: list[Tensor]) -> None:
        try:
            packet.link.send(header, parts)
        except LinkError as error:
            # The worker is gone; its own thread sees the broken link and ends. Other workers' packets go on.
            _log.info("an answer could not be sent: %s", error)
