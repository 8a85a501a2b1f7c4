"""A worker that may stand in for another: it is in a pipeline that differs from the job's in that one worker.

While the job is served it holds the prompts and the other's consent, signed a short while in advance and renewed, and
asks every second how the other is. Once that one has died, hangs or is slow it collects the consents of the rest, moves
the job to its own pipeline, and serves like any other stage from then on.
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.client import Consent, ContractsError, Job, Stage, Status
from worker.consent import CONSENT_SECONDS, held_until
from worker.errors import PeerFault, Refused, WorkerError
from worker.job import JobState, Phase
from worker.settle import stage_name

if TYPE_CHECKING:
    from worker.agent import Agent

log = logging.getLogger("plumb.worker.spare")

RETRY_SECONDS = 0.25  # of a short job little is left once it is accepted
RENEW_SECONDS = 30.0  # after which the other's consent is asked for anew


class Spare:
    """For one job. `status` follows the chain's events; `advance` does what is due."""

    def __init__(
        self, agent: "Agent", id: bytes, job: Job, stages: tuple[Stage, ...], relief: bytes, index: int
    ) -> None:
        """job: with its pipeline of now; stages: of that; relief: ours; index: the stage at which we are in it."""
        self.agent = agent
        self.id = id
        self.job = job
        self.stages = stages
        self.relief = relief
        self.index = index
        self.status = Status.OPEN
        self.task: asyncio.Task[None] | None = None
        self.watching = False  # all is there that must be had while the other one lives

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
            except (WorkerError, ContractsError, OSError) as error:
                log.info("job %s: no spare for it: %s", self.name, error)
                await asyncio.sleep(RETRY_SECONDS)
        self.watching = True
        try:
            await self._watch(consent)
        except Exception:  # a fault here must not go unseen until somebody misses the spare
            log.exception("job %s", self.name)

    async def _prepare(self) -> Consent:
        """What must be had while the other one lives: the prompts, and its consent. Raises Refused, PeerFault."""
        agent, serving = self.agent, self.agent.config.serving
        await asyncio.to_thread(agent.notary.learn, self.id, self.stages)
        in_time = await asyncio.to_thread(agent.now) + serving.claim_seconds
        await agent.check_terms(replace(self.job, accept_by=int(in_time)))  # it was accepted long ago
        await asyncio.to_thread(agent.check_room, self.id, self.job)
        folder = agent.folder(self.id)
        if not folder.has_requests():
            url, _ = await asyncio.to_thread(agent.peers.locate, 0, self.stages[0])
            requests = await agent.peers.requests(stage_name(0, self.stages[0]), url, self.id)
            await asyncio.to_thread(agent.room.check_requests, self.job, requests)
            await asyncio.to_thread(folder.save_requests, requests)
        return await self._consent(self.index, serving.stall_seconds)

    async def _consent(self, index: int, patience_seconds: float) -> Consent:
        """A stage's, to our pipeline. Raises PeerFault."""
        stage, agent = self.stages[index], self.agent
        name = stage_name(index, stage)
        url, _ = await asyncio.to_thread(agent.peers.locate, index, stage)
        consent = await agent.peers.consent(name, url, self.id, self.relief, patience_seconds)
        if not agent.notary.verify_move(self.id, index, self.job.pipeline, self.relief, consent):
            raise PeerFault(name, "its consent is not signed with its key")
        return consent

    async def _watch(self, consent: Consent) -> None:
        serving, stage = self.agent.config.serving, self.stages[self.index]
        name = stage_name(self.index, stage)
        well = renewed = time.monotonic()
        while True:
            await asyncio.sleep(serving.beat_seconds)
            try:
                url, _ = await asyncio.to_thread(self.agent.peers.locate, self.index, stage)
                await self.agent.peers.well(name, url, self.id, serving)
                well = time.monotonic()
                if well - renewed > RENEW_SECONDS:
                    renewed = well
                    consent = await self._renewed(consent)
                continue
            except (PeerFault, ContractsError) as error:
                ill_seconds = time.monotonic() - well
                if ill_seconds < serving.silence_seconds:
                    continue
                log.warning("job %s: %s, for %.1f s", self.name, error, ill_seconds)
            try:
                await self._take_over(consent)
                await self.agent.follower.follow()  # the move's event makes a stage of us
                return
            except (Refused, PeerFault, ContractsError, OSError) as error:
                log.warning("job %s: not taken over: %s", self.name, error)
                consent = await self._renewed(consent)

    async def _renewed(self, consent: Consent) -> Consent:
        """Or what we have, of a stage that gives none any more: it is lost, or seals its trace."""
        try:
            return await self._consent(self.index, self.agent.config.serving.silence_seconds)
        except (PeerFault, ContractsError) as error:
            log.info("job %s: %s", self.name, error)
            return consent

    async def _take_over(self, consent: Consent) -> None:
        """Everybody's consent, then one transaction. Raises Refused, PeerFault, ContractsError."""
        agent = self.agent
        self._check_time(await asyncio.to_thread(agent.now), consent)
        others = [i for i in range(len(self.stages)) if i != self.index]
        given = await asyncio.gather(*(self._consent(i, 3 * agent.config.serving.silence_seconds) for i in others))
        consents = dict(zip(others, given, strict=True)) | {self.index: consent}
        now = await asyncio.to_thread(agent.now)
        self._check_time(now, consent)
        # SAFETY: on disk before it is signed: what we may be made a stage by, no restart lets us forget.
        state = JobState(Phase.OPEN, self.index, len(self.stages), held_until=held_until())
        agent.folder(self.id).save_state(state)
        until = min(self.job.commit_by, now + CONSENT_SECONDS)
        ours = await asyncio.to_thread(agent.notary.sign_move, self.id, self.job.pipeline, self.relief, until)
        ordered = [consents[i] for i in range(len(self.stages))]
        await asyncio.to_thread(agent.settler.move, self.id, self.relief, [*ordered, ours])

    def _check_time(self, now: int, consent: Consent) -> None:
        """Raises Refused if there is none left to serve the job in, or the other one's consent is over."""
        left, least = self.job.commit_by - now, self.agent.config.policy.min_serving_seconds
        if left < least:
            raise Refused(f"time to serve: expected at least {least}, {left} are left")
        if consent.until < now:
            raise Refused(f"the consent of stage {self.index} was over {now - consent.until} s ago")
