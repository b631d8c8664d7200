"""The verbs of the API on the objects, without HTTP: who may, what is changed, what is answered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.kube.admission import admit, keep_quotas, with_pod_defaults
from tests.kube.authorization import Access, Authorizer
from tests.kube.eviction import evict
from tests.kube.patches import json_patch, merge_patch
from tests.kube.resources import BUILTIN, CRDS, PODS, REVIEWS, Path, Resource, custom_resources
from tests.kube.selectors import Matches, by_fields, by_labels
from tests.kube.status import ApiError, Manifest
from tests.kube.store import Store, grace_of
from tests.kube.strategic import strategic_merge

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCHES = ("application/apply-patch+yaml", "application/apply-patch+json")


@dataclass(frozen=True)
class Call:
    """A request. body is what was sent, parsed."""

    user: str
    verb: str
    path: Path
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    content_type: str = ""

    @property
    def strictness(self) -> str:
        return self.query.get("fieldValidation") or "Warn"

    @property
    def dry_run(self) -> bool:
        return self.query.get("dryRun") == "All"

    @property
    def resource_name(self) -> str:
        """The resource with its subresource, as rules and faults name it."""
        return f"{self.path.plural}/{self.path.subresource}" if self.path.subresource else self.path.plural


@dataclass(frozen=True)
class Answer:
    """An answer, and what the client is to be warned of."""

    code: int
    body: Manifest
    warnings: list[str] = field(default_factory=list)


class Api:
    """The verbs. Each call is authorized first; wrong ones raise ApiError."""

    def __init__(self, store: Store, authorizer: Authorizer) -> None:
        self.store = store
        self._authorizer = authorizer

    def resources(self) -> list[Resource]:
        return [*BUILTIN, *custom_resources(self.store.view(CRDS))]

    def authorize(self, call: Call) -> Resource:
        """Return the kind that a call is about, if its user may.

        Raises:
            ApiError: 403, or 404 where the server has no such kind.
        """
        path = call.path
        for resource in self.resources():
            if (resource.group, resource.version, resource.plural) == (path.group, path.version, path.plural):
                if path.subresource and path.subresource not in resource.subresources:
                    break
                access = Access(call.user, call.verb, path.group, call.resource_name, path.namespace, path.name)
                if resource != REVIEWS:  # everybody may ask what he may
                    self._authorizer.check(access)
                return resource
        raise ApiError(404, "the server could not find the requested resource")

    def selection(self, call: Call) -> Matches:
        """Return which objects a list or a watch is about."""
        labels, fields = by_labels(call.query.get("labelSelector", "")), by_fields(call.query.get("fieldSelector", ""))
        return lambda found: labels(found) and fields(found)

    def handle(self, call: Call) -> Answer:
        """Answer a call that is no watch and no stream."""
        resource = self.authorize(call)
        match call.verb:
            case "get":
                return Answer(200, self._as(resource, self.store.get(resource, call.path.namespace, call.path.name)))
            case "list":
                return self._list(resource, call)
            case "create":
                if call.path.subresource == "eviction":
                    evict(self.store, call.path.namespace, call.path.name, _object(call.body).get("deleteOptions", {}))
                    return Answer(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
                return self._review(call) if resource == REVIEWS else self._create(resource, call, call.body)
            case "update":
                return self._change(resource, call, lambda found: _object(call.body))
            case "patch":
                return self._patch(resource, call)
            case "delete":
                return self._delete(resource, call)
        raise ApiError(405, "the server does not allow this method on the requested resource")

    def _as(self, resource: Resource, found: Manifest) -> Manifest:
        """Return an object in the version that was asked for."""
        return {**found, "apiVersion": resource.api_version}

    def _list(self, resource: Resource, call: Call) -> Answer:
        matches = self.selection(call)
        with self.store.locked():
            found = [
                self._as(resource, item) for item in self.store.all(resource, call.path.namespace) if matches(item)
            ]
            version = str(self.store.version)
        kind = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return Answer(200, {**kind, "metadata": {"resourceVersion": version}, "items": found})

    def _create(self, resource: Resource, call: Call, manifest: Any) -> Answer:
        namespace = call.path.namespace
        sent = _object(manifest)
        named = sent.get("metadata", {}).get("namespace", namespace)
        if named != namespace and resource.namespaced:
            raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
        made, warnings = admit(self.store, resource, sent, call.strictness)
        if resource.has_status:
            made.pop("status", None)
        with self.store.locked():
            if resource == PODS:
                made = with_pod_defaults(made)
                keep_quotas(self.store, namespace, made)
            return Answer(201, self.store.create(resource, namespace, made, dry_run=call.dry_run), warnings)

    def _change(self, resource: Resource, call: Call, change: Callable[[Manifest], Manifest]) -> Answer:
        told: list[str] = []

        def changed(found: Manifest) -> Manifest:
            made = change(self._as(resource, found))
            if call.path.subresource == "status":
                return {**found, "status": made.get("status")}
            made, warnings = admit(self.store, resource, made, call.strictness)
            told.extend(warnings)
            if resource.has_status:
                made = {**made, "status": found["status"]} if "status" in found else _without(made, "status")
            return made

        path = call.path
        stored = self.store.update(resource, path.namespace, path.name, changed, dry_run=call.dry_run)
        return Answer(200, self._as(resource, stored), told)

    def _patch(self, resource: Resource, call: Call) -> Answer:
        custom = resource not in BUILTIN
        match call.content_type:
            case "application/json-patch+json":
                return self._change(resource, call, lambda found: json_patch(found, call.body))
            case "application/merge-patch+json":
                return self._change(resource, call, lambda found: merge_patch(found, _object(call.body)))
            case "application/strategic-merge-patch+json" if not custom:
                return self._change(resource, call, lambda found: strategic_merge(found, _object(call.body)))
            case kind if kind in APPLY_PATCHES:
                return self._apply(resource, call)
        supported = [JSON_PATCH, MERGE_PATCH, *APPLY_PATCHES, *([] if custom else [STRATEGIC_PATCH])]
        raise ApiError(415, f"the body of the request was in an unknown format - accepted media types: {supported}")

    def _apply(self, resource: Resource, call: Call) -> Answer:
        """Server-side apply, without the ownership of fields: what is applied is merged, and nothing conflicts."""
        sent = _object(call.body)
        name = call.path.name
        with self.store.locked():
            if not any(found["metadata"]["name"] == name for found in self.store.all(resource, call.path.namespace)):
                return self._create(resource, call, {**sent, "metadata": {**sent.get("metadata", {}), "name": name}})
            merge = strategic_merge if resource in BUILTIN else merge_patch
            return self._change(resource, call, lambda found: merge(found, sent))

    def _delete(self, resource: Resource, call: Call) -> Answer:
        path, options = call.path, call.body if isinstance(call.body, dict) else {}
        with self.store.locked():
            found = self.store.get(resource, path.namespace, path.name)
            asked = options.get("preconditions", {}).get("uid")
            if asked not in (None, found["metadata"]["uid"]):
                raise ApiError(409, f"Precondition failed: UID in precondition: {asked}")
            query_s = call.query.get("gracePeriodSeconds")
            grace_s = options.get("gracePeriodSeconds", int(query_s) if query_s else None)
            orphan = options.get("propagationPolicy", call.query.get("propagationPolicy")) == "Orphan"
            if not call.dry_run:
                found = self.store.delete(
                    resource, path.namespace, path.name, grace_s=grace_of(found, grace_s), orphan=orphan
                )
        if "deletionTimestamp" in found["metadata"]:
            return Answer(200, self._as(resource, found))
        details = {"name": path.name, "group": path.group, "kind": path.plural, "uid": found["metadata"]["uid"]}
        return Answer(
            200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        )

    def _review(self, call: Call) -> Answer:
        asked = _object(call.body)["spec"].get("resourceAttributes", {})
        resource = asked.get("resource", "") + (f"/{asked['subresource']}" if asked.get("subresource") else "")
        access = Access(
            call.user,
            asked.get("verb", ""),
            asked.get("group", ""),
            resource,
            asked.get("namespace", ""),
            asked.get("name", ""),
        )
        return Answer(201, {**call.body, "status": {"allowed": self._authorizer.allows(access)}})


def _object(body: Any) -> Manifest:
    if not isinstance(body, dict):
        raise ApiError(400, "the object provided is unrecognized (must be of type object)")
    return dict(body)


def _without(manifest: Manifest, key: str) -> Manifest:
    return {name: value for name, value in manifest.items() if name != key}
