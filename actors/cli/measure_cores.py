"""What cores do by themselves: experts, the dense half of a layer, drawing tokens; weights in no cache.

Shape suffixes: T rows, H hidden, K experts of a row, U and W outputs of an expert's products, C rows of a cache, G KV
heads, D head size.
"""

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.kernels.cpu.dense import AttentionLayer, AttentionStep, AttentionWeights, QkNorm, Router
from expertmesh.kernels.cpu.expert_mlp import Activation, Kind, PackedSlots, pack_expert
from expertmesh.kernels.cpu.huge_pages import empty_bf16
from expertmesh.kernels.cpu.linear import how, library, pack_linear, padded_outputs
from expertmesh.kernels.cpu.threads import set_num_threads
from expertmesh.kernels.sampling import SamplingSettings, sample

_PAGE_SIZE, _CHOICES = 16, 8


def make_experts(sizes: Sizes, num_layers: int, num_experts: int) -> list[PackedSlots]:
    """Return layers of random experts, which differ in where they are alone."""
    hidden, width = sizes.hidden_size, sizes.expert_width
    up_UH = torch.randn(2 * width, hidden).mul_(hidden**-0.5).bfloat16()
    down_HW = torch.randn(hidden, width).mul_(width**-0.5).bfloat16()
    activation = Activation(kind=Kind.SWIGLU)
    layers = []
    for _ in range(num_layers):
        memory = empty_bf16([3 * hidden * width] * num_experts)
        experts = [pack_expert(up_UH, down_HW, activation, into=place) for place in memory]
        layers.append(PackedSlots(experts, hidden, width, activation))
    return layers


@dataclass(frozen=True, kw_only=True)
class CoreTimes:
    """Seconds, as `CpuTimes` has them."""

    experts_s: dict[int, float]
    lone_s: float
    dense_s: list[tuple[int, int, float]]
    scores_s: list[tuple[int, int, float]]


def time_cores(half: "DenseHalf", sizes: Sizes, num_cores: int) -> CoreTimes:
    """Time all that cores do in turns, so that a machine whose memory drifts is the same to all of it."""
    (few, many), (short, long) = sizes.dense_rows, sizes.attended
    dense = [(few, short), (many, short), (many, long)]
    drawn = [(sizes.sequences[1], vocabulary) for vocabulary in sizes.vocabulary]
    layers = itertools.cycle(make_experts(sizes, sizes.num_layers, sizes.num_experts))
    calls = [
        *(_run_experts(layers, sizes, rows, num_cores) for rows in sizes.expert_rows),
        _run_experts(layers, sizes, 1, 1),
        *(half.run(*case) for case in dense),
        *(_draw(*case) for case in drawn),
    ]
    seconds = _medians_s(calls, 8 * sizes.rounds)
    set_num_threads(num_cores)
    return CoreTimes(
        experts_s={rows: next(seconds) for rows in sizes.expert_rows},
        lone_s=next(seconds),
        dense_s=[(*case, next(seconds)) for case in dense],
        scores_s=[(*case, next(seconds)) for case in drawn],
    )


def _run_experts(layers: Iterator[PackedSlots], sizes: Sizes, rows: int, num_threads: int) -> Callable[[], object]:
    x_TH = torch.randn(rows, sizes.hidden_size).bfloat16()
    row_P = torch.arange(rows).repeat_interleave(sizes.num_experts)
    slot_P = torch.arange(sizes.num_experts).repeat(rows)
    weight_P = torch.rand(len(slot_P))

    def run() -> object:
        set_num_threads(num_threads)
        return next(layers).run(x_TH, row_P, slot_P, weight_P)

    return run


def _draw(sequences: int, vocabulary: int) -> Callable[[], object]:
    settings = [SamplingSettings(temperature=1.0, seed=seed) for seed in range(sequences)]
    logits_NV = torch.randn(sequences, vocabulary).bfloat16()
    return lambda: sample(logits_NV, settings, list(range(sequences)))


