"""Demands what workers withhold, within a budget, and follows what comes of it: the hands of challenger/inquiry.py.

What was demanded and answered is on chain, so nothing of it is stored; a restarted watchtower reads it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

from challenger.inquiry import Inquiry, Step
from contracts.client import Chain, ChainError, demand_id
from contracts.events import DemandAnswered, DemandLapsed, DemandOpened, Event
from verifier.audit import Verdict
from verifier.demand import Demand, Demanded, answer_gas, grid_of
from verifier.demand import price as price_at
from verifier.referee.codec import Model, Opening

log = logging.getLogger("plumb.challenger.demander")

UNLIMITED = 2**256 - 1


@dataclass
class JobDemands:
    """The demands on one job, whoever made them, as far as events were read."""

    demanded: dict[bytes, Demanded] = field(default_factory=dict)
    answers: dict[bytes, tuple[Opening, ...]] = field(default_factory=dict)
    lapsed: dict[bytes, int] = field(default_factory=dict)  # -> stage
    block: int = 0  # of the first one

    @property
    def open(self) -> list[bytes]:
        return [id for id in self.demanded if id not in self.answers and id not in self.lapsed]

    def spent(self, account: str) -> int:
        """What an account paid for demands, in base units, but for what lapsed ones returned."""
        ours = {id: held for id, held in self.demanded.items() if held.demander == account}
        return sum(held.burned + (0 if id in self.lapsed else held.pay) for id, held in ours.items())


class DemandLog:
    """All demands since reading began, by job. Feeding the same events again changes nothing."""

    def __init__(self) -> None:
        self.jobs: dict[bytes, JobDemands] = {}

    def feed(self, events: Iterable[Event]) -> None:
        for event in events:
            if not isinstance(event, DemandOpened | DemandAnswered | DemandLapsed):
                continue
            job = self.jobs.setdefault(event.job, JobDemands(block=event.block))
            if isinstance(event, DemandOpened):
                job.demanded[event.id] = event.demanded
            elif isinstance(event, DemandAnswered):
                job.answers[event.id] = event.openings
            else:
                job.lapsed[event.id] = event.stage

    def of(self, job: bytes) -> JobDemands:
        return self.jobs.get(job, JobDemands())

    def forget(self, job: bytes) -> None:
        self.jobs.pop(job, None)


class Progress(Enum):
    WAITING = "waiting"
    SENT = "sent"
    WRONG = "wrong"  # pieces that may be challenged
    SILENT = "silent"  # a stage let a deadline pass: convicted
    OVER = "over"  # nothing was found with what the budget bought


class Demander:
    """The inquiry into one job. Its thoughts are thought in a thread: games must not wait for them."""

    def __init__(self, chain: Chain, log_: DemandLog, inquiry: Inquiry, model: Model, budget: int) -> None:
        """budget: base units for this job in all."""
        self.chain, self.log, self.inquiry, self.model, self.budget = chain, log_, inquiry, model, budget
        self.id = inquiry.posted.id
        self.wrong: tuple[Verdict, ...] = ()
        self.why = ""
        self._fed: set[bytes] = set()
        self._request = 0
        self._thread = ThreadPoolExecutor(1, "inquiry")
        self._thought: Future[Step] | None = None
        self._step: Step | None = None  # what was thought last, until something that it asks for is answered

    def advance(self, now: int) -> Progress:
        """One look. now: the latest block's timestamp. Raises ContractsError, and what an inquiry raises."""
        held = self.log.of(self.id)
        late = [id for id in held.open if held.demanded[id].deadline < now]
        for id in late:
            self._lapse(id, held.demanded[id])
        if late:
            return Progress.SENT
        if held.lapsed:
            self.why = f"stage {min(held.lapsed.values())} did not post what was demanded of it"
            return Progress.SILENT
        if self._step is None:
            if self._thought is None:
                self._thought = self._thread.submit(self._think, dict(held.answers))
            if not self._thought.done():
                return Progress.WAITING
            future, self._thought = self._thought, None
            self._step = future.result()
        if self._step.wrong:
            self.wrong = self._step.wrong
            return Progress.WRONG
        # SAFETY: anybody may demand, before us or beside us. What others ask for is not waited for unless it is what
        # we would ask for, or an accomplice held us up until the window is over; and once it is answered we go on.
        asked = {demand_id(demand) for demand in self._step.demands}
        if asked & set(held.open):
            return Progress.WAITING
        if (asked & held.answers.keys()) - self._fed:
            self._step = None
            return Progress.WAITING
        return self._ask(held, self._step)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _think(self, answers: dict[bytes, tuple[Opening, ...]]) -> Step:
        """The next step, of the first request that has one; requests without a finding are left behind."""
        held = self.log.of(self.id)
        for id, openings in answers.items():
            if id not in self._fed:
                self.inquiry.posted.feed(held.demanded[id].demand, openings)
                self._fed.add(id)
        while self._request < self.inquiry.posted.job.requests:
            step = self.inquiry.step(self._request)
            if step.wrong or any(demand_id(demand) not in self._fed for demand in step.demands):
                return step
            self._request += 1
        return Step()

    def _ask(self, held: JobDemands, step: Step) -> Progress:
        chain, account = self.chain, self.chain.account
        asked = [demand for demand in step.demands if demand_id(demand) not in held.demanded]
        if not asked:
            self.why = "nothing wrong was found in what was posted"
            return Progress.OVER
        left = self.budget - held.spent(account)
        for place, demand in enumerate(asked):
            price = chain.demands.price_of(demand, self.model)
            if place and price > self._least(demand):
                break  # what we have sent ourselves makes the next one dearer: it waits for the answers
            if price > left:
                self.why = f"the next demand costs {price} base units, of the budget {left} are left"
                return Progress.OVER
            left -= price
            if chain.token.allowance(account, chain.demands.address) < price:
                chain.token.approve(chain.demands.address, UNLIMITED)
            log.warning("job %s: demanding %s for %d", self.id.hex(), demand, price)
            if not self._demand(demand, price):
                return Progress.OVER
        return Progress.SENT

    def _least(self, demand: Demand) -> int:
        """The price while nothing is queued."""
        posted = self.inquiry.posted
        stage = posted.stages[demand.stage]
        grid = grid_of(demand, self.model, stage.first_layer, stage.end_layer)
        return price_at(answer_gas(demand, grid) * posted.job.gas_rate, 0)

    def _demand(self, demand: Demand, most: int) -> bool:
        """Sends. Returns whether demands are still taken."""
        try:
            self.chain.demands.demand(demand, self.model, most)
        except ChainError as error:
            if error.name in ("TooLate", "WrongStatus"):
                self.why = f"no demands are taken any more: {error}"
                return False
            if error.name not in ("DemandExists", "PriceTooHigh"):  # somebody was faster: the next look settles it
                raise
        return True

    def _lapse(self, id: bytes, demanded: Demanded) -> None:
        try:
            self.chain.demands.lapse(id, demanded)
        except ChainError as error:
            if error.name != "WrongState":  # somebody else's call came first
                raise
