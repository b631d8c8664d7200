"""Pack a layer's tokens for the shards that run their experts, and combine what comes back.

Shape suffixes: T tokens, H hidden, K choices a token, R rows that one shard gets, P (row, expert) pairs of one shard.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ShardPairs:
    """What one shard is asked to do for a layer.

    token_R: the tokens whose rows it gets, each once, rising; None: all of them. row_P, expert_P, weight_P: the pairs,
    rows counted within token_R.
    """

    num_rows: int
    token_R: Tensor | None
    row_P: npt.NDArray[np.int32]
    expert_P: npt.NDArray[np.int32]
    weight_P: npt.NDArray[np.float32]


def pairs_for_shard(
    mine_TK: npt.NDArray[np.bool_], topk_ids_TK: npt.NDArray[np.int64], topk_weights_TK: npt.NDArray[np.float32]
) -> ShardPairs:
    """Pick the pairs marked in mine_TK, and the tokens that they need."""
    has_T = mine_TK.any(axis=1)
    token_P, choice_P = np.nonzero(mine_TK)
    everyone = bool(has_T.all())
    row_P = token_P if everyone else (np.cumsum(has_T) - 1)[token_P]
    return ShardPairs(
        num_rows=int(has_T.sum()),
        token_R=None if everyone else torch.from_numpy(np.flatnonzero(has_T)),
        row_P=row_P.astype(np.int32),
        expert_P=topk_ids_TK[token_P, choice_P].astype(np.int32),
        weight_P=topk_weights_TK[token_P, choice_P],
    )


def gather_rows(hidden_TH: Tensor, pairs: ShardPairs) -> Tensor:
    """Return the rows [R, H] that a shard gets."""
    return hidden_TH if pairs.token_R is None else hidden_TH.index_select(0, pairs.token_R.to(hidden_TH.device))


def sum_pairs(pairs_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """Return each token's weighted sum, float32 [T, H]: multiplied, rounded and added, one choice after another."""
    out_TH = torch.zeros((pairs_TKH.shape[0], pairs_TKH.shape[2]), dtype=torch.float32, device=pairs_TKH.device)
    for choice in range(pairs_TKH.shape[1]):
        out_TH += pairs_TKH[:, choice].float() * weights_TK[:, choice, None].float()
    return out_TH


def add_rows(out_TH: Tensor, rows_RH: Tensor, pairs: ShardPairs) -> None:
    """Add a shard's answer to out_TH (float32) in place."""
    if pairs.token_R is None:
        out_TH += rows_RH
    else:
        out_TH.index_add_(0, pairs.token_R.to(out_TH.device), rows_RH.to(out_TH.dtype))
