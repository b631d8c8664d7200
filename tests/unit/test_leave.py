"""`expertmesh leave` against a stand-in for Ray's own client: which node it names, how long it waits, what it says."""

import socket
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RpcError

from expertmesh.actors.cli.leave import leave
from expertmesh.cluster.errors import InputError, UnavailableError

ALIVE, DEAD = 0, 1
HOST = "127.0.0.1"
NODES = {b"\x02": (HOST, ALIVE), b"\x03": ("10.0.0.3", ALIVE)}


def actor(name: str, namespace: str, node: bytes) -> Any:
    return SimpleNamespace(name=name, ray_namespace=namespace, node_id=node)


GATEWAY = actor("SERVE_REPLICA::expertmesh#gateway#abc", "serve", b"\x03")
MEMBERS = [actor("shard-0", "expertmesh", b"\x02"), actor("worker-0", "expertmesh", b"\x02")]
OTHERS = [
    GATEWAY,
    actor("controller", "expertmesh", b"\x02"),
    actor("shard-1", "expertmesh", b"\x03"),
    actor("shard-0", "theirs", b"\x02"),
]


class FakeGcs:
    """Knows some nodes and actors, and remembers which node it was told to drain.

    looks: the actors that are alive at each look, the last of them for good; an exception is raised.
    """

    def __init__(
        self,
        nodes: dict[bytes, tuple[str, int]],
        on_drain: Callable[[], tuple[bool, str]] = lambda: (True, ""),
        looks: Sequence[Sequence[Any] | Exception] = ((GATEWAY,),),
    ) -> None:
        self._nodes = nodes
        self._on_drain = on_drain
        self.looks = list(looks)
        self.drained: list[tuple[str, int]] = []

    def __call__(self, address: str) -> "FakeGcs":
        assert address == "head:6379"
        return self

    def get_all_node_info(self, timeout: float) -> dict[bytes, Any]:
        return {
            node: SimpleNamespace(state=state, ALIVE=ALIVE, node_manager_address=ip)
            for node, (ip, state) in self._nodes.items()
        }

    async def async_get_all_actor_info(self, *, actor_state_name: str, **_: float) -> dict[int, Any]:
        assert actor_state_name == "ALIVE"
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return dict(enumerate(look))

    def drain_node(self, node_id: str, reason: int, message: str, deadline_ms: int) -> tuple[bool, str]:
        self.drained.append((node_id, deadline_ms))
        return self._on_drain()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.create_server((HOST, 0)) as server:
        yield server


def leave_with(monkeypatch: pytest.MonkeyPatch, gcs: FakeGcs, port: int, grace_s: float = 30.0) -> None:
    monkeypatch.setattr("ray._raylet.GcsClient", gcs)
    leave(address="head:6379", node_ip=HOST, grace_s=grace_s, grpc_port=port)


def closed_port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    listener.close()
    return port


def test_the_living_node_at_the_address_is_drained_and_its_gateway_waited_for(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    def end_the_gateway() -> tuple[bool, str]:
        listener.close()
        return True, ""

    nodes = {b"\x01": (HOST, DEAD), b"\x02": (HOST, ALIVE), b"\x03": ("10.0.0.3", ALIVE)}
    gcs = FakeGcs(nodes, end_the_gateway)
    leave_with(monkeypatch, gcs, listener.getsockname()[1])
    ((node_id, deadline_ms),) = gcs.drained
    assert node_id == "02"
    assert deadline_ms > 0
    assert "node 02" in capsys.readouterr().out


def test_a_gateway_that_listens_is_said(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs(NODES)
    with pytest.raises(UnavailableError, match=r"still on 127\.0\.0\.1 after 0 s: a gateway that listens"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1], grace_s=0)


def test_a_gateway_that_listens_no_more_is_waited_for_until_its_streams_have_ended(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    monkeypatch.setattr("expertmesh.actors.cli.leave._PERIOD_S", 0.001)
    own, port = actor(GATEWAY.name, "serve", b"\x02"), closed_port(listener)
    gcs = FakeGcs(NODES, looks=[[own, GATEWAY], [own], [GATEWAY]])
    leave_with(monkeypatch, gcs, port)
    assert gcs.looks == [[GATEWAY]]
    with pytest.raises(UnavailableError, match=r"after 0 s: a gateway with streams$"):
        leave_with(monkeypatch, FakeGcs(NODES, looks=[[own]]), port, grace_s=0)


def test_members_are_waited_for_until_they_have_moved(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("expertmesh.actors.cli.leave._PERIOD_S", 0.001)
    looks = [[*OTHERS, *MEMBERS], RpcError("the head is away"), [*OTHERS, MEMBERS[1]], OTHERS]
    gcs = FakeGcs(NODES, looks=looks)
    leave_with(monkeypatch, gcs, closed_port(listener))
    assert gcs.looks == [OTHERS], "it has looked until they were gone"
    assert "node 02" in capsys.readouterr().out


def test_members_that_stay_are_named(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs(NODES, looks=[[*OTHERS, *MEMBERS]])
    with pytest.raises(UnavailableError, match=r"after 0 s: shard-0, worker-0$"):
        leave_with(monkeypatch, gcs, closed_port(listener), grace_s=0)


def test_a_head_that_does_not_tell_is_waited_for(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs(NODES, looks=[RpcError("the head is away\nby far")])
    with pytest.raises(UnavailableError, match=r"after 0 s: what Ray's head does not tell \(the head is away\)$"):
        leave_with(monkeypatch, gcs, closed_port(listener), grace_s=0)


def test_where_no_gateway_is_left_nobody_needs_the_members(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    leave_with(monkeypatch, FakeGcs(NODES, looks=[MEMBERS]), closed_port(listener), grace_s=0)


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs(NODES, lambda: (False, "it is the head"))
    with pytest.raises(UnavailableError, match="it is the head"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1])


def test_an_unknown_address_names_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    gcs = FakeGcs({b"\x02": ("10.0.0.2", ALIVE), b"\x03": (HOST, DEAD)})
    with pytest.raises(InputError, match=r"0 nodes are alive there; the cluster has 10\.0\.0\.2"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1])
    assert not gcs.drained


def test_rays_authentication_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="RAY_AUTH_MODE"):
        leave(address="head:6379", node_ip=HOST)
