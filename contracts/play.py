"""Playing one side of the games on chain: follow their events, answer when it is one's turn, flag an opponent who is
late.

Both sides play alike, so workers and watchtowers share this. What is true comes from outside: a `Case` for a game.
Every call may be repeated after a crash: what is already on chain is never sent twice, for a move only fits the state
it answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.client import Chain, ChainError
from contracts.events import Event, GameEnded, GameMoved
from verifier.game import (
    Game,
    HandoffProof,
    Move,
    NothingWrong,
    Phase,
    Proof,
    is_posted,
    may_flag,
    remaining_seconds,
    solve,
)

if TYPE_CHECKING:  # Rationale: following games needs no torch
    from verifier.canonical import Case

log = logging.getLogger("plumb.play")

NOBODY = 255  # GameEnded.convicted where the challenger lost

# Errors that mean somebody was faster, or the node lags behind: the next look at the chain settles it.
OVERTAKEN = ("WrongState", "FlagNotFallen", "FlagFallen")


@dataclass(frozen=True)
class Followed:
    """A live game as its events tell it. last: its last move; first: that which posted the instruction roots."""

    id: bytes
    last: GameMoved
    first: GameMoved

    @property
    def game(self) -> Game:
        return self.last.game


@dataclass
class GameLog:
    """Games seen so far, by id: the live ones, and how others ended (one that is shown may end without ever moving)."""

    games: dict[bytes, Followed] = field(default_factory=dict)
    ended: dict[bytes, GameEnded] = field(default_factory=dict)

    def feed(self, events: Iterable[Event]) -> None:
        """Adds events in the order of the chain. Feeding the same blocks again, up to the same head or beyond, leads
        to the same state, or to what a reorganised chain made of it.
        """
        for event in events:
            if isinstance(event, GameMoved):
                known = self.games.get(event.id)
                first = event if event.game.phase == Phase.STEPS or known is None else known.first
                self.games[event.id] = Followed(event.id, event, first)
                self.ended.pop(event.id, None)
            elif isinstance(event, GameEnded):
                self.games.pop(event.id, None)
                self.ended[event.id] = event

    def forget(self, id: bytes) -> None:
        self.games.pop(id, None)
        self.ended.pop(id, None)


class Player:
    """One side. `case_of` gives the truth of a game, `side_is_worker` tells which turn is ours."""

    def __init__(self, chain: Chain, case_of: Callable[[Game], Case], side_is_worker: bool) -> None:
        self.chain = chain
        self.case_of = case_of
        self.side_is_worker = side_is_worker
        self._speechless: dict[bytes, Game] = {}  # states that we have no answer to

    def answer(self, followed: Followed) -> Move | Proof | HandoffProof:
        """What is to be said on our turn.

        Raises NothingWrong if that is nothing (the opponent's list is true: only its mistake, or ours, leads there),
        what `case_of` raises, ContractsError where the node does not tell what was posted, ValueError for a list that
        is not of the game.
        """
        game = followed.game
        if game.phase == Phase.HANDOFF:
            return self.deflection(game)
        posted, steps = self.chain.disputes.posted(followed.last), self.chain.disputes.posted(followed.first)
        if not is_posted(game, posted):
            raise ValueError(f"expected the list of the game's last move, got {len(posted)} other bytes")
        return solve(game, posted, self.case_of(game), steps)

    def deflection(self, game: Game) -> HandoffProof:
        """A signed hand-off that puts the blame on its sender. Only workers have any. Raises NothingWrong."""
        raise NothingWrong(f"expected a signed hand-off to show for {game.segment}, have none")

    def is_speechless(self, followed: Followed) -> bool:
        """Whether there was found to be no answer to this state."""
        return self._speechless.get(followed.id) == followed.game

    def step(self, followed: Followed, now: int) -> bool:
        """Makes the move that is due, if any. now: the latest block's timestamp. Returns whether something was sent.

        Raises what `answer` raises but for NothingWrong, and ContractsError.
        """
        game = followed.game
        ours = game.worker_turn == self.side_is_worker
        try:
            if not ours:
                if not may_flag(game, now):
                    return False
                self.chain.disputes.flag(followed.id, game)
                return True
            if remaining_seconds(game, now) < 0 or self.is_speechless(followed):
                return False  # no move is taken any more once our own flag has fallen
            answer = self.answer(followed)
            match answer:
                case HandoffProof():
                    self.chain.disputes.deflect(followed.id, game, answer)
                case Proof():
                    self.chain.disputes.prove(followed.id, game, answer)
                case Move():
                    self.chain.disputes.descend(followed.id, game, answer)
        except NothingWrong as reason:
            log.error("game %s: nothing to answer: %s", followed.id.hex(), reason)
            self._speechless[followed.id] = game
            return False
        except ChainError as error:
            if error.name not in OVERTAKEN:
                raise
            log.info("game %s: %s", followed.id.hex(), error)
            return False
        return True

    def forget(self, id: bytes) -> None:
        self._speechless.pop(id, None)
