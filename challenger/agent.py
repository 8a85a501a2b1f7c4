"""The loop of a watchtower: read the chain, have committed jobs audited, challenge what is wrong, play every game to
its end.

Rationale: a little over 400 lines, so that all that one look around does is read in one file.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable
from typing import IO

from challenger.charge import Charge, charge, segment_of
from challenger.config import Config, ConfigError
from challenger.desk import Desk, Outcome, Task
from challenger.evidence import Archive, Dossier, Evidence, Unavailable, read_facts
from challenger.fetch import Fetcher
from challenger.judge import Findings, Judge
from challenger.plan import plan, verdict_of
from challenger.store import LIVE, GameRow, GameState, JobRow, JobState, Store
from challenger.withheld import Withheld
from contracts.client import Chain, ChainError, ChainUnreachable, ContractsError, Status
from contracts.events import GameEnded, GameMoved, JobCommitted
from contracts.play import NOBODY, GameLog, Player
from verifier.audit import Verdict
from verifier.canonical import Case
from verifier.game import Game, Segment, remaining_seconds
from verifier.program import Kind

log = logging.getLogger("plumb.challenger")

EVENT_BLOCKS = 1_000
OVERLAP_BLOCKS = 16  # read again each time: the head may be reorganised, and nodes behind one URL differ
FAULTS = 3  # of ours, not of a worker: an audit that failed so often is given up
LONGEST_REST_SECONDS = 10.0  # clocks are running
LEAST_FETCH_SECONDS = 5.0
UNLIMITED = 2**256 - 1


class Agent:
    """One watchtower with one key.

    `tick` may be called again after any crash: what was decided is in the store, what was done is on chain, and what
    it was decided on is in the archive.
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
        self.archive = Archive(config.data / "jobs")
        self.fetcher = Fetcher(self.archive, config.max_stage_bytes)
        self.desk = Desk(self._fetch, lambda judge, evidence: self.findings(judge, evidence), config.downloads)
        self.log = GameLog()
        self.withheld = Withheld(self)
        self.player = Player(chain, self.case_of, side_is_worker=False)
        self._evidence: dict[bytes, Dossier] = {}
        self._cases: dict[tuple[Segment, int], Case] = {}
        self._rests: dict[str, tuple[float, float]] = {}  # game -> (monotonic time to wait for, length)
        self._tidied = False
        self._next_block = store.next_block(config.from_block)

    @classmethod
    def build(cls, config: Config, chain: Chain) -> Agent:
        """Loads and identifies every model folder of the configuration.

        A folder that cannot be used is refused by its own error; ConfigError if another process uses the data.
        """
        config.data.mkdir(parents=True, exist_ok=True)
        lock = (config.data / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ConfigError(f"another watchtower works in {config.data}") from error
        judges: dict[bytes, Judge] = {}
        for folder in config.models:
            judge = Judge(folder)
            judges[judge.id] = judge
            log.info("judging model %s from %s", judge.id.hex(), folder)
        return cls(config, chain, judges, Store(config.database_url), lock)

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
                log.warning("%s", error)
            except Exception:  # the loop must outlive everything; the trace says what it was
                log.exception("looking around")
            time.sleep(pause)

    def tick(self) -> bool:
        """One look around. Games come first: they have clocks. Returns whether anything was done."""
        if not self._tidied:
            self._tidied = True  # before: what fails here must not keep games waiting
            self.tidy()
        self.read()
        now = self.chain.block_timestamp()
        acted = self.play(now)
        return self.work(now) or acted

    def tidy(self) -> None:
        """After a crash, draws what was left undrawn and deletes what nobody needs any more."""
        self.collect()
        needed = {row.id for row in self.store.jobs(JobState.WATCHED, JobState.WITHHELD)} | {
            row.job for row in self.store.games(*LIVE)
        }
        for job in self.archive.jobs() - needed:
            self.archive.forget(bytes.fromhex(job))

    # ---- reading

    def read(self) -> None:
        """Takes in new events."""
        last = self.chain.block_number()
        if last < self._next_block - 1:
            if last < self._next_block - OVERLAP_BLOCKS:
                log.warning("the node is at block %d, this watchtower has read up to %d", last, self._next_block - 1)
            return  # this node lags behind another one; what it knows would turn games back
        first = max(self._next_block - OVERLAP_BLOCKS, self.config.from_block, 0)
        while first <= last:
            end = min(first + EVENT_BLOCKS - 1, last)
            events = list(self.chain.events(first, end))
            self.withheld.log.feed(events)
            moves = [event for event in events if isinstance(event, GameMoved | GameEnded)]
            if moves:
                ours = {bytes.fromhex(row.id) for row in self.store.games(*LIVE)}
                self.log.feed(event for event in moves if event.id in ours)
            committed = [(event.id.hex(), event.window_end) for event in events if isinstance(event, JobCommitted)]
            if committed or end >= self._next_block:
                self.store.advance(max(end + 1, self._next_block), committed)
            first = end + 1
        self._next_block = max(self._next_block, last + 1)

    # ---- auditing

    def work(self, now: int) -> bool:
        """Takes in what was audited and starts on what is due. Returns whether anything was decided."""
        decided = False
        for outcome in self.desk.finished():
            decided |= self.conclude(outcome, now)
        for row in self.store.due():
            if self.desk.free(bytes.fromhex(row.id)):
                try:
                    decided |= self.take_up(row, now)
                except ChainError as error:
                    log.error("job %s: %s", row.id, error)
                    self.desk.pause(bytes.fromhex(row.id), LONGEST_REST_SECONDS)
        return self.withheld.advance(now) or decided

    def take_up(self, row: JobRow, now: int) -> bool:
        """Starts an attempt at a job. Returns whether it needs none."""
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
        self.desk.start(Task(id, judge, max(seconds, LEAST_FETCH_SECONDS), final=patience <= 0))
        return False

    def conclude(self, outcome: Outcome, now: int) -> bool:
        """Stores what came of an attempt. Returns whether the job is done with."""
        id, job, error = outcome.task.id, outcome.task.id.hex(), outcome.error
        if outcome.evidence is not None and outcome.findings is not None:
            self._judged(outcome.evidence, outcome.findings, outcome.audit_seconds)
            return True
        attempts = self.store.attempted(job)
        ours = not isinstance(error, Unavailable | ContractsError)
        log.warning("job %s, attempt %d: %s", job, attempts, error, exc_info=error if ours else None)
        if (ours and attempts >= FAULTS) or (isinstance(error, Unavailable) and outcome.task.final):
            if not ours and self.config.demand_budget:
                self.withheld.begin(job, str(error), self._next_block)
            else:
                self.unjudged(job, str(error) if not ours else f"{type(error).__name__}: {error}")
            return True
        row = self.store.job(job)
        self.desk.pause(id, (row.window_end - now) / 4 if row else 0.0)
        return False

    def _judged(self, evidence: Evidence, findings: Findings, seconds: float) -> None:
        job = evidence.id.hex()
        if evidence.missing and not findings.wrong and self.config.demand_budget:
            self.withheld.begin(job, "; ".join(evidence.missing), self._next_block)
            return
        receipt = {"job": job, "seconds": round(seconds, 3), **findings.receipt(), "missing": list(evidence.missing)}
        games = [plan(self.chain.account, evidence.id, verdict, self._next_block) for verdict in findings.wrong]
        state = JobState.SUSPECT if games else JobState.UNJUDGED if evidence.missing else JobState.CLEAN
        if state == JobState.UNJUDGED:
            receipt["why"] = "; ".join(evidence.missing)
        for game in games:
            log.warning("challenging %s of job %s: %s", game.segment, job, game.evidence)
        self.store.judged(job, state, receipt, games)
        log.info("job %s: %s, worst %s", job, state, receipt["worst"])
        if not games:
            self.forget(evidence.id)

    def unjudged(self, job: str, why: str) -> None:
        log.warning("job %s stays unjudged: %s", job, why)
        self.store.judged(job, JobState.UNJUDGED, {"job": job, "why": why})
        self.forget(bytes.fromhex(job))

    def _fetch(self, task: Task) -> Evidence:
        return self.fetcher.fetch(read_facts(self.chain, task.id), task.judge.weights.shape, task.seconds)

    def findings(self, judge: Judge, evidence: Evidence) -> Findings:
        """What is wrong with a job. Called in a thread of its own.

        Only pieces that canonical arithmetic confirms may come out of here: money is put on them.
        """
        return judge.audit(evidence)

    # ---- playing

    def play(self, now: int) -> bool:
        """Takes every game of ours one step further. Returns whether anything was sent."""
        acted = False
        for row in sorted(self.store.games(*LIVE, GameState.WON), key=self._urgency):
            if time.monotonic() < self._rests.get(row.id, (0.0, 0.0))[0]:
                continue
            try:
                acted |= self.advance(row, now)
                self._rests.pop(row.id, None)
            except ChainUnreachable:
                raise
            except (ContractsError, Unavailable) as error:
                log.error("game %s: %s", row.id, error)
                self._rest(row)
            except Exception:  # one game's fault must not cost the others their clocks
                log.exception("game %s", row.id)
                self._rest(row)
        return acted

    def advance(self, row: GameRow, now: int) -> bool:
        """One step of one game. Returns whether anything was sent."""
        id = bytes.fromhex(row.id)
        if row.state == GameState.WON:
            return self.share_out(row, now)
        ended = self.log.ended.get(id)
        if ended is not None:
            won = ended.convicted != NOBODY
            log.info("game %s: %s", row.id, "won" if won else "lost")
            self._over(row, GameState.WON if won else GameState.LOST)
            self.collect()
            return True
        followed = self.log.games.get(id)
        if followed is None:
            return self.open(row, now)
        if row.state != GameState.OPEN:
            self.store.mark(row.id, GameState.OPEN)
        return self.player.step(followed, now)

    def open(self, row: GameRow, now: int) -> bool:
        """Commits to a challenge, or opens it a block later. Returns whether anything was sent."""
        id, disputes = bytes.fromhex(row.id), self.chain.disputes
        segment = segment_of(bytes.fromhex(row.job), verdict_of(row))
        if any(disputes.state_of(id)):
            return False  # open or over already; its event comes with the next read
        job = self.store.job(row.job)
        if job is None or (now > job.window_end and now > self.chain.escrow.window_end(segment.job)):
            self._over(row, GameState.DROPPED, "the job's window was over")
            return False
        if not disputes.commitment_of(id):
            if self.chain.escrow.convicted(segment.job, segment.stage):
                # Once committed it is opened all the same: the oldest commitment earns the stake.
                self._over(row, GameState.DROPPED, "the stage was convicted by somebody else")
                return False
            self._tolerant(lambda: disputes.commit(id), "CommitmentExists")
            self.store.mark(row.id, GameState.COMMITTED)
            return True
        prepared, model = self.charge_of(row), self._judge(row).model
        self.fund(segment)
        if prepared.steps:
            evidence, steps = prepared.evidence, prepared.steps
            sent = self._tolerant(
                lambda: disputes.challenge(segment, row.salt, model, evidence, steps), "CommitmentTooRecent"
            )
        else:
            sent = self._tolerant(
                lambda: disputes.show(segment, row.salt, model, prepared.evidence), "CommitmentTooRecent"
            )
        return sent

    def share_out(self, row: GameRow, now: int) -> bool:
        """After the window, has the convicted stake shared out, unless somebody did, and draws our part."""
        job = self.store.job(row.job)
        if job is None or now <= max(job.window_end, self.chain.escrow.window_end(bytes.fromhex(row.job))):
            return False
        try:
            self.release(bytes.fromhex(row.job))
        except ChainError as error:
            if error.name != "GamesOpen":  # somebody else's; `release` waits for them
                raise
            self._rest(row)
            return False
        self.store.mark(row.id, GameState.CLOSED)
        self.collect()
        return True

    def release(self, job: bytes) -> None:
        """Has a void job's locks shared out, unless somebody did."""
        self._tolerant(lambda: self.chain.escrow.release(job), "AlreadyDone", "WrongStatus")

    def charge_of(self, row: GameRow) -> Charge:
        """The challenge that was planned, built again from the job's data."""
        judge, verdict = self._judge(row), verdict_of(row)
        evidence = self.evidence(bytes.fromhex(row.job), judge)
        return charge(evidence, judge, verdict, lambda: self._case(judge, evidence, verdict))

    def case(self, judge: Judge, evidence: Dossier, verdict: Verdict) -> Case:
        """What we hold to be true of a piece."""
        return judge.case(evidence, verdict)

    def case_of(self, game: Game) -> Case:
        """The truth about the piece that a game is over."""
        judge, place = self.judges[game.model_id], game.segment
        at = (place.request, place.layer, place.position, place.unit)
        verdict = Verdict(0.0, place.stage, Kind(place.kind), *at, game.token)
        return self._case(judge, self.evidence(place.job, judge), verdict)

    def evidence(self, id: bytes, judge: Judge) -> Dossier:
        """A job's data as it was when it was audited, from disk and from answered demands. Raises Unavailable."""
        if id not in self._evidence:
            posted = self.withheld.posted(id, judge)
            self._evidence[id] = posted or self.fetcher.load(read_facts(self.chain, id), judge.weights.shape)
        return self._evidence[id]

    def fund(self, segment: Segment) -> None:
        """Lets Disputes draw the bond."""
        chain = self.chain
        bond = chain.disputes.bond_for(segment.job, segment.stage)
        if chain.token.allowance(chain.account, chain.disputes.address) < bond:
            chain.token.approve(chain.disputes.address, UNLIMITED)

    def collect(self) -> None:
        """Draws what the contracts owe this account."""
        for door in (self.chain.disputes, self.chain.demands, self.chain.escrow):
            if door.credit(self.chain.account):
                door.withdraw()

    def _case(self, judge: Judge, evidence: Dossier, verdict: Verdict) -> Case:
        """Kept while the job's games live: vectors are computed once."""
        key = (segment_of(evidence.id, verdict), verdict.token)
        if key not in self._cases:
            self._cases[key] = self.case(judge, evidence, verdict)
        return self._cases[key]

    def _judge(self, row: GameRow) -> Judge:
        return self.judges[self.chain.escrow.job(bytes.fromhex(row.job)).model]

    def _over(self, row: GameRow, state: GameState, note: str = "") -> None:
        """A game ended; the job's data go with its last one."""
        if note:
            log.warning("game %s: not opened: %s", row.id, note)
        self.store.mark(row.id, state, note)
        id = bytes.fromhex(row.id)
        self.log.forget(id)
        self.player.forget(id)
        if not any(game.state in LIVE for game in self.store.games_of(row.job)):
            self.forget(bytes.fromhex(row.job))

    def forget(self, job: bytes) -> None:
        """Nothing of the job is needed any more."""
        self._evidence.pop(job, None)
        self.withheld.forget(job)
        self._cases = {key: case for key, case in self._cases.items() if key[0].job != job}
        self.desk.forget(job)
        self.archive.forget(job)

    def _urgency(self, row: GameRow) -> int:
        """Seconds that the side to move has left; a game to be opened comes before those."""
        followed = self.log.games.get(bytes.fromhex(row.id))
        return remaining_seconds(followed.game, followed.game.turn_started) if followed else 0

    def _rest(self, row: GameRow) -> None:
        _, before = self._rests.get(row.id, (0.0, 0.5))
        length = min(2 * before, LONGEST_REST_SECONDS)
        self._rests[row.id] = (time.monotonic() + length, length)

    @staticmethod
    def _tolerant(send: Callable[[], object], *harmless: str) -> bool:
        """Sends. Returns False where the contract refused with a harmless error."""
        try:
            send()
        except ChainError as error:
            if error.name not in harmless:
                raise
            return False
        return True
