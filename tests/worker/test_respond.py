"""Disputes on a local chain: an honest worker wins against false accusations, and shifts blame not its own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contracts.client import Status, challenge_id
from contracts.events import GameEnded, GameMoved, JobVoided
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Tiny
from tests.worker.village import CLOCK_SECONDS, WINDOW_SECONDS, Village
from verifier.canonical import Case
from verifier.commit import Request, StageTree
from verifier.game import WRONG, Move, Segment
from verifier.program import Kind
from verifier.referee.codec import Opening, decode_vector, encode_vector, slices
from verifier.referee.tree import Tree
from verifier.trace import RequestTrace
from worker.agent import Agent, build_worker
from worker.batch import Batch
from worker.cache import Cache
from worker.config import WorkerConfig
from worker.recorder import trace_path
from worker.stage import Captured, Stage

SALT = bytes(32)


class Diverting(Stage):
    """Hands on other rows than it computed."""

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        out, captured = super().forward(hidden, batch, cache)
        return out + 1, captured


def build(index: int, config: WorkerConfig) -> Agent:
    return build_worker(config, stage_class=Diverting if index == 0 else Stage)


@pytest.fixture
def devnet() -> Iterator[Devnet]:
    with Devnet() as made:
        yield made


def trace_of(agent: Agent, job: bytes, request: int) -> RequestTrace:
    return RequestTrace.load(trace_path(agent.folder(job).path, request), agent.stage.shape)


def case_of(village: Village, segment: Segment, next_stage: int | None = None) -> Case:
    """The truth about a segment of stage 0 or, with `next_stage`, about the boundary to it."""
    agent = village.agents[segment.stage if next_stage is None else next_stage - 1]
    following = None if next_stage is None else trace_of(village.agents[next_stage], segment.job, segment.request)
    trace = trace_of(agent, segment.job, segment.request)
    return Case(agent.model, agent.stage.weights, agent.responder.profile, segment, trace, following)


def node(agent: Agent, job: bytes, request: int) -> Opening:
    return StageTree(agent.folder(job).load_state().nodes).opening(request)


def header(agent: Agent, kind: Kind) -> Opening:
    program = agent.stage.weights.program
    return Opening(program.headers[kind].encode(), tuple(program.tree.prove(int(kind))))


def accuse(village: Village, segment: Segment, steps: bytes) -> bytes:
    """Challenges stage `segment.stage` with these instruction roots. Blocking."""
    disputes, agent = village.challenger.disputes, village.agents[segment.stage]
    disputes.commit(challenge_id(village.challenger.account, segment, SALT))
    village.devnet.mine()
    evidence = [node(agent, segment.job, segment.request), header(agent, Kind(segment.kind))]
    return disputes.challenge(segment, SALT, agent.model, evidence, steps)


async def ending(village: Village, game: bytes, seconds: float = 300.0) -> GameEnded:
    for _ in range(int(seconds / 0.2)):
        events = await asyncio.to_thread(lambda: list(village.requester.events(0)))
        for event in events:
            if isinstance(event, GameEnded) and event.id == game:
                return event
        await asyncio.sleep(0.2)
    raise AssertionError("the game did not end")


async def moved_by(village: Village, game: bytes, mover: str) -> GameMoved:
    """The first move of that account."""
    for _ in range(3000):
        for event in await asyncio.to_thread(lambda: list(village.requester.events(0))):
            if isinstance(event, GameMoved) and event.id == game and event.mover == mover:
                return event
        await asyncio.sleep(0.2)
    raise AssertionError(f"no move by {mover}")


def test_an_honest_worker_wins_by_proof_and_by_flag(
    devnet: Devnet, tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    village = Village(devnet, tmp_path, tiny[0])
    village.settle_in()

    async def story() -> None:
        await village.wake()
        job = await village.open(requests_batch)
        await village.reaches(job, Status.COMMITTED)

        # False scores: the worker posts their nodes, the challenger a false leaf beneath one; the worker proves it.
        segment = Segment(job, 0, int(Kind.ATTEND), 2, 0, 20, 0)
        case = await asyncio.to_thread(case_of, village, segment)
        steps = await asyncio.to_thread(case.steps)
        game = await asyncio.to_thread(accuse, village, segment, b"".join([b"\x11" * 32, *steps[1:-1], WRONG]))
        moved = await moved_by(village, game, village.agents[0].account)
        nodes = slices(moved.list, 32)
        false_leaf = encode_vector([7, *decode_vector(case.leaf(0, 3), False)[1:]], False)
        move = Move(case.record(0), tuple(Tree(nodes).prove(3)), 3, nodes[3], false_leaf)
        await asyncio.to_thread(village.challenger.disputes.descend, game, moved.game, move)
        end = await ending(village, game)
        assert (end.convicted, end.reason) == (255, 1)

        # A false product is alleged while the worker restarts: it takes the game up, the challenger's flag falls.
        await village.sleep()
        village.agents = [build_worker(config) for config in village.configs]
        segment = Segment(job, 0, int(Kind.Q), 2, 0, 21, 1)
        steps = await asyncio.to_thread(case_of(village, segment).steps)
        false = b"".join([*steps[:3], b"\x11" * 32, *steps[4:-1], WRONG])
        game = await asyncio.to_thread(accuse, village, segment, false)
        village.agents = []
        await village.wake()
        await moved_by(village, game, village.agents[0].account)
        devnet.pass_seconds(CLOCK_SECONDS + 10)
        end = await ending(village, game)
        assert (end.convicted, end.reason) == (255, 2)
        await village.sleep()

    asyncio.run(asyncio.wait_for(story(), 900))


def test_a_receiver_shifts_the_blame_for_a_diverted_row(
    devnet: Devnet, tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """Stage 0 hands on other rows than its trace yields: at the boundary stage 1 deflects, stage 0 is convicted."""
    village = Village(devnet, tmp_path, tiny[0], build=build)
    village.settle_in()

    async def story() -> None:
        await village.wake()
        job = await village.open(requests_batch)
        await village.reaches(job, Status.COMMITTED)
        boundary = village.configs[0].end_layer - 1
        segment = Segment(job, 1, int(Kind.LINK), 2, boundary, 7, 0)
        case = case_of(village, segment, next_stage=1)

        def show() -> bytes:
            disputes = village.challenger.disputes
            disputes.commit(challenge_id(village.challenger.account, segment, SALT))
            devnet.mine()
            evidence = [
                node(village.agents[0], job, 2),
                node(village.agents[1], job, 2),
                header(village.agents[1], Kind.LINK),
                Opening(case.record(0), case.record_proof(0)),
                *case.openings(0, 0, 0),
            ]
            return disputes.show(segment, SALT, case.model, evidence)

        game = await asyncio.to_thread(show)
        end = await ending(village, game)
        assert (end.stage, end.convicted, end.reason) == (1, 0, 4)
        await village.reaches(job, Status.VOID)
        devnet.pass_seconds(WINDOW_SECONDS + 2)
        for _ in range(3000):  # the honest stage releases its lock by itself
            if village.requester.workers.locked_stake(village.agents[1].account) == 0:
                break
            await asyncio.sleep(0.1)
        assert village.requester.workers.locked_stake(village.agents[1].account) == 0
        assert any(isinstance(event, JobVoided) for event in village.requester.events(0))
        await village.sleep()

    asyncio.run(asyncio.wait_for(story(), 900))
