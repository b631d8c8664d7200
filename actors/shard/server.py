"""Serves packets: one thread a link, one computing at a time, packets of a layer that wait meanwhile taken together.

Shape suffixes: R rows, H hidden, P (row, expert) pairs.
"""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.actors.cores import give_way
from expertmesh.actors.links.base import IDLE_S, Link
from expertmesh.actors.logs import EventLog, Value, reason_of
from expertmesh.actors.shard.copying import asked_expert, expert_packet
from expertmesh.actors.wire import Dispatch, combine_packet, read_dispatch
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind, WireDtype, step_of
from expertmesh.kernels.cpu.exchange import Memory
from expertmesh.kernels.cpu.packet_server import LastPacket, PacketServer, can_serve
from expertmesh.models.expert_slots import ExpertSlots, LayerSlots

_log = EventLog(__name__)


class Peer:
    """Who is at the other end of a link, for the log: its name, and the last of its packets that came."""

    def __init__(self, link_name: str = "") -> None:
        # Links are called worker.process/shard/generation, by who asked for them.
        self.name, _, self.pid = link_name.partition("/")[0].rpartition(".")
        self.last = LastPacket()

    def fields(self) -> dict[str, Value]:
        """Return what a line about its last packet names."""
        return {"peer": self.name, "peer_pid": self.pid or None, "step": step_of(self.last.sequence)}


@dataclass(eq=False)
class _Packet:
    peer: "Peer"
    header: PacketHeader
    dispatch: Dispatch
    arrived_s: float
    answer: tuple[PacketHeader, list[Tensor]] | None = None


class Counted(NamedTuple):
    """Packets answered, batches in which, seconds spent computing, seconds that packets waited until that began."""

    num_packets: int
    num_batches: int
    busy_s: float
    queue_s: float


