"""Sources of copied experts: they host the expert, are alive, on the same node if one is, and share the work."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.copy_sources import copy_sources
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots

EXPERTS = 4
LAYERS = (1, 3)
KEYS = [ExpertKey(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
SHARDS = [ShardId(f"shard-{i}") for i in range(4)]


def placement(*experts: list[ExpertKey], epoch: int = 1) -> Placement:
    slots = tuple(ShardSlots(shard=s, experts=tuple(sorted(e))) for s, e in zip(SHARDS, experts, strict=False))
    return Placement(epoch=epoch, num_experts=EXPERTS, layers=LAYERS, shards=slots)


some_keys = st.lists(st.sampled_from(KEYS), unique=True)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(some_keys, min_size=4, max_size=4),
    st.lists(some_keys, min_size=4, max_size=4),
    st.sets(st.sampled_from(SHARDS)),
    st.dictionaries(st.sampled_from(SHARDS), st.sampled_from(["a", "b"])),
)
def test_each_new_expert_is_copied_from_a_live_host_the_nearest_there_is(
    before: list[list[ExpertKey]], after: list[list[ExpertKey]], live: set[ShardId], node: dict[ShardId, str]
) -> None:
    current, target = placement(*before), placement(*after, epoch=2)
    found = copy_sources(current, target, live, node)
    for shard, had, has in zip(SHARDS, before, after, strict=True):
        new = set(has) - set(had)
        assert set(found[shard]) == {key for key in new if live & set(current.replicas(key))}
        for key, source in found[shard].items():
            holders = live & set(current.replicas(key))
            assert source in holders
            near = {s for s in holders if node.get(s, s) == node.get(shard, shard)}
            assert source in near or not near


def test_the_sources_share_the_work() -> None:
    current = placement(KEYS, KEYS, [], [])
    found = copy_sources(current, placement(KEYS, KEYS, KEYS, KEYS, epoch=2), SHARDS, {})
    given_by = Counter(source for of in found.values() for source in of.values())
    assert given_by == {SHARDS[0]: len(KEYS), SHARDS[1]: len(KEYS)}
