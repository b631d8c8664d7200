"""Bring a fleet up on Kubernetes: apply, wait for the head, deploy the application, wait until it serves."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertmesh.actors.kubernetes.applying import Say, apply_others, put_ray, require_kuberay
from expertmesh.actors.kubernetes.head import ApplicationStates, application_states, deploy, failure_of
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.actors.kubernetes.live import Picture, find_ray
from expertmesh.actors.kubernetes.manifests import read_application, render
from expertmesh.actors.kubernetes.waiting import Waiting
from expertmesh.cluster.errors import ConflictError, ExpertMeshError, UnavailableError
from expertmesh.cluster.kubernetes.objects import Wanted, name_of
from expertmesh.cluster.kubernetes.settings import ProviderSettings

# `serve status` takes a second or two of the head's one or two cores.
_STATUS_PERIOD_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `up` brought up.

    applied: kubectl's word for each object; services: addresses within the cluster, by name; application: its state,
    empty where there is none.
    """

    cluster: str
    namespace: str
    applied: list[str]
    application: str
    services: dict[str, list[str]]
    next_steps: list[str]
    took_s: float


def bring_up(settings: ProviderSettings, cluster_name: str, named_in: Path | None, say: Say) -> Outcome:
    """Apply the manifests, new or changed, and wait until what they describe serves.

    Args:
        settings: of the cluster.
        cluster_name: of the RayCluster or RayService.
        named_in: the file that has the settings, beside which files are looked for; None: in the working directory.
        say: takes a line of progress.

    Raises:
        ExpertMeshError: one line that says what is wrong and how to see more. What was applied stays, and was said.
    """
    began_s = time.monotonic()
    kubectl = Kubectl(settings)
    wanted = render(kubectl, cluster_name, named_in)
    to_deploy = None if wanted.is_service else read_application(settings, named_in)
    _require_kind(kubectl, wanted)
    applied: list[str] = []

    def note(line: str) -> None:
        applied.append(line)
        say(line)

    try:
        done = apply_others(kubectl, wanted.others, note)
        done.append(put_ray(kubectl, wanted, note))
        application = _serve(kubectl, wanted, to_deploy, say)
    except (ExpertMeshError, KeyboardInterrupt):
        if applied:
            say(f"not finished; what was applied stays: `down` removes it, `up` again goes on ({settings.namespace})")
        raise
    return Outcome(
        cluster=cluster_name,
        namespace=settings.namespace,
        applied=done,
        application=application,
        services=_services(wanted, settings.namespace),
        next_steps=_next_steps(kubectl, wanted),
        took_s=round(time.monotonic() - began_s, 1),
    )


def try_out(settings: ProviderSettings, cluster_name: str, named_in: Path | None, say: Say) -> Wanted:
    """Return what would be applied, after the server was asked what it would say to it; it changes nothing.

    Raises:
        InputError: the manifests are of no use.
        UnavailableError: the server cannot be reached.
        ExpertMeshError: it would refuse something.
    """
    kubectl = Kubectl(settings)
    wanted = render(kubectl, cluster_name, named_in)
    _require_kind(kubectl, wanted)
    apply_others(kubectl, wanted.others, say, is_dry=True)
    put_ray(kubectl, wanted, lambda line: say(f"{line} (server dry run)"), is_dry=True)
    return wanted


def _require_kind(kubectl: Kubectl, wanted: Wanted) -> None:
    """Find out whether the server can be asked, has KubeRay, and has no fleet of the other kind under this name."""
    kind = wanted.ray["kind"]
    require_kuberay(kubectl, kind)
    live = find_ray(kubectl, wanted.name)
    if live is not None and live["kind"] != kind:
        raise ConflictError(
            f"the namespace {kubectl.settings.namespace} has the {name_of(live)}, and the manifests have a {kind} of "
            "that name: take it down first"
        )


def _serve(kubectl: Kubectl, wanted: Wanted, to_deploy: tuple[Path, str] | None, say: Say) -> str:
    """Wait for what serves; return a word about the application."""
    waiting = Waiting(kubectl, wanted.name, say)
    if wanted.is_service:
        waiting.until(f"{name_of(wanted.ray)} is to be ready", _is_service_ready)
        return "RUNNING"
    waiting.until("the head is to be ready", lambda picture: picture.is_head_ready)
    if to_deploy is None:
        say("the head is ready; there is no application to deploy")
        return ""
    file, text = to_deploy
    say(f"the head is ready; deploying {file.name}")
    waiting.until("the application is to be deployed", _deployed(kubectl, text))
    application = _Application(kubectl)
    waiting.until("the application is to serve", application.serves, application)
    return "RUNNING"


def _deployed(kubectl: Kubectl, text: str) -> Callable[[Picture], bool]:
    def is_reached(picture: Picture) -> bool:
        if picture.head is None or not picture.is_head_ready:
            return False
        deploy(kubectl, picture.head, text)
        return True

    return is_reached


class _Application:
    """What Ray Serve says of the applications, asked now and then."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl
        self._asked_s = float("-inf")
        self._error: UnavailableError | None = None
        self.states: ApplicationStates | None = None

    def serves(self, picture: Picture) -> bool:
        """Return whether all run.

        Raises:
            UnavailableError: Serve could not be asked the last time.
            ExpertMeshError: it gave one up.
        """
        if picture.head is None or not picture.is_head_ready:
            return False
        now_s = time.monotonic()
        if now_s - self._asked_s < _STATUS_PERIOD_S:
            if self._error is not None:
                raise self._error
            return False
        self._asked_s, self._error = now_s, None
        try:
            self.states = application_states(self._kubectl, picture.head)
        except UnavailableError as error:
            self._error = error
            raise
        if self.states.failed:
            raise failure_of(self.states, self._kubectl, picture.head)
        return self.states.are_running

    def __str__(self) -> str:
        return f"application {self.states}" if self.states is not None else ""


def _is_service_ready(picture: Picture) -> bool:
    """Of an upgrade the next cluster is waited for; what the status says of an older generation counts for nothing."""
    if picture.ray is None:
        return False
    status = picture.ray.get("status") or {}
    states = {found["type"]: found["status"] for found in status.get("conditions") or ()}
    is_of_now = status.get("observedGeneration") == picture.ray["metadata"].get("generation")
    return is_of_now and states.get("Ready") == "True" and states.get("UpgradeInProgress") != "True"


def _services(wanted: Wanted, namespace: str) -> dict[str, list[str]]:
    return {
        found["metadata"]["name"]: [
            f"{found['metadata']['name']}.{found['metadata'].get('namespace', namespace)}.svc:{port['port']}"
            for port in found["spec"].get("ports", ())
        ]
        for found in wanted.others
        if found["kind"] == "Service"
    }


def _next_steps(kubectl: Kubectl, wanted: Wanted) -> list[str]:
    """Return the commands to a first token: of the Service that has a port called grpc."""
    for found in wanted.others:
        for port in found["spec"].get("ports", ()) if found["kind"] == "Service" else ():
            if port.get("name") == "grpc":
                # The manifests say h2c where there is no TLS.
                tls = "" if port.get("appProtocol") == "kubernetes.io/h2c" else " --tls-ca CA.crt --api-key KEY"
                name, number = found["metadata"]["name"], port["port"]
                return [
                    f"{kubectl.shown()} port-forward service/{name} {number}",
                    f'expertmesh generate "def main():" --max-tokens 32 --url localhost:{number}{tls}',
                ]
    return []
