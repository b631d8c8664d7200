"""One MoE block on CPU, ours beside others', with weights in no cache, and how near to the limit.

Beside torch's grouped product, and with --peers beside the operators of vLLM's CPU build and of zentorch. The limit is
the larger of two times: reading the touched weights once, at the rate at which all threads read memory, and the
multiply-adds, at the rate of torch's own large bf16 product. Interleaved, medians.

usage: benchmarks/peers/install.sh FOLDER
       python -m benchmarks.expert_mlp [--tokens 1,8,32,256] [--rounds 15] [--peers FOLDER/bin/python] [--keep]
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.asking import Peer, running_peer
from benchmarks.record import keep
from expertmesh.kernels.cpu.expert_mlp import Activation, Kind, PackedSlots, pack_expert
from expertmesh.kernels.cpu.huge_pages import empty_bf16
from expertmesh.kernels.cpu.isa import Isa, best_isa

SHAPES = ((1024, 512, 32, 8), (2048, 1024, 64, 8))  # hidden, width, experts, experts of a token
# A layer's weights are in no cache when its turn comes: this many layers' worth are gone through.
_CACHE_BYTES = 600 << 20
# OpenMP's threads spin for up to 200 ms after their work (Intel's KMP_BLOCKTIME): the next to be timed waits for that.
_SPIN_S = 0.25


@dataclass
class Layer:
    """The same experts in both layouts."""

    up_EUH: Tensor
    down_EHW: Tensor
    packed: PackedSlots


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,32,256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=[isa.name for isa in Isa], default=None)
    parser.add_argument("--peers", help="Python of the peers' environment.")
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    isa = Isa[asked.isa] if asked.isa else None
    read_bytes_s, multiply_flop_s = read_rate(), multiply_rate()
    print(
        f"{asked.threads} threads, {(best_isa() if isa is None else isa).name}, "
        f"read {read_bytes_s / 1e9:.1f} GB/s, bf16 product {multiply_flop_s / 1e9:.0f} GFLOP/s"
    )
    limits = (read_bytes_s, multiply_flop_s)
    rows = []
    with asking_peers(asked.peers, asked.threads) as peers:
        for hidden, width, experts, top_k in SHAPES:
            count = max(2, _CACHE_BYTES // (experts * 3 * hidden * width * 2))
            layers = [make_layer(hidden, width, experts) for _ in range(count)]
            if peers:
                peers.ask({"layer": [hidden, width, experts, count]})
            for tokens in map(int, asked.tokens.split(",")):
                rows.append(measure(layers, tokens, top_k, asked.rounds, isa, limits, peers))
                print(rows[-1], flush=True)
    if asked.keep:
        print(f"kept in {keep('expert-mlp', {'rows': rows, 'threads': asked.threads})}")
    return 0


def make_layer(hidden: int, width: int, experts: int) -> Layer:
    """Return random experts."""
    up_EUH = torch.randn(experts, 2 * width, hidden).mul_(hidden**-0.5).bfloat16()
    down_EHW = torch.randn(experts, hidden, width).mul_(width**-0.5).bfloat16()
    how = Activation(kind=Kind.SWIGLU)
    memory = empty_bf16([3 * hidden * width] * experts)
    packed = [pack_expert(u, d, how, into=m) for u, d, m in zip(up_EUH, down_EHW, memory, strict=True)]
    return Layer(up_EUH, down_EHW, PackedSlots(packed, hidden, width, how))


@contextlib.contextmanager
def asking_peers(python: str | None, threads: int) -> Iterator[Peer | None]:
    """Start the peers' process, where a Python is given, and yield what asks it (see peers/moe_op.py)."""
    if python is None:
        yield None
        return
    with running_peer([python, str(Path(__file__).parent / "peers" / "moe_op.py"), str(threads)]) as peer:
        yield peer


def measure(
    layers: list[Layer],
    tokens: int,
    top_k: int,
    rounds: int,
    isa: Isa | None,
    limits: tuple[float, float],
    peers: Peer | None,
) -> dict[str, object]:
    """Time ours and the others' in turns, each on the next layer. limits: bytes/s read and FLOP/s."""
    read_bytes_s, multiply_flop_s = limits
    hidden, width, experts = layers[0].packed.hidden, layers[0].packed.width, len(layers[0].up_EUH)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    touched = []
    for number in range(rounds):
        x_TH = torch.randn(tokens, hidden).bfloat16()
        ids_TK = torch.rand(tokens, experts).topk(top_k).indices
        weights_TK = torch.rand(tokens, top_k)
        touched.append(int(torch.bincount(ids_TK.flatten()).count_nonzero()))
        row_P, slot_P = torch.arange(tokens).repeat_interleave(top_k), ids_TK.flatten()
        runs: dict[str, Callable[[Layer], object]] = {
            "ours": lambda layer: layer.packed.run(x_TH, row_P, slot_P, weights_TK.flatten(), isa),  # noqa: B023
            "torch": lambda layer: grouped_mm(layer, x_TH, ids_TK, weights_TK),  # noqa: B023
        }
        with peers.stopped() if peers else contextlib.nullcontext():
            time.sleep(_SPIN_S)
            for turn, (name, run) in enumerate(runs.items()):
                # The layers before, untimed, wake the threads, as in a model.
                *before, now = (layers[(number + turn * len(layers) // 2 + step) % len(layers)] for step in range(4))
                for layer in before:
                    run(layer)
                times[name].append(timed(lambda: run(now)))  # noqa: B023
        time.sleep(_SPIN_S)
        if peers:
            for name, seconds in peers.ask({"tokens": tokens, "top_k": top_k, "number": number}).items():
                times.setdefault(name, []).append(seconds)
    ms = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
    expert_size = 3 * hidden * width
    limit_ms = 1e3 * max(
        statistics.median(touched) * expert_size * 2 / read_bytes_s, 2 * tokens * top_k * expert_size / multiply_flop_s
    )
    return {
        "shape": f"{hidden}/{width}/{experts}/{top_k}",
        "tokens": tokens,
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        "limit_ms": round(limit_ms, 3),
        "ours_of_limit": round(limit_ms / ms["ours"], 2),
    }


def grouped_mm(layer: Layer, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute the block as transformers does on CPU: sorted pairs, two grouped products."""
    pair_P = ids_TK.flatten().argsort(stable=True)
    slot_P, row_P = ids_TK.flatten()[pair_P], pair_P // ids_TK.shape[1]
    ends_E = torch.bincount(slot_P, minlength=len(layer.up_EUH)).cumsum(0).to(torch.int32)
    up_PU = F.grouped_mm(x_TH[row_P], layer.up_EUH.transpose(1, 2), offs=ends_E)
    gate_PW, value_PW = up_PU.chunk(2, dim=-1)
    out_PH = F.grouped_mm(F.silu(gate_PW) * value_PW, layer.down_EHW.transpose(1, 2), offs=ends_E)
    weighted_PH = out_PH.float() * weights_TK.flatten()[pair_P].unsqueeze(1)
    return torch.zeros(x_TH.shape, dtype=torch.float32).index_add_(0, row_P, weighted_PH)


def read_rate() -> float:
    """Return the bytes/s at which all threads together read memory in huge pages."""
    (halves,) = empty_bf16([512 << 20])
    data = halves.view(torch.float32).fill_(1.0)
    return data.numel() * 4 / min(timed(lambda: data.sum()) for _ in range(5))


def multiply_rate() -> float:
    """Return the FLOP/s of torch's product of two large bf16 matrices."""
    size = 3072
    a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(5))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.exit(main())
