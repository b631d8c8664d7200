"""JSON patch and JSON merge patch, as Kubernetes applies them."""

import copy
from typing import Any

from tests.kube.status import ApiError, Manifest

Operation = dict[str, Any]


def json_patch(found: Manifest, operations: Any) -> Manifest:
    """Return an object with a JSON patch (RFC 6902) applied, all of it or none.

    Kubernetes uses the library evanphx/json-patch in its version 4, in which `replace` of a key that a map lacks adds
    it, against the RFC; that of a list's element beyond its end, or below a key that is missing, fails.

    Raises:
        ApiError: 400 for what is no patch, 422 for one that cannot be applied.
    """
    if not isinstance(operations, list) or not all(isinstance(operation, dict) for operation in operations):
        raise ApiError(400, "error decoding patch: json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    patched = copy.deepcopy(found)
    for operation in operations:
        _apply(patched, operation)
    return patched


def _apply(document: Manifest, operation: Operation) -> None:
    kind, path = operation.get("op"), str(operation.get("path", ""))
    parent, key = _parent(document, path, str(kind))
    match kind:
        case "add":
            _add(parent, key, operation.get("value"), path)
        case "replace":
            if isinstance(parent, list):
                parent[_index(parent, key, path, len(parent))] = operation.get("value")
            else:
                parent[key] = operation.get("value")
        case "remove":
            _take(parent, key, path)
        case "test":
            if _get(parent, key) != operation.get("value"):
                raise _refused(f"testing value {path} failed")
        case "copy" | "move":
            source = str(operation.get("from", ""))
            source_parent, source_key = _parent(document, source, kind)
            value = copy.deepcopy(_get(source_parent, source_key))
            if kind == "move":
                _take(source_parent, source_key, source)
            _add(parent, key, value, path)
        case _:
            raise ApiError(400, f"Unexpected kind: {kind}")


def _parent(document: Any, path: str, kind: str) -> tuple[Any, str]:
    if not path.startswith("/"):
        raise _refused(f"{kind} operation does not apply: doc is missing path: {path!r}")
    *steps, key = [step.replace("~1", "/").replace("~0", "~") for step in path[1:].split("/")]
    found = document
    for step in steps:
        found = _get(found, step)
    if not isinstance(found, dict | list):
        raise _refused(f"{kind} operation does not apply: doc is missing path: {path}")
    return found, key


def _get(parent: Any, key: str) -> Any:
    if isinstance(parent, dict):
        return parent.get(key)
    if isinstance(parent, list) and key.isdigit() and int(key) < len(parent):
        return parent[int(key)]
    return None


def _add(parent: Any, key: str, value: object, path: str) -> None:
    if isinstance(parent, dict):
        parent[key] = value
    elif key == "-":
        parent.append(value)
    else:
        parent.insert(_index(parent, key, path, len(parent) + 1), value)


def _take(parent: Any, key: str, path: str) -> None:
    if isinstance(parent, list):
        del parent[_index(parent, key, path, len(parent))]
    elif key in parent:
        del parent[key]
    else:
        raise _refused(f"remove operation does not apply: unable to remove nonexistent key: {path}")


def _index(parent: list[Any], key: str, path: str, end: int) -> int:
    if not key.isdigit() or int(key) >= end:
        raise _refused(f"operation does not apply: index {key} of {len(parent)} is out of bounds: {path}")
    return int(key)


def _refused(why: str) -> ApiError:
    error = ApiError(422, "the server rejected our request due to an error in our request")
    error.add_note(why)  # Kubernetes does not tell the client either
    return error


def merge_patch(found: Any, patch: Any) -> Any:
    """Return a value with a JSON merge patch (RFC 7386) applied: maps are merged, null deletes, all else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(found) if isinstance(found, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged
