"""Drawn tokens from an opened job to its last coin: an honest pipeline is paid, and a last stage that draws by another
law than was asked for is slashed, though it denies the verdict.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deploy.demo.players import ROLES, DenyingResponder, Role
from deploy.demo.scenarios import Ending, select
from deploy.devnet import Devnet
from tests.end_to_end import random_model
from tests.end_to_end.hamlet import STAGES, Hamlet
from verifier.commit import Request
from verifier.program import Kind
from verifier.referee.floats import Dtype
from verifier.tolerance import Profile
from worker.sampler import Draw
from worker.stage import Stage

ASKED = Request((1,), 24, temperature=1 << 16, top_k=150, top_p=52429)
REQUESTS = (
    replace(ASKED, prompt=(9, 8, 7, 6, 5, 4, 3), seed=1),
    replace(ASKED, prompt=(200,), seed=(1 << 64) - 1),
    Request((5, 6), 24, seed=3, temperature=1 << 16),
)
GREEDY = Request(tuple(range(30, 50)), 6)


class RedrawingStage(Stage, ABC):
    """Draws by other requests than were asked for."""

    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        return super().tokens(hidden, [replace(draw, request=self.changed(draw.request)) for draw in draws])

    @abstractmethod
    def changed(self, request: Request) -> Request:
        """The request that is served in place of the one asked for."""


class AnotherSeed(RedrawingStage):
    def changed(self, request: Request) -> Request:
        return replace(request, seed=12345)


class Cooler(RedrawingStage):
    def changed(self, request: Request) -> Request:
        return replace(request, temperature=request.temperature // 2)


class Unfiltered(RedrawingStage):
    def changed(self, request: Request) -> Request:
        return replace(request, top_k=0, top_p=1 << 16)


class Biased(Stage):
    """Makes some tokens more likely than the model does."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden).clone()
        logits[:, ::7] += 1.0
        return logits


@pytest.fixture(scope="module")
def hamlet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hamlet]:
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 211}
    weights, profile = random_model.make(folder, Dtype.BFLOAT16, 16, 48, num_hidden_layers=4, **small)
    # Drawn tokens lead a random model where a short calibration never was: twice its tolerance, its own token margin.
    cells = [replace(cell, num=2 * cell.num) for cell in profile.cells[:-1]]
    Profile(weights.shape, (*cells, profile.cells[-1])).save(folder)
    with Devnet() as devnet:
        made = Hamlet(devnet, folder, tmp_path_factory.mktemp("hamlet"))
        made.settle_in()
        yield made


def test_an_honest_draw_is_paid(hamlet: Hamlet, tmp_path: Path) -> None:
    scenario = select("a", None, STAGES)[0]
    seen = hamlet.play(scenario, (ROLES["honest"],) * STAGES, tmp_path, requests=(*REQUESTS, GREEDY))
    assert seen.result.outcome.ending == Ending.PAID
    assert seen.before.stakes == seen.after.stakes


@pytest.mark.parametrize("stage", [AnotherSeed, Cooler, Unfiltered, Biased], ids=lambda stage: stage.__name__)
def test_a_draw_by_another_law_is_slashed(hamlet: Hamlet, tmp_path: Path, stage: type[Stage]) -> None:
    scenario = select("d", None, STAGES)[0]
    line = (ROLES["honest"], ROLES["honest"], Role(stage=stage, responder=DenyingResponder))
    seen = hamlet.play(scenario, line, tmp_path, requests=REQUESTS)
    outcome = seen.result.outcome
    assert (outcome.ending, outcome.stage) == (Ending.SLASHED, STAGES - 1)
    assert outcome.segment is not None and outcome.segment.kind == Kind.SAMPLE
    lost = [before - after for before, after in zip(seen.before.stakes, seen.after.stakes, strict=True)]
    assert [index for index, amount in enumerate(lost) if amount] == [STAGES - 1]
