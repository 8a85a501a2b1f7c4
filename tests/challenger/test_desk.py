"""What has least time left is looked at first, and thousands of jobs at once overwhelm nothing."""

import random
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import challenger.desk
from bench._town import until
from challenger.agent import Agent
from challenger.config import Config
from challenger.desk import Desk, Task
from challenger.evidence import Evidence, Unavailable
from challenger.judge import Findings, Judge
from challenger.store import JobState, Store
from contracts.client import Chain, Status

NOTHING = Findings(0, {}, (), 0)


class Told:
    """Evidence of nothing but whose it is."""

    missing = ()

    def __init__(self, id: bytes) -> None:
        self.id = id


def task(number: int, deadline: int) -> Task:
    return Task(number.to_bytes(4, "big"), cast(Judge, None), 1.0, True, deadline)


def fetch(task: Task) -> Evidence:
    return cast(Evidence, Told(task.id))


def test_audits_are_done_in_the_order_of_their_deadlines() -> None:
    audited: list[bytes] = []
    go = threading.Event()

    def audit(judge: Judge, evidence: Evidence) -> Findings:
        assert go.wait(60)
        audited.append(evidence.id)
        return NOTHING

    desk = Desk(fetch, audit, 20)
    first = task(0, 999)  # is being audited when the others arrive
    desk.start(first)
    until(lambda: desk._auditing)
    deadlines = random.Random(3).sample(range(100), 12)
    tasks = [task(number, deadline) for number, deadline in enumerate(deadlines, 1)]
    for each in tasks:
        desk.start(each)
    until(lambda: len(desk._waiting) == len(tasks))
    go.set()
    until(lambda: len(audited) == len(tasks) + 1)
    assert audited == [first.id, *(each.id for each in sorted(tasks, key=lambda each: each.deadline))]


def test_thousands_of_jobs_are_taken_up_by_their_deadlines_a_few_at_a_time(tmp_path: Path) -> None:
    jobs, capacity = 3000, 8
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    ends = list(range(1000, 1000 + jobs))
    random.Random(4).shuffle(ends)
    store.advance(5, [(number.to_bytes(32, "big").hex(), end, 1) for number, end in enumerate(ends)])
    at_once: list[int] = []
    lock, running = threading.Lock(), 0

    def look(task: Task) -> Evidence:
        nonlocal running
        with lock:
            running += 1
            at_once.append(running)
        found = fetch(task)
        with lock:
            running -= 1
        return found

    desk = Desk(look, lambda judge, evidence: NOTHING, capacity)
    started: list[int] = []
    rows = store.due()
    assert [row.window_end for row in rows] == sorted(ends)

    def work() -> bool:
        for outcome in desk.finished():
            assert outcome.error is None and outcome.findings is NOTHING
            done.append(outcome.task.id)
        while rows and desk.free(bytes.fromhex(rows[0].id)):
            row = rows.pop(0)
            started.append(row.window_end)
            desk.start(Task(bytes.fromhex(row.id), cast(Judge, None), 1.0, True, row.window_end))
        return len(done) == jobs

    done: list[Any] = []
    while not work():
        pass
    assert started == sorted(ends) and len(set(done)) == jobs and max(at_once) <= capacity
    store.judged(done[0].hex(), JobState.CLEAN, {})
    assert len(store.due()) == jobs - 1
    store.close()


def test_slow_servers_with_early_windows_keep_no_job_from_being_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times as many as the desk has places, each asked again as soon as it may be."""
    monkeypatch.setattr(challenger.desk, "LONGEST_PAUSE_SECONDS", 0.05)
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    slow, late = [number.to_bytes(32, "big") for number in range(12)], b"\xff" * 32
    store.advance(5, [(id.hex(), 2 * 10**6 + place, 1) for place, id in enumerate([*slow, late])])
    escrow = SimpleNamespace(
        status=lambda _: Status.COMMITTED, job=lambda _: SimpleNamespace(model=b"", window=2 * 10**6)
    )
    chain = cast(Chain, SimpleNamespace(escrow=escrow))
    config = Config("http://unused", tmp_path, tmp_path, tmp_path, (tmp_path,), tmp_path, downloads=4)
    agent, asked = Agent(config, chain, {b"": cast(Judge, object())}, store), Counter[bytes]()

    def give(task: Task) -> Evidence:
        asked[task.id] += 1
        time.sleep(0.2)
        raise Unavailable("in good time")

    agent.desk = Desk(give, lambda judge, evidence: NOTHING, config.downloads)

    def tried() -> bool:
        agent.work(0)
        return asked[late] > 0 and all(asked[id] > 1 for id in slow)

    until(tried, 10.0)
    store.close()
