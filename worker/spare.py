"""A worker that may stand in for another: it is in a pipeline that differs from the job's in that one worker.

While the job is served it holds the prompts and the other's consent, signed in advance, and asks every second how the
other is. Once that one has died, hangs or is slow it collects the consents of the rest, moves the job to its own
pipeline, and serves like any other stage from then on.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.client import Consent, ContractsError, Job, Stage, Status
from worker.admission import check_requests, check_terms
from worker.errors import PeerFault, Refused, WorkerError
from worker.settle import stage_name

if TYPE_CHECKING:
    from worker.agent import Agent

log = logging.getLogger("plumb.worker.spare")

RETRY_SECONDS = 1.0


def place(stages: Sequence[Stage], relief: Sequence[Stage]) -> int | None:
    """The stage at which `relief` has another worker than `stages`, all layers alike; None if that isn't one. Pure."""
    if [(s.first_layer, s.end_layer) for s in stages] != [(s.first_layer, s.end_layer) for s in relief]:
        return None
    changed = [i for i, (old, new) in enumerate(zip(stages, relief, strict=True)) if old.worker != new.worker]
    return changed[0] if len(changed) == 1 else None


class Spare:
    """For one job. `status` follows the chain's events; `advance` does what is due."""

    def __init__(
        self, agent: "Agent", id: bytes, job: Job, stages: tuple[Stage, ...], relief: bytes, index: int
    ) -> None:
        """stages: of the job's pipeline; relief: ours; index: the stage at which we are in it."""
        self.agent = agent
        self.id = id
        self.job = job
        self.stages = stages
        self.relief = relief
        self.index = index
        self.status = Status.OPEN
        self.task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.id.hex()[:8]

    def advance(self, now: int) -> None:
        """`now` in unix seconds of the chain."""
        if self.status is Status.ACCEPTED and now <= self.job.commit_by and self.task is None:
            self.task = asyncio.create_task(self._guarded())

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def _guarded(self) -> None:
        while True:
            try:
                consent = await self._prepare()
                break
            except (WorkerError, ContractsError) as error:
                log.info("job %s: no spare for it: %s", self.name, error)
                await asyncio.sleep(RETRY_SECONDS)
        try:
            await self._watch(consent)
        except Exception:  # a fault here must not go unseen until somebody misses the spare
            log.exception("job %s", self.name)

    async def _prepare(self) -> Consent:
        """What must be had while the other one lives: the prompts, and its consent. Raises Refused, PeerFault."""
        agent, serving = self.agent, self.agent.config.serving
        await asyncio.to_thread(agent.notary.learn, self.id, self.stages)
        now = await asyncio.to_thread(agent.now)
        stake = await asyncio.to_thread(agent.chain.workers.free_stake, agent.account)
        check_terms(replace(self.job, accept_by=now), agent.config.policy, agent.model_id, stake, now)
        folder = agent.folder(self.id)
        if not folder.has_requests():
            url, _ = await asyncio.to_thread(agent.peers.locate, 0, self.stages[0])
            requests = await agent.peers.requests(stage_name(0, self.stages[0]), url, self.id)
            await asyncio.to_thread(check_requests, self.job, requests, agent.stage.shape)
            await asyncio.to_thread(folder.save_requests, requests)
        return await self._consent(self.index, serving.stall_seconds)

    async def _consent(self, index: int, patience_seconds: float) -> Consent:
        """A stage's, to our pipeline. Raises PeerFault."""
        stage, agent = self.stages[index], self.agent
        name = stage_name(index, stage)
        url, _ = await asyncio.to_thread(agent.peers.locate, index, stage)
        consent = await agent.peers.consent(name, url, self.id, self.relief, patience_seconds)
        if not agent.notary.verify_move(self.id, index, self.relief, consent):
            raise PeerFault(name, "its consent is not signed with its key")
        return consent

    async def _watch(self, consent: Consent) -> None:
        serving, stage = self.agent.config.serving, self.stages[self.index]
        name = stage_name(self.index, stage)
        well = time.monotonic()
        while True:
            await asyncio.sleep(serving.beat_seconds)
            try:
                url, _ = await asyncio.to_thread(self.agent.peers.locate, self.index, stage)
                await self.agent.peers.well(name, url, self.id, serving)
                well = time.monotonic()
                continue
            except (PeerFault, ContractsError) as error:
                ill_seconds = time.monotonic() - well
                if ill_seconds < serving.silence_seconds:
                    continue
                log.warning("job %s: %s, for %.1f s", self.name, error, ill_seconds)
            try:
                await self._take_over(consent)
                await self.agent.follow()  # the move's event makes a stage of us
                return
            except (Refused, PeerFault, ContractsError) as error:
                log.warning("job %s: not taken over: %s", self.name, error)

    async def _take_over(self, consent: Consent) -> None:
        """Everybody's consent, then one transaction. Raises PeerFault, ContractsError."""
        agent = self.agent
        others = [i for i in range(len(self.stages)) if i != self.index]
        given = await asyncio.gather(*(self._consent(i, agent.config.serving.silence_seconds) for i in others))
        consents = dict(zip(others, given, strict=True)) | {self.index: consent}
        ours = agent.notary.sign_move(self.id, self.relief, self.job.commit_by)
        ordered = [consents[i] for i in range(len(self.stages))]
        await asyncio.to_thread(agent.settler.move, self.id, self.relief, [*ordered, ours])
