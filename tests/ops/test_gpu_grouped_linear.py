"""The grouped product for GPUs against a product an expert: in Triton's interpreter, and on the GPU where there is one.

Shape suffixes: P rows, I in, O out, S slots.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.gpu.grouped_linear import TILE_ROWS, grouped_linear, is_supported

if find_spec("triton") is None:
    pytest.skip("no triton (pip install 'expertmesh[triton]')", allow_module_level=True)
HAS_GPU = torch.cuda.is_available()

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter multiplies the bits of bf16 as if they were numbers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


def expected(x_PI: Tensor, weight_SOI: Tensor, counts_S: Tensor) -> Tensor:
    runs = torch.split(x_PI.double(), counts_S.tolist())
    return torch.cat([run @ weight_OI.T for run, weight_OI in zip(runs, weight_SOI.double(), strict=True)])


def check(counts: list[int], num_in: int, num_out: int, dtype: torch.dtype, is_transposed: bool) -> None:
    counts_S = torch.tensor(counts, device=DEVICE)
    x_PI = torch.randn(sum(counts), num_in).to(DEVICE, dtype)
    weight_SOI = (torch.randn(len(counts), num_out, num_in) * num_in**-0.5).to(DEVICE, dtype)
    stored = weight_SOI.transpose(1, 2).contiguous() if is_transposed else weight_SOI
    out_PO = grouped_linear(x_PI, stored, counts_S, is_transposed=is_transposed)
    assert out_PO.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out_PO.double(), expected(x_PI, weight_SOI, counts_S), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [[1], [0, 0, 1], [5, 0, 0], [TILE_ROWS, TILE_ROWS], [TILE_ROWS + 1, 0, 3 * TILE_ROWS - 1, 2], [0] * 7 + [40]],
)
def test_each_run_is_multiplied_with_its_matrix(counts: list[int], dtype: torch.dtype, is_transposed: bool) -> None:
    check(counts, 136, 72, dtype, is_transposed)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.integers(1, 150),
    st.integers(1, 100),
    st.booleans(),
)
def test_any_counts_and_sizes(counts: list[int], num_in: int, num_out: int, is_transposed: bool) -> None:
    check(counts, num_in, num_out, torch.float32, is_transposed)


def test_it_is_for_few_rows_on_a_gpu() -> None:
    assert not is_supported(torch.zeros(1, 8, dtype=torch.bfloat16), 4)
    rows = torch.zeros(4 * TILE_ROWS + 1, 8, dtype=torch.bfloat16, device=DEVICE)
    assert is_supported(rows[:-1], 4) == HAS_GPU
    assert not is_supported(rows, 4)
    assert not is_supported(rows[:1].half(), 4)


# In a process of its own: the interpreter leaves Triton's language changed.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from expertmesh.kernels.gpu.grouped_linear import TILE_ROWS, kernel
types = dict.fromkeys(("x", "weight", "out"), "*bf16") | dict.fromkeys(("slot_N", "first_N", "end_N"), "*i64")
types |= dict.fromkeys(("num_in", "num_out", "slot_stride", "out_stride", "in_stride"), "i32")
tile = {"TILE_P": TILE_ROWS, "TILE_O": 64, "TILE_I": 128}
source = ASTSource(kernel(), types | dict.fromkeys(tile, "constexpr"), tile)
assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
assert "mma" in assembly["ptx"], "it does not use the tensor cores"
assert assembly["cubin"]
"""


@pytest.mark.skipif(HAS_GPU, reason="it runs on the GPU instead")
def test_it_compiles_for_hopper_in_bf16(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment, timeout=120)
