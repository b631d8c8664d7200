"""The objects of a cluster: versions, what changed when, and what goes with whom."""

import copy
import datetime
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.kube.resources import NAMESPACES, Resource
from tests.kube.status import ApiError, Manifest, already_exists, conflict, not_found

_NAME_TRIES = 8  # of a generated name, as the API server
Key = tuple[str, str, str, str]  # group, plural, namespace, name


@dataclass(frozen=True)
class Change:
    """One change. before is None for a new object, after for one that is gone."""

    version: int
    key: Key
    before: Manifest | None
    after: Manifest | None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def key_of(resource: Resource, namespace: str, name: str) -> Key:
    return resource.group, resource.plural, namespace if resource.namespaced else "", name


class Store:
    """Objects by key, under one lock. What it returns is the caller's own copy; what it is given, it copies."""

    def __init__(self) -> None:
        self._objects: dict[Key, Manifest] = {}
        self._changed = threading.Condition(threading.RLock())
        self._listeners: list[Callable[[], None]] = []
        self.changes: list[Change] = []

    @property
    def version(self) -> int:
        return len(self.changes)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call a function, which may not block, after each change; what is returned ends that."""
        with self._changed:
            self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes anything in the block."""
        with self._changed:
            yield

    def wait(self, version: int, timeout_s: float) -> bool:
        """Wait until there is something newer than this version, and say whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.version > version, timeout_s)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait until a condition on the objects holds; it is asked again at each change."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "the objects are not as expected"
            with self._changed:
                self._changed.wait(0.5)

    def get(self, resource: Resource, namespace: str, name: str) -> Manifest:
        with self._changed:
            found = self._objects.get(key_of(resource, namespace, name))
            if found is None:
                raise not_found(resource.plural, resource.group, name)
            return copy.deepcopy(found)

    def all(self, resource: Resource, namespace: str = "") -> list[Manifest]:
        """Return the objects of a kind by name; of one namespace, or with none named, of all."""
        return copy.deepcopy(self.view(resource, namespace))

    def view(self, resource: Resource, namespace: str = "") -> list[Manifest]:
        """Return what `all` does, but the objects themselves, which nobody may change: definitions are large."""
        with self._changed:
            return [
                found
                for (group, plural, place, _), found in sorted(self._objects.items())
                if (group, plural) == (resource.group, resource.plural) and namespace in ("", place)
            ]

    def create(self, resource: Resource, namespace: str, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        made = copy.deepcopy(manifest)
        metadata = made.setdefault("metadata", {})
        with self._changed:
            metadata["name"] = self._name_for(resource, namespace, metadata)
            key = key_of(resource, namespace, metadata["name"])
            if key in self._objects:
                raise already_exists(resource.plural, resource.group, metadata["name"])
            if resource.namespaced:
                self.get(NAMESPACES, "", namespace)
                metadata["namespace"] = namespace
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            made |= {"apiVersion": resource.api_version, "kind": resource.kind}
            return made if dry_run else self._commit(key, made)

    def _name_for(self, resource: Resource, namespace: str, metadata: Manifest) -> str:
        """Return a new object's own name, or one that is made of `generateName` and is free if a few tries find one."""
        name = str(metadata.get("name") or "")
        if not name and not metadata.get("generateName"):
            raise ApiError(422, "name or generateName is required")
        for _ in range(0 if name else _NAME_TRIES):
            name = metadata["generateName"] + secrets.token_hex(3)[:5]
            if key_of(resource, namespace, name) not in self._objects:
                break
        return name

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Manifest], Manifest],
        *,
        dry_run: bool = False,
    ) -> Manifest:
        """Replace an object by what a function makes of it. One whose last finalizer goes while it is deleted is gone.

        Raises:
            ApiError: 409 if the new object names another version than the old one has.
        """
        key = key_of(resource, namespace, name)
        with self._changed:
            found = self.get(resource, namespace, name)
            changed = change(copy.deepcopy(found))
            changed.setdefault("metadata", {})
            named = changed["metadata"].get("resourceVersion")
            if named not in (None, "", found["metadata"]["resourceVersion"]):
                raise conflict(resource.plural, resource.group, name)
            kept = ("uid", "creationTimestamp", "name", "namespace", "generation", "deletionTimestamp")
            changed["metadata"] |= {item: found["metadata"][item] for item in kept if item in found["metadata"]}
            changed["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
            changed |= {"apiVersion": resource.api_version, "kind": resource.kind}
            if changed == found or dry_run:
                return changed
            if changed.get("spec") != found.get("spec"):
                changed["metadata"]["generation"] += 1
            metadata = changed["metadata"]
            waits = "deletionGracePeriodSeconds" in metadata or metadata.get("finalizers")
            if "deletionTimestamp" in metadata and not waits:
                return self._remove(key, changed)
            return self._commit(key, changed)

    def delete(
        self, resource: Resource, namespace: str, name: str, *, grace_s: int = 0, orphan: bool = False
    ) -> Manifest:
        """Delete an object: at once, or mark it where it has a grace period or finalizers.

        Args:
            resource: its kind.
            namespace: where it is.
            name: of the object.
            grace_s: how long whoever runs it has; he calls `remove` when it has ended.
            orphan: what it owns stays.
        """
        key = key_of(resource, namespace, name)
        with self._changed:
            found = self.get(resource, namespace, name)
            metadata = found["metadata"]
            if orphan:
                self._disown(metadata["uid"])
            if grace_s:
                grace_s = min(grace_s, metadata.get("deletionGracePeriodSeconds", grace_s))
                marks = {"deletionTimestamp": now(), "deletionGracePeriodSeconds": grace_s}
                found["metadata"] = marks | metadata | {"deletionGracePeriodSeconds": grace_s}
                return self._commit(key, found)
            if metadata.get("finalizers"):
                metadata.setdefault("deletionTimestamp", now())
                return self._commit(key, found)
            return self._remove(key, found)

    def remove(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Take away an object that has ended, if it is still there."""
        key = key_of(resource, namespace, name)
        with self._changed:
            found = self._objects.get(key)
            if found is not None and found["metadata"]["uid"] == uid:
                self._remove(key, copy.deepcopy(found))

    def _commit(self, key: Key, manifest: Manifest) -> Manifest:
        manifest["metadata"]["resourceVersion"] = str(self.version + 1)
        self._record(key, self._objects.get(key), manifest)
        self._objects[key] = manifest
        return copy.deepcopy(manifest)

    def _remove(self, key: Key, last: Manifest) -> Manifest:
        last["metadata"]["resourceVersion"] = str(self.version + 1)
        del self._objects[key]
        self._record(key, last, None)
        uid = last["metadata"]["uid"]
        owned = [
            found
            for found, manifest in self._objects.items()
            if (key[:2] == ("", "namespaces") and found[2] == key[3])
            or any(owner["uid"] == uid for owner in manifest["metadata"].get("ownerReferences", ()))
        ]
        for group, plural, namespace, name in owned:
            if (group, plural, namespace, name) in self._objects:
                manifest = self._objects[group, plural, namespace, name]
                resource = Resource(group, "", "", plural, bool(namespace))
                self.delete(resource, namespace, name, grace_s=grace_of(manifest))
        return copy.deepcopy(last)

    def _disown(self, uid: str) -> None:
        for key, found in list(self._objects.items()):
            owners = found["metadata"].get("ownerReferences", [])
            left = [owner for owner in owners if owner["uid"] != uid]
            if left != owners:
                kept = copy.deepcopy(found)
                kept["metadata"]["ownerReferences"] = left
                self._commit(key, kept)

    def _record(self, key: Key, before: Manifest | None, after: Manifest | None) -> None:
        self.changes.append(Change(self.version + 1, key, before, after))
        self._changed.notify_all()
        for listener in list(self._listeners):
            listener()


def grace_of(manifest: Manifest, asked_s: int | None = None) -> int:
    """Return how long an object has to end, in seconds: a pod that is on a node as long as it says, others none."""
    if manifest["kind"] != "Pod" or not manifest["spec"].get("nodeName"):
        return 0
    if manifest.get("status", {}).get("phase") in ("Failed", "Succeeded"):
        return 0
    own_s: int = manifest["spec"].get("terminationGracePeriodSeconds", 30)
    return own_s if asked_s is None else asked_s
