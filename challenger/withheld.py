"""Jobs whose data is withheld: what begins and ends an inquiry, and what becomes of what it finds.

A job is WITHHELD in the store from the moment on which its data is demanded until that led to challenges, to a
conviction by silence, or to nothing.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from challenger.demander import Demander, DemandLog, Progress
from challenger.evidence import Unavailable, read_facts
from challenger.inquiry import Inquiry
from challenger.judge import Findings, Judge
from challenger.plan import plan
from challenger.posted import Posted
from challenger.store import JobRow, JobState
from contracts.client import ChainUnreachable, ContractsError

if TYPE_CHECKING:
    from challenger.agent import Agent

log = logging.getLogger("plumb.challenger.withheld")

FAULTS = 3  # of ours, after which a job is given up
REST_SECONDS = 10.0  # after one


class Withheld:
    """Part of an Agent, which lends it store, chain and judges."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.log = DemandLog()
        self._demanders: dict[bytes, Demander] = {}

    def begin(self, job: str, why: str, next_block: int) -> None:
        """Data is missing for good: from now on it is demanded. next_block: the first that was not read yet."""
        log.warning("job %s: demanding what is missing: %s", job, why)
        block = self.log.of(bytes.fromhex(job)).block or next_block
        receipt = {"job": job, "why": why, "block": block, "seed": secrets.token_hex(16)}
        self.agent.store.judged(job, JobState.WITHHELD, receipt)

    def advance(self, now: int) -> bool:
        """One look at every such job. Returns whether anything was done."""
        acted = False
        for row in self.agent.store.jobs(JobState.WITHHELD):
            if not self.agent.desk.resting(bytes.fromhex(row.id)):  # however busy the desk is: clocks are running
                acted |= self._inquire(row, now)
        return acted

    def inquired(self, id: bytes) -> bool:
        """Whether an inquiry judged a job, or is about to."""
        row = self.agent.store.job(id.hex())
        return row is not None and "seed" in row.receipt

    def posted(self, id: bytes, judge: Judge) -> Posted | None:
        """What answered demands brought to light of a job, beside what lies on disk; None without any."""
        held = self.log.of(id)
        if not held.answers:
            return None
        found = self._base(id, judge)
        for demand, openings in held.answers.items():
            found.feed(held.demanded[demand].demand, openings)
        return found

    def known(self) -> set[str]:
        """Jobs that somebody's demands are remembered of."""
        return {job.hex() for job in self.log.jobs}

    def forget(self, job: bytes) -> None:
        self.log.forget(job)
        demander = self._demanders.pop(job, None)
        if demander is not None:
            demander.close()

    def _inquire(self, row: JobRow, now: int) -> bool:
        agent, id = self.agent, bytes.fromhex(row.id)
        try:
            demander = self._demander(row)
            progress = demander.advance(now)
            if progress is Progress.SILENT:
                return self._share_out(row, now, demander.why)
        except ChainUnreachable:
            raise
        except Exception as error:  # one job's fault must not cost the others anything
            log.exception("job %s", row.id)
            if not isinstance(error, ContractsError) and agent.store.attempted(row.id) >= FAULTS:
                agent.unjudged(row.id, f"{row.receipt['why']}; demands: {type(error).__name__}: {error}")
            agent.desk.pause(id, REST_SECONDS)
            return False
        if progress is Progress.WRONG:
            block = int(row.receipt["block"])
            games = [plan(agent.chain.account, id, verdict, block) for verdict in demander.wrong]
            for game in games:
                log.warning("challenging %s of job %s", game.segment, row.id)
            wrong = Findings(0, {}, demander.wrong, len(games)).receipt()["wrong"]
            cost = self.log.of(id).spent(agent.chain.account)
            agent.store.judged(
                row.id, JobState.SUSPECT, {**row.receipt, "wrong": wrong, "demands_cost": str(cost)}, games
            )
        elif progress is Progress.OVER:
            agent.unjudged(row.id, f"{row.receipt['why']}; demands: {demander.why}")
        return progress is not Progress.WAITING

    def _share_out(self, row: JobRow, now: int, why: str) -> bool:
        """After the window, has the stake of a stage that stayed silent shared out, and draws our part."""
        agent, id = self.agent, bytes.fromhex(row.id)
        if now <= agent.chain.escrow.window_end(id):
            return False
        if not agent.release(id):
            agent.desk.pause(id, REST_SECONDS)
            return False
        agent.store.judged(row.id, JobState.SUSPECT, {**row.receipt, "why": why})
        agent.collect()
        agent.forget(id)
        return True

    def _demander(self, row: JobRow) -> Demander:
        agent, id = self.agent, bytes.fromhex(row.id)
        if id not in self._demanders:
            judge = agent.judges[agent.chain.escrow.job(id).model]
            inquiry = Inquiry(self._base(id, judge), judge, bytes.fromhex(row.receipt["seed"]))
            self._demanders[id] = Demander(agent.chain, self.log, inquiry, judge.model, agent.config.demand_budget)
        return self._demanders[id]

    def _base(self, id: bytes, judge: Judge) -> Posted:
        """A job as it lies on disk, if anything of it does."""
        facts, shape = read_facts(self.agent.chain, id), judge.weights.shape
        try:
            return Posted(facts, shape, judge.model, self.agent.fetcher.load(facts, shape))
        except Unavailable:
            return Posted(facts, shape, judge.model, None)
