"""Link and Ring over a wire that is slow, is cut, or lets connections vanish: nothing is lost, nothing counts twice."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.worker.bad_wire import Relay
from tests.worker.pipeline_in_process import JOB, Greedy, Stamp, Tiny, split, within
from tests.worker.test_channel import Party, until
from verifier.commit import Request
from worker import grpc_channel
from worker import ring_pb2 as pb
from worker.channel import Peer
from worker.config import Serving
from worker.grpc_channel import Link, Ring
from worker.job import JobFolder, JobState, Phase
from worker.run import Run

LIMIT = 16 * 2**20

Act = Callable[[Link, Relay, list[pb.Envelope]], Awaitable[None]]


def over(folder: Path, act: Act, **relay_settings: float) -> None:
    """Runs `act` between a link and a ring with a relay in between."""
    sender, receiver = Party(folder, "sender"), Party(folder, "receiver")

    async def story() -> None:
        got: list[pb.Envelope] = []

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            got.append(envelope)

        ring = Ring(receiver.certificate, receiver.key, handler, LIMIT)
        ring.admit(sender.peer)
        relay = Relay(await ring.start("127.0.0.1:0"), **relay_settings)
        port = await relay.start()
        link = Link(receiver.peer, f"127.0.0.1:{port}", sender.certificate, sender.key, LIMIT)
        try:
            await act(link, relay, got)
        finally:
            await link.close()
            await relay.stop()
            await ring.stop()

    asyncio.run(within(300, story()))


def message(sequence: int, size: int = 0) -> pb.Envelope:
    rows = pb.Rows(hidden=pb.Tensor(data=bytes(size)))
    return pb.Envelope(job=JOB, attempt=1, sequence=sequence, rows=rows)


def first_times(got: list[pb.Envelope]) -> list[int]:
    """Sequences, as a receiver counts them that passes over what it has."""
    taken: list[int] = []
    for envelope in got:
        assert envelope.sequence <= len(taken), "a message is missing"
        if envelope.sequence == len(taken):
            taken.append(envelope.sequence)
    return taken


def test_a_large_message_over_a_slow_link_keeps_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes many times as long as a connection may be silent, half a second away: that is not silence. Nor does what
    is on its way keep a ping waiting until nobody believes in an answer, though what lies between holds all of it.
    """
    monkeypatch.setattr(grpc_channel, "KEEPALIVE_SECONDS", 1.0)
    monkeypatch.setattr(grpc_channel, "KEEPALIVE_PATIENCE_SECONDS", 8.0)

    async def act(link: Link, relay: Relay, got: list[pb.Envelope]) -> None:
        size = 3 * 2**20
        for i in range(3):
            await link.send(message(i, size))
        await until(lambda: len(got) == 3 and not link._unacknowledged, 120)
        assert first_times(got) == [0, 1, 2] and len(got) == 3
        assert relay.connections == 1 and relay.passed_bytes < 1.2 * 3 * size

    over(tmp_path, act, latency_seconds=0.25, bytes_per_second=0.6e6)


