"""The CUDA kernels of dispatch against torch, run by threads of the CPU, and on the GPU where there is one.

Shape suffixes: T tokens, H hidden, K choices a token, R rows.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.kernels.cpu import dispatch as compiled
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.dispatch import add_answers, requests_for_shards, sum_pairs
from expertmesh.kernels.gpu import dispatch

MULTIPROCESSORS = 2  # that the launches on a CPU are made for
SHAPES = [(1, 8), (3, 24), (33, 264), (70, 2056), (513, 24)]  # of T and H: each kernel, parts of warps and of blocks
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


GATHER = "const Vector* a, const long long* b, Vector* c, long long n, int v"
COMBINE = "const long long* a, const float* b, const float* c, Vector* d, long long n, int k, int v"


@pytest.fixture(scope="module")
def run_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Launches a kernel of dispatch.cu with CPU threads."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("the kernels cannot be built for a CPU here: no C++ compiler")
    symbols = {name: f"launch_{number}" for number, name in enumerate(dispatch.kernel_names())}
    lines = [f'#include "{Path(__file__).with_name("cuda_on_cpu.h")}"', f'#include "{dispatch.SOURCE}"']
    for name, symbol in symbols.items():
        parameters = GATHER if name.startswith("gather") else COMBINE
        arguments = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        call = f"cuda_on_cpu::launch({name}, x, y, threads, {arguments});"
        lines.append(f'extern "C" void {symbol}(unsigned x, unsigned y, unsigned threads, {parameters}) {{ {call} }}')
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "launches.cpp").write_text("\n".join(lines))
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, "launches.cpp", "-o", "launches.so"], check=True, cwd=folder, timeout=120)
    library = ctypes.CDLL(str(folder / "launches.so"))

    def run(launch: dispatch.Launch, _device: torch.device, *arguments: Tensor | int | None) -> None:
        sizes = [ctypes.c_longlong(a) for a in arguments if isinstance(a, int)]
        tensors = [a for a in arguments if not isinstance(a, int)]
        addresses = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        library[symbols[launch.kernel]](*launch.grid, launch.block, *addresses, *sizes)

    return run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run."""
    if request.param == "cpu":
        monkeypatch.setattr(dispatch, "_run", request.getfixturevalue("run_on_cpu"))
        monkeypatch.setattr(dispatch, "_num_multiprocessors", lambda _: MULTIPROCESSORS)
    return torch.device(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "hidden"), SHAPES)
def test_rows_are_gathered(device: torch.device, dtype: torch.dtype, num_rows: int, hidden: int) -> None:
    rows_TH = torch.randn(50, hidden).to(device, dtype)
    token_R = torch.randint(0, 50, (num_rows,)).to(device)
    assert torch.equal(dispatch.gather_rows(rows_TH, token_R), rows_TH[token_R])


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("num_choices", [1, 8, 37])
@pytest.mark.parametrize(("num_tokens", "hidden"), SHAPES)
def test_weighted_sums_are_those_of_torch_to_the_bit(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, num_choices: int, num_tokens: int, hidden: int
) -> None:
    pairs_TKH = torch.randn(num_tokens, num_choices, hidden).to(device, dtype)
    weight_TK = torch.rand(num_tokens, num_choices).to(device)
    address_TK = dispatch.row_addresses(pairs_TKH.flatten(0, 1)).view(num_tokens, num_choices)
    sums_TH = torch.full((num_tokens, hidden), float("nan"), dtype=out_dtype, device=device)
    dispatch.combine(address_TK, weight_TK, sums_TH, dtype=dtype)
    assert torch.equal(sums_TH, sum_pairs(pairs_TKH, weight_TK).to(out_dtype))


@pytest.mark.parametrize(("num_tokens", "hidden"), SHAPES)
def test_answers_are_added_to_what_is_there_where_a_shard_has_one(
    device: torch.device, num_tokens: int, hidden: int
) -> None:
    num_shards = 4
    answers_STH = torch.randn(num_shards, num_tokens, hidden).to(device, torch.bfloat16)
    has_row_TS = torch.rand(num_tokens, num_shards) < 0.6
    has_row_TS[0] = False
    base_TH = torch.randn(num_tokens, hidden).to(device)
    address_ST = torch.stack([dispatch.row_addresses(answer_TH) for answer_TH in answers_STH])
    address_TS = (address_ST.T * has_row_TS.to(device)).contiguous()
    expected_TH = base_TH.clone()
    for shard in range(num_shards):
        expected_TH += torch.where(has_row_TS[:, shard, None].to(device), answers_STH[shard].float(), 0.0)
    dispatch.combine(address_TS, None, base_TH, dtype=torch.bfloat16, adds=True)
    assert torch.equal(base_TH, expected_TH)


