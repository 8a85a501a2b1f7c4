"""What a watchtower refuses before anything is at stake, and how it says so."""

import dataclasses
import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench._place import Place
from bench._town import serve
from challenger.agent import Agent
from challenger.cli import app
from challenger.config import Config
from challenger.database import StoreError, Unreachable, WrongSchema
from challenger.evidence import CorruptEvidence, trace_name
from challenger.judge import Judge
from challenger.registered import WrongModel, check_registered
from challenger.store import GameState, JobState, Store
from contracts.events import ChallengeCommitted, GameMoved
from deploy.keys import dev_account, write_keystore
from tests.verifier import tiny
from verifier.tolerance import uniform_profile

# ---- the database


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:////no/such/folder/x.db", "cannot use the database sqlite:////no/such/folder/x.db: unable to open"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", r"postgresql\+psycopg://me:\*\*\*@.*refused"),
        ("no url", "expected a database URL of SQLAlchemy"),
        ("nosuch://host/x", "expected a database URL of SQLAlchemy"),
    ],
)
def test_an_unreachable_database_is_named_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(Unreachable, match=reason) as refused:
        Store(url)
    assert "secret" not in str(refused.value)


def test_a_schema_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    Store(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(WrongSchema, match="has schema 9999, this program knows up to 0002"):
        Store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_tables_of_somebody_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE jobs (title TEXT)")
    with pytest.raises(WrongSchema, match="tables of the same names: jobs"):
        Store(f"sqlite:///{path}")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"something else altogether, of some length" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        Store(f"sqlite:///{tmp_path / 'x.db'}")


def test_a_database_from_before_there_were_versions_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as database:
        database.executescript(
            """CREATE TABLE jobs (id VARCHAR(66) PRIMARY KEY, window_end BIGINT NOT NULL, state VARCHAR(16) NOT NULL,
                 attempts INTEGER NOT NULL, receipt JSON NOT NULL);
               CREATE TABLE games (id VARCHAR(66) PRIMARY KEY, job VARCHAR(66) NOT NULL, segment JSON NOT NULL,
                 salt BLOB NOT NULL, block BIGINT NOT NULL, state VARCHAR(16) NOT NULL, evidence JSON NOT NULL,
                 note VARCHAR NOT NULL);
               CREATE TABLE cursor (name VARCHAR(16) PRIMARY KEY, block BIGINT NOT NULL);
               INSERT INTO jobs VALUES ('aa', 7, 'watched', 1, '{}');
               INSERT INTO cursor VALUES ('chain', 5);"""
        )
    store = Store(f"sqlite:///{path}")
    (job,) = store.due()
    assert (job.id, job.window_end, job.attempts, job.block) == ("aa", 7, 1, 0) and store.next_block(0) == 5
    store.close()


# ---- the model


def test_a_folder_that_is_not_the_registered_model_is_refused_with_both_ids(place: Place, tmp_path: Path) -> None:
    weights = tiny.make_weights(tmp_path, tiny.config(), seed=5)
    uniform_profile(weights.shape, 10, 1000, 1 << 14, 1 << 20).save(tmp_path)
    other = Judge(tmp_path)
    with pytest.raises(WrongModel, match="expected a registered model") as refused:
        check_registered(place.town.requester, other)
    assert place.judge.id.hex() in str(refused.value) and other.id.hex() in str(refused.value)
    check_registered(place.town.requester, place.judge)
    config = place.config("wrong model", models=(tmp_path,))
    with pytest.raises(WrongModel):
        Agent.build(config, place.town.chain(4))
    assert not list(place.town.requester.events(config.from_block))


def test_a_profile_that_is_not_the_registered_one_is_refused_with_both_roots(place: Place, tmp_path: Path) -> None:
    for path in place.folder.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    uniform_profile(place.town.weights.shape, 11, 1000, 1 << 14, 1 << 20).save(tmp_path)
    other = Judge(tmp_path)
    with pytest.raises(WrongModel, match=r"tolerance\.json is not the registered one") as refused:
        check_registered(place.town.requester, other)
    told = str(refused.value)
    assert place.judge.model.profile_root.hex() in told and other.model.profile_root.hex() in told


def cli_config(place: Place, folder: Path, **changes: object) -> Path:
    """A configuration file, with everything that it names."""
    place.town.addresses.save(folder / "addresses.json")
    key = write_keystore(dev_account(4), folder, "key")
    values = {
        "rpc_url": place.devnet.url,
        "addresses": "addresses.json",
        "keystore": str(key.path.resolve()),
        "password": str(key.password.resolve()),
        "models": [str(place.folder)],
        "data": "data",
        **changes,
    }
    (folder / "watch.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    return folder / "watch.toml"


def test_the_command_refuses_too(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for changes, reason in (
        ({"database": "sqlite:////no/such/folder/x.db"}, "cannot use the database"),
        ({"strategy": "cells:0"}, "expected full, tokens, auto, sweep:N or cells:N, got 'cells:0'"),
        ({"rpc_url": [place.devnet.url, "ftp://x"]}, "rpc_url: expected a URL"),
        ({"rpc_url": []}, "rpc_url: expected one URL or more"),
        ({"log_format": "xml"}, "log_format: expected one of text, json"),
        ({"metrics_port": 70_000}, "metrics_port: expected 0 .. 65535"),
        ({"audit_seconds": 0}, "audit_seconds: expected more than 0"),
        ({"ray": "auto"}, "ray: expected it to be installed"),  # at once, not by leaving job after job unjudged
    ):
        told = CliRunner().invoke(app, ["run", "--config", str(cli_config(place, tmp_path, **changes))])
        assert told.exit_code == 1 and reason in told.output, told.output


# ---- evidence


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_corrupt_evidence_is_never_staked_on(place: Place) -> None:
    """A bit that changed on disk between the audit and the challenge: the job is audited anew, from a new download."""
    config = place.config("corrupt")
    spoilt = serve(place.town.weights, spoil=True)
    job = place.town.commit(spoilt)
    agent = place.agent(config)
    assert place.judged(agent, job) == JobState.SUSPECT
    agent.tick()
    place.devnet.mine()
    (game,) = agent.store.games_of(job.hex())
    assert game.state == GameState.COMMITTED
    flip(config.data / "jobs" / job.hex() / trace_name(1, game.segment["request"]))
    agent.store.close()
    agent = place.agent(config)
    agent.tick()  # would put up the bond
    row = agent.store.job(job.hex())
    assert row is not None and row.state == JobState.WATCHED
    (game,) = agent.store.games_of(job.hex())
    assert game.state == GameState.DROPPED and "corrupt evidence" in game.note and "expected digest" in game.note
    assert not [event for event in place.events(GameMoved, job, config)]
    assert place.judged(agent, job) == JobState.SUSPECT
    for _ in range(3):
        agent.tick()
        place.devnet.mine()
    assert {game.state for game in agent.store.games_of(job.hex())} == {GameState.DROPPED, GameState.OPEN}
    assert len(place.events(ChallengeCommitted, job, config)) >= 2


def test_corrupt_evidence_is_downloaded_again_during_a_game(place: Place) -> None:
    config = place.config("corrupt in a game")
    job = place.town.commit(serve(place.town.weights, spoil=True))
    agent = place.agent(config)
    assert place.judged(agent, job) == JobState.SUSPECT
    for _ in range(3):
        agent.tick()
        place.devnet.mine()
    (game,) = agent.store.games_of(job.hex())
    assert game.state == GameState.OPEN
    path = config.data / "jobs" / job.hex() / trace_name(1, game.segment["request"])
    right = path.read_bytes()
    flip(path)
    agent.store.close()
    agent = place.agent(dataclasses.replace(config))
    with pytest.raises(Exception, match="corrupt evidence"):
        agent.evidence(job, place.judge).trace(1, game.segment["request"])
    agent.games._mend(game, CorruptEvidence(path, "", ""))
    assert path.read_bytes() == right
    assert agent.evidence(job, place.judge).trace(1, game.segment["request"]) is not None


def test_settings_have_defaults(tmp_path: Path) -> None:
    config = Config("http://x", tmp_path, tmp_path, tmp_path, (tmp_path,), tmp_path)
    assert (config.strategy, config.metrics_host, config.log_format) == ("full", "127.0.0.1", "text")
