"""The process that measures: started with a worker's environment, tells its progress and its result in lines of JSON.

usage: python -m expertmesh.actors.cli.measure_process SIZES   (a JSON object, fields of Sizes)
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import psutil
import torch

from expertmesh.actors.cli.measure_cores import DenseHalf, time_cores
from expertmesh.actors.cli.measure_gpus import measure_gpus
from expertmesh.actors.cli.measure_links import time_exchanges
from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.kernels.cpu.build import compile_all, load_dense, load_expert_mlp
from expertmesh.kernels.cpu.packet_server import can_serve
from expertmesh.kernels.cpu.threads import set_num_threads


def main() -> int:
    """Measure, and print lines: {"doing": text} as it goes on, then what was found or {"error": text}."""
    sizes = Sizes(**json.loads(sys.argv[1]))
    try:
        if torch.cuda.is_available():
            _say(doing="GPUs")
            _say(hardware=measure_gpus("expertmesh doctor --measure, torch"))
        else:
            _say(times=_measure(sizes))
    except ExpertMeshError as error:
        _say(error=str(error))
        return 1
    return 0


def _measure(sizes: Sizes) -> dict[str, Any]:
    """Return the fields of CpuTimes."""
    torch.manual_seed(0)
    cores = len(os.sched_getaffinity(0))
    set_num_threads(cores)
    torch.set_num_threads(max(1, cores // 2))  # as a worker has it
    _say(doing="compiling the kernels, where they are not yet")
    compile_all()
    if load_expert_mlp() is None or load_dense() is None or not can_serve():
        raise UnavailableError("--measure times the compiled kernels, and they cannot be compiled or run here")
    _say(doing="cores: memory, products, the dense half of a layer, drawing")
    half = DenseHalf(sizes)
    times = time_cores(half, sizes, cores)
    _say(doing="links between processes")
    exchange_s = list(time_exchanges(half, sizes, min(2, cores)))
    _say(doing="an engine's step")
    # Here, not above: transformers takes seconds to import.
    from expertmesh.actors.cli.measure_engine import time_steps

    return {
        "num_cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "hidden_size": sizes.hidden_size,
        "num_experts": sizes.num_experts,
        "expert_params": 3 * sizes.hidden_size * sizes.expert_width,
        **asdict(times),
        "dense_params": half.params,
        "kv_bytes": half.kv_bytes,
        "steps_s": time_steps(sizes),
        "exchange_s": exchange_s,
        "row_bytes": 2 * 2 * sizes.hidden_size,
    }


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
