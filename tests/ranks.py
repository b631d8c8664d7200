"""Rank processes of a Gloo group that run layers of `kernels.expert_parallel` as they are told over a pipe.

Shape suffixes: T tokens, H hidden, K choices a token, E experts of all ranks, R ranks.
"""

import math
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.kernels.expert_parallel import ExpertParallelLayer
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights

# Starting imports torch on a shared machine; an exchange takes milliseconds.
_START_S, _ANSWER_S = 90.0, 30.0


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A layer over all ranks. ids_RTK: the experts chosen, by rank, token and choice; ranks may have none."""

    ids_RTK: tuple[tuple[tuple[int, ...], ...], ...]
    top_k: int
    num_experts: int = 8
    hidden: int = 6
    width: int = 5
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    is_transposed: bool = False
    capacity_factor: float | None = None
    splits: Literal["exact", "equal"] = "exact"
    needs_gradients: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RankInputs:
    """What one rank has, and the gradient that its output gets."""

    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    gradient_TH: Tensor


def swiglu(up_PU: Tensor) -> Tensor:
    gate_PW, linear_PW = up_PU.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_PW) * linear_PW


def math_of(case: LayerCase) -> ExpertMath:
    return ExpertMath(activate=swiglu, is_transposed=case.is_transposed)


def inputs_of(case: LayerCase) -> list[RankInputs]:
    """Return each rank's inputs: the same in every process."""
    generator = torch.Generator().manual_seed(case.seed)
    return [
        RankInputs(
            hidden_TH=torch.randn(len(ids_TK), case.hidden, generator=generator).to(case.dtype),
            ids_TK=torch.tensor(ids_TK, dtype=torch.int64).reshape(-1, case.top_k),
            weights_TK=torch.rand(len(ids_TK), case.top_k, generator=generator),
            gradient_TH=torch.randn(len(ids_TK), case.hidden, generator=generator).to(case.dtype),
        )
        for ids_TK in case.ids_RTK
    ]


def experts_of(case: LayerCase) -> SlotWeights:
    """Return all experts."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    up, down = (2 * case.width, case.hidden), (case.hidden, case.width)
    shapes = [(s[::-1] if case.is_transposed else s) for s in (up, down)]
    up_SUH, down_SHW = (torch.randn(case.num_experts, *s, generator=generator).mul_(0.4).to(case.dtype) for s in shapes)
    biases = [
        torch.randn(case.num_experts, n, generator=generator).to(case.dtype) for n in (2 * case.width, case.hidden)
    ]
    up_bias_SU, down_bias_SH = biases if case.has_bias else (None, None)
    return SlotWeights(up_SUH=up_SUH, down_SHW=down_SHW, up_bias_SU=up_bias_SU, down_bias_SH=down_bias_SH)


def leaves(slots: SlotWeights, part: slice = slice(None)) -> SlotWeights:
    """Return some of the experts as tensors of their own that collect gradients."""
    named = {name: tensor[part].clone().requires_grad_() for name, tensor in vars(slots).items() if tensor is not None}
    return SlotWeights(**named)


def gradients(slots: SlotWeights) -> dict[str, Tensor]:
    found = {name: tensor.grad for name, tensor in vars(slots).items() if tensor is not None}
    return {name: grad for name, grad in found.items() if grad is not None}


class Ranks:
    """A group's processes, started once for many cases."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, case: LayerCase) -> list[dict[str, Tensor]]:
        """Return what each rank found: out, dropped, and the gradients of hidden, weights and its experts' tensors.

        Raises:
            ValueError: what the ranks raised of it.
        """
        assert len(case.ids_RTK) == len(self._pipes), "a case of another number of ranks"
        for pipe in self._pipes:
            pipe.send(case)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_ANSWER_S), f"rank {rank} did not answer within {_ANSWER_S} s"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [{name: torch.tensor(value) for name, value in answer.items()} for answer in answers]


@contextmanager
def running_ranks(num_ranks: int, folder: Path) -> Iterator[Ranks]:
    """Start a group; its processes end with the block."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, num_ranks, str(folder / "store")), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(_START_S), f"rank {rank} did not start within {_START_S} s"
            assert pipe.recv() == "ready"
        yield Ranks(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(pipe: Connection, rank: int, num_ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=_START_S)
    )
    pipe.send("ready")
    while True:
        case = pipe.recv()
        try:
            pipe.send(_run(case, rank))
        except ValueError as error:
            pipe.send(error)


def _run(case: LayerCase, rank: int) -> dict[str, Any]:
    inputs, num_slots = inputs_of(case)[rank], math.ceil(case.num_experts / len(case.ids_RTK))
    slots = leaves(experts_of(case), slice(rank * num_slots, (rank + 1) * num_slots))
    layer = ExpertParallelLayer(
        slots=slots,
        math=math_of(case),
        num_experts=case.num_experts,
        capacity_factor=case.capacity_factor,
        splits=case.splits,
    )
    hidden_TH, weights_TK = inputs.hidden_TH.requires_grad_(), inputs.weights_TK.requires_grad_()
    with torch.set_grad_enabled(case.needs_gradients):
        out_TH, dropped_E = layer.run(hidden_TH, inputs.ids_TK, weights_TK)
    found = {"out": out_TH, "dropped": dropped_E}
    if case.needs_gradients:
        torch.autograd.backward([out_TH], [inputs.gradient_TH])
        assert hidden_TH.grad is not None
        assert weights_TK.grad is not None
        found |= {"hidden": hidden_TH.grad, "weights": weights_TK.grad, **gradients(slots)}
    return {name: _plain(tensor) for name, tensor in found.items()}


def _plain(tensor: Tensor) -> Any:
    """Return a tensor as it crosses a pipe without shared memory."""
    tensor = tensor.detach()
    return np.array(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
