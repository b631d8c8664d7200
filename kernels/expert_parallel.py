"""Expert parallelism as textbooks have it: ranks that hold experts and tokens alike, two all-to-alls a layer.

The baseline that links to expert shards are compared with, and the reference for what others do: GShard (Lepikhin et
al. 2020, capacity, equal splits), Switch Transformer (Fedus et al. 2021, dropping), Tutel and Megatron (splits as
counted). Every (token, choice) pair travels as a row of its own, there and back, and nothing is sent twice: a rank that
fails takes the group with it. All calls are collective. Differentiable: all ranks go back through the layer, or none,
and of hidden states, router's weights and experts the same need gradients on each. Without gradients (torch.no_grad)
the experts run in the kernels of serving.

Shape suffixes: T tokens of this rank, H hidden, K choices a token, P its (token, choice) pairs that are kept, in order
of expert, N pairs that this rank computes, E experts of all ranks, S this rank's experts, R ranks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, grouped_mlp_pairs, reference_mlp


class LayerOutput(NamedTuple):
    """What a layer gives a rank: out_TH, dtype of its hidden states, and dropped_E, int64, its pairs left out."""

    out_TH: Tensor
    dropped_E: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertParallelLayer:
    """One rank's part of a layer. Rank r of the group has experts r * S to r * S + S - 1, in this order in its slots.

    capacity_factor: None, or above 0: no more than `capacity` pairs of a rank go to an expert; those beyond, in the
    order of tokens and then of their choices, are dropped and add nothing, and the weights of what is kept stay as they
    are. splits: "exact" sends the rows that there are, after an exchange of counts; "equal" sends every expert as many
    rows as the largest capacity of a rank, zeros where there are fewer, and needs a capacity factor. group: None is the
    default one; its timeout is the deadline of each exchange.

    Raises:
        ValueError: an option that does not fit.
    """

    slots: SlotWeights
    math: ExpertMath
    num_experts: int
    group: dist.ProcessGroup | None = None
    capacity_factor: float | None = None
    splits: Literal["exact", "equal"] = "exact"

    def __post_init__(self) -> None:
        num_ranks, num_slots = dist.get_world_size(self.group), self.slots.up_SUH.shape[0]
        if num_slots * num_ranks != self.num_experts:
            raise ValueError(f"num_experts={self.num_experts} on {num_ranks} ranks of {num_slots} experts each")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor={self.capacity_factor}; it must be above 0, and finite")
        if self.splits == "equal" and self.capacity_factor is None:
            raise ValueError("splits='equal' needs a capacity_factor")

    def run(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> LayerOutput:
        """Compute the layer for this rank's tokens, and this rank's experts for everybody's.

        Args:
            hidden_TH: dtype of the weights; T may be 0, and differ from rank to rank.
            ids_TK: int64, the experts chosen.
            weights_TK: the router's weights.
        """
        capacity = None
        if self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, ids_TK.numel(), self.num_experts)
        pair_P, position_P, dropped_E = _admit(ids_TK.flatten(), self.num_experts, capacity)
        token_P, expert_P = pair_P // ids_TK.shape[1], ids_TK.flatten()[pair_P]
        if self.splits == "exact":
            out_PH = self._run_exact(hidden_TH[token_P], expert_P)
        else:
            assert capacity is not None
            out_PH = self._run_equal(hidden_TH[token_P], expert_P, position_P, capacity)
        weighted_PH = out_PH.float() * weights_TK.flatten()[pair_P].float().unsqueeze(1)
        sum_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
        return LayerOutput(sum_TH.index_add(0, token_P, weighted_PH).to(hidden_TH.dtype), dropped_E)

    def _run_exact(self, rows_PH: Tensor, expert_P: Tensor) -> Tensor:
        counts_RS = torch.bincount(expert_P, minlength=self.num_experts).view(-1, self.slots.up_SUH.shape[0])
        theirs_RS = torch.empty_like(counts_RS)
        dist.all_to_all_single(theirs_RS, counts_RS, group=self.group)
        sent, received = counts_RS.sum(dim=1).tolist(), theirs_RS.sum(dim=1).tolist()
        rows_NH = _all_to_all(rows_PH, received, sent, self.group)
        slot_N = torch.arange(counts_RS.shape[1], device=expert_P.device).repeat(len(received))
        out_NH = self._run_experts(rows_NH, slot_N.repeat_interleave(theirs_RS.flatten()))
        return _all_to_all(out_NH, sent, received, self.group)

    def _run_equal(self, rows_PH: Tensor, expert_P: Tensor, position_P: Tensor, capacity: int) -> Tensor:
        room = torch.tensor(capacity, device=rows_PH.device)
        dist.all_reduce(room, dist.ReduceOp.MAX, group=self.group)
        num_slots, num_rows = self.slots.up_SUH.shape[0], int(room)
        place_P = expert_P * num_rows + position_P
        padded_NH = rows_PH.new_zeros((self.num_experts * num_rows, rows_PH.shape[1])).index_copy(0, place_P, rows_PH)
        each = [num_slots * num_rows] * (self.num_experts // num_slots)
        rows_NH = _all_to_all(padded_NH, each, each, self.group)
        slot_N = torch.arange(num_slots, device=expert_P.device).repeat_interleave(num_rows).repeat(len(each))
        return _all_to_all(self._run_experts(rows_NH, slot_N), each, each, self.group)[place_P]

    def _run_experts(self, rows_NH: Tensor, slot_N: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _differentiable_mlp(rows_NH, slot_N, self.slots, self.math)
        row_N = torch.arange(len(rows_NH), device=rows_NH.device)
        return grouped_mlp_pairs(rows_NH, row_P=row_N, slot_P=slot_N, slots=self.slots, math=self.math)


def expert_capacity(capacity_factor: float, num_pairs: int, num_experts: int) -> int:
    """Return how many of a rank's pairs an expert takes: an even share times the factor, rounded up.

    The pairs are those of one rank's tokens in one call, so that no rank needs to hear of the others' before it sends:
    an expert computes at most the sum of what the ranks may send it (GShard's capacity of a group, section 2.2 there).
    """
    return math.ceil(capacity_factor * num_pairs / num_experts)


def reference_layer(
    hidden_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    slots: SlotWeights,
    math: ExpertMath,
    capacity: int | None = None,
) -> LayerOutput:
    """Compute what the layer gives one rank, in one process that has all experts, pair by pair: the slow twin.

    Args:
        hidden_TH: the rank's hidden states.
        ids_TK: int64.
        weights_TK: the router's weights.
        slots: all experts.
        math: theirs.
        capacity: pairs of this rank that an expert takes; None: all.
    """
    num_experts = slots.up_SUH.shape[0]
    taken_E, dropped_E = [0] * num_experts, [0] * num_experts
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32)
    one, first = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    for token, experts in enumerate(ids_TK.tolist()):
        for choice, expert in enumerate(experts):
            if capacity is not None and taken_E[expert] == capacity:
                dropped_E[expert] += 1
                continue
            taken_E[expert] += 1
            slot, row_1H = torch.tensor([expert]), hidden_TH[token : token + 1]
            output_1H = reference_mlp(row_1H, row_P=first, slot_P=slot, weight_P=one, slots=slots, math=math)
            out_TH[token] += output_1H[0] * weights_TK[token, choice].float()
    return LayerOutput(out_TH.to(hidden_TH.dtype), torch.tensor(dropped_E))


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks. A row's gradient comes from where it went: the same exchange with the splits swapped."""

    @staticmethod
    def forward(ctx: Any, rows_PH: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (received, sent), group
        return _exchange(rows_PH, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = ctx.splits
        return _exchange(gradients[0], sent, received, ctx.group), None, None, None


def _all_to_all(rows_PH: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send each rank its split of the rows; return what came, rank after rank."""
    rows_NH: Tensor = _AllToAll.apply(rows_PH, received, sent, group)  # type: ignore[no-untyped-call]
    return rows_NH


def _exchange(rows_PH: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup | None) -> Tensor:
    rows_NH = rows_PH.new_empty((sum(received), rows_PH.shape[1]))
    dist.all_to_all_single(rows_NH, rows_PH.contiguous(), received, sent, group=group)
    return rows_NH


def _admit(expert_P: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Say which pairs are kept.

    Returns:
        The kept pairs in the order of their experts, each one's position among its expert's, and the dropped pairs by
        expert; all int64.
    """
    pair_P = torch.argsort(expert_P, stable=True)
    load_E = torch.bincount(expert_P, minlength=num_experts)
    position_P = torch.arange(len(pair_P), device=pair_P.device) - (load_E.cumsum(0) - load_E)[expert_P[pair_P]]
    if capacity is None:
        return pair_P, position_P, torch.zeros_like(load_E)
    is_kept_P = position_P < capacity
    return pair_P[is_kept_P], position_P[is_kept_P], (load_E - capacity).clamp(min=0)


def _differentiable_mlp(rows_NH: Tensor, slot_N: Tensor, slots: SlotWeights, math: ExpertMath) -> Tensor:
    """Compute what `grouped_mlp_pairs` does with operators that autograd knows; experts without rows have a part."""
    order_N = torch.argsort(slot_N, stable=True)
    counts = torch.bincount(slot_N, minlength=slots.up_SUH.shape[0]).tolist()
    parts = []
    for slot, rows in enumerate(torch.split(rows_NH[order_N], counts)):
        up, down = slots.up_SUH[slot], slots.down_SHW[slot]
        up_PU = rows @ (up if math.is_transposed else up.T)
        if slots.up_bias_SU is not None:
            up_PU = up_PU + slots.up_bias_SU[slot]
        out_PH = math.activate(up_PU) @ (down if math.is_transposed else down.T)
        if slots.down_bias_SH is not None:
            out_PH = out_PH + slots.down_bias_SH[slot]
        parts.append(out_PH if math.post_norm is None else math.post_norm(out_PH))
    return torch.cat(parts)[torch.argsort(order_N)]
