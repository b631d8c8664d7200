"""`expertmesh up --kubernetes`: bring a fleet up on Kubernetes, as `ray up` does, with the same code."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from expertmesh.actors.cli.client import JsonOption
from expertmesh.actors.kubernetes.bringing_up import Outcome, bring_up, try_out
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.actors.kubernetes.manifests import read_file, render
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.kubernetes.settings import ProviderSettings

DEFAULT_FILE = Path("k8s/ray-up.yaml")

FileArgument = Annotated[Path, typer.Argument(metavar="[FILE]", help="As `ray up` takes it.")]
KubernetesOption = Annotated[bool, typer.Option("--kubernetes", help="On the cluster of the kubeconfig.")]
NamespaceOption = Annotated[str | None, typer.Option(help="Where it will be; as FILE says unless given.")]
ContextOption = Annotated[str | None, typer.Option(help="Of the kubeconfig; as FILE says unless given.")]
OverlayOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Folder of manifests beside the one that FILE names.")
]
ManifestsOption = Annotated[str | None, typer.Option(metavar="PATH", help="Kustomize folder, or file, of manifests.")]
TimeoutOption = Annotated[float | None, typer.Option(help="Longest wait; as FILE says unless given.")]


def up(
    file: FileArgument = DEFAULT_FILE,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    image: Annotated[str | None, typer.Option(help="Of Ray's container; that of the manifests unless given.")] = None,
    overlay: OverlayOption = None,
    manifests: ManifestsOption = None,
    timeout_s: TimeoutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be applied; the server is asked, and changes nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply the manifests of a fleet, new or changed, and wait until it serves."""
    given = {"namespace": namespace, "context": context, "image": image, "timeout_s": timeout_s, "manifests": manifests}
    settings, name = choose(file, given, overlay, is_kubernetes=kubernetes, command="up")
    say = narrator()
    if dry_run:
        _print_dry_run(settings, name, file, say, as_json=as_json)
        return
    outcome = bring_up(settings, name, file, say)
    if as_json:
        typer.echo(json.dumps(asdict(outcome)))
    else:
        _print(outcome)


def choose(
    file: Path, given: dict[str, Any], overlay: str | None, *, is_kubernetes: bool, command: str
) -> tuple[ProviderSettings, str]:
    """Return the settings of a file with the options given, and the cluster's name.

    Raises:
        InputError: `--kubernetes` is missing, two options contradict, the file or an option is wrong.
    """
    if not is_kubernetes:
        here = "serve DIR` starts a server" if command == "up" else "stop` ends the server"
        raise InputError(f"`{command}` is for clusters: `expertmesh {command} --kubernetes`; `expertmesh {here} here")
    if overlay is not None and given["manifests"] is not None:
        raise InputError("--overlay and --manifests both name the manifests; give one of them")
    if not file.exists():
        raise InputError(f"there is no {file} here: name one, or go to the checkout, which has k8s/ray-up.yaml")
    overrides = {key: value for key, value in given.items() if value is not None}
    settings, name = read_file(file, overrides)
    if overlay is not None:
        settings = settings.model_copy(
            update={"manifests": str(Path(settings.manifests).parent / overlay), "application": ""}
        )
    return settings, name


def narrator() -> Callable[[str], None]:
    """Return what prints lines of progress on stderr, with the time since now."""
    began_s = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began_s:6.1f} s] {line}\n")
        sys.stderr.flush()

    return say


def _print(outcome: Outcome) -> None:
    what = "serves" if outcome.application else "is up, with no application"
    typer.echo(f"{outcome.cluster} {what} in the namespace {outcome.namespace}, after {outcome.took_s:.1f} s")
    for addresses in outcome.services.values():
        typer.echo("  " + ", ".join(addresses))
    if outcome.next_steps:
        typer.echo("a first token, from here:")
    for step in outcome.next_steps:
        typer.echo(f"  {step}")


def _print_dry_run(
    settings: ProviderSettings, name: str, file: Path, say: Callable[[str], None], *, as_json: bool
) -> None:
    """Print the objects; where no server can be reached that is said, and they are printed all the same."""
    lines: list[str] = []
    unasked = None

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    try:
        wanted = try_out(settings, name, file, note)
    except UnavailableError as error:
        unasked = str(error)
        say(f"no server was asked: {unasked}")
        wanted = render(Kubectl(settings), name, file)
    objects = [*wanted.others, wanted.ray]
    if as_json:
        typer.echo(json.dumps({"objects": objects, "server": lines, "unasked": unasked}))
    else:
        typer.echo(yaml.safe_dump_all(objects, sort_keys=False, width=120), nl=False)
