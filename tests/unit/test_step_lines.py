"""Worker and shard tell of one step by the same number, and the worker's line says whose sequences were in it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from expertmesh.actors.links.base import Link
from expertmesh.actors.shard.server import Peer, ShardServer
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketKind, first_sequence, step_of
from expertmesh.cluster.requests import request_id_of
from expertmesh.cluster.scheduler import Chunk
from expertmesh.models.architecture import open_architecture
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights
from tests.families import write_checkpoint
from tests.fleet import CPU, link_pair
from tests.log_lines import logged
from tests.unit.test_dispatcher import EVERY, Batch, dispatcher_of, memory_fleet
from tests.unit.test_engine import Bench, request_of
from tests.unit.test_shard_server import Request

STEP = Step(
    41,
    tuple(
        Chunk(sequence_id=f"{request}#{sample}~0a1b2c3d", start=3, token_ids=(1,), pages=(), samples=True)
        for request, sample in (("odd#id~x", 0), ("odd#id~x", 1), ("other", 0))
    ),
)


def test_a_packet_number_has_its_step() -> None:
    for step in (0, 1, 2**40 - 2):
        assert step_of(first_sequence(step) + 1) == step
        assert step_of(first_sequence(step + 1) - 1) == step
    assert first_sequence(2**40 - 1) < 2**64, "it fits in the header"


def test_a_request_is_named_whatever_its_id_has_in_it() -> None:
    assert STEP.request_ids == ["odd#id~x", "other"]
    assert request_id_of("plain") == "plain"


@pytest.mark.parametrize("fault", ["failed", "recv", "send"])
def test_a_lost_shard_and_a_retry_name_step_and_requests(fault: str) -> None:
    fleet, (shard, _) = memory_fleet({"a": EVERY, "b": EVERY})
    shard.faults.append(fault)
    dispatcher, batch = dispatcher_of(fleet), Batch()
    with logged() as lines:
        dispatcher.begin_step(STEP, np.arange(len(batch.hidden_TH), dtype=np.uint64), np.ones(30, dtype=np.bool_))
        dispatcher.run(3, batch.hidden_TH, batch.ids_TK, batch.weights_TK)
    (lost,), (retried,) = lines.of("link_lost"), lines.of("step_retried")
    assert (lost["shard"], lost["step"], lost["request_ids"]) == ("a", 41, ["odd#id~x", "other"])
    assert (retried["shards"], retried["step"], retried["layer"]) == (["a"], 41, 3)
    assert retried["request_ids"] == lost["request_ids"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> CheckpointWeights:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint("mixtral", directory)
    return CheckpointWeights(open_architecture(directory))


@contextmanager
def served(weights: CheckpointWeights, slow_log_s: float = 0.0) -> Iterator[Link]:
    """Yield a worker's end of a link that a shard with experts 0 and 1 of layer 1 serves."""
    keys = [ExpertKey(1, expert) for expert in (0, 1)]
    server = ShardServer(ExpertSlots(weights, keys, CPU), 6, slow_log_s)
    with link_pair(timeout_s=10.0) as (worker_end, shard_end):
        thread = threading.Thread(target=server.serve, args=(shard_end, Peer("worker-0.77/shard-1/1")))
        thread.start()
        try:
            yield worker_end
        finally:
            worker_end.close()
            thread.join(10.0)


def ask(link: Link, seed: int, experts: list[int], step: int) -> PacketKind:
    request = Request(seed, experts)
    request.sequence = first_sequence(step) + 1
    request.send(link)
    return link.recv()[0].kind


def test_a_shard_names_worker_and_step_of_what_it_refuses(weights: CheckpointWeights) -> None:
    with logged() as lines, served(weights) as link:
        assert ask(link, 1, [0, 1], step=6) is PacketKind.COMBINE
        assert ask(link, 2, [0, 5], step=7) is PacketKind.NOT_HERE
        assert ask(link, 3, [99], step=8) is PacketKind.FAILED
    (refused,), (failed,), (gone,) = (lines.of(e) for e in ("packet_refused", "packet_failed", "peer_gone"))
    assert (refused["peer"], refused["step"], refused["layer"], refused["epoch"]) == ("worker-0", 7, 1, 6)
    assert (failed["peer"], failed["peer_pid"], failed["step"]) == ("worker-0", "77", 8)
    assert "Traceback" in failed["exception"]
    assert (gone["peer"], gone["step"], gone["generation"]) == ("worker-0", 8, 1)


def test_a_slow_packet_is_told_and_a_quick_one_is_not(weights: CheckpointWeights) -> None:
    with logged() as lines, served(weights, slow_log_s=1e-9) as link:
        ask(link, 1, [0], step=9)
    (slow,) = lines.of("packet_slow")
    assert (slow["peer"], slow["step"], slow["layer"]) == ("worker-0", 9, 1)
    assert slow["duration_s"] >= 0
    with logged() as lines, served(weights, slow_log_s=1000.0) as link:
        ask(link, 1, [0], step=9)
    assert not lines.of("packet_slow")


def test_every_sequence_that_came_is_told_of_once_at_its_end() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.runner.non_finite.add("odd#0~1")
    with logged() as lines:
        bench.engine.submit([request_of(f"{name}#0~1", seed=n) for n, name in enumerate(("whole", "odd", "left"))])
        bench.engine.step()
        bench.engine.cancel(["left#0~1", "unknown"])
        bench.finish()
        with pytest.raises(InputError):
            bench.engine.submit([request_of("good#0~1"), request_of("long#0~1", length=1000)])
    ended = {line["request_id"]: line for line in lines.of("sequence_ended")}
    assert {name: line["outcome"] for name, line in ended.items()} == {
        "whole": "length",
        "odd": "error",
        "left": "cancelled",
        "good": "cancelled",
    }
    assert len(lines.of("sequence_ended")) == len(lines.of("sequence_taken")) == 4
    assert ended["whole"]["output_tokens"] == len(bench.tokens("whole#0~1"))
    steps = lines.of("step_done")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[0]["request_ids"] == ["whole", "odd", "left"]
    assert ended["whole"]["step"] == steps[-1]["step"]


def test_a_failed_step_has_its_requests_and_the_next_another_number() -> None:
    bench = Bench()

    def fail(chunks: Sequence[Chunk]) -> None:
        if chunks[0].sequence_id == "first#0~1":
            raise UnavailableError("every shard is away")

    bench.runner.before = fail
    with logged() as lines:
        bench.engine.submit([request_of("first#0~1")])
        bench.engine.step()
        bench.run([request_of("second#0~1")])
    (failed,) = lines.of("step_failed")
    assert (failed["step"], failed["request_ids"], failed["reason"]) == (1, ["first"], "every shard is away")
    assert lines.of("step_done")[0]["step"] == 2
