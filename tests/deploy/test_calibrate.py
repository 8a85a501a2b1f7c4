"""Calibration on a tiny model: the same every time, and nothing that can't be served is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.calibrate import calibrate, lengths, sample
from deploy.serving import FULL, INSTRUCTIONS, QUICK, ServingFailed, Setting, available, serve_all
from tests.verifier import tiny
from verifier.audit import Auditor
from verifier.audit import Stage as Served
from verifier.calibration import TOLERATED, UnseparableModel
from verifier.shape import UnsupportedModel
from verifier.tolerance import Profile
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
    first = calibrate(tmp_path, sequences=2, length=9, progress=told.append)
    first.save(tmp_path)
    written = (tmp_path / "calibration.json").read_bytes()
    calibrate(tmp_path, sequences=2, length=9).save(tmp_path)
    assert (tmp_path / "calibration.json").read_bytes() == written
    assert Profile.load(tmp_path, first.profile.shape) == first.profile
    assert told == [setting.name for setting in QUICK]
    report = first.calibration.report(1.25)
    assert set(report) == set(TOLERATED)
    positions = (2 + 2 + 9 + 36) * len(QUICK)
    assert all(row.pieces % positions == 0 and row.pieces for row in report.values())
    assert all(max(row.thresholds) >= 1.25 * row.quantiles[1.0] > 1.25 for row in report.values())


def test_what_was_measured_stands_beside_the_profile(tmp_path: Path) -> None:
    make(tmp_path)
    measured = calibrate(tmp_path, sequences=2, length=9)
    told = measured.told()
    assert told["format"] == "plumb-calibration-3" and told["profile_root"] == measured.profile.root.hex()
    assert told["positions"] == 49 and told["settings"] == [setting.name for setting in QUICK]
    for kind in TOLERATED:
        row, cell = told["kinds"][kind.name.lower()], measured.profile.cell(kind, 1, 0)
        least, largest = (row["thresholds"][1] * row["usual"][end] for end in ("least", "largest"))
        assert least <= cell.num / cell.den <= largest + 1e-8 and len(row["floor_shares"]) == 2
        assert max(row["thresholds"]) <= row["margin"] * row["quantiles"]["1"] * (1 + 1e-12)
        assert row["quantiles"]["0.5"] < row["quantiles"]["0.999"] <= row["quantiles"]["1"]
    # End to end two honest parties lie farther apart than over one layer's logits.
    assert told["logits"]["screen"]["threshold"] > told["logits"]["token"]["threshold"] > 0


def test_a_wider_margin_makes_every_tolerance_wider(tmp_path: Path) -> None:
    make(tmp_path)
    narrow = calibrate(tmp_path, 1.25, sequences=2, length=9).profile
    wide = calibrate(tmp_path, 4.0, sequences=2, length=9).profile
    for n, w in zip(narrow.cells[:-1], wide.cells[:-1], strict=True):
        assert w.num * n.den > n.num * w.den
    assert wide.margin > narrow.margin


def test_every_setting_serves_what_the_profile_allows(tmp_path: Path) -> None:
    weights = make(tmp_path)
    profile = calibrate(tmp_path, sequences=3, length=12).profile
    stage = Stage(tmp_path, 0, weights.shape.layers, weights=weights)
    wanted = lengths(3, 12, 1000)
    sequences = sample(stage, wanted)
    assert [len(tokens) for tokens in sequences] == wanted and sequences == sample(stage, wanted)
    auditor, threads = Auditor(weights, profile), torch.get_num_threads()
    here, absent = available([setting for setting in FULL if not setting.isa])
    assert {setting.device for setting in absent} <= {"cuda"}
    for setting in here:
        (run,) = serve_all(tmp_path, weights, sequences, [setting])
        assert [scores.shape for scores in run.logits] == [(n, weights.shape.vocabulary) for n in wanted]
        for arrays in run.traces:
            served = Served(0, RequestTrace(weights.shape, 0, weights.shape.layers, arrays))
            for layer in range(weights.shape.layers):
                for audit in auditor.layer(served, 0, layer):
                    assert audit.ratios.max() <= 1, (setting.name, audit.kind.name)
                    assert setting not in QUICK or audit.ratios.max() <= 1 / 1.24
    assert torch.get_num_threads() == threads and torch.backends.mkldnn.enabled


def test_the_models_own_length_bounds_the_sequences(tmp_path: Path) -> None:
    make(tmp_path, max_position_embeddings=8)
    measured = calibrate(tmp_path, sequences=2, length=96)
    assert measured.positions == 2 + 2 + 7 + 7 and measured.profile.shape.max_positions == 8


def test_another_instruction_set_is_served_by_a_child_process(tmp_path: Path) -> None:
    weights = make(tmp_path)
    stage = Stage(tmp_path, 0, weights.shape.layers, weights=weights)
    sequences = sample(stage, [3, 5])
    whole, isa = Setting("whole"), Setting("whole, sse4", isa="sse4")
    here, there = serve_all(tmp_path, weights, sequences, [whole, isa])
    assert there.setting == isa and len(there.traces) == 2
    for mine, other, a, b in zip(here.traces, there.traces, here.logits, there.logits, strict=True):
        assert mine.keys() == other.keys() and all(mine[key].shape == other[key].shape for key in mine)
        assert (mine["0.h"] == other["0.h"]).all()  # embeddings are copied, whatever the instructions
        assert torch.allclose(a, b, atol=0.1)


def test_a_machine_serves_with_every_instruction_set_that_counts_as_its_own(tmp_path: Path) -> None:
    weights = make(tmp_path)
    own, _ = available([setting for setting in FULL if setting.isa])
    runs = serve_all(tmp_path, weights, [[1, 2, 3]], own)
    assert [run.setting for run in runs] == own and {setting.isa for setting in own} >= {"all"}


def test_a_child_that_fails_is_no_setting(tmp_path: Path) -> None:
    weights = make(tmp_path)
    with pytest.raises(ServingFailed, match=r"whole, avx2: expected exit code 0, got 1: IndexError"):
        list(serve_all(tmp_path, weights, [[weights.shape.vocabulary]], [Setting("whole, avx2", isa="avx2")]))


def test_the_settings_cover_what_changes_bits() -> None:
    assert set(QUICK) < set(FULL) and len({setting.name for setting in FULL}) == len(FULL)
    assert {setting.isa for setting in FULL} == {"", *INSTRUCTIONS} and not any(setting.isa for setting in QUICK)
    assert {setting.threads for setting in FULL} == {1, 2} and {setting.device for setting in FULL} == {"cpu", "cuda"}
    assert {setting.products for setting in QUICK} == {"mapped", "widened"}
    assert {setting.paged for setting in FULL} == {False, True}
    assert any(not setting.onednn for setting in FULL) and {setting.together for setting in FULL} == {0, 1, 3}


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


def test_honest_runs_that_differ_too_much_give_no_profile(tmp_path: Path) -> None:
    make(tmp_path)

    class Noisy(Stage):
        def observe(self, context: Any, key: str, tensor: torch.Tensor) -> torch.Tensor:
            return super().observe(context, key, tensor * 1.1 if key == "1.mlp_out" else tensor)

    with pytest.raises(UnseparableModel, match=r"expected a tolerance of at most 0\.05, got .* at MLP layer 1"):
        calibrate(tmp_path, sequences=1, length=6, stage_class=Noisy)
