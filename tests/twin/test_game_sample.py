"""Games about a drawn token on a real EVM: a competitor that wins, a token not allowed, and false accusations."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench._liar import Liar, Lie
from bench._market import LONG, LONG_TOKENS, SHORT, Batch, Market, serve, write_model
from contracts.client import ChainError
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.twin.test_game import NOBODY, Table, lie_at
from verifier.canonical import Case
from verifier.game import WRONG, Segment
from verifier.program import Kind
from verifier.weights import Weights

PLACE = len(LONG_TOKENS) - 1
POSITION = len(LONG.prompt) + PLACE - 1
TOKEN = LONG_TOKENS[PLACE]
STEPS = 9
DRAWN = (
    replace(SHORT, temperature=1 << 16, seed=5),
    replace(LONG, temperature=40_000, top_k=200, top_p=60_000, seed=(1 << 64) - 3),
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    """The served tokens are any: under a tight margin most are wrong, under a loose one none."""
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    served = serve(weights)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        table = Table(devnet, market, market.batch(True, served, DRAWN), market.batch(False, served, DRAWN))
        yield table
        for name, moves in table.gas.items():
            print(f"\n{name}: {sum(m[1] for m in moves)} gas in {len(moves)} transactions:", *moves)


def segment_of(batch: Batch, unit: int, kind: Kind = Kind.SAMPLE) -> Segment:
    return batch.segment(kind, 1, 1, POSITION, unit)


def winner(batch: Batch) -> tuple[Segment, Case]:
    """A competitor that convicts the served token."""
    for unit in range(300):
        case = batch.case(segment_of(batch, unit), TOKEN)
        if unit != TOKEN and case.verdict():
            return segment_of(batch, unit), case
    raise AssertionError("expected a competitor that wins, got none")


@pytest.mark.parametrize("step", range(STEPS))
def test_a_token_that_another_beats_is_convicted_whatever_is_denied(table: Table, step: int) -> None:
    segment, truth = winner(table.guilty)
    steps = b"".join(truth.steps())
    liar = Liar(truth, [lie_at(truth, step)], wrong=False)
    game_id = table.open(table.guilty, segment, steps)
    name = f"SAMPLE step {step} {truth.instructions[step].op} (worker lies)"
    end = table.play(game_id, worker=liar, challenger=truth, steps=steps, name=name)
    assert end.convicted == 1


@pytest.mark.parametrize("unit", [17, TOKEN], ids=["a competitor", "its own membership"])
@pytest.mark.parametrize("step", range(STEPS))
def test_an_innocent_worker_wins_whatever_is_claimed(table: Table, step: int, unit: int) -> None:
    segment = segment_of(table.innocent, unit)
    truth = table.innocent.case(segment, TOKEN)
    assert not truth.verdict()
    liar = Liar(truth, [lie_at(truth, step)], wrong=True)
    steps = b"".join(liar.steps())
    assert steps[-32:] == WRONG
    game_id = table.open(table.innocent, segment, steps)
    name = f"SAMPLE step {step} {truth.instructions[step].op} (challenger lies)"
    end = table.play(game_id, worker=truth, challenger=liar, steps=steps, name=name)
    assert end.convicted == NOBODY


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 50}], ids=["top_k", "top_p"])
def test_a_token_that_was_not_allowed_is_convicted_by_its_own_membership(table: Table, filters: dict[str, int]) -> None:
    filtered = replace(DRAWN[1], top_k=filters.get("top_k", 0), top_p=filters.get("top_p", 65536))
    requests = (DRAWN[0], filtered)
    batch = table.market.batch(True, table.guilty.served, requests)
    segment = segment_of(batch, TOKEN)
    truth = batch.case(segment, TOKEN)
    assert truth.verdict()
    fold = 5 if "top_k" in filters else 6
    assert int(truth.vector(fold)[0]) > 0
    liar = Liar(truth, [Lie(fold, 0, truth.chunks(fold) - 1)], wrong=False)
    steps = b"".join(truth.steps())
    game_id = table.open(batch, segment, steps)
    assert table.play(game_id, worker=liar, challenger=truth, steps=steps).convicted == 1


def test_a_greedy_request_is_judged_by_token_and_a_drawn_one_by_sample(table: Table) -> None:
    batch = table.guilty
    greedy = table.market.batch(True, batch.served)
    with pytest.raises(ChainError, match="WrongSegment"):
        table.open(batch, segment_of(batch, 17, Kind.TOKEN), bytes(32 * 4) + WRONG)
    with pytest.raises(ChainError, match="WrongSegment"):
        table.open(greedy, segment_of(greedy, 17), bytes(32 * 8) + WRONG)


def test_a_unit_beyond_the_vocabulary_and_a_kind_without_a_program_are_refused(table: Table) -> None:
    batch = table.guilty
    with pytest.raises(ChainError, match="WrongSegment"):
        table.open(batch, segment_of(batch, 300), bytes(32 * 8) + WRONG)
    with pytest.raises(ChainError, match="WrongSegment"):
        table.open(batch, segment_of(batch, 0, Kind.STOP), bytes(32 * 8) + WRONG)
