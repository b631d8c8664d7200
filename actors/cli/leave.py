"""`expertmesh leave`: prepare a node of a Ray cluster for its end, as Kubernetes' preStop hook asks before SIGTERM."""

import socket
import time
from typing import Annotated, Any

import typer

from expertmesh.actors.ray_env import require_auth_mode
from expertmesh.cluster.errors import InputError, UnavailableError

_PERIOD_S = 0.2
_CALL_TIMEOUT_S = 5.0


def leave(
    address: Annotated[str, typer.Option(help="Of the cluster's head, host:port.", envvar="RAY_ADDRESS")],
    node_ip: Annotated[str, typer.Option(help="Of the node that will end, as Ray knows it.", envvar="POD_IP")],
    grace_s: Annotated[
        float, typer.Option(help="Until the node may be killed; the gateway's drain_s and 5 s for Ray Serve.")
    ] = 35.0,
    grpc_port: Annotated[int, typer.Option(help="Of the gateway, if the node has one.")] = 50051,
) -> None:
    """Have Ray start nothing more on a node, and wait until the streams of its gateway have ended."""
    require_auth_mode()
    began_s = time.monotonic()
    node_id = _drain(address, node_ip, grace_s)
    while _listens(node_ip, grpc_port):
        if time.monotonic() - began_s > grace_s:
            raise UnavailableError(f"the gateway on {node_ip} still has streams after {grace_s:g} s")
        time.sleep(_PERIOD_S)
    typer.echo(f"node {node_id} at {node_ip} takes nothing more; {time.monotonic() - began_s:.1f} s")


def _drain(address: str, node_ip: str, grace_s: float) -> str:
    """Tell Ray of the node's end, and return its id. Ray Serve then ends the replicas of the node in order."""
    # After the environment was looked at. What `ray drain-node` uses; Ray's stubs leave it out.
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.exceptions import RaySystemError, RpcError

    try:
        client = GcsClient(address=address)
        node_id = _alive_at(client.get_all_node_info(timeout=_CALL_TIMEOUT_S), node_ip)
        deadline_ms = round((time.time() + grace_s) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node_id, reason, "the pod is being ended", deadline_ms)
    except (RpcError, RaySystemError) as error:
        raise UnavailableError(f"--address {address}: {str(error).splitlines()[0]}") from error
    if not accepted:
        raise UnavailableError(f"Ray does not give up node {node_id} at {node_ip}: {why}")
    return node_id


def _alive_at(nodes: dict[Any, Any], node_ip: str) -> str:
    alive = {node_id: node for node_id, node in nodes.items() if node.state == node.ALIVE}
    found = [node_id.hex() for node_id, node in alive.items() if node.node_manager_address == node_ip]
    if len(found) != 1:
        known = ", ".join(sorted(node.node_manager_address for node in alive.values()))
        raise InputError(f"--node-ip {node_ip}: {len(found)} nodes are alive there; the cluster has {known}")
    return str(found[0])


def _listens(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CALL_TIMEOUT_S)
        return probe.connect_ex((host, port)) == 0
