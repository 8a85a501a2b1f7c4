"""Messages of a job that come before this stage is in its ring.

Rationale: they are kept and not waited with. Our own successor may be lost, and heartbeats come behind them.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from worker import ring_pb2 as pb
from worker.channel import Peer
from worker.envelope import held_bytes
from worker.errors import BadMessage
from worker.run import Run

MOST = 64  # what is in flight at once, and a minute of beats
MOST_BYTES = 64 * 2**20  # and one message more
LOOK_SECONDS = 0.2


class Early:
    """run: of the job, once there is one."""

    def __init__(self, run: Callable[[], Run | None], patience_seconds: float) -> None:
        self._run = run
        self._patience_seconds = patience_seconds
        self._kept: deque[tuple[Peer, pb.Envelope]] = deque()
        self._order = asyncio.Lock()

    async def receive(self, peer: Peer, envelope: pb.Envelope) -> None:
        """Waits only where MOST are kept already. Raises BadMessage."""
        for _ in range(int(self._patience_seconds / LOOK_SECONDS)):
            if self._run() is not None or self._room():
                break
            await asyncio.sleep(LOOK_SECONDS)
        else:
            raise BadMessage(peer.name, f"{len(self._kept)} messages came, but we are not serving the job")
        self._kept.append((peer, envelope))
        try:
            await self.hear()
        except asyncio.CancelledError:  # its connection is lost, and brings it again
            with suppress(ValueError):
                self._kept.remove((peer, envelope))
            raise

    async def hear(self) -> None:
        """All that was kept, in its order, if there is a run. Raises BadMessage."""
        async with self._order:
            while (run := self._run()) is not None and self._kept:
                first = self._kept.popleft()
                try:
                    await run.receive(*first)
                except asyncio.CancelledError:  # with whoever came last; what came before it comes no more
                    self._kept.appendleft(first)
                    raise

    def _room(self) -> bool:
        return len(self._kept) < MOST and sum(held_bytes(envelope) for _, envelope in self._kept) < MOST_BYTES

    def forget(self) -> None:
        self._kept.clear()
