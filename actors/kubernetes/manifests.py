"""The manifests of `up`, from files: where they are, and what they say."""

from pathlib import Path

import yaml

from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kubernetes.complaints import plain
from expertmesh.cluster.kubernetes.objects import Wanted, prepare
from expertmesh.cluster.kubernetes.settings import ProviderSettings, read_provider

APPLICATION_FILE = "application.yaml"


def read_file(file: Path, overrides: dict[str, object] | None = None) -> tuple[ProviderSettings, str]:
    """Read what a file for `ray up` says of the cluster, and the cluster's name.

    Raises:
        InputError: the file cannot be read, is not for this provider, or a setting is wrong.
    """
    table = load_yaml(file)
    if not isinstance(table, dict) or not isinstance(table.get("cluster_name"), str):
        raise InputError(f"{file} has no cluster_name: it is not a file for `ray up`")
    return read_provider(table.get("provider"), overrides), table["cluster_name"]


def load_yaml(file: Path) -> object:
    """Return what a file of one document holds.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error


def locate(path: str, named_in: Path | None) -> Path:
    """Return where a file or folder of the settings is: from the working directory, else from a folder above the file
    that names it.

    Raises:
        InputError: it is nowhere.
    """  # noqa: D205 - one sentence
    above = () if named_in is None else named_in.resolve().parents
    for base in (Path.cwd(), *above):
        if (base / Path(path).expanduser()).exists():
            return base / Path(path).expanduser()
    where = Path.cwd() if named_in is None else f"{Path.cwd()} and above {named_in.resolve()}"
    raise InputError(f"there is no {path}: looked from {where}")


def render(kubectl: Kubectl, cluster_name: str, named_in: Path | None) -> Wanted:
    """Return what is to be applied: the folder as kustomize builds it, or the file.

    Raises:
        InputError: it cannot be built, or is not what `up` can apply.
    """
    place = locate(kubectl.settings.manifests, named_in)
    if place.is_dir():
        answer = kubectl.ask("kustomize", str(place))
        if answer.complaint is not None:
            said = " ".join(plain(answer.err).split()).removeprefix("error: ")
            raise InputError(f"manifests {place}: {said}; see kubectl kustomize {place}")
        text = answer.out
    else:
        text = read_text(place)
    try:
        manifests = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise InputError(f"manifests {place}: {' '.join(str(error).split())}") from error
    settings = kubectl.settings
    return prepare(manifests, cluster_name=cluster_name, namespace=settings.namespace, image=settings.image)


def read_application(settings: ProviderSettings, named_in: Path | None) -> tuple[Path, str] | None:
    """Return what `serve deploy` is to get, and its file; None where there is nothing to deploy.

    Raises:
        InputError: the file that the settings name is nowhere, or cannot be read.
    """
    place = locate(settings.application or settings.manifests, named_in)
    if not settings.application:
        place = (place if place.is_dir() else place.parent) / APPLICATION_FILE
        if not place.exists():
            return None
    return place, read_text(place)


def read_text(file: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error
