"""`expertmesh leave`: prepare a node of a Ray cluster for its end, as Kubernetes' preStop hook asks before SIGTERM."""

import asyncio
import socket
import time
from typing import Annotated, Any

import typer

from expertmesh.actors.ray_env import require_auth_mode
from expertmesh.cluster.errors import InputError, UnavailableError

_PERIOD_S = 0.5
_CALL_TIMEOUT_S = 5.0


def leave(
    address: Annotated[str, typer.Option(help="Of the cluster's head, host:port.", envvar="RAY_ADDRESS")],
    node_ip: Annotated[str, typer.Option(help="Of the node that will end, as Ray knows it.", envvar="POD_IP")],
    grace_s: Annotated[
        float, typer.Option(help="Until the node may be killed; the gateway's drain_s and 5 s for Ray Serve.")
    ] = 35.0,
    grpc_port: Annotated[int, typer.Option(help="Of the gateway, if the node has one.")] = 50051,
) -> None:
    """Have Ray start nothing more on a node, and wait until its shards and workers have moved and its streams ended."""
    require_auth_mode()
    # After the environment was looked at. What `ray drain-node` uses; Ray's stubs leave it out.
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RaySystemError, RpcError

    began_s = time.monotonic()
    try:
        client = GcsClient(address=address)
        node_id = _drain(client, node_ip, grace_s)
    except (RpcError, RaySystemError) as error:
        raise UnavailableError(f"--address {address}: {str(error).splitlines()[0]}") from error
    while True:
        try:
            left = _needed_on(client, node_id)
        except (RpcError, RaySystemError) as error:
            left = [f"what Ray's head does not tell ({str(error).splitlines()[0]})"]
        if _listens(node_ip, grpc_port):
            left.append("a gateway that listens")
        if not left:
            break
        if time.monotonic() - began_s > grace_s:
            raise UnavailableError(f"still on {node_ip} after {grace_s:g} s: {', '.join(left)}")
        time.sleep(_PERIOD_S)
    typer.echo(f"node {node_id} at {node_ip} takes nothing more; {time.monotonic() - began_s:.1f} s")


def _drain(client: Any, node_ip: str, grace_s: float) -> str:
    """Tell Ray of the node's end, and return its id. Ray Serve and our controller then take from it what it runs."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    node_id = _alive_at(client.get_all_node_info(timeout=_CALL_TIMEOUT_S), node_ip)
    deadline_ms = round((time.time() + grace_s) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node_id, reason, "the pod is being ended", deadline_ms)
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


def _needed_on(client: Any, node_id: str) -> list[str]:
    """Return what on a node may still be needed.

    Shards and workers are not once no gateway lives anywhere. A gateway listens no more from the beginning of its end
    on, and lives until its streams have ended.
    """
    from expertmesh.actors.runtime import GATEWAY_APP, NAMESPACE

    actors = asyncio.run(_alive_actors(client))
    gateways = [actor for actor in actors if actor.name.startswith(f"SERVE_REPLICA::{GATEWAY_APP}#")]
    if not gateways:
        return []
    ours = (a.name for a in actors if a.ray_namespace == NAMESPACE and a.node_id.hex() == node_id)
    members = sorted(name for name in ours if name.startswith(("shard-", "worker-")))
    return members + ["a gateway with streams" for one in gateways if one.node_id.hex() == node_id]


async def _alive_actors(client: Any) -> list[Any]:
    """Return the records of all actors of the cluster that are alive. The client wants a running loop to be called."""
    found = await client.async_get_all_actor_info(actor_state_name="ALIVE", timeout=_CALL_TIMEOUT_S)
    return list(found.values())


def _listens(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CALL_TIMEOUT_S)
        return probe.connect_ex((host, port)) == 0
