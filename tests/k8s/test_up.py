"""`expertmesh up|down --kubernetes` with the real kubectl against the fake API: what is applied, kept, deleted."""

import json
import threading
from typing import Any

import pytest
import yaml

from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.cluster.kubernetes.objects import LABEL
from tests.k8s.conftest import Run
from tests.k8s.lab import APPLICATION, NAME, NAMESPACE, Lab, one_line
from tests.k8s.manifests import K8S
from tests.k8s.played_kuberay import RAY_SERVICES, play
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.resources import PODS
from tests.kube.status import conflict

CONFLICT = conflict("rayclusters", "ray.io", NAME)


def up(run: Run, lab: Lab, *options: object) -> tuple[int, str, str]:
    return run("up", lab.file, "--kubernetes", *options)


def down(run: Run, lab: Lab, *options: object) -> tuple[int, str, str]:
    return run("down", lab.file, "--kubernetes", *options)


def test_from_an_empty_cluster_to_one_that_serves(run: Run, lab: Lab) -> None:
    code, out, err = up(run, lab)
    assert code == 0, err
    assert lab.cluster()["metadata"]["labels"] == {LABEL: NAME}
    assert len(lab.pods()) == 4
    assert lab.head.deployed == [APPLICATION]
    assert "configmap/settings created" in err
    assert "rayclusters.ray.io/mesh created" in err
    assert "mesh serves in the namespace ml" in out
    assert "mesh-grpc.ml.svc:50051" in out
    assert f"kubectl --kubeconfig={lab.config} --namespace=ml port-forward service/mesh-grpc 50051" in out
    assert 'expertmesh generate "def main():" --max-tokens 32 --url localhost:50051\n' in out


def test_json_is_one_object(run: Run, lab: Lab) -> None:
    code, out, _ = up(run, lab, "--json", "--image", "registry/mesh:2")
    answer = json.loads(out)
    assert code == 0
    assert answer.pop("took_s") > 0
    assert len(answer.pop("next_steps")) == 2
    assert answer == {
        "cluster": NAME,
        "namespace": NAMESPACE,
        "applied": [
            "serviceaccount/mesh created",
            "configmap/settings created",
            "service/mesh-grpc created",
            "rayclusters.ray.io/mesh created",
        ],
        "application": "RUNNING",
        "services": {"mesh-grpc": ["mesh-grpc.ml.svc:50051"]},
    }
    images = {pod["spec"]["containers"][0]["image"] for pod in lab.kube.store.all(PODS, NAMESPACE)}
    assert images == {"registry/mesh:2"}


def test_up_again_changes_what_changed_and_keeps_what_is_the_autoscaler_s(run: Run, lab: Lab) -> None:
    assert up(run, lab)[0] == 0
    lab.scale(3)
    version = lab.cluster()["metadata"]["generation"]
    code, out, err = up(run, lab, "--json")
    assert code == 0, err
    assert {line.rpartition(" ")[2] for line in json.loads(out)["applied"]} == {"unchanged"}
    assert lab.cluster()["metadata"]["generation"] == version

    assert "stay as they are" not in err
    lab.objects[0]["data"]["a.toml"] = "shards = 3"
    (_, experts) = lab.ray["spec"]["workerGroupSpecs"]
    lab.ray["spec"]["workerGroupSpecs"].reverse()
    experts["maxReplicas"] = 7
    experts["template"]["spec"]["containers"][0]["image"] = "next"
    lab.write()
    code, out, err = up(run, lab, "--json")
    assert code == 0, err
    words = dict(line.split(" ") for line in json.loads(out)["applied"])
    assert words == {
        "configmap/settings": "configured",
        "serviceaccount/mesh": "unchanged",
        "service/mesh-grpc": "unchanged",
        "rayclusters.ray.io/mesh": "replaced",
    }
    assert "pods of experts that run stay as they are" in err
    group = lab.group()
    assert (group["replicas"], group["maxReplicas"]) == (3, 7)
    assert group["scaleStrategy"] == {"workersToDelete": ["mesh-gone"]}
    assert [found["groupName"] for found in lab.cluster()["spec"]["workerGroupSpecs"]] == ["gateway", "experts"]


def test_a_conflict_is_read_again_and_tried_again(run: Run, lab: Lab) -> None:
    assert up(run, lab)[0] == 0
    lab.ray["spec"]["workerGroupSpecs"][1]["maxReplicas"] = 7
    lab.write()
    lab.kube.faults.plan("update", "rayclusters", CONFLICT, 2)
    code, _, err = up(run, lab)
    assert (code, err.count("RayCluster mesh was changed meanwhile; it is read again")) == (0, 2)
    assert lab.group()["maxReplicas"] == 7


