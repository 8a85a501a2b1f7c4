"""Disputes on a local chain: an honest worker wins against false accusations, and shifts blame not its own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contracts.client import Status, challenge_id
from contracts.events import GameEnded, GameMoved, JobVoided
from contracts.play import Followed
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Tiny, within
from tests.worker.village import CLOCK_SECONDS, WINDOW_SECONDS, Village
from verifier import link
from verifier.canonical import Case
from verifier.commit import Request, StageTree
from verifier.game import WRONG, Game, HandoffProof, Move, NothingWrong, Phase, Proof, Segment
from verifier.program import Kind
from verifier.referee.codec import Opening, Trace, decode_vector, encode_vector, slices
from verifier.referee.tree import Tree
from verifier.trace import RequestTrace
from worker import respond
from worker.agent import Agent, build_worker
from worker.batch import Batch
from worker.cache import Cache
from worker.config import WorkerConfig
from worker.recorder import trace_path
from worker.respond import Responder
from worker.stage import Captured, Stage

ACCOUNT = "0x" + "ab" * 20
SALT = bytes(32)
GAME = b"\x05" * 32
ANSWER = Move(b"", (), 0, b"", b"")


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


class Disputes:
    """Takes every move, and says which."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def descend(self, id: bytes, game: Game, move: Move) -> None:
        self.sent.append(move)

    def flag(self, id: bytes, game: Game) -> None:
        self.sent.append("flag")


class Prepared(Responder):
    """Has its answers ready; the chain's clock stands at 1000 seconds."""

    def __init__(self, answers: list[Any], account: str = ACCOUNT) -> None:
        self.disputes, self.answers, self.asked = Disputes(), answers, 0
        chain: Any = SimpleNamespace(disputes=self.disputes, block_timestamp=lambda: 1000)
        nothing: Any = None
        super().__init__(chain, account, nothing, nothing, nothing, nothing, nothing)

    def answer(self, followed: Followed) -> Move | Proof | HandoffProof:
        self.asked += 1
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        answer: Move = found
        return answer


def moved(worker: str = ACCOUNT, turn_started: int = 990, seconds: int = 100, worker_turn: bool = True) -> GameMoved:
    """A state of a game whose side to move has `seconds` left."""
    zero: dict[str, Any] = dict.fromkeys(
        (
            *("program_leaves", "token", "first_instruction", "step", "level", "index", "first_chunk", "end_chunk"),
            *("worker_moves", "challenger_moves", "committed_at", "bond", "gas_rate", "grace"),
        ),
        0,
    )
    roots: dict[str, Any] = dict.fromkeys(("model_id", "rule", "steps", "list", "sampling"), bytes(32))
    trace = Trace(bytes(32), 0, 0, 0)
    segment = Segment(bytes(32), 1, int(Kind.MLP), 0, 0, 0, 0)
    place_and_turn: dict[str, Any] = {
        **{"segment": segment, "challenger": "0x", "worker": worker, "trace": trace},
        **{"phase": Phase.STEPS, "worker_turn": worker_turn, "turn_started": turn_started},
        **{"worker_seconds": seconds, "challenger_seconds": seconds},
    }
    game = Game(**place_and_turn, **roots, **zero)
    place: dict[str, Any] = {"contract": "Disputes", "block": 1, "log_index": 0, "transaction": bytes(32)}
    return GameMoved(id=GAME, job=bytes(32), mover="", game=game, list=b"", place=0, **place)


def ticks(responder: Responder, now: int, count: int = 1) -> None:
    async def story() -> None:
        for _ in range(count):
            responder.tick(now)
            while any(not task.done() for task in responder._tasks.values()):
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_a_worker_whose_own_clock_is_fast_answers_all_the_same() -> None:
    responder = Prepared([ANSWER])
    responder.feed(moved())
    ticks(responder, now=1_000_000)
    assert responder.disputes.sent == [ANSWER]


def test_a_worker_whose_time_is_over_sends_nothing() -> None:
    responder = Prepared([ANSWER])
    responder.feed(moved(turn_started=800))
    ticks(responder, now=1000)
    assert (responder.disputes.sent, responder.asked) == ([], 0)


def test_a_late_challenger_is_flagged_and_one_in_time_is_not() -> None:
    for now, sent in ((1090, []), (1091, ["flag"])):
        responder = Prepared([])
        responder.feed(moved(worker_turn=False))
        ticks(responder, now)
        assert responder.disputes.sent == sent


def test_games_of_others_concern_nobody_here() -> None:
    responder = Prepared([ANSWER])
    responder.feed(moved(worker="0x" + "33" * 20))
    ticks(responder, now=1000)
    assert responder.asked == 0
    responder = Prepared([ANSWER], account=ACCOUNT.upper().replace("0X", "0x"))
    responder.feed(moved())
    ticks(responder, now=1000)
    assert responder.asked == 1


def test_what_fails_is_tried_again_and_what_has_no_answer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "RETRY_SECONDS", 0.0)
    responder = Prepared([OSError("disk"), KeyError("a fault of ours"), ANSWER])
    responder.feed(moved())
    ticks(responder, now=1000, count=3)
    assert (responder.disputes.sent, responder.asked) == ([ANSWER], 3)
    responder = Prepared([NothingWrong("all is true"), ANSWER])
    responder.feed(moved())
    ticks(responder, now=1000, count=3)
    assert (responder.disputes.sent, responder.asked) == ([], 1)


def test_an_ended_game_is_forgotten() -> None:
    responder = Prepared([ANSWER])
    responder.feed(moved())
    place: dict[str, Any] = {"contract": "Disputes", "block": 2, "log_index": 0, "transaction": bytes(32)}
    responder.feed(GameEnded(id=GAME, job=bytes(32), stage=1, convicted=255, reason=1, **place))
    ticks(responder, now=1000)
    assert responder.asked == 0


def trace_of(agent: Agent, job: bytes, request: int) -> RequestTrace:
    return RequestTrace.load(trace_path(agent.folder(job).path, request), agent.stage.shape)


def case_of(village: Village, segment: Segment) -> Case:
    """The truth about a segment of stage 0."""
    agent = village.agents[segment.stage]
    trace = trace_of(agent, segment.job, segment.request)
    return Case(agent.model, agent.stage.weights, agent.responder.profile, segment, trace)


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
        nodes = slices(await asyncio.to_thread(village.requester.disputes.posted, moved), 32)
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

    asyncio.run(within(900, story()))


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
        segment = Segment(job, 1, int(Kind.LINK), 2, boundary, 7, 5)
        sent, received = (trace_of(agent, job, segment.request) for agent in village.agents[:2])
        model = village.agents[0].model

        def show() -> bytes:
            disputes = village.challenger.disputes
            disputes.commit(challenge_id(village.challenger.account, segment, SALT))
            devnet.mine()
            nodes = [node(agent, job, 2) for agent in village.agents[:2]]
            disputes.prepare(segment, model, [nodes[0], *link.premises(segment, sent)])
            evidence = [*nodes, *link.conclusion(segment, sent, received)]
            return disputes.show(segment, SALT, model, evidence)

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

    asyncio.run(within(900, story()))
