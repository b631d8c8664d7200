"""Which attention worker shall take this prompt? A pure function of its inputs and a random generator."""

import hashlib
import random
from collections.abc import Mapping, Sequence

# Prompts that agree in this many first tokens prefer the same worker, which may still hold their pages.
AFFINITY_TOKENS = 64
# A shorter prompt costs less to compute again than a worse balance does.
MIN_AFFINITY_TOKENS = 16


def choose_worker(prompt_ids: Sequence[int], outstanding_tokens: Mapping[str, int], rng: random.Random) -> str:
    """Choose a worker by power of two choices, with affinity of prompts that begin alike.

    Of two candidates the one with fewer outstanding tokens is taken (Mitzenmacher, "The power of two choices in
    randomized load balancing", 2001). The first is drawn at random, except that a prompt of at least
    MIN_AFFINITY_TOKENS takes the winner of a rendezvous hash of its first AFFINITY_TOKENS tokens; that one is credited
    with the length of the prompt, which it may not have to compute.

    Args:
        prompt_ids: tokens of the prompt.
        outstanding_tokens: by worker id, tokens that it still has to compute; at least one worker.
        rng: drawn from once for each choice among several workers.

    """
    workers = sorted(outstanding_tokens)
    assert workers, "a choice among no workers"
    if len(workers) == 1:
        return workers[0]
    if len(prompt_ids) < MIN_AFFINITY_TOKENS:
        first, second = rng.sample(workers, 2)
        credit = 0
    else:
        first = _preferred(prompt_ids, workers)
        second = rng.choice([worker for worker in workers if worker != first])
        credit = len(prompt_ids)
    return first if outstanding_tokens[first] <= outstanding_tokens[second] + credit else second


def _preferred(prompt_ids: Sequence[int], workers: Sequence[str]) -> str:
    prefix = tuple(prompt_ids[:AFFINITY_TOKENS])
    return max(workers, key=lambda worker: hashlib.blake2b(f"{worker} {prefix}".encode(), digest_size=8).digest())
