"""Jobs beside each other on one stream: each one's messages in their order, none of them behind another's.

A stage that takes no messages of one job takes those of others: its sender keeps to a window for each job.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from worker import ring_pb2 as pb
from worker.envelope import held_bytes

# What a Link may have unacknowledged of one job before `send` waits. Bytes bound memory; messages are small where a
# link is slow and its stages quick, and half a second of acknowledgements must not stop those.
WINDOW = 1024  # messages
WINDOW_BYTES = 16 * 2**20  # or one message

JOBS = 8  # windows, of all jobs together


class Windows:
    """What a sender has unacknowledged, by job. Of each message its job, and the bytes that it holds."""

    def __init__(self, messages: Iterable[tuple[bytes, int]] = ()) -> None:
        self._held: dict[bytes, tuple[int, int]] = {}  # messages, bytes
        for job, size in messages:
            self.add(job, size)

    def add(self, job: bytes, size: int) -> None:
        count, held = self._held.get(job, (0, 0))
        self._held[job] = (count + 1, held + size)

    def remove(self, job: bytes, size: int) -> None:
        count, held = self._held.pop(job)
        if count > 1:
            self._held[job] = (count - 1, held - size)

    def full(self, job: bytes, size: int) -> bool:
        """Whether the message has to wait: for those of its job, or of all."""
        every = self._held.values()
        parts = (
            (*self._held.get(job, (0, 0)), 1),
            (sum(count for count, _ in every), sum(held for _, held in every), JOBS),
        )
        return any(n and (n >= most * WINDOW or held + size > most * WINDOW_BYTES) for n, held, most in parts)


class Lanes:
    """`put` each message, `next_ack` tells what became of one.

    SAFETY: a sender that keeps to no window finds the stream as full as all windows: it keeps its own jobs waiting.
    """

    def __init__(self, take: Callable[[pb.Envelope, int], Awaitable[pb.Ack]]) -> None:
        """take: of a message and its bytes on the wire; returns once there is room for its job's next."""
        self._take = take
        self._lanes: dict[bytes, deque[tuple[pb.Envelope, int, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._acks: asyncio.Queue[tuple[pb.Ack, int] | BaseException | None] = asyncio.Queue()
        self._held = self._bytes = 0
        self._left = asyncio.Event()  # something has

    async def put(self, envelope: pb.Envelope, size: int) -> None:
        """size: on the wire. Waits while as many wait as may, be it that nobody reads their acknowledgements."""
        while self._held >= JOBS * WINDOW or self._bytes >= JOBS * WINDOW_BYTES:
            self._left.clear()
            await self._left.wait()
        self._held += 1
        held = held_bytes(envelope)
        self._bytes += held
        lane = self._lanes.get(envelope.job)
        if lane is not None:
            lane.append((envelope, size, held))
            return
        self._lanes[envelope.job] = deque([(envelope, size, held)])
        task = asyncio.create_task(self._work(envelope.job))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def end(self) -> None:
        """Once all are acknowledged, there comes no more."""
        while self._held:
            self._left.clear()
            await self._left.wait()
        self._acks.put_nowait(None)

    def fail(self, error: BaseException) -> None:
        """`next_ack` raises it."""
        self._acks.put_nowait(error)

    async def next_ack(self) -> pb.Ack | None:
        """None: there comes no more. Raises what `take` raised."""
        match await self._acks.get():
            case None:
                return None
            case (ack, held):
                self._held -= 1
                self._bytes -= held
                self._left.set()
                return ack
            case error:
                raise error

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, job: bytes) -> None:
        lane = self._lanes[job]
        while lane:
            envelope, size, held = lane[0]
            self._acks.put_nowait((await self._take(envelope, size), held))
            lane.popleft()
        del self._lanes[job]

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
