"""What a measured tolerance tells apart: honest serving from coarser weights, at any single position of any layer.

Random weights are the hard case; trained ones have outliers, which cost int8 more.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.demo.players import QuantisedStage
from tests.end_to_end import random_model
from verifier.audit import Auditor
from verifier.audit import Stage as Served
from verifier.program import Kind
from verifier.referee.floats import Dtype
from verifier.tolerance import Profile
from verifier.weights import Weights, identify
from worker.stage import Stage

POSITIONS = 40  # more than calibration saw
LAYERS = 3


class RoundedStage(Stage):
    """Serves fp32 from weights that were rounded to bf16."""

    def tensor(self, name: str) -> torch.Tensor:
        return super().tensor(name).to(torch.bfloat16).to(torch.float32)


@dataclass(frozen=True)
class Bench:
    """A model, its measured profile, and tokens it has not seen."""

    weights: Weights
    profile: Profile
    tokens: list[int]

    @property
    def auditor(self) -> Auditor:
        return Auditor(self.weights, self.profile)

    def serve(self, stage_class: type[Stage], rows: int = 0) -> tuple[Served, list[int]]:
        return random_model.serve(self.weights, stage_class, self.tokens, rows)

    def ratios(self, served: Served, layer: int) -> dict[Kind, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        """Distance over tolerance by kind: [positions, units]."""
        return {audit.kind: audit.ratios for audit in self.auditor.layer(served, 0, layer)}


def make(folder: Path, dtype: Dtype) -> Bench:
    weights, profile = random_model.make(folder, dtype, num_hidden_layers=LAYERS)
    return Bench(weights, profile, random_model.prompt(weights, POSITIONS, seed=3))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make(tmp_path_factory.mktemp("bf16"), Dtype.BFLOAT16)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make(tmp_path_factory.mktemp("fp32"), Dtype.FLOAT32)


@pytest.mark.parametrize("rows", [0, 9, 1], ids=["whole prefill", "chunks", "one-token decode"])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_honest_serving_passes_under_its_own_profile(name: str, rows: int, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(name)
    served, chosen = bench.serve(Stage, rows)
    for layer in range(LAYERS):
        for kind, ratios in bench.ratios(served, layer).items():
            assert ratios.max() < 1, f"{kind.name} layer {layer}"
        link = bench.auditor.link(served, 0, layer)
        assert link is not None and not link.ratios.any()
    assert not bench.auditor.embed(served, 0, bench.tokens).ratios.any()
    told = bench.auditor.tokens(served, 0, 1, chosen)
    assert len(told) == POSITIONS and max(verdict.ratio for verdict in told) < 1


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_position_of_one_layer_convicts_bf16_weights_under_an_fp32_profile(fp32: Bench, layer: int) -> None:
    served, _ = fp32.serve(RoundedStage)
    check_every_position_convicts(fp32, served, layer)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_position_of_one_layer_convicts_int8_weights_under_a_bf16_profile(bf16: Bench, layer: int) -> None:
    served, _ = bf16.serve(QuantisedStage)
    check_every_position_convicts(bf16, served, layer)


def check_every_position_convicts(bench: Bench, served: Served, layer: int) -> None:
    """Whichever position one looks at: a piece of it is beyond its tolerance, and so says the law."""
    ratios = bench.ratios(served, layer)
    kinds = (Kind.Q, Kind.K, Kind.V, Kind.MLP, Kind.ATTEND)
    worst = np.max([ratios[kind].max(axis=1) for kind in kinds], axis=0)
    assert worst.min() > 1, f"position {worst.argmin()} has ratio {worst.min():.3f}"
    model = identify(bench.weights, bench.profile)
    audits = {audit.kind: audit for audit in bench.auditor.layer(served, 0, layer)}
    for kind in (Kind.V, Kind.MLP):
        assert bench.auditor.confirm(model, audits[kind].worst(), [served])


def test_the_same_tensors_at_an_honest_position_are_right_by_the_law(bf16: Bench) -> None:
    """The canonical judge agrees with the audit about the farthest honest piece, too."""
    served, _ = bf16.serve(Stage)
    model = identify(bf16.weights, bf16.profile)
    for audit in bf16.auditor.layer(served, 0, 1):
        assert not bf16.auditor.confirm(model, audit.worst(), [served])
