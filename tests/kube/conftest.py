"""A fake cluster for each test, with a kubelet that only says that pods run, and kubectl."""

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.k8s.manifests import kubectl
from tests.kube.cluster import FakeKubernetes, fake_kubernetes, run_kubectl
from tests.kube.kubelet import PlainKubelet

Kubectl = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def kubelet() -> PlainKubelet:
    return PlainKubelet()


@pytest.fixture
def kube(tmp_path: Path, kubelet: PlainKubelet) -> Iterator[FakeKubernetes]:
    with fake_kubernetes(tmp_path, kubelet) as cluster:
        yield cluster


@pytest.fixture
def run(kube: FakeKubernetes) -> Kubectl:
    """Return what runs kubectl as administrator; it fails the test unless the exit code is as expected."""
    program, config = kubectl(), kube.kubeconfig()

    def call(
        *arguments: str, stdin: str | None = None, code: int = 0, config: Path = config
    ) -> "CompletedProcess[str]":
        done = run_kubectl(program, config, *arguments, stdin=stdin)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    return call