def _medians_s(calls: Sequence[Callable[[], object]], rounds: int) -> Iterator[float]:
    """Yield the median seconds of each call; all are made once before any is timed."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + rounds):
        for call, spent in zip(calls, times, strict=True):
            began_s = time.perf_counter()
            call()
            if number:
                spent.append(time.perf_counter() - began_s)
    yield from map(statistics.median, times)


class DenseHalf:
    """Dense halves of layers, as a model's compiled stack runs them."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._pages = sizes.dense_rows[1] * -(-sizes.attended[1] // _PAGE_SIZE)
        layers = [self._make_layer() for _ in range(sizes.num_dense_layers)]
        self.params = sum(linear.weight.numel() for linear in (layers[0].weights.qkv, layers[0].weights.out))
        self.params += sizes.hidden_size * padded_outputs(sizes.num_experts)
        self.kv_bytes = 2 * 2 * sizes.num_kv_heads * sizes.head_size
        self._layers = itertools.cycle(layers)

    def run(self, rows: int, attended: int) -> Callable[[], None]:
        """Return what runs the next layer for so many sequences of so many tokens each."""
        step = self._make_step(rows, attended)
        x_TH, residual_TH, normed_TH = (torch.zeros(rows, self._sizes.hidden_size).bfloat16() for _ in range(3))
        record = step.record
        record.x, record.residual, record.normed = (t.data_ptr() for t in (x_TH, residual_TH, normed_TH))
        run_layer, (isa, threads) = library().dense_layer, how(None)
        kept = step, x_TH, residual_TH, normed_TH  # the record holds addresses alone

        def run() -> None:
            assert kept
            run_layer(ctypes.c_void_p(next(self._layers).address), ctypes.byref(record), isa, threads)

        return run

    def _make_layer(self) -> AttentionLayer:
        sizes, hidden, head = self._sizes, self._sizes.hidden_size, self._sizes.head_size
        inner, kept = sizes.num_heads * head, sizes.num_kv_heads * head
        keys_CGD, values_CGD = torch.zeros(2, self._pages * _PAGE_SIZE, sizes.num_kv_heads, head).bfloat16()
        scores = torch.randn(padded_outputs(sizes.num_experts), hidden).bfloat16()
        router = Router(
            linear=pack_linear([scores]),
            num_experts=sizes.num_experts,
            top_k=min(_CHOICES, sizes.num_experts),
            normalise=True,
            rounded=False,
        )
        weights = AttentionWeights(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_size=head,
            norm_H=torch.ones(hidden).bfloat16(),
            norm_epsilon=1e-6,
            qkv=pack_linear([torch.randn(inner + 2 * kept, hidden).bfloat16()]),
            qk_norm=QkNorm.EACH_HEAD,
            q_norm=torch.ones(head).bfloat16(),
            k_norm=torch.ones(head).bfloat16(),
            qk_epsilon=1e-6,
            out=pack_linear([torch.randn(hidden, inner).bfloat16()]),
            next_norm_H=torch.ones(hidden).bfloat16(),
            next_epsilon=1e-6,
            scale=head**-0.5,
            window=None,
            softcap=None,
            sinks_A=None,
        )
        return AttentionLayer(weights, keys_CGD, values_CGD, _PAGE_SIZE, head, router)

    def _make_step(self, rows: int, attended: int) -> AttentionStep:
        sizes = self._sizes
        pages = -(-attended // _PAGE_SIZE)
        pages_NP = torch.arange(rows * pages).view(rows, pages)
        size = (rows, sizes.num_heads, sizes.head_size)
        choices = min(_CHOICES, sizes.num_experts)
        last = attended - 1
        return AttentionStep(
            cos_TR=torch.ones(rows, sizes.head_size),
            sin_TR=torch.zeros(rows, sizes.head_size),
            write_T=pages_NP[:, last // _PAGE_SIZE] * _PAGE_SIZE + last % _PAGE_SIZE,
            sequence_T=torch.arange(rows),
            length_T=torch.full((rows,), attended),
            pages_NP=pages_NP,
            query_TAD=torch.empty(size, dtype=torch.bfloat16),
            attended_TAD=torch.empty(size, dtype=torch.bfloat16),
            scores_TO=torch.empty((rows, padded_outputs(sizes.num_experts)), dtype=torch.bfloat16),
            ids_TK=torch.empty((rows, choices), dtype=torch.int64),
            weights_TK=torch.empty((rows, choices)),
        )
