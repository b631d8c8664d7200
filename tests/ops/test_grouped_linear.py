"""The compiled CPU product against float32 matrix products, for each instruction set that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.cpu import build
from expertmesh.kernels.cpu.grouped_linear import grouped_linear, is_supported
from expertmesh.kernels.cpu.isa import Isa, best_isa, cpu_features
from expertmesh.models.cpu_linears import speed_up_linears

FEATURE = {"amx": "amx_bf16", "avx512": "avx512_bf16"}


def _require(isa: str) -> None:
    if FEATURE[isa] not in cpu_features():
        pytest.skip(f"this processor has no {FEATURE[isa]}")
    if build.find_compiler() is None:
        pytest.skip("the CPU kernels cannot be built here: no C++ compiler")


def _case(counts: list[int], outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_PI = torch.randn(sum(counts), inputs, generator=generator).bfloat16()
    weight_SOI = torch.randn(len(counts), outputs, inputs, generator=generator).bfloat16()
    return x_PI, weight_SOI


def _expected(x_PI: torch.Tensor, weight_SOI: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = torch.split(x_PI.float(), counts)
    return torch.cat([part @ weight.float().T for part, weight in zip(parts, weight_SOI, strict=True)])


@pytest.mark.parametrize("isa", list(FEATURE))
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    outputs=st.sampled_from([16, 48, 64, 80, 160]),
    inputs=st.sampled_from([32, 64, 160]),
    seed=st.integers(0, 1000),
)
def test_equals_float32_product_rounded_to_bf16(
    isa: str, counts: list[int], outputs: int, inputs: int, seed: int
) -> None:
    _require(isa)
    x_PI, weight_SOI = _case(counts, outputs, inputs, seed)
    got = grouped_linear(x_PI, weight_SOI, counts, isa)
    # One rounding to bf16 (2**-9 relative) of sums whose order differs.
    torch.testing.assert_close(got.float(), _expected(x_PI, weight_SOI, counts), rtol=2**-8, atol=1e-4 * inputs)


@pytest.mark.parametrize("isa", list(FEATURE))
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    _require(isa)
    x_PI, weight_SOI = _case([37], 64, 64, 0)
    together = grouped_linear(x_PI, weight_SOI, [37], isa)
    alone = torch.cat([grouped_linear(x_PI[i : i + 1], weight_SOI, [1], isa) for i in range(37)])
    assert torch.equal(together, alone)


def test_what_it_cannot_do_is_left_to_torch() -> None:
    x_PI, weight_SOI = _case([4], 64, 64, 0)
    assert not is_supported(x_PI.float(), weight_SOI, 1)
    assert not is_supported(x_PI, weight_SOI[:, :60], 1)
    assert not is_supported(x_PI, weight_SOI.transpose(1, 2), 1)
    assert not is_supported(x_PI, weight_SOI, 10_000)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_working_compiler_torch_does_the_work_and_a_warning_says_why(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "best_isa", lambda: Isa.AMX)
    build.load_library.cache_clear()
    try:
        assert build.load_library() is None
    finally:
        build.load_library.cache_clear()
    assert "torch's" in caplog.text


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    if build.find_compiler() is None or best_isa() < Isa.AVX512_BF16:
        pytest.skip("the CPU kernels cannot be built here: no C++ compiler, or no bf16 instructions")
    code = "from expertmesh.kernels.cpu.build import load_library; assert load_library() is not None"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [process.wait(100) for process in processes] == [0, 0]


def test_linear_layers_give_the_same_with_and_without_bias() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 48, bias=False)).bfloat16()
    x = torch.randn(2, 3, 64).bfloat16()
    expected = model(x)
    speed_up_linears(model)
    torch.testing.assert_close(model(x), expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=2**-5, atol=2**-5)
