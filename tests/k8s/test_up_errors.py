"""What `expertmesh up` says where something is wrong, each with the real kubectl against the fake API: one line."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from expertmesh.actors.kubernetes import waiting
from tests.certificates import make
from tests.k8s.conftest import Run
from tests.k8s.lab import NAMESPACE, Lab, one_line
from tests.kube.cluster import ADMIN
from tests.kube.events import record
from tests.kube.faults import Close, Hang
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.resources import CRDS, PODS, QUOTAS
from tests.kube.status import ApiError

UNFINISHED = "not finished; what was applied stays: `down` removes it, `up` again goes on (ml)"
EXPERTS = "ray.io/group=experts"


def fail(run: Run, lab: Lab, *options: object) -> tuple[int, str, str]:
    """Return the exit code, the error's line, and all of stderr of an `up`; nothing goes to stdout."""
    code, out, err = run("up", lab.file, "--kubernetes", *options)
    assert out == ""
    return code, one_line(err), err


def shown(lab: Lab) -> str:
    return f"kubectl --kubeconfig={lab.config} --namespace=ml"


def change_config(lab: Lab, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change cluster and user of the kubeconfig."""
    table = yaml.safe_load(lab.config.read_text())
    parts = {"cluster": table["clusters"][0]["cluster"], "user": table["users"][0]["user"]}
    change(parts)
    table["clusters"][0]["cluster"], table["users"][0]["user"] = parts["cluster"], parts["user"]
    lab.config.write_text(yaml.safe_dump(table))


def test_no_kubectl(run: Run, lab: Lab) -> None:
    lab.write_file(kubectl="no-such-kubectl")
    code, line, _ = fail(run, lab)
    assert (code, line.partition(";")[0]) == (2, "kubectl is not there: no no-such-kubectl on the PATH")


def test_a_kubeconfig_that_is_not_there(run: Run, lab: Lab, tmp_path: Path) -> None:
    lab.write_file(kubeconfig=str(tmp_path / "absent"))
    code, line, _ = fail(run, lab)
    assert (code, line.partition(";")[0]) == (2, f"stat {tmp_path}/absent: no such file or directory")


def test_an_unknown_context(run: Run, lab: Lab) -> None:
    code, line, _ = fail(run, lab, "--context", "lost")
    assert code == 2
    assert line == (
        f'context "lost" does not exist; see kubectl --kubeconfig={lab.config} --context=lost --namespace=ml config '
        "get-contexts"
    )


def test_nobody_listens(run: Run, lab: Lab) -> None:
    change_config(lab, lambda of: of["cluster"].update({"server": "https://127.0.0.1:1"}))
    code, line, _ = fail(run, lab)
    assert (code, line) == (1, f"nothing listens at 127.0.0.1:1; see {shown(lab)} cluster-info")


def test_a_server_that_does_not_answer(run: Run, lab: Lab) -> None:
    lab.write_file(request_timeout_s=1)
    lab.kube.faults.plan("*", "*", Hang(3600), 1000)
    code, line, _ = fail(run, lab)
    assert code == 1
    assert line.startswith("the server did not answer in time")


def test_a_connection_that_breaks(run: Run, lab: Lab) -> None:
    lab.kube.faults.plan("get", "rayclusters", Close(), 1000)
    code, line, _ = fail(run, lab)
    assert code == 1
    assert "broke" in line or "cannot be reached" in line


def test_a_certificate_of_a_stranger(run: Run, lab: Lab, tmp_path: Path) -> None:
    cert_file, _ = make("somebody").write(tmp_path, "somebody")
    change_config(lab, lambda of: of["cluster"].__delitem__("certificate-authority-data"))
    change_config(lab, lambda of: of["cluster"].update({"certificate-authority": str(cert_file)}))
    code, line, _ = fail(run, lab)
    assert code == 1
    assert line.startswith("the server's certificate is not trusted: x509: certificate signed by unknown authority")


def test_credentials_that_the_server_does_not_know(run: Run, lab: Lab) -> None:
    change_config(lab, lambda of: of.update(user={"token": "stale"}))
    code, line, _ = fail(run, lab)
    assert (code, line) == (1, f"the server does not know these credentials (401); see {shown(lab)} auth whoami")


def test_a_missing_namespace(run: Run, lab: Lab) -> None:
    code, line, _ = fail(run, lab, "--namespace", "nowhere")
    assert (code, line) == (2, "there is no namespace nowhere; kubectl create namespace nowhere makes it")


def test_a_missing_kuberay(run: Run, lab: Lab) -> None:
    for crd in lab.kube.store.all(CRDS):
        lab.kube.store.delete(CRDS, "", crd["metadata"]["name"])
    code, line, _ = fail(run, lab)
    assert code == 1
    assert line.startswith("the server knows no RayCluster of ray.io/v1: KubeRay is not installed: helm install")
    assert lab.writes() == [], "nothing was applied"


def test_another_kind_that_is_missing(run: Run, lab: Lab) -> None:
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "m"}, "spec": {}}
    lab.objects.append(monitor)
    lab.write()
    code, line, err = fail(run, lab)
    assert code == 1
    assert line.startswith("the server knows no PodMonitor of monitoring.coreos.com/v1")
    assert UNFINISHED in err or "created" not in err


@pytest.mark.parametrize(
    ("verb", "resource", "said"),
    [
        (
            "create",
            "rayclusters",
            "create rayclusters.ray.io in the namespace ml; see {} auth can-i create rayclusters.ray.io",
        ),
        ("get", "configmaps", "get configmaps in the namespace ml; see {} auth can-i get configmaps"),
        ("list", "pods", "list pods in the namespace ml; see {} auth can-i list pods"),
    ],
)
def test_no_permission(run: Run, lab: Lab, verb: str, resource: str, said: str) -> None:
    lab.kube.authorizer.deny(ADMIN, verb, resource)
    code, line, err = fail(run, lab)
    assert (code, line) == (1, f"admin may not {said.format(shown(lab))}")
    assert UNFINISHED in err


def test_no_permission_to_run_commands_in_pods(run: Run, lab: Lab) -> None:
    for verb in ("create", "get"):
        lab.kube.authorizer.deny(ADMIN, verb, "pods/exec")
    code, line, _ = fail(run, lab)
    assert code == 1
    assert "pods/exec in the namespace ml; see" in line
    assert lab.head.deployed == []


def test_a_field_that_is_wrong(run: Run, lab: Lab) -> None:
    lab.ray["spec"]["workerGroupSpecs"][1]["maxReplicas"] = "many"
    lab.write()
    code, line, err = fail(run, lab)
    assert code == 2
    assert line.startswith('RayCluster "mesh" is invalid: spec.workerGroupSpecs[1].maxReplicas: ')
    assert "configmap/settings created" in err
    assert UNFINISHED in err
    assert run("down", lab.file, "--kubernetes")[0] == 0
    assert "delete configmaps/settings" in lab.writes()


def test_a_field_that_nobody_knows(run: Run, lab: Lab) -> None:
    lab.ray["spec"]["autoscale"] = True
    lab.write()
    code, line, _ = fail(run, lab)
    assert code == 2
    assert 'unknown field "spec.autoscale"' in line


def test_a_quota_on_pods(run: Run, lab: Lab) -> None:
    lab.kube.store.create(QUOTAS, NAMESPACE, {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "1"}}})
    lab.head.states = {"mesh": "DEPLOYING"}
    code, line, err = fail(run, lab)
    assert code == 1
    assert line.startswith("KubeRay cannot make pods of RayCluster mesh: pods ")
    assert "is beyond the quota small: requested: pods=1, used: pods=1, limited: pods=1" in line
    assert line.endswith(f"see {shown(lab)} describe resourcequota small")
    assert UNFINISHED in err


def test_an_image_that_cannot_be_pulled_and_up_again_when_it_can(run: Run, lab: Lab) -> None:
    lab.kube.runner.fail("ray.io/node-type=head", "ImagePullBackOff", 'Back-off pulling image "ray"')
    code, line, err = fail(run, lab)
    assert (code, line) == (
        1,
        'pod mesh-head cannot pull the image ray (ImagePullBackOff): Back-off pulling image "ray"; see '
        f"{shown(lab)} describe pod mesh-head",
    )
    assert UNFINISHED in err
    lab.kube.runner.heal()
    code, out, err = run("up", lab.file, "--kubernetes", "--json")
    assert code == 0, err
    assert '"rayclusters.ray.io/mesh unchanged"' in out


def test_pods_that_find_no_node_are_waited_for_as_long_as_is_given(run: Run, lab: Lab) -> None:
    lab.head.states = {"mesh": "DEPLOYING"}
    lab.kube.runner.fail(EXPERTS, "Unschedulable", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    lab.write_file(timeout_s=3, patience_s=0)
    code, line, _ = fail(run, lab)
    assert code == 1
    assert " not within 3 s: pod mesh-experts-worker-" in line
    assert "finds no node: not enough nvidia.com/gpu: 0/2 nodes are available" in line


def test_an_application_that_takes_too_long(run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over when it has been asked for once."""
    lab.head.states, lab.head.message = {"mesh": "DEPLOYING"}, "members wait for room"

    def monotonic() -> float:
        return time.monotonic() + 3600 * any("serve status" in script for script in lab.head.scripts)

    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    code, line, err = fail(run, lab)
    states = "head 1/1; gateway 1/1; experts 2/2; application mesh DEPLOYING (members wait for room)"
    assert (code, line) == (1, f"the application is to serve: not within 60 s: {states}; see {shown(lab)} get pods")
    assert f"s] {states}\n" in err


def test_serve_that_cannot_be_asked(run: Run, lab: Lab) -> None:
    """The application is asked for now and then; what was wrong the last time counts until the next."""
    lab.head.silence = "ConnectionError: no dashboard"
    code, line, _ = fail(run, lab)
    assert (code, line) == (
        1,
        f"`serve status` in pod mesh-head failed: ConnectionError: no dashboard; see {shown(lab)} logs mesh-head",
    )


def test_an_answer_that_is_lost(run: Run, lab: Lab) -> None:
    """What was done is found when `up` is asked again."""
    lab.kube.faults.plan("create", "rayclusters", Close(done=True))
    code, _, err = fail(run, lab)
    assert code == 1
    assert UNFINISHED in err
    code, out, err = run("up", lab.file, "--kubernetes", "--json")
    assert code == 0, err
    assert '"rayclusters.ray.io/mesh unchanged"' in out


def test_ctrl_c(run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(waiting, "look", interrupt)
    code, _, err = run("up", lab.file, "--kubernetes")
    assert code == 130
    assert UNFINISHED in err


def test_containers_that_end_and_are_made_again(run: Run, lab: Lab) -> None:
    """With Ray's autoscaler a pod is not started again: KubeRay makes another, and its end is soon forgotten."""
    lab.head.states = {"mesh": "DEPLOYING"}
    lab.write_file(poll_s=0.01)
    lab.kubelet.ending = "mesh-experts-"
    code, line, _ = fail(run, lab)
    assert code == 1
    said = "container ray-worker has ended (exit code 1, Error); see"
    again = "pods of experts end soon after they start, "
    assert line.startswith(again) or said in line
    lab.kubelet.ending = "nobody"
    lab.head.states = {"mesh": "RUNNING"}
    assert run("up", lab.file, "--kubernetes")[0] == 0


def test_nodes_that_come_meanwhile(run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress tells what is waited for, and then it goes on."""
    monkeypatch.setattr(waiting, "_QUIET_S", 0.0)
    lab.kube.runner.fail("ray.io/node-type=head", "Unschedulable", "0/2 nodes are available: 2 Insufficient cpu.")

    def heal() -> None:
        lab.kube.store.wait_until(lambda: lab.phases() == ["Pending", "Running", "Running", "Running"])
        looks = lab.looks()
        # The second of these begins when what the first saw has been told.
        lab.kube.store.wait_until(lambda: lab.looks() >= looks + 2)
        lab.kube.runner.heal()

    healer = threading.Thread(target=heal)
    healer.start()
    code, _, err = run("up", lab.file, "--kubernetes")
    healer.join()
    assert code == 0, err
    assert "head 0/1 (no node); gateway 1/1; experts 2/2; pod mesh-head finds no node: not enough cpu" in err


def test_a_secret_that_is_missing(run: Run, lab: Lab) -> None:
    """Of a volume that is not there only an event tells."""
    lab.kube.runner.fail("ray.io/node-type=head", "ContainerCreating", "")

    def tell() -> None:
        lab.kube.store.wait_until(lambda: "mesh-head" in lab.pods())
        head = lab.kube.store.get(PODS, NAMESPACE, "mesh-head")
        message = 'MountVolume.SetUp failed for volume "tls" : secret "mesh-tls" not found'
        record(lab.kube.store, PODS, head, "Warning", "FailedMount", message)

    teller = threading.Thread(target=tell)
    teller.start()
    code, line, _ = fail(run, lab)
    teller.join()
    assert (code, line) == (
        1,
        f"pod mesh-head wants the Secret mesh-tls, which is not there; see {shown(lab)} describe pod mesh-head",
    )


def test_a_server_that_is_away_for_a_moment_is_waited_for(run: Run, lab: Lab) -> None:
    lab.write_file(patience_s=30)
    busy = ApiError(500, "etcdserver: leader changed")
    lab.kube.faults.plan("list", "pods", busy, 3)
    code, _, err = run("up", lab.file, "--kubernetes")
    assert code == 0, err
    assert lab.kube.faults.outstanding() == 0


def test_a_cluster_that_is_being_deleted(run: Run, lab: Lab) -> None:
    ray = {**lab.ray, "metadata": {"name": "mesh", "finalizers": ["ray.io/gcs-ft-redis-cleanup-finalizer"]}}
    lab.kube.store.create(RAY_CLUSTERS, NAMESPACE, ray)
    lab.kube.store.delete(RAY_CLUSTERS, NAMESPACE, "mesh")
    code, line, _ = fail(run, lab)
    assert (code, line) == (1, "RayCluster mesh is being deleted; try again when it is gone")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--overlay", "a", "--manifests", "b"), "--overlay and --manifests both name the manifests; give one of them"),
        (("--manifests", "absent"), "there is no absent: looked from"),
        (("--timeout-s", "0"), "provider.timeout_s: Input should be greater than 0, got 0.0"),
    ],
)
def test_options_that_are_wrong(run: Run, lab: Lab, options: tuple[str, ...], complaint: str) -> None:
    code, line, _ = fail(run, lab, *options)
    assert code == 2
    assert line.startswith(complaint)


def test_a_kustomization_that_cannot_be_built(run: Run, lab: Lab) -> None:
    (lab.manifests / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    code, line, _ = fail(run, lab)
    assert code == 2
    assert line.startswith(f"manifests {lab.manifests}: accumulating resources: accumulation err=")


@pytest.mark.parametrize("command", ["up", "down"])
def test_without_kubernetes(run: Run, lab: Lab, command: str) -> None:
    code, _, err = run(command, lab.file)
    assert code == 2
    assert f"`{command}` is for clusters: `expertmesh {command} --kubernetes`" in one_line(err)
