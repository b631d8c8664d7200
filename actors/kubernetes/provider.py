"""The provider behind `ray up` on Kubernetes: a facade, KubeRay and Ray's autoscaler in the head's pod do the work.

Ray's command takes it for a cloud in which it starts a head by itself: creating the head applies the manifests, all
of them, and waits until they serve. Workers are the autoscaler's; nothing here makes one. A node is a pod, by its name.
"""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import click
from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler._private.util import hash_launch_conf
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    STATUS_WAITING_FOR_SSH,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from expertmesh.actors.kubernetes.bringing_up import Outcome, bring_up
from expertmesh.actors.kubernetes.command_runner import KubectlCommandRunner
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.actors.kubernetes.live import cluster_names, find_pods, find_ray
from expertmesh.actors.kubernetes.manifests import load_yaml
from expertmesh.actors.kubernetes.taking_down import remains, take_down
from expertmesh.cluster.errors import ExpertMeshError, InputError, NotFoundError
from expertmesh.cluster.kubernetes.objects import Manifest
from expertmesh.cluster.kubernetes.pods import group_of, is_ending
from expertmesh.cluster.kubernetes.settings import read_provider

_AT_A_HEAD = ("exec", "attach", "dashboard", "get-head-ip", "monitor", "rsync-down", "rsync-up", "submit")


class KubernetesProvider(NodeProvider):  # type: ignore[misc]
    """Ray's NodeProvider. Errors are one line each, which Ray's command prints."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        try:
            self._kubectl = Kubectl(read_provider(provider_config))
        except ExpertMeshError as error:
            _refuse(error)
        self._named_in = _file_of_the_command(sys.argv)
        # Of the last look; Ray asks for the tags and addresses of what it was told of.
        self._pods: dict[str, Manifest] = {}
        self._is_up = False

    @property
    def _everything(self) -> str:
        """Return what stands for all that `up` applied, where Ray wants a node to end."""
        return f"cluster/{self.cluster_name}"

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Return the pods that have these tags and do not end."""
        nodes = self._nodes(tag_filters, with_ending=False)
        if not nodes and tag_filters == {TAG_RAY_NODE_KIND: NODE_KIND_HEAD} and _needs_a_head(sys.argv):
            where = f"{self.cluster_name} in the namespace {self._kubectl.settings.namespace}"
            _refuse(NotFoundError(f"there is no head of {where}: `ray up` brings one up"))
        return nodes

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Return what there is to delete; the head stands for everything, also where it never came to be."""
        nodes = self._nodes(tag_filters, with_ending=True)
        if tag_filters.get(TAG_RAY_NODE_KIND) != NODE_KIND_HEAD:
            return nodes
        try:
            is_left = bool(nodes) or remains(self._kubectl.settings, self.cluster_name, self._named_in)
        except ExpertMeshError as error:
            _refuse(error)
        return [self._everything, *nodes] if is_left else []

    def is_running(self, node_id: str) -> bool:
        """Return whether a pod is there and does not end."""
        return node_id in self.non_terminated_nodes({})

    def is_terminated(self, node_id: str) -> bool:
        """Return whether a pod is gone, or ends."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Return what Ray tells nodes apart by, read from the pod."""
        return _tags(self._pod(node_id))

    def internal_ip(self, node_id: str) -> str:
        """Return a pod's address, which is reached from within the cluster."""
        return str(self._pod(node_id).get("status", {}).get("podIP", ""))

    def external_ip(self, node_id: str) -> str:
        """Return the same: `ray get-head-ip` prints it."""
        return self.internal_ip(node_id)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Bring the cluster up; asked for the head alone, as there are no workers in ray-up.yaml."""
        if tags.get(TAG_RAY_NODE_KIND) != NODE_KIND_HEAD:
            _refuse(InputError("workers are the autoscaler's: have no node type but headgroup"))
        self._bring_up()

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Apply the manifests where the head is there already: `ray up` asks this each time, before it looks at it."""
        if not self._is_up:
            self._bring_up()
        return cluster_config

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Keep nothing: what a node is, its pod says."""

    def terminate_node(self, node_id: str) -> None:
        """Delete one worker's pod, in whose place the autoscaler has another made."""
        if _tags(self._pod(node_id))[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD:
            # Ray wants to start another head where it finds this one to be of another configuration.
            _refuse(
                InputError(
                    "the head is what the manifests say: head_node_type must be headgroup, and its node_config and "
                    "auth must be empty; `ray down` ends it"
                )
            )
        try:
            self._kubectl.run("delete", "pod", node_id, "--wait=false", "--ignore-not-found")
        except ExpertMeshError as error:
            _refuse(error)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Delete all that `up` applied, volumes excepted, and wait until the pods are gone."""
        if self._everything not in node_ids:
            _refuse(InputError("--workers-only cannot be: the autoscaler would have others made"))
        try:
            take_down(self._kubectl.settings, self.cluster_name, self._named_in, _say)
        except ExpertMeshError as error:
            _refuse(error)

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: ModuleType,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> CommandRunnerInterface:
        """Return what runs commands in Ray's container of a pod."""
        return KubectlCommandRunner(self._kubectl, self._pod(node_id))

    def _bring_up(self) -> None:
        try:
            outcome = bring_up(self._kubectl.settings, self.cluster_name, self._named_in, _say)
        except ExpertMeshError as error:
            _refuse(error)
        self._is_up = True
        _tell(outcome)

    def _nodes(self, tag_filters: dict[str, str], *, with_ending: bool) -> list[str]:
        try:
            names = cluster_names(find_ray(self._kubectl, self.cluster_name), self.cluster_name)
            pods = find_pods(self._kubectl, names)
        except ExpertMeshError as error:
            _refuse(error)
        self._pods = {pod["metadata"]["name"]: pod for pod in pods if with_ending or not is_ending(pod)}
        return [name for name, pod in self._pods.items() if _has(_tags(pod), tag_filters)]

    def _pod(self, node_id: str) -> Manifest:
        if node_id not in self._pods:
            self._nodes({}, with_ending=True)
        if node_id not in self._pods:
            _refuse(InputError(f"there is no pod {node_id} of {self.cluster_name}"))
        return self._pods[node_id]


def _tags(pod: Manifest) -> dict[str, str]:
    labels = pod["metadata"].get("labels", {})
    conditions = pod.get("status", {}).get("conditions") or ()
    is_ready = any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD if labels.get("ray.io/node-type") == "head" else NODE_KIND_WORKER,
        TAG_RAY_NODE_NAME: pod["metadata"]["name"],
        TAG_RAY_USER_NODE_TYPE: group_of(pod),
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE if is_ready else STATUS_WAITING_FOR_SSH,
        # Of an empty node_config and auth: the head is what the manifests say, and Ray is never to replace it.
        TAG_RAY_LAUNCH_CONFIG: hash_launch_conf({}, {}),
    }


