"""When a stage signs a move of its job to a spare, and what it holds back for that. Runs in this process; the chain's
part is in tests/worker/test_spare.py.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.client import ChainError, Consent, Job, Stage, Status
from tests.worker.pipeline_in_process import JOB, Tiny, split, wire, within
from verifier.commit import Request
from worker.agent import Agent
from worker.config import Policy, Serving
from worker.consent import CONSENT_SECONDS, LEAVE_SECONDS, MARGIN_SECONDS, Consents
from worker.engagement import Engagement
from worker.errors import PeerFault, Refused
from worker.handoff import Handoff
from worker.job import JobFolder, JobState, Phase
from worker.run import Run
from worker.spare import Spare

LINE, RELIEF, OTHER = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
STAGES = (Stage("a", 0, 1, 3000), Stage("b", 1, 2, 3000), Stage("c", 2, 3, 4000))
PIPELINES = {
    LINE: STAGES,
    RELIEF: (STAGES[0], Stage("spare", 1, 2, 3000), STAGES[2]),
    OTHER: (STAGES[0], Stage("another", 1, 2, 3000), STAGES[2]),
}
NOW = 1_000_000  # of the chain
WORK = Job(
    model=bytes(32),
    pipeline=LINE,
    requests_root=bytes(32),
    requests=1,
    prompt_tokens=3,
    max_tokens=4,
    prompt_price=1,
    token_price=1,
    lock=1,
    gas_rate=1,
    accept_by=NOW,
    commit_by=NOW + 1000,
    window=600,
    clock=60,
    grace=10,
    nonce=1,
)
SERVING = Serving(max_rows=16, stall_seconds=20.0, silence_seconds=0.2)
REQUESTS = [Request((1, 2, 3), 4)]


class Town:
    """As much of an agent as consents ask for: the chain's time, its pipelines, how stage 1 is, a stamp."""

    def __init__(self, data: Path, account: str = "a", replaceable: bool = True) -> None:
        self.data = data
        self.account = account
        self.time = NOW
        self.lost = True
        self.asked = 0
        self.config = SimpleNamespace(serving=SERVING, policy=Policy(replaceable=replaceable, min_serving_seconds=60))
        self.notary = SimpleNamespace(sign_move=self.sign_move)
        self.peers = SimpleNamespace(locate=lambda index, stage: ("", b""), well=self.well)
        self._pipelines = PIPELINES
        self._engagements: dict[bytes, Engagement] = {}
        self._spares: dict[bytes, Spare] = {}
        self._moves: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.chain = SimpleNamespace(escrow=SimpleNamespace(job=lambda id: WORK), block_timestamp=self.now)

    def folder(self, id: bytes) -> JobFolder:
        return JobFolder(self.data, id)

    def now(self) -> int:
        return self.time

    async def stages(self, pipeline: bytes, keep: bool = True) -> tuple[Stage, ...]:
        return PIPELINES.get(pipeline, ())

    async def well(self, name: str, url: str, job: bytes, serving: Serving) -> None:
        self.asked += 1
        if self.lost:
            raise PeerFault(name, "no answer")

    def sign_move(self, job: bytes, before: bytes, pipeline: bytes, until: int) -> Consent:
        return Consent(until, before + pipeline)


def engaged(town: Town, index: int, run: Run | None) -> Any:
    state = run.state if run is not None else JobState(Phase.SERVING, index, 3)
    return SimpleNamespace(
        agent=town, id=JOB, job=WORK, stages=STAGES, index=index, status=Status.ACCEPTED, state=state, run=run
    )


def follow(engagement: Any, run: Run) -> None:
    def noted(state: JobState) -> None:
        engagement.state = state

    run._on_state = noted


@pytest.fixture
def line(tiny: Tiny, tmp_path: Path) -> Any:
    """Makes runs of three stages, not started, that have stood still for long."""

    def make(compute: ThreadPoolExecutor) -> list[Run]:
        runs = wire(tmp_path, split(tiny[0], 3, 3), REQUESTS, SERVING, compute)
        for run in runs:
            run._moved -= 60
        return runs

    return make


def refused(consents: Consents, reason: str, pipeline: bytes = RELIEF) -> Any:
    async def ask() -> None:
        with pytest.raises(Refused, match=reason):
            await consents.give(pipeline)

    return ask()


