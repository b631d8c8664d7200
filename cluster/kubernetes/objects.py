"""Objects of Kubernetes as they are to be applied: what `up` makes of manifests, and what a live object keeps."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.cluster.errors import InputError

Manifest = dict[str, Any]

# Everything that `up` applies has it, with the cluster's name: `down` deletes by it.
LABEL = "expertmesh.io/up"
RAY_API = "ray.io/v1"
RAY_KINDS = ("RayCluster", "RayService")
# What `down` leaves: data, and what takes data along.
KEPT_KINDS = ("PersistentVolumeClaim", "PersistentVolume", "Namespace", "CustomResourceDefinition", "StorageClass")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be there: one RayCluster or RayService, and the objects that it needs."""

    ray: Manifest
    others: tuple[Manifest, ...]

    @property
    def name(self) -> str:
        """Return the name of the RayCluster or RayService."""
        return str(self.ray["metadata"]["name"])

    @property
    def is_service(self) -> bool:
        """Return whether KubeRay deploys the application too."""
        return bool(self.ray["kind"] == "RayService")


def prepare(manifests: Sequence[object], *, cluster_name: str, namespace: str, image: str = "") -> Wanted:
    """Check manifests, and label them for `down`.

    Args:
        manifests: objects as kustomize prints them; lists of them are taken apart.
        cluster_name: what the RayCluster or RayService must be called.
        namespace: where it will be: objects that name the namespace of the Ray cluster are moved with it.
        image: of Ray's container in every group of pods; empty: leave them.

    Raises:
        InputError: something is no object, there is not one RayCluster or RayService, it has another name, or its
            groups lack what Ray's autoscaler changes.
    """
    objects = [copy.deepcopy(found) for found in _flat(manifests)]
    rays = [found for found in objects if found["kind"] in RAY_KINDS]
    if len(rays) != 1:
        names = ", ".join(name_of(found) for found in rays) or "none"
        raise InputError(f"the manifests must have one RayCluster or RayService; they have {names}")
    (ray,) = rays
    if ray["apiVersion"] != RAY_API:
        raise InputError(f"{name_of(ray)} is of {ray['apiVersion']}; {RAY_API} is what is supported")
    if ray["metadata"]["name"] != cluster_name:
        raise InputError(f"cluster_name is {cluster_name!r}, and the manifests have {name_of(ray)}; make them the same")
    _move(objects, ray["metadata"].get("namespace", ""), namespace)
    _require_scalable(ray)
    if image:
        for group in groups_of(ray):
            group["template"]["spec"]["containers"][0]["image"] = image
    for found in objects:
        found["metadata"].setdefault("labels", {})[LABEL] = cluster_name
    return Wanted(ray=ray, others=tuple(found for found in objects if found is not ray))


def merged(live: Manifest, wanted: Manifest) -> Manifest:
    """Return what a live RayCluster or RayService is to be replaced by.

    Of a RayCluster with an autoscaler, replicas (within the bounds now wanted), scaleStrategy and the order of groups
    are the autoscaler's, which writes to them by their index: they stay. So do the live object's resourceVersion, which
    has the server refuse the change if somebody else changed it meanwhile, and what others wrote into its metadata.
    """
    result = copy.deepcopy(wanted)
    metadata = copy.deepcopy(live["metadata"])
    metadata.pop("managedFields", None)
    for field in ("labels", "annotations"):
        if metadata.get(field) or wanted["metadata"].get(field):
            metadata[field] = {**metadata.get(field, {}), **wanted["metadata"].get(field, {})}
    result["metadata"] = metadata
    if wanted["kind"] == "RayCluster" and wanted["spec"].get("enableInTreeAutoscaling"):
        spec = result["spec"]
        spec["workerGroupSpecs"] = _with_autoscaled(live["spec"].get("workerGroupSpecs", []), spec["workerGroupSpecs"])
    return result


def changed_groups(before: Manifest, after: Manifest) -> list[str]:
    """Return the groups of a live RayCluster whose pods would be made otherwise now; those that run stay as they are.

    Args:
        before: as the server had it.
        after: as the server has it, with its defaults as well.
    """
    if before["kind"] != "RayCluster" or cluster_spec(after).get("upgradeStrategy", {}).get("type") == "Recreate":
        return []  # KubeRay makes new pods by itself
    was = {group.get("groupName", "head"): _recipe(group) for group in groups_of(before)}
    now = {group.get("groupName", "head"): _recipe(group) for group in groups_of(after)}
    return [name for name, recipe in now.items() if name in was and was[name] != recipe]


