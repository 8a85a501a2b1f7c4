"""One job on one of our pipelines, from its opening to its pay."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from contracts.client import Acceptance, ContractsError, Job, Stage, Status
from verifier.commit import Request
from worker import ring_pb2 as pb
from worker.channel import Peer, Sender
from worker.claims import Claims
from worker.config import Bounds
from worker.consent import Consents
from worker.early import Early
from worker.errors import BadMessage, JobFailed, PeerFault, Refused, UnknownJob, UnpinnedCertificate, WorkerError
from worker.job import JobState, Phase
from worker.run import ATTEMPTS, Run
from worker.scheduler import unfinished
from worker.settle import deadline, stage_name

if TYPE_CHECKING:
    from worker.agent import Agent

log = logging.getLogger("plumb.worker.engagement")

RETRY_SECONDS = 1.0  # between attempts to reach a peer or the chain


class Engagement:
    """`status` and `window_end` follow the chain's events; `advance` does what they ask for."""

    def __init__(
        self, agent: "Agent", id: bytes, job: Job, stages: tuple[Stage, ...], index: int, rings: int = 0
    ) -> None:
        """job: with the pipeline it has now; rings: how many served it before."""
        self.agent = agent
        self.id = id
        self.job = job
        self.stages = stages
        self.index = index
        self.rings = rings
        self.status = Status.OPEN
        self.window_end = 0
        self.folder = agent.folder(id)
        self.run: Run | None = None
        self._kept: list[list[int]] = []  # tokens of an earlier ring
        self._link: Sender | None = None
        self._early = Early(lambda: self.run, agent.config.serving.stall_seconds)
        self._lock = asyncio.Lock()  # of accepting: prompts are fetched and judged once
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._due_after: float = 0.0
        try:
            self.state = self.folder.load_state()
        except UnknownJob:
            self.state = JobState(Phase.OPEN, index, len(stages), rings=rings)
        self.claims = Claims(self)
        self.consents = Consents(self)
        self._enter()

    @property
    def name(self) -> str:
        return self.id.hex()[:8]

    @property
    def closed(self) -> bool:
        return self.state.phase is Phase.CLOSED

    @property
    def predecessor(self) -> tuple[int, Stage]:
        before = (self.index - 1) % len(self.stages)
        return before, self.stages[before]

    @property
    def tokens(self) -> list[list[int]]:
        """Each request's so far, at stage 0 and the last."""
        if self.run is not None:
            return self.run.tokens
        return [list(ids) for ids in self.state.tokens] or self._kept

    def advance(self, now: int) -> None:
        """Starts whatever is due; `now` in unix seconds of the chain."""
        if self.status in (Status.PAID, Status.REFUNDED) and not self.closed:
            self._once("close", self._close(self.status.name.lower()))
            return
        if self.status is Status.OPEN and self.index == 0 and self.folder.has_requests() and now <= self.job.accept_by:
            self._once("acceptances", self._gather_acceptances())
        # An earlier ring than the state's: after a restart, its move is still to be told.
        ours = self.state.phase is not Phase.FAILED and self.rings == self.state.rings
        if self.status is Status.ACCEPTED and now <= self.job.commit_by and ours:
            self._once("serving", self._serve())
        due = deadline(self.job, self.status, self.window_end)
        # Rationale: any stage may send these; stage 0 goes first so that the others rarely pay for a call that comes
        # too late.
        patience = self.agent.config.serving.claim_seconds * (1 if self.index else 0)
        if due is not None and now > due.at + patience and time.monotonic() >= self._due_after:
            self._due_after = time.monotonic() + 5 * RETRY_SECONDS
            self._once("due", asyncio.to_thread(self.agent.settler.due, self.id, due.action), again=True)

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self.run is not None:
            await self.run.close("the worker stops")

    # ------------------------------------------------------------------------------------------------------- accepting

    async def take_requests(self, requests: Sequence[Request]) -> None:
        """Stage 0: the requester's prompts. Raises Refused."""
        if self.index != 0:
            raise Refused(f"prompts go to stage 0, this is stage {self.index}")
        async with self._lock:
            await self.agent.check_terms(self.job)  # before 64 MiB of somebody's prompts are on our disk
            await asyncio.to_thread(self.agent.room.check_requests, self.job, requests)
            if not self.folder.has_requests():
                await asyncio.to_thread(self.folder.save_requests, requests)

    async def accept(self) -> bytes:
        """Our signed acceptance, once we hold all prompts and the terms are ours. Raises Refused, PeerFault."""
        async with self._lock:
            agent = self.agent
            status = await asyncio.to_thread(agent.chain.escrow.status, self.id)
            if status is not Status.OPEN:
                raise Refused(f"expected an open job, it is {Status(status).name.lower()}")
            await agent.check_terms(self.job)
            if not self.folder.has_requests():
                if self.index == 0:
                    raise Refused("the requester has not sent its prompts")
                await self._fetch_requests(0)
            await asyncio.to_thread(agent.check_room, self.id, self.job)
            if self.state.phase is Phase.OPEN:
                await asyncio.to_thread(self._save, self.state.to(Phase.SIGNED))
            return await asyncio.to_thread(agent.notary.sign_accept, self.id, self.index, self.job.model)

    async def _fetch_requests(self, index: int) -> None:
        """The prompts, from another stage. Raises Refused, PeerFault."""
        stage, agent = self.stages[index], self.agent
        url, _ = await asyncio.to_thread(agent.peers.locate, index, stage)
        requests = await agent.peers.requests(stage_name(index, stage), url, self.id)
        await asyncio.to_thread(agent.room.check_requests, self.job, requests)
        await asyncio.to_thread(self.folder.save_requests, requests)

    async def _gather_acceptances(self) -> None:
        """Stage 0: everyone's signatures, then one transaction."""
        agent = self.agent
        try:
            acceptances = [Acceptance(0, await self.accept())]
            await asyncio.to_thread(agent.notary.learn, self.id, self.stages)
            for index, stage in enumerate(self.stages[1:], 1):
                name = stage_name(index, stage)
                url, _ = await asyncio.to_thread(agent.peers.locate, index, stage)
                signature = await agent.peers.acceptance(name, url, self.id)
                if not agent.notary.verify_accept(self.id, index, self.job.model, signature):
                    raise PeerFault(name, "its acceptance is not signed with its key")
                acceptances.append(Acceptance(index, signature))
        except (Refused, PeerFault) as error:
            log.warning("job %s is not accepted: %s", self.name, error)
            await asyncio.to_thread(self._tell, str(error))
            raise
        await asyncio.to_thread(agent.settler.accept, self.id, acceptances)

    # --------------------------------------------------------------------------------------------------------- serving

    async def _serve(self) -> None:
        """Joins the ring, serves the batch, sees to it that our claim is on chain."""
        agent = self.agent
        if self.state.phase is Phase.FINISHED:  # by a restart: the claim waits for no neighbour
            await self.claims.post(await self.claims.own())
        n, (before, sender) = len(self.stages), self.predecessor
        if self.rings and not self.folder.has_requests():
            await self._fetch_requests(before)
        requests = await asyncio.to_thread(self.folder.load_requests)
        await asyncio.to_thread(agent.notary.learn, self.id, self.stages)
        if n > 1:
            agent.channel.admit((await self._neighbour(before))[0])
            self._link = agent.channel.to(*await self._neighbour((self.index + 1) % n))
        if self.index == 0 and not any(self._kept) and (self.rings or self.state.attempt):
            self._kept = await self._told_tokens(requests)
        if self.state.phase in (Phase.OPEN, Phase.SIGNED):
            await asyncio.to_thread(self._save, self.state.to(Phase.SERVING, reason=""))
        self.run = Run(
            self.folder,
            self.state,
            requests,
            agent.stage,
            agent.config.serving,
            agent.notary,
            agent.compute,
            self._link,
            stage_name(before, sender),
            agent.recorder_class,
            self._noted,
            ready=self._ready,
            is_well=lambda: agent.peers.is_well(before, sender, self.id, agent.config.serving),
            kept=self._kept,
            rings=self.rings,
        )
        self.run.start()
        with suppress(BadMessage):  # the run has given its attempt up, and told the others
            await self._early.hear()
        try:
            # Who cancels us closes the run itself, and it must not think then that it is over.
            self.state = await asyncio.shield(self.run.finished)
        except JobFailed as error:
            log.error("job %s can't be finished here: %s", self.name, error)
            self._kept, self.run = self.run.tokens, None
            return
        claim = await self.claims.own()
        if self.index == 0:
            await self.claims.post(claim, *await self.claims.others())
        else:
            await asyncio.sleep(agent.config.serving.claim_seconds)
        await self.claims.post(claim)
        self.run = None  # its tensors and prompts: until the window is over there may be many jobs like this

    async def _told_tokens(self, requests: Sequence[Request]) -> list[list[int]]:
        """Stage 0, without memory of earlier attempts: what the last stage has of them, as far as a request goes on.

        It may tell any that there are: it chooses every token again.
        """
        last = len(self.stages) - 1
        name = stage_name(last, self.stages[last])
        try:
            url, _ = await asyncio.to_thread(self.agent.peers.locate, last, self.stages[last])
            told = await self.agent.peers.tokens(name, url, self.id)
        except (PeerFault, ContractsError) as error:
            log.warning("job %s: its tokens so far are lost: %s", self.name, error)
            return []
        most = self.agent.stage.shape.vocabulary
        if len(told) != len(requests) or not all(0 <= token < most for tokens in told for token in tokens):
            return []
        return [unfinished(request, tokens) for request, tokens in zip(requests, told, strict=True)]

    async def _ready(self) -> list[Bounds]:
        """Stage 0: the others' room for a job, once every one answers and gets on with its work."""
        peers, serving = self.agent.peers, self.agent.config.serving
        while True:
            bounds = []
            try:
                for index, stage in enumerate(self.stages[1:], 1):
                    url, _ = await asyncio.to_thread(peers.locate, index, stage)
                    bounds.append(await peers.well(stage_name(index, stage), url, self.id, serving))
                return bounds
            except (PeerFault, ContractsError) as error:
                log.warning("job %s: the ring waits: %s", self.name, error)
            await asyncio.sleep(serving.beat_seconds)

    # ---------------------------------------------------------------------------------------------------------- moving

    async def moved(self, pipeline: bytes, stages: tuple[Stage, ...], rings: int, index: int | None) -> None:
        """The job goes on with another pipeline, in which we are stage `index`; None: without us. Told once more after
        a restart.
        """
        serving = self._tasks.pop("serving", None)
        if serving is not None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        if self.run is not None:
            self._kept = self.run.tokens
            await self.run.close("the job goes on with another pipeline")
            self.run = None
        self._early.forget()  # of who may not be our predecessor any more
        if self._link is not None:
            self._link.drop(self.id, (rings + 1) * ATTEMPTS)
            self._link = None
        self.job, self.stages, self.rings = replace(self.job, pipeline=pipeline), stages, rings
        if index is None:
            log.warning("job %s: another worker has taken our place", self.name)
            left = JobState(Phase.CLOSED, self.index, len(stages), "another worker has taken our place", rings=rings)
            self._save(left)
            return
        self.index = index
        self._enter()
        self.advance(await asyncio.to_thread(self.agent.now))

    def _enter(self) -> None:
        """Notes in which ring we are. SAFETY: what was sealed in an earlier one is no claim in this, at no moment."""
        if self.state.rings >= self.rings:
            return
        state = replace(self.state, rings=self.rings)
        if state.phase in (Phase.SEALED, Phase.FINISHED):
            reason = f"the job moved to another pipeline when this stage was {state.phase}"
            log.error("job %s: %s", self.name, reason)
            state = state.to(Phase.FAILED, reason=reason)
        self._save(state)

    async def receive(self, peer: Peer, envelope: pb.Envelope) -> None:
        """A message of `peer` under this job. Raises BadMessage."""
        over = self.status not in (Status.OPEN, Status.ACCEPTED) or self.state.phase in (Phase.FINISHED, Phase.FAILED)
        if self.run is None and over:
            return  # said again after a restart; the claims are on chain, or on their way
        if self.status is Status.OPEN and self.state.phase is Phase.OPEN:
            raise BadMessage(peer.name, "sent a message of a job that we have not accepted")
        await self._early.receive(peer, envelope)

    async def _neighbour(self, index: int) -> tuple[Peer, str]:
        """Asks until it answers or the job's time is over."""
        stage = self.stages[index]
        name = stage_name(index, stage)
        while True:
            try:
                url, fingerprint = await asyncio.to_thread(self.agent.peers.locate, index, stage)
                return await self.agent.peers.identity(name, stage.worker, url, fingerprint)
            except (PeerFault, UnpinnedCertificate, ContractsError) as error:
                log.warning("job %s: %s", self.name, error)
                if await asyncio.to_thread(self.agent.now) > self.job.commit_by:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    # ------------------------------------------------------------------------------------------------------------------

    async def _close(self, reason: str) -> None:
        serving = self._tasks.pop("serving", None)
        if serving is not None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        if self.run is not None:
            await self.run.close(f"the job is {reason}")
            self.run = None
        if self._link is not None:
            self._link.drop(self.id, 1 << 32)
        await asyncio.to_thread(self.agent.settler.withdraw)
        if self.state.phase in (Phase.OPEN, Phase.SIGNED):  # never accepted: nobody will ask for its prompts
            await asyncio.to_thread(self.folder.drop_requests)
        await asyncio.to_thread(self._save, self.state.to(Phase.CLOSED, reason=self.state.reason or reason))

    def _save(self, state: JobState) -> None:
        self.folder.save_state(state)
        self.state = state

    def _tell(self, reason: str) -> None:
        """To whoever asks, by `GET /jobs/{job}`; of a disk that is full only until a restart."""
        told = replace(self.state, reason=reason)
        with suppress(OSError):
            self.folder.save_state(told)
        self.state = told

    def _noted(self, state: JobState) -> None:
        self.state = state

    def _once(self, what: str, work: Coroutine[Any, Any, None], again: bool = False) -> None:
        """Starts `work` unless it runs already, or ran to its end (unless `again`); one that raised is started anew by
        the next tick.
        """
        before = self._tasks.get(what)
        if before is not None and (not before.done() or (before.exception() is None and not again)):
            work.close()
            return
        self._tasks[what] = asyncio.create_task(self._guarded(what, work))

    async def _guarded(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (WorkerError, ContractsError, OSError) as error:
            log.warning("job %s: %s: %s", self.name, what, error)
            if isinstance(error, OSError):
                self._tell(f"{what}: {error}")
            await asyncio.sleep(RETRY_SECONDS)
            raise
