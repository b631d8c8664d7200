"""Ray's own autoscaler for KubeRay against a fake Kubernetes API, with raylets for pods, under live streams.

The RayCluster is the one of the overlay cpu-try-out, changed only in times and sizes. Its autoscaler is the process
that KubeRay runs beside the head; it asks by a client certificate, and may do what the overlay's Role says.
"""

import copy
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.ray_kubelet import RayKubelet, kill_tree
from tests.integration.streams import status_when
from tests.integration.test_scale import Streams, cli
from tests.k8s.manifests import cluster_of, kubectl, of_kind, overlay, setting_files
from tests.kube.api import Call
from tests.kube.cluster import FakeKubernetes, fake_kubernetes, run_kubectl
from tests.kube.faults import Close, Hang
from tests.kube.ray_pods import GROUP
from tests.kube.resources import PODS
from tests.kube.status import ApiError, Manifest

pytestmark = pytest.mark.timeout(900)  # a cluster and a server are started, and pods come and go
OVERLAY = "cpu-try-out"
NAMESPACE = "expertmesh"
NAME = "expertmesh"
IDLE_S = 3
LEAVE_S = 10
GRACE_S = 25
REQUEST_TIMEOUT_S = 5


def ray_cluster() -> Manifest:
    """Return the overlay's cluster. Times are shorter, and no pod is for gateways: ours is the server's process."""
    spec = copy.deepcopy(cluster_of(OVERLAY))
    spec["autoscalerOptions"]["idleTimeoutSeconds"] = IDLE_S
    spec["autoscalerOptions"]["env"] = [
        {"name": "AUTOSCALER_UPDATE_INTERVAL_S", "value": "1"},
        {"name": "KUBERAY_REQUEST_TIMEOUT_S", "value": str(REQUEST_TIMEOUT_S)},
    ]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod["terminationGracePeriodSeconds"] = GRACE_S
        (container,) = pod["containers"]
        hook = container["lifecycle"]["preStop"]["exec"]
        hook["command"] = [word.replace("65", str(LEAVE_S)).replace("70", str(LEAVE_S)) for word in hook["command"]]
        if group.get("groupName") == "gateway":
            group |= {"replicas": 0, "minReplicas": 0}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": NAME}, "spec": spec}


@dataclass
class Mesh:
    """A fleet on pods. terminations: of each time that pods were named to be deleted, those pods and what stood."""

    kube: FakeKubernetes
    kubelet: RayKubelet
    server: Server
    terminations: list[tuple[list[str], StatusResponse]] = field(default_factory=list)

    def experts(self) -> set[str]:
        """Return the pods of the group `experts` that run and are not ending."""
        return {pod["metadata"]["name"] for pod in self.pods("experts") if runs(pod)}

    def pods(self, group: str) -> list[Manifest]:
        return [p for p in self.kube.store.all(PODS, NAMESPACE) if p["metadata"]["labels"][GROUP] == group]

    def settled(self, shards: int) -> StatusResponse:
        """Wait until there are so many shards, each ready and alone on a pod, and no other pod of the group."""

        def is_so(status: StatusResponse) -> bool:
            ready = [shard.state for shard in status.shards] == ["ready"] * shards
            return ready and {shard.node for shard in status.shards} == self.nodes(self.experts())

        status = status_when(self.server, is_so, timeout_s=200)
        self.kube.store.wait_until(lambda: len(self.pods("experts")) == shards, 60)
        return status

    def nodes(self, pods: set[str]) -> set[str]:
        return {self.kubelet.node_id(pod) for pod in pods}

    def pod_of(self, shard: str) -> str:
        (node,) = [found.node for found in self.server.status().shards if found.id == shard]
        (pod,) = [pod for pod in self.experts() if self.kubelet.node_id(pod) == node]
        return pod

    def scale(self, shards: int) -> None:
        done = cli(self.server, "scale", "--shards", str(shards), "--wait", "--json")
        assert done.returncode == 0, done.stderr + self.server.log.read_text() + self.autoscaler_log()
        assert json.loads(done.stdout)["phase"] == "DONE"

    def autoscaler_log(self) -> str:
        return (self.kubelet.home / "autoscaler.log").read_text()

    def observe(self, call: Call) -> None:
        """See who is to be deleted before it is."""
        if (call.verb, call.resource_name) != ("patch", "rayclusters"):
            return
        for operation in call.body:
            if doomed := operation["path"].endswith("/scaleStrategy") and operation["value"]["workersToDelete"]:
                self.terminations.append((doomed, self.server.status()))


