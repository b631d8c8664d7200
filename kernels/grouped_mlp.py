"""Grouped expert MLP: many experts, each over its own rows, in one call.

Shape suffixes: T rows (tokens), H hidden, P (token, expert) pairs, W expert width, U up-projection width (2W with a
gate, W without), S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.cpu.grouped_linear import grouped_linear, is_supported
from expertmesh.kernels.gpu import grouped_linear as few_rows


@dataclass(frozen=True, kw_only=True)
class ExpertMath:
    """What one expert computes between its two matrices, the same for every expert of a model.

    activate maps the up projection [P, U] to the input of the down projection [P, W] (gate, activation, clamps).
    is_transposed: weights are stored [in, out], not [out, in]. post_norm is applied to each expert's output [P, H].
    """

    activate: Callable[[Tensor], Tensor]
    is_transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class SlotWeights:
    """The weights of one layer's slots on one shard.

    up_SUH and down_SHW are [S, U, H] and [S, H, W] ([S, H, U] and [S, W, H] when transposed); biases [S, U] and [S, H].
    """

    up_SUH: Tensor
    down_SHW: Tensor
    up_bias_SU: Tensor | None = None
    down_bias_SH: Tensor | None = None


def grouped_mlp(
    rows_TH: Tensor, *, row_P: Tensor, slot_P: Tensor, weight_P: Tensor, slots: SlotWeights, math: ExpertMath
) -> Tensor:
    """Run each pair's expert over its row and sum the weighted results of each row.

    Args:
        rows_TH: hidden states, dtype of the weights.
        row_P: int64, the row that a pair belongs to.
        slot_P: int64, the slot whose expert a pair asks for.
        weight_P: float32, the router's weight of a pair.
        slots: the layer's weights.
        math: the model's expert function.

    Returns:
        float32 [T, H]; rows without a pair are zero.
    """
    order_P = torch.argsort(slot_P, stable=True)
    row_sorted_P = row_P[order_P]
    out_PH = _run_sorted(rows_TH[row_sorted_P], slot_P[order_P], slots, math)
    weighted_PH = out_PH.float() * weight_P[order_P].unsqueeze(1)
    out_TH = torch.zeros(rows_TH.shape, dtype=torch.float32, device=rows_TH.device)
    return out_TH.index_add_(0, row_sorted_P, weighted_PH)


def grouped_mlp_pairs(
    rows_TH: Tensor, *, row_P: Tensor, slot_P: Tensor, slots: SlotWeights, math: ExpertMath
) -> Tensor:
    """Run each pair's expert over its row, as `grouped_mlp` does, and sum nothing.

    Returns:
        [P, H], in the order of the pairs, not weighted, dtype of the rows.
    """
    order_P = torch.argsort(slot_P, stable=True)
    out_PH = _run_sorted(rows_TH[row_P[order_P]], slot_P[order_P], slots, math)
    return torch.empty_like(out_PH).index_copy_(0, order_P, out_PH)


def _run_sorted(pairs_PH: Tensor, slot_P: Tensor, slots: SlotWeights, math: ExpertMath) -> Tensor:
    """Return each pair's expert output [P, H]; slot_P rises."""
    # Not bincount: on a GPU it waits for its result.
    counts_S = slot_P.new_zeros(slots.up_SUH.shape[0]).index_add_(0, slot_P, torch.ones_like(slot_P))
    up_PU = _project(pairs_PH, slots.up_SUH, counts_S, math.is_transposed)
    if slots.up_bias_SU is not None:
        up_PU = up_PU + slots.up_bias_SU[slot_P]
    mid_PW = math.activate(up_PU)
    out_PH = _project(mid_PW, slots.down_SHW, counts_S, math.is_transposed)
    if slots.down_bias_SH is not None:
        out_PH = out_PH + slots.down_bias_SH[slot_P]
    return out_PH if math.post_norm is None else math.post_norm(out_PH)


def _project(x_PI: Tensor, weight_SOI: Tensor, counts_S: Tensor, is_transposed: bool) -> Tensor:
    """Multiply each slot's run of rows with its matrix. Rows are sorted by slot, counts_S of them for each."""
    if few_rows.is_supported(x_PI, len(counts_S)):
        return few_rows.grouped_linear(x_PI, weight_SOI, counts_S, is_transposed=is_transposed)
    weight_SIO = weight_SOI if is_transposed else weight_SOI.transpose(1, 2)
    if x_PI.dtype == torch.bfloat16 and x_PI.is_cuda:
        return F.grouped_mm(x_PI, weight_SIO, offs=counts_S.cumsum(0).to(torch.int32))
    counts = counts_S.tolist()
    if not is_transposed and is_supported(x_PI, weight_SOI, max(counts, default=0)):
        return grouped_linear(x_PI, weight_SOI, counts)
    # Measured on CPU: one matrix product a touched slot is as fast as grouped_mm, and works for every dtype.
    out_PO = x_PI.new_empty((x_PI.shape[0], weight_SIO.shape[2]))
    start = 0
    for slot, count in enumerate(counts):
        if count:
            torch.mm(x_PI[start : start + count], weight_SIO[slot], out=out_PO[start : start + count])
            start += count
    return out_PO


def reference_mlp(
    rows_TH: Tensor, *, row_P: Tensor, slot_P: Tensor, weight_P: Tensor, slots: SlotWeights, math: ExpertMath
) -> Tensor:
    """Compute the same as `grouped_mlp`, one pair at a time: the slow twin that the fast paths are tested against."""
    out_TH = torch.zeros(rows_TH.shape, dtype=torch.float32, device=rows_TH.device)
    for row, slot, weight in zip(row_P.tolist(), slot_P.tolist(), weight_P.tolist(), strict=True):
        up_UH, down_HW = slots.up_SUH[slot], slots.down_SHW[slot]
        if math.is_transposed:
            up_UH, down_HW = up_UH.T, down_HW.T
        up_1U = rows_TH[row : row + 1] @ up_UH.T
        if slots.up_bias_SU is not None:
            up_1U = up_1U + slots.up_bias_SU[slot]
        out_1H = math.activate(up_1U) @ down_HW.T
        if slots.down_bias_SH is not None:
            out_1H = out_1H + slots.down_bias_SH[slot]
        if math.post_norm is not None:
            out_1H = math.post_norm(out_1H)
        out_TH[row] += out_1H[0].float() * weight
    return out_TH
