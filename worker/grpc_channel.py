"""The Channel over gRPC: streams over mutual TLS, each side's certificate pinned to its fingerprint on chain.

A Link carries a stage's messages to its successor, a Ring receives from the predecessors. A message that is refused is
answered with the reason, and ends its job's attempt; other jobs over the same stream go on.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import grpc

from worker import ring_pb2 as pb
from worker import ring_pb2_grpc
from worker.channel import Handler, Peer, packed, unpacked
from worker.envelope import HEAD_BYTES, head_bytes, held_bytes, read
from worker.errors import BadMessage, ConfigError
from worker.lanes import Lanes, Windows
from worker.packing import PACKED, PLAIN
from worker.tls import PEER_NAME, fingerprint

log = logging.getLogger("plumb.worker.grpc_channel")

# gRPC itself drops a stream without naming anyone; with room above our own bound, most oversized messages are refused
# by us, by name.
SLACK_BYTES = 2**20

SERVICE = pb.DESCRIPTOR.services_by_name["Ring"].full_name

# Told by a receiver at the start of a stream: that it takes packed rows.
PACKING_TAKEN = ("plumb-packing", str(PACKED))

# Of one peer: the one it uses, and those of lost connections that nobody has noticed yet. Each may hold a message.
STREAMS = 4

BACKOFF_SECONDS = (0.05, 2.0)  # first and longest pause between connections
IDLE_SECONDS = 30.0  # the same where nothing waits to be sent

# The ring's own beats tell that a neighbour is gone (worker/pulse.py); these, that a connection is, so that another is
# made to a neighbour that is well. Sent only while nothing comes: a slow link that carries a large message is not idle,
# for its receiver tells of the room it has.
KEEPALIVE_SECONDS = 5.0
# A ping waits behind what was sent before it. So what may be on its way is bounded: fixed, as gRPC's own estimate grows
# with every buffer between. Links of 2 Mbit/s answer in time; over one 256 ms away 30 Mbit/s go at most.
IN_FLIGHT_BYTES = 2 * 2**20
KEEPALIVE_PATIENCE_SECONDS = 10.0


class GrpcChannel:
    """See worker.channel.Channel."""

    def __init__(
        self, certificate: bytes, key: bytes, handler: Handler, max_message_bytes: int, compress: bool = False
    ) -> None:
        """certificate, key: our own, PEM; compress: rows, to peers that take them so."""
        self._own = (certificate, key)
        self._limit = max_message_bytes
        self._compress = compress
        self._ring = Ring(certificate, key, handler, max_message_bytes)
        # SAFETY: by account, not by certificate: who registers another's moves no link but its own.
        self._links: dict[str, Link] = {}

    async def start(self, address: str) -> int:
        return await self._ring.start(address)

    def admit(self, peer: Peer) -> None:
        self._ring.admit(peer)

    def to(self, peer: Peer, address: str) -> "Link":
        link = self._links.get(peer.account)
        if link is None:
            link = self._links[peer.account] = Link(peer, address, *self._own, self._limit, self._compress)
        elif (link.peer.certificate, link.address) != (peer.certificate, address):
            link.move(peer, address)
        return link

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()
        await self._ring.stop()


# ----------------------------------------------------------------------------------------------------------------- send


class Link:
    """To one successor."""

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
        self._own = (certificate, key)
        self._place(peer, address)
        self.refusal: str | None = None  # why the peer dropped us, with all jobs, until a new attempt of any
        self._refused: dict[bytes, tuple[int, str]] = {}  # job -> attempt, why
        self._limit = max_message_bytes
        self._compress = compress
        self._packing = False  # in this connection
        self._greeted = False  # in this connection: the peer knows us
        self._unacknowledged: deque[tuple[pb.Envelope, int]] = deque()  # with the bytes that each holds
        self._windows = Windows()  # of them
        self._next = 0  # index within _unacknowledged of the next message to write
        self._connection = 0  # counts them: what is left of an earlier one takes no message of this one's
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task = asyncio.create_task(self._keep(), name=f"link to {peer.name}")

    def move(self, peer: Peer, address: str) -> None:
        """The peer is at another address, or has another certificate: all that it has not acknowledged goes there."""
        log.info("%s is at %s now, and no more at %s", peer.name, address, self.address)
        self._place(peer, address)
        self.refusal = None
        self._task.cancel()
        self._task = asyncio.create_task(self._keep(self._task), name=f"link to {peer.name}")

    def _place(self, peer: Peer, address: str) -> None:
        certificate, key = self._own
        self.peer = peer
        self.address = address
        self._credentials = grpc.ssl_channel_credentials(peer.certificate, key, certificate)

    async def send(self, envelope: pb.Envelope) -> None:
        head = head_bytes(envelope)
        if (size := head + len(envelope.rows.hidden.data)) > self._limit:
            raise ValueError(f"a message of {size} bytes; the limit is {self._limit}")
        if head > HEAD_BYTES:
            raise ValueError(f"a message of {head} bytes beside its rows; the limit is {HEAD_BYTES}")
        held = held_bytes(envelope)
        while self._windows.full(envelope.job, held) and self._why(envelope) is None:
            self._room.clear()
            await self._room.wait()
        if (why := self._why(envelope)) is not None:
            raise BadMessage(self.peer.name, f"refused our messages: {why}")
        self._unacknowledged.append((envelope, held))
        self._windows.add(envelope.job, held)
        self._changed.set()

    def drop(self, job: bytes, attempt: int) -> None:
        self._forget(job, attempt)
        if job in self._refused and self._refused[job][0] < attempt:
            del self._refused[job]
        self.refusal = None
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _why(self, envelope: pb.Envelope) -> str | None:
        attempt, why = self._refused.get(envelope.job, (0, ""))
        return why if envelope.attempt <= attempt else self.refusal

    def _refuse(self, envelope: pb.Envelope | pb.Ack, why: str) -> None:
        """The peer takes nothing more of this attempt."""
        log.error("%s refused our messages of job %s: %s", self.peer.name, envelope.job.hex()[:8], why)
        self._refused[envelope.job] = (envelope.attempt, why)
        self._forget(envelope.job, envelope.attempt + 1)

    def _forget(self, job: bytes, attempt: int) -> None:
        """Unsent and unacknowledged messages of attempts before `attempt`."""
        stays = [m.job != job or m.attempt >= attempt for m, _ in self._unacknowledged]
        self._next = sum(stays[: self._next])
        self._unacknowledged = deque(each for each, stay in zip(self._unacknowledged, stays, strict=True) if stay)
        self._windows = Windows((m.job, held) for m, held in self._unacknowledged)
        self._room.set()

    async def _keep(self, former: asyncio.Task[None] | None = None) -> None:
        """Connected from the first moment on, so that no message waits for a handshake. former: ends first."""
        if former is not None:
            await asyncio.gather(former, return_exceptions=True)
        pause = BACKOFF_SECONDS[0]
        options = [
            ("grpc.ssl_target_name_override", PEER_NAME),
            ("grpc.max_send_message_length", self._limit + SLACK_BYTES),
            ("grpc.keepalive_time_ms", int(1e3 * KEEPALIVE_SECONDS)),
            ("grpc.keepalive_timeout_ms", int(1e3 * KEEPALIVE_PATIENCE_SECONDS)),
            ("grpc.http2.ping_timeout_ms", int(1e3 * KEEPALIVE_PATIENCE_SECONDS)),  # else a minute, and that counts
            ("grpc.http2.max_pings_without_data", 0),  # a link may be idle for long, and should be known to live
        ]
        while True:
            while self.refusal is not None:
                self._changed.clear()
                await self._changed.wait()
            try:
                async with grpc.aio.secure_channel(self.address, self._credentials, options=options) as channel:
                    self._next = 0
                    self._packing = self._greeted = False
                    # wait_for_ready stays off: a refused handshake should show as an error, not as silence
                    call = ring_pb2_grpc.RingStub(channel).Flow(self._outgoing(self._connection))
                    told = tuple(await call.initial_metadata())  # none where there is no connection
                    self._greeted = bool(told)
                    self._packing = self._compress and PACKING_TAKEN in told
                    async for ack in call:
                        self._acknowledged(ack)
                        pause = BACKOFF_SECONDS[0]
            except grpc.aio.AioRpcError as error:
                self._failed(error)
            finally:
                self._connection += 1
                self._changed.set()
            pause = await self._rest(pause)

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        match error.code():
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.PERMISSION_DENIED:
                self.refusal = error.details() or str(error.code())
                self._room.set()
                log.error("%s refused our messages: %s", self.peer.name, self.refusal)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if self._next:
                # By gRPC, which doesn't tell which message was too large for the peer: the largest was.
                largest, _ = max(islice(self._unacknowledged, self._next), key=lambda each: each[0].ByteSize())
                self._refuse(largest, error.details() or str(error.code()))
            case code:
                level = logging.WARNING if self._unacknowledged else logging.INFO
                # TLS tells the reason to nobody but the log of the side that refused the other.
                why = "" if self._greeted else " (nobody is there, or one of us shows a certificate not pinned)"
                log.log(level, "%s at %s: %s %s%s", self.peer.name, self.address, code.name, error.details(), why)

    async def _rest(self, pause: float) -> float:
        """Before the next connection. The pause after that."""
        if self._unacknowledged:
            await asyncio.sleep(pause)
            return min(2 * pause, BACKOFF_SECONDS[1])
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                await self._changed.wait()
        return BACKOFF_SECONDS[0]

    async def _outgoing(self, connection: int) -> AsyncIterator[pb.Envelope]:
        while connection == self._connection:
            if self._next >= len(self._unacknowledged):
                self._changed.clear()
                await self._changed.wait()
                continue
            envelope, _ = self._unacknowledged[self._next]
            self._next += 1
            if self._packing and envelope.WhichOneof("body") == "rows":
                envelope = await asyncio.to_thread(packed, envelope)
            yield envelope

    def _acknowledged(self, ack: pb.Ack) -> None:
        told = (ack.job, ack.attempt, ack.sequence)
        written = enumerate(islice(self._unacknowledged, self._next))
        found = ((place, held) for place, (m, held) in written if (m.job, m.attempt, m.sequence) == told)
        place, held = next(found, (None, 0))
        if place is None:
            return  # it was dropped since
        if ack.refusal:
            self._refuse(ack, ack.refusal[:500])  # as long as an honest peer's
            return
        del self._unacknowledged[place]
        self._next -= 1
        self._windows.remove(ack.job, held)
        self._room.set()


# -------------------------------------------------------------------------------------------------------------- receive


class Ring:
    """The receiving end for all predecessors of this worker."""

    def __init__(self, certificate: bytes, key: bytes, handler: Handler, max_message_bytes: int) -> None:
        self._certificate = certificate
        self._key = key
        self._handler = handler
        self._limit = max_message_bytes
        self._peers: dict[bytes, Peer] = {}  # by fingerprint
        self._streams: dict[bytes, deque[asyncio.Task[None] | None]] = {}  # by fingerprint, the oldest first
        self._credentials_changed = False
        self._server: grpc.aio.Server | None = None

    def admit(self, peer: Peer) -> None:
        mark = fingerprint(peer.certificate)
        self._peers.pop(mark, None)
        self._peers[mark] = peer
        self._credentials_changed = True

    async def start(self, address: str) -> int:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._limit + SLACK_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", IN_FLIGHT_BYTES),
                # Half of what peers keep to.
                ("grpc.http2.min_ping_interval_without_data_ms", int(500 * KEEPALIVE_SECONDS)),
            ]
        )
        # SAFETY: without a deserializer: messages are looked through before they are made.
        flow = grpc.stream_stream_rpc_method_handler(self.Flow, response_serializer=pb.Ack.SerializeToString)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Flow": flow}),))
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

    async def Flow(self, request_iterator: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.Ack]:
        shown: Mapping[str, list[bytes]] = context.auth_context()
        peer = self._identify(shown)
        if peer is None:
            log.warning("%s: its certificate is not one of our predecessors'", context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this certificate is not one of our predecessors'")
            return
        task, streams = asyncio.current_task(), self._streams.setdefault(fingerprint(peer.certificate), deque())
        streams.append(task)
        if len(streams) > STREAMS and (oldest := streams.popleft()) is not None:
            oldest.cancel()
        lanes = Lanes(partial(self._take, peer))
        reading = asyncio.create_task(self._read(peer, request_iterator, lanes))
        try:
            await context.send_initial_metadata((PACKING_TAKEN,))
            while (ack := await lanes.next_ack()) is not None:
                yield ack
        except BadMessage as error:
            log.error("dropped %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.what[:500])
        finally:
            reading.cancel()
            await asyncio.gather(reading, lanes.close(), return_exceptions=True)
            with suppress(ValueError):
                streams.remove(task)

    async def _read(self, peer: Peer, messages: AsyncIterator[bytes], lanes: Lanes) -> None:
        try:
            async for data in messages:
                envelope = read(peer.name, data)
                if len(envelope.job) != 32 or envelope.attempt == 0 or envelope.WhichOneof("body") is None:
                    raise BadMessage(peer.name, "expected a job of 32 bytes, an attempt from 1 and a body")
                await lanes.put(envelope, len(data))
            await lanes.end()
        except (Exception, asyncio.CancelledError) as error:
            lanes.fail(error)

    async def _take(self, peer: Peer, envelope: pb.Envelope, size: int) -> pb.Ack:
        ack = pb.Ack(job=envelope.job, attempt=envelope.attempt, sequence=envelope.sequence)
        try:
            if size > self._limit:
                raise BadMessage(peer.name, f"expected at most {self._limit} bytes, came {size}")
            if envelope.WhichOneof("body") == "rows" and envelope.rows.hidden.packing != PLAIN:
                envelope = await asyncio.to_thread(unpacked, peer.name, envelope, self._limit)
            await self._handler(peer, envelope)
        except BadMessage as error:
            log.error("refused %s", error)
            ack.refusal = error.what[:500]
        return ack

    def _identify(self, shown: Mapping[str, list[bytes]]) -> Peer | None:
        pems = shown.get("x509_pem_cert", [])
        try:
            return self._peers.get(fingerprint(pems[0])) if len(pems) == 1 else None
        except ValueError:
            return None
