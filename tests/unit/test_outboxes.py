import pytest

from expertmesh.actors.token_stream import StreamAddress, TokenStreamClient, TokenStreamServer
from expertmesh.actors.worker.outboxes import SILENCE_S, Outboxes
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.requests import FinishReason, TokenEvent


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def event(sequence_id: str, index: int = 0, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(sequence_id=sequence_id, index=index, token_id=index, finish_reason=finish_reason)


async def test_each_gateway_hears_of_its_own_sequences() -> None:
    outboxes = Outboxes(Clock())
    outboxes.assign("g1", ["a", "b"])
    outboxes.assign("g2", ["c"])
    outboxes.release(["b", "never there"])
    outboxes.put([event("a"), event("b"), event("c", 0, FinishReason.STOP)])
    outboxes.put([event("a", 1), event("c", 1)])  # c has ended
    assert await outboxes.poll("g1", 0, 1.0) == (2, [event("a"), event("a", 1)])
    assert await outboxes.poll("g2", 0, 1.0) == (1, [event("c", 0, FinishReason.STOP)])


async def test_what_a_silent_gateway_asked_for_is_given_up() -> None:
    clock = Clock()
    outboxes = Outboxes(clock)
    outboxes.assign("alive", ["a"])
    outboxes.assign("gone", ["b", "c"])
    outboxes.assign("never asks", ["d"])
    outboxes.put([event("a"), event("b"), event("c", 0, FinishReason.STOP)])
    for gateway_id in ("alive", "gone"):
        await outboxes.poll(gateway_id, 0, 1.0)
    clock.now_s += SILENCE_S
    assert outboxes.give_up_silent() == []
    await outboxes.poll("alive", 1, 0.001)
    clock.now_s += 1
    assert outboxes.give_up_silent() == ["b", "d"]
    outboxes.put([event("b", 1), event("a", 1)])
    assert await outboxes.poll("alive", 1, 1.0) == (2, [event("a", 1)])
    assert outboxes.give_up_silent() == []


async def test_a_gateway_that_was_given_up_finds_its_worker_lost_and_may_begin_anew() -> None:
    """It would wait for ever for what was dropped."""
    clock = Clock()
    outboxes = Outboxes(clock)
    outboxes.assign("g", ["a"])
    outboxes.put([event("a")])
    server = await TokenStreamServer.start("127.0.0.1", lambda gateway_id, after: outboxes.poll(gateway_id, after, 1.0))

    async def find() -> StreamAddress:
        return server.address

    client = TokenStreamClient(find, "g")
    after, _ = await client.poll(0)
    clock.now_s += SILENCE_S + 1
    assert outboxes.give_up_silent() == ["a"]
    with pytest.raises(UnavailableError):
        await client.poll(after)
    outboxes.assign("g", ["e"])
    outboxes.put([event("e")])
    assert await client.poll(0) == (1, [event("e")])
    client.close()
    server.close()
