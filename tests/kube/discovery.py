"""What kubectl asks to find its way: versions, groups, kinds, and that fields are validated by the server."""

from collections import defaultdict
from collections.abc import Iterable

from tests.kube.resources import VERBS, Resource
from tests.kube.schemas import KUBERNETES
from tests.kube.status import Manifest

# Of a subresource that takes another kind of object: what it is, its group and version.
_SUBRESOURCE_KINDS = {
    "exec": {"kind": "PodExecOptions"},
    "eviction": {"kind": "Eviction", "group": "policy", "version": "v1"},
}


def version() -> Manifest:
    major, minor = KUBERNETES.split(".")
    return {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES}.0", "platform": "linux/amd64"}


def answer(path: str, resources: Iterable[Resource]) -> Manifest | None:
    """Return the document at a path; None if there is none."""
    versions: dict[str, list[Resource]] = defaultdict(list)
    for resource in resources:
        versions[resource.api_version].append(resource)
    match path.strip("/").split("/"):
        case ["version"]:
            return version()
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            groups = {name.partition("/")[0] for name in versions if "/" in name}
            return {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [_group(name, versions) for name in sorted(groups)],
            }
        case ["apis", group] if any(name.startswith(f"{group}/") for name in versions):
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(group, versions)}
        case ["api", "v1"]:
            return _resource_list("v1", versions["v1"])
        case ["apis", group, name] if f"{group}/{name}" in versions:
            return _resource_list(f"{group}/{name}", versions[f"{group}/{name}"])
        case ["openapi", "v3"]:
            return {
                "paths": {_prefix(name): {"serverRelativeURL": f"/openapi/v3/{_prefix(name)}"} for name in versions}
            }
        case ["openapi", "v3", *rest]:
            for name, found in versions.items():
                if _prefix(name) == "/".join(rest):
                    return _openapi(found)
    return None


def _prefix(api_version: str) -> str:
    return f"apis/{api_version}" if "/" in api_version else f"api/{api_version}"


def _group(group: str, versions: Iterable[str]) -> Manifest:
    # v1 before v1alpha1: the first is what kubectl prefers.
    own = sorted(name for name in versions if name.startswith(f"{group}/"))
    listed = [{"groupVersion": name, "version": name.partition("/")[2]} for name in own]
    return {"name": group, "versions": listed, "preferredVersion": listed[0]}


def _resource_list(api_version: str, resources: list[Resource]) -> Manifest:
    listed = []
    for resource in resources:
        entry = {"kind": resource.kind, "singularName": resource.kind.lower(), "namespaced": resource.namespaced}
        listed.append(
            {"name": resource.plural, "verbs": list(VERBS), "shortNames": list(resource.short_names), **entry}
        )
        for name in resource.subresources:
            kind = _SUBRESOURCE_KINDS.get(name, {})
            listed.append(
                {
                    **entry,
                    **kind,
                    "singularName": "",
                    "name": f"{resource.plural}/{name}",
                    "verbs": ["get", "patch", "update"],
                }
            )
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": listed}


def _openapi(resources: list[Resource]) -> Manifest:
    """Return as much of an OpenAPI document as says that kubectl can leave validation, and dry runs, to the server."""
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}}
        for name in ("dryRun", "fieldManager", "fieldValidation")
    ]
    paths = {}
    for resource in resources:
        kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        patch = {
            "operationId": f"patch{resource.kind}",
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
        }
        namespace = "/namespaces/{namespace}" if resource.namespaced else ""
        path = f"/{_prefix(resource.api_version)}{namespace}/{resource.plural}/{{name}}"
        paths[path] = {"patch": {**patch, "x-kubernetes-group-version-kind": kind}}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": KUBERNETES}, "paths": paths}
