"""Messages of one attempt that wait for this stage.

Rationale: bounded by what they take, as neighbours send them, and by a number that no honest ring reaches: a stage that
stops for a while must not stop what brings them, for heartbeats come behind.
"""

import asyncio
from collections import deque

from worker import ring_pb2 as pb
from worker.envelope import held_bytes

MOST = 1024
MOST_BYTES = 64 * 2**20  # and one message more


class Inbox(asyncio.Queue[pb.Envelope]):
    """`put` waits while there is no room."""

    def __init__(self) -> None:
        super().__init__(MOST)
        self._sizes: deque[int] = deque()
        self._bytes = 0  # their sum

    def full(self) -> bool:
        return super().full() or self._bytes >= MOST_BYTES

    def _put(self, item: pb.Envelope) -> None:
        self._sizes.append(held_bytes(item))
        self._bytes += self._sizes[-1]
        super()._put(item)

    def _get(self) -> pb.Envelope:
        self._bytes -= self._sizes.popleft()
        return super()._get()
