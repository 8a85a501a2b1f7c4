"""What a stage takes of its predecessor, whatever becomes of the connection that brings it."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from contracts.client import Status
from tests.worker.bad_wire import Relay
from tests.worker.pipeline_in_process import JOB, Tiny, split, wire, within
from tests.worker.test_channel import Party, until
from tests.worker.test_consent import STAGES, WORK, Town
from verifier.commit import Request
from worker import early, grpc_channel, inbox, ring_pb2_grpc
from worker import ring_pb2 as pb
from worker.channel import Peer
from worker.config import Serving
from worker.early import Early
from worker.engagement import Engagement
from worker.envelope import HEAD_BYTES, held_bytes
from worker.errors import BadMessage
from worker.grpc_channel import Link, Ring
from worker.inbox import Inbox
from worker.job import JobState, Phase
from worker.run import Run
from worker.tls import PEER_NAME

LIMIT = 2**20
PROMPT = 40
REQUESTS = [Request(tuple(range(1, PROMPT + 1)), 4)]
SERVING = Serving(max_rows=16, silence_seconds=60.0)
STRANGER = Peer("stage 0", "stage 0", b"")


def row(position: int, attempt: int = 1) -> pb.Envelope:
    hidden = pb.Tensor(dtype=2, shape=[1, 64], data=bytes(256))
    rows = pb.Rows(pieces=[pb.Piece(request=0, first=position, count=1)], hidden=hidden)
    return pb.Envelope(job=JOB, attempt=attempt, sequence=position, rows=rows)


class Second:
    """The second of two stages; nothing is computed before `go`. What it sends goes nowhere but to `told`."""

    def __init__(self, folder: Path, model: Path, compute: ThreadPoolExecutor) -> None:
        self.run: Run = wire(folder, split(model, 3, 2), REQUESTS, SERVING, compute)[1]
        self.told: list[pb.Envelope] = []
        self.go = threading.Event()
        compute.submit(self.go.wait)
        link: Any = self.run._successor
        link.target = SimpleNamespace(receive=self._receive)

    async def _receive(self, peer: Peer, envelope: pb.Envelope) -> None:
        if envelope.WhichOneof("body") != "beat":
            self.told.append(envelope)

    async def close(self) -> None:
        self.go.set()
        await self.run.close("the test is over")


@pytest.fixture
def second(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Second]:
    """With room for two messages."""
    monkeypatch.setattr(inbox, "MOST", 2)
    with ThreadPoolExecutor(1) as compute:
        made: list[Second] = []

        async def make() -> None:
            made.append(Second(tmp_path, tiny[0], compute))

        loop = asyncio.new_event_loop()
        loop.run_until_complete(make())
        yield made[0]
        loop.run_until_complete(made[0].close())
        loop.close()


def play(second: Second, story: Any) -> None:
    second.run.finished.get_loop().run_until_complete(within(120, story))


def test_what_waits_for_room_when_its_connection_is_lost_comes_again(second: Second, tmp_path: Path) -> None:
    """Over the real wire: a message taken for one that is here would be a gap in the rows."""
    sender, receiver = Party(tmp_path, "sender"), Party(tmp_path, "receiver")

    async def story() -> None:
        taken = Early(lambda: second.run, 60.0)
        waiting: set[int] = set()

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            waiting.add(envelope.sequence)
            try:
                await taken.receive(peer, envelope)
            finally:
                waiting.discard(envelope.sequence)

        ring = Ring(receiver.certificate, receiver.key, handler, LIMIT)
        ring.admit(sender.peer)
        relay = Relay(await ring.start("127.0.0.1:0"))
        link = Link(receiver.peer, f"127.0.0.1:{await relay.start()}", sender.certificate, sender.key, LIMIT)
        for position in range(PROMPT):
            await link.send(row(position))
        await until(lambda: second.run._inbox.full() and len(waiting) == 1)
        (last,) = waiting
        for _ in range(3):
            relay.cut()
            await until(lambda: not waiting)
            await until(lambda: waiting == {last})  # the same again, by another connection
        second.go.set()
        await until(lambda: any(message.tokens.tokens for message in second.told))
        assert second.run._positions == [PROMPT] and len(second.told) == PROMPT
        await link.close()
        await relay.stop()
        await ring.stop()

    play(second, story())


def test_what_came_early_is_not_lost_with_the_connection_that_brought_the_next(second: Second) -> None:
    """It was acknowledged: nobody sends it again."""

    async def story() -> None:
        serving: list[Run] = []
        taken = Early(lambda: serving[0] if serving else None, 60.0)
        for position in range(8):
            await taken.receive(STRANGER, row(position))
        serving.append(second.run)
        for _ in range(3):
            bringing = asyncio.create_task(taken.receive(STRANGER, row(8)))
            await asyncio.sleep(0.2)
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)
        assert len(taken._kept) < 8  # what was never acknowledged is not kept besides
        second.go.set()
        for position in range(8, PROMPT):
            await taken.receive(STRANGER, row(position))
        await until(lambda: second.run._positions == [PROMPT])

    play(second, story())


def test_what_waits_for_room_in_a_job_that_is_given_up_waits_no_more(second: Second) -> None:
    """Where the job goes on with another pipeline, the same neighbour's messages come behind it."""

    async def story() -> None:
        taken = Early(lambda: second.run, 60.0)

        async def bring() -> None:
            for position in range(PROMPT):
                await taken.receive(STRANGER, row(position))

        bringing = asyncio.create_task(bring())
        await until(lambda: second.run._pulse._waiting == 1)
        await second.run.close("the job goes on with another pipeline")
        await within(20, bringing)

    play(second, story())


