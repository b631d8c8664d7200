"""Runs a layer's experts wherever they live: chooses replicas, sends one packet to each shard, combines the answers.

Shape suffixes: T tokens, H hidden, K choices a token, L layers, E experts, S shards of the placement. Of experts that
are cut in slices, K and E count slices, but for what the router chose.
"""

import ctypes
import threading
import time
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.worker.asking import Asker, Batch, OnLost
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.capacity import kept_pairs
from expertmesh.cluster.errors import NoReplicaError, UnavailableError
from expertmesh.cluster.packets import PacketKind
from expertmesh.kernels.cpu.exchange import can_exchange
from expertmesh.kernels.cpu.stack import PARTS, Exchanged, Route
from expertmesh.kernels.dispatch import choose_slices, count_tokens, sum_pairs

_log = EventLog(__name__)


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
        self._by_pair = by_pair
        self._capacity_factor = capacity_factor
        self._fleet: Fleet | None = None
        self._changed = threading.Condition()
        # One key, for the token with which a runner learns the layers' shapes before the first step.
        self._token_keys_T = np.zeros(1, dtype=np.uint64)
        self._is_decode_T = np.zeros(1, dtype=np.bool_)
        self._asker = Asker(self._row_of_layer, by_pair=by_pair, on_lost=on_lost)
        self.dispatch_bytes_L, self.combine_bytes_L = self._asker.dispatch_bytes_L, self._asker.combine_bytes_L
        # Read by compiled code too: whether there is another fleet than its own.
        self._has_other_fleet = ctypes.c_int32(0)
        # Since the start: tokens that chose each expert (or slice), in all and of decoding alone.
        self.decode_LE = np.zeros((len(layers), num_slices), dtype=np.int64)
        self._expert_s = 0.0
        self.num_retries = 0  # layers of a step of which a part was asked for again
        self.spent_s = np.zeros(len(PARTS))  # what compiled code spent, by part
        self.load_LE = np.zeros((len(layers), num_slices), dtype=np.int64)
        self.dropped_LE = np.zeros((len(layers), self._num_experts), dtype=np.int64)  # left out, by whole experts

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

    def begin_step(self, step: Step, token_keys_T: npt.NDArray[np.uint64], is_decode_T: npt.NDArray[np.bool_]) -> None:
        """Say which tokens the coming layers carry.

        Args:
            step: which their packets name.
            token_keys_T: one each, from `dispatch_hash.token_keys`.
            is_decode_T: whether it is a generated token, not one of a prompt.
        """
        self._asker.begin_step(step)
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
            sequence=self._asker.sequence,
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
        batch = Batch(layer, exchanged.hidden_TH, ids_TK, weights_TK, shard_TK)
        first_sequence = self._asker.sequence.value - len(fleet.shards) + 1
        kinds = self._asker.outcome(fleet, batch, first_sequence, exchanged.sum_TH)
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
                self._await_fleet(fleet, layer, error)
                continue
            if todo_TK is not None:
                shard_TK = np.where(todo_TK, shard_TK, np.int32(-1))
            batch = Batch(layer, hidden_TH, ids_TK, weights_TK, shard_TK)
            channels = fleet.channels() if not is_begun and not self._by_pair and can_exchange(hidden_TH) else None
            if channels is None:
                kinds = self._asker.ask(fleet, batch, out)
            else:
                kinds, finished_TH = self._asker.exchange(fleet, batch, channels, out)
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

    def _left(self, fleet: Fleet, batch: Batch, kinds: dict[int, PacketKind]) -> npt.NDArray[np.bool_]:
        """Return which pairs are still to be done; wait for a newer fleet if the placement was wrong."""
        done = [shard for shard, kind in kinds.items() if kind is PacketKind.COMBINE]
        if PacketKind.NOT_HERE in kinds.values():
            epoch = fleet.placement.epoch
            fault = f"layer {batch.layer}: a shard does not host what epoch {epoch} says"
            self._await_fleet(fleet, batch.layer, UnavailableError(fault))
        left_TK = (batch.shard_TK >= 0) & ~np.isin(batch.shard_TK, done)
        if left_TK.any():
            self.num_retries += 1
            failed = [fleet.shards[index] for index, kind in kinds.items() if kind is not PacketKind.COMBINE]
            _log.tell("step_retried", **self._asker.step_fields(), layer=batch.layer, shards=failed)
        return left_TK

    def _await_fleet(self, old: Fleet, layer: int, reason: UnavailableError) -> None:
        """Wait for a fleet other than `old`; raise the reason when none comes."""
        if self._fleet is old:
            _log.tell("step_waits", **self._asker.step_fields(), layer=layer, reason=reason_of(reason))
        with self._changed:
            if not self._changed.wait_for(lambda: self._fleet is not old, timeout=self._recovery_s):
                raise reason
