"""Stages that serve nothing, on a local chain: what they hide is demanded, and convicts them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from challenger.store import GameState, JobState
from contracts.client import Status
from contracts.events import DemandLapsed, DemandOpened, GameEnded, StageConvicted
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.challenger.cheats import coarse, made
from tests.challenger.place import Defence, Place, Poster
from tests.challenger.town import CLOCK_SECONDS, FUNDS, Hall, Served, Town, model, say, serve

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


def test_a_quantised_stage_that_withholds_everything_is_convicted_from_the_roots(
    place: Place, quantised: Served
) -> None:
    config = place.config("roots", demand_budget=BUDGET)
    job = place.town.commit(quantised)
    agent, poster, defence = place.agent(config), Poster(place, quantised, config), Defence(place, quantised, config)
    agent.tick()
    place.devnet.pass_seconds(160)  # what is missing now will not come
    assert place.judged(agent, job) == JobState.WITHHELD  # downloads take real time
    states = []
    for turn in range(400):
        agent.tick()
        row = agent.store.job(job.hex())
        if row is not None and row.state not in states:
            states.append(row.state)
        if turn % 3 == 2:  # killed again and again: all that counts is on chain
            agent.store.close()
            agent = place.agent(config)
        poster.post()
        defence.play()
        place.devnet.mine()
        games = agent.store.games_of(job.hex())
        if games and games[0].state == GameState.WON:
            place.devnet.pass_seconds(601)
        if games and games[0].state == GameState.CLOSED:
            break
    (game,) = games
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
    agent.tick()
    place.devnet.pass_seconds(160)
    assert place.judged(agent, job) == JobState.WITHHELD  # downloads take real time
    for _ in range(300):
        agent.tick()
        poster.post()
        defence.play()
        place.devnet.mine()
        games = agent.store.games_of(job.hex())
        if games and games[0].state == GameState.WON:
            break
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
    agent.tick()
    place.devnet.pass_seconds(160)
    assert place.judged(agent, job) == JobState.WITHHELD  # downloads take real time
    for _ in range(200):
        agent.tick()
        poster.post()
        place.devnet.pass_seconds(CLOCK_SECONDS // 5)
        row = agent.store.job(job.hex())
        if row is not None and row.state == JobState.SUSPECT:
            break
    assert row is not None and row.state == JobState.SUSPECT
    assert f"stage {STAGE} did not post" in row.receipt["why"]
    assert {lapse.stage for lapse in place.events(DemandLapsed, job, config)} == {STAGE}
    convicted = [event for event in place.events(StageConvicted, job, config) if event.id == job]
    assert {event.stage for event in convicted} == {STAGE}
    assert agent.chain.escrow.status(job) == Status.VOID
    assert agent.chain.token.balance(agent.chain.account) > before  # the lock paid for the demands, and more
    assert not (config.data / "jobs" / job.hex()).exists()


def test_an_honest_stage_that_only_posts_is_left_alone_and_no_poorer(place: Place, honest: Served) -> None:
    config = place.config("shy", demand_budget=BUDGET)
    job = place.town.commit(honest)
    agent, poster = place.agent(config), Poster(place, honest, config)
    workers = [chain.account for chain in poster.chains]
    credit = [agent.chain.demands.credit(account) for account in workers]
    agent.tick()
    place.devnet.pass_seconds(160)
    assert place.judged(agent, job) == JobState.WITHHELD  # downloads take real time
    for _ in range(200):
        agent.tick()
        poster.post()
        place.devnet.mine()
        row = agent.store.job(job.hex())
        if row is not None and row.state == JobState.UNJUDGED:
            break
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
