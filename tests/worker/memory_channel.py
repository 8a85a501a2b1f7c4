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
        for sender in self._senders.values():
            sender.task.cancel()
        await asyncio.gather(*(sender.task for sender in self._senders.values()), return_exceptions=True)
        LISTENING.pop(self._address, None)


class MemorySender:
    peer: Peer
    address: str

    def __init__(self, channel: MemoryChannel) -> None:
        self._channel = channel
        self._queue: deque[bytes] = deque()
        self._refused: dict[bytes, tuple[int, str]] = {}
        self.task = asyncio.create_task(self._carry())

    async def send(self, envelope: pb.Envelope) -> None:
        if envelope.ByteSize() > self._channel.limit:
            raise ValueError(f"a message of {envelope.ByteSize()} bytes; the limit is {self._channel.limit}")
        while len(self._queue) >= WINDOW and not self._why(envelope):
            await asyncio.sleep(RETRY_SECONDS)
        if why := self._why(envelope):
            raise BadMessage(self.peer.name, f"refused our messages: {why}")
        self._queue.append(envelope.SerializeToString())

    def drop(self, job: bytes, attempt: int) -> None:
        messages = [(data, pb.Envelope.FromString(data)) for data in self._queue]
        self._queue = deque(data for data, m in messages if m.job != job or m.attempt >= attempt)
        if self._refused.get(job, (attempt, ""))[0] < attempt:
            del self._refused[job]

    def _why(self, envelope: pb.Envelope) -> str:
        attempt, why = self._refused.get(envelope.job, (0, ""))
        return why if envelope.attempt <= attempt else ""

    async def _carry(self) -> None:
        while True:
            target = LISTENING.get(self.address)
            if not self._queue or target is None or target.certificate != self.peer.certificate:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            us = target.peers.get(self._channel.certificate)
            if us is None:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            data = self._queue[0]
            envelope = pb.Envelope.FromString(data)
            try:
                await target.handler(us, envelope)
            except BadMessage as error:
                self._refused[envelope.job] = (envelope.attempt, error.what)
                self.drop(envelope.job, envelope.attempt)
                self._queue = deque(
                    kept
                    for kept in self._queue
                    if (m := pb.Envelope.FromString(kept)).job != envelope.job or m.attempt > envelope.attempt
                )
                continue
            if self._queue and self._queue[0] is data:
                self._queue.popleft()
