"""Events: what controllers tell of an object, as `kubectl describe` shows it."""

from tests.kube.resources import EVENTS, Resource
from tests.kube.status import Manifest
from tests.kube.store import Store, now


def record(store: Store, resource: Resource, about: Manifest, kind: str, reason: str, message: str) -> None:
    """Store an event (Normal or Warning) of an object; the same one again is counted."""
    metadata = about["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    with store.locked():
        for found in store.all(EVENTS, namespace):
            same = (found["involvedObject"]["uid"], found["reason"], found["message"])
            if same == (metadata["uid"], reason, message):
                store.update(EVENTS, namespace, found["metadata"]["name"], _counted)
                return
        involved = {"apiVersion": resource.api_version, "kind": resource.kind}
        involved |= {"name": name, "namespace": namespace, "uid": metadata["uid"]}
        told = {"type": kind, "reason": reason, "message": message, "source": {"component": "fake"}}
        times = {"count": 1, "firstTimestamp": now(), "lastTimestamp": now()}
        made = {"metadata": {"generateName": f"{name}."}, "involvedObject": involved, **told, **times}
        store.create(EVENTS, namespace, made)


def _counted(event: Manifest) -> Manifest:
    return {**event, "count": event["count"] + 1, "lastTimestamp": now()}
