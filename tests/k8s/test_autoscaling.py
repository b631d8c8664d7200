"""What Ray's own autoscaler makes of the manifests: it reads them, and answers a member's demand with its group."""

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequest
from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint, LabelSelectorOperator

from tests.k8s.manifests import SERVICES, cluster_of, container_of, groups_of, settings_table

MEMBERS = {"experts": "shards", "attention": "workers"}


def config_of(name: str) -> AutoscalingConfig:
    resource = {"metadata": {"name": "expertmesh", "namespace": "default"}, "spec": cluster_of(name)}
    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)


def demand(resources: dict[str, float], labels: dict[str, str]) -> GangResourceRequest:
    """Return what Ray reports of a member's pending placement group."""
    constraints = [
        LabelSelectorConstraint(label_key=key, operator=LabelSelectorOperator.LABEL_OPERATOR_IN, label_values=[value])
        for key, value in labels.items()
    ]
    request = ResourceRequest(
        resources_bundle=resources, label_selectors=[LabelSelector(label_constraints=constraints)]
    )
    return GangResourceRequest(bundle_selectors=[{"resource_requests": [request]}])


def launched(config: AutoscalingConfig, demands: list[GangResourceRequest]) -> tuple[dict[str, int], list[Any]]:
    """Return how many pods of each group the autoscaler asks for in an empty cluster, and what it can never have."""
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=demands,
        )
    )
    counts = {launch.instance_type: launch.count for launch in reply.to_launch}
    counts.pop(config.get_head_node_type(), None)
    return counts, list(reply.infeasible_gang_resource_requests)


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("tier", MEMBERS)
def test_members_beyond_the_first_pods_are_answered_with_pods_of_their_group(name: str, tier: str) -> None:
    table, groups = settings_table(name), groups_of(name)
    limits = container_of(groups[tier])["resources"]["limits"]
    bundle = {"GPU": 1.0} if "nvidia.com/gpu" in limits else {"CPU": float(table["member_cpus"])}
    of_a_pod = int(limits.get("nvidia.com/gpu", 0)) or int(limits["cpu"]) // table["member_cpus"]
    first = {group["groupName"]: group["minReplicas"] for group in groups.values() if "groupName" in group}
    room = first[tier] * of_a_pod
    labels = table["nodes"][MEMBERS[tier]]
    config = config_of(name)
    assert launched(config, [demand(bundle, labels)] * room) == (first, [])
    if groups[tier]["maxReplicas"] == first[tier]:
        return  # the try-out has one pod of workers, and no more
    more = {**first, tier: first[tier] + 1}
    assert launched(config, [demand(bundle, labels)] * (room + 1)) == (more, [])


def test_a_label_that_no_group_has_is_a_demand_that_is_never_met() -> None:
    _, infeasible = launched(config_of("gpu"), [demand({"GPU": 1.0}, {"expertmesh.io/tier": "expert"})])
    assert len(infeasible) == 1


@pytest.mark.parametrize("name", SERVICES)
def test_ray_knows_of_each_pod_what_it_has(name: str) -> None:
    types = config_of(name).get_node_type_configs()
    assert types is not None
    for tier, group in groups_of(name).items():
        found = types[group.get("groupName", "headgroup")]
        assert found.labels == group["labels"]
        computes = tier in MEMBERS
        limits = container_of(group)["resources"]["limits"]
        assert found.resources["CPU"] == (int(limits["cpu"]) if computes else 0)
        assert found.resources.get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
