"""Whole games on a real EVM: whichever side lies, about whatever instruction, loses to the one that tells the truth."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from bench._court import CLOCK_SECONDS, GAS_RATE
from bench._liar import Liar, Lie
from bench._market import (
    CHALLENGER,
    LONG_TOKENS,
    STRANGER,
    WORKERS,
    Batch,
    Market,
    serve,
    write_model,
)
from contracts.client import Chain, ChainError, challenge_id, game_hash
from contracts.events import GameEnded, GameMoved
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.canonical import Case
from verifier.game import WRONG, Game, Move, NothingWrong, Proof, Segment, solve
from verifier.program import Kind
from verifier.weights import Weights

NOBODY = 255
PROVED, FLAGGED = 1, 2
GAME_GAS, MOVE_GAS = 2_000_000, 350_000
POSITION = 597  # WSUM has 75 chunks here, two lists; MAX and SUM three


@dataclass
class Table:
    """A chain, a market on it, a guilty and an innocent batch."""

    devnet: Devnet
    market: Market
    guilty: Batch
    innocent: Batch
    salt: int = 0
    gas: dict[str, list[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def open(self, batch: Batch, segment: Segment, steps: bytes) -> bytes:
        """Commits and challenges; the game's id."""
        chain = self.market.chain(CHALLENGER)
        self.salt += 1
        salt = self.salt.to_bytes(32, "big")
        chain.disputes.commit(challenge_id(chain.account, segment, salt))
        self.devnet.mine()  # a node estimates gas as of its latest block, and the opening needs a later one
        return chain.disputes.challenge(segment, salt, batch.model, batch.evidence(segment), steps)

    def state(self, game_id: bytes) -> tuple[Game, bytes]:
        """The state after the last move and what was posted."""
        chain = self.market.chain(STRANGER)
        events = chain.events(max(0, chain.block_number() - 40))
        last = [e for e in events if isinstance(e, GameMoved) and e.id == game_id][-1]
        assert chain.disputes.state_of(game_id) == game_hash(last.game)
        return last.game, chain.disputes.posted(last)

    def end(self, game_id: bytes) -> GameEnded:
        chain = self.market.chain(STRANGER)
        events = chain.events(max(0, chain.block_number() - 20))
        (found,) = [e for e in events if isinstance(e, GameEnded) and e.id == game_id]
        return found

    def mover(self, game: Game) -> Chain:
        return self.market.chain(WORKERS[game.segment.stage] if game.worker_turn else CHALLENGER)

    def play(self, game_id: bytes, worker: Case, challenger: Case, steps: bytes, name: str = "") -> GameEnded:
        """To the end. Who has no move left, or only a false proof, runs out of time."""
        while True:
            game, posted = self.state(game_id)
            chain, case = self.mover(game), worker if game.worker_turn else challenger
            try:
                answer: Move | Proof | None = solve(game, posted, case, steps)
            except NothingWrong:
                answer = None
            if isinstance(answer, Move):
                chain.disputes.descend(game_id, game, answer)
                continue
            if answer is not None:
                try:
                    chain.disputes.prove(game_id, game, answer)
                    break
                except ChainError as error:
                    assert error.name == "NotWrong", error
            self.run_out(game_id, game)
            break
        if name:
            self.gas[name] = self.spent()
        return self.end(game_id)

    def run_out(self, game_id: bytes, game: Game) -> None:
        self.devnet.pass_seconds(CLOCK_SECONDS + 1)
        self.market.chain(STRANGER).disputes.flag(game_id, game)

    def spent(self) -> list[tuple[str, int, int]]:
        """(method, gas, calldata bytes) of the last game's transactions, in order."""
        sent = [r for index in (CHALLENGER, *WORKERS, STRANGER) for r in self.market.chain(index).receipts]
        sent = [r for r in sorted(sent, key=lambda r: r.block) if r.method.startswith("Disputes.")]
        first = max(i for i, r in enumerate(sent) if r.method == "Disputes.commit")
        return [(r.method.removeprefix("Disputes."), r.gas, r.calldata_bytes) for r in sent[first:]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    served = serve(weights)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        table = Table(devnet, market, market.batch(True, served), market.batch(False, served))
        yield table
        for name, moves in table.gas.items():
            print(f"\n{name}: {sum(m[1] for m in moves)} gas in {len(moves)} transactions:", *moves)


# Kind, stage, layer, unit. Unit 1 of hidden = 320 is the short block.
PLACES = {
    Kind.Q: (0, 0, 3),
    Kind.K: (0, 0, 1),
    Kind.V: (1, 1, 1),
    Kind.ATTEND: (1, 1, 1),
    Kind.MLP: (0, 0, 1),
    Kind.TOKEN: (1, 1, 17),
}
STEPS = {Kind.Q: 6, Kind.K: 6, Kind.V: 5, Kind.ATTEND: 8, Kind.MLP: 9, Kind.TOKEN: 5}
LIES = [(kind, step) for kind, count in STEPS.items() for step in range(count)]
_cases: dict[tuple[bool, Kind], tuple[Segment, Case]] = {}


def truth_of(batch: Batch, kind: Kind, tight: bool) -> tuple[Segment, Case]:
    """The segment and its truth, computed once for all lies."""
    if (tight, kind) not in _cases:
        stage, layer, unit = PLACES[kind]
        segment = batch.segment(kind, stage, layer, POSITION, unit)
        token = LONG_TOKENS[POSITION + 1 - 590] if kind == Kind.TOKEN else 0
        if kind == Kind.TOKEN and tight:
            segment = replace(segment, unit=_best(batch, segment, token))
        _cases[tight, kind] = segment, batch.case(segment, token)
    return _cases[tight, kind]


def _best(batch: Batch, segment: Segment, token: int) -> int:
    """A token with a larger logit than the served one."""
    for unit in range(300):
        if batch.case(replace(segment, unit=unit), token).verdict():
            return unit
    raise AssertionError("expected a competitor that wins, got none")


def lie_at(truth: Case, step: int) -> Lie:
    """A late element and chunk, where lists are uneven."""
    elements = len(truth.vector(step))
    return Lie(step, elements - 1 - elements // 3, truth.chunks(step) - 1)


def names(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value)


@pytest.mark.parametrize(("kind", "step"), LIES, ids=names)
def test_a_guilty_worker_is_convicted_whatever_it_denies(table: Table, kind: Kind, step: int) -> None:
    segment, truth = truth_of(table.guilty, kind, tight=True)
    assert truth.verdict()
    steps = b"".join(truth.steps())
    liar = Liar(truth, [lie_at(truth, step)], wrong=False)
    chain = table.market.chain(CHALLENGER)
    before = chain.disputes.credit(chain.account) + chain.token.balance(chain.account)
    assert chain.disputes.bond_for(segment.job, segment.stage) == GAME_GAS * GAS_RATE

    game_id = table.open(table.guilty, segment, steps)
    name = f"{kind.name} step {step} {truth.instructions[step].op} (worker lies)"
    end = table.play(game_id, worker=liar, challenger=truth, steps=steps, name=name)

    assert end.convicted == segment.stage
    assert chain.escrow.convicted(segment.job, segment.stage)
    assert chain.escrow.open_games(segment.job, segment.stage) == 0
    # The bond, taken from credit or account, returned as credit.
    assert chain.disputes.credit(chain.account) + chain.token.balance(chain.account) == before


@pytest.mark.parametrize(("kind", "step"), LIES, ids=names)
def test_an_innocent_worker_wins_whatever_is_claimed(table: Table, kind: Kind, step: int) -> None:
    segment, truth = truth_of(table.innocent, kind, tight=False)
    assert not truth.verdict()
    liar = Liar(truth, [lie_at(truth, step)], wrong=True)
    steps = b"".join(liar.steps())
    assert steps[-32:] == WRONG
    worker = table.market.chain(WORKERS[segment.stage])
    before = worker.disputes.credit(worker.account)

    game_id = table.open(table.innocent, segment, steps)
    name = f"{kind.name} step {step} {truth.instructions[step].op} (challenger lies)"
    end = table.play(game_id, worker=truth, challenger=liar, steps=steps, name=name)

    assert end.convicted == NOBODY
    assert not worker.escrow.convicted(segment.job, segment.stage)
    moves = sum(1 for method, _, _ in table.gas[name] if method in ("descend", "prove"))
    paid = worker.disputes.credit(worker.account) - before
    assert paid % (MOVE_GAS * GAS_RATE) == 0 and 1 <= paid // (MOVE_GAS * GAS_RATE) <= moves


def test_a_silent_worker_loses_and_a_silent_challenger_too(table: Table) -> None:
    for batch, tight, convicted in ((table.guilty, True, 0), (table.innocent, False, NOBODY)):
        segment, truth = truth_of(batch, Kind.Q, tight)
        liar = Liar(truth, [Lie(0)], wrong=not tight)
        steps = b"".join(truth.steps() if tight else liar.steps())
        game_id = table.open(batch, segment, steps)
        game, posted = table.state(game_id)
        if not tight:
            answer = solve(game, posted, truth, steps)
            assert isinstance(answer, Move)
            table.mover(game).disputes.descend(game_id, game, answer)
            game, _ = table.state(game_id)
        table.run_out(game_id, game)
        assert (table.end(game_id).convicted, table.end(game_id).reason) == (convicted, FLAGGED)
        with pytest.raises(ChainError, match="WrongState"):
            table.market.chain(STRANGER).disputes.flag(game_id, game)


def test_the_bond_doubles_and_returns(table: Table) -> None:
    segment, truth = truth_of(table.guilty, Kind.Q, tight=True)
    steps = b"".join(truth.steps())
    chain = table.market.chain(CHALLENGER)
    games = []
    for opened in range(5):
        assert chain.disputes.bond_for(segment.job, 0) == GAME_GAS * GAS_RATE * (2 if opened == 4 else 1)
        games.append(table.open(table.guilty, segment, steps))
    last, _ = table.state(games[-1])
    assert last.worker_seconds == CLOCK_SECONDS + 4 * 100
    table.devnet.pass_seconds(CLOCK_SECONDS + 500)
    for game_id in games:
        table.market.chain(STRANGER).disputes.flag(game_id, table.state(game_id)[0])
    owed = chain.disputes.credit(chain.account)
    before = chain.token.balance(chain.account)
    chain.disputes.withdraw()
    assert chain.token.balance(chain.account) == before + owed


def test_a_challenge_of_a_right_piece_is_refused_at_once(table: Table) -> None:
    segment, truth = truth_of(table.innocent, Kind.K, tight=False)
    with pytest.raises(ChainError, match="VerdictNotWrong"):
        table.open(table.innocent, segment, b"".join(truth.steps()))
