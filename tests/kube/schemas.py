"""Validation: of custom objects by the schemas of their definitions, of the core's by Kubernetes' own."""

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.kube.status import ApiError, Manifest, invalid

KUBERNETES = "1.35"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay-crds")
FILES = {"RayCluster": "crd_rayclusters.yaml", "RayService": "crd_rayservices.yaml"}


@cache
def kuberay_crd(kind: str) -> Manifest:
    """Return KubeRay's definition of a kind. Do not change it; skips the test where nobody has it."""
    path = FOLDER / FILES[kind]
    if not path.is_file():
        pytest.skip(f"needs KubeRay's {path.name}: set KUBERAY_CRDS to a folder that has it; {FOLDER} has not")
    found: Manifest = yaml.load(path.read_text(), yaml.CSafeLoader)
    return found


def with_defaults(value: Any, schema: Manifest) -> Any:
    """Put in what the API server puts in before it looks."""
    if isinstance(value, dict) and "properties" in schema:
        filled = {name: with_defaults(part, schema["properties"].get(name, {})) for name, part in value.items()}
        missing = {name: part for name, part in schema["properties"].items() if name not in filled}
        return filled | {name: part["default"] for name, part in missing.items() if "default" in part}
    if isinstance(value, list):
        return [with_defaults(part, schema.get("items", {})) for part in value]
    return value


def prune(value: Any, schema: Manifest, place: str, unknown: list[str]) -> Any:
    """Return a value without the fields that no schema names, whose places are added to `unknown`."""
    if isinstance(value, list):
        return [prune(part, schema.get("items", {}), f"{place}[{i}]", unknown) for i, part in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "properties" not in schema:
        inner = schema.get("additionalProperties")
        if not isinstance(inner, dict):
            return value
        return {name: prune(part, inner, f"{place}.{name}", unknown) for name, part in value.items()}
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    kept = {}
    for name, part in value.items():
        inside = f"{place}.{name}" if place else name
        if name in schema["properties"]:
            kept[name] = prune(part, schema["properties"][name], inside, unknown)
        else:
            unknown.append(inside)
    return kept


def admit_custom(manifest: Manifest, crd: Manifest, version: str, strictness: str) -> tuple[Manifest, list[str]]:
    """Return a custom object as it is stored, with its defaults and without unknown fields, and warnings.

    CEL rules (x-kubernetes-validations) are not looked at.

    Args:
        manifest: the object.
        crd: its definition.
        version: of the definition.
        strictness: Strict, Warn or Ignore: what becomes of unknown fields.

    Raises:
        ApiError: 400 for unknown fields if Strict, 422 for wrong ones.
    """
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version]
    kind, group = manifest["kind"], crd["spec"]["group"]
    unknown: list[str] = []
    metadata = manifest["metadata"]  # ObjectMeta is the API server's own matter
    body = prune({**manifest, "metadata": {}}, schema, "", unknown)
    if unknown and strictness == "Strict":
        told = ", ".join(f'unknown field "{place}"' for place in unknown)
        raise ApiError(
            400, f'{kind} in version "{version}" cannot be handled as a {kind}: strict decoding error: {told}'
        )
    filled = with_defaults(body, schema)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(filled)
    causes = [(_place(error), _told(error)) for error in errors]
    if causes:
        raise invalid(kind, group, metadata.get("name", ""), causes)
    warnings = [f'unknown field "{place}"' for place in unknown] if strictness == "Warn" else []
    return {**copy.deepcopy(filled), "metadata": metadata}, warnings


def _place(error: jsonschema.ValidationError) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    place = "".join(steps).removeprefix(".")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"{place}.{missing}".removeprefix(".")
    return place or "<root>"


def _told(error: jsonschema.ValidationError) -> str:
    return "Required value" if error.validator == "required" else f"Invalid value: {error.message}"


def admit_core(manifest: Manifest, strictness: str) -> None:
    """Check an object of Kubernetes' own kinds.

    Raises:
        ApiError: 422 with the field that is wrong.
    """
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=strictness == "Strict")
    except kubernetes_validate.SchemaNotFoundError:
        return  # kinds of the API that are not stored as such
    except kubernetes_validate.ValidationError as error:
        name = manifest["metadata"].get("name", "")
        place = ".".join(str(step) for step in error.path) or "<root>"
        raise invalid(manifest["kind"], "", name, [(place, f"Invalid value: {error.message}")]) from error
