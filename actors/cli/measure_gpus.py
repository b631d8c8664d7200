"""What GPUs do, by torch: copy, multiply, send to each other. The first one is timed, and its way to the second."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_COPIED_BYTES, _SENT_BYTES, _SHORT_BYTES, _MATRIX, _ROUNDS = 1 << 30, 256 << 20, 4 << 10, 8192, 9


def measure_gpus(source: str) -> dict[str, Any]:
    """Return the fields of Hardware; what large copies and products reach is the rate, efficiencies are 1."""
    num_gpus = torch.cuda.device_count()
    first = torch.device("cuda", 0)
    read, written = (torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=first) for _ in range(2))
    copy_s = _median_s(lambda: written.copy_(read))
    a, b = (torch.randn(_MATRIX, _MATRIX, device=first).bfloat16() for _ in range(2))
    multiply_s = _median_s(lambda: a @ b)
    return {
        "name": "this-machine",
        "num_gpus": num_gpus,
        "memory_bytes": float(torch.cuda.get_device_properties(0).total_memory),
        "memory_bytes_per_s": 2 * _COPIED_BYTES / copy_s,
        "memory_efficiency": 1.0,
        "flop_per_s": {"bf16": 2 * _MATRIX**3 / multiply_s},
        "compute_efficiency": 1.0,
        "tiers": [_link(num_gpus, source)] if num_gpus > 1 else [],
        "sources": {"all": source},
    }


def _link(num_gpus: int, source: str) -> dict[str, Any]:
    short_s, long_s = (_send_s(size) for size in (_SHORT_BYTES, _SENT_BYTES))
    return {
        "name": "between GPUs",
        "domain_size": num_gpus,
        "bytes_per_s": (_SENT_BYTES - _SHORT_BYTES) / (long_s - short_s),
        "latency_s": short_s,
        "is_direct": torch.cuda.can_device_access_peer(0, 1),
        "source": source,
    }


def _send_s(size: int) -> float:
    sent, received = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}") for index in range(2))
    return _median_s(lambda: received.copy_(sent))


def _median_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS + 2):
        _wait()
        began_s = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:])


def _wait() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
