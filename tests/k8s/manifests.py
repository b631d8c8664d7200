"""The manifests as `kubectl kustomize` builds them, and how to find one's way in them."""

import functools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-try-out", "gpu", "production", "raycluster")
SERVICES = ("cpu-try-out", "gpu", "production")  # those with a RayService
COMPONENT = "app.kubernetes.io/component"
NAME = "app.kubernetes.io/name"
Manifest = dict[str, Any]


def kubectl() -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("kubectl", path=places)
    if found is None:
        pytest.skip("needs kubectl: `make manifests` fetches it")
    return found


@functools.cache
def build(folder: Path) -> tuple[Manifest, ...]:
    """Return the objects of a folder, as `kubectl apply -k` would send them. Read, do not change them."""
    ended = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, "kustomize warns"
    return tuple(yaml.load_all(ended.stdout, yaml.CSafeLoader))


def overlay(name: str) -> tuple[Manifest, ...]:
    return build(K8S / "overlays" / name)


def of_kind(objects: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    return [found for found in objects if found["kind"] == kind]


def cluster_of(name: str) -> Manifest:
    """Return the cluster's spec, of a RayService or by itself."""
    objects = overlay(name)
    if name == "raycluster":
        (cluster,) = of_kind(objects, "RayCluster")
        spec: Manifest = cluster["spec"]
        return spec
    (service,) = of_kind(objects, "RayService")
    config: Manifest = service["spec"]["rayClusterConfig"]
    return config


def groups_of(name: str) -> dict[str, Manifest]:
    """Return the groups of pods by the tier that they are for, the head as `control`."""
    cluster = cluster_of(name)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return {group["labels"]["expertmesh.io/tier"]: group for group in groups}


def container_of(group: Manifest) -> Manifest:
    (container,) = group["template"]["spec"]["containers"]
    found: Manifest = container
    return found


def ports_of(group: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(group).get("ports", ())}


def serve_config(name: str) -> Manifest:
    (service,) = of_kind(overlay(name), "RayService")
    config: Manifest = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def application_of(name: str) -> Manifest:
    (application,) = serve_config(name)["applications"]
    found: Manifest = application
    return found


def setting_files(name: str) -> dict[str, str]:
    """Return the text of each file that the pods find in the settings' folder."""
    (found,) = [
        c for c in of_kind(overlay(name), "ConfigMap") if c["metadata"]["name"].startswith("expertmesh-settings")
    ]
    data: dict[str, str] = found["data"]
    return data


def settings_table(name: str) -> Manifest:
    """Return the settings' files put together as the application does it."""
    values: Manifest = {}
    for _, text in sorted(setting_files(name).items()):
        values |= tomllib.loads(text)
    return values
