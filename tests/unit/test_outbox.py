import asyncio
import time

from expertmesh.actors.worker.outbox import Outbox
from expertmesh.cluster.requests import TokenEvent


def event(index: int) -> TokenEvent:
    return TokenEvent(sequence_id="s", index=index, token_id=index + 100)


async def test_events_come_in_order_with_the_number_of_the_last() -> None:
    outbox = Outbox()
    outbox.put([event(0), event(1)])
    outbox.put([event(2)])
    assert await outbox.poll(0, 1.0) == (2, [event(0), event(1), event(2)])


async def test_what_the_gateway_has_is_not_sent_again() -> None:
    outbox = Outbox()
    outbox.put([event(0)])
    cursor, _ = await outbox.poll(0, 1.0)
    outbox.put([event(1)])
    assert await outbox.poll(cursor, 1.0) == (2, [event(1)])


async def test_what_the_gateway_did_not_confirm_is_sent_again() -> None:
    """An answer that is lost on its way is asked for again with the number of the one before."""
    outbox = Outbox()
    outbox.put([event(0)])
    assert await outbox.poll(0, 1.0) == (1, [event(0)])
    outbox.put([event(1)])
    assert await outbox.poll(0, 1.0) == (2, [event(0), event(1)])


async def test_a_poll_waits_for_the_next_event() -> None:
    outbox = Outbox()
    outbox.put([event(0)])
    waiting = asyncio.create_task(outbox.poll(1, 5.0))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    outbox.put([event(1)])
    assert await asyncio.wait_for(waiting, 1.0) == (2, [event(1)])


async def test_a_poll_without_events_ends_with_the_same_number() -> None:
    outbox = Outbox()
    outbox.put([event(0)])
    cursor, _ = await outbox.poll(0, 1.0)
    started_s = time.monotonic()
    assert await outbox.poll(cursor, 0.05) == (cursor, [])
    assert 0.04 <= time.monotonic() - started_s < 1.0
    outbox.put([event(1)])
    assert await outbox.poll(cursor, 1.0) == (2, [event(1)])


async def test_a_poll_that_its_caller_gave_up_loses_nothing() -> None:
    outbox = Outbox()
    abandoned = asyncio.create_task(outbox.poll(0, 5.0))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(outbox.poll(0, 5.0))
    await asyncio.sleep(0.02)
    outbox.put([event(0)])
    assert await asyncio.wait_for(second, 1.0) == (1, [event(0)])
    assert await asyncio.wait_for(abandoned, 1.0) == (1, [event(0)])
    assert await outbox.poll(0, 1.0) == (1, [event(0)])


async def test_confirmed_events_take_no_room() -> None:
    outbox = Outbox()
    cursor = 0
    for number in range(50):
        outbox.put([event(number)])
        cursor, events = await outbox.poll(cursor, 1.0)
        assert events == [event(number)]
    assert cursor == 50
    assert len(outbox._events) <= 1
