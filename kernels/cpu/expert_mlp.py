"""Expert MLPs on CPU, bf16, in one call: weights packed once, gate, up, activation and down fused, the pairs summed.

Shape suffixes: T rows (tokens), H hidden, W expert width, U up-projection width (2W with a gate, W without), P (token,
expert) pairs, S slots.
"""

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.cpu.build import load_expert_mlp
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import num_threads

_OUTS, _DEPTH = 16, 32  # of a block of packed weights
# Number of the layout that packed.h describes: processes hand each other packed weights only if theirs is the same.
LAYOUT = 1


class Kind(IntEnum):
    """Activations that the kernel knows."""

    SWIGLU = 0
    GELU_TANH = 1
    RELU2 = 2


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What comes between the up and the down projection.

    SWIGLU is (value + shift) * gate * sigmoid(alpha * gate), the gate at most limit, the value within +-limit;
    GELU_TANH is gelu(gate) * value; RELU2, without a gate, relu squared. is_interleaved: the up projection's outputs
    are gate, value, gate, value, ...; else all gates come first.
    """

    kind: Kind
    has_gate: bool = True
    is_interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0

    def __call__(self, up_PU: Tensor) -> Tensor:
        """Compute it with torch, float32 [P, U] to [P, W]: what the kernel is measured against."""
        if self.kind is Kind.RELU2:
            return F.relu(up_PU).square()
        gate, value = (up_PU[..., ::2], up_PU[..., 1::2]) if self.is_interleaved else up_PU.chunk(2, dim=-1)
        if self.kind is Kind.GELU_TANH:
            return F.gelu(gate, approximate="tanh") * value
        gate, value = gate.clamp(max=self.limit), value.clamp(-self.limit, self.limit)
        return (value + self.shift) * (gate * torch.sigmoid(self.alpha * gate))


def recognise(activate: Callable[[Tensor], Tensor], numbers: Collection[float] = ()) -> Activation | None:
    """Return the kernel's name for a function by what it computes; None: the kernel does not know it.

    Args:
        activate: maps [P, U] to [P, W], elementwise in P.
        numbers: values that alpha and limit may have.
    """
    generator = torch.Generator().manual_seed(0)
    # Beyond the limits that models clamp at (7 to 30), finely where the functions bend.
    up_PU = torch.cat([torch.randn(64, 64, generator=generator) * scale for scale in (1.0, 4.0, 40.0)])
    wanted = activate(up_PU)
    if wanted.shape[-1] == up_PU.shape[-1]:
        candidates = [Activation(kind=Kind.RELU2, has_gate=False)]
    else:
        candidates = [
            Activation(kind=kind, is_interleaved=is_interleaved, alpha=alpha, limit=limit, shift=shift)
            for is_interleaved in (False, True)
            for kind in (Kind.SWIGLU, Kind.GELU_TANH)
            for alpha in (1.0, *numbers)
            for limit in (float("inf"), *numbers)
            for shift in (0.0, 1.0)
        ]
    for candidate in candidates:
        if torch.allclose(candidate(up_PU), wanted, rtol=1e-4, atol=1e-5):
            return candidate
    return None


def can_pack(hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the kernel can do experts of this size."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and hidden % _DEPTH == 0
        and width % _DEPTH == 0
        and load_expert_mlp() is not None
    )


@dataclass(frozen=True, kw_only=True)
class PackedExpert:
    """One expert's weights in the kernel's layout, bf16: up [U * H], down [H * W]; of the up bias the gates first."""

    up: Tensor
    down: Tensor
    up_bias_U: Tensor | None = None
    down_bias_H: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """Those that it has, contiguous, in the order of the fields."""
        all_parts = (self.up, self.down, self.up_bias_U, self.down_bias_H)
        return [part for part in all_parts if part is not None]

    def copy(self, into: Tensor) -> "PackedExpert":
        """Return a copy; into: where to, bf16 [(U + W) * H]."""
        num_up = self.up.numel()
        into[:num_up].copy_(self.up)
        into[num_up:].copy_(self.down)
        up_bias_U, down_bias_H = (None if b is None else b.clone() for b in (self.up_bias_U, self.down_bias_H))
        return PackedExpert(up=into[:num_up], down=into[num_up:], up_bias_U=up_bias_U, down_bias_H=down_bias_H)


@dataclass(frozen=True, kw_only=True)
class PackedSizes:
    """Elements of the parts of a packed expert, in the order of PackedExpert; 0: it has no such bias."""

    up: int
    down: int
    up_bias: int = 0
    down_bias: int = 0

    def split(self, elements: Tensor) -> PackedExpert:
        """Return the expert whose parts lie one after another in a bf16 vector; they share its memory."""
        up, down, up_bias, down_bias = torch.split(elements, [self.up, self.down, self.up_bias, self.down_bias])
        return PackedExpert(
            up=up,
            down=down,
            up_bias_U=up_bias if self.up_bias else None,
            down_bias_H=down_bias if self.down_bias else None,
        )


def pack_expert(
    up_UH: Tensor,
    down_HW: Tensor,
    activation: Activation,
    up_bias_U: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    *,
    into: Tensor | None = None,
) -> PackedExpert:
    """Pack one expert; the matrices may be views of transposed ones. into: where to, bf16 [(U + W) * H]."""
    if into is None:
        into = up_UH.new_empty(up_UH.numel() + down_HW.numel())
    up, down = into[: up_UH.numel()], into[up_UH.numel() :]
    for part_OI, panel, step in _parts(up_UH, activation):
        _library().expert_pack(
            _at(part_OI), *map(ctypes.c_int64, (*part_OI.stride(), *part_OI.shape, panel, step)), _at(up)
        )
    pack_matrix(down_HW, down)
    if up_bias_U is not None:
        up_bias_U = torch.cat([up_bias_U[::2], up_bias_U[1::2]]) if activation.is_interleaved else up_bias_U.clone()
    return PackedExpert(
        up=up, down=down, up_bias_U=up_bias_U, down_bias_H=None if down_bias_H is None else down_bias_H.clone()
    )


def pack_matrix(weight_OI: Tensor, into: Tensor) -> None:
    """Pack a matrix by itself, outputs and inputs multiples of 32, into bf16 [O * I]."""
    numbers = map(ctypes.c_int64, (*weight_OI.stride(), *weight_OI.shape, 0, 1))
    _library().expert_pack(_at(weight_OI), *numbers, _at(into))


def unpack_expert(
    packed: PackedExpert,
    up_UH: Tensor,
    down_HW: Tensor,
    activation: Activation,
    up_bias_U: Tensor | None = None,
    down_bias_H: Tensor | None = None,
) -> None:
    """Write an expert's weights into matrices, which may be views of transposed ones, and into vectors."""
    if up_bias_U is not None and packed.up_bias_U is not None:
        gates, values = packed.up_bias_U.chunk(2)
        is_apart = activation.is_interleaved
        up_bias_U.copy_(torch.stack([gates, values], dim=1).flatten() if is_apart else packed.up_bias_U)
    if down_bias_H is not None and packed.down_bias_H is not None:
        down_bias_H.copy_(packed.down_bias_H)
    for part_OI, panel, step in _parts(up_UH, activation):
        numbers = map(ctypes.c_int64, (*part_OI.stride(), *part_OI.shape))
        _library().expert_unpack(_at(packed.up), ctypes.c_int64(panel), ctypes.c_int64(step), _at(part_OI), *numbers)
    numbers = map(ctypes.c_int64, (*down_HW.stride(), *down_HW.shape))
    _library().expert_unpack(_at(packed.down), ctypes.c_int64(0), ctypes.c_int64(1), _at(down_HW), *numbers)


