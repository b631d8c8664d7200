"""A fake KubeRay operator: makes and deletes the pods of RayClusters as KubeRay 1.7 does, and writes their status."""

import base64
import secrets
import threading
import time

from tests.kube.admission import admit, keep_quotas, with_pod_defaults
from tests.kube.events import record
from tests.kube.ray_pods import (
    CLUSTER,
    GROUP,
    HEAD_GROUP,
    TYPE,
    head_pod,
    head_service,
    is_autoscaled,
    worker_pod,
)
from tests.kube.ray_status import status_of
from tests.kube.resources import PODS, SERVICES, Resource
from tests.kube.status import ApiError, Manifest
from tests.kube.store import Store, grace_of

RAY_CLUSTERS = Resource("ray.io", "v1", "RayCluster", "rayclusters", True, (), ("status",))
SECRETS = Resource("", "v1", "Secret", "secrets")
_RETRY_S = 1.0  # after a pod was refused
SERVICE_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


class Operator:
    """Reconciles all RayClusters at each change of the store. A plain loop: slow changes are only late."""

    resource = RAY_CLUSTERS

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused: dict[str, tuple[float, str]] = {}  # by the cluster's uid: when and why pods could not be made
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        version = -1
        while not self._closing.is_set():
            # Also without a change, from time to time: what was refused may have room now.
            self._store.wait(version, 0.5)
            version = self._store.version
            for cluster in self._store.all(RAY_CLUSTERS):
                if "deletionTimestamp" not in cluster["metadata"]:
                    with self._store.locked():
                        self._reconcile(cluster)

    def _reconcile(self, cluster: Manifest) -> None:
        namespace, name, uid = (cluster["metadata"][key] for key in ("namespace", "name", "uid"))
        try:
            if self._store.get(RAY_CLUSTERS, namespace, name)["metadata"] != cluster["metadata"]:
                return  # it has changed meanwhile: at the next turn
        except ApiError:
            return
        refused_at_s, _ = self._refused.get(uid, (-_RETRY_S, ""))
        if time.monotonic() < refused_at_s + _RETRY_S:
            return
        self._refused.pop(uid, None)
        self._ensure_beside(cluster)
        if self._reconcile_head(cluster):
            for group in cluster["spec"].get("workerGroupSpecs", []):
                self._reconcile_group(cluster, group)
        status = status_of(cluster, self._pods(cluster), self._refused.get(uid, (0.0, ""))[1])
        if status != cluster.get("status"):
            whole, _ = admit(self._store, RAY_CLUSTERS, {**cluster, "status": status}, "Strict")
            self._store.update(RAY_CLUSTERS, namespace, name, lambda found: {**found, "status": whole["status"]})

    def _ensure_beside(self, cluster: Manifest) -> None:
        """Make the head's Service, and the Secret with Ray's token."""
        namespace, name = cluster["metadata"]["namespace"], cluster["metadata"]["name"]
        owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": name, "uid": cluster["metadata"]["uid"]}
        ports = [{"name": called, "port": port} for called, port in SERVICE_PORTS.items()]
        selector = {CLUSTER: name, TYPE: "head"}
        wanted: list[tuple[Resource, str, Manifest]] = [
            (SERVICES, head_service(cluster), {"spec": {"clusterIP": "None", "ports": ports, "selector": selector}})
        ]
        if cluster["spec"].get("authOptions", {}).get("mode") == "token":
            token = base64.b64encode(secrets.token_hex(32).encode())
            wanted.append((SECRETS, name, {"data": {"auth_token": token.decode()}}))
        for resource, called, manifest in wanted:
            if called not in [found["metadata"]["name"] for found in self._store.all(resource, namespace)]:
                metadata = {"name": called, "ownerReferences": [owner]}
                self._store.create(resource, namespace, {"metadata": metadata, **manifest})

    def _pods(self, cluster: Manifest, group: str = "") -> list[Manifest]:
        return [
            pod
            for pod in self._store.all(PODS, cluster["metadata"]["namespace"])
            if pod["metadata"].get("labels", {}).get(CLUSTER) == cluster["metadata"]["name"]
            and group in ("", pod["metadata"]["labels"][GROUP])
        ]

    def _reconcile_head(self, cluster: Manifest) -> bool:
        """Return whether there is a head, or could be made one."""
        pods = self._pods(cluster, HEAD_GROUP)
        if cluster["spec"].get("suspend"):
            self._delete(pods)
        elif not pods:
            return self._make(cluster, head_pod(cluster), "Head")
        else:
            self._delete([pod for pod in pods if _has_ended(pod)])
        return True

    def _reconcile_group(self, cluster: Manifest, group: Manifest) -> None:
        pods = self._pods(cluster, group["groupName"])
        if ended := [pod for pod in pods if _has_ended(pod)]:
            self._delete(ended)  # and nothing else in this turn
            return
        doomed = set(group.get("scaleStrategy", {}).get("workersToDelete") or ())
        self._delete([pod for pod in pods if pod["metadata"]["name"] in doomed])
        # A pod that is ending still counts, until it is gone.
        present = [pod for pod in pods if pod["metadata"]["name"] not in doomed]
        missing = self._wanted(cluster, group) - len(present)
        for _ in range(missing):
            if not self._make(cluster, worker_pod(cluster, group), "Worker"):
                return
        # With the autoscaler no pod is deleted that it does not name.
        if missing < 0 and (not is_autoscaled(cluster) or cluster["spec"].get("suspend")):
            self._delete(present[missing:])

    def _wanted(self, cluster: Manifest, group: Manifest) -> int:
        if cluster["spec"].get("suspend") or group.get("suspend"):
            return 0
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        replicas = max(least, min(most, group.get("replicas", least)))
        return int(replicas * group.get("numOfHosts", 1))

    def _make(self, cluster: Manifest, pod: Manifest, role: str) -> bool:
        namespace = cluster["metadata"]["namespace"]
        try:
            admit(self._store, PODS, pod, "Ignore")
            whole = with_pod_defaults(pod)
            keep_quotas(self._store, namespace, whole)
            self._store.create(PODS, namespace, whole)
        except ApiError as error:
            told = f"Failed to create {role.lower()} Pod for the RayCluster {namespace}/{cluster['metadata']['name']}"
            told += f", {error.message}"
            reason = f"FailedCreate{role}Pod: {error.message}"
            self._refused[cluster["metadata"]["uid"]] = time.monotonic(), reason
            record(self._store, RAY_CLUSTERS, cluster, "Warning", f"FailedToCreate{role}Pod", told)
            return False
        created = f"Created {role.lower()} Pod {namespace}/{pod['metadata']['name']}"
        record(self._store, RAY_CLUSTERS, cluster, "Normal", f"Created{role}Pod", created)
        return True

    def _delete(self, pods: list[Manifest]) -> None:
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
                self._store.delete(PODS, namespace, name, grace_s=grace_of(pod))


def _has_ended(pod: Manifest) -> bool:
    return pod["status"].get("phase") in ("Failed", "Succeeded") and "deletionTimestamp" not in pod["metadata"]
