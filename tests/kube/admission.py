"""What happens to a new or changed object before it is stored: fields are checked, defaults put in, quotas kept."""

import base64
from decimal import Decimal

from tests.kube.resources import CRDS, PODS, QUOTAS, REVIEWS, Resource
from tests.kube.schemas import admit_core, admit_custom
from tests.kube.status import ApiError, Manifest, invalid, quota_exceeded
from tests.kube.store import Store

ZERO = Decimal(0)
_UNITS = {
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T"), 1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
}


def admit(store: Store, resource: Resource, manifest: Manifest, strictness: str) -> tuple[Manifest, list[str]]:
    """Return an object as it is stored, and warnings.

    Raises:
        ApiError: 400 or 422 for a wrong object.
    """
    kind, version = manifest.get("kind", resource.kind), manifest.get("apiVersion", resource.api_version)
    if (kind, version) != (resource.kind, resource.api_version):
        raise ApiError(400, f"the object ({kind} of {version}) is not of the path's kind ({resource.kind})")
    if not isinstance(manifest.get("metadata", {}), dict):
        raise ApiError(400, "metadata is no object")
    whole = {**manifest, "kind": kind, "apiVersion": version, "metadata": manifest.get("metadata", {})}
    for crd in store.view(CRDS):
        if crd["spec"]["group"] == resource.group and crd["spec"]["names"]["plural"] == resource.plural:
            return admit_custom(whole, crd, resource.version, strictness)
    if resource not in (CRDS, REVIEWS):
        admit_core(whole, strictness)
    for number, subject in enumerate(whole.get("subjects") or ()):
        if subject["kind"] == "ServiceAccount" and not subject.get("namespace"):
            place = f"subjects[{number}].namespace"
            raise invalid(kind, resource.group, whole["metadata"].get("name", ""), [(place, "Required value")])
    if texts := whole.pop("stringData", None):
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        whole["data"] = {**whole.get("data", {}), **encoded}
    return whole, []


def with_pod_defaults(pod: Manifest) -> Manifest:
    """Return a new pod as the API server fills it in, as far as anybody here looks."""
    spec = {"restartPolicy": "Always", "terminationGracePeriodSeconds": 30, **pod["spec"]}
    status = {"phase": "Pending", "conditions": [], "containerStatuses": []}
    return {**pod, "spec": spec, "status": status}


def keep_quotas(store: Store, namespace: str, pod: Manifest) -> None:
    """Refuse a pod that a ResourceQuota of the namespace has no room for.

    Raises:
        ApiError: 403, as Kubernetes words it.
    """
    asked = _uses(pod)
    others = [p for p in store.all(PODS, namespace) if p["status"].get("phase") not in ("Succeeded", "Failed")]
    for quota in store.all(QUOTAS, namespace):
        hard = quota["spec"]["hard"]
        used = {name: sum((_uses(p).get(name, ZERO) for p in others), ZERO) for name in hard}
        over = [name for name in hard if name in asked and used[name] + asked[name] > amount(hard[name])]
        if over:
            told = [
                f"requested: {','.join(f'{name}={_written(asked[name])}' for name in over)}",
                f"used: {','.join(f'{name}={_written(used[name])}' for name in over)}",
                f"limited: {','.join(f'{name}={hard[name]}' for name in over)}",
            ]
            name = pod["metadata"].get("name") or pod["metadata"].get("generateName", "")
            raise quota_exceeded("pods", name, quota["metadata"]["name"], ", ".join(told))


def amount(quantity: str | int | float) -> Decimal:
    """Return a quantity such as 500m or 4Gi as a number."""
    text = str(quantity)
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit):
            return Decimal(text.removesuffix(unit)) * _UNITS[unit]
    return Decimal(text)


def _uses(pod: Manifest) -> dict[str, Decimal]:
    used = {"pods": Decimal(1)}
    for container in pod["spec"]["containers"]:
        for bound in ("requests", "limits"):
            for name, quantity in container.get("resources", {}).get(bound, {}).items():
                whole = f"{bound}.{name}"
                used[whole] = used.get(whole, ZERO) + amount(quantity)
    return used | {name: used[f"requests.{name}"] for name in ("cpu", "memory") if f"requests.{name}" in used}


def _written(number: Decimal) -> str:
    return f"{number.normalize():f}"
