"""The adversary inside the tolerance: it stays there, by the watchtower's own audit, and more room takes it farther."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import BenchError, adversary
from bench._bent import Bent, Reach
from tests.end_to_end import random_model
from verifier.audit import Auditor, Stage
from verifier.referee.floats import Dtype
from verifier.trace import RequestTrace
from worker.stage import to_bits

torch.set_num_threads(1)
POSITIONS = 10


@pytest.fixture(scope="module")
def auditor(tmp_path_factory: pytest.TempPathFactory) -> Auditor:
    weights, profile = random_model.make(tmp_path_factory.mktemp("model"), Dtype.BFLOAT16, num_hidden_layers=2)
    return Auditor(weights, profile)


def texts(auditor: Auditor) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(8).integers(0, auditor.shape.vocabulary, (2, POSITIONS)))


def worst(auditor: Auditor, served: dict[str, torch.Tensor]) -> float:
    """The farthest piece by the audit, in tolerances; links must hold exactly."""
    ratios = []
    for r in range(2):
        arrays = {key: to_bits(rows[r].to(torch.bfloat16)) for key, rows in served.items()}
        stage = Stage(0, RequestTrace(auditor.shape, 0, auditor.shape.layers, arrays))
        for layer in range(auditor.shape.layers):
            ratios += [audit.ratios.max() for audit in auditor.layer(stage, r, layer)]
            link = auditor.link(stage, r, layer)
            assert link is not None and not link.ratios.any()
    return float(max(ratios))


def lead(token: torch.Tensor, over: torch.Tensor) -> adversary.Gain:
    return lambda logits: (logits.gather(1, token[:, None]) - logits.gather(1, over[:, None]))[:, 0]


def test_without_reach_it_serves_what_the_model_computes(auditor: Auditor) -> None:
    _, served = Bent(auditor.weights, auditor.profile).run(texts(auditor), Reach((), False, 0.0), {})
    assert worst(auditor, served) < 1


@pytest.mark.parametrize("history", [False, True], ids=["one position", "all positions"])
def test_bent_tensors_move_a_token_and_no_audit_convicts(auditor: Auditor, history: bool) -> None:
    bent, ids = Bent(auditor.weights, auditor.profile), texts(auditor)
    honest, _ = bent.run(ids, Reach((), False, 0.0), {})
    ranks = honest.argsort(dim=1, descending=True)
    gain = lead(ranks[:, 1], over=ranks[:, 0])
    moved = []
    for scale in (0.5, 1.0, 4.0):
        logits, served = bent.bend(ids, Reach(range(2), history, scale), gain, steps=4)
        moved.append(float((gain(logits) - gain(honest)).mean()))
        ratio = worst(auditor, served)
        assert ratio <= 1 if scale <= 1 else 2 < ratio <= scale
    assert 0 < moved[0] < moved[1] < moved[2]


def test_a_reach_of_one_layer_leaves_the_others_alone(auditor: Auditor) -> None:
    bent, ids = Bent(auditor.weights, auditor.profile), texts(auditor)
    honest, plain = bent.run(ids, Reach((), False, 0.0), {})
    _, served = bent.bend(ids, Reach((1,), False, 1.0), lead(honest.argmin(dim=1), over=honest.argmax(dim=1)), steps=2)
    changed = {key for key, rows in served.items() if not torch.equal(rows, plain[key])}
    assert changed == {"1.q", "1.k", "1.v", "1.attn_out", "1.mlp_out", "out"}
    assert all(torch.equal(served[key][:, :-1], plain[key][:, :-1]) for key in changed)


def test_a_folder_without_a_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"expected a folder with calibration\.json"):
        adversary.run(model=str(tmp_path))