def runs(pod: Manifest) -> bool:
    return pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]


def to_toml(values: dict[str, Any]) -> str:
    """Return settings as a file; JSON's numbers and words are TOML's."""

    def written(value: object) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {written(part)}" for key, part in value.items()) + " }"
        return json.dumps(value)

    return "".join(f"{key} = {written(value)}\n" for key, value in values.items())


def settings(**changed: object) -> str:
    """Return the overlay's settings as one file, but for addresses and paths."""
    values: dict[str, Any] = {}
    for _, text in sorted(setting_files(OVERLAY).items()):
        values |= tomllib.loads(text)
    for name in ("model", "autoscale", "grpc_host", "grpc_port", "http_host", "http_port"):
        del values[name]
    return to_toml({**values, "dtype": "float32", "rebalance_period_s": 0, **changed})


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeKubernetes, RayKubelet]]:
    """The RayCluster with its first pods."""
    kubelet = RayKubelet()
    try:
        nodes = tuple(f"host-{number}" for number in range(16))  # as failure domains: a pod of shards on each
        with fake_kubernetes(tmp_path_factory.mktemp("kube"), kubelet, nodes=nodes) as kube:
            kubelet.kube = kube
            kube.install_kuberay()
            kube.add_namespace(NAMESPACE)
            objects = overlay(OVERLAY)
            kinds = ("ServiceAccount", "Role", "RoleBinding", "PodDisruptionBudget")
            beside = [found for kind in kinds for found in of_kind(objects, kind)]
            config, text = kube.kubeconfig(namespace=NAMESPACE), yaml.safe_dump_all([*beside, ray_cluster()])
            applied = run_kubectl(kubectl(), config, "apply", "-f", "-", stdin=text)
            assert applied.returncode == 0, applied.stderr
            kube.store.wait_until(lambda: [runs(pod) for pod in kube.store.all(PODS, NAMESPACE)] == [True] * 4, 300)
            yield kube, kubelet
    finally:
        kubelet.close()


@contextmanager
def fleet(kube: FakeKubernetes, kubelet: RayKubelet, home: Path, text: str) -> Iterator[Mesh]:
    """Run a server with these settings on the pods while the block lasts."""
    (home / "serve.toml").write_text(text)
    options = ("--address", kubelet.address, "--config", str(home / "serve.toml"))
    with serving(POCKET, home, *options, env=ray_environment(kube, kubelet)) as server:
        started = Mesh(kube, kubelet, server)
        kube.faults.observers.append(started.observe)
        try:
            yield started
        finally:
            kube.faults.observers.remove(started.observe)