def test_bf16_sums_are_rounded_as_torch_rounds_them(device: torch.device) -> None:
    """Patterns of the upper 16 bits with what is below, at and above a tie behind them; infinities, NaNs, denormals."""
    upper = torch.cat([torch.arange(0, 1 << 16, 1021), torch.tensor([0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8000])])
    bits = ((upper << 16)[:, None] + torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    values_T1 = bits.to(torch.int32).view(torch.float32)[:, None].to(device)
    ones_1H = torch.ones((1, 8), dtype=torch.bfloat16, device=device)
    address_T1 = dispatch.row_addresses(ones_1H).repeat(len(values_T1), 1)
    sums_TH = torch.zeros((len(values_T1), 8), dtype=torch.bfloat16, device=device)
    dispatch.combine(address_T1, values_T1, sums_TH, dtype=torch.bfloat16)
    expected_TH = values_T1.bfloat16().expand(-1, 8)
    assert torch.equal(sums_TH.isnan(), expected_TH.isnan())
    assert torch.equal(sums_TH.nan_to_num(7.0), expected_TH.nan_to_num(7.0))


def test_nothing_is_launched_for_no_rows(device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    assert dispatch.gather_rows(torch.zeros(3, 8, device=device), nothing).shape == (0, 8)
    dispatch.combine(nothing.view(0, 2), None, torch.zeros(0, 8, device=device), dtype=torch.float32)


def test_each_size_has_its_kernel() -> None:
    kernels = [
        dispatch.combine_launch(torch.bfloat16, torch.float32, tokens, 896, 132).kernel for tokens in (8, 64, 4096)
    ]
    assert kernels == [f"combine_{size}<Bfloat16, float>" for size in ("small", "medium", "large")]
    assert [dispatch.gather_launch(rows, 896, 132).kernel for rows in (8, 4096)] == ["gather_small", "gather_large"]
    assert dispatch.gather_launch(4096, 896, 132).grid == (512, 1)
    assert dispatch.gather_launch(65536, 896, 132).grid == (132 * 4, 1)


def test_requests_and_answers_go_through_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels/dispatch.py makes of them is what it makes with torch."""
    rng = np.random.default_rng(0)
    num_tokens, num_choices, num_shards = 40, 4, 3
    hidden_TH = torch.randn(num_tokens, 64).to(device, torch.bfloat16)
    ids_TK = rng.integers(0, 12, (num_tokens, num_choices))
    weights_TK = rng.random((num_tokens, num_choices), dtype=np.float32)
    shard_TK = np.where(rng.random(ids_TK.shape) < 0.3, ids_TK % num_shards, 2).astype(np.int32)

    def compute(uses_kernels: bool) -> tuple[Tensor, list[Tensor], list[str]]:
        launched: list[str] = []
        run = dispatch._run

        def watched(launch: dispatch.Launch, *rest: Any) -> None:
            launched.append(launch.kernel)
            run(launch, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(compiled, "can_pack", lambda _: False)
            patch.setattr(compiled, "can_add", lambda *_: False)
            patch.setattr(dispatch, "can_use", lambda *_: uses_kernels)
            patch.setattr(dispatch, "_run", watched)
            requests = requests_for_shards(hidden_TH, ids_TK, weights_TK, shard_TK, num_shards)
            sums_TH = torch.ones(hidden_TH.shape, device=device)
            add_answers(sums_TH, [(request.parts[0] * 3, request.token_R) for request in requests])
        payloads = [torch.cat([part.reshape(-1).view(torch.uint8) for part in r.parts]) for r in requests]
        return sums_TH, payloads, [kernel.split("_")[0] for kernel in launched]

    sums_TH, payloads, launched = compute(True)
    other_TH, others, none = compute(False)
    assert (launched, none) == (["gather", "combine"], [])
    assert torch.equal(sums_TH, other_TH)
    assert len(payloads) == len(others) == num_shards
    assert all(torch.equal(a, b) for a, b in zip(payloads, others, strict=True))


class OnGpu(torch.Tensor):
    """Rows that say they are on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("rows_TH", "has_cupy", "can_use"),
    [
        (torch.zeros(4, 8), True, False),
        (torch.zeros(4, 8).as_subclass(OnGpu), True, True),
        (torch.zeros(4, 8).as_subclass(OnGpu), False, False),
        (torch.zeros(4, 6).as_subclass(OnGpu), True, False),
        (torch.zeros(4, 8, dtype=torch.float16).as_subclass(OnGpu), True, False),
    ],
    ids=["on a CPU", "on a GPU", "no CuPy", "half a vector", "another dtype"],
)
def test_rows_that_the_kernels_cannot_use_are_left_to_torch(
    rows_TH: Tensor, has_cupy: bool, can_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has", lambda _: has_cupy)
    assert dispatch.can_use(rows_TH) == can_use


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_all_kernels_for_hopper_without_spills(tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-arch=sm_90",
        "-cubin",
        "-Xptxas",
        "-v",
        "--std=c++17",
        str(dispatch.SOURCE),
        "-o",
        "kernels.cubin",
    ]
    done = subprocess.run(command, check=True, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.stderr.count("Compiling entry function") == len(dispatch.kernel_names())
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == len(dispatch.kernel_names())
