"""What an engine's step costs beside its layers: scheduling, laying out, embedding, drawing's calls, events."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.actors.worker.engine import Engine
from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
from expertmesh.cluster.scheduler import Scheduler, SchedulerConfig
from expertmesh.models import hooks
from expertmesh.models.architecture import open_architecture
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.runners import PagedRunner

# Small, and of the kind that all is compiled for.
_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
_PROMPT, _PAGE_SIZE = 16, 16


def time_steps(sizes: Sizes) -> dict[int, float]:
    """Return the seconds of a step without layers, by sequences.

    Two small models that differ in their number of layers tell what none would take. In place of experts each layer
    sweeps through memory, which is not counted: an engine finds its caches full of weights.
    """
    fewer, more = sizes.engine_layers
    times = [_steps(sizes, num_layers) for num_layers in (fewer, more)]
    return {
        sequences: max(0.0, times[0][sequences] - (times[1][sequences] - times[0][sequences]) * fewer / (more - fewer))
        for sequences in sizes.sequences
    }


def _steps(sizes: Sizes, num_layers: int) -> dict[int, float]:
    swept = torch.zeros(sizes.swept_bytes // 4)
    swept_s = [0.0]

    def sweep(_layer: int, hidden_TH: Tensor, _ids_TK: Tensor, _weights_TK: Tensor) -> Tensor:
        began_s = time.perf_counter()
        swept.sum()
        swept_s[0] += time.perf_counter() - began_s
        return torch.zeros_like(hidden_TH)

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(num_hidden_layers=num_layers, **_CONFIG), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        weights = CheckpointWeights(open_architecture(Path(folder), "auto"))
        dense = weights.load_dense(torch.device("cpu"))
    hooks.attach_experts(weights.architecture.experts_by_layer, sweep)
    runner = PagedRunner(dense, _PAGE_SIZE, torch.device("cpu"))
    most = max(sizes.sequences)
    new = 4 * sizes.rounds
    pages = most * -(-(_PROMPT + new) // _PAGE_SIZE)
    runner.allocate(pages)
    config = SchedulerConfig(
        max_batch_tokens=max(64, _PROMPT * most),
        max_sequences=most,
        num_pages=pages,
        page_size=_PAGE_SIZE,
        max_context=_PROMPT + new,
    )
    events: list[TokenEvent] = []
    engine = Engine(Scheduler(config), runner, max_queue=most, begin_step=lambda *_: None, on_events=events.extend)
    times: dict[int, float] = {}
    for sequences in sizes.sequences:
        engine.submit([_request(f"{sequences}-{index}", index, new) for index in range(sequences)])
        spent: list[float] = []
        while engine.num_running or not spent:
            swept_s[0], began_s = 0.0, time.perf_counter()
            engine.step()
            spent.append(time.perf_counter() - began_s - swept_s[0])
        times[sequences] = statistics.median(spent[sizes.rounds :])
    return times


def _request(name: str, seed: int, new: int) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=name,
        prompt_ids=tuple(range(1, _PROMPT + 1)),
        sampling=SamplingParams(max_tokens=new, temperature=1.0, seed=seed),
    )