class ShardServer:
    """Answers the packets of all links from one shard's slots. Keeps nothing of a request once it is answered.

    Where it can, compiled code answers (kernels/cpu/packet_server.py), and hands on what it cannot answer.
    """

    def __init__(self, slots: ExpertSlots, epoch: int, slow_log_s: float = 0.0) -> None:
        self.slots = slots
        self._slow_log_s = slow_log_s or math.inf
        self._compiled: PacketServer | None = None
        if slots.are_packed and can_serve():
            self._compiled = PacketServer(slots.num_layers)
            slots.watch(self._use)
        self.epoch = epoch
        self._counted = Counted(0, 0, 0.0, 0.0)
        self._waiting: deque[_Packet] = deque()
        self._computing = False
        self._turn = threading.Condition()

    @property
    def epoch(self) -> int:
        """Of the newest placement that the shard was told."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self._compiled is not None:
            self._compiled.set_epoch(epoch)

    @property
    def counted(self) -> "Counted":
        """What was done since the start."""
        if self._compiled is None:
            return self._counted
        (packets, batches, busy_s, queue_s), own = self._compiled.counters(), self._counted
        return Counted(own.num_packets + packets, own.num_batches + batches, own.busy_s + busy_s, own.queue_s + queue_s)

    def serve(self, link: Link, peer: Peer | None = None) -> None:
        """Answer a link's packets until the peer closes it or is gone. Runs on a thread of its own."""
        peer = peer or Peer()
        try:
            while True:
                self._serve_compiled(link, peer)
                header, payload = link.recv(IDLE_S)
                if header.kind is PacketKind.CLOSE:
                    _log.tell("peer_gone", **peer.fields(), generation=link.generation, reason="it closed it")
                    return
                if header.kind is PacketKind.FETCH:
                    give_way()  # a link that copies does nothing else, and requests come first
                    self.hand_over(link, header, payload)
                elif header.kind is PacketKind.DISPATCH:
                    self.handle(link, header, payload, peer)
                else:
                    raise LinkError(f"a packet of kind {header.kind.name} sent to a shard")
        except LinkError as error:
            _log.tell("peer_gone", **peer.fields(), generation=link.generation, reason=reason_of(error))

    def handle(self, link: Link, header: PacketHeader, payload: Tensor, peer: Peer) -> None:
        """Answer one packet; returns when its answer is sent.

        Whoever finds nobody computing computes for all that wait: with one link no thread is ever woken for another,
        with several the packets that arrive during a computation make up the next one. Each thread sends its own
        answer, so that a worker that does not take its answer holds up no other.

        Raises:
            LinkError: the packet is damaged, or its answer could not be sent.
        """
        peer.last.sequence, peer.last.layer = header.sequence, header.layer
        packet = _Packet(peer, header, read_dispatch(header, payload), time.perf_counter())
        with self._turn:
            self._waiting.append(packet)
        while batch := self._next_batch(packet):
            began_s = time.perf_counter()
            try:
                self._answer(batch)
            finally:
                # Nobody else is here: one computes at a time.
                packets, batches, busy_s, queue_s = self._counted
                busy_s += time.perf_counter() - began_s
                queue_s += sum(began_s - waited.arrived_s for waited in batch)
                self._counted = Counted(packets + len(batch), batches + 1, busy_s, queue_s)
                with self._turn:
                    self._computing = False
                    self._turn.notify_all()
        assert packet.answer is not None, "a packet left the queue without an answer"
        link.send(*packet.answer)
        peer.last.seconds = time.perf_counter() - packet.arrived_s
        self._tell_slow(peer)

    def _tell_slow(self, peer: Peer) -> None:
        if peer.last.seconds > self._slow_log_s:
            _log.tell("packet_slow", **peer.fields(), layer=peer.last.layer, duration_s=peer.last.seconds)

    def hand_over(self, link: Link, header: PacketHeader, payload: Tensor) -> None:
        """Send the expert that a packet asks for.

        Raises:
            LinkError: the packet is damaged, or the answer could not be sent.
        """
        key, may_be_packed = asked_expert(header, payload)
        packed = self.slots.packed_expert(key) if may_be_packed else None
        expert = self.slots.expert(key) if packed is None else packed
        if expert is None:
            link.send(*self._empty_answer(header, PacketKind.NOT_HERE))
        else:
            link.send(*expert_packet(header, expert, self.epoch))

    def _next_batch(self, packet: _Packet) -> list[_Packet]:
        """Wait for this thread's turn to compute, and return what to compute: nothing once the packet is answered.

        A batch is the oldest packet that waits, and all others of its layer and dtype that ask for the same answer.
        """
        with self._turn:
            self._turn.wait_for(lambda: packet.answer is not None or not self._computing)
            if packet.answer is not None:
                return []
            self._computing = True
            first = _kind_of(self._waiting[0].header)
            batch = [p for p in self._waiting if _kind_of(p.header) == first]
            self._waiting = deque(p for p in self._waiting if p not in batch)
        return batch

    def _answer(self, batch: list[_Packet]) -> None:
        """Give each packet its answer. Packets that fail together are tried one by one: a bad one fails alone."""
        try:
            slots = self.slots.layer(batch[0].header.layer)
            work = [(p, _find(p.dispatch, slots)) for p in batch] if slots is not None else []
            found = [(p, pairs) for p, pairs in work if pairs is not None]
            compute = _compute_pairs if batch[0].header.by_pair else _compute
            outputs = compute(slots, [pairs for _, pairs in found]) if slots is not None and found else []
            answers = [combine_packet(p.header, rows, self.epoch) for (p, _), rows in zip(found, outputs, strict=True)]
        except Exception as error:  # noqa: BLE001 - it is logged, and the worker is told
            if len(batch) > 1:
                for packet in batch:
                    self._answer([packet])
                return
            packet, layer = batch[0], batch[0].header.layer
            _log.tell("packet_failed", error, **packet.peer.fields(), layer=layer, reason=reason_of(error))
            batch[0].answer = self._empty_answer(batch[0].header, PacketKind.FAILED, str(error))
            return
        for (packet, _), answer in zip(found, answers, strict=True):
            packet.answer = answer
        for packet in batch:
            if packet.answer is None:
                _log.tell("packet_refused", **packet.peer.fields(), layer=packet.header.layer, epoch=self.epoch)
                packet.answer = self._empty_answer(packet.header, PacketKind.NOT_HERE)

    def _use(self, layer: int, held: LayerSlots | None) -> None:
        assert self._compiled is not None
        packed = None if held is None else held.weights.packed
        if held is None or packed is None:
            self._compiled.forget_layer(layer)
        else:
            self._compiled.set_layer(layer, packed, held.slot_E)

    def _serve_compiled(self, link: Link, peer: Peer) -> None:
        """Answer packets as long as compiled code can; what it has read and not answered is left to the link."""
        channel = None if self._compiled is None else link.channel(IDLE_S)
        if self._compiled is None or channel is None:
            return
        descriptor, *memory = channel
        try:
            left = self._compiled.serve(
                descriptor, Memory(*memory), link.generation, last=peer.last, slow_s=self._slow_log_s
            )
            link.unread(left)
        except OSError as error:
            raise link.failed("send", max(0, error.errno or 0)) from error
        self._tell_slow(peer)

    def _empty_answer(
        self, request: PacketHeader, kind: PacketKind, reason: str = ""
    ) -> tuple[PacketHeader, list[Tensor]]:
        payload = torch.frombuffer(bytearray(reason.encode() or b" "), dtype=torch.uint8)
        header = PacketHeader(
            kind=kind,
            generation=request.generation,
            sequence=request.sequence,
            epoch=self.epoch,
            layer=request.layer,
            payload_bytes=payload.numel(),
        )
        return header, [payload]