def test_a_stage_that_restarted_is_heard_though_it_counts_anew(second: Second) -> None:
    async def story() -> None:
        second.go.set()
        for position in range(3):
            await second.run.receive(STRANGER, row(position))
        abort = pb.Abort(reason="this stage restarted in the middle of an attempt")
        await second.run.receive(STRANGER, pb.Envelope(job=JOB, attempt=1, abort=abort))
        await until(lambda: any(message.WhichOneof("body") == "abort" for message in second.told), 20)
        assert second.told[-1].abort.reason == f"an earlier stage gave up: {abort.reason}"

    play(second, story())


def test_an_inbox_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        size = held_bytes(row(0))
        monkeypatch.setattr(inbox, "MOST_BYTES", 2 * size)
        box = Inbox()
        filling = asyncio.create_task(_fill(box, 5))
        await asyncio.sleep(0.05)
        assert not filling.done() and box.qsize() == 2 and box.full()
        for _ in range(5):
            await within(5, box.get())
        await within(5, filling)
        assert box.empty() and not box.full()

    asyncio.run(story())


def test_an_inbox_counts_what_a_message_becomes() -> None:
    """A thousand messages of empty pieces are few bytes, and a hundred times as much in memory."""

    async def story() -> None:
        box = Inbox()
        pieces = pb.Envelope(rows=pb.Rows(pieces=[pb.Piece()] * (HEAD_BYTES // 2 - 100)))
        for _ in range(9):
            assert not box.full()
            await box.put(pieces)
        assert box.full()

    asyncio.run(story())


def test_a_message_of_parts_without_end_drops_its_sender_by_name(tmp_path: Path) -> None:
    sender, receiver = Party(tmp_path, "sender"), Party(tmp_path, "receiver")

    async def story() -> None:
        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            raise AssertionError("nothing is heard of it")

        ring = Ring(receiver.certificate, receiver.key, handler, 16 * LIMIT)
        ring.admit(sender.peer)
        port = await ring.start("127.0.0.1:0")
        link = Link(receiver.peer, f"127.0.0.1:{port}", sender.certificate, sender.key, 16 * LIMIT)
        pieces = pb.Envelope(job=JOB, attempt=1, rows=pb.Rows(pieces=[pb.Piece()] * HEAD_BYTES))
        with pytest.raises(ValueError, match=f"bytes beside its rows; the limit is {HEAD_BYTES}"):
            await link.send(pieces)
        link._unacknowledged.append((pieces, 0))
        link._changed.set()
        await until(lambda: link.refusal is not None)
        assert link.refusal == f"expected at most {HEAD_BYTES} bytes beside the rows, came more"
        await link.close()
        await ring.stop()

    asyncio.run(within(60, story()))


async def _fill(box: Inbox, count: int) -> None:
    for _ in range(count):
        await box.put(row(0))


def test_early_messages_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "MOST_BYTES", 3 * held_bytes(row(0)))

    async def story() -> None:
        taken = Early(lambda: None, 0.4)
        with pytest.raises(BadMessage, match=r"^stage 0: [34] messages came, but we are not serving the job"):
            for position in range(5):
                await taken.receive(STRANGER, row(position))

    asyncio.run(within(30, story()))


def test_nothing_is_kept_of_a_job_that_was_not_accepted(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path, "b")
        stage = Engagement(town, JOB, WORK, STAGES, 1)
        with pytest.raises(BadMessage, match="a job that we have not accepted"):
            await stage.receive(STRANGER, row(0))
        stage.state = replace(stage.state, phase=Phase.SIGNED)  # the chain may know more than we
        await stage.receive(STRANGER, row(0))
        stage.state, stage.status = JobState(Phase.OPEN, 1, 3), Status.ACCEPTED  # brought in by a move
        await stage.receive(STRANGER, row(1))
        assert len(stage._early._kept) == 2

    asyncio.run(within(30, story()))


def test_a_peer_holds_no_more_than_a_few_streams(tmp_path: Path) -> None:
    """Each could hold a message, and a peer can open as many as it likes."""
    sender, receiver = Party(tmp_path, "sender"), Party(tmp_path, "receiver")

    async def story() -> None:
        held: set[int] = set()
        open_ = asyncio.Event()

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            held.add(envelope.sequence)
            try:
                await open_.wait()
            finally:
                held.discard(envelope.sequence)

        ring = Ring(receiver.certificate, receiver.key, handler, LIMIT)
        ring.admit(sender.peer)
        port = await ring.start("127.0.0.1:0")
        credentials = grpc.ssl_channel_credentials(receiver.certificate, sender.key, sender.certificate)
        options = [("grpc.ssl_target_name_override", PEER_NAME)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            calls = []
            for sequence in range(12):
                call = ring_pb2_grpc.RingStub(channel).Flow()
                await call.write(row(sequence))
                await until(lambda sequence=sequence: sequence in held)  # type: ignore[misc]
                calls.append(call)
            await until(lambda: held == set(range(12 - grpc_channel.STREAMS, 12)))
            open_.set()
            assert (await calls[-1].read()).sequence == 11
        await ring.stop()

    asyncio.run(within(60, story()))
