"""An event loop of a thread of its own, for tests and clients that block."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_a_thread(what: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter a context there for the length of a block."""
    entered: list[T] = []
    started, over = threading.Event(), threading.Event()

    async def run() -> None:
        async with what as value:
            entered.append(value)
            started.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert started.wait(20)
        yield entered[0]
    finally:
        over.set()
        thread.join(20)
