"""Experts copied over real links: the same bits; damaged questions and answers break the link and nothing else."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import LinkEnd, ShardPeer
from expertmesh.actors.shard.copying import asked_expert, expert_packet, fetch_expert
from expertmesh.actors.shard.intake import Intake
from expertmesh.actors.shard.server import ShardServer
from expertmesh.cluster.errors import LinkError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketHeader, PacketKind
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.expert_mlp import PackedExpert, PackedSizes
from expertmesh.models.architecture import open_architecture
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.layer_weights import ExpertTensors
from expertmesh.models.loading import CheckpointWeights
from tests.families import write_checkpoint
from tests.fleet import CPU, link_pair, served_link

HERE = ExpertKey(1, 5)


# What the CPU kernel can pack.
PACKED = {"hidden_size": 64, "intermediate_size": 32}


def opened(family: str, directory: Path, dtype: str = "auto", **changes: Any) -> CheckpointWeights:
    write_checkpoint(family, directory, **changes)
    return CheckpointWeights(open_architecture(directory, dtype))


def fetch(
    link: Link, weights: CheckpointWeights, key: ExpertKey, sequence: int = 7, packed: PackedSizes | None = None
) -> ExpertTensors:
    return fetch_expert(link, key, weights.expert_shapes(key.layer), weights.architecture.dtype, sequence, packed)


@pytest.mark.parametrize("kind", ["local", "gloo", "shared"])
@pytest.mark.parametrize(
    ("family", "dtype", "sizes"),
    [
        ("mixtral", "float32", {}),
        ("gpt_oss", "bfloat16", {}),
        ("mixtral", "bfloat16", PACKED),
        ("gpt_oss", "bfloat16", PACKED),
    ],
)
def test_a_copied_expert_is_the_one_that_the_checkpoint_holds(
    kind: str, family: str, dtype: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    weights = opened(family, tmp_path, dtype, **sizes)
    held = [ExpertKey(1, expert) for expert in (6, 0, 5)]
    server = ShardServer(ExpertSlots(weights, held, CPU), epoch=3)
    taken = ExpertSlots(weights, (), CPU)
    came: list[ExpertTensors] = []

    def take(key: ExpertKey) -> ExpertTensors:
        came.append(fetch(link, weights, key, len(came), taken.packed_sizes(1)))
        return came[-1]

    with served_link(server, kind=kind) as link:
        taken.add(1, [5, 6], take)
    assert {isinstance(expert, PackedExpert) for expert in came} == {taken.are_packed}
    assert taken.are_packed == (bool(sizes) and find_compiler() is not None)
    read = ExpertSlots(weights, [ExpertKey(1, 5), ExpertKey(1, 6)], CPU)
    for key in read.keys:
        copied, expected = taken.expert(key), read.expert(key)
        assert copied is not None
        assert expected is not None
        assert copied.keys() == expected.keys()
        assert all(torch.equal(copied[name], expected[name]) for name in expected)


def test_a_packed_expert_comes_by_parameter_to_who_has_another_layout(tmp_path: Path) -> None:
    weights = opened("gpt_oss", tmp_path, "bfloat16", **PACKED)
    server = ShardServer(ExpertSlots(weights, [HERE], CPU), epoch=3)
    with served_link(server) as link:
        got = fetch(link, weights, HERE)
    expected = weights.load_expert(HERE)
    assert not isinstance(got, PackedExpert)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_an_expert_that_is_not_there_is_said_to_be_unavailable_and_the_link_goes_on(tmp_path: Path) -> None:
    weights = opened("mixtral", tmp_path)
    server = ShardServer(ExpertSlots(weights, [HERE], CPU), epoch=3)
    with served_link(server) as link:
        for missing in (ExpertKey(1, 4), ExpertKey(0, 5), ExpertKey(99, 5)):
            with pytest.raises(UnavailableError, match=str(missing)):
                fetch_expert(link, missing, weights.expert_shapes(1), torch.float32, 1)
        assert fetch(link, weights, HERE)


def of_other_size_packed(request: PacketHeader, _tensors: dict[str, Tensor]) -> tuple[PacketHeader, list[Tensor]]:
    return expert_packet(request, PackedExpert(up=torch.zeros(3), down=torch.zeros(3)), 1)


def packed_that_nobody_asked_for(
    request: PacketHeader, tensors: dict[str, Tensor]
) -> tuple[PacketHeader, list[Tensor]]:
    up, down = (tensors[name].flatten() for name in ("gate_up_proj", "down_proj"))
    return expert_packet(request, PackedExpert(up=up, down=down), 1)


def of_other_size(request: PacketHeader, _tensors: dict[str, Tensor]) -> tuple[PacketHeader, list[Tensor]]:
    return expert_packet(request, {"down_proj": torch.zeros(3)}, 1)


def of_other_dtype(request: PacketHeader, tensors: dict[str, Tensor]) -> tuple[PacketHeader, list[Tensor]]:
    return expert_packet(request, {n: t.half().repeat_interleave(2, 0) for n, t in tensors.items()}, 1)


def of_another_question(request: PacketHeader, tensors: dict[str, Tensor]) -> tuple[PacketHeader, list[Tensor]]:
    earlier = PacketHeader(kind=PacketKind.FETCH, generation=1, sequence=request.sequence - 1, epoch=0, layer=1)
    return expert_packet(earlier, tensors, 1)


@pytest.mark.parametrize(
    ("answer", "may_be_packed"),
    [
        (of_other_size, False),
        (of_other_size_packed, True),
        (packed_that_nobody_asked_for, False),
        (of_other_dtype, False),
        (of_another_question, False),
    ],
)
def test_an_answer_that_does_not_fit_is_a_link_error(
    answer: Callable[[PacketHeader, dict[str, Tensor]], tuple[PacketHeader, list[Tensor]]],
    may_be_packed: bool,
    tmp_path: Path,
) -> None:
    weights = opened("mixtral", tmp_path)
    up, down = (weights.expert_shapes(1)[name].numel() for name in ("gate_up_proj", "down_proj"))
    with link_pair(kind="local") as (asking, asked):

        def serve() -> None:
            header, payload = asked.recv()
            asked.send(*answer(header, weights.load_expert(asked_expert(header, payload)[0])))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(LinkError, match=r"asked for L1E5"):
            fetch(asking, weights, HERE, packed=PackedSizes(up=up, down=down) if may_be_packed else None)
        thread.join()


def test_a_damaged_question_ends_its_link_alone(tmp_path: Path) -> None:
    weights = opened("mixtral", tmp_path)
    server = ShardServer(ExpertSlots(weights, [HERE], CPU), epoch=3)
    with served_link(server, name="bad") as bad, served_link(server, name="good") as good:
        payload = torch.zeros(3, dtype=torch.uint8)
        bad.send(
            PacketHeader(kind=PacketKind.FETCH, generation=1, sequence=1, epoch=0, layer=1, payload_bytes=3), [payload]
        )
        assert fetch(good, weights, HERE)


def peer(name: str) -> ShardPeer:
    return ShardPeer(life=name, handle=None, end=LinkEnd(node="here"))


def test_an_intake_copies_what_it_can_and_reads_the_rest(tmp_path: Path) -> None:
    weights = opened("mixtral", tmp_path)
    server = ShardServer(ExpertSlots(weights, [HERE], CPU), epoch=3)
    gone, here = peer("gone"), peer("here")
    asked: list[str] = []

    def join(source: ShardPeer) -> Link:
        asked.append(source.life)
        if source is gone:
            raise UnavailableError("its shard does not answer")
        return link

    keys = {ExpertKey(0, 1): gone, ExpertKey(0, 2): gone, HERE: here, ExpertKey(1, 4): here, ExpertKey(1, 6): here}
    with served_link(server) as link:
        intake = Intake(weights, keys, join, ExpertSlots(weights, (), CPU).packed_sizes)
        for key in (*keys, ExpertKey(2, 0)):
            expected = weights.load_expert(key)
            got = intake.get(key)
            assert not isinstance(got, PackedExpert)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
        intake.close()
    # L1E5 came from the shard; it lacked L1E4 and was not asked for L1E6; one that is gone is asked once.
    assert (intake.num_copied, intake.num_read) == (1, 5)
    assert asked == ["gone", "here"]
