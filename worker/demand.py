"""Posts what is demanded of this worker's jobs: data that somebody was refused, or says so (docs/protocol.md,
"Demands").

All it needs is on disk and on chain, so a restarted worker takes its demands up where they stand.
"""

import asyncio
import logging
from collections.abc import Callable

from contracts.client import Chain, ChainError, ContractsError
from contracts.events import DemandAnswered, DemandLapsed, DemandOpened
from verifier.commit import OutputsTree, RequestsTree, StageTree, make_outputs
from verifier.demand import Demand, Demanded, Wanted, answer_tokens, answer_trace
from verifier.referee.codec import Model, Opening
from worker.errors import UnknownJob, WorkerError
from worker.job import JobFolder
from worker.retain import Traces

log = logging.getLogger("plumb.worker.demand")

RETRY_SECONDS = 2.0  # before a demand that could not be answered is tried again
OVER = ("WrongState", "TooLate")  # answered already, or lost: nothing is left to do


class Answerer:
    """Answers demands on stages that `folder_of` has the files of."""

    def __init__(self, chain: Chain, model: Model, traces: Traces, folder_of: Callable[[bytes], JobFolder]) -> None:
        self.chain = chain
        self.model = model
        self.traces = traces
        self.folder_of = folder_of
        self._open: dict[bytes, Demanded] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def open_demands(self) -> dict[bytes, Demanded]:
        return dict(self._open)

    def opened(self, event: DemandOpened) -> None:
        demand = event.demanded.demand
        try:
            ours = self.folder_of(demand.job).load_state().stage == demand.stage
        except UnknownJob:
            return
        if ours:
            self._open[event.id] = event.demanded
            what = f"kind {demand.kind}, request {demand.request}, {demand.count} leaves from {demand.first}"
            until = event.demanded.deadline
            log.warning("demand %s of job %s: %s, until %d", event.id.hex()[:8], demand.job.hex()[:8], what, until)

    def closed(self, event: DemandAnswered | DemandLapsed) -> None:
        if self._open.pop(event.id, None) is not None and isinstance(event, DemandLapsed):
            log.error("demand %s: LOST, we were too late", event.id.hex()[:8])

    def tick(self) -> None:
        """Starts answering, if anything waits. SAFETY: whether it is too late is for the chain alone to say. A worker
        whose clock is fast would fall silent, and be convicted for that.
        """
        if self._task is not None and not self._task.done():
            return
        # One after the other, the first deadline first: so none is late if each takes no longer than `grace`.
        due = sorted(self._open, key=lambda id: self._open[id].deadline)
        if due:
            self._task = asyncio.create_task(self._answer(due))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def openings(self, demand: Demand) -> tuple[Opening, ...]:
        """What was demanded, from disk. Blocking. Raises WorkerError, OSError, ValueError."""
        folder, r = self.folder_of(demand.job), demand.request
        if demand.kind == Wanted.PROMPT:
            requests = folder.load_requests()
            return answer_tokens(demand, RequestsTree(requests).record_opening(r), requests[r].prompt)
        state = folder.load_state()
        if demand.kind == Wanted.OUTPUT:
            outputs = make_outputs(state.tokens, folder.load_requests())
            return answer_tokens(demand, OutputsTree(outputs).record_opening(r), outputs[r].tokens)
        trace = self.traces.load(folder, r)
        return answer_trace(demand, StageTree(state.nodes).opening(r), trace, self.model)

    def answer(self, id: bytes, demanded: Demanded) -> None:
        """Posts the answer. Blocking. Raises what `openings` raises, ContractsError."""
        self.chain.demands.answer(id, demanded, self.model, self.openings(demanded.demand))

    async def _answer(self, ids: list[bytes]) -> None:
        for id in ids:
            demanded = self._open.get(id)
            if demanded is None:
                continue
            try:
                await asyncio.to_thread(self.answer, id, demanded)
                self._open.pop(id, None)
                log.info("demand %s: answered", id.hex()[:8])
            except ChainError as error:
                if error.name in OVER:
                    self._open.pop(id, None)
                log.error("demand %s: refused: %s", id.hex()[:8], error)
                await asyncio.sleep(RETRY_SECONDS)
            except (ContractsError, WorkerError, ValueError, OSError) as error:
                log.error("demand %s: %s: %s", id.hex()[:8], type(error).__name__, error)
                await asyncio.sleep(RETRY_SECONDS)
