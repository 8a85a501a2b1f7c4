"""Demands in Python and in the EVM: the same prices, deadlines and refusals, and the same answers taken."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from bench._court import CLOCK_SECONDS, GAS_RATE, GRACE_SECONDS
from bench._market import (
    CHALLENGER,
    LONG_TOKENS,
    REQUESTS,
    SHORT_TOKENS,
    STRANGER,
    WORKERS,
    Batch,
    Market,
    serve,
    write_model,
)
from contracts.abi import encode_struct
from contracts.client import Chain, ChainError
from contracts.events import DemandOpened
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.commit import RequestsTree
from verifier.demand import (
    Demand,
    Demanded,
    DemandError,
    Wanted,
    answer_gas,
    answer_tokens,
    answer_trace,
    deadline,
    grid_of,
    price,
    read_answer,
)
from verifier.keccak import keccak256
from verifier.referee.codec import Opening
from verifier.referee.errors import RefereeError
from verifier.weights import Weights

ROUNDS = 40


@dataclass
class Counter:
    """Both sides of demands on one committed job."""

    devnet: Devnet
    market: Market
    batch: Batch

    @property
    def demander(self) -> Chain:
        return self.market.chain(CHALLENGER)

    def answer(self, demand: Demand) -> tuple[Opening, ...]:
        """What an honest worker posts."""
        r, served = demand.request, self.batch.served
        if demand.kind == Wanted.PROMPT:
            return answer_tokens(demand, RequestsTree(REQUESTS).record_opening(r), REQUESTS[r].prompt)
        if demand.kind == Wanted.OUTPUT:
            return answer_tokens(demand, served.outputs_tree.opening(r), (SHORT_TOKENS, LONG_TOKENS)[r])
        node = served.stage_trees[demand.stage].opening(r)
        return answer_trace(demand, node, served.traces[r][demand.stage], self.batch.model)

    def read(self, demand: Demand, openings: Sequence[Opening]) -> None:
        """By the twin."""
        served = self.batch.served
        roots = {Wanted.PROMPT: RequestsTree(REQUESTS).root, Wanted.OUTPUT: served.outputs_tree.root}
        root = roots.get(Wanted(demand.kind), served.stage_trees[demand.stage].root)
        layers = (demand.stage, demand.stage + 1)
        read_answer(demand, self.batch.model, layers, root, len(REQUESTS), openings)

    def opened(self, id: bytes) -> Demanded:
        chain = self.demander
        events = chain.events(max(0, chain.block_number() - 5))
        return next(e.demanded for e in events if isinstance(e, DemandOpened) and e.id == id)


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counter]:
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        demander = market.chain(CHALLENGER)
        demander.token.approve(market.addresses.demands, 10**30)
        yield Counter(devnet, market, market.batch(True, serve(weights)))


def drawn(chance: random.Random, job: bytes) -> Demand:
    """A demand of any kind, now and then of something that is not there."""
    kind = chance.choice((*Wanted, Wanted.LEAVES, Wanted.LEAVES))
    stage = chance.randrange(2)
    tensor = chance.randrange(8) if kind == Wanted.LEAVES else chance.choice((0, 0, 0, 0, 1))
    first = chance.choice((0, 1, chance.randrange(40), chance.randrange(2000), 2**64 - 1))
    count = chance.choice((1, 2, 3, 7, chance.randrange(300)))
    return Demand(job, stage, kind, chance.randrange(2), tensor, first, count)


def changed(chance: random.Random, openings: tuple[Opening, ...]) -> tuple[Opening, ...]:
    """The openings with one thing wrong."""
    place = chance.randrange(len(openings))
    opening, what = openings[place], chance.randrange(6)
    data, siblings = opening.data, opening.siblings
    at = chance.randrange(len(data))
    changes = {
        0: replace(opening, data=data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]),
        1: replace(opening, data=data[:-1]),
        2: replace(opening, data=data + b"\x00"),
        3: replace(opening, siblings=siblings[:-1] if siblings else (bytes(32),)),
        4: replace(opening, siblings=(*siblings, bytes(32))),
    }
    if what == 5:
        return chance.choice((openings[:-1], (*openings, opening)))
    return (*openings[:place], changes[what], *openings[place + 1 :])


@pytest.mark.parametrize("seed", range(3))
def test_both_price_refuse_and_take_the_same(counter: Counter, seed: int) -> None:
    chance, batch, demander = random.Random(seed), counter.batch, counter.demander
    taken = refused = 0
    for _ in range(ROUNDS):
        demand = drawn(chance, batch.job)
        try:
            grid = grid_of(demand, batch.model, demand.stage, demand.stage + 1)
        except DemandError as error:
            with pytest.raises(ChainError, match=type(error).__name__):
                demander.demands.price_of(demand, batch.model)
            refused += 1
            continue
        pay = answer_gas(demand, grid) * GAS_RATE
        assert demander.demands.price_of(demand, batch.model) == price(pay, 0)
        id = keccak256(encode_struct("Demand", demand))
        if any(demander.demands.state_of(id)):
            continue
        assert demander.demands.demand(demand, batch.model, price(pay, 0)) == id
        held = counter.opened(id)
        assert held == Demanded(
            demand,
            demander.account,
            held.opened_at,
            deadline(held.opened_at, CLOCK_SECONDS, GRACE_SECONDS, 0),
            pay,
            price(pay, 0) - pay,
        )
        assert demander.demands.state_of(id) == keccak256(encode_struct("Demanded", held))
        openings, worker = counter.answer(demand), counter.market.chain(WORKERS[demand.stage])
        for _ in range(2):
            wrong = changed(chance, openings)
            with pytest.raises((DemandError, RefereeError)) as told:
                counter.read(demand, wrong)
            with pytest.raises(ChainError, match=told.type.__name__):
                worker.demands.answer(id, held, batch.model, wrong)
        counter.read(demand, openings)
        worker.demands.answer(id, held, batch.model, openings)
        taken += 1
    assert taken > 10 and refused > 3


def test_prices_double_with_what_is_queued(counter: Counter) -> None:
    batch, demander = counter.batch, counter.demander
    queued, held = 0, []
    for k in range(7):
        demand = Demand(batch.job, 1, Wanted.LEAVES, 1, 0, 1000 + k, 128)
        gas = answer_gas(demand, grid_of(demand, batch.model, 1, 2))
        most = price(gas * GAS_RATE, queued)
        assert demander.demands.price_of(demand, batch.model) == most
        with pytest.raises(ChainError, match="PriceTooHigh"):
            demander.demands.demand(demand, batch.model, most - 1)
        id = demander.demands.demand(demand, batch.model, most)
        held.append((id, counter.opened(id)))
        opened = held[-1][1]
        assert opened.deadline == deadline(opened.opened_at, CLOCK_SECONDS, GRACE_SECONDS, k)
        queued += gas
    assert queued > 20_000_000
    counter.devnet.pass_seconds(CLOCK_SECONDS + 8 * GRACE_SECONDS)
    stranger = counter.market.chain(STRANGER)
    with pytest.raises(ChainError, match="TooLate"):
        counter.market.chain(WORKERS[1]).demands.answer(*held[0], batch.model, counter.answer(held[0][1].demand))
    for id, demanded in held:
        stranger.demands.lapse(id, demanded)
    assert demander.demands.open_demands(batch.job, 1) == 0
    assert demander.escrow.convicted(batch.job, 1)
