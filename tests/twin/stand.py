"""Where games of planted lies are played: a chain with jobs whose pieces are all wrong or all right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench._arena import Arena, Ended, Manners, Player, Silence
from bench._docket import DRAWN, ROUND
from bench._liar import Bluffer, Depth, Liar, Lie, Solver
from bench._market import CHALLENGER, REQUESTS, SHORT, Batch, Market, serve, write_model
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.canonical import Case
from verifier.game import Phase, Segment
from verifier.program import Kind
from verifier.referee.codec import vector_leaf_elements
from verifier.weights import Weights

MANNERS = [Manners(), *(Manners(**{each.name: True}) for each in fields(Manners))]


@dataclass
class Stand:
    """A chain with jobs: every piece of them wrong or right, greedy or drawn."""

    market: Market
    arena: Arena
    batches: dict[tuple[bool, bool], Batch]
    played: int = 0

    def piece(self, kind: Kind, guilty: bool) -> tuple[Batch, Segment, Case]:
        batch = self.batches[guilty, kind == Kind.SAMPLE]
        return (batch, *batch.piece(kind, guilty))

    def play(
        self,
        piece: tuple[Batch, Segment, Case],
        guilty: bool,
        liar: Liar,
        manners: Manners = Manners(),
        silence: Silence | None = None,
        bluffs: bool = False,
    ) -> Ended:
        """guilty: the worker lies, else the challenger; bluffs: with nonsense when it is caught."""
        if self.played % ROUND == 0:
            self.arena.put_back()
        self.played += 1
        batch, segment, truth = piece
        steps = b"".join((truth if guilty else liar).steps())
        id = self.arena.challenge(segment, batch.model, batch.evidence(segment), steps, manners)
        lies: Player = Bluffer(liar, self.played) if bluffs else Solver(liar)
        challenger, worker = (Solver(truth), lies) if guilty else (lies, Solver(truth))
        return self.arena.play(id, challenger, worker, (guilty, not guilty), manners, silence)


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[Stand]:
    """A stand with a model of its own. changes: of its config."""
    weights = Weights.open(write_model(folder, **changes), threads=1)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        market.chain(CHALLENGER).disputes.deposit(10**29)
        arena, served = Arena(devnet, market.addresses.disputes), serve(weights)
        asked = {False: REQUESTS, True: (SHORT, DRAWN[0])}
        batches = {(g, d): market.batch(g, served, asked[d]) for g in (True, False) for d in (True, False)}
        arena.keep()
        yield Stand(market, arena, batches)
        arena.close()


def told(number: int, lie: Lie) -> Lie:
    """Small lies and large ones."""
    return replace(lie, delta=lie.delta << (40 if number % 3 == 0 else 0))


def assert_at(end: Ended, lie: Lie, truth: Case) -> None:
    """The game came down to the place of the lie."""
    game, wide = end.last, bool(truth.instructions[lie.step].wide)
    assert game is not None
    if game.phase == Phase.STEPS:  # a worker that denies a root has nothing to post beneath it
        assert lie.depth == Depth.ROOT
        return
    assert game.step == lie.step
    if game.phase == Phase.ELEMENTS:
        assert game.index == lie.element // vector_leaf_elements(wide)
    elif game.phase == Phase.SUMS:
        assert game.index == lie.element
        assert game.first_chunk <= lie.chunk < game.end_chunk or lie.depth != Depth.CHUNK
    else:
        assert lie.depth < Depth.ELEMENT and game.phase == Phase.NODES
    if lie.depth == Depth.CHUNK:
        assert game.phase == (Phase.SUMS if truth.chunks(lie.step) > 1 else Phase.ELEMENTS)


class Mute:
    """Has nothing to say."""

    def answer(self, game: object, posted: bytes, steps: bytes) -> None:
        return None
