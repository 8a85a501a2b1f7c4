"""Defends this worker's jobs: follows the games against it in the chain's events and answers each when it is its turn.

All it needs is on disk and on chain, so a restarted worker takes its games up where they stand.
"""

import asyncio
import logging
from collections.abc import Callable

from contracts.client import Chain, ContractsError
from contracts.events import GameEnded, GameMoved
from contracts.play import Followed, GameLog, Player
from verifier.canonical import Case
from verifier.game import Game, HandoffProof, NothingWrong, Segment, may_flag
from verifier.program import Kind
from verifier.referee.codec import BLOCK, Model
from verifier.tolerance import Profile
from verifier.weights import Weights
from worker.errors import WorkerError
from worker.handoff import prove_row, prove_token
from worker.job import JobFolder
from worker.retain import Traces

log = logging.getLogger("plumb.worker.respond")

RETRY_SECONDS = 2.0  # before a move that failed is tried again


class Responder(Player):
    """Answers games whose `worker` is `account`. `folder_of` finds a job's files."""

    def __init__(
        self,
        chain: Chain,
        account: str,
        model: Model,
        weights: Weights,
        profile: Profile,
        traces: Traces,
        folder_of: Callable[[bytes], JobFolder],
    ) -> None:
        super().__init__(chain, self.case, side_is_worker=True)
        self.account = account
        self.model = model
        self.weights = weights
        self.profile = profile
        self.traces = traces
        self.folder_of = folder_of
        self._log = GameLog()
        self._cases: dict[tuple[Segment, int], Case] = {}
        self._tasks: dict[bytes, asyncio.Task[None]] = {}  # what is being sent, one a game

    def feed(self, event: GameMoved | GameEnded) -> None:
        """A game's next event, in the chain's order."""
        if isinstance(event, GameMoved):
            if event.game.worker.lower() == self.account.lower():
                self._log.feed([event])
        elif event.id in self._log.games:
            outcome = "won" if event.convicted != event.stage else "LOST"
            job = event.job.hex()[:8]
            log.warning("game %s over job %s: %s (reason %d)", event.id.hex()[:8], job, outcome, event.reason)
            self.forget(event.id)

    def tick(self, now: int) -> None:
        """Answers every game that waits for us, flags whoever let its time run out. now: unix seconds."""
        self._tasks = {id: task for id, task in self._tasks.items() if not task.done()}
        for id, followed in self._log.games.items():
            ours = followed.game.worker_turn
            due = not self.is_speechless(followed) if ours else may_flag(followed.game, now)
            if due and id not in self._tasks:
                self._tasks[id] = asyncio.create_task(self._attempt(followed, now))

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def forget(self, id: bytes) -> None:
        """Of a game that has ended."""
        super().forget(id)
        self._log.forget(id)
        live = {_piece(followed.game) for followed in self._log.games.values()}
        self._cases = {piece: case for piece, case in self._cases.items() if piece in live}

    def case(self, game: Game) -> Case:
        """The truth about the judged piece, from our own trace; kept while the game lives."""
        piece = _piece(game)
        case = self._cases.get(piece)
        if case is None:
            folder = self.folder_of(game.segment.job)
            trace = self.traces.load(folder, game.segment.request)
            case = Case(self.model, self.weights, self.profile, game.segment, trace, game.token, game.sampling)
            self._cases[piece] = case
        return case

    def deflection(self, game: Game) -> HandoffProof:
        """The record that our predecessor signed, which puts the blame on it."""
        folder = self.folder_of(game.segment.job)
        state, segment = folder.load_state(), game.segment
        if state.received is None:
            return super().deflection(game)
        kind = Kind(segment.kind)
        if kind is Kind.EMBED:
            index = segment.position - len(folder.load_requests()[segment.request].prompt)
            place, record, siblings = prove_token(dict(enumerate(state.tokens)), segment.request, index)
        elif kind in (Kind.LINK, Kind.LENGTH):
            block = segment.unit // BLOCK if kind is Kind.LINK else 0
            if segment.position >= (held := state.nodes[segment.request].positions):
                raise NothingWrong(f"{segment}: we hold {held} positions")
            rows = (self.traces.inputs(folder, r) for r in range(len(state.nodes)))
            place, record, siblings = prove_row(rows, segment.request, segment.position, block)
        else:
            raise NothingWrong(f"{segment}: not a segment that a hand-off can shift")
        return HandoffProof(
            state.received.root, state.received.leaves, place, record, siblings, state.received.signature
        )

    async def _attempt(self, followed: Followed, now: int) -> None:
        name = followed.id.hex()[:8]
        try:
            if await asyncio.to_thread(self._step, followed, now):
                log.info("game %s: answered %s", name, followed.game.phase.name)
            return
        except (ContractsError, WorkerError, ValueError, OSError) as error:
            log.error("game %s: %s: %s", name, type(error).__name__, error)
        except Exception:  # one game's fault must not cost the others anything
            log.exception("game %s", name)
        await asyncio.sleep(RETRY_SECONDS)

    def _step(self, followed: Followed, now: int) -> bool:
        """SAFETY: whether our own time is over is for the chain's clock alone to say. A worker whose clock is fast
        would fall silent, and be convicted for that.
        """
        return self.step(followed, self.chain.block_timestamp() if followed.game.worker_turn else now)


def _piece(game: Game) -> tuple[Segment, int]:
    return game.segment, game.token
