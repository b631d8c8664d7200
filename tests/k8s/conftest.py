"""A fake cluster with KubeRay and a namespace for each test that asks for it; the command line, run in this process."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertmesh.actors.cli import main
from tests.k8s.lab import NAMESPACE, EndingKubelet, Head, Lab
from tests.k8s.manifests import kubectl
from tests.kube.cluster import fake_kubernetes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    program = kubectl()
    for name in ("home", "kube", "lab"):
        (tmp_path / name).mkdir()
    # kubectl keeps what it discovered in the home.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    head = Head(tmp_path / "home")
    kubelet = EndingKubelet(answers=head)
    with fake_kubernetes(tmp_path / "kube", kubelet) as kube:
        kube.install_kuberay()
        yield Lab(kube, kubelet, head, tmp_path / "lab", program, kube.kubeconfig(namespace=NAMESPACE))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs the command line in this process: exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call
