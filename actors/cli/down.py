"""`expertmesh down --kubernetes`: take a fleet on Kubernetes down, as `ray down` does, with the same code."""

import json
from typing import Annotated

import typer

from expertmesh.actors.cli.client import JsonOption
from expertmesh.actors.cli.up import (
    DEFAULT_FILE,
    ContextOption,
    FileArgument,
    KubernetesOption,
    ManifestsOption,
    NamespaceOption,
    OverlayOption,
    choose,
    narrator,
)
from expertmesh.actors.kubernetes.taking_down import take_down


def down(
    file: FileArgument = DEFAULT_FILE,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    overlay: OverlayOption = None,
    manifests: ManifestsOption = None,
    timeout_s: Annotated[float | None, typer.Option(help="Longest wait for the pods to be gone.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what `up` applied, volumes never, and wait until its pods are gone."""
    given = {"namespace": namespace, "context": context, "timeout_s": timeout_s, "manifests": manifests}
    settings, name = choose(file, given, overlay, is_kubernetes=kubernetes, command="down")
    deleted = take_down(settings, name, file, narrator())
    if as_json:
        typer.echo(json.dumps({"cluster": name, "namespace": settings.namespace, "deleted": deleted}))
    elif deleted:
        typer.echo(f"{name} is gone from the namespace {settings.namespace}; volumes are kept")
    else:
        typer.echo(f"nothing of {name} in the namespace {settings.namespace}")
