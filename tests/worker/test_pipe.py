"""Work in order, delivered in order, without a pause in between."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.worker.pipeline_in_process import within
from worker.pipe import Pipe


def test_results_are_delivered_in_order() -> None:
    got: list[int] = []

    async def deliver(value: int) -> None:
        await asyncio.sleep(0.001 * (value % 3))
        got.append(value)

    async def story() -> None:
        with ThreadPoolExecutor(1) as thread:
            pipe = Pipe(thread, deliver)
            async with asyncio.TaskGroup() as group:
                group.create_task(pipe.run())
                for value in range(20):
                    await pipe.put(lambda value=value: value)  # type: ignore[misc]
                await pipe.end()

    asyncio.run(story())
    assert got == list(range(20))


def test_the_next_computes_while_the_last_is_handed_on() -> None:
    """The delivery of the first ends only once the second has computed: a pipe that waited would never end."""
    second = threading.Event()

    async def deliver(value: int) -> None:
        if value == 1:
            assert await asyncio.to_thread(second.wait, 60)

    def compute_second() -> int:
        second.set()
        return 2

    async def story() -> None:
        with ThreadPoolExecutor(1) as thread:
            pipe = Pipe(thread, deliver)
            async with asyncio.TaskGroup() as group:
                group.create_task(pipe.run())
                await pipe.put(lambda: 1)
                await pipe.put(compute_second)
                await pipe.end()

    asyncio.run(within(120, story()))


def test_what_was_put_waits_until_there_is_room() -> None:
    """Behind a delivery that stands still, no more than a few results are ever kept."""
    computed: list[int] = []

    async def story() -> None:
        go = asyncio.Event()

        async def deliver(_: None) -> None:
            await go.wait()

        async def feed(pipe: Pipe[None]) -> None:
            for value in range(50):
                await pipe.put(lambda value=value: computed.append(value))  # type: ignore[misc]
            await pipe.end()

        with ThreadPoolExecutor(1) as thread:
            pipe = Pipe(thread, deliver)
            async with asyncio.TaskGroup() as group:
                group.create_task(pipe.run())
                feeding = group.create_task(feed(pipe))
                while len(computed) < 3:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)
                assert len(computed) == 3 and not feeding.done()
                go.set()

    asyncio.run(story())
    assert computed == list(range(50))


@pytest.mark.parametrize("where", ["work", "delivery"])
def test_a_failure_ends_the_run(where: str) -> None:
    async def deliver(value: int) -> None:
        if where == "delivery":
            raise OSError("the link is down")

    def work() -> int:
        if where == "work":
            raise OSError("the device is lost")
        return 1

    async def story() -> None:
        with ThreadPoolExecutor(1) as thread:
            pipe = Pipe(thread, deliver)
            await pipe.put(work)
            with pytest.raises(OSError, match="lost" if where == "work" else "down"):
                await pipe.run()

    asyncio.run(story())