def test_who_stays_signs_while_all_stands_still_and_holds_its_seal_once(line: Any, tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            run, town = line(compute)[0], Town(tmp_path)
            stage = engaged(town, 0, run)
            follow(stage, run)
            consents, began = Consents(stage), time.time()
            assert await consents.give(RELIEF) == Consent(NOW + CONSENT_SECONDS, LINE + RELIEF)
            held = run.state.held_until
            assert CONSENT_SECONDS + MARGIN_SECONDS <= held - began < CONSENT_SECONDS + MARGIN_SECONDS + 5
            assert run.folder.load_state().held_until == held
            # Who asks again, for whichever spare, prolongs nothing.
            town.time += 20
            assert await consents.give(RELIEF) == Consent(NOW + CONSENT_SECONDS, LINE + RELIEF)
            assert await consents.give(OTHER) == Consent(NOW + CONSENT_SECONDS, LINE + OTHER)
            assert run.state.held_until == held
            town.time += 20
            assert (await consents.give(RELIEF)).until == NOW + 40 + CONSENT_SECONDS
            assert run.state.held_until > held

    asyncio.run(within(60, story()))


def test_a_consent_that_could_not_be_held_is_not_given_when_asked_again(line: Any, tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            run, town = line(compute)[0], Town(tmp_path)
            stage = engaged(town, 0, run)
            follow(stage, run)
            consents, save = Consents(stage), run.folder.save_state

            def full(state: JobState) -> None:
                raise OSError(28, "No space left on device")

            run.folder.save_state = full
            for _ in range(2):
                with pytest.raises(OSError, match="No space"):
                    await consents.give(RELIEF)
            run.folder.save_state = save
            assert (await consents.give(RELIEF)).until == NOW + CONSENT_SECONDS
            assert run.folder.load_state().held_until > time.time()

    asyncio.run(within(60, story()))


def test_consents_are_refused(line: Any, tmp_path: Path) -> None:
    """Before there is a run, while the stage is well or the ring moves, to strangers, once it is sealed."""

    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            run, town = line(compute)[0], Town(tmp_path)
            stage = engaged(town, 0, None)
            await refused(Consents(stage), "expected a job that is being served")
            stage = engaged(town, 0, run)
            consents = Consents(stage)
            await refused(consents, "differs from the job's in one worker", b"\x09" * 32)
            await refused(consents, "differs from the job's in one worker", LINE)
            town.lost = False
            await refused(consents, r"expected a stage that is lost, stage 1 \(b\) is well")
            town.lost = True
            run._moved = time.monotonic() + 60
            await refused(consents, "expected a ring that stands still")
            asked: int = town.asked
            assert asked == 1, "a ring that moves asks nobody"
            run._moved -= 120
            for phase in (Phase.OPEN, Phase.SIGNED, Phase.SEALED, Phase.FINISHED, Phase.FAILED, Phase.CLOSED):
                stage.state = run.state.to(phase)
                await refused(consents, f"expected a job that is being served, it is accepted, {phase}")
            stage.state = run.state
            stage.status = Status.COMMITTED
            await refused(consents, "it is committed")
            assert run.state.held_until == 0

    asyncio.run(within(60, story()))


def test_a_run_that_seals_while_the_lost_stage_is_asked_signs_nothing(line: Any, tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            run, town = line(compute)[0], Town(tmp_path)

            async def well(*_: Any) -> None:
                run.sealing = True
                raise PeerFault("stage 1", "no answer")

            town.peers.well = well
            await refused(Consents(engaged(town, 0, run)), "its trace is being sealed")
            assert run.state.held_until == 0

    asyncio.run(within(60, story()))


def test_who_is_not_replaceable_signs_nothing_at_all(line: Any, tmp_path: Path) -> None:
    """As who stays, who leaves, who comes."""
    assert not Policy().replaceable

    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs, town = line(compute), Town(tmp_path, replaceable=False)
            for index in (0, 1, 2):
                await refused(Consents(engaged(town, index, runs[index])), "signs no moves")
        for replaceable, offered in ((False, 0), (True, 1)):
            spare: Any = Town(tmp_path, "spare", replaceable)
            Agent._offer(spare, JOB, WORK, STAGES)
            assert len(spare._spares) == offered

    asyncio.run(within(60, story()))


def test_ones_own_replacement_is_signed_for_a_short_while_and_not_while_sealing(line: Any, tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            run, town = line(compute)[1], Town(tmp_path)
            run._moved = time.monotonic() + 60  # also in a ring that moves
            stage = engaged(town, 1, run)
            consents = Consents(stage)
            assert await consents.give(RELIEF) == Consent(NOW + LEAVE_SECONDS, LINE + RELIEF)
            assert run.state.held_until == 0 and not town.asked
            town.time = WORK.commit_by - 5
            assert (await consents.give(RELIEF)).until == WORK.commit_by
            run.sealing = True
            await refused(consents, "its trace is being sealed")

    asyncio.run(within(60, story()))


@pytest.mark.parametrize("index", [0, 2])
def test_nothing_is_sealed_before_a_consent_is_over_and_nothing_signed_meanwhile(
    line: Any, tmp_path: Path, index: int
) -> None:
    """The hold comes from the disk, as after a restart."""

    async def story() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs, town = line(compute), Town(tmp_path)
            held, run = time.time() + 3600, runs[index]
            runs[index].folder.save_state(replace(run.state, held_until=held))
            run.state = runs[index].folder.load_state()
            stage = engaged(town, index, run)
            follow(stage, run)
            for other in runs:
                other.start()
            while not run.sealing:
                await asyncio.sleep(0.01)
            run._moved -= 60
            await refused(Consents(stage), "its trace is being sealed")
            await asyncio.sleep(0.3)
            assert run.state.phase is Phase.SERVING and run.state.sent is None and run.state.held_until == held
            for other in runs:
                await other.close("the test is over")

            run.state = replace(run.state, held_until=0.0)
            again = line(compute)
            again[index].state = replace(again[index].state, held_until=time.time() + 1)
            held = again[index].state.held_until
            for other in again:
                other.start()
            states = await asyncio.gather(*(other.finished for other in again))
            assert time.time() >= held and {state.phase for state in states} == {Phase.FINISHED}

    asyncio.run(within(120, story()))


@pytest.mark.parametrize("phase", [Phase.SEALED, Phase.FINISHED])
def test_what_was_sealed_in_another_ring_fails_and_is_never_claimed(tmp_path: Path, phase: Phase) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path, "c")
        folder = town.folder(JOB)
        folder.save_requests(REQUESTS)
        sealed = JobState(phase, 2, 3, root=b"\x05" * 32, received=Handoff(bytes(32), 1, bytes(65)))
        folder.save_state(sealed)
        stage = Engagement(town, JOB, WORK, STAGES, 2)
        await stage.moved(RELIEF, PIPELINES[RELIEF], 1, 2)
        assert stage.job.pipeline == RELIEF and stage.state.phase is Phase.FAILED and folder.load_state() == stage.state
        assert stage.state.reason == f"the job moved to another pipeline when this stage was {phase}"
        with pytest.raises(Refused, match="expected a finished job, it is failed"):
            await stage.claims.own()
        stage.status = Status.ACCEPTED
        stage.advance(NOW)
        assert not stage._tasks

        # Sealed in the ring of now: after a restart the move is told again, and nothing is served before.
        folder.save_state(replace(sealed, rings=1))
        stage = Engagement(town, JOB, WORK, STAGES, 2)
        stage.status = Status.ACCEPTED
        stage.advance(NOW)
        assert not stage._tasks
        stage.status = Status.OPEN
        await stage.moved(RELIEF, PIPELINES[RELIEF], 1, 2)
        assert stage.state.phase is phase and stage.state.rings == 1

    asyncio.run(within(60, story()))


def test_who_has_left_claims_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path, "b")
        town.folder(JOB).save_requests(REQUESTS)
        town.folder(JOB).save_state(JobState(Phase.FINISHED, 1, 3, root=b"\x05" * 32))
        stage = Engagement(town, JOB, WORK, STAGES, 1)
        await stage.moved(RELIEF, PIPELINES[RELIEF], 1, None)
        assert stage.closed and town.folder(JOB).load_state() == stage.state
        with pytest.raises(Refused, match="expected a finished job, it is closed: another worker has taken our place"):
            await stage.claims.own()

    asyncio.run(within(60, story()))


def test_a_spare_that_has_too_little_time_left_takes_nothing_over(tmp_path: Path) -> None:
    async def story() -> None:
        town: Any = Town(tmp_path, "spare")
        spare = Spare(town, JOB, WORK, STAGES, RELIEF, 1)
        town.time = WORK.commit_by - 59
        with pytest.raises(Refused, match="time to serve: expected at least 60, 59 are left"):
            await spare._take_over(Consent(NOW + 5000, b""))
        town.time = NOW + 10
        with pytest.raises(Refused, match="the consent of stage 1 was over 3 s ago"):
            await spare._take_over(Consent(NOW + 7, b""))
        assert not (tmp_path / "jobs").exists()

    asyncio.run(within(60, story()))


def test_a_worker_that_a_move_brings_in_serves_whatever_it_remembers(tmp_path: Path) -> None:
    """No spare of the job is left; what it held back is."""

    async def story() -> None:
        town: Any = Town(tmp_path, "spare")
        town.folder(JOB).save_state(JobState(Phase.OPEN, 1, 3, held_until=5.0))
        started: list[Engagement] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engagement, "advance", lambda self, now: started.append(self))
            await Agent._moved(town, JOB, RELIEF)
        (stage,) = started
        assert town._engagements == {JOB: stage} and stage.status is Status.ACCEPTED and stage.index == 1
        assert stage.job.pipeline == RELIEF and stage.state.rings == 1 and stage.state.held_until == 5.0

    asyncio.run(within(60, story()))


def test_a_spare_is_let_go_once_its_move_is_taken_in_and_not_before(tmp_path: Path) -> None:
    """Told by the spare itself, whose node fails then, and once more: or it stays beside the stage it became."""

    async def story() -> None:
        town: Any = Town(tmp_path, "spare")
        spare = town._spares[JOB] = Spare(town, JOB, WORK, STAGES, RELIEF, 1)
        failed = asyncio.Event()

        def fails() -> int:
            raise ChainError("Rpc", {"message": "no answer"})

        async def watch() -> None:
            with pytest.raises(ChainError):
                await Agent._moved(town, JOB, RELIEF)
            failed.set()
            await asyncio.Event().wait()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engagement, "advance", lambda self, now: None)
            patch.setattr(town, "now", fails)
            spare.task = asyncio.create_task(watch())
            await failed.wait()
            assert town._spares == {JOB: spare}
            patch.undo()
            patch.setattr(Engagement, "advance", lambda self, now: None)
            await Agent._moved(town, JOB, RELIEF)
        assert spare.task.cancelled() and not town._spares

    asyncio.run(within(60, story()))
