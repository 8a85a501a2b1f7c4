"""What this worker signs and whose signatures it believes: the chain's EIP-712 messages, the keys as registered."""

from eth_account.signers.local import LocalAccount

from contracts.client import Chain, Claim, Consent, Stage
from worker.handoff import Handoff


class Notary:
    """For the jobs of one worker; `learn` comes before anything about a job is verified."""

    def __init__(self, chain: Chain, signer: LocalAccount) -> None:
        self._chain = chain
        self._signer = signer
        self._signers: dict[bytes, tuple[str, ...]] = {}  # by job, then stage

    def learn(self, job: bytes, stages: tuple[Stage, ...]) -> None:
        """Reads the signing keys of a job's stages from the chain."""
        self._signers[job] = tuple(self._chain.workers.signer_of(stage.worker) for stage in stages)

    def forget(self, job: bytes) -> None:
        self._signers.pop(job, None)

    def sign_join(self, pipeline: bytes) -> bytes:
        return self._chain.sign_join(pipeline, self._signer)

    def sign_accept(self, job: bytes, stage: int, model: bytes) -> bytes:
        return self._chain.sign_accept(job, stage, model, self._signer)

    def sign_move(self, job: bytes, before: bytes, pipeline: bytes, until: int) -> Consent:
        """To the job's move from pipeline `before`."""
        return Consent(until, self._chain.sign_move(job, before, pipeline, until, self._signer))

    def sign_claim(
        self, job: bytes, pipeline: bytes, stage: int, model: bytes, root: bytes, outputs: bytes, tokens: int
    ) -> Claim:
        signature = self._chain.sign_commit(job, pipeline, stage, model, root, outputs, tokens, self._signer)
        return Claim(stage, root, outputs, tokens, signature)

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes:
        return self._chain.sign_handoff(job, stage, root, leaves, self._signer)

    def verify_accept(self, job: bytes, stage: int, model: bytes, signature: bytes) -> bool:
        return self._chain.recover_accept(job, stage, model, signature) == self._signers[job][stage]

    def verify_move(self, job: bytes, stage: int, before: bytes, pipeline: bytes, consent: Consent) -> bool:
        recovered = self._chain.recover_move(job, before, pipeline, consent.until, consent.signature)
        return recovered == self._signers[job][stage]

    def verify_claim(self, job: bytes, pipeline: bytes, model: bytes, claim: Claim) -> bool:
        recovered = self._chain.recover_commit(
            job, pipeline, claim.stage, model, claim.root, claim.outputs, claim.tokens, claim.signature
        )
        return recovered == self._signers[job][claim.stage]

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool:
        recovered = self._chain.recover_handoff(job, stage, handoff.root, handoff.leaves, handoff.signature)
        return recovered == self._signers[job][stage]
