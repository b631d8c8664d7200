"""What a tier reserves in Ray, against stand-ins."""

from pathlib import Path
from typing import Any

import pytest

from expertmesh.actors.controller import tiers
from expertmesh.actors.controller.tiers import Tier
from expertmesh.actors.runtime import Room
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.settings import ServeSettings

GROUPS = {
    "1": {"name": "pg-shard-1~old", "state": "CREATED"},
    "2": {"name": "pg-shard-1~older", "state": "PENDING"},
    "3": {"name": "pg-shard-1~removed", "state": "REMOVED"},
    "4": {"name": "pg-shard-11~other", "state": "CREATED"},
}


@pytest.mark.parametrize("room", [None, Room(timeout_s=7.0)])
def test_what_a_killed_controller_reserved_is_given_back_before_more_is_reserved(
    monkeypatch: pytest.MonkeyPatch, room: Room | None
) -> None:
    happened: list[object] = []

    def pinned_options(name: str, group_name: str, **options: Any) -> None:
        happened.append(options["room"])
        raise CapacityError("no room")

    monkeypatch.setattr(tiers, "placement_group_table", lambda: GROUPS)
    monkeypatch.setattr(tiers, "pinned_options", pinned_options)
    monkeypatch.setattr("ray.util.get_placement_group", lambda name: name)
    monkeypatch.setattr("ray.util.remove_placement_group", happened.append)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    settings = ServeSettings(model=Path("model"), room_timeout_s=60.0)
    tier = Tier[ShardId](object, settings, node_labels={}, threads=1, concurrency=1)
    monkeypatch.setattr(tier, "find", lambda _: None)
    with pytest.raises(CapacityError):
        tier.create(ShardId("shard-1"), room=room)
    assert happened == ["pg-shard-1~old", "pg-shard-1~older", room or Room(timeout_s=60.0)]


@pytest.mark.parametrize("returns", [True, False])
def test_a_member_that_is_started_again_is_a_member_meanwhile(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    shard = ShardId("shard-1")
    killed: list[object] = []
    monkeypatch.setattr(tiers, "placement_group_table", dict)
    monkeypatch.setattr("ray.kill", killed.append)
    tier = Tier[ShardId](object, ServeSettings(model=Path("model")), node_labels={}, threads=1, concurrency=1)
    tier.admit(shard, "its process")
    tier.facts[shard] |= {"pid": 7, "state": "dead"}
    tier.dismiss(shard, returns=returns)
    assert killed == ["its process"]
    assert not tier.handles
    assert tier.in_order() == ([{"id": shard, "state": "starting"}] if returns else [])
