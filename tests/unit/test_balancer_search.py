"""What the search looks at, replica by replica, beside every pair of a shard and an expert.

Shape suffixes: S shards, E experts.
"""

import itertools

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.balancer_layer import Layer
from expertmesh.cluster.balancer_search import GOOD_ENOUGH, Gains, exchange
from expertmesh.cluster.balancer_shares import filled


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """A levelled layer with some free slots, some spare replicas and shards of unlike speeds."""
    num_shards, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    node_S = random.integers(0, 3, num_shards)
    layer = Layer(
        load_E=random.pareto(1.0, num_experts) * (random.random(num_experts) < 0.9),
        slots_S=random.integers(0, num_experts + 2, num_shards),
        speed_S=random.choice([1.0, 2.0], num_shards),
        node_S=node_S,
        domain_S=node_S // 2,
        min_replicas=draw(st.integers(1, 2)),
    )
    for shard, expert in itertools.product(range(num_shards), range(num_experts)):
        if layer.free_S[shard] > 0 and random.random() < 0.5:
            layer.add(shard, expert)
    layer.level()
    return layer


def potential(layer: Layer) -> float:
    return float((layer.load_S**2 / layer.speed_S).sum())


def gain_SE(layer: Layer) -> npt.NDArray[np.float64]:  # noqa: N802
    """The estimate of every pair: what the best x brings, found by trying a thousand."""
    num_shards, num_experts = layer.hosts_SE.shape
    gain = np.zeros((num_shards, num_experts))
    for shard, expert in itertools.product(range(num_shards), range(num_experts)):
        computing = layer.share_SE[:, expert] > 0
        if layer.hosts_SE[shard, expert] or layer.slots_S[shard] == 0 or not computing.any():
            continue
        time = (layer.share_SE[:, expert] * layer.time_S).sum() / layer.load_E[expert]
        if time <= (1 + GOOD_ENOUGH) * layer.ideal_time:
            continue
        inverse = 1 / layer.speed_S[computing].sum() + 1 / layer.speed_S[shard]
        moved = np.linspace(0, layer.load_E[expert], 1001)
        best = (2 * moved * (time - layer.time_S[shard]) - moved**2 * inverse).max()
        has_room = layer.free_S[shard] > 0 or layer.droppable_SE()[shard].any()
        gain[shard, expert] = best if has_room else best / 2
    return gain


@settings(max_examples=100, deadline=None)
@given(layers())
def test_the_most_promising_replica_is_that_of_all_pairs(layer: Layer) -> None:
    gains, every_SE = Gains(layer), gain_SE(layer)
    for _ in range(4):
        expert = gains.best()
        if expert is None:
            assert every_SE.max(initial=0.0) <= 1e-5 * potential(layer)
            return
        found_S = gains.of_S(expert)
        np.testing.assert_allclose(found_S, every_SE[:, expert], rtol=1e-3, atol=1e-5 * potential(layer))
        np.testing.assert_allclose(found_S.max(), every_SE.max(), rtol=1e-3, atol=1e-5 * potential(layer))
        shard = int(found_S.argmax())
        gains.leave_out(shard, expert)
        every_SE[shard, expert] = 0.0


@settings(max_examples=100, deadline=None)
@given(layers())
def test_a_droppable_replica_leaves_its_expert_as_it_shall_be(layer: Layer) -> None:
    num_shards, num_experts = layer.hosts_SE.shape
    for shard, expert in itertools.product(range(num_shards), range(num_experts)):
        hosts = set(np.flatnonzero(layer.hosts_SE[:, expert]).tolist())
        left = hosts - {shard}
        nodes, left_nodes = ({int(layer.node_S[host]) for host in some} for some in (hosts, left))
        may = shard in hosts and len(left) >= layer.min_replicas
        may = may and len(left_nodes) >= min(len(nodes), layer.num_spread)
        assert layer.droppable_SE()[shard, expert] == may


@settings(max_examples=100, deadline=None)
@given(layers(), st.data())
def test_an_exchange_is_the_best_of_all(layer: Layer, data: st.DataObject) -> None:
    num_shards, num_experts = layer.hosts_SE.shape
    busy = data.draw(st.integers(0, num_shards - 1))
    before, had_SE, load_S = potential(layer), layer.hosts_SE.copy(), layer.load_S.copy()
    gains = [0.0]
    for expert in np.flatnonzero(layer.share_SE[busy] > 0).tolist():
        for shard, other in itertools.product(range(num_shards), range(num_experts + 1)):
            given = layer.share_SE[shard, other] if other < num_experts else 0.0
            may = layer.hosts_SE[shard, other] and not layer.hosts_SE[busy, other] if other < num_experts else True
            may = may and (other < num_experts or layer.free_S[shard] > 0)
            if may and layer.may_relocate_S(busy, expert)[shard]:
                moved = layer.share_SE[busy, expert] - given
                after_S = load_S.copy()
                after_S[[busy, shard]] += [-moved, moved]
                gains.append(before - float((after_S**2 / layer.speed_S).sum()))
    if exchange(layer, busy):
        np.testing.assert_allclose(before - potential(layer), max(gains), rtol=1e-6, atol=1e-9 * before)
        assert (layer.hosts_SE != had_SE).sum() in (2, 4)
    else:
        assert (layer.hosts_SE == had_SE).all()


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_a_snapshot_brings_everything_back(layer: Layer, data: st.DataObject) -> None:
    before, hosts_SE, share_SE = layer.snapshot(), layer.hosts_SE.copy(), layer.share_SE.copy()
    count_E, free_S, load_S = layer.count_E.copy(), layer.free_S.copy(), layer.load_S.copy()
    for shard, expert in np.argwhere(hosts_SE).tolist():
        if data.draw(st.booleans()):
            layer.drop(shard, expert)
    for shard, expert in np.argwhere(~hosts_SE).tolist():
        if data.draw(st.booleans()):
            layer.add(shard, expert, 1.0)
    assert (layer.count_E == layer.hosts_SE.sum(axis=0)).all()
    assert (layer.free_S == layer.slots_S - layer.hosts_SE.sum(axis=1)).all()
    layer.restore(before)
    assert (layer.hosts_SE == hosts_SE).all()
    assert (layer.share_SE == share_SE).all()
    assert layer.count_E.tolist() == count_E.tolist()
    assert layer.free_S.tolist() == free_S.tolist()
    np.testing.assert_allclose(layer.load_S, load_S, rtol=1e-12)


@given(
    load=st.floats(0.1, 100),
    bases=st.lists(st.tuples(st.floats(0, 50), st.sampled_from([0.5, 1.0, 4.0])), min_size=1, max_size=8),
)
def test_water_stands_level_above_what_is_dry(load: float, bases: list[tuple[float, float]]) -> None:
    share_R = filled(load, [base for base, _ in bases], [speed for _, speed in bases])
    assert abs(sum(share_R) - load) <= 1e-9 * load
    wet = [(base + share) / speed for (base, speed), share in zip(bases, share_R, strict=True) if share > 0]
    dry = [base / speed for (base, speed), share in zip(bases, share_R, strict=True) if share == 0]
    assert max(wet) - min(wet) <= 1e-9 * max(wet)
    assert min(dry, default=np.inf) >= max(wet) * (1 - 1e-9)
