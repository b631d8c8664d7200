"""The fake API server as the real kubectl sees it."""

import copy
import json
import secrets
import ssl
import subprocess
from http.client import HTTPSConnection

import pytest
import yaml

from tests.certificates import make
from tests.k8s.manifests import K8S, OVERLAYS, kubectl, overlay
from tests.kube.cluster import FakeKubernetes
from tests.kube.conftest import Kubectl
from tests.kube.faults import Hang
from tests.kube.kubelet import ExecStreams, PlainKubelet
from tests.kube.rays import ray_cluster
from tests.kube.resources import PODS
from tests.kube.status import ApiError

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "one", "labels": {"app": "a"}},
    "spec": {"containers": [{"name": "main", "image": "image"}]},
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_applied_and_applied_again(kube: FakeKubernetes, run: Kubectl, name: str) -> None:
    kube.install_kuberay()
    kube.add_namespace("expertmesh")
    for group, plural, kind in (("monitoring.coreos.com", "podmonitors", "PodMonitor"),
                                ("monitoring.coreos.com", "prometheusrules", "PrometheusRule")):  # fmt: skip
        kube.install(open_crd(group, plural, kind))
    first = run("apply", "-k", str(K8S / "overlays" / name)).stdout
    assert first.count("created") == len(overlay(name))
    again = run("apply", "-k", str(K8S / "overlays" / name)).stdout
    assert again.count("unchanged") + again.count("configured") == len(overlay(name))
    run("delete", "--wait=false", "-k", str(K8S / "overlays" / name))


def open_crd(group: str, plural: str, kind: str) -> dict[str, object]:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    names = {"kind": kind, "plural": plural}
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": [version]}
    return {"metadata": {"name": f"{plural}.{group}"}, "spec": spec}


def test_an_object_is_created_read_changed_and_deleted(run: Kubectl) -> None:
    run("create", "configmap", "settings", "--from-literal=a=1")
    assert json.loads(run("get", "cm", "settings", "-o", "json").stdout)["data"] == {"a": "1"}
    assert "already exists" in run("create", "configmap", "settings", code=1).stderr
    run("patch", "cm", "settings", "--type=merge", "-p", '{"data": {"b": "2", "a": null}}')
    run("patch", "cm", "settings", "--type=json", "-p", '[{"op": "add", "path": "/data/c", "value": "3"}]')
    assert json.loads(run("get", "cm", "settings", "-o", "json").stdout)["data"] == {"b": "2", "c": "3"}
    run("label", "cm", "settings", "tier=x")
    assert run("get", "cm", "-l", "tier in (x, y)", "-o", "name").stdout == "configmap/settings\n"
    assert run("get", "cm", "-l", "tier notin (x)", "-o", "name").stdout == ""
    run("delete", "cm", "settings")
    assert "(NotFound)" in run("get", "cm", "settings", code=1).stderr


def test_apply_merges_what_it_applied_before(run: Kubectl) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}}
    ports = [{"name": "a", "port": 1}, {"name": "b", "port": 2}]
    run("apply", "-f", "-", stdin=yaml.safe_dump({**service, "spec": {"ports": ports, "selector": {"app": "a"}}}))
    changed = [{"name": "a", "port": 1, "targetPort": 9}, {"name": "c", "port": 3}]
    run("apply", "-f", "-", stdin=yaml.safe_dump({**service, "spec": {"ports": changed, "selector": {"app": "a"}}}))
    found = json.loads(run("get", "svc", "web", "-o", "json").stdout)["spec"]["ports"]
    assert sorted(found, key=lambda port: int(port["port"])) == changed
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump({**service, "spec": {"type": "ClusterIP"}}))
    assert json.loads(run("get", "svc", "web", "-o", "json").stdout)["spec"]["type"] == "ClusterIP"


def test_wait_sees_a_cluster_become_ready_and_go(kube: FakeKubernetes, run: Kubectl) -> None:
    kube.install_kuberay()
    run("create", "-f", "-", stdin=yaml.safe_dump(ray_cluster()))
    run("wait", "raycluster/mesh", "--for=condition=RayClusterProvisioned", "--timeout=30s")
    run("wait", "pod", "-l", "ray.io/cluster=mesh", "--for=condition=Ready", "--timeout=30s")
    assert len(run("get", "pods", "-l", "ray.io/node-type=worker", "-o", "name").stdout.splitlines()) == 2
    run("delete", "raycluster", "mesh")
    run("wait", "pod", "-l", "ray.io/cluster=mesh", "--for=delete", "--timeout=30s")
    assert not kube.store.all(PODS)


