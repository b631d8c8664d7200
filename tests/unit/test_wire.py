"""Packets' payloads, and packing and combining of a layer's tokens against an obvious loop.

Shape suffixes: T tokens, H hidden, K choices a token, R rows that one shard gets, P (row, expert) pairs of one shard.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.actors.wire import combine_packet, read_combine, read_dispatch
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind
from expertmesh.kernels.dispatch import PAIR_BYTES, ShardPairs, add_answers, gather_rows, pairs_for_shard
from tests.packets import dispatch_packet

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_EXPERTS = 6


def pairs_of(row_P: list[int], expert_P: list[int], num_rows: int, token_R: Tensor | None = None) -> ShardPairs:
    return ShardPairs(
        num_rows=num_rows,
        token_R=token_R,
        row_P=np.array(row_P, dtype=np.int32),
        expert_P=np.array(expert_P, dtype=np.int32),
        weight_P=np.linspace(0.1, 0.9, len(row_P), dtype=np.float32),
    )


def packed(rows_RH: Tensor, pairs: ShardPairs) -> tuple[PacketHeader, Tensor]:
    """Return a request as it arrives: one payload of bytes."""
    header, parts = dispatch_packet(rows_RH, pairs, layer=3, generation=4, sequence=5, epoch=6)
    return header, torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden"), [(3, 5), (1, 1), (4, 8)])
def test_a_dispatch_arrives_to_the_bit(dtype: torch.dtype, num_rows: int, hidden: int) -> None:
    rows_RH = torch.randn(num_rows, hidden).to(dtype)
    pairs = pairs_of([0, num_rows - 1, 0], [5, 0, 2], num_rows)
    header, payload = packed(rows_RH, pairs)
    assert (header.kind, header.layer, header.generation, header.sequence, header.epoch) == (
        PacketKind.DISPATCH,
        3,
        4,
        5,
        6,
    )
    assert header.payload_bytes == payload.numel() == num_rows * hidden * dtype.itemsize + 3 * PAIR_BYTES
    dispatch = read_dispatch(header, payload)
    assert dispatch.rows_RH.dtype == dtype
    assert torch.equal(dispatch.rows_RH, rows_RH)
    assert dispatch.row_P.tolist() == pairs.row_P.tolist()
    assert dispatch.expert_P.tolist() == pairs.expert_P.tolist()
    assert dispatch.weight_P.tolist() == pairs.weight_P.tolist()
    assert dispatch.row_P.dtype == dispatch.expert_P.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_combine_arrives_in_the_dtype_of_its_request(dtype: torch.dtype) -> None:
    request, _ = packed(torch.zeros(3, 5, dtype=dtype), pairs_of([0, 1, 2], [0, 0, 0], 3))
    rows_RH = torch.randn(3, 5)
    header, parts = combine_packet(request, rows_RH, epoch=9)
    assert (header.kind, header.sequence, header.epoch, header.dtype) == (PacketKind.COMBINE, 5, 9, request.dtype)
    (part,) = parts
    payload = part.reshape(-1).view(torch.uint8)
    assert header.payload_bytes == payload.numel()
    answer_RH = read_combine(header, payload)
    assert answer_RH.dtype == dtype
    assert torch.equal(answer_RH, rows_RH.to(dtype))


def test_a_dispatch_without_pairs_is_refused() -> None:
    header, payload = packed(torch.zeros(1, 4), pairs_of([], [], 1))
    with pytest.raises(LinkError, match="a dispatch of 16 bytes does not fit its header"):
        read_dispatch(header, payload)


def test_only_the_rows_of_the_subset_travel() -> None:
    hidden_TH = torch.arange(12.0).view(4, 3)
    pairs = pairs_of([0, 1], [2, 4], 2, torch.tensor([1, 3]))
    header, payload = packed(gather_rows(hidden_TH, [pairs])[0], pairs)
    assert torch.equal(read_dispatch(header, payload).rows_RH, hidden_TH[[1, 3]])


@pytest.mark.parametrize("field", ["num_rows", "num_pairs", "hidden"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_dispatch_of_another_size_is_refused(field: str, change: int) -> None:
    header, payload = packed(torch.zeros(3, 5), pairs_of([0], [0], 3))
    damaged = replace(header, **{field: getattr(header, field) + change})
    with pytest.raises(LinkError, match=f"a dispatch of {payload.numel()} bytes does not fit its header"):
        read_dispatch(damaged, payload)


@pytest.mark.parametrize("field", ["num_rows", "hidden"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_combine_of_another_size_is_refused(field: str, change: int) -> None:
    request, _ = packed(torch.zeros(3, 5), pairs_of([0], [0], 3))
    header, (rows_RH,) = combine_packet(request, torch.zeros(3, 5), epoch=0)
    damaged = replace(header, **{field: getattr(header, field) + change})
    with pytest.raises(LinkError, match="an answer of 60 bytes does not fit its header"):
        read_combine(damaged, rows_RH.view(-1).view(torch.uint8))


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1])
def test_a_row_that_was_not_sent_is_refused(row: int) -> None:
    header, payload = packed(torch.zeros(3, 5), pairs_of([0, row], [0, 0], 3))
    with pytest.raises(LinkError, match="rows outside 0 to 2"):
        read_dispatch(header, payload)


def test_a_negative_expert_is_refused() -> None:
    header, payload = packed(torch.zeros(3, 5), pairs_of([0, 1], [0, -2], 3))
    with pytest.raises(LinkError, match="a dispatch names a negative expert"):
        read_dispatch(header, payload)


@st.composite
def routings(draw: st.DrawFn) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw mine_TK, topk_ids_TK and topk_weights_TK."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    part = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    return (
        rng.random(shape) < part,
        rng.integers(0, NUM_EXPERTS, shape, dtype=np.int64),
        rng.random(shape, dtype=np.float32),
    )


@given(routings())
def test_pairs_for_shard_equals_a_loop(
    routing: tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.float32]],
) -> None:
    mine_TK, ids_TK, weights_TK = routing
    tokens = [t for t in range(len(mine_TK)) if mine_TK[t].any()]
    expected = [
        (tokens.index(t), int(ids_TK[t, k]), float(weights_TK[t, k]))
        for t in range(mine_TK.shape[0])
        for k in range(mine_TK.shape[1])
        if mine_TK[t, k]
    ]
    pairs = pairs_for_shard(mine_TK, ids_TK, weights_TK)
    assert pairs.num_rows == len(tokens)
    if pairs.token_R is None:
        assert len(tokens) == len(mine_TK)
    else:
        assert pairs.token_R.tolist() == tokens
    assert list(zip(pairs.row_P.tolist(), pairs.expert_P.tolist(), pairs.weight_P.tolist(), strict=True)) == expected
    dtypes = (pairs.row_P.dtype.name, pairs.expert_P.dtype.name, pairs.weight_P.dtype.name)
    assert dtypes == ("int32", "int32", "float32")


@given(routings(), st.sampled_from(DTYPES))
def test_gather_and_add_equal_a_loop(
    routing: tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.float32]], dtype: torch.dtype
) -> None:
    mine_TK, ids_TK, weights_TK = routing
    tokens = [t for t in range(len(mine_TK)) if mine_TK[t].any()]
    hidden_TH = torch.arange(4.0 * len(mine_TK)).view(-1, 4).to(dtype)
    out_TH = torch.full(hidden_TH.shape, 0.5)
    pairs = pairs_for_shard(mine_TK, ids_TK, weights_TK)
    [rows_RH] = gather_rows(hidden_TH, [pairs])
    assert torch.equal(rows_RH, torch.stack([hidden_TH[t] for t in tokens]) if tokens else hidden_TH[:0])
    add_answers(out_TH, [(rows_RH * 2, pairs.token_R)])
    for token in range(len(mine_TK)):
        added = hidden_TH[token].float() * 2 if token in tokens else torch.zeros(4)
        assert torch.equal(out_TH[token], added + 0.5)
