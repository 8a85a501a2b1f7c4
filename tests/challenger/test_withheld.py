"""Stages that serve nothing, on a local chain: what they hide is demanded, and convicts them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import challenger.withheld
from bench._place import Defence, Place, Poster
from bench._town import CLOCK_SECONDS, FUNDS, Hall, Served, Town, model, say, serve, until
from challenger.agent import Agent
from challenger.desk import Desk, Task
from challenger.evidence import Evidence, Unavailable
from challenger.store import GameState, JobState
from contracts.client import ReceiptTimeout, Status
from contracts.events import DemandLapsed, DemandOpened, GameEnded, StageConvicted
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.challenger.cheats import coarse, made
from verifier.demand import Demand, Wanted

STAGE = 1  # the one with other weights
BUDGET = 10**9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("model")
    weights, profile = model(folder)
    with Devnet() as devnet, Hall() as hall:
        hall.misbehave = lambda handler, path: say(handler, b"", 503)
        town = Town(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), hall, weights, profile)
        town.settle_in()
        yield Place(devnet, town, folder, Path(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def honest(place: Place) -> Served:
    return serve(place.town.weights)


@pytest.fixture(scope="module")
def quantised(place: Place) -> Served:
    return serve(place.town.weights, make=made(coarse((STAGE,))))


def wait_out(place: Place, agent: Agent, job: bytes) -> None:
    """Until what is missing will not come: the downloads take real time."""
    agent.tick()
    place.devnet.pass_seconds(160)
    assert place.judged(agent, job) == JobState.WITHHELD


def test_a_quantised_stage_that_withholds_everything_is_convicted_from_the_roots(
    place: Place, quantised: Served
) -> None:
    config = place.config("roots", demand_budget=BUDGET)
    job = place.town.commit(quantised)
    agent, poster, defence = place.agent(config), Poster(place, quantised, config), Defence(place, quantised, config)
    wait_out(place, agent, job)
    states, seen = [], 0

    def closed() -> bool:
        nonlocal agent, seen
        agent.tick()
        row = agent.store.job(job.hex())
        if row is not None and row.state not in states:
            states.append(row.state)
        poster.post()
        defence.play()
        place.devnet.mine()
        happened = len(list(place.town.requester.events(config.from_block)))
        if happened > seen:  # killed at every step: all that counts is on chain
            seen = happened
            agent.store.close()
            agent = place.agent(config)
        if any(game.state == GameState.WON for game in agent.store.games_of(job.hex())):
            place.devnet.pass_seconds(601)
        return any(game.state == GameState.CLOSED for game in agent.store.games_of(job.hex()))

    until(closed)
    (game,) = agent.store.games_of(job.hex())
    assert game.state == GameState.CLOSED, game.note
    assert states == [JobState.WITHHELD, JobState.SUSPECT]
    (end,) = place.events(GameEnded, job, config)
    assert (end.stage, end.convicted) == (STAGE, STAGE)
    assert agent.chain.escrow.convicted(job, STAGE) and not agent.chain.escrow.convicted(job, 0)
    assert game.segment["layer"] == STAGE and not place.events(DemandLapsed, job, config)
    assert len(poster.posted) == len(set(poster.posted)) <= 20
    row = agent.store.job(job.hex())
    assert row is not None and 0 < int(row.receipt["demands_cost"]) <= BUDGET


def test_what_one_stage_withholds_is_demanded_of_it_alone(place: Place, quantised: Served) -> None:
    place.town.hall.misbehave = lambda handler, path: path.startswith("/s1/") and say(handler, b"", 503)
    config = place.config("one", demand_budget=BUDGET)
    job = place.town.commit(quantised)
    agent, poster, defence = place.agent(config), Poster(place, quantised, config), Defence(place, quantised, config)
    wait_out(place, agent, job)

    def won() -> bool:
        agent.tick()
        poster.post()
        defence.play()
        place.devnet.mine()
        return any(game.state == GameState.WON for game in agent.store.games_of(job.hex()))

    until(won)
    place.town.hall.misbehave = lambda handler, path: say(handler, b"", 503)
    assert agent.chain.escrow.convicted(job, STAGE) and not agent.chain.escrow.convicted(job, 0)
    assert {demand.stage for demand in poster.posted} == {STAGE}
    assert len(poster.posted) <= 10


def test_a_stage_that_never_answers_loses_by_the_clock(place: Place, quantised: Served) -> None:
    config = place.config("silence", demand_budget=BUDGET)
    job = place.town.commit(quantised)
    agent = place.agent(config)
    poster = Poster(place, quantised, config, accounts=(1,))  # stage 0 posts, stage 1 does not
    before = agent.chain.token.balance(agent.chain.account)
    wait_out(place, agent, job)

    def judged() -> bool:
        agent.tick()
        poster.post()
        place.devnet.pass_seconds(CLOCK_SECONDS // 5)
        row = agent.store.job(job.hex())
        return row is not None and row.state == JobState.SUSPECT

    until(judged)
    row = agent.store.job(job.hex())
    assert row is not None
    assert f"stage {STAGE} did not post" in row.receipt["why"]
    assert {lapse.stage for lapse in place.events(DemandLapsed, job, config)} == {STAGE}
    convicted = [event for event in place.events(StageConvicted, job, config) if event.id == job]
    assert {event.stage for event in convicted} == {STAGE}
    assert agent.chain.escrow.status(job) == Status.VOID
    assert agent.chain.token.balance(agent.chain.account) > before  # the lock paid for the demands, and more
    assert not (config.data / "jobs" / job.hex()).exists()


def test_demands_are_made_however_busy_the_desk_is_and_whatever_the_node_refuses(
    place: Place, quantised: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs whose servers are slow hold all places of the desk; transactions wait for their blocks in vain."""
    config = place.config("busy", demand_budget=BUDGET)
    job = place.town.commit(quantised)
    agent, go = place.agent(config), threading.Event()
    for _ in range(5):
        agent.store.attempted(job.hex()) if agent.store.job(job.hex()) else agent.reader.read()
    wait_out(place, agent, job)
    demand, refusals = agent.chain.demands.demand, [ReceiptTimeout("Demands.demand", "0x", 60.0)] * 4

    def reluctant(*given: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return demand(*given)

    monkeypatch.setattr(agent.chain.demands, "demand", reluctant)
    monkeypatch.setattr(challenger.withheld, "REST_SECONDS", 0.1)

    def slow(_: Task) -> Evidence:
        go.wait(300)
        raise Unavailable("in the end")

    desk = agent.desk = Desk(slow, agent.findings, 1)
    desk.start(Task(b"another", place.judge, 1.0, True, 0))

    def demanded() -> bool:
        agent.tick()
        return bool(place.events(DemandOpened, job, config))

    until(demanded, 30.0)
    assert not desk.free(b"a third")
    go.set()


def test_what_an_accomplice_demands_hides_nothing_that_was_downloaded(place: Place) -> None:
    """A game is played from what its audit has seen, however little of it was posted."""
    place.town.hall.misbehave = lambda handler, path: False
    config = place.config("columns", strategy="cells:1000")
    spoilt = serve(place.town.weights, spoil=True)
    job = place.town.commit(spoilt)
    agent, poster, defence = place.agent(config), Poster(place, spoilt, config), Defence(place, spoilt, config)
    accomplice = place.town.chain(5)
    accomplice.token.mint(accomplice.account, FUNDS)
    accomplice.token.approve(accomplice.demands.address, FUNDS)
    accomplice.demands.demand(Demand(job, STAGE, Wanted.TENSORS, 0, 0, 0, 1), place.judge.model, FUNDS)
    poster.post()

    def over() -> bool:
        agent.tick()
        defence.play()
        place.devnet.mine()
        return any(game.state in (GameState.WON, GameState.LOST) for game in agent.store.games_of(job.hex()))

    until(over)
    place.town.hall.misbehave = lambda handler, path: say(handler, b"", 503)
    (game,) = agent.store.games_of(job.hex())
    assert game.state == GameState.WON and agent.chain.escrow.convicted(job, STAGE)


def test_an_honest_stage_that_only_posts_is_left_alone_and_no_poorer(place: Place, honest: Served) -> None:
    config = place.config("shy", demand_budget=BUDGET)
    job = place.town.commit(honest)
    agent, poster = place.agent(config), Poster(place, honest, config)
    workers = [chain.account for chain in poster.chains]
    credit = [agent.chain.demands.credit(account) for account in workers]
    wait_out(place, agent, job)

    def over() -> bool:
        agent.tick()
        poster.post()
        place.devnet.mine()
        row = agent.store.job(job.hex())
        return row is not None and row.state == JobState.UNJUDGED

    until(over)
    row = agent.store.job(job.hex())
    assert row is not None and "nothing wrong was found in what was posted" in row.receipt["why"]
    assert all(agent.chain.demands.credit(a) > before for a, before in zip(workers, credit, strict=True))
    place.devnet.pass_seconds(700)
    agent.chain.escrow.settle(job)
    assert agent.chain.escrow.status(job) == Status.PAID


@pytest.mark.parametrize("budget", [0, 1000])
def test_nothing_is_demanded_beyond_the_budget(place: Place, quantised: Served, budget: int) -> None:
    config = place.config(f"poor {budget}", demand_budget=budget)
    job = place.town.commit(quantised)
    agent = place.agent(config)
    agent.tick()
    place.devnet.pass_seconds(400)
    assert place.judged(agent, job) in (JobState.UNJUDGED, JobState.WITHHELD)
    for _ in range(50):
        agent.tick()
    row = agent.store.job(job.hex())
    assert row is not None and row.state == JobState.UNJUDGED
    assert budget == 0 or f"of the budget {budget} are left" in row.receipt["why"]
    assert not place.events(DemandOpened, job, config)
    assert agent.chain.token.balance(agent.chain.account) <= FUNDS * 10
