"""How `chaos` judges what it saw, and that its picture is drawn."""

import signal
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from expertmesh.actors.cli.chaos_events import Target
from expertmesh.actors.cli.chaos_streams import Record, mismatches, unsteady
from expertmesh.cluster.errors import UnavailableError


def record(outputs: dict[int, list[list[int]]]) -> Record:
    return Record(outputs={("mixed", number): found for number, found in outputs.items()})


def test_an_output_must_be_one_that_was_seen_undisturbed() -> None:
    calm = record({0: [[1, 2, 3], [1, 2, 3]], 1: [[4, 5, 6], [4, 9, 9]]})
    assert unsteady(calm) == 1
    assert mismatches(calm, record({0: [[1, 2, 3]], 1: [[4, 9, 9], [4, 5, 6]]})) == []
    assert mismatches(calm, record({0: [[1, 2, 4]], 1: [[4, 5, 9]]})) == [
        "request 0 (mixed, greedy) differs from token 2 on; 3 came",
        "request 1 (mixed, sampled) differs from token 2 on; 3 came",
    ]


@pytest.mark.parametrize("output", [[1, 2], [1, 2, 3, 4], []])
def test_a_lost_or_doubled_token_is_seen(output: list[int]) -> None:
    assert len(mismatches(record({0: [[1, 2, 3]]}), record({0: [output]}))) == 1


def test_gaps_are_those_within_a_stream() -> None:
    found = Record(token_times_s=[[0.0, 0.1, 0.5], [10.0], []])
    assert found.longest_gap_s == pytest.approx(0.4)
    assert [end_s for end_s, _ in found.gaps] == [0.1, 0.5]
    assert Record().longest_gap_s == 0.0


def test_a_member_without_a_process_is_not_signalled() -> None:
    """Process id 0 would be the whole group of the sender."""
    target = Target(channel=MagicMock(), streams=MagicMock(), seed=0, cycles=0, minutes=0)
    with pytest.raises(UnavailableError, match="no process yet"):
        target.signal(0, signal.SIGCONT, "SIGCONT shard-0")
    assert not target.marks


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    from expertmesh.actors.cli.chaos_plot import draw

    file = tmp_path / "plot.png"
    draw(file, "a test", Record(token_times_s=[[0.0, 0.1, 0.9], [0.2, 3.0]]), [(1.0, "SIGKILL shard-0")])
    assert file.read_bytes().startswith(b"\x89PNG")
