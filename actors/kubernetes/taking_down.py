"""Take a fleet on Kubernetes down: the Ray cluster first, then, when its pods are gone, what else `up` applied."""

import time
from pathlib import Path

from expertmesh.actors.kubernetes.applying import Say
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.actors.kubernetes.live import cluster_names, find_pods, find_ray, has_label
from expertmesh.actors.kubernetes.manifests import render
from expertmesh.cluster.errors import ConflictError, UnavailableError
from expertmesh.cluster.kubernetes.complaints import Cause
from expertmesh.cluster.kubernetes.objects import KEPT_KINDS, LABEL, Manifest, Wanted, name_of, resource_type
from expertmesh.cluster.kubernetes.settings import ProviderSettings

# What kubectl may take beside the wait that it was told of.
_SPARE_S = 60.0


def take_down(settings: ProviderSettings, cluster_name: str, named_in: Path | None, say: Say) -> list[str]:
    """Delete what `up` applied, volumes never, and wait until it is gone; return what was deleted.

    Args:
        settings: of the cluster; the manifests tell which kinds of objects there are to look for.
        cluster_name: of the RayCluster or RayService.
        named_in: the file that has the settings; None: files are looked for from the working directory.
        say: takes a line of progress.

    Raises:
        ConflictError: the Ray cluster is there and was not applied by `up`.
        UnavailableError: pods were not gone in time.
        ExpertMeshError: the server refused something, or cannot be asked. `down` again goes on.
    """
    kubectl = Kubectl(settings)
    wanted = render(kubectl, cluster_name, named_in)
    ray = find_ray_or_none(kubectl, cluster_name)
    deleted: list[str] = []
    if ray is not None:
        if not has_label(ray, cluster_name):
            raise ConflictError(
                f"{name_of(ray)} was not applied by `up`: it has no label {LABEL}={cluster_name}; "
                f"{kubectl.shown()} delete {ray['kind'].lower()} {cluster_name} deletes it"
            )
        resource = f"{ray['kind'].lower()}s.ray.io/{cluster_name}"
        names = cluster_names(ray, cluster_name)
        kubectl.run("delete", resource, "--wait=false", "--ignore-not-found")
        say(f"{resource} is deleted; waiting for its pods, which let their streams end")
        deleted.append(resource)
    else:
        names = [cluster_name]
    _wait_until_gone(kubectl, cluster_name, names, say)
    for namespace, kind in applied_types(wanted, settings.namespace):
        for line in _delete_labelled(kubectl, namespace, kind, cluster_name):
            say(f"{line} is deleted")
            deleted.append(line)
    return deleted


def find_ray_or_none(kubectl: Kubectl, cluster_name: str) -> Manifest | None:
    """Return the Ray cluster, None also where the server does not know KubeRay's kinds any more."""
    answer = kubectl.ask("get", "--raw", "/apis/ray.io/v1")
    if answer.complaint is not None:
        if answer.complaint.cause is Cause.NOT_FOUND:
            return None
        raise answer.complaint.error()
    return find_ray(kubectl, cluster_name)


def applied_types(wanted: Wanted, namespace: str) -> list[tuple[str, str]]:
    """Return the namespaces and kinds of what `up` applies beside the Ray cluster, and `down` deletes."""
    found = [manifest for manifest in wanted.others if manifest["kind"] not in KEPT_KINDS]
    return list(dict.fromkeys((each["metadata"].get("namespace", namespace), resource_type(each)) for each in found))


def remains(settings: ProviderSettings, cluster_name: str, named_in: Path | None) -> bool:
    """Return whether anything that `up` applied is there.

    Raises:
        ExpertMeshError: the server cannot be asked.
    """
    kubectl = Kubectl(settings)
    if find_ray_or_none(kubectl, cluster_name) is not None:
        return True
    types = applied_types(render(kubectl, cluster_name, named_in), settings.namespace)
    return any(_labelled(kubectl, namespace, kind, cluster_name) for namespace, kind in types)


def _wait_until_gone(kubectl: Kubectl, cluster_name: str, names: list[str], say: Say) -> None:
    settings = kubectl.settings
    began_s, said = time.monotonic(), ""
    while True:
        try:
            pods = find_pods(kubectl, names)
            ray = find_ray_or_none(kubectl, cluster_name)
            left = [pod["metadata"]["name"] for pod in pods] or ([name_of(ray)] if ray is not None else [])
            line = f"{len(left)} left: {', '.join(sorted(left))}"
        except UnavailableError as error:
            left, line = ["?"], str(error)
        if not left:
            return
        if time.monotonic() - began_s > settings.timeout_s:
            raise UnavailableError(
                f"not gone within {settings.timeout_s:g} s: {line}; see {kubectl.shown()} describe pods"
            )
        if line != said and time.monotonic() - began_s >= 2.0:
            say(line)
            said = line
        time.sleep(settings.poll_s)


def _labelled(kubectl: Kubectl, namespace: str, kind: str, cluster_name: str) -> list[str]:
    answer = kubectl.ask("get", kind, f"--selector={LABEL}={cluster_name}", "--output=name", namespace=namespace)
    if answer.complaint is not None:
        if answer.complaint.cause is Cause.NO_KIND:
            return []  # of a kind that the server does not know there is nothing
        raise answer.complaint.error()
    return answer.out.split()


def _delete_labelled(kubectl: Kubectl, namespace: str, kind: str, cluster_name: str) -> list[str]:
    names = _labelled(kubectl, namespace, kind, cluster_name)
    if names:
        timeout_s = kubectl.settings.timeout_s
        options = ["--ignore-not-found", f"--timeout={timeout_s:g}s"]
        kubectl.run("delete", *names, *options, namespace=namespace, timeout_s=timeout_s + _SPARE_S)
    return names
