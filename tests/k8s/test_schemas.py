"""Every object that is applied, by the schemas of Kubernetes and of KubeRay; what they do not know is refused."""

from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.manifests import K8S, OVERLAYS, Manifest, cluster_of, overlay
from tests.kube.schemas import FILES, kuberay_crd, with_defaults

KUBERNETES = ("1.35", "1.37")
# Of Prometheus's operator, whose schemas nobody here has.
UNCHECKED = {"PodMonitor", "PrometheusRule"}


@cache
def ray_schema(kind: str) -> Manifest:
    """Return KubeRay's schema of a kind, in which an object may have no field that it does not name."""
    closed = close(raw_ray_schema(kind))
    assert isinstance(closed, dict)
    return closed


def raw_ray_schema(kind: str) -> Manifest:
    versions = kuberay_crd(kind)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    found: Manifest = schema
    return found


def close(schema: Any) -> Any:
    """Refuse what an API server would drop: fields that are in no `properties`."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        name: {key: close(value) for key, value in part.items()} if name == "properties" else close(part)
        for name, part in schema.items()
        if name not in ("default", "enum")
    } | {name: schema[name] for name in ("enum",) if name in schema}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    # Kinds of metadata and of embedded resources are known to the API server, not to the schema.
    if schema.get("type") == "object" and "properties" in schema and not is_open:
        closed["additionalProperties"] = False
    return closed


def check_by_kuberay(manifest: Manifest) -> None:
    schema = ray_schema(manifest["kind"])
    filled = with_defaults(manifest, raw_ray_schema(manifest["kind"]))
    # ObjectMeta is the API server's own matter.
    jsonschema.Draft202012Validator(schema).validate({**filled, "metadata": {}})


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    checked = 0
    for manifest in overlay(name):
        if manifest["kind"] not in FILES and manifest["kind"] not in UNCHECKED:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field_of_the_pods(name: str, version: str) -> None:
    """KubeRay makes pods of the templates; its schema of them may be older than the cluster."""
    cluster = cluster_of(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_kuberay_knows_every_field(name: str) -> None:
    found = [manifest for manifest in overlay(name) if manifest["kind"] in FILES]
    assert len(found) == 1
    check_by_kuberay(found[0])


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("enableInTreeAutoScaling",), True, "enableInTreeAutoScaling"),
        (("autoscalerOptions", "version"), "v3", "v3"),
        (("workerGroupSpecs", 0, "minReplicas"), "two", "two"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "imagePolicy"), "Always", "imagePolicy"),
        (("headGroupSpec", "template"), None, "template"),
    ],
)
def test_a_wrong_field_is_found(path: tuple[Any, ...], value: object, complaint: str) -> None:
    """The checker itself, on objects that are wrong in one place."""
    spec = yaml.safe_load(yaml.safe_dump(cluster_of("raycluster")))
    inner = spec
    for step in path[:-1]:
        inner = inner[step]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        check_by_kuberay({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {}, "spec": spec})


def test_every_manifest_is_in_an_overlay() -> None:
    """What no overlay applies would be checked by nobody."""
    used = {
        (m["kind"], m["metadata"]["name"].rpartition("-")[0] or m["metadata"]["name"])
        for n in OVERLAYS
        for m in overlay(n)
    }
    used |= {(m["kind"], m["metadata"]["name"]) for n in OVERLAYS for m in overlay(n)}
    for path in K8S.rglob("*.yaml"):
        for manifest in yaml.safe_load_all(path.read_text()):
            if isinstance(manifest, dict) and manifest.get("apiVersion") and "kustomize" not in manifest["apiVersion"]:
                assert (manifest["kind"], manifest["metadata"]["name"]) in used, path
