"""Calibration on a tiny model: the same every time, and nothing that can't be served is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.calibrate import SETTINGS, calibrate, sample, serve
from tests.verifier import tiny
from verifier.audit import Auditor
from verifier.audit import Stage as Served
from verifier.calibration import TOLERATED, UnseparableModel
from verifier.shape import UnsupportedModel
from verifier.trace import RequestTrace
from verifier.weights import InvalidWeight, MissingShard, Weights
from worker.stage import Stage

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 101}


def make(folder: Path, **changes: Any) -> Weights:
    return tiny.make_weights(folder, tiny.config(**{**SMALL, **changes}))


def test_calibration_is_deterministic_and_tells_its_steps(tmp_path: Path) -> None:
    make(tmp_path)
    told: list[str] = []
    first, seen = calibrate(tmp_path, sequences=2, length=9, progress=told.append)
    again, _ = calibrate(tmp_path, sequences=2, length=9)
    assert first.cells == again.cells and first.root == again.root
    assert told == [setting.name for setting in SETTINGS]
    report = seen.report(1.3)
    assert set(report) == set(TOLERATED)
    positions = 2 * 9 * len(SETTINGS)
    assert all(row.pieces % positions == 0 and row.pieces for row in report.values())
    assert all(row.threshold >= 1.3 * row.quantiles[1.0] for row in report.values())


def test_a_wider_margin_makes_every_tolerance_wider(tmp_path: Path) -> None:
    make(tmp_path)
    narrow, _ = calibrate(tmp_path, 1.25, sequences=2, length=9)
    wide, _ = calibrate(tmp_path, 1.4, sequences=2, length=9)
    for n, w in zip(narrow.cells[:-1], wide.cells[:-1], strict=True):
        assert w.num * n.den > n.num * w.den
    assert wide.margin > narrow.margin


def test_every_setting_serves_what_the_profile_allows(tmp_path: Path) -> None:
    weights = make(tmp_path)
    profile, _ = calibrate(tmp_path, sequences=3, length=12)
    stage = Stage(tmp_path, 0, weights.shape.layers, weights=weights)
    sequences = sample(stage, 3, 12)
    assert [len(tokens) for tokens in sequences] == [12, 12, 12] and sequences == sample(stage, 3, 12)
    auditor, threads = Auditor(weights, profile), torch.get_num_threads()
    for setting in SETTINGS:
        traces, logits = serve(stage, sequences, setting)
        assert logits.shape == (36, weights.shape.vocabulary)
        for arrays in traces:
            served = Served(0, RequestTrace(weights.shape, 0, weights.shape.layers, arrays))
            for layer in range(weights.shape.layers):
                for audit in auditor.layer(served, 0, layer):
                    assert audit.ratios.max() <= 1 / 1.29, (setting.name, audit.kind.name)
    assert torch.get_num_threads() == threads


def test_the_models_own_length_bounds_the_sequences(tmp_path: Path) -> None:
    make(tmp_path, max_position_embeddings=8)
    profile, seen = calibrate(tmp_path, sequences=2, length=96)
    assert all(row.pieces % (2 * 7 * len(SETTINGS)) == 0 for row in seen.report(1.3).values())
    assert profile.shape.max_positions == 8


@pytest.mark.parametrize(("bits", "what"), [(0x7FC0, "NaN"), (0xFF80, "-infinity"), (0x4380, "256")])
def test_a_weight_that_the_law_can_not_hold_is_refused_by_name(tmp_path: Path, bits: int, what: str) -> None:
    make(tmp_path)
    tiny.set_weight(tmp_path, "model.layers.1.mlp.up_proj.weight", (3, 5), bits)
    with pytest.raises(InvalidWeight, match=r"model\.layers\.1\.mlp\.up_proj\.weight\[3, 5\].*0x" + f"{bits:04x}"):
        calibrate(tmp_path, sequences=1, length=4)
    assert not (tmp_path / "tolerance.json").exists(), what


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path)
    named = json.loads((tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingShard, match=r"model\.safetensors or model\.safetensors\.index\.json"):
        calibrate(tmp_path)
    index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in named if name != "__metadata__"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(MissingShard, match=r"model-00001-of-00002\.safetensors"):
        calibrate(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported: LlamaForCausalLM and MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act gelu; supported: silu"),
        ({"sliding_window": 4096}, "sliding_window 4096; supported: null"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type yarn; supported: default, linear and llama3",
        ),
    ],
)
def test_an_unsupported_model_is_refused_with_what_is_supported(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(**{**SMALL, **changes})), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=reason):
        calibrate(tmp_path)


def test_honest_runs_that_differ_too_much_give_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)

    class Noisy(Stage):
        def observe(self, context: Any, key: str, tensor: torch.Tensor) -> torch.Tensor:
            return super().observe(context, key, tensor * 1.1 if key == "1.mlp_out" else tensor)

    monkeypatch.setattr("deploy.calibrate.Stage", Noisy)
    with pytest.raises(UnseparableModel, match="MLP layer 1"):
        calibrate(tmp_path, sequences=1, length=6)
