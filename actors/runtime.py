"""Ray as ExpertMesh uses it: names, the environment of the actors, a local cluster of our own."""

import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expertmesh.actors.cores import step_back
from expertmesh.actors.links.ends import LinkEnd
from expertmesh.cluster.errors import CapacityError, UnavailableError

NAMESPACE = "expertmesh"
CONTROLLER = "controller"
GATEWAY_APP = "expertmesh"
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Room:
    """How long a member waits for room in the cluster; give_up, where there is one, ends the wait when it is set."""

    timeout_s: float
    give_up: threading.Event | None = None


def actor_env(threads: int) -> dict[str, str]:
    """Return the environment of a computing process.

    Threads that spin after a parallel region steal the cores that the machine's other processes need, hence PASSIVE.
    """
    return {
        # A step's large temporaries come from the heap again and again, not from fresh pages that must be cleared.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        # Threads that come and go with links would each leave free memory behind in an arena of its own.
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start_local_ray(temp_dir: Path, metrics_port: int = 0) -> None:
    """Start a Ray of our own on loopback; it ends with this process.

    Args:
        temp_dir: short path for Ray's files and sockets.
        metrics_port: on which Prometheus finds its metrics; 0 takes a free one.
    """
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(temp_dir),
        _metrics_export_port=metrics_port or None,
        _system_config={
            # No record of each call to an actor: nobody reads it here, and Ray keeps 100,000 of them in memory.
            "task_events_report_interval_ms": 0,
            # Ray gives its own processes the cores before its actors (niceness 15). Here the actors come first.
            "worker_niceness": 0,
            # What Ray's processes do at intervals interrupts what computes: a Ray that idles took 12 % of a decode's
            # speed on two cores. One node has nobody to report its resources to.
            "raylet_report_resources_period_milliseconds": 1000,
            "gcs_pull_resource_loads_period_milliseconds": 5000,
            "memory_monitor_refresh_ms": 1000,
            "num_workers_soft_limit": 0,  # a worker without work ends, and wakes up nobody
        },
    )
    yield_to_actors()


def metrics_address() -> str:
    """Return host:port of the metrics of the Ray that this process started."""
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def yield_to_actors() -> None:
    """Have the processes of the Ray that this process started step back, those apart that actors are started from."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            is_of_serve = "ServeController" in command or "ProxyActor" in command
            if "raylet/raylet" not in command and (not command.startswith("ray::") or is_of_serve):
                step_back(process.pid)


def join_ray(address: str) -> None:
    """Connect to a running Ray cluster."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")


def pinned_options(
    name: str,
    group_name: str,
    *,
    num_cpus: float,
    num_gpus: float,
    node_labels: Mapping[str, str],
    runtime_env: dict[str, Any],
    room: Room,
) -> dict[str, Any]:
    """Reserve an accelerator, under group_name, for a detached actor and return the actor's options.

    While it waits for room it is a demand that Ray's autoscaler sees.

    Raises:
        CapacityError: the cluster has no room in time on a node with these labels; the reservation is withdrawn.
    """
    bundle = {"GPU": num_gpus} if num_gpus else {"CPU": num_cpus}
    selector = [dict(node_labels)] if node_labels else None
    group = placement_group([bundle], name=group_name, lifetime="detached", bundle_label_selector=selector)
    if not _is_placed(group, room):
        remove_placement_group(group)
        labelled = f" and labels {dict(node_labels)}" if node_labels else ""
        raise CapacityError(
            f"{name}: no node with {bundle} free{labelled} within {room.timeout_s:.0f} s; "
            f"Ray has {ray.available_resources()}"
        )
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": num_gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        "runtime_env": runtime_env,
    }


def _is_placed(group: PlacementGroup, room: Room) -> bool:
    if room.give_up is None:
        return bool(group.wait(room.timeout_s))
    deadline_s = time.monotonic() + room.timeout_s
    while not group.wait(max(0.0, min(_LOOK_AGAIN_S, deadline_s - time.monotonic()))):
        if room.give_up.is_set() or time.monotonic() >= deadline_s:
            return False
    return True


@cache
def _gcs_client(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's stubs leave it out

    return GcsClient(address=address)


def draining_nodes(timeout_s: float) -> dict[str, float]:
    """Return when each node that Ray was told to drain may end, by the node's id, seconds since the epoch.

    Infinite: it is not said. A node that is gone is not among them.

    Raises:
        UnavailableError: Ray does not answer within timeout_s.
    """
    try:
        # What Ray Serve's controller asks to move its replicas.
        client = _gcs_client(ray.get_runtime_context().gcs_address)
        deadlines_ms: dict[str, int] = client.get_draining_nodes(timeout=timeout_s)
    except RayError as error:
        raise UnavailableError(f"Ray's head does not say which nodes end: {error}") from error
    return {node: deadline_ms / 1000 if deadline_ms else math.inf for node, deadline_ms in deadlines_ms.items()}


def node_id() -> str:
    """Return this node's id in the Ray cluster, hexadecimal; two nodes may have one address."""
    return str(ray.get_runtime_context().get_node_id())


def failure_domain(label: str) -> str:
    """Return what fails together with this node: the value of its label in Ray, or itself where it has none."""
    return str(ray.get_runtime_context().get_node_labels().get(label) or node_id())


def node_address() -> str:
    """Return the address by which this node is known in the Ray cluster."""
    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id()))


def on_this_node() -> dict[str, str]:
    """Return the label selector that keeps an actor on the calling process's node."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def link_end() -> LinkEnd:
    """Return where the calling actor's tensors live."""
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    return LinkEnd(node=node_id(), gpu=gpus[0] if gpus else "")