@pytest.fixture(scope="module")
def mesh(pods: tuple[FakeKubernetes, RayKubelet], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two shards on two pods, every expert on both, and a worker."""
    with fleet(*pods, tmp_path_factory.mktemp("mesh"), settings()) as started:
        yield started


def ray_environment(kube: FakeKubernetes, kubelet: RayKubelet) -> dict[str, str]:
    """Return what whoever joins the cluster must have in the environment: what the head's container has."""
    (head,) = [p for p in kube.store.all(PODS, NAMESPACE) if p["metadata"]["labels"][GROUP] == "headgroup"]
    env = kubelet.environment(head, head["spec"]["containers"][0])
    return {name: env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}


@pytest.fixture
def streams(mesh: Mesh) -> Iterator[None]:
    """Streams while a test runs; at its end none may have failed, nor differ from those undisturbed."""
    mesh.settled(2)
    live = Streams(mesh.server)
    expected = {number: live.generate(number) for number in live.outputs}
    with live.running():
        yield
    assert not live.errors, live.errors
    for number, outputs in live.outputs.items():
        assert outputs
        assert all(output == expected[number] for output in outputs)


def test_load_brings_a_pod_and_calm_ends_it(pods: tuple[FakeKubernetes, RayKubelet], tmp_path: Path) -> None:
    """First of all: its fleet is gone when that of the other tests begins."""
    quick = {"target_utilisation": 0.02, "up_delay_s": 1, "down_delay_s": 3, "cooldown_s": 2}
    shards = {"min_count": 2, "max_count": 3, **quick}
    text = settings(autoscale={"period_s": 0.5, "shards": shards, "workers": {"max_count": 1}})
    with fleet(*pods, tmp_path, text) as mesh:
        mesh.settled(2)
        live = Streams(mesh.server)
        with live.running():
            mesh.settled(3)
        mesh.settled(2)
        assert not live.errors, live.errors
        for outputs in live.outputs.values():
            assert all(output == outputs[0] for output in outputs)


@pytest.mark.usefixtures("streams")
def test_a_scale_brings_a_pod_and_a_drain_ends_it(mesh: Mesh) -> None:
    before, earlier = mesh.experts(), len(mesh.kube.faults.requests("patch", "rayclusters"))
    mesh.scale(3)
    mesh.settled(3)
    (brought,) = mesh.experts() - before
    account = f"system:serviceaccount:{NAMESPACE}:expertmesh-autoscaler"
    patches = mesh.kube.faults.requests("patch", "rayclusters")[earlier:]
    assert {request.user for request in patches} == {account}
    up = {"op": "replace", "path": "/spec/workerGroupSpecs/2/replicas", "value": 3}
    assert any(up in (request.body or []) for request in patches)
    leaving = [shard for shard in ("shard-0", "shard-1", "shard-2") if mesh.pod_of(shard) == brought]
    node = mesh.kubelet.node_id(brought)
    mesh.scale(2)
    mesh.settled(2)
    assert mesh.experts() == before
    # When the pod was named to be deleted, its shard was drained and gone.
    (named, status) = mesh.terminations[-1]
    assert named == [brought]
    assert node not in {shard.node for shard in status.shards}
    assert not {shard.id for shard in status.shards} & set(leaving)


@pytest.mark.usefixtures("streams")
def test_a_killed_pod_is_replaced(mesh: Mesh) -> None:
    killed = mesh.pod_of("shard-1")
    kill_tree(mesh.kubelet.pid(killed))
    mesh.kube.store.wait_until(lambda: killed not in mesh.experts())
    mesh.settled(2)


@pytest.mark.usefixtures("streams")
def test_the_pod_of_a_drained_host_leaves_first(mesh: Mesh) -> None:
    evicted = mesh.pod_of("shard-0")
    host = mesh.kube.store.get(PODS, NAMESPACE, evicted)["spec"]["nodeName"]
    drain = ("drain", host, "--delete-emptydir-data", "--timeout", "120s")
    done = run_kubectl(kubectl(), mesh.kube.kubeconfig(), *drain, timeout_s=150)
    assert done.returncode == 0, done.stderr
    assert mesh.kubelet.ip(evicted) in (mesh.kubelet.home / f"{evicted}-pre-stop.log").read_text(), "it did not leave"
    mesh.settled(2)
    assert host not in {pod["spec"]["nodeName"] for pod in mesh.pods("experts")}


@pytest.mark.usefixtures("streams")
def test_trouble_of_the_api_delays_and_no_more(mesh: Mesh) -> None:
    faults = mesh.kube.faults
    faults.plan("patch", "rayclusters", ApiError(409, "the object has been modified"))
    faults.plan("patch", "rayclusters", ApiError(500, "etcdserver: request timed out"))
    faults.plan("list", "pods", Hang(REQUEST_TIMEOUT_S + 1))
    faults.plan("get", "rayclusters", Close())
    mesh.scale(3)
    assert not faults.outstanding()
    mesh.settled(3)
    faults.plan("patch", "rayclusters", Close(done=True))
    mesh.scale(2)
    mesh.settled(2)
    assert not faults.outstanding()
