"""`ray up`, `exec`, `attach`, `rsync`, `get-head-ip` and `down` as processes of their own, against the fake API."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.k8s.lab import APPLICATION, NAMESPACE, Lab
from tests.k8s.manifests import K8S
from tests.kube.cluster import ADMIN
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.resources import PODS

Ray = Callable[..., "subprocess.CompletedProcess[str]"]
TIMEOUT_S = 100


@pytest.fixture
def ray(lab: Lab, tmp_path: Path) -> Ray:
    """Return what runs a command of Ray's on the lab's file; it fails the test unless the exit code is as expected."""
    path = os.pathsep.join([str(Path(lab.kubectl).parent), os.environ["PATH"]])
    env = {
        **os.environ,
        "PATH": path,
        "KUBECONFIG": str(lab.config),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(tmp_path),
        "COLUMNS": "400",
    }

    def call(
        command: str, *words: str, code: int = 0, stdin: str = "", cwd: Path = lab.folder, file: Path = lab.file
    ) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "ray.scripts.scripts", command, str(file), *words]
        done = subprocess.run(
            line, input=stdin, capture_output=True, text=True, env=env, cwd=cwd, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.mark.timeout(300)
def test_a_life_by_ray_s_commands(ray: Ray, lab: Lab, tmp_path: Path) -> None:
    # From elsewhere: manifests are found beside the file.
    out = ray("up", "-y", cwd=tmp_path).stdout
    assert lab.head.deployed == [APPLICATION]
    assert "rayclusters.ray.io/mesh created" in out
    assert "service/mesh-grpc 50051" in out
    assert len(lab.pods()) == 4
    assert not [script for script in lab.head.scripts if "ray start" in script], "KubeRay's matter"

    assert ray("get-head-ip").stdout.splitlines()[-1] == "127.0.0.1"
    assert "hello from the head\n" in ray("exec", "echo hello from the head; cat", stdin="and stdin\n").stdout
    failed = ray("exec", "echo to stderr >&2; exit 7", code=7)
    assert "to stderr" in failed.stderr
    assert "attached\n" in ray("attach", stdin="echo attached\nexit\n").stdout

    (tmp_path / "sent").write_text("sent")
    ray("rsync-up", str(tmp_path / "sent"), "~/arrived")
    assert (lab.head.home / "arrived").read_text() == "sent"
    ray("rsync-down", "~/arrived", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "sent"

    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "leaf").write_text("leaf")
    ray("rsync-up", f"{tmp_path}/tree/", "~/tree")
    assert (lab.head.home / "tree" / "leaf").read_text() == "leaf"

    lab.scale(3)
    lab.ray["spec"]["workerGroupSpecs"][1]["maxReplicas"] = 7
    lab.write()
    out = ray("up", "-y").stdout
    assert "rayclusters.ray.io/mesh replaced" in out
    assert (lab.group()["replicas"], lab.group()["maxReplicas"]) == (3, 7)

    ray("down", "-y")
    assert lab.pods() == []
    assert "delete configmaps/settings" in lab.writes()
    assert ray("down", "-y").returncode == 0


@pytest.mark.timeout(300)
def test_the_file_of_the_project(ray: Ray, lab: Lab) -> None:
    lab.kube.add_namespace("expertmesh")
    file = Path("k8s") / "ray-up.yaml"
    out = ray("up", "-y", cwd=K8S.parent, file=file).stdout
    assert "rayclusters.ray.io/expertmesh created" in out
    assert "service/expertmesh-grpc 50051" in out
    assert lab.head.deployed == [(K8S / "overlays" / "raycluster" / "application.yaml").read_text()]
    ray("down", "-y", cwd=K8S.parent, file=file)
    assert lab.kube.store.all(PODS) == []


@pytest.mark.timeout(300)
def test_what_cannot_be_is_refused_in_one_line(ray: Ray, lab: Lab) -> None:
    lab.kube.authorizer.deny(ADMIN, "create", "rayclusters")
    done = ray("up", "-y", code=1)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Error: admin may not create rayclusters.ray.io in the namespace ml; see kubectl" in done.stderr
    assert "configmap/settings created" in done.stdout
    assert "not finished; what was applied stays" in done.stdout

    done = ray("exec", "echo", code=1)
    assert "Error: there is no head of mesh in the namespace ml: `ray up` brings one up" in done.stderr
    assert "Traceback" not in done.stderr

    # Only what is beside the cluster was applied: it is taken down too.
    ray("down", "-y")
    assert "delete configmaps/settings" in lab.writes()

    lab.kube.store.create(RAY_CLUSTERS, NAMESPACE, lab.ray)
    lab.kube.store.wait_until(lambda: len(lab.pods()) == 4)
    for words, said in (
        (("exec", "--tmux", "sleep 1"), "--tmux and --screen cannot be"),
        (("exec", "--stop", "echo a"), "`ray stop` is KubeRay's matter in this pod: leave it, and --stop, out"),
        (("down", "-y", "--workers-only"), "--workers-only cannot be: the autoscaler would have others made"),
        (("down", "-y"), "RayCluster mesh was not applied by `up`"),
    ):
        done = ray(words[0], *words[1:], code=1)
        assert f"Error: {said}" in done.stderr, words
        assert "Traceback" not in done.stderr, words
    table = yaml.safe_load(lab.file.read_text())
    other = lab.folder / "other.yaml"
    other.write_text(yaml.safe_dump({**table, "auth": {"ssh_user": "me"}}))
    done = ray("up", "-y", code=1, file=other)
    assert "Error: the head is what the manifests say: head_node_type must be headgroup, and its" in done.stderr
    assert "mesh-head" in lab.pods()
    assert "is KubeRay's matter in this pod: nothing to do" in ray("exec", "ray stop").stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"provider": {"contxt": "a"}}, "Error: provider.contxt is not known; known are type, module"),
        ({"provider": {"kubectl": "no-such"}}, "Error: kubectl is not there: no no-such on the PATH"),
        ({"cluster_name": "other"}, "Error: cluster_name is 'other', and the manifests have RayCluster mesh"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(ray: Ray, lab: Lab, change: dict[str, object], said: str) -> None:
    table = yaml.safe_load(lab.file.read_text())
    provider = change.pop("provider", {})
    assert isinstance(provider, dict)
    lab.file.write_text(yaml.safe_dump({**table, **change, "provider": {**table["provider"], **provider}}))
    done = ray("up", "-y", code=1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert lab.writes() == []
