"""Pack a layer's tokens for the shards that run their experts, and combine what comes back.

A shard gets each token's row once, however many of its experts it is to run, then the (row, expert) pairs: all rows,
all experts, all weights, PAIR_BYTES in all for each pair.

Shape suffixes: T tokens, H hidden, K choices a token, R rows that one shard gets, P (row, expert) pairs of one shard.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.kernels.cpu import dispatch as compiled

PAIR_BYTES = 12  # row int32, expert int32, weight float32


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


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """The same as it travels: parts are tensors whose bytes, one after another, are a packet's payload."""

    shard: int
    num_rows: int
    num_pairs: int
    token_R: Tensor | None
    parts: list[Tensor]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts)


def requests_for_shards(
    hidden_TH: Tensor,
    ids_TK: npt.NDArray[np.int64],
    weights_TK: npt.NDArray[np.float32],
    shard_TK: npt.NDArray[np.int32],
    num_shards: int,
) -> list[ShardRequest]:
    """Return what each shard is asked, those with pairs alone, rising.

    Args:
        hidden_TH: the tokens' hidden states.
        ids_TK: the experts chosen.
        weights_TK: the router's weights.
        shard_TK: who runs each pair; -1: nobody.
        num_shards: that shard_TK counts.
    """
    if compiled.can_pack(hidden_TH):
        return [
            ShardRequest(shard=shard, num_rows=rows, num_pairs=pairs, token_R=token_R, parts=[payload])
            for shard, rows, pairs, token_R, payload in compiled.pack(
                hidden_TH, ids_TK, weights_TK, shard_TK, num_shards
            )
        ]
    return [
        request_of(shard, gather_rows(hidden_TH, pairs), pairs)
        for shard in range(num_shards)
        if (mine_TK := shard_TK == shard).any()
        for pairs in [pairs_for_shard(mine_TK, ids_TK, weights_TK)]
    ]


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


def request_of(shard: int, rows_RH: Tensor, pairs: ShardPairs) -> ShardRequest:
    """Return pairs and their rows as they travel."""
    block = np.concatenate([pairs.row_P.view(np.uint8), pairs.expert_P.view(np.uint8), pairs.weight_P.view(np.uint8)])
    return ShardRequest(
        shard=shard,
        num_rows=pairs.num_rows,
        num_pairs=len(pairs.row_P),
        token_R=pairs.token_R,
        parts=[rows_RH.contiguous(), torch.from_numpy(block).to(rows_RH.device)],
    )


def read_pairs(block: Tensor, num_pairs: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read the pairs behind a packet's rows.

    Args:
        block: uint8 [P * PAIR_BYTES], not aligned for its types.
        num_pairs: at least 1.
        num_rows: of the packet.

    Returns:
        Rows and experts, int64 [P], and weights, float32 [P].

    Raises:
        ValueError: a row outside 0 to num_rows - 1, or a negative expert.
    """
    if compiled.can_read(block):
        return compiled.read_pairs(block, num_pairs, num_rows)
    aligned = block.clone().view(3, num_pairs * 4)
    row_P, expert_P = aligned[0].view(torch.int32).long(), aligned[1].view(torch.int32).long()
    if not 0 <= int(row_P.min()) <= int(row_P.max()) < num_rows:
        raise ValueError(f"rows outside 0 to {num_rows - 1}")
    if int(expert_P.min()) < 0:
        raise ValueError("a negative expert")
    return row_P, expert_P, aligned[2].view(torch.float32)


def sum_pairs(pairs_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """Return each token's weighted sum, float32 [T, H]: multiplied, rounded and added, one choice after another."""
    out_TH = torch.zeros((pairs_TKH.shape[0], pairs_TKH.shape[2]), dtype=torch.float32, device=pairs_TKH.device)
    for choice in range(pairs_TKH.shape[1]):
        out_TH += pairs_TKH[:, choice].float() * weights_TK[:, choice, None].float()
    return out_TH


def add_rows(out_TH: Tensor, rows_RH: Tensor, token_R: Tensor | None) -> None:
    """Add a shard's answer to the tokens (None: all) of out_TH (float32) in place; both contiguous."""
    if compiled.can_add(out_TH, rows_RH):
        compiled.add(out_TH, rows_RH, token_R)
    elif token_R is None:
        out_TH += rows_RH
    else:
        out_TH.index_add_(0, token_R.to(out_TH.device), rows_RH.to(out_TH.dtype))


def count_tokens(
    ids_TK: npt.NDArray[np.int64],
    is_decode_T: npt.NDArray[np.bool_],
    load_E: npt.NDArray[np.int64],
    decode_E: npt.NDArray[np.int64],
) -> None:
    """Add the tokens of each expert to load_E, and those of generated tokens to decode_E; all contiguous."""
    if compiled.count(ids_TK, is_decode_T, load_E, decode_E):
        return
    load_E += np.bincount(ids_TK.ravel(), minlength=len(load_E))
    decode_E += np.bincount(ids_TK[is_decode_T].ravel(), minlength=len(decode_E))
