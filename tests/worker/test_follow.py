"""Events of the chain as a worker takes them in: once each, also from nodes that lag and after blocks were replaced."""

import asyncio
from dataclasses import replace
from typing import Any

from contracts.client import ContractsError
from contracts.events import JobPaid
from tests.worker.pipeline_in_process import within
from worker.follow import OVERLAP_BLOCKS, Follower


class Chain:
    """A node that tells the events it is given."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.told: list[JobPaid] = []
        self.looks = 0
        self.gone = 0

    def block_number(self) -> int:
        self.looks += 1
        if self.gone:
            self.gone -= 1
            raise ContractsError("the node is gone")
        return self.head

    def events(self, first: int, last: int) -> list[JobPaid]:
        return [event for event in self.told if first <= event.block <= last]


def paid(block: int, job: int = 0, log_index: int = 0) -> JobPaid:
    return JobPaid(
        contract="Escrow",
        block=block,
        log_index=log_index,
        transaction=bytes(32),
        id=bytes([job] * 32),
        price=0,
        returned=0,
    )


def follower(chain: Chain, taken: list[Any], failing: dict[int, int] | None = None) -> Follower:
    """failing: block -> how often `take` fails at its events."""
    left = failing or {}

    async def take(event: Any) -> None:
        if left.get(event.block):
            left[event.block] -= 1
            raise OSError("the disk is full")
        taken.append(event)

    return Follower(chain, 5, take)  # type: ignore[arg-type]


def test_what_fails_comes_again_with_what_follows_it_and_others_pass() -> None:
    async def story() -> None:
        chain, taken = Chain(7), []  # type: ignore[var-annotated]
        chain.told = [paid(4), paid(5), paid(6, 1), paid(6, 2, 1), paid(7, 1)]
        reader = follower(chain, taken, {6: 2})
        await reader.follow()  # it fails at both of block 6
        assert taken == [paid(5)]
        await reader.follow()
        assert taken == [paid(5), paid(6, 1), paid(6, 2, 1), paid(7, 1)]
        await reader.follow()
        assert len(taken) == 4

    asyncio.run(within(60, story()))


def test_one_job_that_fails_for_ever_silences_no_other() -> None:
    async def story() -> None:
        chain, taken = Chain(6), []  # type: ignore[var-annotated]
        chain.told = [paid(5, 1), paid(6, 1), paid(6, 2, 1)]
        reader = follower(chain, taken, {5: 10**6})
        for _ in range(3):
            await reader.follow()
        assert taken == [paid(6, 2, 1)]

    asyncio.run(within(60, story()))


def test_events_of_a_node_that_lagged_are_not_lost() -> None:
    """Behind one URL one node tells the head and another, which does not have that block yet, its events."""

    async def story() -> None:
        chain, taken = Chain(7), []  # type: ignore[var-annotated]
        reader = follower(chain, taken)
        await reader.follow()
        chain.told = [paid(7)]
        chain.head = 8
        await reader.follow()
        assert taken == [paid(7)]
        chain.head = 7 + OVERLAP_BLOCKS
        await reader.follow()
        chain.head += 1
        await reader.follow()
        assert taken == [paid(7)]

    asyncio.run(within(60, story()))


def test_an_event_that_says_something_else_in_the_block_that_came_instead_is_taken_in() -> None:
    async def story() -> None:
        chain, taken = Chain(7), []  # type: ignore[var-annotated]
        chain.told = [paid(7)]
        reader = follower(chain, taken)
        await reader.follow()
        chain.told = [replace(paid(7), transaction=bytes([1] * 32))]
        chain.head = 8
        await reader.follow()
        assert taken == [paid(7), *chain.told]

    asyncio.run(within(60, story()))


def test_many_who_ask_at_once_share_two_looks() -> None:
    """Else whoever asks for a hundred unknown jobs holds up the answers to games behind a hundred calls of the node."""

    async def story() -> None:
        chain, taken = Chain(7), []  # type: ignore[var-annotated]
        chain.told = [paid(7)]
        reader = follower(chain, taken)
        await asyncio.gather(*(reader.follow() for _ in range(100)))
        assert taken == [paid(7)] and chain.looks <= 2
        chain.looks, chain.gone = 0, 10**6
        told = await asyncio.gather(*(reader.follow() for _ in range(100)), return_exceptions=True)
        assert chain.looks <= 2 and any(isinstance(error, ContractsError) for error in told)

    asyncio.run(within(60, story()))
