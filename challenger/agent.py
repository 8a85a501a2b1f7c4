"""The loop of a watchtower: read the chain, have committed jobs audited, challenge what is wrong, play every game to
its end.
"""

from __future__ import annotations

import fcntl
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import IO

from challenger.charge import Charge
from challenger.config import Config, ConfigError
from challenger.desk import Desk, Outcome, Task
from challenger.evidence import Archive, Dossier, Evidence, Unavailable, read_facts
from challenger.fetch import Ask, Fetcher
from challenger.fleet import Fleet
from challenger.games import Games
from challenger.judge import Findings, Judge, Work
from challenger.metrics import Metrics
from challenger.plan import plan, write_receipt
from challenger.reader import KEEP_BLOCKS, Reader
from challenger.registered import check_registered
from challenger.store import GameRow, JobRow, JobState, Store
from challenger.strategy import parse_strategy
from challenger.withheld import Withheld
from contracts.client import Chain, ChainError, ChainUnreachable, ContractsError, Status
from contracts.play import GameLog
from verifier.audit import Verdict
from verifier.canonical import Case

log = logging.getLogger("plumb.challenger")

FAULTS = 3  # of ours, not of a worker: an audit that failed so often is given up
LONGEST_PAUSE_SECONDS = 10.0
LEAST_FETCH_SECONDS = 5.0
SLICE_SECONDS = 10.0  # of a first attempt while other jobs wait; what was downloaded by then is kept
TIDY_BLOCKS = 16