def _has(tags: dict[str, str], wanted: dict[str, str]) -> bool:
    # Ray looks for a node that it has made by tags of its own making: its name for it, a status of before.
    kept = {TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE}
    return all(tags.get(key) == value for key, value in wanted.items() if key in kept)


def _file_of_the_command(words: list[str]) -> Path | None:
    """Return the YAML file that Ray's command was given, beside which files are looked for; Ray tells it to nobody."""
    return next((Path(word) for word in words[1:] if word.endswith((".yaml", ".yml")) and _is_for_ray(word)), None)


def _needs_a_head(words: list[str]) -> bool:
    """Return whether Ray's command is of no use without a head; Ray itself ends such with a traceback."""
    return len(words) > 1 and words[1] in _AT_A_HEAD and "--start" not in words


def _is_for_ray(word: str) -> bool:
    try:
        table = load_yaml(Path(word))
    except InputError:
        return False  # a file that is copied, say
    return isinstance(table, dict) and "provider" in table and "cluster_name" in table


def _say(line: str) -> None:
    cli_logger.print("{} {}", time.strftime("%H:%M:%S"), line)


def _tell(outcome: Outcome) -> None:
    for name, addresses in outcome.services.items():
        cli_logger.labeled_value(name, ", ".join(addresses))
    for command in outcome.next_steps:
        cli_logger.print("  {}", command)


def _refuse(error: ExpertMeshError) -> NoReturn:
    """End Ray's command with the error's line."""
    raise click.ClickException(" ".join(str(error).split())) from error
