"""Defends this worker's jobs: follows the games against it in the chain's events and answers each when it is its turn.

All it needs is on disk and on chain, so a restarted worker takes its games up where they stand.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from eth_utils.crypto import keccak

from contracts.client import Chain, ChainError, ContractsError
from contracts.events import GameEnded, GameMoved
from verifier.canonical import Case
from verifier.game import Game, HandoffProof, Move, NothingWrong, Phase, Proof, may_flag, solve
from verifier.program import Kind
from verifier.referee.codec import Model
from verifier.tolerance import Profile
from verifier.trace import RequestTrace
from verifier.weights import Weights
from worker.errors import WorkerError
from worker.handoff import prove_row, prove_token
from worker.job import JobFolder
from worker.recorder import trace_path

log = logging.getLogger("plumb.worker.respond")

RETRY_SECONDS = 2.0  # before a move that failed is tried again

SETTLED = ("WrongState", "GameExists", "UnknownCommitment")  # the game moved on while we wrote


@dataclass
class _Following:
    """A live game: its latest state, what was posted last, and the challenger's first list."""

    game: Game
    list: bytes
    steps: bytes
    case: Case | None = None
    answered: Game | None = None  # the state that we moved from last, or found nothing to answer to
    task: asyncio.Task[None] | None = None


class Indefensible(WorkerError):
    """There is no honest answer: what we served is wrong."""


class Responder:
    """Answers games whose `worker` is `account`. `folder_of` finds a job's files."""

    def __init__(
        self,
        chain: Chain,
        account: str,
        model: Model,
        weights: Weights,
        profile: Profile,
        folder_of: Callable[[bytes], JobFolder],
    ) -> None:
        self.chain = chain
        self.account = account
        self.model = model
        self.weights = weights
        self.profile = profile
        self.folder_of = folder_of
        self._games: dict[bytes, _Following] = {}

    @property
    def open_games(self) -> dict[bytes, Game]:
        return {id: following.game for id, following in self._games.items()}

    def moved(self, event: GameMoved) -> None:
        """A state of a game, in the chain's order."""
        if event.game.worker.lower() != self.account.lower():
            return
        following = self._games.get(event.id)
        if following is None:
            self._games[event.id] = _Following(event.game, event.list, event.list)
        else:
            following.game, following.list = event.game, event.list

    def ended(self, event: GameEnded) -> None:
        following = self._games.pop(event.id, None)
        if following is not None:
            outcome = "won" if event.convicted != event.stage else "LOST"
            log.warning(
                "game %s over job %s: %s (reason %d)", event.id.hex()[:8], event.job.hex()[:8], outcome, event.reason
            )

    def tick(self, now: int) -> None:
        """Answers every game that waits for us, flags whoever let its time run out. now: unix seconds."""
        for id, following in self._games.items():
            if following.task is not None and not following.task.done():
                continue
            game = following.game
            if game.worker_turn and following.answered != game:
                following.task = asyncio.create_task(self._attempt(id, following, self.respond))
            elif not game.worker_turn and may_flag(game, now):
                following.task = asyncio.create_task(self._attempt(id, following, self._flag))

    async def stop(self) -> None:
        tasks = [f.task for f in self._games.values() if f.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------- one answer

    def respond(self, id: bytes, game: Game, posted: bytes, steps: bytes) -> None:
        """Computes our answer and sends it. Blocking. Raises Indefensible."""
        if game.phase == Phase.HANDOFF:
            self.chain.disputes.deflect(id, game, self.deflection(game))
            return
        answer = self.solve(game, posted, steps)
        if isinstance(answer, Proof):
            self.chain.disputes.prove(id, game, answer)
        else:
            self.chain.disputes.descend(id, game, answer)

    def solve(self, game: Game, posted: bytes, steps: bytes) -> Move | Proof:
        """Our move. Raises Indefensible."""
        try:
            return solve(game, posted, self.case(game), steps)
        except NothingWrong as error:
            raise Indefensible(f"{game.segment}: {error}") from error

    def case(self, game: Game) -> Case:
        """The truth about the judged piece, from our own trace; kept while the game lives."""
        following = next((f for f in list(self._games.values()) if f.game.segment == game.segment), None)
        if following is not None and following.case is not None:
            return following.case
        folder = self.folder_of(game.segment.job)
        trace = RequestTrace.load(trace_path(folder.path, game.segment.request), self.weights.shape)
        case = Case(self.model, self.weights, self.profile, game.segment, trace, None, game.token, game.sampling)
        if following is not None:
            following.case = case
        return case

    def deflection(self, game: Game) -> HandoffProof:
        """The record that our predecessor signed, which puts the blame on it. Raises Indefensible without one."""
        folder = self.folder_of(game.segment.job)
        state, segment = folder.load_state(), game.segment
        if state.received is None:
            raise Indefensible(f"{segment}: no signed hand-off of a predecessor")
        kind = Kind(segment.kind)
        if kind is Kind.EMBED:
            index = segment.position - len(folder.load_requests()[segment.request].prompt)
            place, record, siblings = prove_token(dict(enumerate(state.tokens)), segment.request, index)
        elif kind in (Kind.LINK, Kind.LENGTH):
            requests = range(len(state.nodes))
            traces = [RequestTrace.load(trace_path(folder.path, r), self.weights.shape) for r in requests]
            rows = [trace.arrays[f"{trace.first_layer}.h"] for trace in traces]
            block = segment.unit if kind is Kind.LINK else 0
            if segment.position >= len(rows[segment.request]):
                raise Indefensible(f"{segment}: we hold {len(rows[segment.request])} positions")
            place, record, siblings = prove_row(rows, segment.request, segment.position, block)
        else:
            raise Indefensible(f"{segment}: not a segment that a hand-off can shift")
        return HandoffProof(
            state.received.root, state.received.leaves, place, record, siblings, state.received.signature
        )

    # ---------------------------------------------------------------------------------------------------------------

    def _flag(self, id: bytes, game: Game, posted: bytes, steps: bytes) -> None:
        self.chain.disputes.flag(id, game)

    async def _attempt(
        self, id: bytes, following: _Following, act: Callable[[bytes, Game, bytes, bytes], None]
    ) -> None:
        game, posted = following.game, following.list
        if keccak(following.steps) != game.steps and game.phase != Phase.HANDOFF:
            log.error("game %s: we missed its first list", id.hex()[:8])
            return
        try:
            await asyncio.to_thread(act, id, game, posted, following.steps)
            following.answered = game
            log.info("game %s: answered %s", id.hex()[:8], Phase(game.phase).name)
        except Indefensible as error:
            following.answered = game  # nothing will change; the clock runs out
            log.error("game %s: %s", id.hex()[:8], error)
        except ChainError as error:
            if error.name in SETTLED:
                log.info("game %s: %s", id.hex()[:8], error)
            else:
                log.error("game %s: refused: %s", id.hex()[:8], error)
            await asyncio.sleep(RETRY_SECONDS)
        except (ContractsError, WorkerError, ValueError, OSError) as error:
            log.error("game %s: %s: %s", id.hex()[:8], type(error).__name__, error)
            await asyncio.sleep(RETRY_SECONDS)