class Agent:
    """One watchtower with one key.

    `tick` may be called again after any crash: what was decided is in the store, what was done is on chain or in the
    store's journal, and what it was decided on is in the archive.
    """

    def __init__(
        self, config: Config, chain: Chain, judges: dict[bytes, Judge], store: Store, lock: IO[str] | None = None
    ) -> None:
        """lock: a file that is locked while this object lives."""
        self._lock = lock
        self.config = config
        self.chain = chain
        self.judges = judges
        self.store = store
        self.metrics = Metrics()
        self.archive = Archive(config.data / "jobs", store)
        self.fetcher = Fetcher(self.archive, config.max_stage_bytes)
        self.desk = Desk(self._fetch, lambda judge, evidence: self.findings(judge, evidence), config.downloads)
        self.log = GameLog()
        self.withheld = Withheld(self)
        self.games = Games(self)
        self.reader = Reader(self)
        self._evidence: dict[bytes, Dossier] = {}
        self._tidied = -TIDY_BLOCKS  # the head when it was tidied up last
        self._journalled = False
        self._faults: dict[str, int] = {}
        self._fleets: dict[bytes, Fleet] = {}  # by model
        self._seeds: dict[bytes, bytes] = {}  # SAFETY: secret, and made after the commitment was seen
        self.purse = threading.Lock()  # whoever moves what the contracts owe us, or counts on it

    @classmethod
    def build(cls, config: Config, chain: Chain) -> Agent:
        """Loads and identifies every model folder of the configuration.

        A folder that cannot be used is refused by its own error, one that is not registered by WrongModel, a database
        by StoreError; ConfigError if another process uses the data, or no cluster is at `ray`.
        """
        config.data.mkdir(parents=True, exist_ok=True)
        lock = (config.data / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ConfigError(f"another watchtower works in {config.data}") from error
        try:
            judges: dict[bytes, Judge] = {}
            for folder in config.models:
                judge = Judge(folder)
                check_registered(chain, judge)
                judges[judge.id] = judge
                log.info("judging model %s from %s", judge.id.hex(), folder)
            agent = cls(config, chain, judges, Store(config.database_url), lock)
            for judge in judges.values():
                agent.work_of(judge)
            return agent
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Lets another process work in the data folder."""
        self.store.close()
        if self._lock is not None:
            self._lock.close()

    def run(self) -> None:
        """Until the process ends. A fault is logged and costs nobody but its own job or game anything."""
        while True:
            pause = self.config.poll_seconds
            try:
                if self.tick():
                    pause = 0.0
            except ChainUnreachable as error:  # it has waited already
                self.metrics.faults.inc()
                log.warning("%s", error)
            except Exception:  # the loop must outlive everything; the trace says what it was
                self.metrics.faults.inc()
                log.exception("looking around")
            time.sleep(pause)

    def tick(self) -> bool:
        """One look around. Games come first: they have clocks. Returns whether anything was done."""
        self.resume()
        first = self._tidied < 0
        if first:
            self.tidy()  # before: what fails here must not keep games waiting
        self.reader.read()
        if self.reader.head >= self._tidied + TIDY_BLOCKS and not first:
            self.tidy()
        now = self.chain.block_timestamp()
        acted = self.games.play(now)
        acted = self.work(now) or acted
        self.metrics.count(self.chain.receipts)
        return acted

    def resume(self) -> None:
        """Follows what was signed and may not be on chain, before anything is decided again."""
        if not self._journalled:
            self.chain.transport.journal = self.store.journal(self.chain.chain_id, self.chain.account)
            self._journalled = True
        for signed in self.chain.transport.resume():
            log.info("%s with nonce %d: followed to its end", signed.label, signed.nonce)

    def tidy(self) -> None:
        """Draws what a crash left undrawn, and deletes what nobody needs any more."""
        head = max(self.reader.head, 0)
        self._tidied = head
        self.collect()
        needed = {row.id for row in self.store.jobs(JobState.WATCHED, JobState.WITHHELD)}
        needed |= self.store.playing(self.reader.next_block - 1 - KEEP_BLOCKS)
        for job in (self.archive.jobs() | self.withheld.known()) - needed:
            self.forget(bytes.fromhex(job))

    # ---- auditing

    def work(self, now: int) -> bool:
        """Takes in what was audited and starts on what is due. Returns whether anything was decided."""
        decided = False
        for outcome in self.desk.finished():
            decided |= self.conclude(outcome, now)
        rows = self.store.due()
        self.metrics.waiting.set(len(rows))
        self.metrics.deadline.set(rows[0].window_end - now if rows else float("inf"))
        crowded = len(rows) > self.config.downloads
        # SAFETY: half of the desk goes by deadlines, half by who was looked at least often, or slow servers whose
        # windows end early, asked again and again, would keep all others from being looked at.
        turns = [(row, True) for row in rows] + [(row, False) for row in sorted(rows, key=lambda row: row.attempts)]
        over: set[str] = set()
        for row, urgent in turns:
            if row.id not in over and self.desk.free(bytes.fromhex(row.id), urgent):
                try:
                    over |= {row.id} if self.take_up(row, now, crowded, urgent) else set()
                except ChainError as error:
                    log.error("job %s: %s", row.id, error)
                    self.desk.pause(bytes.fromhex(row.id), LONGEST_PAUSE_SECONDS)
        return self.withheld.advance(now) or decided or bool(over)

    def take_up(self, row: JobRow, now: int, crowded: bool = False, urgent: bool = False) -> bool:
        """Starts an attempt at a job. Returns whether it needs none. crowded: whether others wait for their turn."""
        id = bytes.fromhex(row.id)
        if now > row.window_end or self.chain.escrow.status(id) not in (Status.COMMITTED, Status.VOID):
            self.unjudged(row.id, "its window was over before it was audited")
            return True
        job = self.chain.escrow.job(id)
        judge = self.judges.get(job.model)
        if judge is None:
            self.unjudged(row.id, f"its model 0x{job.model.hex()} is not one of this watchtower's")
            return True
        # Half of the window is for waiting: what is missing then is judged without, and games need time to open.
        # Demands go in rounds, and each may take the worker's whole clock: for these, three quarters are left.
        waited = job.window // 4 if self.config.demand_budget else job.window // 2
        patience = row.window_end - job.window + waited - now
        seconds = patience if patience > 0 else (row.window_end - now) / 2
        if crowded and patience > 0:  # a slow server must not keep others from being looked at; it is asked again
            seconds = min(seconds, SLICE_SECONDS * 2.0 ** min(row.attempts, 32))
        most = max(seconds, LEAST_FETCH_SECONDS)
        self.desk.start(Task(id, judge, most, patience <= 0, row.window_end, urgent=urgent))
        return False

    def conclude(self, outcome: Outcome, now: int) -> bool:
        """Stores what came of an attempt. Returns whether the job is done with."""
        id, job, error = outcome.task.id, outcome.task.id.hex(), outcome.error
        if outcome.evidence is not None and outcome.findings is not None:
            self._judged(outcome.evidence, outcome.findings, outcome.audit_seconds, now)
            return True
        attempts = self.store.attempted(job)
        ours = not isinstance(error, Unavailable | ContractsError)
        log.warning("job %s, attempt %d: %s", job, attempts, error, exc_info=error if ours else None)
        self._faults[job] = self._faults.get(job, 0) + ours
        if self._faults[job] >= FAULTS or (isinstance(error, Unavailable) and outcome.task.final):
            if not ours and self.config.demand_budget:
                self.withheld.begin(job, str(error), self.reader.next_block)
            else:
                self.unjudged(job, str(error) if not ours else f"{type(error).__name__}: {error}")
            return True
        row = self.store.job(job)
        self.desk.pause(id, (row.window_end - now) / 4 if row else 0.0)
        return False

    def _judged(self, evidence: Evidence, findings: Findings, seconds: float, now: int) -> None:
        job = evidence.id.hex()
        if evidence.missing and not findings.wrong and self.config.demand_budget:
            self.withheld.begin(job, "; ".join(evidence.missing), self.reader.next_block)
            return
        receipt = {"job": job, "seconds": round(seconds, 3), **findings.receipt(), "missing": list(evidence.missing)}
        self.metrics.audits.observe(seconds)
        row = self.store.job(job)
        receipt |= {"model": evidence.job.model.hex(), "judged_at": now, "window_end": row.window_end if row else 0}
        receipt["committed"] = {
            "requests": evidence.job.requests_root.hex(),
            "outputs": evidence.outputs_tree.root.hex(),
            "stages": [tree.root.hex() if tree is not None else "" for tree in evidence.stage_trees],
        }
        if row is not None and now > row.window_end:
            # SAFETY: nothing can be challenged any more, whatever was found. Whoever runs this must hear of it.
            receipt["late_seconds"] = now - row.window_end
            late = "job %s: its audit took %.0f s and outlasted its window by %d s"
            log.warning(late, job, seconds, now - row.window_end)
            self.metrics.late.inc()
        games = [plan(self.chain.account, evidence.id, verdict, self.reader.next_block) for verdict in findings.wrong]
        state = JobState.SUSPECT if games else JobState.UNJUDGED if evidence.missing else JobState.CLEAN
        if state == JobState.UNJUDGED:
            receipt["why"] = "; ".join(evidence.missing)
        for game in games:
            log.warning("challenging %s of job %s: %s", game.segment, job, game.evidence)
        receipt["state"] = str(state)
        self.store.judged(job, state, receipt, games)
        write_receipt(self.config.data / "receipts", receipt)
        self.metrics.jobs.labels(state).inc()
        log.info("job %s: %s, worst %s", job, state, receipt["worst"])
        if not games:
            self.forget(evidence.id)

    def unjudged(self, job: str, why: str) -> None:
        log.warning("job %s stays unjudged: %s", job, why)
        receipt = {"job": job, "state": str(JobState.UNJUDGED), "why": why}
        self.store.judged(job, JobState.UNJUDGED, receipt)
        write_receipt(self.config.data / "receipts", receipt)
        self.metrics.jobs.labels(JobState.UNJUDGED).inc()
        self.forget(bytes.fromhex(job))

    def _fetch(self, task: Task) -> Evidence:
        seed = self._seeds.setdefault(task.id, secrets.token_bytes(16))
        ask = Ask(parse_strategy(self.config.strategy), self.config.audit_seconds, seed, task.closer)
        return self.fetcher.fetch(read_facts(self.chain, task.id), task.judge.weights.shape, task.seconds, ask)

    def findings(self, judge: Judge, evidence: Evidence) -> Findings:
        """What is wrong with a job. Called in a thread of its own.

        Only pieces that canonical arithmetic confirms may come out of here: money is put on them.
        """
        return judge.audit(evidence, self.work_of(judge))

    def work_of(self, judge: Judge) -> Work | None:
        """Who does the units of an audit; None: this thread."""
        if not self.config.ray:
            return None
        if judge.id not in self._fleets:
            self._fleets[judge.id] = Fleet(judge, self.config.ray)
        return self._fleets[judge.id].work

    # ---- what games are played from

    def charge_of(self, row: GameRow) -> Charge:
        """The challenge that was planned."""
        return self.games.charge_of(row)

    def case(self, judge: Judge, evidence: Dossier, verdict: Verdict) -> Case:
        """What we hold to be true of a piece."""
        return judge.case(evidence, verdict)

    def judge_of(self, row: GameRow) -> Judge:
        return self.judges[self.chain.escrow.job(bytes.fromhex(row.job)).model]

    def evidence(self, id: bytes, judge: Judge) -> Dossier:
        """A job's data as it was when it was judged: from disk, and where an inquiry judged it from answered demands.
        Raises Unavailable.
        """
        if id not in self._evidence:
            # SAFETY: anybody may demand, and what was posted is less than what an audit has seen.
            posted = self.withheld.posted(id, judge) if self.withheld.inquired(id) else None
            self._evidence[id] = posted or self.fetcher.load(read_facts(self.chain, id), judge.weights.shape)
        return self._evidence[id]

    def download(self, id: bytes, judge: Judge, seconds: float) -> None:
        """Brings what is missing of a job to disk. Raises Unavailable, ContractsError."""
        self.fetcher.fetch(read_facts(self.chain, id), judge.weights.shape, seconds)

    def release(self, job: bytes) -> bool:
        """Has a void job's locks shared out, unless somebody did. Returns False while games about it are open, somebody
        else's: the escrow waits for them.
        """
        try:
            self.tolerant(lambda: self.chain.escrow.release(job), "AlreadyDone", "WrongStatus")
        except ChainError as error:
            if error.name != "GamesOpen":
                raise
            return False
        return True

    def collect(self) -> None:
        """Draws what the contracts owe this account."""
        with self.purse:
            for door in (self.chain.disputes, self.chain.demands, self.chain.escrow):
                if door.credit(self.chain.account):
                    self.tolerant(door.withdraw, "NothingToWithdraw")

    def forget(self, job: bytes) -> None:
        """Nothing of the job is needed any more."""
        self.forget_evidence(job)
        self.withheld.forget(job)
        self.desk.forget(job)
        self._faults.pop(job.hex(), None)
        self._seeds.pop(job, None)
        self.archive.forget(job)

    def forget_evidence(self, job: bytes) -> None:
        """What is kept of it in memory."""
        self._evidence.pop(job, None)
        self.games.forget(job)

    @staticmethod
    def tolerant(send: Callable[[], object], *harmless: str) -> bool:
        """Sends. Returns False where the contract refused with a harmless error."""
        try:
            send()
        except ChainError as error:
            if error.name not in harmless:
                raise
            return False
        return True
