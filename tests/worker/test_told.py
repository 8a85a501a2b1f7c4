"""What others tell a worker - a stage, the chain's node, a URL on chain - and could hang or break it by."""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.client import ContractsError, Status
from tests.worker.pipeline_in_process import JOB, Tiny, split, wire, within
from tests.worker.test_consent import NOW, PIPELINES, RELIEF, REQUESTS, SERVING, STAGES, WORK, Town
from tests.worker.test_run import deliver, rows_of
from verifier.commit import Request
from worker import ring_pb2 as pb
from worker.agent import Agent
from worker.channel import Peer
from worker.config import Serving
from worker.engagement import Engagement
from worker.errors import JobFailed, PeerFault
from worker.job import JobState, Phase
from worker.peers import Peers


@pytest.mark.parametrize("told", [[[211]], [[5, -1]], [[2**70]], [[1], [2]], []])
def test_a_first_stage_without_memory_believes_no_tokens_that_can_not_be(tmp_path: Path, told: list[list[int]]) -> None:
    """Each attempt would embed them anew, and break."""

    async def story() -> None:
        town: Any = Town(tmp_path)
        town.stage = SimpleNamespace(shape=SimpleNamespace(vocabulary=211))
        answers = [told, [[210, 0]]]

        async def tokens(name: str, url: str, job: bytes) -> list[list[int]]:
            return answers.pop(0)

        town.peers.tokens = tokens
        stage = Engagement(town, JOB, WORK, STAGES, 0)
        assert await stage._told_tokens(REQUESTS) == []
        assert await stage._told_tokens(REQUESTS) == [[210, 0]]

    asyncio.run(within(60, story()))


def test_a_move_at_which_a_node_fails_is_counted_once(tmp_path: Path) -> None:
    """Attempts are numbered by the moves so far: who counts one twice hears nobody any more."""

    async def story() -> None:
        town: Any = Town(tmp_path, "a")
        answers: list[Any] = [ContractsError("the node is gone"), NOW]

        def now() -> int:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        town.now = now
        town._engagements[JOB] = Engagement(town, JOB, WORK, STAGES, 0)
        with pytest.raises(ContractsError):
            await Agent._moved(town, JOB, RELIEF)
        await Agent._moved(town, JOB, RELIEF)
        assert town._rings == {JOB: 1} and town._engagements[JOB].state.rings == 1

    asyncio.run(within(60, story()))


def test_events_are_taken_in_once_whatever_fails_between(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path)
        town._event_lock, town._events, town._next_block = asyncio.Lock(), deque(), 5
        head, failing, taken = [7], [3], []
        town.chain.block_number = lambda: head[0]
        town.chain.events = lambda first, last: range(first, last + 1)

        async def event(number: int) -> None:
            if number == 6 and failing[0]:
                failing[0] -= 1
                raise ContractsError("the node is gone")
            taken.append(number)

        town._event = event
        for _ in range(3):
            with pytest.raises(ContractsError):
                await Agent.follow(town)
        await Agent.follow(town)
        assert taken == [5, 6, 7]
        head[0] = 8
        await Agent.follow(town)
        assert taken == [5, 6, 7, 8]

    asyncio.run(within(60, story()))


@pytest.mark.parametrize("url", ["http://[", "http://host:99999999", "http://ho st", "ftp://host", "", "http://a\x00b"])
def test_a_url_that_is_none_is_its_stages_fault(url: str) -> None:
    """It may stand on chain any time: whoever asks waits, or takes that stage's place, and does not break."""

    async def story() -> None:
        chain: Any = SimpleNamespace(workers=SimpleNamespace(worker=lambda account: SimpleNamespace(url=url, tls=b"")))
        peers = Peers(chain, (), 1000)
        with pytest.raises(PeerFault, match="stage 1"):
            where, _ = peers.locate(1, STAGES[1])
            await peers.well("stage 1", where, JOB, SERVING)
        assert not await peers.is_well(1, STAGES[1], JOB, SERVING)
        await peers.close()

    asyncio.run(within(60, story()))


def test_stage_times_that_no_stage_can_take_break_nothing(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(tiny[0], 3, 2), requests_batch, Serving(), compute)
            told: asyncio.Queue[pb.Envelope] = asyncio.Queue()

            async def receive(peer: Peer, envelope: pb.Envelope) -> None:
                if envelope.WhichOneof("body") != "beat":
                    told.put_nowait(envelope)

            link: Any = runs[1]._successor
            link.target = SimpleNamespace(receive=receive)
            await deliver(runs, 1, sequence=0, rows=rows_of(0, 5, busy=2**64 - 1))
            came = await within(30, told.get())
            assert len(came.tokens.tokens) == 1 and came.tokens.times.busy == 2**63, came
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())


def test_a_last_stage_that_keeps_its_tokens_is_no_hang(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """It answers each microbatch, and beats: no silence tells."""

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(tiny[0], 3, 2), requests_batch, Serving(attempts=1), compute)
            link: Any = runs[1]._successor
            send = link.send

            async def empty(envelope: pb.Envelope) -> None:
                del envelope.tokens.tokens[:]
                await send(envelope)

            link.send = lambda envelope: (empty if envelope.WhichOneof("body") == "tokens" else send)(envelope)
            for run in runs:
                run.start()
            with pytest.raises(JobFailed, match="stage 1: no token came of 5 requests whose rows it had"):
                await within(30, runs[0].finished)
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())


def test_pipelines_that_strangers_ask_for_are_not_kept(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path)
        town._pipelines = {}
        town.chain.workers = SimpleNamespace(pipeline_stages=lambda pipeline: PIPELINES.get(pipeline, ()))
        assert await Agent.stages(town, RELIEF, keep=False) == PIPELINES[RELIEF]
        assert await Agent.stages(town, bytes(32)) == ()
        assert town._pipelines == {}
        assert await Agent.stages(town, RELIEF) == PIPELINES[RELIEF]
        assert town._pipelines == {RELIEF: PIPELINES[RELIEF]}

    asyncio.run(within(60, story()))


def test_a_finished_stage_claims_after_a_restart_though_no_neighbour_answers(tmp_path: Path) -> None:
    """They may have posted theirs and gone: a claim needs the chain alone."""

    async def story() -> None:
        town: Any = Town(tmp_path)
        posted: list[object] = []
        town.settler = SimpleNamespace(claim=lambda *told: "ours", commit=lambda *told: posted.append(told))
        town.notary.learn = lambda id, stages: None

        async def identity(name: str, *told: object) -> None:
            raise PeerFault(name, "no answer")

        town.peers.identity = identity
        town.folder(JOB).save_requests(REQUESTS)
        town.folder(JOB).save_state(JobState(Phase.FINISHED, 1, 3, root=b"\x05" * 32))
        stage = Engagement(town, JOB, WORK, STAGES, 1)
        stage.status = Status.ACCEPTED
        stage.advance(NOW)
        while not posted:
            await asyncio.sleep(0.01)
        await stage.stop()
        assert posted == [(JOB, ["ours"])]

    asyncio.run(within(60, story()))
