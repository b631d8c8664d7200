"""What each dispatch policy does to the shards' balance and weight reads: the pocket model's routing, and Zipf's.

The pocket model's routing is recorded from this repository's own texts. Placement and weights come from the first half
of a trace, batches from random tokens of the second. Max/mean is the (token, expert) pairs of the busiest shard over
the mean of all; "reads" are the distinct (expert, shard) pairs of a batch, "most reads" those of the busiest shard. The
cost is the busiest shard's pairs and reads together, in pairs, for a read as dear as the arithmetic of so many.

usage: python -m benchmarks.dispatch_policies [--batches N] [--zipf EXPONENT] [--json] [--keep]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from benchmarks.record import keep
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.dispatch_hash import DispatchTable, identity_hash, token_keys
from expertmesh.cluster.dispatch_policy import POLICIES, open_policy
from expertmesh.cluster.dispatch_weights import changed_weights, level_weights
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "LICENSE", "docs/*.md", "examples/*/README.md")
BATCHES = (1, 8, 32, 64, 128, 512, 2048)
WINDOW = 512  # tokens of a sequence, as the pocket model was trained
# To read an expert's weights costs as much as the arithmetic of so many tokens: few on a CPU, a few hundred on a GPU.
TOKENS_PER_READ = (8, 256)

Topk = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Routing of one kind. topk_LTK: the experts of each token in each layer."""

    name: str
    topk_LTK: Topk
    num_experts: int
    num_shards: int
    num_slots: int  # of a shard, in each layer

    def load_LE(self, tokens: slice) -> npt.NDArray[np.int64]:  # noqa: N802
        """Count the pairs of each expert among some of the tokens."""
        return np.stack([np.bincount(t[tokens].ravel(), minlength=self.num_experts) for t in self.topk_LTK])


def main() -> int:
    """Replay both kinds of routing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=200, help="batches of each size")
    parser.add_argument("--zipf", type=float, default=0.8, help="exponent of the synthetic routing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and no tables")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    say: Callable[[str], None] = (lambda _: None) if arguments.json else (lambda text: print(text, flush=True))
    result: dict[str, Any] = {"batches": arguments.batches, "zipf_exponent": arguments.zipf}
    for trace in (pocket_trace(), zipf_trace(arguments.zipf)):
        result[trace.name] = _replay(trace, arguments.batches, say)
    if arguments.json:
        print(json.dumps(result, indent=1))
    if arguments.keep:
        say(f"kept in {keep('dispatch-policies', result)}")
    return 0


def pocket_trace() -> Trace:
    """Record which experts the pocket model's routers choose for this repository's texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    checkpoint = ROOT / "examples" / "pocket-moe"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    paths = sorted({path for pattern in TEXTS for path in ROOT.glob(pattern)})
    windows = [ids for path in paths for ids in _windows(tokenizer(path.read_text(), verbose=False).input_ids)]
    np.random.default_rng(0).shuffle(windows)
    with torch.inference_mode():
        logits = [model(torch.tensor([ids]), output_router_logits=True).router_logits for ids in windows]
    num_chosen = model.config.num_experts_per_tok
    topk_LTK = np.stack([torch.cat(layer).topk(num_chosen).indices.numpy() for layer in zip(*logits, strict=True)])
    # 16 experts on 4 shards, a quarter of them twice.
    return Trace(name="pocket", topk_LTK=topk_LTK, num_experts=model.config.num_experts, num_shards=4, num_slots=5)


def _windows(ids: list[int]) -> Iterator[list[int]]:
    return (ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW))


def zipf_trace(exponent: float, num_tokens: int = 20_000, num_layers: int = 2) -> Trace:
    """Draw top-8 of 256 experts without replacement, weighted by rank ** -exponent (Gumbel's trick); ranks shuffled."""
    random = np.random.default_rng(0)
    layers = []
    for _ in range(num_layers):
        log_weight_E = random.permutation(-exponent * np.log(np.arange(1, 257)))
        score_TE = log_weight_E + random.gumbel(size=(num_tokens, 256))
        layers.append(np.argpartition(-score_TE, 8, axis=1)[:, :8])
    return Trace(name="zipf", topk_LTK=np.stack(layers), num_experts=256, num_shards=32, num_slots=9)


