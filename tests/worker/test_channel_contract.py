"""What worker.channel promises, of gRPC's Channel and of another one: whoever keeps it may take the wire's place."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.client import Status
from deploy.devnet import Devnet
from tests.worker.memory_channel import MemoryChannel
from tests.worker.pipeline_in_process import Greedy, Tiny, within
from tests.worker.test_channel import Party, until
from tests.worker.village import Village
from verifier.commit import Request, make_outputs, outputs_root
from worker import ring_pb2 as pb
from worker.agent import MakeChannel, build_worker
from worker.channel import Channel, Peer
from worker.errors import BadMessage, ConfigError
from worker.grpc_channel import GrpcChannel

JOB, OTHER = bytes(32), bytes([1] * 32)
LIMIT = 2**20

KINDS = pytest.mark.parametrize("kind", [GrpcChannel, MemoryChannel])


def message(sequence: int, job: bytes = JOB, attempt: int = 1, text: str = "") -> pb.Envelope:
    return pb.Envelope(job=job, attempt=attempt, sequence=sequence, abort=pb.Abort(reason=text))


class Street:
    """A sender and a receiver; `got` is what the receiver took."""

    def __init__(self, kind: MakeChannel, folder: Path) -> None:
        self.sender, self.receiver = Party(folder, "sender"), Party(folder, "receiver")
        self.got: list[pb.Envelope] = []
        self.open = asyncio.Event()
        self.open.set()
        self.bad: set[bytes] = set()
        self.stuck: set[bytes] = set()
        self.waiting, self.loose = asyncio.Event(), asyncio.Event()
        self.here: Channel = kind(self.sender.certificate, self.sender.key, self._handle, LIMIT, False)
        self.kind = kind
        self.there: Channel = self.another()

    def another(self) -> Channel:
        return self.kind(self.receiver.certificate, self.receiver.key, self._handle, LIMIT, False)

    async def _handle(self, peer: Peer, envelope: pb.Envelope) -> None:
        assert peer == self.sender.peer
        await self.open.wait()
        if envelope.job in self.stuck:
            self.waiting.set()
            await self.loose.wait()
        if envelope.job in self.bad and envelope.attempt == 1:
            raise BadMessage(peer.name, "no")
        self.got.append(envelope)

    @property
    def sequences(self) -> list[int]:
        return [envelope.sequence for envelope in self.got]


def play(kind: MakeChannel, folder: Path, act: Callable[[Street], Awaitable[None]]) -> None:
    async def story() -> None:
        street = Street(kind, folder)
        try:
            await act(street)
        finally:
            street.open.set()
            street.loose.set()
            await street.here.close()
            await street.there.close()

    asyncio.run(within(120, story()))


@KINDS
def test_messages_arrive_in_order_each_once(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        port = await street.there.start("127.0.0.1:0")
        street.there.admit(street.sender.peer)
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        assert street.here.to(street.receiver.peer, f"127.0.0.1:{port}") is link
        sent = [message(i, OTHER if i % 3 else JOB, text="x" * i) for i in range(2000)]
        for envelope in sent:
            await link.send(envelope)
        await until(lambda: len(street.got) == len(sent))
        for job in (JOB, OTHER):  # of two jobs, each in its own order
            assert [m for m in street.got if m.job == job] == [m for m in sent if m.job == job]

    play(kind, tmp_path, act)


@KINDS
def test_a_receiver_that_takes_nothing_makes_the_sender_wait(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        port = await street.there.start("127.0.0.1:0")
        street.there.admit(street.sender.peer)
        street.open.clear()
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        sent = 0

        async def send() -> None:
            nonlocal sent
            for i in range(3000):
                await link.send(message(i))
                sent = i + 1

        sending = asyncio.create_task(send())
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert 0 < sent < 2000 and not sending.done()
        street.open.set()
        await sending
        await until(lambda: len(street.got) == 3000)
        assert street.sequences == list(range(3000))

    play(kind, tmp_path, act)


@KINDS
def test_a_job_that_is_stuck_keeps_no_other_waiting(kind: MakeChannel, tmp_path: Path) -> None:
    """Its sender waits, as full as its window is; what is sent of another arrives and is acknowledged."""

    async def act(street: Street) -> None:
        port = await street.there.start("127.0.0.1:0")
        street.there.admit(street.sender.peer)
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        street.stuck.add(JOB)

        async def send() -> None:
            for i in range(1500):
                await link.send(message(i))

        sending = asyncio.create_task(send())
        await street.waiting.wait()
        for i in range(3000):
            await link.send(message(i, OTHER))
        await until(lambda: len(street.got) == 3000)
        assert street.sequences == list(range(3000)) and not sending.done()
        street.loose.set()
        await sending
        await until(lambda: len(street.got) == 4500)
        assert [m.sequence for m in street.got if m.job == JOB] == list(range(1500))

    play(kind, tmp_path, act)


@KINDS
def test_what_is_refused_ends_its_jobs_attempt_and_nothing_else(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        street.bad.add(JOB)
        port = await street.there.start("127.0.0.1:0")
        street.there.admit(street.sender.peer)
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        for i in range(50):
            await link.send(message(i, OTHER))
            try:
                await link.send(message(i, JOB))
            except BadMessage as error:
                assert str(error) == "receiver: refused our messages: no"
        await until(lambda: len(street.got) == 50)
        assert street.sequences == list(range(50)) and {m.job for m in street.got} == {OTHER}
        with pytest.raises(BadMessage, match="receiver: refused our messages: no"):
            await link.send(message(99, JOB))
        link.drop(JOB, 2)
        await link.send(message(0, JOB, attempt=2))
        await until(lambda: len(street.got) == 51)
        assert street.got[-1] == message(0, JOB, attempt=2)

    play(kind, tmp_path, act)


@KINDS
def test_whoever_waits_for_room_hears_of_the_refusal(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        street.bad.add(JOB)
        street.open.clear()
        port = await street.there.start("127.0.0.1:0")
        street.there.admit(street.sender.peer)
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")

        async def send() -> None:
            for i in range(5000):
                await link.send(message(i))

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.5)
        street.open.set()
        with pytest.raises(BadMessage, match="receiver: refused our messages: no"):
            await sending

    play(kind, tmp_path, act)


@KINDS
def test_only_who_is_admitted_is_heard_and_only_by_whom_it_means(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        port = await street.there.start("127.0.0.1:0")
        stranger = Party(tmp_path, "stranger")
        astray = street.here.to(stranger.peer, f"127.0.0.1:{port}")
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        await astray.send(message(7))
        await link.send(message(0))
        await asyncio.sleep(0.5)
        assert street.got == []
        street.there.admit(street.sender.peer)
        await until(lambda: bool(street.got))
        await asyncio.sleep(0.2)
        assert street.sequences == [0]

    play(kind, tmp_path, act)


@KINDS
def test_what_is_dropped_is_not_sent_and_the_rest_is_once_somebody_listens(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        first = street.another()
        port = await first.start("127.0.0.1:0")
        first.admit(street.sender.peer)
        link = street.here.to(street.receiver.peer, f"127.0.0.1:{port}")
        await link.send(message(0))
        await until(lambda: street.sequences == [0])
        await first.close()
        for i in range(1, 4):
            await link.send(message(i))
            await link.send(message(10 + i, OTHER))
        link.drop(JOB, 2)
        await link.send(message(20, JOB, attempt=2))
        await street.there.start(f"127.0.0.1:{port}")
        street.there.admit(street.sender.peer)
        await until(lambda: len(street.got) >= 5)
        assert sorted(street.sequences) == [0, 11, 12, 13, 20]
        assert [m.sequence for m in street.got if m.job == OTHER] == [11, 12, 13]

    play(kind, tmp_path, act)


@KINDS
def test_who_has_moved_is_reached_where_it_is_now_and_nowhere_else(kind: MakeChannel, tmp_path: Path) -> None:
    """Jobs that were under way find it too; what is still looked for at the old place would be so for ever."""

    async def act(street: Street) -> None:
        address = f"127.0.0.1:{await street.there.start('127.0.0.1:0')}"
        street.there.admit(street.sender.peer)
        peer = street.receiver.peer
        link = street.here.to(replace(peer, certificate=Party(tmp_path, "former").certificate), "127.0.0.1:1")
        for i in range(3):
            await link.send(message(i))
        former = street.here.to(peer, "127.0.0.1:1")
        await former.send(message(3))
        moved = street.here.to(peer, address)
        await moved.send(message(4))
        await until(lambda: len(street.got) == 5)
        assert street.sequences == list(range(5)) and link is former is moved
        copier = street.here.to(replace(peer, account="copier"), "127.0.0.1:1")  # of a certificate that is public
        assert copier is not link
        await link.send(message(5))
        await until(lambda: street.sequences[-1] == 5)

    play(kind, tmp_path, act)


@KINDS
def test_messages_and_addresses_that_can_not_be(kind: MakeChannel, tmp_path: Path) -> None:
    async def act(street: Street) -> None:
        address = f"127.0.0.1:{await street.there.start('127.0.0.1:0')}"
        with pytest.raises(ConfigError, match=f"grpc: {address} cannot be listened on"):
            await street.another().start(address)
        link = street.here.to(street.receiver.peer, address)
        with pytest.raises(ValueError, match=f"the limit is {LIMIT}"):
            await link.send(message(0, text="x" * LIMIT))

    play(kind, tmp_path, act)


@pytest.fixture
def village(tiny: Tiny, tmp_path: Path) -> Iterator[Village]:
    folder, _ = tiny
    with Devnet() as devnet:
        build = lambda index, config: build_worker(config, channel_class=MemoryChannel)  # noqa: E731
        made = Village(devnet, tmp_path, folder, build=build)
        made.settle_in()
        yield made


def test_workers_serve_over_another_channel(village: Village, tiny: Tiny, greedy: Greedy) -> None:
    _, model = tiny
    requests = [Request((5, 6, 7), 6), Request((9,), 4)]
    expected = [greedy(model, request) for request in requests]

    async def story() -> None:
        await village.wake()
        id = await village.open(requests)
        await village.reaches(id, Status.COMMITTED)
        assert village.requester.escrow.outputs(id)[0] == outputs_root(make_outputs(expected, requests))
        await village.sleep()

    asyncio.run(within(900, story()))
