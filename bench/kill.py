"""kill -9 at random points during games: whether every game still ends in the conviction due, once, with its bond back.

A watchtower runs as a process of its own on a local chain with a block a second, and plays several games at once
against a worker that denies everything. It is killed again and again, and started again, while they last.
"""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from bench._watched import Street, become
from challenger.store import LIVE, GameState, JobState, Store
from contracts.events import ChallengeCommitted, GameEnded, GameMoved
from contracts.play import NOBODY

GAMES = 8  # at a time
AUDITING_SECONDS = 8.0  # that a watchtower lives at most, from its first look at the chain on
PLAYING_SECONDS = 4.0  # once all jobs are audited
CLOCK_SECONDS = 900  # a watchtower that is killed faster than it can think loses by its clock: not what is measured
NEWBORN = 0.1  # of them are killed while they start
FINISH_SECONDS = 300.0
LOADED = ["bench._warm", "bench._watched", "alembic.command", "sqlalchemy.dialects.sqlite"]


def run(kills: int = 200, games: int = GAMES, seed: int = 1, block_seconds: int = 1) -> dict[str, Any]:
    """Returns {"results": one row a kill, "summary"}. Raises BenchError where a game did not end as it has to."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plumb-kill-") as folder, Street(Path(folder), block_seconds) as street:
        config = street.config()
        before = street.wealth()
        jobs = street.commit([street.wrong] * games, clock=CLOCK_SECONDS)
        store = Store(config.database_url)
        street.defend()
        while len(rows) < kills:
            awake, tower = _awake(street), start(context, street)
            newborn = chance.random() < NEWBORN
            while not newborn and _awake(street) == awake and tower.exitcode is None:
                time.sleep(0.02)
            delay = chance.uniform(0, AUDITING_SECONDS if store.jobs(JobState.WATCHED) else PLAYING_SECONDS)
            tower.join(delay)
            if tower.exitcode is not None:
                raise RuntimeError(f"expected a watchtower that lives, it ended with status {tower.exitcode}")
            os.kill(pid(tower), signal.SIGKILL)
            tower.join()
            states = Counter(str(game.state) for game in store.games(*GameState))
            waiting = len(store.jobs(JobState.WATCHED))
            pending = [move.label for move in store.moves() if move.state == "sent"]
            rows.append(
                {
                    "kill": len(rows) + 1,
                    "seconds": round(delay, 3),
                    "unaudited": waiting,
                    **states,
                    "in_flight": pending,
                }
            )
            print(f"  {rows[-1]}", flush=True)
            if _over(store, jobs):
                jobs += street.commit([street.wrong] * games, clock=CLOCK_SECONDS)
        finish(context, street, store, lambda: _over(store, jobs))
        street.devnet.pass_seconds(street.window + 1)
        finish(context, street, store, lambda: not store.games(*LIVE, GameState.WON))
        summary = outcome(street, store, jobs, before)
        store.close()
    summary["kills"], summary["seconds"] = len(rows), round(time.monotonic() - started, 1)
    summary["kills_with_a_transaction_in_flight"] = sum(bool(row["in_flight"]) for row in rows)
    return {"results": rows, "summary": summary}


def _awake(street: Street) -> int:
    """How many watchtowers have come so far that they look at the chain."""
    return street.log.read_text(encoding="utf-8").count("\nwatching ") if street.log.exists() else 0


def _over(store: Store, jobs: list[bytes]) -> bool:
    """Whether every job had its games, and none goes on."""
    games = [store.games_of(job.hex()) for job in jobs]
    return all(games) and not any(game.state in LIVE for each in games for game in each)


def outcome(street: Street, store: Store, jobs: list[bytes], before: int) -> dict[str, Any]:
    """What the chain says happened."""
    events = list(street.bank.events(street.first_block))
    watchtower = street.account
    committed = Counter(e.id for e in events if isinstance(e, ChallengeCommitted))
    moved = Counter((e.id, e.game.worker_moves, e.game.challenger_moves) for e in events if isinstance(e, GameMoved))
    ended = [event for event in events if isinstance(event, GameEnded)]
    sent = street.transactions(watchtower)
    games = store.games(*GameState)
    convicted = [job for job in jobs if street.bank.escrow.convicted(job, street.guilty)]
    return {
        "games": len(jobs),
        "convicted": len(convicted),
        "innocent_convicted": sum(street.bank.escrow.convicted(job, 1 - street.guilty) for job in jobs),
        "challenges": len(committed),
        "challenges_lost": sum(event.convicted == NOBODY for event in ended),
        "states": dict(Counter(str(game.state) for game in games)),
        "states_posted_twice": sum(count - 1 for count in moved.values()),
        "transactions": len(sent),
        "transactions_reverted": sum(bool(why) for why in sent),
        "reverted": [why for why in sent if why],
        "bonds_lost": sum(game.state == GameState.LOST for game in games),
        "earned": street.wealth() - before,
    }


def start(context: ForkServerContext, street: Street) -> ForkServerProcess:
    process = context.Process(target=become, args=(str(street.config_file), str(street.log)), daemon=True)
    process.start()
    return process


def pid(process: ForkServerProcess) -> int:
    assert process.pid is not None
    return process.pid


def finish(context: ForkServerContext, street: Street, store: Store, done: Callable[[], bool]) -> None:
    """Lets a watchtower live until it is done."""
    tower, end = start(context, street), time.monotonic() + FINISH_SECONDS
    while not done():
        if time.monotonic() > end or tower.exitcode is not None:
            told = street.log.read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"expected the games to end, they stand at {store.games(*LIVE)}; log: {told}")
        time.sleep(0.2)
    os.kill(pid(tower), signal.SIGKILL)
    tower.join()
