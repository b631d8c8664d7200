"""The instruction sets that the kernels are compiled for, and the best that this processor can do."""

import ctypes
import platform
from enum import IntEnum
from functools import cache
from pathlib import Path

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): the kernel grants tile registers to this process, or has none.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}


class Isa(IntEnum):
    """Instruction sets that the kernels are compiled for, the best last."""

    PLAIN = 0
    AVX2 = 1
    AVX512_BF16 = 2
    AMX = 3


@cache
def cpu_features() -> frozenset[str]:
    """Return the processor's features by their Linux names."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@cache
def best_isa() -> Isa:
    """Return the best that this machine can do."""
    features = cpu_features()
    if platform.machine() != "x86_64" or not {"avx2", "fma"} <= features:
        return Isa.PLAIN
    if not features >= _AVX512:
        return Isa.AVX2
    if "amx_bf16" in features and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return Isa.AMX
    return Isa.AVX512_BF16
