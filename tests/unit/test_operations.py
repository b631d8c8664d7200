"""Operations as records: which phase may follow which, and what is read back."""

import itertools

import msgpack
import pytest

from expertmesh.cluster.errors import StateError
from expertmesh.cluster.operations import Operation, Phase


def operation(phase: Phase = Phase.PREPARE) -> Operation:
    return Operation(
        id="op-1",
        request="scale to 3 shards",
        adding=("shard-2",),
        removing=(),
        phase=phase,
        progress="",
        error="",
        started_s=10.0,
        ended_s=0.0,
        deadline_s=600.0,
        target=b"a placement",
    )


ALLOWED = {
    (Phase.PREPARE, Phase.COMMIT),
    (Phase.PREPARE, Phase.ROLLED_BACK),
    (Phase.COMMIT, Phase.DRAIN),
    (Phase.COMMIT, Phase.ROLLED_BACK),
    (Phase.DRAIN, Phase.DONE),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_an_operation_goes_forward_or_back_as_a_whole(before: Phase, after: Phase) -> None:
    if (before, after) not in ALLOWED:
        with pytest.raises(AssertionError, match="cannot go from"):
            operation(before).advanced(after, "", now_s=20.0)
        return
    advanced = operation(before).advanced(after, "now this", now_s=20.0, error="why")
    assert (advanced.phase, advanced.progress, advanced.error) == (after, "now this", "why")
    assert advanced.target == (b"a placement" if after is Phase.COMMIT else b"")
    assert advanced.is_over == (after in (Phase.DONE, Phase.ROLLED_BACK))
    assert advanced.ended_s == (20.0 if advanced.is_over else 0.0)


def test_a_record_is_read_back() -> None:
    assert Operation.from_bytes(operation(Phase.COMMIT).to_bytes()) == operation(Phase.COMMIT)
    assert "target" not in operation().facts()


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xc1",
        b"junk",
        msgpack.packb([2, {"id": "x"}]),
        msgpack.packb([2, {**vars(operation()), "phase": "LATER"}]),
    ],
)
def test_a_damaged_record_is_refused(record: bytes) -> None:
    with pytest.raises(StateError, match="damaged"):
        Operation.from_bytes(record)


def test_another_version_is_refused() -> None:
    with pytest.raises(StateError, match="version 7"):
        Operation.from_bytes(msgpack.packb([7, {}]))
