"""A watchtower whose database is PostgreSQL: as with SQLite, and killed between any two looks."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from bench._place import Defence, Place
from bench._town import Hall, Town, model, serve
from challenger.database import WrongSchema
from challenger.plan import plan, verdict_of
from challenger.store import GameState, JobState, Store
from contracts.transport import Signed
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.system.postgres import postgres
from verifier.audit import Verdict
from verifier.program import Kind


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture
def empty(url: str) -> str:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


def test_stores_that_open_together_migrate_once(empty: str) -> None:
    faults: list[BaseException] = []

    def open_one() -> None:
        try:
            Store(empty).close()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_what_is_stored_comes_back(empty: str) -> None:
    store, job = Store(empty), "11" * 32
    store.advance(7, [(job, 2**40, 5)], {6: b"\x06" * 32})
    verdict = Verdict(float("inf"), 2, Kind.STOP, 3, 4, 5, 0xFFFFFFFF, 7)
    store.judged(job, JobState.SUSPECT, {"worst": 1.5}, [plan(dev_account(0).address, b"\x11" * 32, verdict, 5)])
    store.keep(job, "x", 3, "ab")
    journal = store.journal(31337, dev_account(0).address)
    journal.record(Signed("A.b", 2**40, b"\x01" * 32, b"raw"))
    store.close()
    again = Store(empty)
    (game,) = again.games(GameState.PLANNED)
    assert verdict_of(game) == verdict and again.seen() == {6: b"\x06" * 32} and again.digest(job, "x") == "ab"
    journal = again.journal(31337, dev_account(0).address)
    assert journal.unsettled() == [Signed("A.b", 2**40, b"\x01" * 32, b"raw")]
    journal.settle(2**40, b"\x01" * 32, 9)
    assert journal.unsettled() == [] and again.moves()[0].state == "mined"
    journal.reopen(9)
    assert len(journal.unsettled()) == 1
    assert again.rewind(5) == [] and again.next_block(0) == 5
    again.close()


def test_a_schema_of_another_version_is_refused(empty: str) -> None:
    Store(empty).close()
    engine = create_engine(empty)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(WrongSchema, match="has schema 9999, this program knows up to 0002"):
        Store(empty)


def test_a_game_is_won_by_watchtowers_that_share_nothing_but_the_database(empty: str, tmp_path: Path) -> None:
    folder, home = tmp_path / "model", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    weights, profile = model(folder)
    with Devnet() as devnet, Hall() as hall:
        town = Town(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), hall, weights, profile)
        town.settle_in()
        place = Place(devnet, town, folder, home)
        config = place.config("postgres", database=empty)
        spoilt = serve(weights, spoil=True)
        job = town.commit(spoilt)
        agent, defence = place.agent(config), Defence(place, spoilt, config)
        assert place.judged(agent, job) == JobState.SUSPECT
        for _ in range(60):
            agent.store.close()
            agent = place.agent(config)
            agent.tick()
            devnet.mine()
            defence.play()
            if agent.store.games_of(job.hex())[0].state == GameState.WON:
                break
        assert agent.chain.escrow.convicted(job, 1) and not agent.chain.escrow.convicted(job, 0)
        assert {move.state for move in agent.store.moves()} == {"mined"}
        agent.store.close()
