"""Asks a fleet's shards, once, for what they are to compute of one layer, and adds up their answers.

Shape suffixes: T tokens, H hidden, K choices a token (or slices of them), L layers, R rows of an answer, P pairs.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.actors.links.base import Channel, Link
from expertmesh.actors.logs import EventLog, Value, reason_of
from expertmesh.actors.wire import dispatch_header, read_combine
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.step import NO_STEP, Step
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.packets import PacketKind, first_sequence
from expertmesh.kernels.cpu.exchange import State
from expertmesh.kernels.dispatch import ShardRequest, add_answers, requests_for_shards

_log = EventLog(__name__)
OnLost = Callable[[ShardId, Link], None]


@dataclass(frozen=True)
class Batch:
    """A layer's tokens, and who is to run each pair; -1: nobody, it is done."""

    layer: int
    hidden_TH: Tensor
    ids_TK: npt.NDArray[np.int64]
    weights_TK: npt.NDArray[np.float32]
    shard_TK: npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Asked:
    """A packet under way."""

    request: ShardRequest
    sequence: int


class Asker:
    """One worker's way to its shards. A shard whose link breaks is marked dead in its fleet and told to on_lost.

    sequence: the last packet's number. dispatch_bytes_L, combine_bytes_L: payloads since the start. Compiled code reads
    and writes all three.
    """

    def __init__(self, row_of_layer: Mapping[int, int], *, by_pair: bool, on_lost: OnLost | None) -> None:
        self._row_of_layer = row_of_layer
        self._by_pair = by_pair
        self._on_lost = on_lost
        self._step = NO_STEP
        self.sequence = ctypes.c_uint64(first_sequence(NO_STEP.number))
        self.dispatch_bytes_L = np.zeros(len(row_of_layer), dtype=np.int64)
        self.combine_bytes_L = np.zeros(len(row_of_layer), dtype=np.int64)

    def begin_step(self, step: Step) -> None:
        """Say which step the coming packets belong to."""
        self._step = step
        self.sequence.value = first_sequence(step.number)

    def step_fields(self) -> dict[str, Value]:
        """Return what a line about the step under way names."""
        return {"step": self._step.number, "request_ids": self._step.request_ids}

    def exchange(
        self, fleet: Fleet, batch: Batch, channels: list[Channel], sum_TH: Tensor
    ) -> tuple[dict[int, PacketKind], Tensor | None]:
        """Ask the shards in compiled code.

        Returns:
            What became of each shard's packet, as `ask` does, and, once all are done, the sum in the wire's dtype.
        """
        exchange = fleet.open_exchange(channels)
        sequence = self.sequence.value + 1
        self.sequence.value += len(channels)
        finished_TH = exchange.run(
            batch.hidden_TH,
            batch.ids_TK,
            batch.weights_TK,
            batch.shard_TK,
            sum_TH,
            layer=batch.layer,
            sequence=sequence,
        )
        row = self._row_of_layer[batch.layer]
        self.dispatch_bytes_L[row] += exchange.sent_bytes
        self.combine_bytes_L[row] += exchange.received_bytes
        return ({}, finished_TH) if finished_TH is not None else (self.outcome(fleet, batch, sequence, sum_TH), None)

    def outcome(self, fleet: Fleet, batch: Batch, sequence: int, sum_TH: Tensor) -> dict[int, PacketKind]:
        """Return what became of each shard's packet in an exchange that is not all done, as `ask` does."""
        exchange = fleet.exchange
        kinds: dict[int, PacketKind] = {}
        states = [(shard, State(state)) for shard, state in enumerate(exchange.state_S) if state != State.NOT_ASKED]
        for shard, state in states:
            link = fleet.links[fleet.shards[shard]]
            if state is State.DONE:
                kinds[shard] = PacketKind.COMBINE
            elif state is State.OTHER_ANSWER:
                link.unread(exchange.left(shard))
                request = next(r for r in self._requests(fleet, batch) if r.shard == shard)
                kinds[shard], rows_RH = self._receive(fleet, batch, _Asked(request, sequence + shard), sum_TH.shape[1])
                if rows_RH is not None:
                    self._add(batch, [(request, rows_RH)], sum_TH)
            else:
                doing = "send" if state is State.NOT_SENT else "receive"
                got = 0 if state is State.NOT_SENT else len(exchange.left(shard))
                self._lose(fleet, shard, link.failed(doing, exchange.fault(shard), got))
                kinds[shard] = PacketKind.FAILED
        return kinds

    def ask(self, fleet: Fleet, batch: Batch, out: Tensor) -> dict[int, PacketKind]:
        """Ask the shards over their links; return the kind of each one's answer, FAILED where it is lost."""
        requests = self._requests(fleet, batch)
        kinds = {request.shard: PacketKind.FAILED for request in requests}
        answers = []
        # Every answer is taken before anything is waited for, so that no link is left with one under way.
        for asked in self._send_all(fleet, batch, requests):
            kinds[asked.request.shard], rows = self._receive(fleet, batch, asked, out.shape[-1])
            if rows is not None:
                answers.append((asked.request, rows))
        self._add(batch, answers, out)
        return kinds

    def _add(self, batch: Batch, answers: list[tuple[ShardRequest, Tensor]], out: Tensor) -> None:
        if not self._by_pair:
            add_answers(out, [(rows_RH, request.token_R) for request, rows_RH in answers])
            return
        for request, rows_PH in answers:
            out[torch.from_numpy(batch.shard_TK == request.shard)] = rows_PH

    def _requests(self, fleet: Fleet, batch: Batch) -> list[ShardRequest]:
        return requests_for_shards(batch.hidden_TH, batch.ids_TK, batch.weights_TK, batch.shard_TK, len(fleet.shards))

    def _send_all(self, fleet: Fleet, batch: Batch, requests: list[ShardRequest]) -> list[_Asked]:
        """Send each shard its packet. A shard whose link breaks is marked dead, and its pairs stay to be done."""
        asked: list[_Asked] = []
        for request in requests:
            self.sequence.value += 1
            link = fleet.links[fleet.shards[request.shard]]
            header = dispatch_header(
                request,
                hidden=batch.hidden_TH.shape[1],
                dtype=batch.hidden_TH.dtype,
                layer=batch.layer,
                generation=link.generation,
                sequence=self.sequence.value,
                epoch=fleet.placement.epoch,
                by_pair=self._by_pair,
            )
            try:
                link.send(header, request.parts)
            except LinkError as error:
                self._lose(fleet, request.shard, error)
                continue
            self.dispatch_bytes_L[self._row_of_layer[batch.layer]] += header.payload_bytes
            asked.append(_Asked(request, self.sequence.value))
        return asked

    def _receive(self, fleet: Fleet, batch: Batch, asked: _Asked, hidden: int) -> tuple[PacketKind, Tensor | None]:
        """Take one answer; return its kind, and its rows if it is one. FAILED: the shard is lost."""
        request = asked.request
        link = fleet.links[fleet.shards[request.shard]]
        try:
            header, payload = link.recv()
            if header.sequence != asked.sequence:
                raise LinkError(f"asked for packet {asked.sequence}, got {header}")
            if header.kind is PacketKind.FAILED:
                raise LinkError(f"the shard failed: {bytes(payload.cpu().numpy()).decode(errors='replace')}")
            if header.kind is PacketKind.NOT_HERE:
                return header.kind, None
            if header.kind is not PacketKind.COMBINE:
                raise LinkError(f"an answer of kind {header.kind.name}")
            rows = read_combine(header, payload)
            num_rows = request.num_pairs if self._by_pair else request.num_rows
            if rows.shape != (num_rows, hidden) or header.by_pair != self._by_pair:
                raise LinkError(f"asked for {num_rows} rows of {hidden}, got {header}")
        except LinkError as error:
            self._lose(fleet, request.shard, error)
            return PacketKind.FAILED, None
        self.combine_bytes_L[self._row_of_layer[batch.layer]] += header.payload_bytes
        return header.kind, rows

    def _lose(self, fleet: Fleet, index: int, error: LinkError) -> None:
        link = fleet.links[fleet.shards[index]]
        _log.tell(
            "link_lost",
            shard=fleet.shards[index],
            generation=link.generation,
            epoch=fleet.placement.epoch,
            reason=reason_of(error),
            **self.step_fields(),
        )
        fleet.mark_dead(index)
        if self._on_lost is not None:
            self._on_lost(fleet.shards[index], link)
