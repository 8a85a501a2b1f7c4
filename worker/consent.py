"""What a stage signs so that its job may move to a spare, and when it signs nothing.

Who has sealed a trace is bound to it: moved to another ring it would hold a hand-off of a predecessor that is none any
more. So a consent that may still count and a seal exclude each other: a consent has an end, nothing is sealed before
it, and from the moment that all is served nothing is signed.
"""

import asyncio
import time
from typing import TYPE_CHECKING

from contracts.client import Consent, ContractsError, Stage, Status
from worker.errors import PeerFault, Refused
from worker.job import Phase
from worker.run import Run
from worker.settle import stage_name

if TYPE_CHECKING:
    from worker.engagement import Engagement

CONSENT_SECONDS = 30  # that a consent of who stays or comes lasts, on the chain
MARGIN_SECONDS = 30  # by which a chain's time may lag behind our clock
LEAVE_SECONDS = 90  # that one's consent in advance to its own replacement lasts; its spare has it renewed


def held_until() -> float:
    """Before when nothing may be sealed by who signs now, in unix seconds by our own clock."""
    return time.time() + CONSENT_SECONDS + MARGIN_SECONDS


def place(stages: tuple[Stage, ...], relief: tuple[Stage, ...]) -> int | None:
    """The stage at which `relief` has another worker than `stages`, all layers alike; None if that isn't one. Pure."""
    if [(s.first_layer, s.end_layer) for s in stages] != [(s.first_layer, s.end_layer) for s in relief]:
        return None
    changed = [i for i, (old, new) in enumerate(zip(stages, relief, strict=True)) if old.worker != new.worker]
    return changed[0] if len(changed) == 1 else None


class Consents:
    """Those of one stage to moves of one job."""

    def __init__(self, engagement: "Engagement") -> None:
        self._engagement = engagement
        self._until = 0  # that all we sign as who stays lasts, on the chain, until the next hold

    async def give(self, pipeline: bytes) -> Consent:
        """Ours to the job's move to `pipeline`. Raises Refused.

        SAFETY: it is decided and held without an await in between, after everything that is waited for.
        """
        ours, agent = self._engagement, self._engagement.agent
        run, before = self._serving(), ours.job.pipeline
        stages = await agent.stages(pipeline, keep=False)
        index = place(ours.stages, stages)
        if index is None:
            raise Refused("expected a pipeline that differs from the job's in one worker")
        if index != ours.index:
            if stages[ours.index] != ours.stages[ours.index]:
                raise Refused("expected our own share as it was")
            self._check_rest(run)
            await self._check_lost(index)
        now = await asyncio.to_thread(agent.now)

        if self._serving() is not run or ours.job.pipeline != before:
            raise Refused("the job has moved meanwhile")
        if index == ours.index:
            until = now + LEAVE_SECONDS
        else:
            self._check_rest(run)
            if now >= self._until:  # whoever asks again before that prolongs nothing
                run.hold(held_until())
                self._until = now + CONSENT_SECONDS
            until = self._until
        until = min(until, ours.job.commit_by)
        return await asyncio.to_thread(agent.notary.sign_move, ours.id, before, pipeline, until)

    def _serving(self) -> Run:
        """Raises Refused unless the job is being served here, and moved by our policy."""
        ours = self._engagement
        if not ours.agent.config.policy.replaceable:
            raise Refused("this worker signs no moves (policy.replaceable)")
        if ours.status is not Status.ACCEPTED or ours.state.phase is not Phase.SERVING or ours.run is None:
            raise Refused(f"expected a job that is being served, it is {ours.status.name.lower()}, {ours.state.phase}")
        if ours.run.sealing:
            raise Refused("expected a job that is being served, its trace is being sealed")
        return ours.run

    def _check_rest(self, run: Run) -> None:
        """Raises Refused."""
        if run.rest_seconds() < self._engagement.agent.config.serving.silence_seconds:
            raise Refused(f"expected a ring that stands still, it moved {run.rest_seconds():.1f} s ago")

    async def _check_lost(self, index: int) -> None:
        """A ring stands still for many reasons: asks the stage itself. Raises Refused while it is well."""
        ours, agent = self._engagement, self._engagement.agent
        name = stage_name(index, ours.stages[index])
        try:
            url, _ = await asyncio.to_thread(agent.peers.locate, index, ours.stages[index])
        except (PeerFault, ContractsError) as error:
            raise Refused(f"we can't ask {name} how it is: {error}") from error
        try:
            await agent.peers.well(name, url, ours.id, agent.config.serving)
        except PeerFault:
            return
        raise Refused(f"expected a stage that is lost, {name} is well")
