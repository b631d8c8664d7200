"""Whether NCCL adds up inside the network: in NVLink's switches (NVLS), in those of InfiniBand (SHARP).

NCCL decides by itself when a communicator is made, and nothing needs to be set where the hardware can. Its conditions:
NVLS wants several GPUs that support multicast objects (CUDA's driver says so; NVSwitch of the third generation, so
Hopper and later) and NCCL_NVLS_ENABLE not 0; SHARP wants NCCL_COLLNET_ENABLE=1 and a network plugin that has it (NCCL's
documentation, "Environment Variables").
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from typing import Any

# CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED of CUDA's driver API (cuda.h), which NCCL asks too.
_MULTICAST_SUPPORTED = 132


def network_reduction(
    environment: Mapping[str, str], has_multicast: Sequence[bool], has_plugin: bool
) -> dict[str, Any]:
    """Return what of each kind is to be expected: {"nvls": {"on", "why"}, "sharp": {"on", "why"}}.

    Args:
        environment: with NCCL's variables.
        has_multicast: of each GPU.
        has_plugin: whether a network plugin for NCCL is installed.
    """
    return {
        kind: {"on": why is None, "why": why or "supported"}
        for kind, why in (
            ("nvls", _why_no_nvls(environment, has_multicast)),
            ("sharp", _why_no_sharp(environment, has_multicast, has_plugin)),
        )
    }


def find_network_reduction(num_gpus: int) -> dict[str, Any]:
    """Return the same for this machine."""
    return network_reduction(os.environ, _multicast(num_gpus), find_library("nccl-net") is not None)


def _why_no_nvls(environment: Mapping[str, str], has_multicast: Sequence[bool]) -> str | None:
    if len(has_multicast) < 2:
        return f"{len(has_multicast)} GPUs: nothing to reduce between"
    if not all(has_multicast):
        without = [str(gpu) for gpu, has in enumerate(has_multicast) if not has]
        return f"GPUs {', '.join(without)} support no multicast (NVSwitch of Hopper or later, fabric manager running)"
    if environment.get("NCCL_NVLS_ENABLE") == "0":
        return "NCCL_NVLS_ENABLE is 0"
    return None


def _why_no_sharp(environment: Mapping[str, str], has_multicast: Sequence[bool], has_plugin: bool) -> str | None:
    if not has_multicast:
        return "no GPU"
    if environment.get("NCCL_COLLNET_ENABLE") != "1":
        return "NCCL_COLLNET_ENABLE is not 1"
    if not has_plugin:
        return "no network plugin for NCCL (libnccl-net)"
    return None


def _multicast(num_gpus: int) -> list[bool]:
    """Ask CUDA's driver."""
    if not num_gpus:
        return []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # GPUs of another maker, which torch calls cuda too
        return [False] * num_gpus
    driver.cuInit(0)
    found = []
    for gpu in range(num_gpus):
        device, value = ctypes.c_int(), ctypes.c_int()
        fault = driver.cuDeviceGet(ctypes.byref(device), gpu)
        fault = fault or driver.cuDeviceGetAttribute(ctypes.byref(value), _MULTICAST_SUPPORTED, device)
        found.append(fault == 0 and bool(value.value))
    return found
