"""The GPU's kernels beside torch's: rows gathered, answers added up, and grouped products of few rows an expert.

usage: python -m benchmarks.gpu_kernels [--rounds N] [--keep]

Interleaved, medians of CUDA events, memory larger than the caches between two runs. Limits: the bandwidth of a copy
for what only moves bytes, and for products the larger of reading the touched weights and of torch's largest product.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import keep
from expertmesh.kernels.gpu import dispatch
from expertmesh.kernels.gpu.grouped_linear import grouped_linear

HIDDEN, TOP_K = 7168, 8
TOKENS = (8, 64, 512, 4096)
EXPERTS, WIDTH = 64, 2048
ROWS_AN_EXPERT = (1, 4, 16, 64, 512)
Calls = dict[str, Callable[[], object]]


def main() -> int:
    """Measure and print; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: this benchmark measures one", file=sys.stderr)
        return 2
    gpu = torch.device("cuda", torch.cuda.current_device())
    bytes_per_s, flop_per_s = _copy_rate(gpu, arguments.rounds), _product_rate(gpu, arguments.rounds)
    name = torch.cuda.get_device_name(gpu)
    print(f"{name}: copies {bytes_per_s / 1e9:.0f} GB/s, products {flop_per_s / 1e12:.0f} TFLOP/s")
    rows = []
    for num_tokens in TOKENS:
        moved_bytes = num_tokens * HIDDEN * 2 * 2
        rows.append(_row("gather", num_tokens, _gathers(num_tokens, gpu), moved_bytes / bytes_per_s, arguments.rounds))
        moved_bytes = num_tokens * HIDDEN * 2 * (TOP_K + 1)
        rows.append(
            _row("combine", num_tokens, _combines(num_tokens, gpu), moved_bytes / bytes_per_s, arguments.rounds)
        )
    for num_rows in ROWS_AN_EXPERT:
        read_s = EXPERTS * HIDDEN * WIDTH * 2 / bytes_per_s
        limit_s = max(read_s, 2 * EXPERTS * num_rows * HIDDEN * WIDTH / flop_per_s)
        rows.append(_row("grouped product", num_rows, _products(num_rows, gpu), limit_s, arguments.rounds))
    if arguments.keep:
        limits = {"copy_bytes_per_s": bytes_per_s, "product_flop_per_s": flop_per_s}
        print(f"kept in {keep('gpu_kernels', {'gpu': name, **limits, 'rows': rows})}")
    return 0


def _row(what: str, size: int, calls: Calls, limit_s: float, rounds: int) -> dict[str, Any]:
    times = _seconds(calls, rounds)
    shown = ", ".join(f"{name} {seconds * 1e6:.1f} us ({limit_s / seconds:.2f})" for name, seconds in times.items())
    print(f"{what}, {size}: {shown}; limit {limit_s * 1e6:.1f} us", flush=True)
    return {"what": what, "size": size, "limit_s": limit_s, "seconds": times}


def _seconds(calls: Calls, rounds: int) -> dict[str, float]:
    """Return each call's median, in turns; the caches are filled with other things before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 5):
        for name, call in calls.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            if number >= 5:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _copy_rate(gpu: torch.device, rounds: int) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=gpu)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds({"copy": lambda: target.copy_(source)}, rounds)["copy"]


def _product_rate(gpu: torch.device, rounds: int) -> float:
    size = 8192
    a, b = (torch.randn(size, size, device=gpu).bfloat16() for _ in range(2))
    return 2 * size**3 / _seconds({"mm": lambda: a @ b}, rounds)["mm"]


def _gathers(num_tokens: int, gpu: torch.device) -> Calls:
    hidden_TH = torch.randn(num_tokens, HIDDEN, device=gpu).bfloat16()
    token_R = torch.randperm(num_tokens, device=gpu)
    return {
        "ours": lambda: dispatch.gather_rows(hidden_TH, token_R),
        "index_select": lambda: hidden_TH.index_select(0, token_R),
    }


def _combines(num_tokens: int, gpu: torch.device) -> Calls:
    pairs_PH = torch.randn(num_tokens * TOP_K, HIDDEN, device=gpu).bfloat16()
    address_TK = dispatch.row_addresses(pairs_PH).view(num_tokens, TOP_K)
    weight_TK = torch.rand(num_tokens, TOP_K, device=gpu)
    token_P = torch.arange(num_tokens, device=gpu).repeat_interleave(TOP_K)
    out_TH = torch.empty(num_tokens, HIDDEN, device=gpu, dtype=torch.bfloat16)

    def index_add() -> Tensor:
        weighted_PH = pairs_PH.float() * weight_TK.view(-1, 1)
        return torch.zeros(num_tokens, HIDDEN, device=gpu).index_add_(0, token_P, weighted_PH).bfloat16()

    return {
        "ours": lambda: dispatch.combine(address_TK, weight_TK, out_TH, dtype=torch.bfloat16),
        "index_add": index_add,
    }


def _products(num_rows: int, gpu: torch.device) -> Calls:
    x_PI = torch.randn(EXPERTS * num_rows, HIDDEN, device=gpu).bfloat16()
    weight_SOI = torch.randn(EXPERTS, WIDTH, HIDDEN, device=gpu).bfloat16()
    counts_S = torch.full((EXPERTS,), num_rows, device=gpu)
    ends_S = counts_S.cumsum(0).to(torch.int32)
    return {
        "ours (Triton)": lambda: grouped_linear(x_PI, weight_SOI, counts_S, is_transposed=False),
        "grouped_mm": lambda: F.grouped_mm(x_PI, weight_SOI.transpose(1, 2), offs=ends_S),
    }


if __name__ == "__main__":
    sys.exit(main())
