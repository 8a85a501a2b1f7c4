"""A second Channel: neighbours in one process, without a network. What the contract asks of gRPC's, it asks of this."""

import asyncio
from collections import deque

from worker import ring_pb2 as pb
from worker.channel import Handler, Peer
from worker.errors import BadMessage, ConfigError

LISTENING: dict[str, "MemoryChannel"] = {}

WINDOW = 256  # messages
RETRY_SECONDS = 0.02


class MemoryChannel:
    def __init__(
        self, certificate: bytes, key: bytes, handler: Handler, max_message_bytes: int, compress: bool = False
    ) -> None:
        self.certificate = certificate
        self.handler = handler
        self.limit = max_message_bytes
        self.peers: dict[bytes, Peer] = {}
        self._senders: dict[str, MemorySender] = {}
        self._address = ""

    async def start(self, address: str) -> int:
        if address.endswith(":0"):
            address = f"{address[:-1]}{40_000 + len(LISTENING)}"
        if address in LISTENING:
            raise ConfigError(f"grpc: {address} cannot be listened on")
        LISTENING[address], self._address = self, address
        return int(address.rpartition(":")[2])

    def admit(self, peer: Peer) -> None:
        self.peers[peer.certificate] = peer

    def to(self, peer: Peer, address: str) -> "MemorySender":
        sender = self._senders.setdefault(peer.account, MemorySender(self))
        sender.peer, sender.address = peer, address
        return sender

    async def close(self) -> None:
        tasks = [task for sender in self._senders.values() for task in sender.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        LISTENING.pop(self._address, None)


class MemorySender:
    peer: Peer
    address: str

    def __init__(self, channel: MemoryChannel) -> None:
        self._channel = channel
        self._queues: dict[bytes, deque[bytes]] = {}  # by job
        self._refused: dict[bytes, tuple[int, str]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def send(self, envelope: pb.Envelope) -> None:
        if envelope.ByteSize() > self._channel.limit:
            raise ValueError(f"a message of {envelope.ByteSize()} bytes; the limit is {self._channel.limit}")
        if envelope.job not in self._queues:
            self._queues[envelope.job] = deque()
            self.tasks.append(asyncio.create_task(self._carry(envelope.job)))
        while len(self._queues[envelope.job]) >= WINDOW and not self._why(envelope):
            await asyncio.sleep(RETRY_SECONDS)
        if why := self._why(envelope):
            raise BadMessage(self.peer.name, f"refused our messages: {why}")
        self._queues[envelope.job].append(envelope.SerializeToString())

    def drop(self, job: bytes, attempt: int) -> None:
        self._forget(job, attempt)
        if self._refused.get(job, (attempt, ""))[0] < attempt:
            del self._refused[job]

    def _forget(self, job: bytes, attempt: int) -> None:
        queue = self._queues.get(job, deque())
        kept = [data for data in queue if pb.Envelope.FromString(data).attempt >= attempt]
        queue.clear()
        queue.extend(kept)

    def _why(self, envelope: pb.Envelope) -> str:
        attempt, why = self._refused.get(envelope.job, (0, ""))
        return why if envelope.attempt <= attempt else ""

    async def _carry(self, job: bytes) -> None:
        queue = self._queues[job]
        while True:
            target = LISTENING.get(self.address)
            us = target.peers.get(self._channel.certificate) if target is not None else None
            if not queue or target is None or us is None or target.certificate != self.peer.certificate:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            data = queue[0]
            envelope = pb.Envelope.FromString(data)
            try:
                await target.handler(us, envelope)
            except BadMessage as error:
                self._refused[job] = (envelope.attempt, error.what)
                self._forget(job, envelope.attempt + 1)
                continue
            if queue and queue[0] is data:
                queue.popleft()
