"""The kinds that the server knows, and the paths that they are at."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.kube.status import Manifest

VERBS = ("create", "delete", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True)
class Resource:
    """A kind of object. group is empty for the core's."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def has_status(self) -> bool:
        """Say whether its status is written at a path of its own."""
        return "status" in self.subresources


CRDS = Resource("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", False, ("crd",))
PODS = Resource("", "v1", "Pod", "pods", True, ("po",), ("status", "eviction", "exec", "log"))
EVENTS = Resource("", "v1", "Event", "events", True, ("ev",))
NAMESPACES = Resource("", "v1", "Namespace", "namespaces", False, ("ns",), ("status",))
NODES = Resource("", "v1", "Node", "nodes", False, ("no",), ("status",))
QUOTAS = Resource("", "v1", "ResourceQuota", "resourcequotas", True, ("quota",), ("status",))
SERVICES = Resource("", "v1", "Service", "services", True, ("svc",), ("status",))
BUDGETS = Resource("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", True, ("pdb",), ("status",))
REVIEWS = Resource("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", False)
_RBAC = "rbac.authorization.k8s.io"
ROLES = Resource(_RBAC, "v1", "Role", "roles")
ROLE_BINDINGS = Resource(_RBAC, "v1", "RoleBinding", "rolebindings")
CLUSTER_ROLES = Resource(_RBAC, "v1", "ClusterRole", "clusterroles", False)
CLUSTER_ROLE_BINDINGS = Resource(_RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings", False)
BUILTIN = (
    PODS,
    EVENTS,
    NAMESPACES,
    NODES,
    QUOTAS,
    SERVICES,
    Resource("", "v1", "ConfigMap", "configmaps", True, ("cm",)),
    Resource("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", True, ("pvc",), ("status",)),
    Resource("", "v1", "Secret", "secrets"),
    Resource("", "v1", "ServiceAccount", "serviceaccounts", True, ("sa",)),
    Resource("apps", "v1", "Deployment", "deployments", True, ("deploy",), ("status",)),
    Resource("apps", "v1", "StatefulSet", "statefulsets", True, ("sts",), ("status",)),
    Resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", True, ("netpol",)),
    BUDGETS,
    ROLES,
    ROLE_BINDINGS,
    CLUSTER_ROLES,
    CLUSTER_ROLE_BINDINGS,
    REVIEWS,
    CRDS,
)


def custom_resources(crds: Iterable[Manifest]) -> list[Resource]:
    """Return the kinds that definitions bring, at each of their versions."""
    return [
        Resource(
            spec["group"],
            version["name"],
            spec["names"]["kind"],
            spec["names"]["plural"],
            spec["scope"] == "Namespaced",
            tuple(spec["names"].get("shortNames", ())),
            tuple(version.get("subresources", ())),
        )
        for spec in (crd["spec"] for crd in crds)
        for version in spec["versions"]
        if version["served"]
    ]


@dataclass(frozen=True)
class Path:
    """What a request is about: all objects of a kind, those of a namespace, one of them, or a part of one."""

    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""


def parse(path: str) -> Path | None:
    """Take a path of the API apart; None if it is none of an object's."""
    match path.strip("/").split("/"):
        case ["api", version, *rest]:
            group = ""
        case ["apis", group, version, *rest]:
            pass
        case _:
            return None
    match rest:
        case ["namespaces", namespace, plural, *names] if plural not in ("status", "finalize"):
            pass
        case [plural, *names]:
            namespace = ""
        case _:
            return None
    if len(names) > 2:
        return None
    return Path(group, version, plural, namespace, *names)
