"""Runs a layer's experts wherever they live: chooses replicas, sends one packet to each shard, combines the answers.

Shape suffixes: T tokens, H hidden, K choices a token, L layers, E experts, S shards of the placement. Of experts that
are cut in slices, K and E count slices, but for what the router chose.
"""

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.actors.links.base import Channel, Link
from expertmesh.actors.wire import dispatch_header, read_combine
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.cluster.capacity import kept_pairs
from expertmesh.cluster.errors import LinkError, NoReplicaError, UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.packets import PacketKind
from expertmesh.kernels.cpu.exchange import State, can_exchange
from expertmesh.kernels.cpu.stack import PARTS, Exchanged, Route
from expertmesh.kernels.dispatch import (
    ShardRequest,
    add_answers,
    choose_slices,
    count_tokens,
    requests_for_shards,
    sum_pairs,
)

_log = logging.getLogger(__name__)
OnLost = Callable[[ShardId, Link], None]


@dataclass(frozen=True)
class _Batch:
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


class Dispatcher:
    """The worker's side of the experts. `run` is what the model's MoE layers call; one thread at a time."""

    def __init__(
        self,
        layers: tuple[int, ...],
        num_slices: int,
        *,
        expert_tp: int = 1,
        recovery_s: float,
        on_lost: OnLost | None = None,
        by_pair: bool = False,
        capacity_factor: float | None = None,
    ) -> None:
        """Make a dispatcher without a fleet.

        Args:
            layers: indices of the MoE layers.
            num_slices: what is placed of each: its experts, or the slices of its experts.
            expert_tp: slices of each expert.
            recovery_s: how long a step waits for a newer fleet when an expert has no live replica.
            on_lost: told each link that broke, by the thread that found out.
            by_pair: have the shards answer with each pair's output, and sum a token's here in the order of its choices,
                so that the sum does not depend on which shards computed. More bytes come back.
            capacity_factor: leave out what `cluster.capacity.kept_pairs` does; None: nothing.
        """
        self._row_of_layer = {layer: row for row, layer in enumerate(layers)}
        self._num_experts, self._expert_tp = num_slices // expert_tp, expert_tp
        self._recovery_s = recovery_s
        self._on_lost = on_lost
        self._by_pair = by_pair
        self._capacity_factor = capacity_factor
        self._fleet: Fleet | None = None
        self._changed = threading.Condition()
        # One key, for the token with which a runner learns the layers' shapes before the first step.
        self._token_keys_T = np.zeros(1, dtype=np.uint64)
        self._is_decode_T = np.zeros(1, dtype=np.bool_)
        # Read and written by compiled code too: the last packet's, and whether there is another fleet than its own.
        self._sequence = ctypes.c_uint64(0)
        self._has_other_fleet = ctypes.c_int32(0)
        # Since the start: tokens that chose each expert (or slice), in all and of decoding alone.
        self.decode_LE = np.zeros((len(layers), num_slices), dtype=np.int64)
        self._expert_s = 0.0
        self.spent_s = np.zeros(len(PARTS))  # what compiled code spent, by part
        self.load_LE = np.zeros((len(layers), num_slices), dtype=np.int64)
        self.dropped_LE = np.zeros((len(layers), self._num_experts), dtype=np.int64)  # left out, by whole experts
        self.dispatch_bytes_L = np.zeros(len(layers), dtype=np.int64)
        self.combine_bytes_L = np.zeros(len(layers), dtype=np.int64)

    @property
    def expert_s(self) -> float:
        """Seconds since the start that steps spent on experts."""
        return self._expert_s + float(self.spent_s[1:].sum())

    @property
    def fleet(self) -> Fleet | None:
        """The fleet in use."""
        return self._fleet

    def set_fleet(self, fleet: Fleet) -> None:
        """Use a fleet from the next layer on; may be called from any thread."""
        with self._changed:
            self._fleet = fleet
            self._has_other_fleet.value = 1
            self._changed.notify_all()

    def begin_step(self, token_keys_T: npt.NDArray[np.uint64], is_decode_T: npt.NDArray[np.bool_]) -> None:
        """Say which tokens the coming layers carry.

        Args:
            token_keys_T: one each, from `dispatch_hash.token_keys`.
            is_decode_T: whether it is a generated token, not one of a prompt.
        """
        self._token_keys_T, self._is_decode_T = token_keys_T, is_decode_T

    def run(self, layer: int, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Compute the routed experts of a layer; see `models.hooks.RunExperts`.

        Raises:
            NoReplicaError: an expert has no live replica and no newer fleet came within recovery_s.
        """
        chosen = topk_ids_TK.long().contiguous().cpu().numpy(), topk_weights_TK.float().cpu().numpy()
        ids_TK, weights_TK = choose_slices(*chosen, self._expert_tp)
        started_s = time.perf_counter()
        row = self._row_of_layer[layer]
        count_tokens(ids_TK, self._is_decode_T[: len(ids_TK)], self.load_LE[row], self.decode_LE[row])
        kept_TK = None if self._capacity_factor is None else self._keep(row, *chosen, self._capacity_factor)
        # With by_pair [T, K, H], and every answer writes its own part of it.
        if self._by_pair:
            out = hidden_TH.new_empty((*ids_TK.shape, hidden_TH.shape[1]))
        else:
            out = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
        out_TH = self._run(layer, hidden_TH, ids_TK, weights_TK, out, kept_TK)
        if self._by_pair:
            out_TH = sum_pairs(out_TH, topk_weights_TK.repeat_interleave(self._expert_tp, dim=1))
        self._expert_s += time.perf_counter() - started_s
        return out_TH.to(hidden_TH.dtype)

    def route(self, num_tokens: int) -> Route | None:
        """Return the way to the shards for compiled code; see `kernels.cpu.stack.Carrier`."""
        self._has_other_fleet.value = 0  # before the fleet is read: one that is set from now on is noticed
        fleet = self._fleet
        goes_by_layer = self._by_pair or self._capacity_factor is not None
        channels = None if fleet is None or goes_by_layer else fleet.channels()
        if fleet is None or channels is None:
            return None
        assert len(self._is_decode_T) == num_tokens, f"begin_step() told of {len(self._is_decode_T)} tokens"
        return Route(
            exchange=fleet.open_exchange(channels),
            only_LE=fleet.only_LE(tuple(self._row_of_layer)),
            choose=partial(self._choose, fleet),
            row_of_layer=self._row_of_layer,
            load_LE=self.load_LE,
            decode_LE=self.decode_LE,
            dispatch_bytes_L=self.dispatch_bytes_L,
            combine_bytes_L=self.combine_bytes_L,
            is_decode_T=self._is_decode_T,
            sequence=self._sequence,
            changed=self._has_other_fleet,
            spent_s=self.spent_s,
            expert_tp=self._expert_tp,
            owner=fleet,
        )

    def _choose(self, fleet: Fleet, layer: int, ids_TK: npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        try:
            return fleet.choose[layer](ids_TK, self._token_keys_T, fleet.alive_S)
        except NoReplicaError:
            return None  # `run` finds it so again, and waits for another fleet

    def resume(self, route: Route, layer: int, exchanged: Exchanged) -> Tensor:
        """Finish what an exchange left undone; see `kernels.cpu.stack.Carrier`."""
        started_s = time.perf_counter()
        fleet = route.owner
        assert isinstance(fleet, Fleet), "a route of somebody else"
        ids_TK, weights_TK, shard_TK = (t.numpy() for t in (exchanged.ids_TK, exchanged.weights_TK, exchanged.shard_TK))
        batch = _Batch(layer, exchanged.hidden_TH, ids_TK, weights_TK, shard_TK)
        first_sequence = self._sequence.value - len(fleet.shards) + 1
        kinds = self._outcome(fleet, batch, first_sequence, exchanged.sum_TH)
        todo_TK = self._left(fleet, batch, kinds)
        out_TH = self._run(layer, exchanged.hidden_TH, ids_TK, weights_TK, exchanged.sum_TH, todo_TK, is_begun=True)
        self._expert_s += time.perf_counter() - started_s
        return out_TH.to(exchanged.hidden_TH.dtype)

    def _run(
        self,
        layer: int,
        hidden_TH: Tensor,
        ids_TK: npt.NDArray[np.int64],
        weights_TK: npt.NDArray[np.float32],
        out: Tensor,
        todo_TK: npt.NDArray[np.bool_] | None,
        *,
        is_begun: bool = False,
    ) -> Tensor:
        """Have a layer's pairs computed, those of todo_TK alone unless it is None; return out, or what it holds.

        is_begun: out holds some of the sum, to which the rest is added.
        """
        keys_T = self._token_keys_T[: len(ids_TK)]
        assert len(keys_T) == len(ids_TK), f"begin_step() told of {len(keys_T)} tokens, layer {layer} has {len(ids_TK)}"
        while todo_TK is None or todo_TK.any():
            fleet = self._fleet
            assert fleet is not None, "run() before set_fleet()"
            # What is done needs no replica any more: its place is taken by an expert that does.
            wanted_TK = ids_TK if todo_TK is None else np.where(todo_TK, ids_TK, ids_TK[todo_TK][0])
            try:
                shard_TK = fleet.choose[layer](wanted_TK, keys_T, fleet.alive_S)
            except NoReplicaError as error:
                self._await_fleet(fleet, error)
                continue
            if todo_TK is not None:
                shard_TK = np.where(todo_TK, shard_TK, np.int32(-1))
            batch = _Batch(layer, hidden_TH, ids_TK, weights_TK, shard_TK)
            channels = fleet.channels() if not is_begun and self._may_exchange(hidden_TH) else None
            if channels is None:
                kinds = self._ask(fleet, batch, out)
            else:
                kinds, finished_TH = self._exchange(fleet, batch, channels, out)
                if finished_TH is not None:
                    return finished_TH
            todo_TK, is_begun = self._left(fleet, batch, kinds), True
        return out

    def _keep(
        self, row: int, ids_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32], capacity_factor: float
    ) -> npt.NDArray[np.bool_] | None:
        """Return which pairs (of slices) of a layer are kept, and count the others (of experts); None: all."""
        kept_TK = kept_pairs(ids_TK, weights_TK, self._num_experts, capacity_factor)
        if kept_TK.all():
            return None
        self.dropped_LE[row] += np.bincount(ids_TK[~kept_TK], minlength=self._num_experts)
        return np.repeat(kept_TK, self._expert_tp, axis=1)

    def _left(self, fleet: Fleet, batch: _Batch, kinds: dict[int, PacketKind]) -> npt.NDArray[np.bool_]:
        """Return which pairs are still to be done; wait for a newer fleet if the placement was wrong."""
        done = [shard for shard, kind in kinds.items() if kind is PacketKind.COMBINE]
        if PacketKind.NOT_HERE in kinds.values():
            epoch = fleet.placement.epoch
            fault = f"layer {batch.layer}: a shard does not host what epoch {epoch} says"
            self._await_fleet(fleet, UnavailableError(fault))
        return (batch.shard_TK >= 0) & ~np.isin(batch.shard_TK, done)

    def _may_exchange(self, hidden_TH: Tensor) -> bool:
        return not self._by_pair and can_exchange(hidden_TH)

    def _exchange(
        self, fleet: Fleet, batch: _Batch, channels: list[Channel], sum_TH: Tensor
    ) -> tuple[dict[int, PacketKind], Tensor | None]:
        """Ask the shards in compiled code.

        Returns:
            What became of each shard's packet, as `_ask` does, and, once all are done, the sum in the wire's dtype.
        """
        exchange = fleet.open_exchange(channels)
        sequence = self._sequence.value + 1
        self._sequence.value += len(channels)
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
        return ({}, finished_TH) if finished_TH is not None else (self._outcome(fleet, batch, sequence, sum_TH), None)

    def _outcome(self, fleet: Fleet, batch: _Batch, sequence: int, sum_TH: Tensor) -> dict[int, PacketKind]:
        """Return what became of each shard's packet in an exchange that is not all done, as `_ask` does."""
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

    def _ask(self, fleet: Fleet, batch: _Batch, out: Tensor) -> dict[int, PacketKind]:
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

    def _add(self, batch: _Batch, answers: list[tuple[ShardRequest, Tensor]], out: Tensor) -> None:
        if not self._by_pair:
            add_answers(out, [(rows_RH, request.token_R) for request, rows_RH in answers])
            return
        for request, rows_PH in answers:
            out[torch.from_numpy(batch.shard_TK == request.shard)] = rows_PH

    def _requests(self, fleet: Fleet, batch: _Batch) -> list[ShardRequest]:
        return requests_for_shards(batch.hidden_TH, batch.ids_TK, batch.weights_TK, batch.shard_TK, len(fleet.shards))

    def _send_all(self, fleet: Fleet, batch: _Batch, requests: list[ShardRequest]) -> list[_Asked]:
        """Send each shard its packet. A shard whose link breaks is marked dead, and its pairs stay to be done."""
        asked: list[_Asked] = []
        for request in requests:
            self._sequence.value += 1
            link = fleet.links[fleet.shards[request.shard]]
            header = dispatch_header(
                request,
                hidden=batch.hidden_TH.shape[1],
                dtype=batch.hidden_TH.dtype,
                layer=batch.layer,
                generation=link.generation,
                sequence=self._sequence.value,
                epoch=fleet.placement.epoch,
                by_pair=self._by_pair,
            )
            try:
                link.send(header, request.parts)
            except LinkError as error:
                self._lose(fleet, request.shard, error)
                continue
            self.dispatch_bytes_L[self._row_of_layer[batch.layer]] += header.payload_bytes
            asked.append(_Asked(request, self._sequence.value))
        return asked

    def _receive(self, fleet: Fleet, batch: _Batch, asked: _Asked, hidden: int) -> tuple[PacketKind, Tensor | None]:
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
        _log.warning("shard %s is lost: %s", fleet.shards[index], error)
        fleet.mark_dead(index)
        if self._on_lost is not None:
            self._on_lost(fleet.shards[index], fleet.links[fleet.shards[index]])

    def _await_fleet(self, old: Fleet, reason: UnavailableError) -> None:
        """Wait for a fleet other than `old`; raise the reason when none comes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._fleet is not old, timeout=self._recovery_s):
                raise reason
