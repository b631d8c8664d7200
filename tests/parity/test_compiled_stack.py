"""Layers that follow each other in compiled code give what they give one by one, whatever happens to the shards."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from expertmesh.actors.links.base import Link
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.cluster.ids import ShardId
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.stack import StackStep, Stop
from tests.families import BATCHED
from tests.fleet import LocalFleet, break_link, greedy, served_link
from tests.parity.test_compiled_layers import SIZES

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that slices of can be packed."""
    directory: Path = tmp_path_factory.mktemp("wide")
    sizes = {**BATCHED["qwen3_moe"], **SIZES, "num_hidden_layers": 4, "moe_intermediate_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("qwen3_moe")
    config = AutoConfig.for_model("qwen3_moe", **{**BATCHED["qwen3_moe"], **SIZES, "num_hidden_layers": 4})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[Stop]:
    """Why compiled code came back, each time."""
    seen: list[Stop] = []
    run = StackStep.run

    def watched(self: StackStep, route: Any) -> Stop:
        seen.append(run(self, route))
        return seen[-1]

    monkeypatch.setattr(StackStep, "run", watched)
    return seen


def fleet_of(checkpoint: Path, **settings: Any) -> LocalFleet:
    return LocalFleet(checkpoint, dtype="bfloat16", **{"link_kind": "shared", **settings})


def tokens_of(fleet: LocalFleet, after_steps: int = 0, then: Callable[[], None] = lambda: None) -> dict[str, list[int]]:
    """Run three requests at once, and do something on the way."""
    prompts = {"a": [3, 1, 4, 1, 5, 9, 2, 6], "b": [27, 18, 28], "c": list(range(30, 60))}
    requests = [greedy(name, ids, NUM_TOKENS) for name, ids in prompts.items()]
    fleet.engine.submit(requests)
    for _ in range(after_steps):
        fleet.engine.step()
    then()
    return fleet.finish(requests)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    with fleet_of(checkpoint, layer_by_layer=True) as fleet:
        return tokens_of(fleet)


def test_the_tokens_and_the_counts_are_those_of_layers_one_by_one(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    counts = []
    for layer_by_layer in (True, False):
        with fleet_of(checkpoint, layer_by_layer=layer_by_layer) as fleet:
            assert tokens_of(fleet) == expected
            dispatcher = fleet.dispatcher
            tables = dispatcher.load_LE, dispatcher.decode_LE, dispatcher.dispatch_bytes_L, dispatcher.combine_bytes_L
            counts.append([table.tolist() for table in tables])
            assert dispatcher.expert_s > 0
    assert counts[0] == counts[1]
    assert stops
    assert set(stops) == {Stop.FINISHED}


def test_slices_of_experts_are_chosen_as_layer_by_layer(wide: Path, stops: list[Stop]) -> None:
    found = []
    for layer_by_layer in (True, False):
        with fleet_of(wide, expert_tp=2, layer_by_layer=layer_by_layer) as fleet:
            assert fleet.servers[ShardId("shard-0")].slots.are_packed
            dispatcher, tokens = fleet.dispatcher, tokens_of(fleet)
            tables = dispatcher.load_LE, dispatcher.decode_LE, dispatcher.dispatch_bytes_L, dispatcher.combine_bytes_L
            found.append((tokens, [table.tolist() for table in tables]))
            # Each shard has a slice of each expert: a token goes to both, once.
            num_tokens = dispatcher.load_LE[0].sum() // (2 * 2)
            assert dispatcher.combine_bytes_L[0] == num_tokens * 2 * 128 * 2
    assert found[0] == found[1]
    assert set(stops) == {Stop.FINISHED}


def test_a_shard_with_slices_that_dies_leaves_what_its_replicas_do(wide: Path, stops: list[Stop]) -> None:
    with fleet_of(wide, shards=3, replicas=2, expert_tp=2) as fleet:
        got = tokens_of(fleet, 3, lambda: break_link(fleet.links[ShardId("shard-1")]))
    assert all(len(tokens) == NUM_TOKENS for tokens in got.values())
    assert stops[-1] is Stop.FINISHED


def test_with_a_capacity_factor_layers_go_one_by_one(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    dropped = []
    for factor in (8.0, 0.5):
        with fleet_of(checkpoint, capacity_factor=factor) as fleet:
            got = tokens_of(fleet)
            dropped.append(int(fleet.dispatcher.dropped_LE.sum()))
            assert factor == 0.5 or got == expected
    assert not stops
    assert dropped[0] == 0
    assert dropped[1] > 0


def test_links_without_a_socket_go_the_other_way(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    with fleet_of(checkpoint, link_kind="gloo") as fleet:
        assert tokens_of(fleet) == expected
    assert not stops


def test_replicas_are_chosen_as_layer_by_layer(checkpoint: Path, stops: list[Stop]) -> None:
    got, counts = [], []
    for layer_by_layer in (True, False):
        with fleet_of(checkpoint, shards=3, replicas=2, layer_by_layer=layer_by_layer) as fleet:
            got.append(tokens_of(fleet))
            # Which pairs went where shows in the bytes: a token's row goes once to each of its shards.
            counts.append([fleet.dispatcher.load_LE.tolist(), fleet.dispatcher.dispatch_bytes_L.tolist()])
    assert set(stops) == {Stop.FINISHED}
    assert got[0] == got[1]
    assert counts[0] == counts[1]


def test_an_expert_without_a_replica_waits_for_another_fleet(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    with fleet_of(checkpoint) as fleet:
        whole = Fleet(fleet.placement, fleet.links)

        def lose_one() -> None:
            alone = {name: link for name, link in fleet.links.items() if name != ShardId("shard-1")}
            fleet.dispatcher.set_fleet(Fleet(fleet.placement, alone))
            mender.start()

        def mend() -> None:
            while Stop.EXPERTS not in stops and not is_over.wait(0.01):
                continue
            fleet.dispatcher.set_fleet(whole)

        is_over = threading.Event()
        mender = threading.Thread(target=mend)
        try:
            got = tokens_of(fleet, 3, lose_one)
        finally:
            is_over.set()
            mender.join()
    assert got == expected
    assert Stop.EXPERTS in stops


def test_a_shard_that_dies_leaves_what_its_replicas_do(checkpoint: Path, stops: list[Stop]) -> None:
    with fleet_of(checkpoint, replicas=2) as fleet:
        got = tokens_of(fleet, 3, lambda: break_link(fleet.links[ShardId("shard-1")]))
        assert fleet.dispatcher.fleet is not None
        assert fleet.dispatcher.fleet.alive_S.tolist() == [True, False]
    assert all(len(tokens) == NUM_TOKENS for tokens in got.values())
    assert stops[-1] is Stop.FINISHED  # each expert has one shard by now


def test_a_link_that_breaks_within_a_step_is_made_good_by_a_newer_fleet(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    with fleet_of(checkpoint) as fleet, ExitStack() as contexts:
        lost = ShardId("shard-1")

        def mend(shard: ShardId, _link: Link) -> None:
            again = contexts.enter_context(served_link(fleet.servers[shard], "again", kind="shared"))
            fleet.dispatcher.set_fleet(Fleet(fleet.placement, {**fleet.links, shard: again}))

        fleet.dispatcher._asker._on_lost = mend
        got = tokens_of(fleet, 3, lambda: shut_down(fleet.links[lost]))
    assert got == expected
    assert Stop.UNFINISHED in stops


def shut_down(link: Any) -> None:
    """Let nothing more be sent on a link; this end does not know of it."""
    link._socket.shutdown(2)


def test_a_fleet_that_is_set_within_a_step_is_used_from_the_next_layer_on(
    checkpoint: Path, expected: dict[str, list[int]], stops: list[Stop]
) -> None:
    for _ in range(20):  # a step is short: on a busy machine none may be met
        with fleet_of(checkpoint) as fleet, keep_setting(fleet):
            assert tokens_of(fleet) == expected
        if set(stops) - {Stop.FINISHED}:
            return
    pytest.fail("no change fell within a step")


@contextmanager
def keep_setting(fleet: LocalFleet) -> Iterator[None]:
    """Set a new fleet, of the same shards, again and again."""
    is_over = threading.Event()

    def set_again() -> None:
        while not is_over.wait(0.0005):
            fleet.dispatcher.set_fleet(Fleet(fleet.placement, fleet.links))

    setter = threading.Thread(target=set_again)
    setter.start()
    try:
        yield
    finally:
        is_over.set()
        setter.join()


def test_a_fleet_that_is_not_used_any_more_is_let_go(checkpoint: Path) -> None:
    """Its links close with it: a shard that leaves is not held by a worker that has nothing to do."""
    with fleet_of(checkpoint) as fleet:
        tokens_of(fleet)
        before = weakref.ref(fleet.dispatcher.fleet)
        fleet.dispatcher.set_fleet(Fleet(fleet.placement, fleet.links))
        gc.collect()
        assert before() is None
