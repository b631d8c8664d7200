"""Parts of what `status` shows, as fields of its messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.cluster.model_info import ModelInfo


def shown(facts: Mapping[str, Any], message: type[Message]) -> dict[str, Any]:
    """Return those facts that the status has a field for."""
    return {name: value for name, value in facts.items() if name in message.DESCRIPTOR.fields_by_name}


def layer_traffic(model: ModelInfo, counters: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Return the fields of LayerTraffic of each layer: what the workers counted, see Dispatcher."""
    back = "combine_bytes" if model.expert_tp == 1 else "reduce_bytes"
    return [
        {
            "layer": layer,
            "dispatch_bytes": sum(c["dispatch_bytes_L"][row] for c in counters),
            "combine_bytes": 0,
            "reduce_bytes": 0,
            back: sum(c["combine_bytes_L"][row] for c in counters),
        }
        for row, layer in enumerate(model.moe_layers)
    ]


def drops(model: ModelInfo, capacity_factor: float | None, collector: LoadCollector) -> dict[str, Any]:
    """Return what was left out beyond a capacity factor; nothing without one."""
    if capacity_factor is None:
        return {}
    dropped_LE = collector.dropped_LE()
    by_layer = [
        {"layer": layer, "pairs": dropped_E.tolist()}
        for layer, dropped_E in zip(model.moe_layers, dropped_LE, strict=True)
    ]
    return {"capacity_factor": capacity_factor, "dropped_pairs": int(dropped_LE.sum()), "drops": by_layer}