def _recipe(group: Manifest) -> tuple[object, ...]:
    return tuple(group.get(field) for field in ("template", "rayStartParams", "labels", "resources"))


def cluster_spec(ray: Manifest) -> Manifest:
    """Return the spec of the cluster, of a RayCluster or within a RayService."""
    spec: Manifest = ray["spec"] if ray["kind"] == "RayCluster" else ray["spec"]["rayClusterConfig"]
    return spec


def groups_of(ray: Manifest) -> list[Manifest]:
    """Return the groups of pods, the head's first."""
    spec = cluster_spec(ray)
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def name_of(manifest: Manifest) -> str:
    """Return kind and name, as in `RayCluster expertmesh`."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def resource_type(manifest: Manifest) -> str:
    """Return how kubectl is told of a kind beyond doubt: Kind.version.group."""
    group, _, version = str(manifest["apiVersion"]).rpartition("/")
    return f"{manifest['kind']}.{version}.{group}"


def _flat(manifests: Sequence[object]) -> Iterator[Manifest]:
    for number, found in enumerate(manifests, 1):
        if found is None:
            continue  # an empty document
        if not isinstance(found, dict):
            raise InputError(f"object {number} of the manifests is no object of Kubernetes: {found!r:.80}")
        if isinstance(found.get("items"), list) and str(found.get("kind", "")).endswith("List"):
            yield from _flat(found["items"])
            continue
        metadata = found.get("metadata")
        lacking = [key for key in ("apiVersion", "kind") if not isinstance(found.get(key), str)]
        if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            lacking.append("metadata.name")
        if lacking:
            raise InputError(f"object {number} of the manifests lacks {', '.join(lacking)}")
        yield found


def _move(objects: Sequence[Manifest], home: str, namespace: str) -> None:
    """Have objects of a namespace in another, and service accounts that role bindings name, which must say where."""
    for found in objects:
        if home and found["metadata"].get("namespace") == home:
            found["metadata"]["namespace"] = namespace
        for subject in found.get("subjects") or ():
            if subject.get("kind") == "ServiceAccount" and subject.get("namespace", home) == home:
                subject["namespace"] = namespace


def _require_scalable(ray: Manifest) -> None:
    """Refuse what Ray's autoscaler (v2) would trip over: it reads and replaces these fields without asking for them."""
    try:
        spec = cluster_spec(ray)
        groups = groups_of(ray)
        containers = [group["template"]["spec"]["containers"][0] for group in groups]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{name_of(ray)}: its spec lacks {error}") from error
    assert containers, "there is a head group"
    if not spec.get("enableInTreeAutoscaling"):
        raise InputError(f"{name_of(ray)}: enableInTreeAutoscaling must be true; KubeRay's autoscaler has the workers")
    for index, group in enumerate(groups[1:]):
        lacking = [key for key in ("replicas", "minReplicas", "scaleStrategy") if group.get(key) is None]
        if lacking:
            where = f"workerGroupSpecs[{index}] ({group.get('groupName')})"
            raise InputError(
                f"{name_of(ray)}: {where} lacks {', '.join(lacking)}, which the autoscaler reads and replaces; "
                "write replicas, minReplicas and scaleStrategy: {workersToDelete: []}"
            )


def _with_autoscaled(live: Sequence[Manifest], wanted: Sequence[Manifest]) -> list[Manifest]:
    """Return the wanted groups in the order of the live ones, with what the autoscaler decided of each."""
    order = {group["groupName"]: index for index, group in enumerate(live)}
    was = {group["groupName"]: group for group in live}
    groups = sorted(wanted, key=lambda group: order.get(group["groupName"], len(order)))
    return [_keep(was[group["groupName"]], group) if group["groupName"] in was else group for group in groups]


def _keep(live: Manifest, wanted: Manifest) -> Manifest:
    kept = dict(wanted)
    if live.get("replicas") is not None:
        # KubeRay's default of maxReplicas is the largest int32.
        bounds = wanted.get("minReplicas", 0), wanted.get("maxReplicas", 2**31 - 1)
        kept["replicas"] = min(max(live["replicas"], bounds[0]), bounds[1])
    if live.get("scaleStrategy"):
        kept["scaleStrategy"] = copy.deepcopy(live["scaleStrategy"])
    return kept
