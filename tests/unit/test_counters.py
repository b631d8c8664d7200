"""Growth of counters: over the process's own time, and never across two lives."""

from expertmesh.cluster.counters import Growth


def test_growth_is_between_two_looks() -> None:
    growth = Growth()
    assert growth.look({"a": {"at_s": 10.0, "busy_s": 3.0}}) == {}
    assert growth.look({"a": {"at_s": 12.0, "busy_s": 4.5}, "b": {"at_s": 1.0, "busy_s": 0.0}}) == {
        "a": {"at_s": 2.0, "busy_s": 1.5}
    }
    assert growth.look({"a": {"at_s": 13.0, "busy_s": 4.5}, "b": {"at_s": 2.0, "busy_s": 0.5}}) == {
        "a": {"at_s": 1.0, "busy_s": 0.0},
        "b": {"at_s": 1.0, "busy_s": 0.5},
    }


def test_a_counter_that_fell_is_a_new_life() -> None:
    growth = Growth()
    growth.look({"a": {"at_s": 10.0, "busy_s": 3.0}})
    assert growth.look({"a": {"at_s": 12.0, "busy_s": 0.1}}) == {}
    assert growth.look({"a": {"at_s": 13.0, "busy_s": 0.2}}) == {"a": {"at_s": 1.0, "busy_s": 0.1}}
    assert growth.look({"a": {"at_s": 2.0, "busy_s": 5.0}}) == {}, "its clock fell"


def test_nothing_new_and_long_gone_count_for_nothing() -> None:
    growth = Growth()
    growth.look({"a": {"at_s": 10.0}})
    assert growth.look({"a": {"at_s": 10.0}}) == {}
    assert growth.look({"a": {"at_s": 11.0}}) == {"a": {"at_s": 1.0}}
    growth.look({})
    assert growth.look({"a": {"at_s": 12.0}}) == {}
