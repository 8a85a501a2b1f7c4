"""Messages between neighbours: gRPC streams over mutual TLS, each side's certificate pinned to its fingerprint on
chain.

A Link carries a stage's messages to its successor and survives lost connections: what was not acknowledged is sent
again, and the receiver passes over what it has. A Ring receives from the predecessor.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from worker import ring_pb2 as pb
from worker import ring_pb2_grpc
from worker.batch import Batch, Piece, Token
from worker.errors import BadMessage, ConfigError
from worker.packing import PACKED, PLAIN, pack, unpack
from worker.stage import BITS, from_bits, to_bits
from worker.tls import PEER_NAME, fingerprint

log = logging.getLogger("plumb.worker.channel")

# What a Link may have unacknowledged before `send` waits. Bytes bound memory; messages are small where a link is slow
# and its stages quick, and half a second of acknowledgements must not stop those.
WINDOW = 1024  # messages
WINDOW_BYTES = 128 * 2**20  # or one message

# gRPC itself drops a stream without naming anyone; with room above our own bound, most oversized messages are refused
# by us, by name.
SLACK_BYTES = 2**20

# Told by a receiver at the start of a stream: that it takes packed rows.
PACKING_TAKEN = ("plumb-packing", str(PACKED))

BACKOFF_SECONDS = (0.05, 2.0)  # first and longest pause between connections


@dataclass(frozen=True)
class Peer:
    """A neighbour as the chain knows it. `name` is what errors call it: stage and account."""

    name: str
    account: str
    certificate: bytes  # PEM, checked against the chain


Handler = Callable[[Peer, pb.Envelope], Awaitable[None]]


# ------------------------------------------------------------------------------------------------------------- messages


def pack_tensor(rows: torch.Tensor, dtype: int) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=list(rows.shape), data=to_bits(rows).tobytes())


def unpack_rows(sender: str, rows: pb.Rows, hidden: int, dtype: int) -> tuple[Batch, torch.Tensor]:
    """The microbatch and its layer inputs, [rows, hidden]. Raises BadMessage naming the sender."""
    pieces = (Piece(p.request, p.first, p.count, p.donor if p.HasField("donor") else None) for p in rows.pieces)
    batch = Batch(tuple(pieces))
    if not batch.pieces:
        raise BadMessage(sender, "rows: expected at least one piece, came none")
    if len({piece.request for piece in batch.pieces}) != len(batch.pieces):
        raise BadMessage(sender, "rows: a request occurs twice in a microbatch")
    if any(piece.count == 0 for piece in batch.pieces):
        raise BadMessage(sender, "rows: a piece of no rows")
    tensor = rows.hidden
    if tensor.dtype != dtype:
        raise BadMessage(sender, f"rows: expected dtype {dtype}, came {tensor.dtype}")
    if list(tensor.shape) != [batch.rows, hidden]:
        raise BadMessage(sender, f"rows: expected shape {[batch.rows, hidden]}, came {list(tensor.shape)}")
    kind = np.dtype(BITS[dtype]).newbyteorder("<")
    if len(tensor.data) != batch.rows * hidden * kind.itemsize:
        raise BadMessage(sender, f"rows: expected {batch.rows * hidden * kind.itemsize} bytes, came {len(tensor.data)}")
    bits = np.frombuffer(tensor.data, kind).astype(BITS[dtype]).reshape(batch.rows, hidden)
    return batch, from_bits(bits, (torch.bfloat16, torch.float16, torch.float32)[dtype])


def unpack_tokens(sender: str, tokens: pb.Tokens, vocabulary: int) -> list[Token]:
    for token in tokens.tokens:
        if token.token >= vocabulary:
            raise BadMessage(sender, f"tokens: expected an id below {vocabulary}, came {token.token}")
    return [Token(t.request, t.index, t.token) for t in tokens.tokens]


def packed(envelope: pb.Envelope) -> pb.Envelope:
    """The same message with its rows packed, if that makes it smaller."""
    plain = envelope.rows.hidden
    data = pack(plain.data, plain.dtype)
    if len(data) >= len(plain.data):
        return envelope
    rows = pb.Rows(pieces=envelope.rows.pieces, ended=envelope.rows.ended, times=envelope.rows.times)
    rows.hidden.CopyFrom(pb.Tensor(dtype=plain.dtype, shape=plain.shape, data=data, packing=PACKED))
    return pb.Envelope(job=envelope.job, attempt=envelope.attempt, sequence=envelope.sequence, rows=rows)


def unpacked(sender: str, envelope: pb.Envelope, limit: int) -> pb.Envelope:
    """Undoes `packed`, in place. Raises BadMessage naming the sender; nothing larger than `limit` bytes is made."""
    tensor = envelope.rows.hidden
    if tensor.packing != PACKED or tensor.dtype >= len(BITS):
        what = f"packing {tensor.packing} of dtype {tensor.dtype}"
        raise BadMessage(sender, f"rows: expected packing {PACKED} of a dtype below {len(BITS)}, came {what}")
    count = math.prod(tensor.shape)
    if count * np.dtype(BITS[tensor.dtype]).itemsize > limit:
        raise BadMessage(sender, f"rows: expected at most {limit} bytes unpacked, came shape {list(tensor.shape)[:8]}")
    try:
        tensor.data = unpack(tensor.data, count, tensor.dtype)
    except ValueError as error:
        raise BadMessage(sender, f"rows: {error}") from error
    tensor.packing = PLAIN
    return envelope


# ----------------------------------------------------------------------------------------------------------------- send


class Link:
    """To one successor. `send` returns once the message is queued; order is kept."""

    def __init__(
        self,
        peer: Peer,
        address: str,
        certificate: bytes,
        key: bytes,
        max_message_bytes: int,
        compress: bool = False,
    ) -> None:
        """address: host:port; certificate, key: our own, PEM; compress: rows, if the peer takes them so."""
        self.peer = peer
        self.address = address
        self.refusal: str | None = None  # why the peer dropped us for good
        self._limit = max_message_bytes
        self._compress = compress
        self._packing = False  # in this connection
        self._credentials = grpc.ssl_channel_credentials(peer.certificate, key, certificate)
        self._unacknowledged: deque[pb.Envelope] = deque()
        self._bytes = 0  # of them
        self._next = 0  # index within _unacknowledged of the next message to write
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task = asyncio.create_task(self._keep(), name=f"link to {peer.name}")

    async def send(self, envelope: pb.Envelope) -> None:
        """Queues one message; waits while the window is full of unacknowledged ones. Raises BadMessage if the peer
        refused us, ValueError if it is too large.
        """
        size = envelope.ByteSize()
        if size > self._limit:
            raise ValueError(f"a message of {size} bytes; the limit is {self._limit}")
        while self._full(size) and self.refusal is None:
            self._room.clear()
            await self._room.wait()
        if self.refusal is not None:
            raise BadMessage(self.peer.name, f"refused our messages: {self.refusal}")
        self._unacknowledged.append(envelope)
        self._bytes += size
        self._changed.set()

    def drop(self, job: bytes, attempt: int) -> None:
        """Forgets unsent and unacknowledged messages of attempts before `attempt`."""
        kept = deque(m for m in self._unacknowledged if m.job != job or m.attempt >= attempt)
        self._next = sum(1 for m in list(self._unacknowledged)[: self._next] if m.job != job or m.attempt >= attempt)
        self._unacknowledged = kept
        self._bytes = sum(message.ByteSize() for message in kept)
        self._room.set()

    def reset(self) -> None:
        """Lets a new attempt try again after a refusal."""
        self.refusal = None
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _full(self, size: int) -> bool:
        held = len(self._unacknowledged)
        return held >= WINDOW or (held > 0 and self._bytes + size > WINDOW_BYTES)

    async def _keep(self) -> None:
        pause = BACKOFF_SECONDS[0]
        options = [
            ("grpc.ssl_target_name_override", PEER_NAME),
            ("grpc.max_send_message_length", self._limit + SLACK_BYTES),
            # The ring's own beats tell that a neighbour is gone (worker/pulse.py); these, that a connection is, so that
            # another is made to a neighbour that is well.
            ("grpc.keepalive_time_ms", 5_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.max_pings_without_data", 0),  # a link may be idle for long, and should be known to live
        ]
        while True:
            while not self._unacknowledged or self.refusal is not None:
                self._changed.clear()
                await self._changed.wait()
            try:
                async with grpc.aio.secure_channel(self.address, self._credentials, options=options) as channel:
                    self._next = 0
                    self._packing = False
                    # wait_for_ready stays off: a refused handshake should show as an error, not as silence
                    call = ring_pb2_grpc.RingStub(channel).Flow(self._outgoing())
                    if self._compress:
                        self._packing = PACKING_TAKEN in tuple(await call.initial_metadata())
                    async for ack in call:
                        self._acknowledged(ack)
                        pause = BACKOFF_SECONDS[0]
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED):
                    self.refusal = error.details() or str(error.code())
                    self._room.set()
                    log.error("%s refused our messages: %s", self.peer.name, self.refusal)
                    continue
                log.warning("%s at %s: %s %s", self.peer.name, self.address, error.code().name, error.details())
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS[1])

    async def _outgoing(self) -> AsyncIterator[pb.Envelope]:
        while True:
            while self._next >= len(self._unacknowledged):
                self._changed.clear()
                await self._changed.wait()
            envelope = self._unacknowledged[self._next]
            self._next += 1
            if self._packing and envelope.WhichOneof("body") == "rows":
                envelope = await asyncio.to_thread(packed, envelope)
            yield envelope

    def _acknowledged(self, ack: pb.Ack) -> None:
        head = self._unacknowledged[0] if self._unacknowledged else None
        if (
            head is None
            or self._next == 0
            or (head.job, head.attempt, head.sequence) != (ack.job, ack.attempt, ack.sequence)
        ):
            return  # of a message that was dropped since
        self._bytes -= self._unacknowledged.popleft().ByteSize()
        self._next -= 1
        self._room.set()


# -------------------------------------------------------------------------------------------------------------- receive


class Ring(ring_pb2_grpc.RingServicer):
    """The receiving end for all predecessors of this worker. `handler` takes each message and raises BadMessage to drop
    its sender.
    """

    def __init__(self, certificate: bytes, key: bytes, handler: Handler, max_message_bytes: int) -> None:
        self._certificate = certificate
        self._key = key
        self._handler = handler
        self._limit = max_message_bytes
        self._peers: dict[bytes, Peer] = {}  # by fingerprint
        self._credentials_changed = False
        self._server: grpc.aio.Server | None = None

    def admit(self, peer: Peer) -> None:
        """From now on `peer` may connect."""
        mark = fingerprint(peer.certificate)
        self._peers.pop(mark, None)
        self._peers[mark] = peer
        self._credentials_changed = True

    async def start(self, address: str) -> int:
        """Listens on host:port (port 0: any); returns the port. Raises ConfigError if the address can't be had."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._limit + SLACK_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_recv_interval_without_data_ms", 2_500),  # half of what peers keep to
            ]
        )
        ring_pb2_grpc.add_RingServicer_to_server(self, self._server)
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._fetch, require_client_authentication=True
        )
        try:
            port: int = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"grpc: {address} cannot be listened on: is this worker running already?") from error
        await self._server.start()
        return port

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0.2)

    def _fetch(self) -> Any:
        """Asked at every handshake: None keeps the last answer."""
        if not self._credentials_changed:
            return None
        self._credentials_changed = False
        return self._configuration()

    def _configuration(self) -> Any:
        # Nobody may connect before the first peer is known; a root must be given all the same, so it is our own
        # certificate.
        # The latest comes first: where two certificates bear one subject, TLS looks only at the first of them.
        known = reversed(self._peers.values())
        roots = b"".join(peer.certificate for peer in known) or self._certificate
        return grpc.ssl_server_certificate_configuration([(self._key, self._certificate)], roots)

    async def Flow(self, request_iterator: AsyncIterator[pb.Envelope], context: Any) -> AsyncIterator[pb.Ack]:
        shown: Mapping[str, list[bytes]] = context.auth_context()
        peer = self._identify(shown)
        if peer is None:
            log.warning("%s: its certificate is not one of our predecessors'", context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this certificate is not one of our predecessors'")
            return
        try:
            await context.send_initial_metadata((PACKING_TAKEN,))
            async for envelope in request_iterator:
                if envelope.ByteSize() > self._limit:
                    raise BadMessage(peer.name, f"expected at most {self._limit} bytes, came {envelope.ByteSize()}")
                if len(envelope.job) != 32 or envelope.attempt == 0 or envelope.WhichOneof("body") is None:
                    raise BadMessage(peer.name, "expected a job of 32 bytes, an attempt from 1 and a body")
                if envelope.WhichOneof("body") == "rows" and envelope.rows.hidden.packing != PLAIN:
                    envelope = await asyncio.to_thread(unpacked, peer.name, envelope, self._limit)
                await self._handler(peer, envelope)
                yield pb.Ack(job=envelope.job, attempt=envelope.attempt, sequence=envelope.sequence)
        except BadMessage as error:
            log.error("dropped %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.what[:500])

    def _identify(self, shown: Mapping[str, list[bytes]]) -> Peer | None:
        pems = shown.get("x509_pem_cert", [])
        try:
            return self._peers.get(fingerprint(pems[0])) if len(pems) == 1 else None
        except ValueError:
            return None
