"""Strategic merge patch, as far as `kubectl apply` needs it for kinds of the core."""

import copy
from typing import Any

# Lists whose elements are told apart by a key and merged; all others are replaced whole.
# From the patchMergeKey tags of Kubernetes' API types.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "secrets": "name",
    "ownerReferences": "uid",
    "conditions": "type",
    "topologySpreadConstraints": "topologyKey",
}
# Ports of containers and of Services have different keys; a Service's have `port`.
PORT_KEYS = ("containerPort", "port")


def strategic_merge(found: Any, patch: Any) -> Any:
    """Return a value with a strategic merge patch applied.

    Known directives: `$patch: replace` and `$patch: delete`, `$retainKeys`, `$setElementOrder/LIST` (ignored: the order
    is that of the object, new elements last).
    """
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    merged = dict(found) if isinstance(found, dict) else {}
    if "$retainKeys" in patch:
        merged = {key: value for key, value in merged.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, list):
            merged[key] = _merge_list(merged.get(key) or [], value, _merge_key(key, value))
        else:
            merged[key] = strategic_merge(merged.get(key), value)
    return merged


def _merge_key(field: str, elements: list[Any]) -> str | None:
    if field == "ports":
        return next((key for key in PORT_KEYS if all(key in element for element in elements)), None)
    return MERGE_KEYS.get(field)


def _merge_list(found: list[Any], patch: list[Any], key: str | None) -> list[Any]:
    if key is None or not all(isinstance(element, dict) and key in element for element in [*found, *patch]):
        return copy.deepcopy(patch)
    merged = {element[key]: element for element in found}
    for element in patch:
        if element.get("$patch") == "delete":
            merged.pop(element[key], None)
        else:
            merged[element[key]] = strategic_merge(merged.get(element[key]), element)
    return list(merged.values())
