"""Links of a worker: formed for each placement, formed anew when they break, and never those of a former process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import LinkEnd, ShardPeer
from expertmesh.actors.worker import link_keeper
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.link_keeper import LinkKeeper
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.packets import PacketHeader
from expertmesh.cluster.placement import Placement, initial_placement

A, B = ShardId("shard-0"), ShardId("shard-1")


class NoLink(Link):
    """A link that nobody uses; life says whose it is."""

    def __init__(self, life: str) -> None:
        super().__init__(generation=1)
        self.life = life

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        raise AssertionError("unused")

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        raise AssertionError("unused")

    def close(self) -> None:
        raise AssertionError("unused")


class Shards:
    """Shards that can be joined, save those that are away; notes what the keeper does."""

    def __init__(self) -> None:
        self.away: dict[ShardId, Exception] = {}
        self.hanging: dict[ShardId, asyncio.Event] = {}
        self.joined: list[ShardId] = []
        self.fleets: list[Fleet] = []
        self.lost: list[ShardId] = []
        self.published = asyncio.Event()

    async def join(self, shard: ShardId, peer: ShardPeer) -> Link:
        await asyncio.sleep(0)
        if shard in self.hanging:
            await self.hanging[shard].wait()
        if shard in self.away:
            raise self.away[shard]
        self.joined.append(shard)
        return NoLink(peer.life)

    def publish(self, fleet: Fleet) -> None:
        self.fleets.append(fleet)
        self.published.set()

    async def next_fleet(self) -> Fleet:
        self.published.clear()
        await asyncio.wait_for(self.published.wait(), 5)
        return self.fleets[-1]


def peer(life: str = "1") -> ShardPeer:
    return ShardPeer(life=life, handle=None, end=LinkEnd(node="here"))


def placement(epoch: int, *shards: ShardId) -> Placement:
    return initial_placement((0,), 4, shards, 1, epoch=epoch)


@asynccontextmanager
async def keeping(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[LinkKeeper, Shards]]:
    monkeypatch.setattr(link_keeper, "_HEAL_PERIOD_S", 0.01)
    shards = Shards()
    keeper = LinkKeeper(shards.join, shards.publish, shards.lost.append)
    try:
        yield keeper, shards
    finally:
        await keeper.close()


async def test_a_placement_is_used_with_links_to_all_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        assert await keeper.follow(placement(1, A, B), {A: peer(), B: peer()}) == 1
        assert set(shards.fleets[-1].links) == {A, B}
        assert shards.fleets[-1].alive_S.all()
        assert await keeper.follow(placement(2, A, B), {A: peer(), B: peer()}) == 2
        assert sorted(shards.joined) == [A, B], "links that stand are kept"


async def test_an_older_placement_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(5, A), {A: peer()})
        assert await keeper.follow(placement(4, A, B), {A: peer(), B: peer()}) == 5
        assert len(shards.fleets) == 1


@pytest.mark.parametrize("error", [UnavailableError("gone"), TimeoutError()])
async def test_a_shard_that_cannot_be_joined_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        shards.away[B] = error
        await keeper.follow(placement(1, A, B), {A: peer(), B: peer()})
        assert shards.fleets[-1].alive_S.tolist() == [True, False]
        await asyncio.sleep(0.05)
        del shards.away[B]
        assert (await shards.next_fleet()).alive_S.tolist() == [True, True]


async def test_a_shard_that_hangs_holds_up_no_placement_that_can_do_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_keeper, "_GRACE_S", 0.01)
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(1, A), {A: peer()})
        shards.hanging[B] = asyncio.Event()
        both = initial_placement((0,), 4, (A, B), 2, epoch=2)
        assert await asyncio.wait_for(keeper.follow(both, {A: peer(), B: peer()}), 5) == 2
        assert shards.fleets[-1].alive_S.tolist() == [True, False]
        assert await asyncio.wait_for(keeper.follow(placement(3, A), {A: peer(), B: peer()}), 5) == 3
        shards.hanging.pop(B).set()
        assert set((await shards.next_fleet()).links) == {A, B}, "it is used once it is joined"


async def test_a_placement_that_needs_a_shard_waits_for_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_keeper, "_GRACE_S", 0.01)
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(1, A), {A: peer()})
        hanging = shards.hanging[B] = asyncio.Event()
        following = asyncio.create_task(keeper.follow(placement(2, A, B), {A: peer(), B: peer()}))
        await asyncio.sleep(0.05)
        assert len(shards.fleets) == 1, "the old fleet serves meanwhile"
        hanging.set()
        assert await asyncio.wait_for(following, 5) == 2
        assert shards.fleets[-1].alive_S.all()


async def test_a_broken_link_is_reported_and_formed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(1, A, B), {A: peer(), B: peer()})
        old = shards.fleets[-1].links[A]
        await asyncio.to_thread(keeper.lost, A, old)
        fleet = await shards.next_fleet()
        assert shards.lost == [A]
        assert fleet.links[A] is not old
        assert fleet.links[B] is shards.fleets[0].links[B]
        keeper.lost(A, old)  # told once more, by a step that used the old fleet
        await asyncio.sleep(0.05)
        assert shards.lost == [A]
        assert shards.fleets[-1] is fleet


async def test_links_of_a_former_process_and_of_a_shard_that_left_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(1, A, B), {A: peer(), B: peer()})
        await keeper.follow(placement(2, A), {A: peer("2")})
        assert set(shards.fleets[-1].links) == {A}
        link = shards.fleets[-1].links[A]
        assert isinstance(link, NoLink)
        assert link.life == "2"


async def test_shards_of_a_coming_placement_are_joined_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping(monkeypatch) as (keeper, shards):
        await keeper.follow(placement(1, A), {A: peer()})
        await keeper.prepare({A: peer(), B: peer()})
        assert len(shards.fleets) == 1
        assert sorted(shards.joined) == [A, B]
        await keeper.follow(placement(2, A, B), {A: peer(), B: peer()})
        assert sorted(shards.joined) == [A, B]
