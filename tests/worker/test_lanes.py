"""Jobs beside each other on one stream: what waits, how much of it may."""

import asyncio

import pytest

from tests.worker.pipeline_in_process import within
from worker import lanes
from worker import ring_pb2 as pb
from worker.envelope import held_bytes
from worker.lanes import JOBS, Lanes, Windows
from worker.packing import PACKED

JOB, OTHER, THIRD = (bytes([number] * 32) for number in range(3))


def message(job: bytes, sequence: int, size: int = 100) -> pb.Envelope:
    return pb.Envelope(job=job, attempt=1, sequence=sequence, rows=pb.Rows(hidden=pb.Tensor(data=bytes(size))))


class Hall:
    """Takes messages of the jobs that are open."""

    def __init__(self, *open_: bytes) -> None:
        self.open = {job: asyncio.Event() for job in (JOB, OTHER, THIRD)}
        for job in open_:
            self.open[job].set()
        self.lanes = Lanes(self.take)

    async def take(self, envelope: pb.Envelope, size: int) -> pb.Ack:
        await self.open[envelope.job].wait()
        if size == 0:
            raise ZeroDivisionError
        return pb.Ack(job=envelope.job, attempt=1, sequence=envelope.sequence)

    async def acks(self, count: int) -> list[tuple[bytes, int]]:
        told = [await within(20, self.lanes.next_ack()) for _ in range(count)]
        return [(ack.job, ack.sequence) for ack in told if ack is not None]


def test_each_job_is_taken_in_its_own_order() -> None:
    async def story() -> None:
        hall = Hall(OTHER)
        for sequence in range(3):
            await hall.lanes.put(message(JOB, sequence), 1)
            await hall.lanes.put(message(OTHER, sequence), 1)
        assert await hall.acks(3) == [(OTHER, 0), (OTHER, 1), (OTHER, 2)]
        hall.open[JOB].set()
        assert await hall.acks(3) == [(JOB, 0), (JOB, 1), (JOB, 2)]
        await hall.lanes.put(message(JOB, 3), 1)
        ending = asyncio.create_task(hall.lanes.end())
        assert await hall.acks(2) == [(JOB, 3)]
        await ending

    asyncio.run(story())


@pytest.mark.parametrize("by_bytes", [False, True])
def test_what_waits_of_all_jobs_is_bounded_and_so_are_acknowledgements_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, by_bytes: bool
) -> None:
    if by_bytes:
        monkeypatch.setattr(lanes, "WINDOW_BYTES", held_bytes(message(JOB, 1)))
    else:
        monkeypatch.setattr(lanes, "WINDOW", 1)

    async def story() -> None:
        hall = Hall(OTHER)
        for sequence in range(JOBS):
            await hall.lanes.put(message((JOB, OTHER)[sequence % 2], 1 + sequence), 1)
        more = asyncio.create_task(hall.lanes.put(message(OTHER, 99), 1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not more.done()
        await hall.acks(1)
        await within(20, more)
        await hall.lanes.close()

    asyncio.run(story())


def test_a_fault_of_whoever_takes_is_raised_where_acknowledgements_are_read() -> None:
    async def story() -> None:
        hall = Hall(JOB)
        await hall.lanes.put(message(JOB, 0), 0)
        with pytest.raises(ZeroDivisionError):
            await within(20, hall.lanes.next_ack())

    asyncio.run(story())


def test_packed_rows_weigh_what_they_are_to_become() -> None:
    """A thousand times as much, before anybody knows who may send them."""
    plain, packed = message(JOB, 0, 1000), message(JOB, 0, 1000)
    packed.rows.hidden.MergeFrom(pb.Tensor(shape=[5000, 4096], packing=PACKED))
    assert held_bytes(packed) >= 5000 * 4096 * 2 > held_bytes(plain)
    packed.rows.hidden.dtype = 77
    assert held_bytes(packed) >= 5000 * 4096 * 4


def test_a_jobs_window_is_its_own_and_one_message_always_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = held_bytes(message(JOB, 1))
    monkeypatch.setattr(lanes, "WINDOW_BYTES", 3 * size)
    monkeypatch.setattr(lanes, "JOBS", 2)
    windows = Windows((JOB, size) for _ in range(3))
    assert windows.full(JOB, size) and not windows.full(OTHER, size)
    assert not Windows().full(JOB, 10**6)
    for _ in range(3):
        windows.add(OTHER, size)
    assert windows.full(THIRD, size)
    windows.remove(JOB, size)
    assert not windows.full(THIRD, size) and not windows.full(JOB, size)
    for job in (JOB, JOB, OTHER, OTHER, OTHER):
        windows.remove(job, size)
    assert not windows._held
