"""What the deterministic mode asks of a model: operators are replaced, and a model that uses an unknown one is refused.

Known are the operators whose result for a token is the same to the bit whatever other tokens are computed beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from expertmesh.cluster.errors import InputError, UnsupportedModelError
from expertmesh.kernels.batch_invariant import REPLACED, batch_invariant
from expertmesh.kernels.cpu.build import KernelBuildError
from expertmesh.models.architecture import Architecture, expert_math

_DTYPES = (torch.float32, torch.bfloat16)
# Operators of aten whose result for a token does not depend on the others. They move or make values:
_MOVES = """
    __and__ __iand__ __or__ _local_scalar_dense _to_copy _unsafe_view alias arange as_strided bitwise_not cat chunk
    clone complex concat contiguous copy_ detach detach_ embedding empty empty_like expand fill_ flatten full full_like
    gather imag index index_copy_ index_put_ index_select is_nonzero item lift_fresh masked_fill masked_fill_ movedim
    narrow resolve_conj resolve_neg
    new_empty new_full new_ones new_zeros ones ones_like permute real repeat repeat_interleave reshape scatter scatter_
    select slice split split_with_sizes squeeze stack t to transpose type_as unbind unflatten unfold unsqueeze view
    view_as_real where zeros zeros_like
"""
# or do one thing, rounded once, to each element, or compare, sort or count:
_ROUNDED_ONCE = """
    abs add add_ all any argsort bincount ceil clamp clamp_ clamp_max clamp_min diff div div_ eq floor floor_divide ge
    gt le logical_and logical_not logical_or lt max maximum min minimum mul mul_ ne neg reciprocal relu relu_ remainder
    round rsub sign sort sqrt sub sub_ topk
"""
# or compute a function by one routine for every element:
_ONE_ROUTINE = "cos erf exp exp_ log log1p sin tanh"
# or reduce each row by itself:
_REDUCTIONS = "amax cumsum layer_norm linalg_vector_norm log_softmax logsumexp mean norm rms_norm softmax std sum var"
# or come down to a product that is replaced:
_PRODUCTS = "einsum linear matmul"
_KNOWN = frozenset(" ".join((_MOVES, _ROUNDED_ONCE, _ONE_ROUTINE, _REDUCTIONS, _PRODUCTS)).split())
_KNOWN |= {name.partition(".")[0] for name in REPLACED} - {"pow"}
# Powers of these are products.
_EXPONENTS = (2, 3)


class _KnownOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        if not _is_known(func, args):
            raise UnsupportedModelError(
                f"deterministic mode: the model uses {func}{[a for a in args if not isinstance(a, Tensor)]}, "
                "which is not known to give a token the same bits in every batch"
            )
        return func(*args, **(kwargs or {}))


def _is_known(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.pow.Tensor_Scalar:
        return args[1] in _EXPONENTS
    return func.namespace == "aten" and (func.overloadpacket.__name__ in _KNOWN or func is torch.ops.aten.pow.Scalar)


@contextmanager
def known_operators() -> Iterator[None]:
    """Let only operators run that are known to give a token the same bits in every batch.

    Raises:
        UnsupportedModelError: another one was to be run.
    """
    with _KnownOperators():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def deterministic_math() -> Iterator[None]:
    """Compute batch-invariantly in this process while the block lasts.

    Raises:
        InputError: this machine cannot.
    """
    original = modeling_deepseek_v2.apply_rotary_emb
    modeling_deepseek_v2.apply_rotary_emb = _rotate
    try:
        with batch_invariant():
            yield
    except KernelBuildError as error:
        raise InputError(f"deterministic mode: {error}") from error
    finally:
        modeling_deepseek_v2.apply_rotary_emb = original


def require_deterministic(architecture: Architecture) -> None:
    """Check what can be seen of a model before its weights are read; `known_operators` sees the rest.

    Raises:
        UnsupportedModelError: it cannot be served in deterministic mode.
        InputError: this machine cannot.
    """
    where = f"{architecture.directory}: deterministic mode"
    if architecture.uses_own_cache:
        raise UnsupportedModelError(
            f"{where}: {type(architecture.model).__name__} keeps transformers' own cache (linear, state-space or "
            "indexed attention), whose prefill and decode sum in different orders"
        )
    if architecture.dtype not in _DTYPES:
        raise UnsupportedModelError(f"{where} computes in float32 or bfloat16, not {architecture.dtype}")
    for rope_type in _rope_types(architecture.config):
        if rope_type == "longrope" or "dynamic" in rope_type:
            raise UnsupportedModelError(
                f"{where}: rope_type {rope_type!r} takes its frequencies from the longest sequence of a step"
            )
    experts = next(iter(architecture.experts_by_layer.values()))
    with deterministic_math(), known_operators(), torch.inference_mode():
        expert_math(experts).activate(torch.zeros(2, 32, dtype=architecture.dtype))


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embedding, one for the model or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return {p.get("rope_type", "default") for p in nested or [parameters]}


def _rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Do what deepseek_v2's own function does, in real numbers: torch's complex product has two routines."""
    cos, sin = freqs_cis.real.unsqueeze(1), freqs_cis.imag.unsqueeze(1)

    def rotate(x: Tensor) -> Tensor:
        a, b = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)
