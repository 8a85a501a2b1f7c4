"""The chain's events, each taken in once, in their order."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from contracts.client import Chain, ContractsError
from contracts.events import Event
from worker.errors import WorkerError

log = logging.getLogger("plumb.worker.follow")

OVERLAP_BLOCKS = 16  # read again with each new one: nodes behind one URL differ, and blocks are replaced


class Follower:
    """`take` is given what is new. An event that it fails at comes again at the next look, and with it later ones of
    the same job, game or demand; those of others pass.
    """

    def __init__(self, chain: Chain, start_block: int, take: Callable[[Event], Awaitable[None]]) -> None:
        self._chain = chain
        self._start = start_block
        self._next = start_block
        self._take = take
        self._recent: dict[tuple[int, int], Event] = {}  # of the blocks that are read again, by block and log_index
        self._waiting: deque[Event] = deque()  # not taken in yet
        self._lock = asyncio.Lock()
        self._looked = float("-inf")  # when the last look at the chain began

    async def follow(self) -> None:
        """Up to the head as it is now. Who asks while others look shares the next look with all who wait for it:
        strangers that ask for unknown jobs hold nobody up. Raises ContractsError.
        """
        asked = time.monotonic()
        async with self._lock:
            if self._looked > asked:
                return
            began = time.monotonic()
            try:
                last, events = await asyncio.to_thread(self._read)
            except ContractsError:
                self._looked = began  # those who wait would only wait for the same
                raise
            # Only now, as who asked may have gone meanwhile, and its look with it.
            self._looked = began
            told = {(event.block, event.log_index): event for event in events}
            self._waiting.extend(event for place, event in told.items() if self._recent.get(place) != event)
            self._next = max(self._next, last + 1)
            oldest = self._next - OVERLAP_BLOCKS
            self._recent = {place: event for place, event in (self._recent | told).items() if place[0] >= oldest}
            await self._take_in()

    def _read(self) -> tuple[int, list[Event]]:
        last = self._chain.block_number()
        if last < self._next:
            return last, []
        return last, list(self._chain.events(max(self._next - OVERLAP_BLOCKS, self._start), last))

    async def _take_in(self) -> None:
        failed: set[object] = set()
        for event in list(self._waiting):
            about = getattr(event, "id", None)
            if about in failed:
                continue
            try:
                await self._take(event)
            except Exception as error:  # one job's fault must not cost the others anything
                failed.add(about)
                known = isinstance(error, ContractsError | WorkerError | OSError)
                log.warning("%s, which comes again: %s", type(event).__name__, error, exc_info=not known)
            else:
                self._waiting.remove(event)