def test_without_its_definition_a_kind_is_unknown(kube: FakeKubernetes, run: Kubectl) -> None:
    cluster = yaml.safe_dump(ray_cluster())
    assert 'no matches for kind "RayCluster"' in run("apply", "-f", "-", stdin=cluster, code=1).stderr
    assert "doesn't have a resource type" in run("get", "rayclusters", code=1).stderr
    kube.install_kuberay()
    run("apply", "-f", "-", stdin=cluster)


def test_a_wrong_field_is_refused_by_its_name(kube: FakeKubernetes, run: Kubectl) -> None:
    kube.install_kuberay()
    wrong = ray_cluster()
    wrong["spec"]["workerGroupSpecs"][0]["minReplicas"] = "two"
    told = run("apply", "-f", "-", stdin=yaml.safe_dump(wrong), code=1).stderr
    assert "is invalid" in told
    assert "spec.workerGroupSpecs[0].minReplicas" in told
    misspelt = ray_cluster()
    misspelt["spec"]["enableInTreeAutoScaling"] = True
    told = run("apply", "-f", "-", stdin=yaml.safe_dump(misspelt), code=1).stderr
    assert 'unknown field "spec.enableInTreeAutoScaling"' in told
    told = run("apply", "--validate=warn", "-f", "-", stdin=yaml.safe_dump(misspelt)).stderr
    assert 'unknown field "spec.enableInTreeAutoScaling"' in told
    assert "enableInTreeAutoScaling" not in kube.store.all(kube.operator.resource)[0]["spec"]


def test_commands_run_in_pods(kubelet: PlainKubelet, kube: FakeKubernetes, run: Kubectl) -> None:
    def answer(command: list[str], streams: ExecStreams) -> int:
        streams.write_stderr(" ".join(command).encode())
        while data := streams.stdin.get():
            streams.write_stdout(data.upper())
        return 7

    kubelet.answers = answer
    run("create", "-f", "-", stdin=yaml.safe_dump(POD))
    run("wait", "pod/one", "--for=condition=Ready", "--timeout=30s")
    done = run("exec", "-i", "one", "--", "tr", "a b", stdin="text\n" * 20_000, code=7)
    assert done.stdout == "TEXT\n" * 20_000
    assert done.stderr.startswith("tr a b")
    assert "exit code 7" in done.stderr
    assert run("exec", "one", "--", "true", code=7).stdout == ""
    assert run("logs", "one").stdout == "main of one\n"
    assert "not valid" in run("logs", "one", "-c", "other", code=1).stderr
    assert "NotFound" in run("exec", "two", "--", "true", code=1).stderr


def test_who_may_what(kube: FakeKubernetes, run: Kubectl) -> None:
    (role,) = [found for found in overlay("raycluster") if found["kind"] == "Role"]
    (binding,) = copy.deepcopy([found for found in overlay("raycluster") if found["kind"] == "RoleBinding"])
    kube.install_kuberay()
    kube.add_namespace("expertmesh")
    run("apply", "-f", "-", stdin=yaml.safe_dump_all([role, binding]))
    account = kube.kubeconfig("system:serviceaccount:expertmesh:expertmesh-autoscaler", "expertmesh")
    assert run("auth", "can-i", "patch", "rayclusters", config=account).stdout == "yes\n"
    assert run("auth", "can-i", "delete", "pods", config=account, code=1).stdout == "no\n"
    told = run("delete", "pod", "one", config=account, code=1).stderr
    assert 'cannot delete resource "pods" in API group "" in the namespace "expertmesh"' in told
    del binding["subjects"][0]["namespace"]
    assert "subjects[0].namespace" in run("apply", "-f", "-", stdin=yaml.safe_dump(binding), code=1).stderr
    kube.authorizer.deny("admin", "create", "pods/exec")
    assert run("auth", "can-i", "create", "pods", "--subresource=exec", code=1).stdout == "no\n"
    assert run("auth", "can-i", "create", "pods").stdout == "yes\n"


def test_strangers_are_refused(kube: FakeKubernetes, run: Kubectl) -> None:
    run("get", "pods", config=kube.kubeconfig(by_token=True))
    forged = yaml.safe_load(kube.kubeconfig(by_token=True).read_text())
    forged["users"][0]["user"]["token"] = secrets.token_hex(8)
    path = kube.ca_file.parent / "forged"
    path.write_text(yaml.safe_dump(forged))
    assert "Unauthorized" in run("get", "pods", config=path, code=1).stderr
    stranger = kube.certificate("admin", make("another authority"))
    context = ssl.create_default_context(cafile=str(kube.ca_file))
    context.load_cert_chain(*stranger)
    connection = HTTPSConnection("127.0.0.1", kube.port, context=context)
    with pytest.raises((ssl.SSLError, ConnectionError)):  # noqa: PT012
        connection.request("GET", "/version")
        connection.getresponse()
    connection.close()


