"""Decoder layers one after another in one compiled call, experts on their shards included: see stack.cpp.

Shape suffixes: T tokens, H hidden, K choices a token, L rows of tables by MoE layer, E experts. Of experts that are cut
in slices, K and E count slices here, but for what the router writes.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_dispatch, load_stack
from expertmesh.kernels.cpu.dense import AttentionLayer, AttentionStep
from expertmesh.kernels.cpu.exchange import Exchange
from expertmesh.kernels.cpu.linear import how, library

_ADDRESS = ctypes.c_void_p
_CHOOSE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
# What a step's seconds are spent on, in the order of stack.cpp.
PARTS = ("attention, router", "choose", "pack", "send", "wait", "add")


class Stop(IntEnum):
    """Why the compiled call came back."""

    FINISHED = 0
    CHANGED = 1  # before the layer: there may be another way to the experts
    EXPERTS = 2  # the layer's experts are to be run by somebody else
    UNFINISHED = 3  # the layer's exchange did not get all that it asked for


@dataclass
class Route:
    """A way to the experts that compiled code can take by itself.

    exchange: to the shards, ready. only_LE: int32, the one shard of each expert, -1 where there are several or none.
    choose: where a pair's shard is not in only_LE: of a layer and its ids_TK (int64) the shards, int32, or None if an
    expert has none.
    row_of_layer: a layer's row in the tables. load_LE, decode_LE, dispatch_bytes_L, combine_bytes_L: int64, counted up.
    is_decode_T: which tokens were generated. sequence: the last packet's. changed: 1 once another way is to be taken.
    spent_s: by PARTS, counted up. expert_tp: slices of an expert, see `dispatch.choose_slices`. owner: the carrier's
    own, kept as long as the way may be used.
    """

    exchange: Exchange
    only_LE: npt.NDArray[np.int32]
    choose: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.int32] | None]
    row_of_layer: dict[int, int]
    load_LE: npt.NDArray[np.int64]
    decode_LE: npt.NDArray[np.int64]
    dispatch_bytes_L: npt.NDArray[np.int64]
    combine_bytes_L: npt.NDArray[np.int64]
    is_decode_T: npt.NDArray[np.bool_]
    sequence: ctypes.c_uint64
    changed: ctypes.c_int32
    spent_s: npt.NDArray[np.float64]
    expert_tp: int
    owner: object


class Carrier(Protocol):
    """Who knows the way to the experts."""

    def route(self, num_tokens: int) -> Route | None:
        """Return the way for a step of so many tokens; None: there is none that compiled code can take."""

    def run(self, layer: int, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Run a layer's experts; see `models.hooks.RunExperts`."""

    def resume(self, route: Route, layer: int, exchanged: "Exchanged") -> Tensor:
        """Finish what an exchange along a route left undone; return what `run` would have."""


@dataclass(frozen=True)
class Exchanged:
    """An exchange that did not get all it asked for: its tensors, and what it added up so far (sum_TH)."""

    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    shard_TK: Tensor
    sum_TH: Tensor


class _Record(ctypes.Structure):
    """Stack of stack.cpp."""

    _fields_ = (
        *((n, _ADDRESS) for n in ("dense_layer", "exchange")),
        ("choose", _CHOOSE),
        *((n, _ADDRESS) for n in ("layer_N", "number_N", "row_N", "only_LE", "load_LE", "decode_LE")),
        *((n, _ADDRESS) for n in ("dispatch_bytes_L", "combine_bytes_L", "is_decode_T", "step", "shards")),
        *((n, _ADDRESS) for n in ("hidden_TH", "sequence", "changed", "spent")),
        *((n, ctypes.c_int64) for n in ("layers", "at", "experts", "expert_tp")),
        *((n, ctypes.c_int32) for n in ("isa", "threads")),
    )


def can_stack(layers: Sequence[AttentionLayer]) -> bool:
    """Say whether there are compiled kernels, and the layers are of one shape and have routers of one shape."""
    routers = [layer.router for layer in layers]
    shapes = {
        (layer.num_heads, layer.head_size, layer.rope_size, router.linear.num_outputs, router.num_experts, router.top_k)
        for layer, router in zip(layers, routers, strict=True)
        if router is not None
    }
    is_alike = None not in routers and len(shapes) == 1
    return is_alike and load_stack() is not None and load_dispatch() is not None


class Stack:
    """Layers that follow each other; numbers: what their experts are known by."""

    def __init__(self, layers: Sequence[AttentionLayer], numbers: Sequence[int]) -> None:
        compiled = load_stack()
        assert compiled is not None, "a stack without a compiled kernel"
        assert can_stack(layers), "layers that cannot be stacked"
        self._run = compiled.stack_run
        self.layers = tuple(layers)
        self.numbers = tuple(numbers)
        self._layer_N = (_ADDRESS * len(layers))(*(layer.address for layer in layers))
        self._number_N = (ctypes.c_uint32 * len(layers))(*numbers)

    def begin(self, hidden_TH: Tensor, step: AttentionStep) -> "StackStep":
        """Return a step over rows bf16 [T, H], not begun."""
        return StackStep(self, hidden_TH, step)

    def go(self, record: "_Record") -> Stop:
        """Run a record that is filled but for what a stack has."""
        record.layer_N, record.number_N = ctypes.addressof(self._layer_N), ctypes.addressof(self._number_N)
        record.layers = len(self.layers)
        return Stop(self._run(ctypes.byref(record)))


