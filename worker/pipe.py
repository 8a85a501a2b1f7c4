"""Work for one thread whose results are handed on in order: while one computes, the next is queued behind it and the
last is being handed on, so the thread never waits for a message.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")

QUEUED = 1  # results that wait behind the one that is computed or handed on: their tensors stay in memory


class Pipe(Generic[T]):
    """`run` delivers until `end`; it raises what a piece of work or a delivery raised, and then nothing is delivered
    any more.
    """

    def __init__(self, thread: Executor, deliver: Callable[[T], Awaitable[None]]) -> None:
        self._thread = thread
        self._deliver = deliver
        self._results: asyncio.Queue[asyncio.Future[T] | None] = asyncio.Queue(QUEUED)

    async def put(self, work: Callable[[], T]) -> None:
        """Queues `work` for the thread; waits while enough is queued already."""
        result = asyncio.get_running_loop().run_in_executor(self._thread, work)
        result.add_done_callback(_seen)
        await self._results.put(result)

    async def end(self) -> None:
        """Nothing more comes: `run` returns once all is delivered."""
        await self._results.put(None)

    async def run(self) -> None:
        while (result := await self._results.get()) is not None:
            await self._deliver(await result)


def _seen(result: asyncio.Future[T]) -> None:
    """Behind a failure nobody asks for what was queued, and what became of it does not matter."""
    if not result.cancelled():
        result.exception()
