"""A small RayCluster for tests."""

from tests.kube.status import Manifest


def ray_cluster(name: str = "mesh", *, replicas: int = 2, autoscaling: bool = True) -> Manifest:
    def group(container: str) -> Manifest:
        resources = {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "2", "memory": "1Gi"}}
        return {"spec": {"containers": [{"name": container, "image": "ray", "resources": resources}]}}

    workers = {"groupName": "experts", "replicas": replicas, "minReplicas": 1, "maxReplicas": 4}
    spec: Manifest = {
        "rayVersion": "2.60.0",
        "enableInTreeAutoscaling": autoscaling,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": group("ray-head")},
        "workerGroupSpecs": [
            {
                **workers,
                "labels": {"tier": "experts"},
                "rayStartParams": {},
                "template": group("ray-worker"),
                "scaleStrategy": {"workersToDelete": []},
            }
        ],
    }
    if autoscaling:
        spec["autoscalerOptions"] = {"version": "v2"}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": name}, "spec": spec}