def _parts(up_UH: Tensor, activation: Activation) -> list[tuple[Tensor, int, int]]:
    """Return the matrices that the up projection is made of, each with its first panel and the step between panels."""
    if not activation.has_gate:
        return [(up_UH, 0, 1)]
    gate_WH, value_WH = (up_UH[::2], up_UH[1::2]) if activation.is_interleaved else up_UH.chunk(2)
    return [(gate_WH, 0, 2), (value_WH, 1, 2)]


class PackedSlots:
    """The packed experts of one layer, by slot, as the kernel takes them. Never changed."""

    def __init__(self, experts: Sequence[PackedExpert], hidden: int, width: int, activation: Activation) -> None:
        self.experts = tuple(experts)
        self.hidden = hidden
        self.width = width
        self.activation = activation
        self._up = _pointers([e.up for e in experts])
        self._down = _pointers([e.down for e in experts])
        self._up_bias = _pointers([e.up_bias_U for e in experts])
        self._down_bias = _pointers([e.down_bias_H for e in experts])

    def tables(self) -> "dict[str, ctypes.Array[ctypes.c_void_p] | None]":
        """Return the addresses that the kernel takes, by slot; they hold as long as this object."""
        return {"up": self._up, "down": self._down, "up_bias": self._up_bias, "down_bias": self._down_bias}

    def run(
        self, rows_TH: Tensor, row_P: Tensor, slot_P: Tensor, weight_P: Tensor | None, isa: Isa | None = None
    ) -> Tensor:
        """Run each pair's expert over its row.

        Args:
            rows_TH: bf16.
            row_P: int64, the row of a pair.
            slot_P: int64, the slot whose expert it asks for.
            weight_P: float32, the router's weight; None: each pair's output is wanted by itself.
            isa: instruction set; None: the best.

        Returns:
            float32 [T, H], the weighted sum of each row's experts, or [P, H] without weights.

        Raises:
            ValueError: rows of another size or dtype, as a damaged packet may hold.
        """
        if rows_TH.dtype != torch.bfloat16 or rows_TH.shape[1] != self.hidden:
            raise ValueError(f"rows of {rows_TH.shape[1]} {rows_TH.dtype}, the experts take {self.hidden} bfloat16")
        rows_TH = rows_TH.contiguous()
        row_P, slot_P = row_P.contiguous(), slot_P.contiguous()
        weight_P = None if weight_P is None else weight_P.contiguous()
        num_rows, num_pairs = rows_TH.shape[0], row_P.shape[0]
        shape = (num_pairs if weight_P is None else num_rows, self.hidden)
        if num_pairs == 0:  # an empty tensor has no address
            return torch.zeros(shape)
        out = torch.empty(shape)
        sizes = (ctypes.c_int64 * 5)(num_rows, num_pairs, len(self.experts), self.hidden, self.width)
        how = self.activation
        _library().expert_mlp(
            _at(rows_TH),
            _at(row_P),
            _at(slot_P),
            None if weight_P is None else _at(weight_P),
            self._up,
            self._down,
            self._up_bias,
            self._down_bias,
            _at(out),
            sizes,
            ctypes.c_int(how.has_gate),
            ctypes.c_int(how.kind),
            ctypes.c_float(how.alpha),
            ctypes.c_float(how.limit),
            ctypes.c_float(how.shift),
            ctypes.c_int(best_isa() if isa is None else isa),
            ctypes.c_int(num_threads()),
        )
        return out


def _library() -> ctypes.CDLL:
    library = load_expert_mlp()
    assert library is not None, "packed experts without a compiled kernel"
    return library


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> "ctypes.Array[ctypes.c_void_p] | None":
    """Return the tensors' addresses; None where there are no tensors."""
    if not tensors or tensors[0] is None:
        return None
    addresses = [t.data_ptr() for t in tensors if t is not None]
    return (ctypes.c_void_p * len(addresses))(*addresses)