def test_pods_end_within_their_grace(kubelet: PlainKubelet, kube: FakeKubernetes, run: Kubectl) -> None:
    run("create", "-f", "-", stdin=yaml.safe_dump(POD))
    run("wait", "pod/one", "--for=condition=Ready", "--timeout=30s")
    run("delete", "pod", "one")
    assert kubelet.events == [("start", "one"), ("stop", "one")]


def test_what_goes_wrong_on_purpose(kube: FakeKubernetes, run: Kubectl) -> None:
    kube.faults.plan("create", "configmaps", ApiError(409, "busy"))
    assert "busy" in run("create", "cm", "a", code=1).stderr
    kube.faults.plan("create", "configmaps", Hang(0.01))
    run("create", "cm", "a")
    assert not kube.faults.outstanding()
    assert [request.code for request in kube.faults.requests("create", "configmaps")] == [409, 201]


def test_a_watch_tells_of_each_change(kube: FakeKubernetes, run: Kubectl) -> None:
    command = [kubectl(), "get", "cm", "-o", "name", "--watch-only"]
    config = kube.kubeconfig()
    env = {"KUBECONFIG": str(config), "HOME": str(config.parent)}
    watching = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        kube.store.wait_until(lambda: bool(kube.faults.requests("watch", "configmaps")))
        run("create", "cm", "a")
        assert watching.stdout is not None
        assert watching.stdout.readline() == "configmap/a\n"
    finally:
        watching.kill()
        watching.wait()
        if watching.stdout is not None:
            watching.stdout.close()


def test_replace_knows_what_is_stale(kube: FakeKubernetes, run: Kubectl) -> None:
    kube.install_kuberay()
    cluster = yaml.safe_dump(ray_cluster(replicas=1))
    first = json.loads(run("create", "-f", "-", "-o", "json", stdin=cluster).stdout)
    kube.store.wait_until(lambda: kube.store.all(kube.operator.resource)[0].get("status", {}).get("state") == "ready")
    stale = run("replace", "-f", "-", stdin=json.dumps(first), code=1).stderr
    assert "the object has been modified" in stale
    current = json.loads(run("get", "rayclusters.ray.io/mesh", "-o", "json").stdout)
    current["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 9
    del current["status"]
    tried = json.loads(run("replace", "--dry-run=server", "-f", "-", "-o", "json", stdin=json.dumps(current)).stdout)
    assert tried["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 9
    assert kube.store.all(kube.operator.resource)[0]["spec"] == first["spec"]
    replaced = json.loads(run("replace", "-f", "-", "-o", "json", stdin=json.dumps(current)).stdout)
    assert replaced["metadata"]["generation"] == 2
    assert replaced["status"]["state"] == "ready"
    run("create", "--dry-run=server", "-f", "-", stdin=cluster, code=1)


def test_objects_are_found_and_deleted_by_label(kube: FakeKubernetes, run: Kubectl) -> None:
    assert "NotFound" in run("get", "--raw", "/apis/ray.io/v1", code=1).stderr
    kube.install_kuberay()
    assert "rayclusters" in run("get", "--raw", "/apis/ray.io/v1").stdout
    assert run("get", "rayclusters.ray.io/no", "rayservices.ray.io/no", "--ignore-not-found", "-o", "json").stdout == ""
    run("create", "-f", "-", stdin=yaml.safe_dump(ray_cluster(replicas=1)))
    run("label", "raycluster", "mesh", "made-by=test")
    kube.store.wait_until(lambda: len(kube.store.all(PODS)) == 2)
    about = ("get", "events", "--field-selector", "involvedObject.name=mesh", "-o", "json")
    reasons = {event["reason"] for event in json.loads(run(*about).stdout)["items"]}
    assert reasons == {"CreatedHeadPod", "CreatedWorkerPod"}
    run("delete", "rayclusters.v1.ray.io", "-l", "made-by=other")
    assert run("get", "rayclusters", "-o", "name").stdout
    run("delete", "rayclusters.v1.ray.io", "-l", "made-by=test")
    assert not run("get", "rayclusters", "-o", "name").stdout
