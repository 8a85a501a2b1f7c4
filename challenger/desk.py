"""Downloads and audits beside the games: a worker that is slow to answer must not cost this watchtower a clock.

Every job has a thread of its own while it is looked at. Audits, which compute, go one after the other, the one whose
window ends first in front. Results come back through a queue: store and transactions stay with the thread that plays.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from challenger.evidence import Evidence, Unavailable
from challenger.judge import Findings, Judge
from challenger.look import Look

LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """One attempt at one job. seconds: most that its download may take. deadline: the end of its window.

    final: whether what is missing after it is not waited for any more. closer: requests that must be seen whole.
    urgent: whether it was taken up because its window ends first.
    """

    id: bytes
    judge: Judge
    seconds: float
    final: bool
    deadline: int
    closer: tuple[int, ...] = ()
    urgent: bool = False


@dataclass(frozen=True)
class Outcome:
    """findings: None where nothing was audited; `error` then says why, or the evidence what is missing."""

    task: Task
    evidence: Evidence | None
    findings: Findings | None
    error: Exception | None
    audit_seconds: float


class Desk:
    """`capacity` jobs at the same time."""

    def __init__(
        self,
        fetch: Callable[[Task], Evidence],
        audit: Callable[[Judge, Evidence], Findings],
        capacity: int,
    ) -> None:
        self._fetch = fetch
        self._audit = audit
        self._capacity = capacity
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._turn = threading.Condition()
        self._waiting: list[tuple[int, bytes]] = []  # a heap of (deadline, job)
        self._auditing = False
        self._busy: dict[bytes, bool] = {}  # job -> whether it was urgent
        self._looks: dict[bytes, Look] = {}
        self._stale: set[bytes] = set()  # busy with what counts no more
        self._pauses: dict[bytes, tuple[float, float]] = {}  # job -> (monotonic time to wait for, length)

    def free(self, id: bytes, urgent: bool = False) -> bool:
        """Whether a job may be taken up now. urgent: because its window ends first, which half of the desk is for."""
        if id in self._busy or self.resting(id) or len(self._busy) >= self._capacity:
            return False
        return not urgent or sum(self._busy.values()) < self._capacity // 2

    def resting(self, id: bytes) -> bool:
        """Whether a job is left alone for a while."""
        return id in self._pauses and time.monotonic() < self._pauses[id][0]

    def start(self, task: Task) -> None:
        self._busy[task.id] = task.urgent
        threading.Thread(target=self._work, args=(task,), name=f"job {task.id.hex()[:8]}", daemon=True).start()

    def finished(self) -> list[Outcome]:
        """What came back since the last time."""
        outcomes = []
        while not self._done.empty():
            outcome = self._done.get()
            self._busy.pop(outcome.task.id, None)
            if outcome.task.id in self._stale:
                self._stale.remove(outcome.task.id)
                self._looks.pop(outcome.task.id, None)
            else:
                outcomes.append(outcome)
        return outcomes

    def pause(self, id: bytes, most_seconds: float) -> None:
        """Leaves a job alone for a while, each time twice as long, but no longer than `most_seconds`."""
        _, before = self._pauses.get(id, (0.0, 0.5))
        length = min(2 * before, LONGEST_PAUSE_SECONDS)
        self._pauses[id] = (time.monotonic() + min(length, max(most_seconds, 0.5)), length)

    def forget(self, id: bytes) -> None:
        """Nothing that was seen of it, or is being seen, counts any more."""
        self._pauses.pop(id, None)
        self._looks.pop(id, None)
        self._stale |= {id} & self._busy.keys()

    def _audited(self, task: Task, evidence: Evidence) -> tuple[Findings, float]:
        """When it is this job's turn: what was found, and in how many seconds."""
        place = (task.deadline, task.id)
        with self._turn:
            heapq.heappush(self._waiting, place)
            self._turn.wait_for(lambda: not self._auditing and self._waiting[0] == place)
            heapq.heappop(self._waiting)
            self._auditing = True
        started = time.monotonic()
        try:
            return self._audit(task.judge, evidence), time.monotonic() - started
        finally:
            with self._turn:
                self._auditing = False
                self._turn.notify_all()

    def _work(self, task: Task) -> None:
        evidence, findings, spent = None, None, 0.0
        error: Exception | None = None

        def fetch(closer: tuple[int, ...], seconds: float) -> Evidence:
            return self._fetch(replace(task, closer=closer, seconds=seconds))

        def audit(evidence: Evidence) -> Findings:
            nonlocal spent
            findings, seconds = self._audited(task, evidence)
            spent += seconds
            return findings

        try:
            look = self._looks.setdefault(task.id, Look())
            evidence, findings = look.go_on(fetch, audit, task.seconds, task.final)
            if findings is None:
                error = Unavailable("; ".join(evidence.missing))
            else:  # over: who audits the job once more sees nothing of it as seen
                self._looks.pop(task.id, None)
        except Exception as fault:  # handed over: whoever waits for this job must hear of it, whatever it is
            error = fault
        self._done.put(Outcome(task, evidence, findings, error, spent))
