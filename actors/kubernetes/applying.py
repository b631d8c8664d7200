"""Objects put on the server: the Ray cluster so that its autoscaler keeps what it has, others by `kubectl apply`."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from expertmesh.actors.kubernetes.kubectl import Answer, Kubectl
from expertmesh.cluster.errors import ConflictError, NotFoundError
from expertmesh.cluster.kubernetes.complaints import Cause, missing_kind
from expertmesh.cluster.kubernetes.objects import RAY_API, Manifest, Wanted, changed_groups, merged, name_of

Say = Callable[[str], None]

# Ray's autoscaler writes at most once in five seconds: a second conflict in a row is rare, a fifth is another matter.
_TRIES = 5


def require_kuberay(kubectl: Kubectl, kind: str) -> None:
    """Ask the server for KubeRay's kinds: the first question, which finds out whether it can be asked at all.

    Raises:
        NotFoundError: KubeRay is not installed.
        ExpertMeshError: the server cannot be asked.
    """
    answer = kubectl.ask("get", "--raw", f"/apis/{RAY_API}")
    if answer.complaint is not None:
        if answer.complaint.cause in (Cause.NOT_FOUND, Cause.NO_KIND):
            raise NotFoundError(missing_kind(kind, RAY_API, kubectl.shown()).line)
        raise answer.complaint.error()
    if kind not in {resource["kind"] for resource in json.loads(answer.out)["resources"]}:
        raise NotFoundError(missing_kind(kind, RAY_API, kubectl.shown()).line)


def apply_others(kubectl: Kubectl, objects: Sequence[Manifest], say: Say, *, is_dry: bool = False) -> list[str]:
    """Apply everything but the Ray cluster, and return kubectl's word for each, as in `service/a created`.

    Raises:
        ExpertMeshError: something was refused. What was applied before and after it has been said.
    """
    by_namespace: dict[str, list[Manifest]] = defaultdict(list)
    for found in objects:
        by_namespace[found["metadata"].get("namespace", kubectl.settings.namespace)].append(found)
    done: list[str] = []
    for namespace, items in by_namespace.items():
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        dry = ["--dry-run=server"] if is_dry else []
        answer = kubectl.ask("apply", "--filename=-", *dry, stdin=text, namespace=namespace)
        lines = [line.strip() for line in answer.out.splitlines() if line.strip()]
        done += lines
        for line in lines:
            if not line.endswith(" unchanged"):
                say(line)
        if answer.complaint is not None:
            raise answer.complaint.error()
    return done


def put_ray(kubectl: Kubectl, wanted: Wanted, say: Say, *, is_dry: bool = False) -> str:
    """Create the Ray cluster, or replace a live one by what it is to be; return a word as kubectl's.

    Raises:
        ConflictError: it is being deleted, or was changed by somebody else again and again.
        ExpertMeshError: the server refused it, or cannot be asked.
    """
    resource = f"{wanted.ray['kind'].lower()}s.ray.io/{wanted.name}"
    for _ in range(_TRIES):
        live = kubectl.find(resource)
        if live and "deletionTimestamp" in live[0]["metadata"]:
            raise ConflictError(f"{name_of(wanted.ray)} is being deleted; try again when it is gone")
        answer = _write(kubectl, merged(live[0], wanted.ray) if live else wanted.ray, bool(live), is_dry)
        if answer.complaint is None:
            word = f"{resource} {_what_was_done(live, json.loads(answer.out))}"
            say(word)
            if live:
                _tell_of_old_pods(live[0], json.loads(answer.out), say)
            return word
        if answer.complaint.cause not in (Cause.CONFLICT, Cause.ALREADY_EXISTS, Cause.NOT_FOUND):
            raise answer.complaint.error()
        say(f"{name_of(wanted.ray)} was changed meanwhile; it is read again")
    raise ConflictError(
        f"{name_of(wanted.ray)} was changed by others each of {_TRIES} times that it was about to be replaced; "
        f"try again, and see {kubectl.shown()} get {resource} -o yaml --show-managed-fields"
    )


def _tell_of_old_pods(before: Manifest, after: Manifest, say: Say) -> None:
    groups = changed_groups(before, after)
    if groups:
        say(
            f"pods of {', '.join(groups)} that run stay as they are, new ones are as is wanted now; `down` and `up` "
            "renew all, a RayService does it while it serves"
        )


def _write(kubectl: Kubectl, manifest: Manifest, is_there: bool, is_dry: bool) -> Answer:
    verb = "replace" if is_there else "create"
    dry = ["--dry-run=server"] if is_dry else []
    return kubectl.ask(verb, "--filename=-", "--output=json", *dry, stdin=json.dumps(manifest))


def _what_was_done(live: Sequence[Manifest], now: dict[str, Any]) -> str:
    if not live:
        return "created"
    is_same = live[0]["metadata"].get("resourceVersion") == now["metadata"].get("resourceVersion")
    return "unchanged" if is_same else "replaced"
