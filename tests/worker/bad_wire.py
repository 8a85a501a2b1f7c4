"""What lies between two machines, at its worst: a relay that is slow, cuts what passes, or lets it vanish."""

import asyncio
import math
import random
import time
from contextlib import suppress


class Relay:
    """In front of a port of this machine. Both directions alike; connections are counted."""

    def __init__(self, target: int, latency_seconds: float = 0.0, bytes_per_second: float = math.inf) -> None:
        self.target = target
        self.latency_seconds = latency_seconds
        self.bytes_per_second = bytes_per_second
        self.cut_every: tuple[int, int] | None = None  # bytes of a connection, drawn between these
        self.connections = 0
        self.passed_bytes = 0
        self._random = random.Random(7)
        self._live: set[asyncio.StreamWriter] = set()
        self._frozen: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """All connections, in the middle of whatever passes."""
        for writer in self._live:
            writer.transport.abort()
        self._live.clear()

    def freeze(self) -> None:
        """Connections of now pass nothing more, and nobody is told: as behind a NAT that forgot them."""
        self._frozen |= set(range(self.connections + 1))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._live |= {writer, onward_writer}
        left = [self._random.randint(*self.cut_every)] if self.cut_every is not None else None
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(self._pump(number, source, sink, left))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter, left: list[int] | None
    ) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            free = 0.0
            while data := await source.read(2**14):
                free = max(free, time.monotonic()) + len(data) / self.bytes_per_second
                waiting.put_nowait((free + self.latency_seconds, data))
            waiting.put_nowait((max(free, time.monotonic()) + self.latency_seconds, b""))

        taking = asyncio.create_task(take())
        try:
            with suppress(OSError):
                while True:
                    due, data = await waiting.get()
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    if number in self._frozen:
                        continue
                    if left is not None:
                        left[0] -= len(data)
                        if left[0] < 0:
                            self.cut()
                    if not data:
                        break
                    self.passed_bytes += len(data)
                    sink.write(data)
                    await sink.drain()
        finally:
            taking.cancel()
            sink.close()
