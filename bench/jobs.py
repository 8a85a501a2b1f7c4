"""500 jobs with deadlines of minutes on one chain: whether any window is missed, and how much time was to spare.

Jobs come in batches, as fast as the chain takes them, most of them honest; the others have one spoilt row, and their
worker denies everything. A job is in time if it was judged, and if it is guilty challenged, before its window was over.
"""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench._watched import Street, become
from bench.kill import LOADED
from challenger.store import LIVE, GameState, JobState, Store
from contracts.events import GameMoved

BATCH = 25
FINISH_SECONDS = 3600.0


def run(jobs: int = 500, wrong: int = 25, least_seconds: int = 240, most_seconds: int = 600) -> dict[str, Any]:
    """least_seconds, most_seconds: of the jobs' windows, drawn evenly. Returns {"results": a row a job, "summary"}."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    chance = random.Random(2)
    guilty = set(chance.sample(range(jobs), wrong))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plumb-jobs-") as folder, Street(Path(folder), 1) as street:
        config = street.config(downloads=8)
        street.defend()
        tower = context.Process(target=become, args=(str(street.config_file), str(street.log)), daemon=True)
        tower.start()
        ids: list[bytes] = []
        for first in range(0, jobs, BATCH):
            with street.hurrying():
                for number in range(first, min(first + BATCH, jobs)):
                    window = chance.randrange(least_seconds, most_seconds + 1)
                    served = street.wrong if number in guilty else street.right
                    ids.append(street.town.commit(served, window=window, clock=60))
        committed = time.monotonic() - started
        print(f"  {jobs} jobs committed in {committed:.0f} s", flush=True)
        store, end = Store(config.database_url), time.monotonic() + FINISH_SECONDS
        while len(store.jobs(*JobState)) < jobs or store.due() or store.games(*LIVE):
            if tower.exitcode is not None or time.monotonic() > end:
                raise RuntimeError(f"expected all jobs to be judged: {street.log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(1)
        assert tower.pid is not None
        os.kill(tower.pid, signal.SIGKILL)
        tower.join()
        rows = _rows(street, store, ids, guilty)
        lost = len(store.games(GameState.LOST, GameState.DROPPED))
        store.close()
    spare = [row["spare_seconds"] for row in rows if row["spare_seconds"] is not None]
    summary = {
        "jobs": jobs,
        "guilty": wrong,
        "missed": sum(not row["in_time"] for row in rows),
        "convicted": sum(row["convicted"] for row in rows),
        "innocent_convicted": sum(row["convicted"] and not row["guilty"] for row in rows),
        "games_lost_or_dropped": lost,
        "least_spare_seconds": min(spare),
        "median_spare_seconds": median(spare),
        "seconds_to_commit_all": committed,
        "seconds": time.monotonic() - started,
    }
    return {"results": rows, "summary": summary}


def _rows(street: Street, store: Store, ids: list[bytes], guilty: set[int]) -> list[dict[str, Any]]:
    opened: dict[bytes, int] = {}
    for event in street.bank.events(street.first_block):
        if isinstance(event, GameMoved):
            opened.setdefault(event.game.segment.job, event.game.turn_started)
    rows = []
    for number, id in enumerate(ids):
        row = store.job(id.hex())
        judged = row.receipt.get("judged_at") if row else None
        wrong = number in guilty
        done = opened.get(id) if wrong else judged
        spare = row.window_end - done if row and done is not None else None
        right = row is not None and row.state == (JobState.SUSPECT if wrong else JobState.CLEAN)
        convicted = street.bank.escrow.convicted(id, street.guilty) or street.bank.escrow.convicted(id, 0)
        rows.append(
            {
                "job": number,
                "guilty": wrong,
                "state": row.state if row else "unseen",
                "spare_seconds": spare,
                "convicted": convicted,
                "in_time": right and spare is not None and spare >= 0 and (convicted or not wrong),
            }
        )
    return rows
