"""The pods that KubeRay 1.7 makes of a RayCluster, as far as Ray and its autoscaler depend on it.

Left out: init containers (whoever runs a worker waits for the head), probes, TLS, GCS fault tolerance.
"""

import copy
import json
import math
import secrets
import shlex

from tests.kube.admission import amount
from tests.kube.status import Manifest

CLUSTER = "ray.io/cluster"
TYPE = "ray.io/node-type"
GROUP = "ray.io/group"
IS_RAY = "ray.io/is-ray-node"
HEAD_GROUP = "headgroup"
GCS_PORT = "6379"


def head_pod(cluster: Manifest) -> Manifest:
    return _pod(cluster, cluster["spec"]["headGroupSpec"], HEAD_GROUP)


def worker_pod(cluster: Manifest, group: Manifest) -> Manifest:
    return _pod(cluster, group, group["groupName"])


def is_autoscaled(cluster: Manifest) -> bool:
    return bool(cluster["spec"].get("enableInTreeAutoscaling"))


def head_service(cluster: Manifest) -> str:
    return f"{cluster['metadata']['name']}-head-svc"


def _pod(cluster: Manifest, group: Manifest, group_name: str) -> Manifest:
    head = group_name == HEAD_GROUP
    name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
    template = copy.deepcopy(group["template"])
    spec = template["spec"]
    labels = {
        **group.get("labels", {}),
        **template.get("metadata", {}).get("labels", {}),
        CLUSTER: name,
        TYPE: "head" if head else "worker",
        GROUP: group_name,
        IS_RAY: "yes",
        "ray.io/identifier": f"{name}-{'head' if head else 'worker'}",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    ray, *_ = spec["containers"]
    start = f"ulimit -n 65536; ray start {'--head ' if head else ''}{_options(_parameters(cluster, group, head))}"
    ray |= {"command": ["/bin/bash", "-c", "--"], "args": [start]}
    ray["env"] = _environment(cluster, head, start) + ray.get("env", [])
    if is_autoscaled(cluster):
        spec["restartPolicy"] = "Never"  # with autoscaler v2, which replaces pods
        if head:
            spec["containers"].append(_autoscaler(cluster, ray))
    named = {"name": f"{name}-head"} if head else {"name": f"{name}-{group_name}-worker-{secrets.token_hex(3)[:5]}"}
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": name, "uid": cluster["metadata"]["uid"]}
    owners = {"ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}]}
    annotations = template.get("metadata", {}).get("annotations", {})
    metadata = {**named, "namespace": namespace, "labels": labels, "annotations": annotations, **owners}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _parameters(cluster: Manifest, group: Manifest, head: bool) -> dict[str, str]:
    """Return the options of `ray start`: the group's own, and what KubeRay adds."""
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    added = {"block": "true", "metrics-export-port": "8080"}
    if "cpu" in limits:
        added["num-cpus"] = str(math.ceil(amount(limits["cpu"])))
    if "memory" in limits:
        added["memory"] = str(int(amount(limits["memory"])))
    gpus = [quantity for name, quantity in limits.items() if name.endswith("gpu")]
    if gpus:
        added["num-gpus"] = str(gpus[0])
    if group.get("labels"):
        added["labels"] = ",".join(f"{key}={value}" for key, value in sorted(group["labels"].items()))
    if head:
        added["dashboard-host"] = "0.0.0.0"  # noqa: S104
        if is_autoscaled(cluster):
            added["no-monitor"] = "true"
    else:
        added["address"] = f"{head_service(cluster)}.{cluster['metadata']['namespace']}.svc.cluster.local:{GCS_PORT}"
    return {**added, **group.get("rayStartParams", {})}


def _options(parameters: dict[str, str]) -> str:
    words = []
    for name, value in sorted(parameters.items()):
        if value == "true":
            words.append(f"--{name}")
        elif value != "false":
            words.append(f"--{name}={shlex.quote(value)}")
    return " ".join(words)


def _from_field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _environment(cluster: Manifest, head: bool, start: str) -> list[Manifest]:
    name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
    service = f"{head_service(cluster)}.{namespace}.svc.cluster.local"
    address = "127.0.0.1" if head else service
    made = [
        _from_field("RAY_CLUSTER_NAME", f"metadata.labels['{CLUSTER}']"),
        _from_field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _from_field("RAY_NODE_TYPE_NAME", f"metadata.labels['{GROUP}']"),
        {"name": "KUBERAY_GEN_RAY_START_CMD", "value": start},
        {"name": "RAY_PORT", "value": GCS_PORT},
        {"name": "RAY_ADDRESS", "value": f"{address}:{GCS_PORT}"},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
    ]
    if head and is_autoscaled(cluster):
        made.append({"name": "RAY_enable_autoscaler_v2", "value": "true"})
    if not head:
        made.append({"name": "FQ_RAY_IP", "value": service})
    if cluster["spec"].get("authOptions", {}).get("mode") == "token":
        made += _token(name)
    return made


def _token(name: str) -> list[Manifest]:
    secret = {"secretKeyRef": {"name": name, "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]


def _autoscaler(cluster: Manifest, ray: Manifest) -> Manifest:
    """Return the container that KubeRay puts beside the head's."""
    options = cluster["spec"].get("autoscalerOptions", {})
    given = {key: options[key] for key in ("resources", "securityContext", "volumeMounts") if key in options}
    command = "ray kuberay-autoscaler --cluster-name $(RAY_CLUSTER_NAME) --cluster-namespace $(RAY_CLUSTER_NAMESPACE)"
    env = [
        _from_field("RAY_CLUSTER_NAME", f"metadata.labels['{CLUSTER}']"),
        _from_field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _from_field("RAY_HEAD_POD_NAME", "metadata.name"),
        {"name": "KUBERAY_CRD_VER", "value": "v1"},
        *(variable for variable in ray["env"] if variable["name"] in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")),
        *options.get("env", []),
    ]
    image = options.get("image", ray["image"])
    return {
        "name": "autoscaler",
        "image": image,
        "command": ["/bin/bash", "-c", "--"],
        "args": [command],
        "env": json.loads(json.dumps(env)),
        **given,
    }
