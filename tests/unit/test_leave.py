"""`expertmesh leave` against a stand-in for Ray's own client: which node it names, how long it waits, what it says."""

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.cli.leave import leave
from expertmesh.cluster.errors import InputError, UnavailableError

ALIVE, DEAD = 0, 1
HOST = "127.0.0.1"


class FakeGcs:
    """Knows some nodes, and remembers which it was told to drain."""

    def __init__(self, nodes: dict[bytes, tuple[str, int]], on_drain: Callable[[], tuple[bool, str]]) -> None:
        self._nodes = nodes
        self._on_drain = on_drain
        self.drained: list[tuple[str, int]] = []

    def __call__(self, address: str) -> "FakeGcs":
        assert address == "head:6379"
        return self

    def get_all_node_info(self, timeout: float) -> dict[bytes, Any]:
        return {
            node: SimpleNamespace(state=state, ALIVE=ALIVE, node_manager_address=ip)
            for node, (ip, state) in self._nodes.items()
        }

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


def test_a_gateway_that_still_has_streams_is_said(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs({b"\x02": (HOST, ALIVE)}, lambda: (True, ""))
    with pytest.raises(UnavailableError, match=r"still has streams after 0 s"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1], grace_s=0)


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    gcs = FakeGcs({b"\x02": (HOST, ALIVE)}, lambda: (False, "it is the head"))
    with pytest.raises(UnavailableError, match="it is the head"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1])


def test_an_unknown_address_names_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    gcs = FakeGcs({b"\x02": ("10.0.0.2", ALIVE), b"\x03": (HOST, DEAD)}, lambda: (True, ""))
    with pytest.raises(InputError, match=r"0 nodes are alive there; the cluster has 10\.0\.0\.2"):
        leave_with(monkeypatch, gcs, listener.getsockname()[1])
    assert not gcs.drained


def test_rays_authentication_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="RAY_AUTH_MODE"):
        leave(address="head:6379", node_ip=HOST)
