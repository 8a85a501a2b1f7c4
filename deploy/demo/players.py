"""The demo's dishonest players: the real parties with one behaviour replaced, through the doors that `build_worker` and
`Agent` leave open to anybody. The honest code knows nothing of them.

`python -m deploy.demo.players ROLE --config FILE` runs one as a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from challenger.agent import Agent as Challenger
from challenger.cli import open_chain
from challenger.config import load_config
from challenger.evidence import Dossier, Evidence
from challenger.judge import Findings, Judge
from contracts.client import Claim
from deploy.demo.liar import DenyingCase, LyingCase
from verifier.audit import Verdict
from verifier.canonical import Case
from verifier.commit import Request
from verifier.game import Game
from verifier.program import Kind
from worker.agent import build_worker
from worker.config import load as load_worker_config
from worker.errors import Refused
from worker.job import JobState
from worker.respond import Responder
from worker.sampler import Draw
from worker.settle import Settler
from worker.stage import Forward, Stage

CHEATED_POSITION = 5
CHEATED_REQUEST = 0


class QuantisedStage(Stage):
    """Serves int8 weights, one scale a row, in place of the registered ones: half the memory, nearly the same text."""

    def tensor(self, name: str) -> torch.Tensor:
        weight = super().tensor(name)
        if weight.shape[0] == 1 or not name.endswith("_proj.weight"):
            return weight
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
        return ((weight.float() / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


class AlteringStage(Stage):
    """Alters the hidden state of one token, before the last layer it holds; where that is its only one, behind it: what
    came from the stage before is signed.
    """

    def observe(self, context: Forward, key: str, tensor: torch.Tensor) -> torch.Tensor:
        name = "h" if self.end_layer - self.first_layer > 1 else "mlp_out"
        if key == f"{self.end_layer - 1}.{name}":
            for piece, span in context.batch.spans():
                if piece.request == CHEATED_REQUEST and piece.first <= CHEATED_POSITION < piece.end:
                    tensor = tensor.clone()
                    tensor[span.start + CHEATED_POSITION - piece.first] *= 1.5
        return super().observe(context, key, tensor)


class ChoosingStage(Stage):
    """Returns, once, a token that is not the model's choice."""

    _chosen = 0

    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        tokens = super().tokens(hidden, draws)
        self._chosen += 1
        if self._chosen == 3 and tokens:
            tokens[0] = int(self.logits(hidden[:1])[0].argsort(descending=True)[40])
        return tokens


class LyingResponder(Responder):
    """Defends a wrong layer with a false execution trace, consistent above the lie."""

    def case(self, game: Game) -> Case:
        return LyingCase(super().case(game), wrong=False)


class DenyingResponder(Responder):
    """Defends a wrong layer by denying the verdict alone: all before it is true."""

    def case(self, game: Game) -> Case:
        return DenyingCase(super().case(game))


class SilentResponder(Responder):
    """Never answers."""

    def tick(self, now: int) -> None:
        return


class MuteSettler(Settler):
    """Serves, but never signs what it served."""

    def claim(self, job: bytes, pipeline: bytes, model: bytes, state: JobState, requests: Sequence[Request]) -> Claim:
        raise Refused("this worker signs no claim")

    def commit(self, job: bytes, claims: Sequence[Claim]) -> None:
        return


class FalseAccuser(Challenger):
    """Accuses a piece that is right, and argues with a false trace that is consistent above the lie."""

    def findings(self, judge: Judge, evidence: Evidence) -> Findings:
        verdict = Verdict(2.0, 0, Kind.MLP, CHEATED_REQUEST, 0, CHEATED_POSITION, 0)
        return Findings(1, {"mlp": 2.0}, (verdict,), 1)

    def case(self, judge: Judge, evidence: Dossier, verdict: Verdict) -> Case:
        return LyingCase(judge.case(evidence, verdict), wrong=True)


@dataclass(frozen=True)
class Role:
    stage: type[Stage] = Stage
    responder: type[Responder] = Responder
    settler: type[Settler] = Settler


ROLES = {
    "honest": Role(),
    "quantised": Role(stage=QuantisedStage, responder=DenyingResponder),
    "altering": Role(stage=AlteringStage, responder=DenyingResponder),
    "choosing": Role(stage=ChoosingStage, responder=DenyingResponder),
    "lying": Role(stage=QuantisedStage, responder=LyingResponder),
    "silent": Role(stage=QuantisedStage, responder=SilentResponder),
    "mute": Role(settler=MuteSettler),
}
ACCUSER = "accuser"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one dishonest player.")
    parser.add_argument("role", choices=[*ROLES, ACCUSER])
    parser.add_argument("--config", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if given.role == ACCUSER:
        settings = load_config(given.config)
        FalseAccuser.build(settings, open_chain(settings)).run()
        return
    role = ROLES[given.role]
    agent = build_worker(
        load_worker_config(given.config),
        stage_class=role.stage,
        responder_class=role.responder,
        settler_class=role.settler,
    )
    asyncio.run(agent.run())


if __name__ == "__main__":
    main()
