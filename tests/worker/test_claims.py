"""How claims come on chain beside claims that are made to keep them off."""

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from contracts.client import ChainError, Claim
from tests.worker.pipeline_in_process import JOB, within
from tests.worker.test_consent import NOW, STAGES, WORK
from worker.claims import Claims
from worker.config import Serving
from worker.peers import Peers

OWN = Claim(0, b"\x01" * 32, bytes(32), 0, b"s")
ROOTLESS = Claim(1, bytes(32), bytes(32), 0, b"s")  # signed well; the contract takes no root of zeros


def test_a_claim_that_the_chain_refuses_keeps_ours_not_off_it() -> None:
    sent: list[list[Claim]] = []

    def commit(job: bytes, claims: list[Claim]) -> None:
        sent.append(claims)
        if ROOTLESS in claims:
            raise ChainError("InvalidJob", {"what": "root"})

    agent = SimpleNamespace(
        settler=SimpleNamespace(commit=commit), chain=SimpleNamespace(block_timestamp=lambda: WORK.commit_by)
    )
    ours: Any = SimpleNamespace(agent=agent, id=JOB, job=WORK, name="job", stages=STAGES, index=0)
    asyncio.run(within(60, Claims(ours).post(OWN, ROOTLESS)))
    assert sent == [[OWN, ROOTLESS], [OWN]]


def test_a_claim_that_comes_a_byte_at_a_time_is_waited_for_no_longer_than_another() -> None:
    answering: list[asyncio.Task[None] | None] = []

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.current_task())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        with suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def story() -> None:
        async with await asyncio.start_server(trickle, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            peers = Peers(SimpleNamespace(), (), 1000)  # type: ignore[arg-type]
            peers.locate = lambda index, stage: (url, b"")  # type: ignore[method-assign]
            serving = Serving(claim_seconds=0.1, silence_seconds=0.3)
            agent = SimpleNamespace(peers=peers, config=SimpleNamespace(serving=serving))
            ours: Any = SimpleNamespace(agent=agent, id=JOB, job=WORK, name="job", stages=STAGES, index=0)
            assert await Claims(ours).others() == [] and len(answering) == 2
            await peers.close()
            await asyncio.gather(*filter(None, answering))

    asyncio.run(within(30, story()))


def test_the_clock_that_says_when_it_is_too_late_is_the_chains() -> None:
    sent: list[list[Claim]] = []
    agent = SimpleNamespace(
        settler=SimpleNamespace(commit=lambda job, claims: sent.append(claims)),
        chain=SimpleNamespace(block_timestamp=lambda: WORK.commit_by + 1),
        now=lambda: NOW,
    )
    ours: Any = SimpleNamespace(agent=agent, id=JOB, job=WORK, name="job", stages=STAGES, index=0)
    asyncio.run(within(60, Claims(ours).post(OWN)))
    assert not sent
