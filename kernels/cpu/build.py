"""Compiling the CPU kernels at first use: once for each source and compiler, kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from expertmesh.kernels.cache_folder import cache_folder, keep
from expertmesh.kernels.cpu.isa import Isa, best_isa

_logger = logging.getLogger(__name__)
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
_TIMEOUT_S = 120.0


class KernelBuildError(RuntimeError):
    """A kernel that something cannot do without was not compiled, or this processor cannot run it."""


def compile_all() -> None:
    """Compile the kernels that torch can stand in for, so that the processes that use them find them ready."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loads = (load_expert_mlp, load_dense, load_draw, load_dispatch, load_packet_server, load_stack, load_library)
        for loading in [pool.submit(load) for load in loads]:
            loading.result()


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the compiled skinny products; None where torch has to do their work."""
    if best_isa() < Isa.AVX512_BF16:
        _logger.info("the processor has neither AMX nor AVX-512 BF16: products of few rows run on torch's kernels")
        return None
    return _load_if_possible("grouped_linear.cpp", "products of few rows run on torch's kernels")


@functools.cache
def load_expert_mlp() -> ctypes.CDLL | None:
    """Return the compiled expert MLPs; None where torch has to do their work."""
    return _load_if_possible("expert_mlp.cpp", "experts run on torch's kernels, about half as fast")


@functools.cache
def load_dense() -> ctypes.CDLL | None:
    """Return the compiled dense half; None where torch has to do its work."""
    return _load_if_possible("dense.cpp", "the dense half runs on torch's kernels, about half as fast")


@functools.cache
def load_draw() -> ctypes.CDLL | None:
    """Return the compiled drawing of tokens; None where torch has to do it."""
    return _load_if_possible("draw.cpp", "tokens are drawn by torch's kernels")


@functools.cache
def load_dispatch() -> ctypes.CDLL | None:
    """Return the compiled dispatch; None where torch has to do its work."""
    return _load_if_possible("dispatch.cpp", "tokens are packed for shards by torch's kernels")


@functools.cache
def load_stack() -> ctypes.CDLL | None:
    """Return the compiled way through many layers; None where Python has to go from one to the next."""
    return _load_if_possible("stack.cpp", "Python leads each step from layer to layer, 0.2 ms each")


@functools.cache
def load_packet_server() -> ctypes.CDLL | None:
    """Return the compiled loop of a shard; None where Python has to go round."""
    return _load_if_possible("packet_server.cpp", "a shard's packets are answered by Python, 0.3 ms each later")


@functools.cache
def load_invariant_product() -> ctypes.CDLL:
    """Return the compiled product of `invariant_product`, which nothing of torch's can stand in for.

    Raises:
        KernelBuildError: it cannot be compiled here, or the processor has no fused multiply-adds.
    """
    library = _load("invariant_product.cpp")
    if not library.can_multiply():
        raise KernelBuildError("this processor has no AVX2 with fused multiply-adds")
    return library


def _load_if_possible(source: str, otherwise: str) -> ctypes.CDLL | None:
    """Return a library; None, with what happens otherwise and the reason logged, where it cannot be built."""
    try:
        return _load(source)
    except KernelBuildError as error:
        _logger.warning("%s: %s", otherwise, error)
        return None


def find_compiler() -> str | None:
    """Return the C++ compiler ($CXX, else g++); None: there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _load(source: str) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError("no C++ compiler (apt-get install g++)")
    try:
        path = _build(compiler, Path(__file__).with_name(source))
        _share_openmp()
        return ctypes.CDLL(str(path))
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise KernelBuildError(f"{source} cannot be built: {detail.strip()[-500:]}") from error


def _build(compiler: str, source: Path) -> Path:
    """Compile unless it was done before. Several processes may do so at once: all builds are equal."""
    version = _run([compiler, "--version"])
    parts = [source.read_bytes(), *(header.read_bytes() for header in sorted(source.parent.glob("*.h")))]
    key = hashlib.blake2b(repr((parts, _FLAGS, version)).encode(), digest_size=12).hexdigest()
    path = cache_folder() / f"kernels-{key}.so"
    if path.is_file():
        return path
    keep(path, lambda built: _run([compiler, *_FLAGS, str(source), "-o", str(built)]))
    return path


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)  # noqa: S603
    return result.stdout


def _share_openmp() -> None:
    """Make torch's own OpenMP runtime the one that our kernels find: two runtimes would fight for the cores."""
    for runtime in (Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*"):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
