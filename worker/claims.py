"""The claim to a finished job: ours, the others', and how they come on chain."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from contracts.client import ChainError, Claim, ContractsError
from worker.errors import PeerFault, Refused
from worker.job import Phase
from worker.settle import stage_name

if TYPE_CHECKING:
    from worker.engagement import Engagement

log = logging.getLogger("plumb.worker.claims")

RETRY_SECONDS = 1.0  # before what the chain refused is sent again
COLLECT_SECONDS = 0.2  # between two questions for a claim


class Claims:
    """Part of an Engagement."""

    def __init__(self, engagement: "Engagement") -> None:
        self._engagement = engagement
        self._lock = asyncio.Lock()  # whoever asks meanwhile gets the same
        self._signed: tuple[bytes, bytes, Claim] | None = None  # for which pipeline and root

    async def own(self) -> Claim:
        """Raises Refused while there is none."""
        ours = self._engagement
        async with self._lock:
            job, state, agent = ours.job, ours.state, ours.agent
            if state.phase not in (Phase.FINISHED, Phase.CLOSED) or not state.root:
                raise Refused(f"expected a finished job, it is {state.phase}: {state.reason}")
            if self._signed is None or self._signed[:2] != (job.pipeline, state.root):
                requests = await asyncio.to_thread(ours.folder.load_requests)
                sign = agent.settler.claim
                claim = await asyncio.to_thread(sign, ours.id, job.pipeline, job.model, state, requests)
                self._signed = job.pipeline, state.root, claim
            return self._signed[2]

    async def others(self) -> list[Claim]:
        """As many as come within `claim_seconds`."""
        ours = self._engagement
        agent, serving, job, claims = ours.agent, ours.agent.config.serving, ours.job, []
        end = time.monotonic() + serving.claim_seconds
        for index, stage in enumerate(ours.stages):
            if index == ours.index:
                continue
            name = stage_name(index, stage)
            while True:
                try:
                    url, _ = await asyncio.to_thread(agent.peers.locate, index, stage)
                    claim = await agent.peers.claim(name, url, ours.id, index, serving.silence_seconds)
                    if agent.notary.verify_claim(ours.id, job.pipeline, job.model, claim):
                        claims.append(claim)
                    else:
                        log.error("job %s: %s: its claim is not signed with its key", ours.name, name)
                    break
                except (PeerFault, ContractsError) as error:
                    if time.monotonic() > end:
                        log.warning("job %s: no claim of %s: %s", ours.name, name, error)
                        break
                await asyncio.sleep(COLLECT_SECONDS)
        return claims

    async def post(self, own: Claim, *others: Claim) -> None:
        """Until they are on chain, or it is too late by the chain's clock. SAFETY: a signed claim may be one that the
        chain refuses, and the whole transaction with it; ours goes alone then.
        """
        ours, claims = self._engagement, [own, *others]
        while await asyncio.to_thread(ours.agent.chain.block_timestamp) <= ours.job.commit_by:
            try:
                await asyncio.to_thread(ours.agent.settler.commit, ours.id, claims)
                return
            except ContractsError as error:
                log.warning("job %s: claims not posted: %s", ours.name, error)
                if isinstance(error, ChainError):
                    claims = [own]
            await asyncio.sleep(RETRY_SECONDS)
