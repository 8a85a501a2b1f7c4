"""What others tell a worker - a stage, the chain's node, a URL on chain - and could hang or break it by."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.client import ChainError, ContractsError, Status
from contracts.events import JobMoved
from tests.worker.pipeline_in_process import JOB, Tiny, split, wire, within
from tests.worker.test_consent import NOW, PIPELINES, RELIEF, REQUESTS, SERVING, STAGES, WORK, Town
from tests.worker.test_run import deliver, rows_of
from verifier.commit import Request
from verifier.demand import Demand, Demanded, Wanted
from worker import ring_pb2 as pb
from worker import tls
from worker.agent import Agent
from worker.channel import Peer
from worker.config import Serving
from worker.demand import Answerer
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
        town._moved = lambda id, pipeline: Agent._moved(town, id, pipeline)
        moved = JobMoved(contract="Escrow", block=1, log_index=0, transaction=bytes(32), id=JOB, pipeline=RELIEF)
        with pytest.raises(ContractsError):
            await Agent._event(town, moved)
        await Agent._event(town, moved)
        assert town._engagements[JOB].state.rings == 1
        await Agent._event(town, replace(moved, block=2))  # the block was replaced, the move is in the next one
        assert town._engagements[JOB].state.rings == 1 and len(town._moves[JOB]) == 1

    asyncio.run(within(60, story()))


def test_a_run_that_a_move_interrupts_is_told_before_it_counts_as_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its recorder would live on, and write behind the back of the next ring's."""

    class Served:
        def __init__(self, *_: object, **__: object) -> None:
            self.tokens: list[list[int]] = []
            self.finished: asyncio.Future[JobState] = asyncio.get_running_loop().create_future()
            self.over_when_closed: bool | None = None

        def start(self) -> None:
            pass

        async def close(self, reason: str) -> None:
            self.over_when_closed = self.finished.done()

    async def story() -> None:
        monkeypatch.setattr("worker.engagement.Run", Served)
        town: Any = Town(tmp_path, "a")
        town.notary.learn = lambda job, stages: None
        town.stage = town.compute = town.recorder_class = None
        town.folder(JOB).save_requests(REQUESTS)
        stage = Engagement(town, JOB, WORK, STAGES[:1], 0)
        stage.status = Status.ACCEPTED
        stage.advance(NOW)
        while stage.run is None:
            await asyncio.sleep(0.01)
        run: Any = stage.run
        await stage.moved(RELIEF, PIPELINES[RELIEF], 1, None)
        assert run.over_when_closed is False and stage.run is None

    asyncio.run(within(60, story()))


def test_prompts_of_a_job_that_was_never_accepted_leave_the_disk(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path, "a")
        town.settler = SimpleNamespace(withdraw=lambda: None)
        for phase, left in ((Phase.SIGNED, False), (Phase.FAILED, True)):
            town.folder(JOB).save_requests(REQUESTS)
            town.folder(JOB).save_state(JobState(phase, 0, 3))
            stage = Engagement(town, JOB, WORK, STAGES, 0)
            stage.status = Status.REFUNDED
            stage.advance(NOW)
            while not stage.closed:
                await asyncio.sleep(0.01)
            assert town.folder(JOB).has_requests() is left

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


def test_a_demand_is_answered_by_a_worker_whose_clock_is_fast() -> None:
    """Whether it is too late is for the chain to say: TooLate, which ends it."""

    async def story() -> None:
        answered: list[bytes] = []

        class Posts(Answerer):
            def answer(self, id: bytes, demanded: Demanded) -> None:
                answered.append(id)
                if id == b"late":
                    raise ChainError("TooLate", {})

        answerer = Posts(*[None] * 4)  # type: ignore[arg-type]
        demand = Demand(JOB, 1, Wanted.PROMPT, 0, 0, 0, 1)
        for id, deadline in ((b"second", 2), (b"late", 1)):  # long ago by this machine's clock
            answerer._open[id] = Demanded(demand, "0x", 0, deadline, 0, 0)
        answerer.tick()
        while answerer.open_demands:
            await asyncio.sleep(0.01)
        assert answered == [b"late", b"second"]

    asyncio.run(within(60, story()))


def test_a_certificate_that_another_registered_too_costs_no_question_to_the_chain_for_each_message(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        pem = tmp_path / "a.pem"
        pinned = tls.create(pem, tmp_path / "a.key")
        asked = 0

        def worker(account: str) -> SimpleNamespace:
            nonlocal asked
            asked += 1
            return SimpleNamespace(url="http://a", tls=pinned if account == STAGES[1].worker else bytes(32))

        chain: Any = SimpleNamespace(workers=SimpleNamespace(worker=worker))
        peers = Peers(chain, (), 1000)
        peer = Peer("stage 0 (another)", "another", pem.read_bytes())
        for _ in range(20):
            assert await peers.is_stage(peer, 1, STAGES[1])
        assert asked == 1
        assert not await peers.is_stage(peer, 2, STAGES[2])
        await peers.close()

    asyncio.run(within(60, story()))
