"""What is run in the head's container: `serve deploy` of the application, and a look at what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from expertmesh.actors.kubernetes.kubectl import Answer, Kubectl
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.kubernetes.complaints import Cause
from expertmesh.cluster.kubernetes.objects import Manifest

# Python, Ray and the dashboard's answer, in a container of one or two cores.
_SERVE_TIMEOUT_S = 120.0
# A folder that may be written to in a container whose root may not.
_REMOTE_FILE = "/tmp/expertmesh-application.yaml"  # noqa: S108 - the container's own


@dataclass(frozen=True, slots=True)
class ApplicationStates:
    """What Ray Serve says of its applications: states as in `expertmesh DEPLOYING`, and messages, by name."""

    by_name: dict[str, str]
    messages: dict[str, str]

    @property
    def are_running(self) -> bool:
        """Return whether there are some, and all serve."""
        return bool(self.by_name) and set(self.by_name.values()) == {"RUNNING"}

    @property
    def failed(self) -> list[str]:
        """Return the names of those that Ray Serve gave up."""
        return [name for name, state in self.by_name.items() if state == "DEPLOY_FAILED"]

    def __str__(self) -> str:
        parts = [(f"{name} {state}", self.messages[name]) for name, state in self.by_name.items()]
        return ", ".join(f"{state} ({said})" if said else state for state, said in parts) or "none yet"


def exec_words(head: Manifest, command: Sequence[str], *, options: Sequence[str] = ()) -> list[str]:
    """Return kubectl's arguments that run a command in Ray's container of a pod."""
    container = head["spec"]["containers"][0]["name"]
    return ["exec", *options, head["metadata"]["name"], f"--container={container}", "--", *command]


def deploy(kubectl: Kubectl, head: Manifest, application: str) -> None:
    """Have Ray Serve deploy an application, as YAML; it returns when Serve has taken the order.

    Raises:
        UnavailableError: `serve deploy` failed, which may pass: the dashboard starts after Ray.
        ExpertMeshError: commands cannot be run in the pod.
    """
    script = f"cat > {_REMOTE_FILE} && exec serve deploy {_REMOTE_FILE}"
    _checked(kubectl, head, _run(kubectl, head, script, stdin=application), "serve deploy")


def application_states(kubectl: Kubectl, head: Manifest) -> ApplicationStates:
    """Return what Ray Serve says of its applications.

    Raises:
        UnavailableError: it cannot be asked now.
        ExpertMeshError: commands cannot be run in the pod.
    """
    text = _checked(kubectl, head, _run(kubectl, head, "exec serve status"), "serve status")
    try:
        applications = (yaml.safe_load(text) or {}).get("applications") or {}
        by_name = {str(name): str(found["status"]) for name, found in applications.items()}
        messages = {str(name): " ".join(str(found.get("message", "")).split()) for name, found in applications.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UnavailableError(f"`serve status` in pod {head['metadata']['name']} says {text!r:.200}") from error
    return ApplicationStates(by_name, messages)


def _run(kubectl: Kubectl, head: Manifest, script: str, stdin: str = "") -> Answer:
    options = ["--stdin"] if stdin else []
    return kubectl.ask(
        *exec_words(head, ["bash", "-c", script], options=options), stdin=stdin, timeout_s=_SERVE_TIMEOUT_S
    )


def _checked(kubectl: Kubectl, head: Manifest, answer: Answer, what: str) -> str:
    if answer.complaint is None:
        return answer.out
    if answer.complaint.cause not in (Cause.OTHER, Cause.SERVER, Cause.UNREACHABLE):
        raise answer.complaint.error()
    pod = head["metadata"]["name"]
    said = [line for line in (answer.err or answer.out).splitlines() if line.strip()]
    said = [line for line in said if not line.startswith("command terminated with exit code")]
    line = said[-1].strip() if said else f"exit code {answer.code}"
    raise UnavailableError(f"`{what}` in pod {pod} failed: {line}; see {kubectl.shown()} logs {pod}")


def failure_of(states: ApplicationStates, kubectl: Kubectl, head: Manifest) -> ExpertMeshError:
    """Return the error about applications that Ray Serve gave up."""
    name = states.failed[0]
    pod = head["metadata"]["name"]
    return ExpertMeshError(
        f"the application {name} did not come up: {states.messages[name]}; see "
        f"{kubectl.shown()} exec {pod} -- serve status"
    )
