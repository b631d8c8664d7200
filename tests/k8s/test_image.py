"""The image: tags and Dockerfile say the versions that are pinned, and it holds all that the wheel is made of."""

import re
import tomllib
from typing import Any

import pytest

from tests.k8s.manifests import K8S, OVERLAYS, ROOT, cluster_of, container_of, groups_of, settings_table

DOCKERFILE = (K8S / "Dockerfile").read_text()
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(package: str) -> str:
    (version,) = [
        found.group(1)
        for requirement in PYPROJECT["project"]["dependencies"]
        if (found := re.fullmatch(rf"{package}(?:\[\w+\])?==(.*)", requirement))
    ]
    return str(version)


def python() -> str:
    (version,) = re.findall(r"(?m)^ARG PYTHON=(.*)$", DOCKERFILE)
    return str(version)


@pytest.mark.parametrize("name", OVERLAYS)
def test_tags_say_the_versions_that_are_pinned(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == pinned("ray")
    target = "cpu" if name == "cpu-try-out" else "cuda"
    tag = f"{PYPROJECT['project']['version']}-ray{pinned('ray')}-py{python()}-{target}"
    images = {container_of(group)["image"] for group in groups_of(name).values()}
    assert images == {f"expertmesh:{tag}"}
    assert f"FROM base AS {target}\n" in DOCKERFILE


def test_the_dockerfile_names_the_versions_that_are_pinned() -> None:
    assert tuple(map(int, python().split("."))) >= (3, 11)
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert re.findall(r"torch==([\d.]+)", DOCKERFILE) == [pinned("torch")]
    assert f"expertmesh:{PYPROJECT['project']['version']}-ray{pinned('ray')}-py{python()}-cpu" in DOCKERFILE


def test_the_wheel_is_made_of_all_that_it_has() -> None:
    copied = set(re.findall(r"(?m)^COPY (\S+) \S+$", DOCKERFILE))
    folders = {folder.partition("/")[0] for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= copied
    ignored = {line.strip("/") for line in (K8S / "Dockerfile.dockerignore").read_text().split()}
    assert not ignored & (copied | {"README.md", "LICENSE", "pyproject.toml"})


def test_the_model_of_the_try_out_is_in_the_image() -> None:
    (path,) = set(re.findall(r"(?m)^COPY examples/pocket-moe (\S+)$", DOCKERFILE))
    assert settings_table("cpu-try-out")["model"] == path
    assert (ROOT / "examples" / "pocket-moe" / "config.json").is_file()


def test_probes_find_their_tool() -> None:
    for group in groups_of("gpu").values():
        command = str(container_of(group).get("readinessProbe", {}).get("exec", ""))
        for tool in ("wget", "bash"):
            assert tool not in command or re.search(rf"install .*\b{tool}\b", DOCKERFILE)