def _kind_of(header: PacketHeader) -> tuple[int, WireDtype, bool]:
    """Return what packets that are computed together have in common."""
    return header.layer, header.dtype, header.by_pair


class _Pairs(NamedTuple):
    """What is to be computed: rows [R, H], and the row (int64), slot (int64) and weight (float32) of each pair."""

    rows_RH: Tensor
    row_P: Tensor
    slot_P: Tensor
    weight_P: Tensor


def _find(dispatch: Dispatch, slots: LayerSlots) -> _Pairs | None:
    """Find the slots of the experts that a packet asks for; None: one is not here."""
    slot_P = slots.slots_of(dispatch.expert_P)
    return None if slot_P is None else _Pairs(dispatch.rows_RH, dispatch.row_P, slot_P, dispatch.weight_P)


@torch.inference_mode()
def _compute(slots: LayerSlots, packets: list[_Pairs]) -> list[Tensor]:
    """Run one grouped MLP over several packets. Return each packet's rows, float32."""
    out_RH = slots.run(*_joined(packets))
    return [out_RH] if len(packets) == 1 else list(torch.split(out_RH, [p.rows_RH.shape[0] for p in packets]))


@torch.inference_mode()
def _compute_pairs(slots: LayerSlots, packets: list[_Pairs]) -> list[Tensor]:
    """Run one grouped MLP over several packets. Return each packet's pairs' outputs."""
    joined = _joined(packets)
    out_PH = slots.run_pairs(joined.rows_RH, joined.row_P, joined.slot_P)
    return list(torch.split(out_PH, [p.row_P.shape[0] for p in packets]))


def _joined(packets: list[_Pairs]) -> _Pairs:
    """Return several packets as one, their rows and their pairs one after another."""
    if len(packets) == 1:
        return packets[0]
    sizes = [p.rows_RH.shape[0] for p in packets]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return _Pairs(
        torch.cat([p.rows_RH for p in packets]),
        torch.cat([p.row_P + start for p, start in zip(packets, starts, strict=True)]),
        torch.cat([p.slot_P for p in packets]),
        torch.cat([p.weight_P for p in packets]),
    )
