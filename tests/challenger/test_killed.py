"""SIGKILL of a watchtower's own process, at the two points from which a double move would be easiest."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from bench._watched import Street
from bench.kill import LOADED, finish, outcome, pid, start
from challenger.store import LIVE, GameState, Store


def test_a_killed_process_goes_on_where_it_was_and_never_moves_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    with Street(tmp_path, 1) as street:
        store, before = Store(street.config().database_url), street.wealth()
        jobs = street.commit([street.wrong])
        street.defend()
        for reached in (LIVE, (GameState.OPEN,)):  # decided on, and perhaps sent; open
            tower = start(context, street)
            while not store.games(*reached):
                assert tower.exitcode is None, street.log.read_text(encoding="utf-8")
                time.sleep(0.02)
            os.kill(pid(tower), signal.SIGKILL)
            tower.join()
        finish(context, street, store, lambda: bool(store.games(GameState.WON)))
        told = outcome(street, store, jobs, before)
        store.close()
    assert told["convicted"] == told["challenges"] == 1 and told["innocent_convicted"] == 0
    assert told["states_posted_twice"] == told["challenges_lost"] == told["bonds_lost"] == 0
    assert told["reverted"] == []
