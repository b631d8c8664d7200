"""Slices of an expert are experts whose outputs add up to its own, in every layout that transformers stores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import relu, silu

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, reference_mlp
from expertmesh.models.architecture import expert_math, open_architecture
from expertmesh.models.layer_weights import _STORED_AS
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.slicing import Slicing
from tests.families import FAMILIES, write_checkpoint

ROWS = 5
# float32, sums of at most 48 products in another order.
TOLERANCE = 1e-4


def output(tensors: dict[str, Tensor], rows_TH: Tensor, math: ExpertMath) -> Tensor:
    """Return what one expert gives for rows, by the slow twin."""
    slots = SlotWeights(**{_STORED_AS[name]: tensor.unsqueeze(0) for name, tensor in tensors.items()})
    row_P = torch.arange(len(rows_TH))
    ones_P = torch.ones(len(rows_TH))
    return reference_mlp(rows_TH, row_P=row_P, slot_P=torch.zeros_like(row_P), weight_P=ones_P, slots=slots, math=math)


@pytest.mark.parametrize("expert_tp", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_every_family_add_up(family: str, expert_tp: int, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path)
    architecture = open_architecture(tmp_path)
    whole, sliced = CheckpointWeights(architecture), CheckpointWeights(architecture, expert_tp)
    layer = architecture.moe_layers[-1]
    math = expert_math(architecture.experts_by_layer[layer])
    rows_TH = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(0))
    for expert in (0, architecture.num_experts - 1):
        parts = [sliced.load_expert(ExpertKey(layer, expert * expert_tp + index)) for index in range(expert_tp)]
        assert all({n: t.shape for n, t in part.items()} == sliced.expert_shapes(layer) for part in parts)
        total_TH = torch.stack([output(part, rows_TH, math) for part in parts]).sum(dim=0)
        wanted_TH = output(whole.load_expert(ExpertKey(layer, expert)), rows_TH, math)
        torch.testing.assert_close(total_TH, wanted_TH, rtol=TOLERANCE, atol=TOLERANCE)
    assert sliced.num_slices == expert_tp * architecture.num_experts
    # Biases of the output are there in each slice; all else is cut.
    biases = sum(t.numel() for n, t in parts[0].items() if n == "down_proj_bias") * architecture.dtype.itemsize
    assert expert_tp * (sliced.expert_bytes() - biases) == whole.expert_bytes() - biases


@settings(deadline=None)
@given(
    is_transposed=st.booleans(),
    has_gate=st.booleans(),
    is_interleaved=st.booleans(),
    has_bias=st.booleans(),
    expert_tp=st.integers(1, 4),
    width=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_slices_add_up(*, expert_tp: int, width: int, seed: int, has_bias: bool, **flags: bool) -> None:
    slicing = Slicing(expert_tp=expert_tp, **flags)
    hidden, width = 4, width * expert_tp
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up_proj": (2 * width if slicing.has_gate else width, hidden), "down_proj": (hidden, width)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if slicing.is_transposed:
        tensors = {name: tensor.T.contiguous() for name, tensor in tensors.items()}
    if has_bias:
        tensors |= {f"{name}_bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    names = {"up_proj": "gate_up_proj", "up_proj_bias": "gate_up_proj_bias"} if slicing.has_gate else {}
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}

    def activate(up_PU: Tensor) -> Tensor:
        if not slicing.has_gate:
            return relu(up_PU).square()
        gate, value = (up_PU[..., ::2], up_PU[..., 1::2]) if slicing.is_interleaved else up_PU.chunk(2, dim=-1)
        return silu(gate) * value

    math = ExpertMath(activate=activate, is_transposed=slicing.is_transposed)
    rows_TH = torch.randn(ROWS, hidden, generator=generator)
    parts = [output(slicing.cut(tensors, index), rows_TH, math) for index in range(expert_tp)]
    wanted_TH = output(tensors, rows_TH, math)
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), wanted_TH, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_width_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    write_checkpoint("mixtral", tmp_path)
    architecture: Any = open_architecture(tmp_path)
    with pytest.raises(InputError, match="expert_tp=5 does not divide the experts' width of 48"):
        CheckpointWeights(architecture, 5)


def test_a_slice_beyond_the_last_is_refused(tmp_path: Path) -> None:
    write_checkpoint("mixtral", tmp_path)
    weights = CheckpointWeights(open_architecture(tmp_path), 2)
    weights.load_expert(ExpertKey(0, 15))
    with pytest.raises(InputError, match="experts 0 to 15"):
        weights.load_expert(ExpertKey(0, 16))
