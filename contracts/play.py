"""Playing one side of the games on chain: follow their events, answer when it is one's turn, flag an opponent who is
late.

Both sides play alike, so workers and watchtowers share this. What is true comes from outside: a `Case` for a game.
Every call may be repeated
after a crash: what is already on chain is never sent twice, for a move only fits the state it answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from contracts.client import Chain, ChainError
from contracts.events import Event, GameEnded, GameMoved
from verifier.game import Game, Move, NothingWrong, Phase, Proof, may_flag, remaining_seconds, solve

if TYPE_CHECKING:  # Rationale: following games needs no torch
    from verifier.canonical import Case

log = logging.getLogger(__name__)

# Errors that mean somebody was faster, or the node lags behind: the next look at the chain settles it.
OVERTAKEN = {"WrongState", "FlagNotFallen", "FlagFallen", "NotYourTurn"}


@dataclass(frozen=True)
class Followed:
    """A game as its events tell it. list: what was posted last; steps: the challenger's instruction roots."""

    id: bytes
    game: Game
    list: bytes
    steps: bytes
    ended: GameEnded | None = None


@dataclass
class GameLog:
    """All games seen so far, by id."""

    games: dict[bytes, Followed] = field(default_factory=dict)

    def feed(self, events: Iterable[Event]) -> None:
        """Adds events in the order of the chain; events seen before change nothing for the worse."""
        for event in events:
            if isinstance(event, GameMoved):
                known = self.games.get(event.id)
                steps = event.list if event.game.phase == Phase.STEPS or known is None else known.steps
                self.games[event.id] = Followed(event.id, event.game, event.list, steps)
            elif isinstance(event, GameEnded) and event.id in self.games:
                self.games[event.id] = replace(self.games[event.id], ended=event)

    def open(self) -> list[Followed]:
        """Games without an end, the one whose turn has the least time left in front."""
        running = [followed for followed in self.games.values() if followed.ended is None]
        return sorted(running, key=lambda followed: remaining_seconds(followed.game, followed.game.turn_started))


class Player:
    """One side. `case_of` gives the truth of a game, `side_is_worker` tells which turn is ours."""

    def __init__(self, chain: Chain, case_of: Callable[[Game], Case], side_is_worker: bool) -> None:
        self.chain = chain
        self.case_of = case_of
        self.side_is_worker = side_is_worker

    def answer(self, followed: Followed) -> Move | Proof | None:
        """The move for our turn; None if there is none (the opponent's list is true: only its mistake, or ours,
        leads there).
        """
        try:
            return solve(followed.game, followed.list, self.case_of(followed.game), followed.steps)
        except NothingWrong as reason:
            log.error("game %s: nothing to answer: %s", followed.id.hex(), reason)
            return None

    def step(self, followed: Followed, now: int) -> bool:
        """Makes the move that is due, if any. now: the latest block's timestamp. Returns whether something was sent."""
        game = followed.game
        ours = game.worker_turn == self.side_is_worker
        try:
            if not ours:
                if not may_flag(game, now):
                    return False
                self.chain.disputes.flag(followed.id, game)
                return True
            if game.phase == Phase.HANDOFF:
                return self.deflect(followed)
            answer = self.answer(followed)
            if answer is None:
                return False
            if isinstance(answer, Proof):
                self.chain.disputes.prove(followed.id, game, answer)
            else:
                self.chain.disputes.descend(followed.id, game, answer)
        except ChainError as error:
            if error.name not in OVERTAKEN:
                raise
            log.info("game %s: %s", followed.id.hex(), error)
            return False
        return True

    def deflect(self, followed: Followed) -> bool:
        """Shows a signed hand-off, where one exists. Only workers have any."""
        return False