class StackStep:
    """A step on its way through a stack. at: the layer that comes next; hidden_TH: what it gets, bf16 [T, H]."""

    def __init__(self, stack: Stack, hidden_TH: Tensor, step: AttentionStep) -> None:
        assert step.ids_TK is not None, "a step without room for routers"
        assert step.weights_TK is not None, "a step without room for routers"
        self.at = 0
        self.hidden_TH = hidden_TH.clone()
        self.residual_TH, self.normed_TH = torch.empty_like(self.hidden_TH), torch.empty_like(self.hidden_TH)
        self._stack, self._step = stack, step
        self._chosen_ids_TK, self._chosen_weights_TK = step.ids_TK, step.weights_TK  # by the router
        self._shard_TK = torch.empty((0, 0), dtype=torch.int32)
        self._make_room(1)
        self._sum_TH = torch.empty(hidden_TH.shape)

    @property
    def num_layers(self) -> int:
        """Of the stack."""
        return len(self._stack.layers)

    def run(self, route: Route) -> Stop:
        """Go on from layer `at`; with EXPERTS and UNFINISHED `finish_with` has to be given that layer's experts."""
        assert len(route.is_decode_T) == self.hidden_TH.shape[0], "a route for a step of another number of tokens"
        self._make_room(route.expert_tp)
        row_N = (ctypes.c_int64 * self.num_layers)(*(route.row_of_layer[number] for number in self._stack.numbers))
        step = self._step.record
        step.residual, step.normed = self.residual_TH.data_ptr(), self.normed_TH.data_ptr()
        shards = route.exchange.lay_out(
            self.normed_TH,
            self._ids_TK,
            self._weights_TK,
            self._shard_TK,
            sum_TH=self._sum_TH,
            out_TH=self.hidden_TH,
            residual_TH=self.residual_TH,
        )
        isa, threads = how(None)
        ids_TK, shard_TK = self._ids_TK.numpy(), self._shard_TK.numpy()

        # What it raises ctypes prints, and takes for 0: who runs the layer's experts then finds it again.
        def choose(at: int) -> int:
            chosen_TK = route.choose(self._stack.numbers[at], ids_TK)
            if chosen_TK is None:
                return 0
            shard_TK[:] = chosen_TK
            return 1

        record = _Record(
            choose=_CHOOSE(choose),
            dense_layer=ctypes.cast(library().dense_layer, _ADDRESS),
            exchange=ctypes.cast(route.exchange.function, _ADDRESS),
            row_N=ctypes.addressof(row_N),
            step=ctypes.addressof(step),
            shards=ctypes.addressof(shards),
            hidden_TH=self.hidden_TH.data_ptr(),
            sequence=ctypes.addressof(route.sequence),
            changed=ctypes.addressof(route.changed),
            spent=route.spent_s.ctypes.data,
            at=self.at,
            experts=route.only_LE.shape[1],
            expert_tp=route.expert_tp,
            isa=isa,
            threads=threads,
            **{
                name: getattr(route, name).ctypes.data
                for name in ("only_LE", "load_LE", "decode_LE", "dispatch_bytes_L", "combine_bytes_L", "is_decode_T")
            },
        )
        stop = self._stack.go(record)
        self.at = record.at
        return stop

    def run_dense(self) -> None:
        """Run the dense half of layer `at` alone; `finish_with` has to be given its experts."""
        layer = self._stack.layers[self.at]
        self.residual_TH, self.normed_TH = layer.run(self.hidden_TH, self._step)

    def run_experts(self, carrier: Carrier) -> Tensor:
        """Return the output of the experts of layer `at`, whose dense half has been run."""
        return carrier.run(self._stack.numbers[self.at], self.normed_TH, self._chosen_ids_TK, self._chosen_weights_TK)

    def resume(self, carrier: Carrier, route: Route) -> Tensor:
        """Return the output of the experts of layer `at`, whose exchange along a route is unfinished."""
        exchanged = Exchanged(self.normed_TH, self._ids_TK, self._weights_TK, self._shard_TK, self._sum_TH)
        return carrier.resume(route, self._stack.numbers[self.at], exchanged)

    def _make_room(self, expert_tp: int) -> None:
        """Have room for the choices as shards get them; with whole experts they are the router's."""
        num_tokens, choices = self._chosen_ids_TK.shape
        shape = (num_tokens, choices * expert_tp)
        if self._shard_TK.shape == shape:
            return
        self._shard_TK = torch.empty(shape, dtype=torch.int32)
        self._ids_TK, self._weights_TK = self._chosen_ids_TK, self._chosen_weights_TK
        if expert_tp > 1:
            self._ids_TK, self._weights_TK = torch.empty(shape, dtype=torch.int64), torch.empty(shape)

    def finish_with(self, experts_TH: Tensor) -> None:
        """Add the output of the experts of layer `at`, and leave it behind."""
        torch.add(self.residual_TH, experts_TH, out=self.hidden_TH)
        self.at += 1
