"""Money and deadlines of this worker's jobs: claims, settlement, release, withdrawal."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contracts.client import Acceptance, Chain, ChainError, Claim, Consent, Job, Stage, Status
from verifier.commit import Request, make_outputs, outputs_root, total_tokens
from worker.job import JobState
from worker.notary import Notary

log = logging.getLogger("plumb.worker.settle")

# What a contract says when somebody else was faster: nothing is left to do for us.
DONE = ("WrongStatus", "AlreadyDone", "NothingToWithdraw")
# What it says when the time has not come: asked again later.
LATER = ("TooEarly", "GamesOpen")


@dataclass(frozen=True)
class Deadline:
    """What the chain waits for next in a job. `at` in unix seconds."""

    action: str  # "expire", "settle" or "release"
    at: int


def deadline(job: Job, status: Status, window_end: int) -> Deadline | None:
    """Pure."""
    match status:
        case Status.OPEN:
            return Deadline("expire", job.accept_by)
        case Status.ACCEPTED:
            return Deadline("expire", job.commit_by)
        case Status.COMMITTED:
            return Deadline("settle", window_end)
        case Status.VOID:
            return Deadline("release", window_end)
        case _:
            return None


class Settler:
    """Sends what the chain needs of us. Every method may be called again: what was done already is passed over."""

    def __init__(self, chain: Chain, notary: Notary, account: str) -> None:
        """account: the staked one; only it may withdraw."""
        self.chain = chain
        self.notary = notary
        self.account = account

    def claim(self, job: bytes, pipeline: bytes, model: bytes, state: JobState, requests: Sequence[Request]) -> Claim:
        """Our signed claim to a job finished with `pipeline`."""
        last = state.stage == state.stages - 1
        outputs, tokens = bytes(32), 0
        if last:
            made = make_outputs(state.tokens, requests)
            outputs, tokens = outputs_root(made), total_tokens(made)
        return self.notary.sign_claim(job, pipeline, state.stage, model, state.root, outputs, tokens)

    def accept(self, job: bytes, acceptances: Sequence[Acceptance]) -> None:
        self._try("accept", job, lambda: self.chain.escrow.accept(job, acceptances))

    def move(self, job: bytes, pipeline: bytes, consents: Sequence[Consent]) -> None:
        self._try("move", job, lambda: self.chain.escrow.move(job, pipeline, consents))

    def commit(self, job: bytes, claims: Sequence[Claim]) -> None:
        """Posts those claims that the chain does not have yet."""
        missing = [claim for claim in claims if not any(self.chain.escrow.root(job, claim.stage))]
        if missing:
            self._try("commit", job, lambda: self.chain.escrow.commit(job, missing))

    def due(self, job: bytes, action: str) -> None:
        """Settles, expires or releases."""
        match action:
            case "settle":
                self._try(action, job, lambda: self.chain.escrow.settle(job))
            case "expire":
                self._try(action, job, lambda: self.chain.escrow.expire(job))
            case "release":
                self._try(action, job, lambda: self.chain.escrow.release(job))
            case _:
                raise ValueError(f"no such action: {action}")

    def withdraw(self) -> None:
        """Our credit - pay, moves and answers -, if the key that sends is the account's own."""
        if self.chain.account != self.account:
            return
        for door in (self.chain.escrow, self.chain.disputes, self.chain.demands):
            if door.credit(self.account) > 0:
                self._try("withdraw", b"", door.withdraw)

    def _try(self, action: str, job: bytes, send: Callable[[], object]) -> None:
        what = f"{action} of job {job.hex()[:8]}" if job else action
        try:
            send()
            log.info("%s", what)
        except ChainError as error:
            if error.name not in DONE + LATER:
                raise
            log.info("%s: %s", what, error)


def stage_name(index: int, stage: Stage) -> str:
    """What errors call a peer."""
    return f"stage {index} ({stage.worker})"
