"""Pack a layer's tokens for the shards that run their experts, and combine what comes back.

A shard gets each token's row once, however many of its experts it is to run, then the (row, expert) pairs: all rows,
all experts, all weights, PAIR_BYTES in all for each pair.

Shape suffixes: T tokens, H hidden, K choices a token, R rows that one shard gets, P (row, expert) pairs of one shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.kernels.cpu import dispatch as compiled
from expertmesh.kernels.gpu import dispatch as gpu

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


def choose_slices(
    ids_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32], expert_tp: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return choices of experts as choices of all their slices, [T, K * expert_tp], in the order of the choices.

    Slice s of expert e has number e * expert_tp + s, and the expert's weight: the slices' outputs add up to its own.
    """
    if expert_tp == 1:
        return ids_TK, weights_TK
    slices_TKS = ids_TK[:, :, None] * expert_tp + np.arange(expert_tp)
    return slices_TKS.reshape(len(ids_TK), -1), np.repeat(weights_TK, expert_tp, axis=1)


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
    asked = {
        shard: pairs_for_shard(mine_TK, ids_TK, weights_TK)
        for shard in range(num_shards)
        if (mine_TK := shard_TK == shard).any()
    }
    rows = gather_rows(hidden_TH, list(asked.values()))
    return [request_of(shard, rows_RH, pairs) for (shard, pairs), rows_RH in zip(asked.items(), rows, strict=True)]


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


def gather_rows(hidden_TH: Tensor, asked: Sequence[ShardPairs]) -> list[Tensor]:
    """Return the rows [R, H] that each shard gets."""
    some = [pairs.token_R for pairs in asked if pairs.token_R is not None]
    if not some or not gpu.can_use(hidden_TH):
        return [hidden_TH if p.token_R is None else hidden_TH[p.token_R.to(hidden_TH.device)] for p in asked]
    together = gpu.gather_rows(hidden_TH, torch.cat(some).to(hidden_TH.device))
    rows = iter(torch.split(together, [len(token_R) for token_R in some]))
    return [hidden_TH if pairs.token_R is None else next(rows) for pairs in asked]


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


def add_answers(out_TH: Tensor, answers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Add shards' answers to out_TH (float32) in place, one after another; all contiguous.

    Args:
        out_TH: the sums.
        answers: of each shard its rows [R, H], and the tokens that they are of; None: all.
    """
    if answers and gpu.can_use(out_TH, *(rows_RH for rows_RH, _ in answers)):
        gpu.combine(_addresses(out_TH, answers), None, out_TH, dtype=answers[0][0].dtype, adds=True)
        return
    for rows_RH, token_R in answers:
        if compiled.can_add(out_TH, rows_RH):
            compiled.add(out_TH, rows_RH, token_R)
        elif token_R is None:
            out_TH += rows_RH
        else:
            out_TH.index_add_(0, token_R.to(out_TH.device), rows_RH.to(out_TH.dtype))


def _addresses(out_TH: Tensor, answers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return where each shard's row of each token lies, int64 [T, S]; 0: it has none."""
    address_TS = np.zeros((len(out_TH), len(answers)), dtype=np.int64)
    for shard, (rows_RH, token_R) in enumerate(answers):
        row_bytes = rows_RH.shape[1] * rows_RH.element_size()
        tokens = slice(None) if token_R is None else token_R.numpy()
        address_TS[tokens, shard] = rows_RH.data_ptr() + np.arange(len(rows_RH)) * row_bytes
    return torch.from_numpy(address_TS).to(out_TH.device)


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
