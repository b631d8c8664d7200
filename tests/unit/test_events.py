"""What is told of members, operations and readiness, and how much of it is kept."""

import pytest

from expertmesh.actors.gateway.gateway_events import GatewayEvents
from expertmesh.actors.recent_events import RecentEvents
from expertmesh.cluster.events import Event, EventKind, MemberWatch

MEMBERS = ["shard-0", "shard-1"]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_is_bounded_by_kind_and_numbers_go_on() -> None:
    clock = Clock()
    log = RecentEvents(clock, max_of_a_kind=2)
    log.add(EventKind.FAULT, "rare")
    for epoch in range(5):
        clock.now_s += 1
        log.add(EventKind.PLACEMENT, f"epoch {epoch}")
    assert log.after(0) == [
        Event(1, 100.0, EventKind.FAULT, "rare"),
        Event(5, 104.0, EventKind.PLACEMENT, "epoch 3"),
        Event(6, 105.0, EventKind.PLACEMENT, "epoch 4"),
    ], "what is frequent pushes out nothing else"
    log.add(EventKind.OPERATION, "of a former life", time_s=7.5)
    assert log.after(6) == [Event(7, 7.5, EventKind.OPERATION, "of a former life")]
    assert log.after(7) == []


def states(**changed: str) -> dict[str, str]:
    return {
        "shard-0": "ready",
        "shard-1": "ready",
        **{name.replace("_", "-"): state for name, state in changed.items()},
    }


def test_the_first_look_at_members_tells_nothing() -> None:
    watch = MemberWatch()
    assert watch.look(0.0, states(shard_1="starting"), MEMBERS) == []
    assert watch.look(1.0, states(shard_1="ready"), MEMBERS) == [(EventKind.MEMBER, "shard-1 is ready")]
    assert watch.look(2.0, states(), MEMBERS) == []


@pytest.mark.parametrize(
    ("state", "words"), [("dead", "is dead; it is started again"), ("unresponsive", "does not answer")]
)
def test_a_fault_and_its_recovery_are_one_story(state: str, words: str) -> None:
    watch = MemberWatch()
    watch.look(0.0, states(), MEMBERS)
    assert watch.look(10.0, states(shard_1=state), MEMBERS) == [(EventKind.FAULT, f"shard-1 {words}")]
    # Its successor is not there yet, then starts.
    assert watch.look(11.0, {"shard-0": "ready"}, MEMBERS) == []
    assert watch.look(12.0, states(shard_1="starting"), MEMBERS) == []
    assert watch.look(13.5, states(), MEMBERS) == [(EventKind.RECOVERY, "shard-1 is ready again after 3.5 s")]
    assert watch.look(14.0, states(shard_1=state), MEMBERS) == [(EventKind.FAULT, f"shard-1 {words}")], "a second fault"


def test_members_that_come_and_go() -> None:
    watch = MemberWatch()
    watch.look(0.0, states(), MEMBERS)
    assert watch.look(1.0, states(shard_2="starting"), MEMBERS) == [(EventKind.MEMBER, "shard-2 is starting")]
    watch.look(2.0, states(shard_2="dead"), [*MEMBERS, "shard-2"])
    # It is taken out while it is dead.
    assert watch.look(3.0, states(), MEMBERS) == [(EventKind.MEMBER, "shard-2 has left")]
    assert watch.look(4.0, states(), MEMBERS) == []


def test_a_gateway_tells_each_change_once() -> None:
    clock = Clock()
    events = GatewayEvents(clock)
    for _ in range(2):
        events.heard(True, "")
    for _ in range(3):
        clock.now_s += 0.5
        events.unheard("no answer")
    for is_ready, reason in ((True, ""), (False, "3 experts have no live replica"), (False, "still"), (True, "")):
        events.heard(is_ready, reason)
    events.failed_over("worker-0", 2, "poll: gone")
    events.failed_over("worker-1", 0, "it was restarted")
    assert [(event.kind, event.text) for event in events.after(0)] == [
        (EventKind.RECOVERY, "requests are served"),
        (EventKind.FAULT, "the controller does not answer, tokens go on: no answer"),
        (EventKind.RECOVERY, "the controller answers again after 1.0 s"),
        (EventKind.FAULT, "requests are not served: 3 experts have no live replica"),
        (EventKind.RECOVERY, "requests are served"),
        (EventKind.FAULT, "worker-0 is lost, 2 requests go on elsewhere: poll: gone"),
    ]
