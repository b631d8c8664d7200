"""The fused expert MLP against the slow twin, for each instruction set of this machine.

Shape suffixes: T rows, H hidden, P (row, slot) pairs, W expert width, U up-projection width, S slots.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.expert_mlp import (
    Activation,
    Kind,
    PackedSlots,
    can_pack,
    pack_expert,
    recognise,
    unpack_expert,
)
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import start_helpers
from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, reference_mlp

# The kernel rounds once between the projections, to bf16: 2**-9 of a value, and the down projection sums at most 96 of
# them. The twin computes in float32 with the same bf16 weights.
TOLERANCE = 2**-7
ACTIVATIONS = {
    "swiglu": Activation(kind=Kind.SWIGLU),
    "interleaved, clamped swiglu": Activation(kind=Kind.SWIGLU, is_interleaved=True, alpha=1.702, limit=0.8, shift=1.0),
    "geglu": Activation(kind=Kind.GELU_TANH),
    "relu2": Activation(kind=Kind.RELU2, has_gate=False),
}
if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
ISAS = [isa for isa in Isa if isa <= best_isa()]


def layer(
    activation: Activation, sizes: tuple[int, int, int], *, has_bias: bool, seed: int
) -> tuple[SlotWeights, PackedSlots]:
    """Return a layer's experts in both layouts; sizes are S, H and W."""
    slots, hidden, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).bfloat16()

    up_width = 2 * width if activation.has_gate else width
    weights = SlotWeights(
        up_SUH=random(slots, up_width, hidden),
        down_SHW=random(slots, hidden, width),
        up_bias_SU=random(slots, up_width) if has_bias else None,
        down_bias_SH=random(slots, hidden) if has_bias else None,
    )
    experts = [
        pack_expert(
            weights.up_SUH[slot],
            weights.down_SHW[slot],
            activation,
            None if weights.up_bias_SU is None else weights.up_bias_SU[slot],
            None if weights.down_bias_SH is None else weights.down_bias_SH[slot],
        )
        for slot in range(slots)
    ]
    return weights, PackedSlots(experts, hidden, width, activation)


def reference(weights: SlotWeights, activation: Activation, rows_TH: Tensor, pairs: dict[str, Tensor]) -> Tensor:
    exact = SlotWeights(**{name: t.float() for name, t in vars(weights).items() if t is not None})
    return reference_mlp(rows_TH.float(), **pairs, slots=exact, math=ExpertMath(activate=activation))


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max())))


def random_pairs(num_rows: int, num_slots: int, num_pairs: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "row_P": torch.randint(num_rows, (num_pairs,), generator=generator),
        "slot_P": torch.randint(num_slots, (num_pairs,), generator=generator),
        "weight_P": torch.rand(num_pairs, generator=generator),
    }


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_computes_what_the_slow_twin_computes(isa: Isa, activation: Activation, has_bias: bool) -> None:
    for seed, (rows, pairs_count, sizes) in enumerate(
        [
            (1, 1, (1, 32, 32)),
            (1, 4, (5, 64, 96)),
            (9, 30, (3, 96, 64)),
            (40, 100, (2, 64, 32)),
            (70, 70, (1, 32, 96)),
            (150, 150, (1, 320, 288)),  # more rows than a group has, and more inputs than a slab
            (1100, 1500, (2, 32, 32)),  # more rows than are computed at a time
            (3, 0, (4, 32, 32)),
        ]
    ):
        weights, packed = layer(activation, sizes, has_bias=has_bias, seed=seed)
        rows_TH = torch.randn(rows, sizes[1], generator=torch.Generator().manual_seed(seed)).bfloat16()
        pairs = random_pairs(rows, sizes[0], pairs_count, seed)
        got = packed.run(rows_TH, **pairs, isa=isa)
        wanted = reference(weights, activation, rows_TH, pairs)
        assert close(got, wanted), (rows, pairs_count, sizes)
        apart = packed.run(rows_TH, pairs["row_P"], pairs["slot_P"], None, isa)
        assert apart.shape == (pairs_count, sizes[1])
        summed = torch.zeros_like(wanted).index_add_(0, pairs["row_P"], apart * pairs["weight_P"].unsqueeze(1))
        assert close(summed, wanted), (rows, pairs_count, sizes)


