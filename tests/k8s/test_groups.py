"""The groups of pods: how Ray is started in them, what they have room for, what they may do, how they end."""

import pytest
from ray.scripts.scripts import start as ray_start

from expertmesh.actors.gateway import application
from tests.k8s.manifests import (
    COMPONENT,
    OVERLAYS,
    SERVICES,
    Manifest,
    application_of,
    cluster_of,
    container_of,
    groups_of,
    of_kind,
    overlay,
    ports_of,
    settings_table,
)

MEMBERS = {"experts": "shards", "attention": "workers"}  # groups, and the settings of who runs in them


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_is_started_with_options_that_it_has_and_ports_that_do_not_meet(name: str) -> None:
    known = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
    for group in groups_of(name).values():
        parameters = group["rayStartParams"]
        assert parameters.keys() <= known
        # KubeRay refuses or overrides these: labels and resources are fields of the group.
        assert not parameters.keys() & {"labels", "resources", "address", "block", "head"}
        assert all(isinstance(value, str) for value in parameters.values())
        workers = range(int(parameters["min-worker-port"]), int(parameters["max-worker-port"]) + 1)
        fixed = [
            int(value) for option, value in parameters.items() if option.endswith("-port") and "worker" not in option
        ]
        ports = [*fixed, *(port for port in ports_of(group).values() if port not in fixed)]
        assert len(set(ports)) == len(ports)
        assert not set(ports) & set(workers)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_head_and_the_gateways_compute_nothing(name: str) -> None:
    groups = groups_of(name)
    assert {tier for tier, group in groups.items() if group["rayStartParams"].get("num-cpus") == "0"} == {
        "control",
        "gateway",
    }
    for tier in ("control", "gateway"):
        assert not any("gpu" in resource for resource in container_of(groups[tier])["resources"]["limits"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_autoscaler_finds_what_it_reads_by_key(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["scaleStrategy"] == {"workersToDelete": []}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # KubeRay refuses any other with this autoscaler.
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"


@pytest.mark.parametrize("name", SERVICES)
def test_members_ask_for_the_labels_of_their_groups(name: str) -> None:
    nodes = settings_table(name)["nodes"]
    labels = {tier: group["labels"] for tier, group in groups_of(name).items()}
    assert nodes["controller"] == labels["control"]
    assert nodes["gateways"] == labels["gateway"]
    for tier, members in MEMBERS.items():
        assert nodes[members] == labels[tier]
    assert (
        f'"{nodes["domain_label"]}": "$(NODE_NAME)"' in environment(groups_of(name)["experts"])["RAY_OVERRIDE_LABELS"]
    )


def environment(group: Manifest) -> dict[str, str]:
    """Return the variables whose values stand there; each that another names must stand before it."""
    found: dict[str, str] = {}
    for variable in container_of(group)["env"]:
        value = variable.get("value", "")
        assert all(f"$({name})" not in value or name in found for name in ("NODE_NAME", "POD_IP"))
        found[variable["name"]] = value
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_groups_have_room_for_the_members_at_first_and_at_most(name: str) -> None:
    table = settings_table(name)
    for tier, members in MEMBERS.items():
        group = groups_of(name)[tier]
        limits = container_of(group)["resources"]["limits"]
        of_a_pod = int(limits.get("nvidia.com/gpu", 0)) or int(limits["cpu"]) // table["member_cpus"]
        assert table[members] <= group["minReplicas"] * of_a_pod
        threads = table.get(f"{members.removesuffix('s')}_threads") or table["member_cpus"]
        assert 0 < threads * of_a_pod <= int(limits["cpu"])
        assert table["autoscale"][members]["max_count"] <= group["maxReplicas"] * of_a_pod
    on_gpus = "nvidia.com/gpu" in limits
    assert (table["device"] == "cuda") == on_gpus


@pytest.mark.parametrize("name", OVERLAYS)
def test_requests_are_limits_for_accelerators_and_memory(name: str) -> None:
    for tier, group in groups_of(name).items():
        resources = container_of(group)["resources"]
        requests, limits = resources["requests"], resources["limits"]
        assert requests.keys() == limits.keys() >= {"cpu", "memory"}
        assert all(requests[key] == limits[key] for key in limits if key != "cpu"), tier
        if "nvidia.com/gpu" in limits:
            (toleration,) = group["template"]["spec"]["tolerations"]
            assert toleration["key"] == "nvidia.com/gpu"
        elif tier in MEMBERS:
            assert requests["cpu"] == limits["cpu"], "members claim whole cores"


def prepare_command(group: Manifest) -> list[str]:
    """Return what a pod runs before it ends."""
    command: list[str] = container_of(group)["lifecycle"]["preStop"]["exec"]["command"]
    return command


@pytest.mark.parametrize("name", SERVICES)
def test_whoever_ends_has_time_for_its_streams(name: str) -> None:
    drain_s = application_of(name)["args"]["drain_s"]
    for tier, group in groups_of(name).items():
        *command, prepare_s = prepare_command(group)
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= int(prepare_s) + 10
        if tier == "control":
            # The head that Serve's controller is on serves what gateways that end with it still have.
            assert command == ["sleep"]
            assert int(prepare_s) > drain_s + application.STOP_S
        else:
            # Serve ends a gateway at once if no more than its own time is left until then. Members that find no room
            # elsewhere are needed for as long.
            assert command == ["expertmesh", "leave", "--grace-s"]
            assert int(prepare_s) == drain_s + application.STOP_S
    (service,) = of_kind(overlay(name), "RayService")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > drain_s


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_container_may_do_more_than_it_must(name: str) -> None:
    templates = [group["template"] for group in groups_of(name).values()]
    templates += [s["spec"]["template"] for s in of_kind(overlay(name), "StatefulSet")]
    contexts: list[Manifest] = [cluster_of(name)["autoscalerOptions"]["securityContext"]]
    for template in templates:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["runAsUser"] > 0
        assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts += [container["securityContext"] for container in template["spec"]["containers"]]
    for context in contexts:
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_the_head_may_ask_kubernetes_and_only_for_what_its_autoscaler_needs(name: str) -> None:
    accounts = {tier: group["template"]["spec"]["serviceAccountName"] for tier, group in groups_of(name).items()}
    assert {tier for tier, account in accounts.items() if account == "expertmesh-autoscaler"} == {"control"}
    (binding,) = of_kind(overlay(name), "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["expertmesh-autoscaler"]
    (role,) = of_kind(overlay(name), "Role")
    allowed = {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}
    assert allowed == {"pods": {"get", "list", "watch"}, "rayclusters": {"get", "patch"}}
    for tier, group in groups_of(name).items():
        if tier != "control":
            assert group["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_budgets_let_nodes_be_drained(name: str) -> None:
    groups = groups_of(name)
    for budget in of_kind(overlay(name), "PodDisruptionBudget"):
        group = groups[budget["spec"]["selector"]["matchLabels"][COMPONENT]]
        assert isinstance(budget["spec"]["minAvailable"], int), "Kubernetes counts no RayCluster's pods in percent"
        assert 0 < budget["spec"]["minAvailable"] < group["minReplicas"]
