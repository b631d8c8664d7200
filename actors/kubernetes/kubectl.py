"""kubectl, run: the only way from here to a cluster, so that contexts, plugins and proxies are its own matter."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.kubernetes.complaints import Complaint, read_complaint
from expertmesh.cluster.kubernetes.settings import ProviderSettings

# One command asks the server several things, each within the settings' request_timeout_s.
_REQUESTS = 6


class Answer(NamedTuple):
    """How a command ended. complaint is None where it succeeded."""

    code: int
    out: str
    err: str
    complaint: Complaint | None


@dataclass(frozen=True, slots=True)
class Kubectl:
    """kubectl with a kubeconfig, a context and a namespace."""

    settings: ProviderSettings

    def command(self, *args: str, namespace: str | None = None, is_long: bool = False) -> list[str]:
        """Return the words of a command; is_long: one that lasts as long as a person wants, not a question.

        Raises:
            InputError: kubectl is not there.
        """
        program = shutil.which(self.settings.kubectl)
        if program is None:
            raise InputError(
                f"kubectl is not there: no {self.settings.kubectl} on the PATH; "
                "https://kubernetes.io/docs/tasks/tools/ says how to install it"
            )
        limit = [] if is_long else [f"--request-timeout={self.settings.request_timeout_s:g}s"]
        return [program, *self._options(namespace), *limit, *args]

    def shown(self, namespace: str | None = None) -> str:
        """Return the beginning of a command that a person may type."""
        return " ".join(["kubectl", *self._options(namespace)])

    def ask(self, *args: str, stdin: str = "", namespace: str | None = None, timeout_s: float | None = None) -> Answer:
        """Run a command to its end and return what it wrote. It never asks a question of the terminal.

        Args:
            args: of kubectl.
            stdin: its input.
            namespace: another than the settings'.
            timeout_s: longest time for what is more than a few questions to the server, such as a command in a pod.

        Raises:
            InputError: kubectl is not there.
            UnavailableError: it did not end in time.
        """
        # To kubectl all that comes over a stream, as of a command in a pod or a wait, is one request.
        command = self.command(*args, namespace=namespace, is_long=timeout_s is not None)
        timeout_s = timeout_s or _REQUESTS * self.settings.request_timeout_s
        try:
            ended = subprocess.run(  # noqa: S603 - words, not a shell's line
                command, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            shown = self.shown(namespace)
            raise UnavailableError(
                f"kubectl {args[0]} has not ended within {timeout_s:g} s; see {shown} cluster-info"
            ) from error
        complaint = read_complaint(ended.stderr, self.shown(namespace)) if ended.returncode else None
        return Answer(ended.returncode, ended.stdout, ended.stderr, complaint)

    def run(self, *args: str, stdin: str = "", namespace: str | None = None, timeout_s: float | None = None) -> str:
        """Run a command that must succeed, and return its output.

        Raises:
            ExpertMeshError: it failed; the line says why, and how to see more.
        """
        answer = self.ask(*args, stdin=stdin, namespace=namespace, timeout_s=timeout_s)
        if answer.complaint is not None:
            raise answer.complaint.error()
        return answer.out

    def find(self, *names: str) -> list[dict[str, Any]]:
        """Return the objects that are there, of some named TYPE/NAME.

        Raises:
            ExpertMeshError: the server cannot be asked.
        """
        return _items(self.run("get", *names, "--ignore-not-found", "--output=json"))

    def list(self, kind: str, *options: str) -> list[dict[str, Any]]:
        """Return objects of a kind, of a selector in the options.

        Raises:
            ExpertMeshError: the server cannot be asked.
        """
        return _items(self.run("get", kind, "--output=json", *options))

    def _options(self, namespace: str | None) -> Sequence[str]:
        settings = self.settings
        options = []
        if settings.kubeconfig:
            options.append(f"--kubeconfig={Path(settings.kubeconfig).expanduser()}")
        if settings.context:
            options.append(f"--context={settings.context}")
        return [*options, f"--namespace={namespace or settings.namespace}"]


def _items(text: str) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    found: dict[str, Any] = json.loads(text)
    items: list[dict[str, Any]] = found["items"] if str(found.get("kind", "")).endswith("List") else [found]
    return items