def _replay(trace: Trace, num_batches: int, say: Callable[[str], None]) -> dict[str, Any]:
    num_tokens = trace.topk_LTK.shape[1]
    first, second = slice(0, num_tokens // 2), slice(num_tokens // 2, num_tokens)
    even = place(trace, trace.load_LE(first))
    started_s = time.perf_counter()
    placement = replace(even, weights=level_weights(trace.load_LE(first), even))
    level_s = time.perf_counter() - started_s
    balance = {
        f"{name}, {half}": balancedness(shard_load_LS(trace.load_LE(tokens), of))
        for name, of in (("even", even), ("levelled", placement))
        for half, tokens in (("first half", first), ("second half", second))
    }
    say(
        "\n{}: {} layers, {} tokens, {} choices of {} experts".format(
            trace.name, *trace.topk_LTK.shape, trace.num_experts
        )
    )
    say(f"on {trace.num_shards} shards of {trace.num_slots} slots a layer; levelled in {level_s * 1e3:.1f} ms")
    say("balancedness: " + "; ".join(f"{name} {value:.3f}" for name, value in balance.items()))
    shares, moves = _shares(trace, placement), _moves(trace, placement, trace.load_LE(second))
    say(
        f"shares of rendezvous against the weights: chi-square p = {shares['p_value']:.3f}, {shares['freedom']} degrees"
    )
    for name, move in moves.items():
        say(f"{name}: {move['moved']:.4f} of pairs moved, least possible {move['least']:.4f}")
    rows = [row for size in BATCHES for row in _batches(trace, placement, second, size, num_batches)]
    columns = [column for column in rows[0] if column not in ("tokens", "policy")]
    say(f"{'tokens':>6} {'policy':>12} | " + " | ".join(columns))
    for row in rows:
        say(
            f"{row['tokens']:>6} {row['policy']:>12} | "
            + " | ".join(f"{row[column]:>{len(column)}.2f}" for column in columns)
        )
    return {"level_s": level_s, "balancedness": balance, "shares": shares, "moves": moves, "rows": rows}


def place(trace: Trace, load_LE: npt.NDArray[np.int64]) -> Placement:
    """Give spare slots to the experts with most load a replica; place the heaviest first on the least loaded shard."""
    experts_S: list[list[ExpertKey]] = [[] for _ in range(trace.num_shards)]
    for layer, load_E in enumerate(load_LE):
        replicas_E = np.ones(trace.num_experts, dtype=np.int64)
        for _ in range(trace.num_shards * trace.num_slots - trace.num_experts):
            replicas_E[np.where(replicas_E < trace.num_shards, load_E / replicas_E, -1).argmax()] += 1
        room_S, load_S = np.full(trace.num_shards, trace.num_slots), np.zeros(trace.num_shards)
        each_E = load_E / replicas_E
        for expert in np.lexsort((-each_E, -replicas_E)).tolist():  # the most replicas first: they need distinct shards
            hosts = np.lexsort((load_S, room_S == 0))[: replicas_E[expert]]
            assert room_S[hosts].all(), f"no room for {replicas_E[expert]} replicas of expert {expert}"
            room_S[hosts] -= 1
            load_S[hosts] += each_E[expert]
            for host in hosts.tolist():
                experts_S[host].append(ExpertKey(layer, expert))
    shards = tuple(ShardSlots(shard=ShardId(f"s{s}"), experts=tuple(keys)) for s, keys in enumerate(experts_S))
    layers = tuple(range(len(load_LE)))
    return Placement(epoch=0, num_experts=trace.num_experts, layers=layers, shards=shards)


def _keys(num_tokens: int) -> npt.NDArray[np.uint64]:
    return token_keys(np.full(num_tokens, identity_hash("replayed"), dtype=np.uint64), np.arange(num_tokens))


def _hashed(trace: Trace, placement: Placement) -> npt.NDArray[np.int32]:
    """Return the rendezvous choice of every pair of the trace, shard_LTK."""
    alive_S, keys_T = np.ones(trace.num_shards, dtype=np.bool_), _keys(trace.topk_LTK.shape[1])
    return np.stack([DispatchTable(placement, i).choose(t, keys_T, alive_S) for i, t in enumerate(trace.topk_LTK)])


def _shares(trace: Trace, placement: Placement) -> dict[str, float]:
    """Test the counts of all replicas with positive weights together; a token counts once for an expert."""
    shard_LTK, statistic, freedom = _hashed(trace, placement), 0.0, 0
    for layer, table in enumerate(zip(*placement.replica_table, strict=True)):
        for expert, (shard_R, weight_R) in enumerate(zip(*table, strict=True)):
            shard_R, weight_R = shard_R[weight_R > 0], weight_R[weight_R > 0]
            count_S = np.bincount(shard_LTK[layer][trace.topk_LTK[layer] == expert], minlength=trace.num_shards)
            expected_R = count_S.sum() * weight_R / weight_R.sum()
            if len(weight_R) > 1 and expected_R.min() >= 5:  # the usual bound below which chi-square does not hold
                statistic += float(((count_S[shard_R] - expected_R) ** 2 / expected_R).sum())
                freedom += len(weight_R) - 1
    return {"statistic": statistic, "freedom": freedom, "p_value": float(chi2.sf(statistic, freedom))}


def _moves(trace: Trace, placement: Placement, load_LE: npt.NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Level again for another load and compare the pairs that rendezvous moves with the change of shares."""
    levelled = level_weights(load_LE, placement)
    before_LTK, table = _hashed(trace, placement), placement.replica_table
    share_LER = table.weight_LER / table.weight_LER.sum(axis=-1, keepdims=True)
    result = {}
    for name, weights in (
        ("weights for the other half", levelled),
        ("the same, dead band of 0.05", changed_weights(placement.weights, levelled, 0.05)),
    ):
        other = replace(placement, weights=weights)
        new_LER = other.replica_table.weight_LER
        changed_LE = np.abs(new_LER / new_LER.sum(axis=-1, keepdims=True) - share_LER).sum(axis=-1) / 2
        counts_LE = trace.load_LE(slice(None))
        moved = float((_hashed(trace, other) != before_LTK).mean())
        result[name] = {"moved": moved, "least": float((changed_LE * counts_LE).sum() / counts_LE.sum())}
    return result


def _batches(
    trace: Trace, placement: Placement, tokens: slice, size: int, num_batches: int
) -> Iterator[dict[str, float | str]]:
    """Yield a row for each policy: all choose for the same batches, of random tokens and random layers."""
    random, alive_S = np.random.default_rng(size), np.ones(trace.num_shards, dtype=np.bool_)
    picks = random.integers(tokens.start, tokens.stop, (num_batches, size))
    layers = random.integers(0, len(trace.topk_LTK), num_batches)
    keys = random.integers(0, 2**64, (num_batches, size), dtype=np.uint64)
    tables = [DispatchTable(placement, layer) for layer in placement.layers]
    for name in POLICIES:
        policies = [open_policy(name, table) for table in tables]
        pairs_BS, reads_BS = np.zeros((2, num_batches, trace.num_shards), dtype=np.int64)
        times_us = []
        for batch, layer in enumerate(layers):
            topk_TK = trace.topk_LTK[layer, picks[batch]]
            started_s = time.perf_counter()
            shard_TK = policies[layer](topk_TK, keys[batch], alive_S)
            times_us.append((time.perf_counter() - started_s) * 1e6)
            pairs_BS[batch] = np.bincount(shard_TK.ravel(), minlength=trace.num_shards)
            touched = np.unique(topk_TK * trace.num_shards + shard_TK)
            reads_BS[batch] = np.bincount(touched % trace.num_shards, minlength=trace.num_shards)
        costs = {
            f"cost, read={read}": float((pairs_BS + read * reads_BS).max(axis=1).mean()) for read in TOKENS_PER_READ
        }
        yield {
            "tokens": size,
            "policy": name,
            "p99 max/mean": float(np.percentile(pairs_BS.max(axis=1) / pairs_BS.mean(axis=1), 99)),
            "mean max/mean": float((pairs_BS.max(axis=1) / pairs_BS.mean(axis=1)).mean()),
            "reads": float(reads_BS.sum(axis=1).mean()),
            "most reads": float(reads_BS.max(axis=1).mean()),
            **costs,
            "p50 us a call": float(np.median(times_us)),
        }


if __name__ == "__main__":
    sys.exit(main())