def test_conflicts_without_end_are_given_up_with_a_line(run: Run, lab: Lab) -> None:
    assert up(run, lab)[0] == 0
    lab.kube.faults.plan("update", "rayclusters", CONFLICT, 1000)
    code, _, err = up(run, lab)
    assert code == 1
    assert one_line(err).startswith("RayCluster mesh was changed by others each of 5 times")


def test_what_the_autoscaler_changes_between_reading_and_writing_is_kept(
    run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses the stale version, and what was written meanwhile is read."""
    assert up(run, lab)[0] == 0
    lab.ray["spec"]["workerGroupSpecs"][1]["maxReplicas"] = 7
    lab.write()
    find, counts = Kubectl.find, iter(range(100))

    def find_and_be_late(self: Kubectl, *names: str) -> list[dict[str, Any]]:
        found = find(self, *names)
        # The first look is whether there is another fleet; between the second and its write comes the autoscaler.
        if next(counts) == 1:
            lab.scale(4)
        return found

    monkeypatch.setattr(Kubectl, "find", find_and_be_late)
    code, _, err = up(run, lab)
    assert (code, err.count("it is read again")) == (0, 1)
    assert (lab.group()["replicas"], lab.group()["maxReplicas"]) == (4, 7)


def test_an_application_that_comes_late_is_waited_for(run: Run, lab: Lab) -> None:
    lab.write_file(patience_s=30)
    lab.head.refusals = ["ConnectionError: the dashboard is not there yet"]
    code, _, err = up(run, lab)
    assert (code, lab.head.deployed) == (0, [APPLICATION]), err


def test_an_application_that_fails_is_told_with_serve_s_words(run: Run, lab: Lab) -> None:
    lab.head.states, lab.head.message = {"mesh": "DEPLOY_FAILED"}, "InputError: shards is 0"
    code, _, err = up(run, lab)
    assert code == 1
    assert one_line(err).startswith("the application mesh did not come up: InputError: shards is 0; see kubectl")
    assert "not finished; what was applied stays: `down` removes it, `up` again goes on" in err
    lab.head.states = {"mesh": "RUNNING"}
    assert up(run, lab)[0] == 0


def test_down_deletes_the_cluster_first_then_the_rest_and_never_volumes(run: Run, lab: Lab) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    lab.objects.append(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": claim}
    )
    lab.write()
    assert up(run, lab)[0] == 0
    before = len(lab.writes())
    code, out, err = down(run, lab)
    assert (code, out) == (0, "mesh is gone from the namespace ml; volumes are kept\n"), err
    deleted = lab.writes()[before:]
    assert deleted[0] == "delete rayclusters/mesh"
    assert sorted(deleted[1:]) == [
        "delete configmaps/settings",
        "delete serviceaccounts/mesh",
        "delete services/mesh-grpc",
    ]
    assert lab.pods() == []
    code, out, _ = down(run, lab, "--json")
    assert (code, json.loads(out)["deleted"]) == (0, [])
    assert down(run, lab)[1] == "nothing of mesh in the namespace ml\n"


def test_objects_of_before_that_the_manifests_have_no_more_go_too(run: Run, lab: Lab) -> None:
    """As ConfigMaps whose name has a hash of their content."""
    assert up(run, lab)[0] == 0
    lab.objects[0]["metadata"]["name"] = "settings-2"
    lab.write()
    assert up(run, lab)[0] == 0
    assert down(run, lab)[0] == 0
    assert {"delete configmaps/settings", "delete configmaps/settings-2"} <= set(lab.writes())


def test_down_leaves_a_cluster_that_others_applied(run: Run, lab: Lab) -> None:
    lab.kube.store.create(RAY_CLUSTERS, NAMESPACE, lab.ray)
    code, _, err = down(run, lab)
    assert code == 1
    assert "RayCluster mesh was not applied by `up`: it has no label expertmesh.io/up=mesh" in one_line(err)
    assert lab.cluster()


def test_a_dry_run_asks_the_server_and_changes_nothing(run: Run, lab: Lab) -> None:
    code, out, err = up(run, lab, "--dry-run")
    assert code == 0, err
    objects = list(yaml.safe_load_all(out))
    assert [found["kind"] for found in objects] == ["ServiceAccount", "ConfigMap", "Service", "RayCluster"]
    assert "configmap/settings created (server dry run)" in err
    assert "rayclusters.ray.io/mesh created (server dry run)" in err
    assert lab.pods() == []
    assert lab.kube.store.all(RAY_CLUSTERS) == []
    code, out, _ = up(run, lab, "--dry-run", "--json")
    answer = json.loads(out)
    assert (code, len(answer["objects"]), len(answer["server"]), answer["unasked"]) == (0, 4, 4, None)


def test_a_dry_run_without_a_server_says_so_and_prints(run: Run, lab: Lab) -> None:
    table = yaml.safe_load(lab.config.read_text())
    table["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    lab.config.write_text(yaml.safe_dump(table))
    code, out, err = up(run, lab, "--dry-run")
    assert code == 0
    assert len(list(yaml.safe_load_all(out))) == 4
    assert "no server was asked: nothing listens at 127.0.0.1:1" in err


def test_a_ray_service_is_waited_for_also_through_an_upgrade(run: Run, lab: Lab) -> None:
    spec = lab.ray["spec"]
    lab.ray = {**lab.ray, "kind": "RayService", "spec": {"serveConfigV2": APPLICATION, "rayClusterConfig": spec}}
    lab.write()
    operator = threading.Thread(target=play, args=(lab, 2))
    operator.start()
    code, _, err = up(run, lab)
    assert code == 0, err
    assert "rayservices.ray.io/mesh created" in err
    assert lab.head.deployed == [], "KubeRay deploys"
    spec["workerGroupSpecs"][1]["maxReplicas"] = 7
    lab.write()
    code, _, err = up(run, lab)
    operator.join()
    assert code == 0, err
    assert "rayservices.ray.io/mesh replaced" in err
    (service,) = lab.kube.store.all(RAY_SERVICES)
    assert service["status"]["activeServiceStatus"]["rayClusterName"] == "mesh-1"

    lab.ray = {**lab.ray, "kind": "RayCluster", "spec": spec}
    lab.write()
    code, _, err = up(run, lab)
    assert code == 1
    assert "has the RayService mesh, and the manifests have a RayCluster of that name: take it down first" in err

    code, _, err = down(run, lab)
    assert code == 0, err
    assert lab.pods() == []
    assert lab.kube.store.all(RAY_CLUSTERS) == []


def test_another_namespace_than_that_of_the_manifests(run: Run, lab: Lab) -> None:
    lab.ray["metadata"]["namespace"] = lab.objects[0]["metadata"]["namespace"] = "home"
    lab.write()
    code, _, err = up(run, lab)
    assert code == 0, err
    assert len(lab.pods()) == 4
    assert down(run, lab)[0] == 0
    assert lab.pods() == []


@pytest.mark.parametrize("name", ["cpu-try-out", "gpu", "raycluster"])
def test_the_server_takes_every_overlay(run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In another namespace than they name. `production` has kinds of Prometheus's operator, which is not here."""
    monkeypatch.chdir(K8S.parent)
    monkeypatch.setenv("KUBECONFIG", str(lab.config))
    monkeypatch.setenv("PATH", str(lab.kubectl).rpartition("/")[0], prepend=":")
    code, out, err = run(
        "up", "--kubernetes", "--overlay", name, "--namespace", NAMESPACE, "--dry-run", "--image", "i:1"
    )
    assert code == 0, err
    objects = list(yaml.safe_load_all(out))
    assert err.count("(server dry run)") == len(objects) > 10
    assert {found["metadata"]["namespace"] for found in objects} == {NAMESPACE}


def test_the_manifests_of_the_project_come_up(run: Run, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """k8s/ray-up.yaml as it is, but for where the cluster is."""
    monkeypatch.chdir(K8S.parent)
    monkeypatch.setenv("KUBECONFIG", str(lab.config))
    monkeypatch.setenv("PATH", str(lab.kubectl).rpartition("/")[0], prepend=":")
    lab.kube.add_namespace("expertmesh")
    lab.head.states = {"expertmesh": "RUNNING"}
    code, out, err = run("up", "--kubernetes")
    assert code == 0, err
    assert lab.head.deployed == [(K8S / "overlays" / "raycluster" / "application.yaml").read_text()]
    assert "expertmesh-http.expertmesh.svc:8000" in out
    tiers = {pod["metadata"]["labels"]["ray.io/group"] for pod in lab.kube.store.all(PODS, "expertmesh")}
    assert tiers == {"headgroup", "gateway", "attention", "experts"}
    code, _, err = run("down", "--kubernetes")
    assert code == 0, err
    assert lab.kube.store.all(PODS, "expertmesh") == []
