"""A watchtower on a local chain: what is wrong is convicted, what is right left alone, and no crash costs anything.

Rationale: over 400 lines, for all of it is about the one loop.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench._place import Defence, Place
from bench._town import CLOCK_SECONDS, FUNDS, SPOILT_POSITION, Served, say, serve, until
from challenger.agent import Agent
from challenger.config import ConfigError
from challenger.evidence import Evidence, Unavailable
from challenger.judge import Findings, Judge
from challenger.logs import JsonLines
from challenger.reader import KEEP_BLOCKS
from challenger.store import GameState, JobState
from contracts.client import Chain, ChainError, ChainUnreachable
from contracts.events import ChallengeCommitted, GameEnded, GameMoved
from contracts.keys import save_account
from deploy.devnet import free_port
from deploy.keys import dev_account
from verifier.game import Segment

STAGE = 1  # the spoilt one


class Killed(BaseException):
    """SIGKILL, as far as Python can act it: nothing catches it."""


@pytest.fixture(scope="module")
def honest(place: Place) -> Served:
    return serve(place.town.weights)


@pytest.fixture(scope="module")
def spoilt(place: Place) -> Served:
    return serve(place.town.weights, spoil=True)


@pytest.fixture(autouse=True)
def behave(place: Place) -> Iterator[None]:
    yield
    place.town.hall.misbehave = lambda handler, path: False


def test_an_honest_job_is_left_alone(place: Place, honest: Served) -> None:
    config = place.config("honest")
    agent = place.agent(config)
    job = place.town.commit(honest)
    assert place.judged(agent, job) == JobState.CLEAN
    row = agent.store.job(job.hex())
    assert row is not None and row.receipt["wrong"] == [] and row.receipt["pieces"] > 50
    assert all(ratio < 1 for ratio in row.receipt["worst"].values())
    assert not agent.tick() and place.events(ChallengeCommitted, job, config) == []
    assert not (config.data / "jobs" / job.hex()).exists()


@pytest.mark.parametrize("kill", ["at every write", "after every look"])
def test_a_wrong_row_is_convicted_once_whatever_is_killed(
    place: Place, spoilt: Served, kill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(f"kill {kill}")
    job = place.town.commit(spoilt)
    agent, defence = place.agent(config), Defence(place, spoilt, config)
    assert place.judged(agent, job) == JobState.SUSPECT
    place.town.hall.misbehave = lambda handler, path: say(handler, b"", 503)  # nothing is given any more
    before = agent.chain.token.balance(agent.chain.account)
    died: set[str] = set()

    def deadly(owner: Any, name: str) -> None:
        """Kills the process before the first call of each kind, and after the second."""
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            what = f"{name} {arguments[1] if name == 'mark' else ''}"
            if f"before {what}" not in died:
                died.add(f"before {what}")
                raise Killed
            result = real(*arguments, **named)
            if f"after {what}" not in died:
                died.add(f"after {what}")
                raise Killed
            return result

        monkeypatch.setattr(owner, name, call)

    def revive() -> Agent:
        agent.store.close()
        again = place.agent(config)
        if kill == "at every write":
            deadly(again.store, "mark")
            deadly(again.chain.escrow, "release")
            for name in ("commit", "challenge", "descend", "prove", "withdraw"):
                deadly(again.chain.disputes, name)
        return again

    agent = revive()
    for _ in range(200):
        try:
            agent.tick()
        except Killed:
            agent = revive()
        if kill == "after every look":
            agent = revive()
        place.devnet.mine()
        defence.play()
        rows = agent.store.games_of(job.hex())
        if rows[0].state == GameState.WON:
            place.devnet.pass_seconds(601)
        if rows[0].state == GameState.CLOSED:
            break
    (row,) = rows
    assert row.state == GameState.CLOSED, row.note
    assert (row.segment["stage"], row.segment["kind"], row.segment["position"]) == (STAGE, 5, SPOILT_POSITION)
    assert len(place.events(ChallengeCommitted, job, config)) == 1
    assert sum(event.game.challenger_moves == 1 for event in place.events(GameMoved, job, config)) <= 2
    (end,) = place.events(GameEnded, job, config)
    assert (end.convicted, end.reason) == (STAGE, 1)
    assert agent.chain.escrow.convicted(job, STAGE) and not agent.chain.escrow.convicted(job, 0)
    place.devnet.mine(KEEP_BLOCKS)
    agent = place.agent(config)
    agent.tick()  # draws what the kill left behind
    agent.tick()  # and deletes what no reorganisation can bring back
    assert agent.chain.token.balance(agent.chain.account) > before
    assert kill != "at every write" or len(died) > 12
    assert not (config.data / "jobs" / job.hex()).exists()


def test_a_silent_worker_is_flagged(place: Place, spoilt: Served) -> None:
    config = place.config("silent")
    job = place.town.commit(spoilt)
    agent = place.agent(config)
    assert place.judged(agent, job) == JobState.SUSPECT
    for _ in range(10):
        agent.tick()
        place.devnet.pass_seconds(CLOCK_SECONDS)
    (end,) = place.events(GameEnded, job, config)
    assert (end.convicted, end.reason) == (STAGE, 2)


def test_a_shown_game_is_over_at_once(place: Place, honest: Served) -> None:
    config = place.config("bill")
    job = place.town.commit(replace(honest, tokens=honest.tokens - 1))
    agent = place.agent(config)
    assert place.judged(agent, job) == JobState.SUSPECT
    for _ in range(5):
        agent.tick()
        place.devnet.mine()
    (row,) = agent.store.games_of(job.hex())
    assert (row.state, row.segment["kind"]) == (GameState.WON, 9)
    assert agent.chain.escrow.convicted(job, STAGE)


def test_who_withholds_its_trace_shields_nobody_else(place: Place, honest: Served, spoilt: Served) -> None:
    config = place.config("withheld")
    agent = place.agent(config)
    place.town.hall.misbehave = lambda handler, path: (
        path.startswith("/s0/") and "/trace" in path and say(handler, b"", 403)
    )
    clean, wrong = place.town.commit(honest), place.town.commit(spoilt)
    agent.tick()
    until(lambda: bool(agent.desk._done.qsize() == 2))
    agent.tick()
    rows = [agent.store.job(id.hex()) for id in (clean, wrong)]
    assert [row and (row.state, row.attempts) for row in rows] == [(JobState.WATCHED, 1)] * 2  # there is time to wait
    place.devnet.pass_seconds(301)  # half of the window
    assert place.judged(agent, wrong) == JobState.SUSPECT
    assert place.judged(agent, clean) == JobState.UNJUDGED
    row = agent.store.job(clean.hex())
    assert row is not None and "stage 0" in row.receipt["why"] and "403" in row.receipt["why"]
    (game,) = agent.store.games_of(wrong.hex())
    assert game.segment["stage"] == STAGE


def test_a_job_without_outputs_stays_unjudged_and_others_go_on(place: Place, honest: Served) -> None:
    config = place.config("no outputs")
    agent = place.agent(config)
    refused = place.town.commit(honest, window=40)
    place.town.hall.misbehave = lambda handler, path: (
        refused.hex() in path and path.endswith("/outputs") and say(handler, b"", 404)
    )
    other = place.town.commit(honest)
    assert place.judged(agent, other) == JobState.CLEAN
    place.devnet.pass_seconds(25)
    assert place.judged(agent, refused) == JobState.UNJUDGED
    late = place.town.commit(honest, window=20)
    agent.reader.read()
    place.devnet.pass_seconds(21)
    assert place.judged(agent, late) == JobState.UNJUDGED
    row = agent.store.job(late.hex())
    assert row is not None and "window was over" in row.receipt["why"]


def test_a_model_that_is_not_ours(place: Place, honest: Served) -> None:
    config = place.config("other model")
    agent = place.agent(config)
    agent.judges.clear()
    assert place.judged(agent, place.town.commit(honest)) == JobState.UNJUDGED


def test_a_plan_older_than_its_window_is_dropped(place: Place, spoilt: Served) -> None:
    for name, ticks in (("planned", 0), ("committed", 1)):
        config = place.config(f"late {name}")
        job = place.town.commit(spoilt, window=600)
        agent = place.agent(config)
        assert place.judged(agent, job) == JobState.SUSPECT
        for _ in range(ticks):
            agent.tick()
        (row,) = agent.store.games_of(job.hex())
        assert row.state == (GameState.COMMITTED if ticks else GameState.PLANNED)
        place.devnet.pass_seconds(601)
        agent.tick()
        (row,) = agent.store.games_of(job.hex())
        assert row.state == GameState.DROPPED and "window" in row.note
        assert place.events(GameMoved, job, config) == []


def test_two_watchtowers_both_win_and_a_third_stays_away(place: Place, spoilt: Served) -> None:
    configs = [place.config(f"tower {index}") for index in range(3)]
    job = place.town.commit(spoilt)
    towers = [place.agent(config, 4 + index) for index, config in enumerate(configs)]
    for tower in towers:
        assert place.judged(tower, job) == JobState.SUSPECT  # stage 1 alone, not convicted yet
    defence = Defence(place, spoilt, configs[0])
    for _ in range(60):
        for tower in towers[:2]:
            tower.tick()
        place.devnet.mine()
        defence.play()
        if all(tower.store.games_of(job.hex())[0].state == GameState.WON for tower in towers[:2]):
            break
    assert [tower.store.games_of(job.hex())[0].state for tower in towers[:2]] == [GameState.WON] * 2
    towers[2].tick()
    assert towers[2].store.games_of(job.hex())[0].state == GameState.DROPPED


def test_two_watchtowers_with_one_key_race_for_nonces_and_both_win(place: Place, spoilt: Served) -> None:
    """Each has a folder and a memory of its own; neither knows of the other's transactions before they are mined."""
    configs = [place.config(f"twin {index}") for index in range(2)]
    job = place.town.commit(spoilt)
    towers = [place.agent(config, 7) for config in configs]
    for tower in towers:
        assert place.judged(tower, job) == JobState.SUSPECT
    defence, faults = Defence(place, spoilt, configs[0]), list[BaseException]()

    def tick(tower: Agent) -> None:
        try:
            tower.tick()
        except Exception as fault:
            faults.append(fault)

    def won() -> bool:
        return all(tower.store.games_of(job.hex())[0].state == GameState.WON for tower in towers)

    for _ in range(60):
        threads = [threading.Thread(target=tick, args=(tower,)) for tower in towers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        place.devnet.mine()
        defence.play()
        if won():
            break
    assert won() and not faults
    moved, ended = (place.events(kind, job, configs[0]) for kind in (GameMoved, GameEnded))
    assert len({event.id for event in moved}) == len(ended) == 2  # a game each
    assert {event.convicted for event in ended} == {STAGE}
    for game in {event.id for event in moved}:
        states = [event.game for event in moved if event.id == game]
        assert len({(state.challenger_moves, state.worker_moves) for state in states}) == len(states)


class Faulty(Agent):
    """Fails at one thing."""

    fault: Callable[[], None]

    def findings(self, judge: Judge, evidence: Evidence) -> Findings:
        self.fault()
        return super().findings(judge, evidence)


def test_a_fault_in_one_audit_costs_no_other(place: Place, honest: Served) -> None:
    config = place.config("faulty")
    agent = place.agent(config, agent_class=Faulty)
    assert isinstance(agent, Faulty)
    first = place.town.commit(honest)

    def fail() -> None:
        raise ZeroDivisionError("a fault of ours")

    agent.fault = fail
    agent.desk.pause = lambda id, most_seconds: None  # type: ignore[method-assign]  # no waiting here
    assert place.judged(agent, first) == JobState.UNJUDGED
    row = agent.store.job(first.hex())
    assert row is not None and row.receipt["why"] == "ZeroDivisionError: a fault of ours" and row.attempts == 3
    agent.fault = lambda: None
    assert place.judged(agent, place.town.commit(honest)) == JobState.CLEAN


def test_a_fault_in_one_game_costs_no_other(place: Place, spoilt: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    config = place.config("two games")
    agent = place.agent(config)
    jobs = [place.town.commit(spoilt) for _ in range(2)]
    for job in jobs:
        assert place.judged(agent, job) == JobState.SUSPECT
    real = agent.charge_of
    faults: list[Exception] = [Unavailable("gone"), KeyError("a fault of ours"), ChainError("Rpc", {})]

    def charge_of(row: Any) -> Any:
        if row.job == jobs[0].hex():
            raise faults[0]
        return real(row)

    monkeypatch.setattr(agent, "charge_of", charge_of)
    for fault in list(faults):
        agent.games.rests.clear()
        faults[0] = fault
        agent.tick()
        place.devnet.mine()
    assert [place.events(GameMoved, job, config) != [] for job in jobs] == [False, True]
    faults[0] = ChainUnreachable("nowhere", 1, 0.0, "gone")
    agent.games.rests.clear()
    with pytest.raises(ChainUnreachable):  # nothing can be done for any game; `run` tries again
        agent.tick()


def test_run_survives_every_fault(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.agent(place.config("run"))
    told: list[Any] = [
        ZeroDivisionError(),
        ChainUnreachable("x", 1, 0.0, ""),
        LookupError("new event"),
        False,
        Killed(),
    ]

    def tick() -> bool:
        item = told.pop(0)
        if isinstance(item, BaseException):
            raise item
        return bool(item)

    monkeypatch.setattr(agent, "tick", tick)
    with pytest.raises(Killed):
        agent.run()
    assert told == []


def test_one_process_a_data_folder(place: Place, tmp_path: Path) -> None:
    account = dev_account(4)
    save_account(account, tmp_path / "key.json", "secret", iterations=2)
    config = replace(place.config("locked"), models=())
    first = Agent.build(config, place.town.chain(4))
    with pytest.raises(ConfigError, match="another watchtower"):
        Agent.build(config, place.town.chain(4))
    first.close()
    Agent.build(config, place.town.chain(4)).close()


def test_a_node_that_lags_turns_nothing_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.agent(place.config("lag"))
    agent.reader.read()
    seen = agent.reader.next_block
    monkeypatch.setattr(Chain, "block_number", lambda self: seen - 5)
    monkeypatch.setattr(Chain, "events", lambda self, first, last: pytest.fail("asked a node that lags"))
    agent.reader.read()
    assert agent.reader.next_block == seen


def test_a_reorganised_chain_costs_no_game(place: Place, spoilt: Served) -> None:
    """The blocks with our commitment and our challenge are replaced by empty ones: the same bytes are sent again."""
    config = place.config("reorg")
    job = place.town.commit(spoilt)
    agent, defence = place.agent(config), Defence(place, spoilt, config)
    assert place.judged(agent, job) == JobState.SUSPECT
    place.devnet.mine(3)
    agent.tick()
    place.devnet.mine()
    for _ in range(2):
        agent.tick()
    assert agent.store.games_of(job.hex())[0].state == GameState.OPEN
    place.devnet._rpc("anvil_reorg", [agent.chain.block_number() - agent.store.games_of(job.hex())[0].block, []])
    place.devnet.mine(2)
    for _ in range(60):
        agent.tick()
        place.devnet.mine()
        defence.play()
        if agent.store.games_of(job.hex())[0].state == GameState.WON:
            break
    (row,) = agent.store.games_of(job.hex())
    assert row.state == GameState.WON and agent.chain.escrow.convicted(job, STAGE)
    assert agent.metrics.registry.get_sample_value("plumb_reorgs_total") == 1
    challenges = [move for move in agent.store.moves() if move.label == "Disputes.challenge"]
    assert len(challenges) == 1 and challenges[0].state == "mined"


def test_a_game_that_was_won_in_a_block_that_is_gone_is_played_on(place: Place, honest: Served) -> None:
    config = place.config("reorg of an end")
    job = place.town.commit(replace(honest, tokens=honest.tokens - 1))
    agent = place.agent(config)
    assert place.judged(agent, job) == JobState.SUSPECT
    place.devnet.mine(2)
    for _ in range(4):
        agent.tick()
        place.devnet.mine()
    (row,) = agent.store.games_of(job.hex())
    assert row.state == GameState.WON and row.ended is not None
    place.devnet._rpc("anvil_reorg", [agent.chain.block_number() - row.ended + 1, []])
    place.devnet.mine()
    for _ in range(6):
        agent.tick()
        place.devnet.mine()
    assert agent.store.games_of(job.hex())[0].state == GameState.WON and agent.chain.escrow.convicted(job, STAGE)


def test_a_copied_challenge_earns_nothing(place: Place, spoilt: Served) -> None:
    """A front-runner that sends our commitment before us commits us; our challenge is not its own to send."""
    config = place.config("front-runner")
    job = place.town.commit(spoilt)
    agent, thief = place.agent(config), place.town.chain(5)
    assert place.judged(agent, job) == JobState.SUSPECT
    (row,) = agent.store.games_of(job.hex())
    thief.disputes.commit(bytes.fromhex(row.id))
    agent.tick()
    place.devnet.mine()
    prepared, segment = agent.charge_of(row), Segment(**{**row.segment, "job": job})
    thief.token.mint(thief.account, FUNDS)
    thief.token.approve(thief.disputes.address, FUNDS)
    with pytest.raises(ChainError):
        thief.disputes.challenge(segment, row.salt, place.judge.model, prepared.evidence, prepared.steps)
    agent.tick()
    place.devnet.mine()
    agent.tick()
    (row,) = agent.store.games_of(job.hex())
    assert row.state == GameState.OPEN


def test_an_audit_that_outlasts_the_window_is_told(
    place: Place, spoilt: Served, caplog: pytest.LogCaptureFixture
) -> None:
    config = place.config("late")
    agent = place.agent(config, agent_class=Faulty)
    assert isinstance(agent, Faulty)
    agent.fault = lambda: place.devnet.pass_seconds(700)
    job = place.town.commit(spoilt)
    assert place.judged(agent, job) == JobState.SUSPECT
    row = agent.store.job(job.hex())
    assert row is not None and row.receipt["late_seconds"] >= 100 and "outlasted its window" in caplog.text
    assert agent.metrics.registry.get_sample_value("plumb_late_audits_total") == 1
    written = json.loads((config.data / "receipts" / f"{job.hex()}.json").read_text())
    assert written == row.receipt and written["wrong"][0]["margin"] > 1 and written["worst"]["mlp"] > 1


def test_logs_are_json_lines_that_name_jobs_and_games() -> None:
    record = logging.LogRecord("plumb", logging.WARNING, "", 0, "job %s: late", ("ab" * 32,), None)
    told = json.loads(JsonLines().format(record))
    assert (told["level"], told["job"], told["message"]) == ("warning", "ab" * 32, f"job {'ab' * 32}: late")


def test_metrics_are_served_on_loopback(place: Place) -> None:
    agent, port = place.agent(place.config("metrics")), free_port()
    agent.metrics.serve("127.0.0.1", port)
    agent.tick()
    told = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert f"plumb_head_block {float(agent.reader.head)}" in told and "plumb_late_audits_total 0.0" in told
