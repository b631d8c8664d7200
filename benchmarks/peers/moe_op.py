"""The MoE operators of vLLM's CPU build and of zentorch, timed on demand by `benchmarks.expert_mlp --peers`.

It runs in the peers' own environment and imports nothing of ours. A line of JSON asks: {"layer": [hidden, width,
experts, layers]} makes random layers, {"tokens": n, "top_k": k, "number": i} runs layer i once with each operator. A
line of JSON answers: seconds by operator.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import vllm._C  # type: ignore[import-not-found]  # noqa: F401  registers the operator


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    has_amx: bool = torch.cpu._is_amx_tile_supported()
    isa = "amx" if has_amx else "vec"
    operators: dict[str, Callable[..., object]] = {"vllm": lambda *args: torch.ops._C.cpu_fused_moe(*args, isa)}
    try:
        import zentorch  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        print(f"zentorch is left out: {error}", file=sys.stderr)
    else:
        operators["zentorch"] = torch.ops.zentorch.zentorch_fused_moe
    layers: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    hidden = experts = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if "layer" in asked:
            hidden, width, experts, count = asked["layer"]
            layers = {name: [make_layer(name, hidden, width, experts, isa) for _ in range(count)] for name in operators}
            print(json.dumps({"operators": list(operators)}), flush=True)
            continue
        times = {}
        for name, operator in operators.items():
            x_TH = torch.randn(asked["tokens"], hidden).bfloat16()
            weights_TK, ids_TK = torch.rand(asked["tokens"], experts).topk(asked["top_k"])
            out_TH = torch.empty_like(x_TH)
            # The layers before, untimed, wake the threads, as in a model.
            for step in range(4):
                up, down = layers[name][(asked["number"] + step) % len(layers[name])]
                started_s = time.perf_counter()
                operator(out_TH, x_TH, up, down, None, None, weights_TK, ids_TK.to(torch.int32), False, "silu")
            times[name] = time.perf_counter() - started_s
        print(json.dumps(times), flush=True)


def make_layer(name: str, hidden: int, width: int, experts: int, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random weights as the operator wants them."""
    weights = []
    for shape in ((experts, 2 * width, hidden), (experts, hidden, width)):
        weight = torch.randn(shape).mul_(shape[2] ** -0.5).bfloat16()
        if name == "vllm":
            packed = torch.empty_like(weight)
            torch.ops._C.prepack_moe_weight(weight, packed, isa)
            weight = packed
        weights.append(weight)
    return weights[0], weights[1]


if __name__ == "__main__":
    main()