@given(
    rows=st.integers(1, 50),
    slots=st.integers(1, 6),
    pairs=st.integers(0, 120),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows: int, slots: int, pairs: int, blocks: tuple[int, int], seed: int) -> None:
    activation = ACTIVATIONS["swiglu"]
    weights, packed = layer(activation, (slots, 32 * blocks[0], 32 * blocks[1]), has_bias=False, seed=seed)
    rows_TH = torch.randn(rows, 32 * blocks[0], generator=torch.Generator().manual_seed(seed)).bfloat16()
    asked = random_pairs(rows, slots, pairs, seed)
    got = packed.run(rows_TH, asked["row_P"], asked["slot_P"], asked["weight_P"])
    assert close(got, reference(weights, activation, rows_TH, asked))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_whatever_is_beside_it(isa: Isa, threads: int) -> None:
    _, packed = layer(ACTIVATIONS["swiglu"], (3, 64, 64), has_bias=True, seed=5)
    rows_TH = torch.randn(50, 64).bfloat16()
    pairs = random_pairs(50, 3, 150, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = packed.run(rows_TH, **pairs, isa=isa)
        for row in (0, 17, 49):
            own = pairs["row_P"] == row
            alone = packed.run(
                rows_TH[row : row + 1],
                torch.zeros(int(own.sum()), dtype=torch.int64),
                pairs["slot_P"][own],
                pairs["weight_P"][own],
                isa,
            )
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(before)


def test_threads_that_help_change_no_bit() -> None:
    """Many more of them than cores, so that some come late, when the call that they came for is over."""
    calls = []
    for seed in range(8):
        _, packed = layer(next(iter(ACTIVATIONS.values())), (1 + seed, 64, 96), has_bias=False, seed=seed)
        rows_TH = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        pairs = random_pairs(5, 1 + seed, 20, seed)
        calls.append((packed, rows_TH, pairs, packed.run(rows_TH, **pairs, isa=None)))
    start_helpers(7)
    try:
        for _ in range(100):
            for packed, rows_TH, pairs, wanted in calls:
                assert torch.equal(packed.run(rows_TH, **pairs, isa=None), wanted)
    finally:
        start_helpers(0)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_was_packed_comes_back(activation: Activation, is_transposed: bool) -> None:
    up_UH = torch.randn(64 * (2 if activation.has_gate else 1), 96).bfloat16()
    down_HW = torch.randn(96, 64).bfloat16()
    if is_transposed:
        up_UH, down_HW = up_UH.T.contiguous().T, down_HW.T.contiguous().T
    given = (up_UH, down_HW, torch.randn(len(up_UH)).bfloat16(), torch.randn(96).bfloat16())
    packed = pack_expert(up_UH, down_HW, activation, given[2], given[3])
    again = [torch.zeros_like(tensor) for tensor in given]
    unpack_expert(packed, again[0], again[1], activation, again[2], again[3])
    for one, other in zip(given, again, strict=True):
        assert torch.equal(one, other)


def test_large_and_strange_values() -> None:
    """No infinity comes of a large gate; what is not a number stays so, in its own row."""
    _, packed = layer(ACTIVATIONS["swiglu"], (1, 32, 32), has_bias=False, seed=1)
    rows_TH = torch.randn(3, 32).bfloat16()
    rows_TH[0] *= 1e4
    rows_TH[1, 3] = float("nan")
    pairs = {"row_P": torch.arange(3), "slot_P": torch.zeros(3, dtype=torch.int64), "weight_P": torch.ones(3)}
    for isa in ISAS:
        got = packed.run(rows_TH, **pairs, isa=isa)
        assert got[0].isfinite().all()
        assert got[1].isnan().all()
        assert got[2].isfinite().all()


def gpt_oss(up_PU: Tensor) -> Tensor:
    gate, value = up_PU[..., ::2].clamp(max=7.0), up_PU[..., 1::2].clamp(-7.0, 7.0)
    return (value + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize(
    ("activate", "numbers", "wanted"),
    [
        (lambda up: F.silu(up.chunk(2, -1)[0]) * up.chunk(2, -1)[1], (), Activation(kind=Kind.SWIGLU)),
        (
            lambda up: F.gelu(up.chunk(2, -1)[0], approximate="tanh") * up.chunk(2, -1)[1],
            (7.0,),
            Activation(kind=Kind.GELU_TANH),
        ),
        (
            gpt_oss,
            (7.0, 1.702),
            Activation(kind=Kind.SWIGLU, is_interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
        ),
        (lambda up: F.relu(up).square(), (), Activation(kind=Kind.RELU2, has_gate=False)),
        (gpt_oss, (), None),
        (lambda up: F.relu(up.chunk(2, -1)[0]) * up.chunk(2, -1)[1], (), None),
        (F.gelu, (), None),
    ],
)
def test_an_activation_is_known_by_what_it_computes(
    activate: Callable[[Tensor], Tensor], numbers: tuple[float, ...], wanted: Activation | None
) -> None:
    assert recognise(activate, numbers) == wanted


@pytest.mark.parametrize("rows_TH", [torch.zeros(2, 32).bfloat16(), torch.zeros(2, 64), torch.zeros(2, 64).half()])
def test_rows_that_do_not_fit_are_refused(rows_TH: Tensor) -> None:
    _, packed = layer(ACTIVATIONS["swiglu"], (2, 64, 32), has_bias=False, seed=1)
    with pytest.raises(ValueError, match="the experts take 64 bfloat16"):
        packed.run(rows_TH, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2))


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert can_pack(64, 32, torch.bfloat16, cpu)
    assert not can_pack(64, 32, torch.float32, cpu)
    assert not can_pack(64, 32, torch.bfloat16, torch.device("meta"))
    assert not can_pack(48, 32, torch.bfloat16, cpu)
    assert not can_pack(64, 16, torch.bfloat16, cpu)
