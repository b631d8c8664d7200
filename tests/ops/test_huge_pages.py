"""Memory in huge pages: whole, apart from each other, given back one by one."""

from pathlib import Path

import torch

from expertmesh.kernels.cpu.huge_pages import empty_bf16

_ELEMENTS = 16 << 20  # 32 MiB


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_tensors_lie_apart() -> None:
    tensors = empty_bf16([5, 4096, 3_000_000])
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.numel() for tensor in tensors] == [5, 4096, 3_000_000]
    assert all(torch.all(tensor == value) for value, tensor in enumerate(tensors))


def test_no_memory_is_taken_before_it_is_used_and_each_gives_back_its_own() -> None:
    before = resident_bytes()
    first, second = empty_bf16([_ELEMENTS, _ELEMENTS])
    assert resident_bytes() - before < _ELEMENTS
    first.fill_(1.0)
    view = second.fill_(2.0)[1:]
    assert resident_bytes() - before > 3 * _ELEMENTS
    del first, second
    assert _ELEMENTS < resident_bytes() - before < 3 * _ELEMENTS, "a view keeps its own alone"
    assert torch.all(view == 2.0)