def test_a_connection_that_is_idle_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flows are kept hot: connected before the first message, and never again, however long nobody has anything to
    say. A server that was told of no other interval takes three pings without data for an attack.
    """
    monkeypatch.setattr(grpc_channel, "KEEPALIVE_SECONDS", 1.0)

    async def act(link: Link, relay: Relay, got: list[pb.Envelope]) -> None:
        await until(lambda: link._greeted)
        assert got == []
        for i in range(2):
            await link.send(message(i))
            await until(lambda i=i: len(got) == i + 1)  # type: ignore[misc]
            before = relay.passed_bytes
            await asyncio.sleep(8.5)
            assert relay.passed_bytes > before  # pings
        assert relay.connections == 1 and link._greeted

    over(tmp_path, act, latency_seconds=0.1)


def test_a_connection_that_is_lost_while_nobody_speaks_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_channel, "IDLE_SECONDS", 0.1)

    async def act(link: Link, relay: Relay, got: list[pb.Envelope]) -> None:
        await until(lambda: link._greeted)
        relay.cut()
        await until(lambda: relay.connections == 2 and link._greeted)
        await link.send(message(0))
        await until(lambda: len(got) == 1)

    over(tmp_path, act)


def test_a_connection_that_vanishes_is_noticed_and_another_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody closes it: only that no ping comes back tells."""
    monkeypatch.setattr(grpc_channel, "KEEPALIVE_SECONDS", 1.0)
    monkeypatch.setattr(grpc_channel, "KEEPALIVE_PATIENCE_SECONDS", 1.0)

    async def act(link: Link, relay: Relay, got: list[pb.Envelope]) -> None:
        await link.send(message(0))
        await until(lambda: len(got) == 1 and not link._unacknowledged)
        relay.freeze()
        for i in range(1, 20):
            await link.send(message(i, 1000))
        await until(lambda: not link._unacknowledged, 30)  # gRPC's own patience is a minute
        assert first_times(got) == list(range(20)) and relay.connections == 2

    over(tmp_path, act)


def test_what_is_cut_in_the_middle_is_sent_again(tmp_path: Path) -> None:
    async def act(link: Link, relay: Relay, got: list[pb.Envelope]) -> None:
        relay.cut_every = (20_000, 200_000)  # bytes, both ways: handshakes take some thousands of them
        relay.cut()
        for i in range(400):
            await link.send(message(i, 5000 * (i % 5)))
        await until(lambda: not link._unacknowledged, 120)
        assert first_times(got) == list(range(400))
        assert relay.connections > 10 and len(got) > 400  # some came twice, whose acknowledgements were cut off

    over(tmp_path, act)


def test_a_batch_over_a_wire_that_is_cut_again_and_again_is_served_in_one_attempt(
    tiny: Tiny, requests_batch: list[Request], greedy: Greedy, tmp_path: Path
) -> None:
    """Rows lost or taken twice would be out of place, and end the attempt."""
    folder, model = tiny
    parties = [Party(tmp_path, f"party{i}") for i in range(2)]

    async def story() -> list[JobState]:
        stages = split(folder, 3, 2)
        runs: list[Run] = []
        relays: list[Relay] = []
        rings: list[Ring] = []
        links: list[Link] = []
        with ThreadPoolExecutor(1) as compute:
            for i in range(2):

                async def handler(peer: Peer, envelope: pb.Envelope, i: int = i) -> None:
                    await runs[i].receive(peer, envelope)

                ring = Ring(parties[i].certificate, parties[i].key, handler, LIMIT)
                ring.admit(parties[1 - i].peer)
                rings.append(ring)
                relay = Relay(await ring.start("127.0.0.1:0"), latency_seconds=0.01)
                relay.cut_every = (8_000, 20_000)  # bytes; handshakes take some thousands of them
                relays.append(relay)
            for i in range(2):
                port = await relays[1 - i].start()
                theirs, ours = parties[1 - i], parties[i]
                link = Link(theirs.peer, f"127.0.0.1:{port}", ours.certificate, ours.key, LIMIT)
                links.append(link)
                job = JobFolder(tmp_path / str(i), JOB)
                job.save_requests(requests_batch)
                state, serving = JobState(Phase.SERVING, i, 2), Serving(max_rows=8, silence_seconds=30.0)
                args = (job, state, requests_batch, stages[i], serving, Stamp(), compute, link, f"stage {1 - i}")
                runs.append(Run(*args))
            for run in runs:
                run.start()
            states = list(await within(250, asyncio.gather(*(run.finished for run in runs))))
            assert relays[1].connections > 2  # which rows go through; tokens are few bytes
            await asyncio.gather(*(link.close() for link in links))
            await asyncio.gather(*(ring.stop() for ring in rings), *(relay.stop() for relay in relays))
            return states

    states = asyncio.run(within(280, story()))
    assert [state.attempt for state in states] == [1, 1]
    for state in states:
        assert [list(ids) for ids in state.tokens] == [greedy(model, request) for request in requests_batch]
