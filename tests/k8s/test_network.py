"""Who reaches whom: selectors and labels, services, ports, network policies."""

import pytest

from expertmesh.cluster.settings import ServeSettings
from tests.k8s.manifests import (
    COMPONENT,
    OVERLAYS,
    SERVICES,
    Manifest,
    cluster_of,
    container_of,
    groups_of,
    of_kind,
    overlay,
    ports_of,
    serve_config,
    settings_table,
)


def pods_of(name: str) -> list[dict[str, str]]:
    """Return the labels of every pod that comes of an overlay."""
    sets = [s["spec"]["template"]["metadata"]["labels"] for s in of_kind(overlay(name), "StatefulSet")]
    return [*(group["template"]["metadata"]["labels"] for group in groups_of(name).values()), *sets]


def selected(name: str, selector: Manifest) -> list[dict[str, str]]:
    wanted = selector.get("matchLabels", selector if "matchExpressions" not in selector else {})
    return [labels for labels in pods_of(name) if wanted.items() <= labels.items()]


def policy(name: str, policy_name: str) -> Manifest:
    (found,) = [p for p in of_kind(overlay(name), "NetworkPolicy") if p["metadata"]["name"] == policy_name]
    spec: Manifest = found["spec"]
    return spec


def open_ports(rules: list[Manifest]) -> set[int]:
    return {port["port"] for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_selector_selects_a_pod(name: str) -> None:
    for manifest in overlay(name):
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None and manifest["kind"] != "StatefulSet":
            assert selected(name, selector), manifest["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_lead_to_ports_of_the_pods_that_they_select(name: str) -> None:
    groups = groups_of(name)
    for service in of_kind(overlay(name), "Service"):
        tier = service["spec"]["selector"].get(COMPONENT)
        if tier is not None:
            targets = {port["targetPort"] for port in service["spec"]["ports"]}
            assert targets <= ports_of(groups[tier]).keys(), service["metadata"]["name"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_those_that_the_processes_listen_on(name: str) -> None:
    ports, settings = ports_of(groups_of(name)["gateway"]), settings_table(name)
    assert ports["grpc"] == settings["grpc_port"] == ServeSettings.model_fields["grpc_port"].default
    assert (
        ports["serve"] == serve_config(name)["http_options"]["port"] == ServeSettings.model_fields["http_port"].default
    )
    assert settings["grpc_host"] == settings["http_host"] == serve_config(name)["http_options"]["host"] == "0.0.0.0"  # noqa: S104
    assert settings["http_port"] == ports["serve"]
    for group in groups_of(name).values():
        assert ports_of(group)["metrics"] == int(group["rayStartParams"]["metrics-export-port"])
    probe = container_of(groups_of(name)["gateway"])["readinessProbe"]
    asked = probe["grpc"]["port"] if "grpc" in probe else ports[probe["httpGet"]["port"]]
    assert asked in (ports["grpc"], ports["serve"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_policies_open_the_ports_that_are_needed_and_no_others(name: str) -> None:
    groups = groups_of(name)
    gateway, head = ports_of(groups["gateway"]), ports_of(groups["control"])
    assert open_ports(policy(name, "expertmesh-clients")["ingress"]) == {gateway["grpc"], gateway["serve"]}
    assert open_ports(policy(name, "expertmesh-operator")["ingress"]) == {head["dashboard"], gateway["serve"]}
    # Rendezvous, Gloo, NCCL, token streams and Ray's workers listen on ports that are free when they begin.
    mesh = policy(name, "expertmesh-mesh")
    (inwards,) = mesh["ingress"]
    outwards = mesh["egress"][0]
    assert "ports" not in inwards
    assert "ports" not in outwards
    for rule in (inwards["from"], outwards["to"]):
        assert len(selected(name, rule[0]["podSelector"])) == len(groups), "between all of our pods"


def test_the_components_policies_open_their_ports() -> None:
    metrics = ports_of(groups_of("production")["experts"])["metrics"]
    assert open_ports(policy("production", "expertmesh-metrics")["ingress"]) == {metrics}
    (redis,) = of_kind(overlay("production"), "StatefulSet")
    port = redis["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert cluster_of("production")["gcsFaultToleranceOptions"]["redisAddress"] == f"expertmesh-redis:{port}"
    assert open_ports(policy("production", "expertmesh-redis")["ingress"]) == {port}
    assert open_ports(policy("production", "expertmesh-to-redis")["egress"]) == {port}
