"""Profiles on disk, and calibration: thresholds just above the honest worst, floors that keep weak heads innocent."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.verifier import tiny
from verifier.audit import Auditor
from verifier.calibration import (
    DENOMINATOR,
    SHARES,
    TOLERATED,
    Calibration,
    UnseparableModel,
    bound,
    clustered,
    q30_floor,
)
from verifier.program import Kind, ModelShape, profile_index, shape_from_config
from verifier.referee.codec import ProfileCell
from verifier.referee.fixed import Q30
from verifier.referee.floats import Dtype
from verifier.referee.tree import leaf, root, root_of_range
from verifier.tolerance import FILE_NAME, MIN_FLOOR, InvalidProfile, Profile, uniform_profile

torch.set_num_threads(1)
SHAPE = shape_from_config(tiny.config())


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    cells = list(uniform_profile(SHAPE, 3, 1000, MIN_FLOOR, 1 << 29).cells)
    cells[profile_index(SHAPE, Kind.MLP, 1, 1)] = ProfileCell(7, 9, 1 << 40)
    profile = Profile(SHAPE, tuple(cells))
    profile.save(tmp_path)
    loaded = Profile.load(tmp_path, SHAPE)
    assert loaded == profile and loaded.root == profile.root and loaded.margin == 1 << 29
    assert loaded.cell(Kind.MLP, 1, 1) == ProfileCell(7, 9, 1 << 40)
    assert profile.root == root([leaf(cell.encode()) for cell in profile.cells])
    index = profile_index(SHAPE, Kind.MLP, 1, 1)
    assert root_of_range([leaf(profile.leaf(index))], index, profile.leaves, profile.prove(index)) == profile.root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "plumb-tolerance-2"}, "expected format"),
        ({"root": "00" * 32}, "expected root"),
        ({"cells": []}, "expected 25 cells"),
        ({"cells": {}}, "expected a list"),
        ({"cells": [[1, 2]]}, "three integers at cell 0"),
        ({"cells": [[1, 2, 3.0]]}, "three integers at cell 0"),
        ({"cells": [[True, 2, 4096]]}, "three integers at cell 0"),
        ({"layout": {"layers": 3}}, "expected a profile of"),
        ({"surplus": 1}, "expected the keys"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = uniform_profile(SHAPE, 3, 1000, MIN_FLOOR, 1 << 29).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidProfile, match=message):
        Profile.load(tmp_path, SHAPE)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format"', "1" * 30])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InvalidProfile):
        Profile.load(tmp_path, SHAPE)


@pytest.mark.parametrize(
    "cell", [ProfileCell(1, 0, 1 << 20), ProfileCell(1 << 32, 1, 1 << 20), ProfileCell(1, 1, MIN_FLOOR - 1)]
)
def test_a_cell_beyond_its_bounds_is_refused(cell: ProfileCell) -> None:
    good = uniform_profile(SHAPE, 1, 1, 1 << 20, 1 << 20)
    with pytest.raises(InvalidProfile):
        Profile(SHAPE, (cell, *good.cells[1:]))
    with pytest.raises(InvalidProfile, match="token margin"):
        Profile(SHAPE, (*good.cells[:-1], ProfileCell(2, 1, 1 << 20)))


# ---- calibration


def seen(shape: ModelShape, noise: float, positions: int = 20, seed: int = 0, growth: float = 1.0) -> Calibration:
    """Every tensor of every layer, normal, with relative noise, `growth` times as much in each layer as in the one
    before; the first unit of each is a tenth as large.
    """
    calibration, generator = Calibration(), np.random.default_rng(seed)
    widths = {Kind.Q: shape.query_width, Kind.K: shape.kv_width, Kind.V: shape.kv_width}
    for kind in TOLERATED:
        for layer in range(shape.layers):
            columns = shape.head_dim if kind in widths else 256
            standard = generator.normal(size=(positions, widths.get(kind, shape.hidden)))
            standard[:, :columns] *= 0.1
            error = noise * growth**layer * generator.normal(size=standard.shape)
            calibration.add_tensor(kind, layer, columns, standard + error, standard)
    logits = generator.normal(size=(positions, shape.vocabulary))
    calibration.add_logits(logits + 0.01 * generator.uniform(-1, 1, size=logits.shape), logits)
    return calibration


def test_a_margin_follows_from_the_sample_and_its_tail() -> None:
    """By hand: of 1000 values the largest ten are 1.00 .. 1.09, so the tail's scale is their mean excess, 0.045."""
    values = np.concatenate([np.full(990, 0.5), 1 + np.arange(10) / 100])
    found = bound(values, 1.25)
    assert found.worst == pytest.approx(1.09) and found.scale == pytest.approx(0.045)
    assert found.threshold == pytest.approx(1.09 + 0.045 * np.log(1e9 / 1000)) and found.count == 1000
    assert found.margin == pytest.approx(1.5704, abs=1e-4)
    # The same values seen in five settings are no more than a fifth of them.
    assert bound(values, 1.25, repeats=5).threshold == pytest.approx(1.09 + 0.045 * np.log(1e9 / 200))
    # No tail, no more than the least margin; no distance, no threshold.
    assert bound(np.ones(1000), 1.25).threshold == 1.25
    assert bound(np.zeros(3), 1.25).threshold == 0 and bound(np.zeros(3), 1.25).margin == 1


def test_values_of_one_position_count_as_one_as_far_as_they_are_large_together() -> None:
    generator = np.random.default_rng(7)
    alone, settings = generator.exponential(size=2000), 5
    assert clustered([np.tile(alone, settings)], settings) == 5
    assert clustered([np.tile(alone, settings)] * 3, settings) == 5
    assert clustered([generator.exponential(size=2000 * settings)], settings) == pytest.approx(1.02, abs=0.03)
    assert clustered([np.concatenate([alone, alone, np.zeros(6000)])], settings) == 2  # alike in two of five
    assert clustered([alone[:7]], settings) == 5  # not the same positions in each
    assert clustered([alone[:7]], 1) == 1


@pytest.mark.parametrize("draw", ["exponential", "normal"])
def test_a_small_sample_foresees_what_a_large_one_shows(draw: str) -> None:
    """2,000 honest distances, then 1,000 times as many: none passes."""
    generator = np.random.default_rng(3)
    both = {"exponential": generator.exponential(size=2_002_000), "normal": np.abs(generator.normal(size=2_002_000))}
    values = 1 + 0.1 * both[draw]
    assert values[2000:].max() < bound(values[:2000], 1.0).threshold < 5


def test_the_floor_is_the_share_that_leaves_the_least_room() -> None:
    """Noise in proportion to each row wants little floor, noise that is the same for all rows wants much."""
    for proportional, share in ((True, SHARES[0]), (False, SHARES[2])):
        calibration, generator = Calibration(), np.random.default_rng(1)
        rows = generator.normal(size=(400, 256)) * generator.uniform(0.5, 2, size=(400, 1))
        size = np.abs(rows).mean(axis=1, keepdims=True) if proportional else 1.0
        calibration.add(Kind.MLP, 0, 0, rows + 0.003 * size * generator.normal(size=rows.shape), rows)
        assert calibration.report(1.25)[Kind.MLP].shares == (share,)


def test_thresholds_stand_just_above_the_honest_worst() -> None:
    calibration = seen(SHAPE, 0.003)
    profile, report = calibration.profile(SHAPE, margin=1.3), calibration.report(margin=1.3)
    for kind in TOLERATED:
        cell, (least, largest), threshold = profile.cell(kind, 1, 0), report[kind].usual, report[kind].thresholds[1]
        assert threshold * least <= cell.num / cell.den <= threshold * largest + 1e-8
        assert max(report[kind].thresholds) <= report[kind].margin * report[kind].quantiles[1.0] * (1 + 1e-12)
        assert 1.3 <= report[kind].margin < 4  # twenty positions leave much unseen
        # noise of 0.003 over the root of size and floor: at most 2.2 times a strong unit, at least a weak one alone
        assert 0.003 / 2.3 < least <= largest < 0.003 / 0.1
        assert 0.5 < report[kind].quantiles[0.5] < 1 < report[kind].quantiles[1.0]
    assert report[Kind.Q].pieces == 20 * SHAPE.layers * SHAPE.heads
    assert profile.margin / Q30 == pytest.approx(calibration.logits(1.3).threshold, rel=1e-6)
    assert 0.015 < calibration.logit_spread <= 0.02


def test_floors_lie_between_the_units_size_and_the_tensors() -> None:
    calibration = seen(SHAPE, 0.003, positions=400)
    profile, root = calibration.profile(SHAPE), calibration.report()[Kind.Q].shares[0] ** 0.5
    weak, strong = (profile.cell(Kind.Q, 0, unit).floor / Q30 / root for unit in (0, 1))
    # by hand: mean squares 0.01 for one head of four, else 1, so the tensor's is 0.7525
    assert weak == pytest.approx((0.5 * 0.01 + 0.5 * 0.7525) ** 0.5, rel=0.05)
    assert strong == pytest.approx((0.5 * 1 + 0.5 * 0.7525) ** 0.5, rel=0.05)


def test_each_unit_is_as_wide_as_its_own_noise() -> None:
    """A layer four times as noisy: its tolerances are four times as wide, and the other's are none the wider."""
    quiet, mixed = (seen(SHAPE, 0.002, positions=400, growth=growth).profile(SHAPE) for growth in (1.0, 4.0))
    for kind in TOLERATED:
        for layer, unit in ((0, 0), (0, 1), (1, 0), (1, 1)):
            before, after = quiet.cell(kind, layer, unit), mixed.cell(kind, layer, unit)
            assert after.num / before.num == pytest.approx(4.0**layer, rel=1e-6) and after.floor == before.floor


def test_a_layer_with_a_shorter_tail_is_held_to_it() -> None:
    """Two layers alike but for the tail of one. The other's threshold is its own, and never beyond that of all."""
    calibration, generator = Calibration(), np.random.default_rng(5)
    rows = generator.normal(size=(2000, 256))
    for layer, tail in ((0, 0.02), (1, 0.2)):
        distance = 0.003 * (1 + tail * generator.exponential(size=(2000, 1)))
        noise = generator.normal(size=rows.shape)
        noise /= np.linalg.norm(noise, axis=1, keepdims=True) / np.linalg.norm(rows, axis=1, keepdims=True)
        calibration.add(Kind.MLP, layer, 0, rows + distance * noise, rows)
    report = calibration.report(1.25)[Kind.MLP]
    short, long = report.thresholds
    together = report.margin * report.quantiles[1.0]
    assert 1.25 <= short < 1.6 < long <= together * (1 + 1e-12)


def test_a_perfect_sample_still_leaves_room_for_rounding() -> None:
    profile = seen(SHAPE, 0.0).profile(SHAPE)
    assert profile.cell(Kind.V, 0, 0).num == pytest.approx(2.0**-10 * DENOMINATOR, abs=1)


@pytest.mark.parametrize(("dtype", "noise"), [(Dtype.BFLOAT16, 0.06), (Dtype.FLOAT32, 0.006)])
def test_a_band_too_wide_is_refused(dtype: Dtype, noise: float) -> None:
    shape = shape_from_config(tiny.config(dtype))
    with pytest.raises(UnseparableModel, match="layer"):
        seen(shape, noise).profile(shape)
    seen(shape, noise / 10).profile(shape)


def test_an_incomplete_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="never seen"):
        seen(SHAPE, 0.001).profile(replace(SHAPE, layers=3))
    calibration = Calibration()
    for bad in (np.zeros((2, 3)), np.full((2, 4), np.nan)):
        with pytest.raises(ValueError, match="expected"):
            calibration.add(Kind.Q, 0, 0, bad, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="expected one of"):
        calibration.add(Kind.LINK, 0, 0, np.zeros((2, 4)), np.zeros((2, 4)))


def test_a_floor_is_never_below_the_laws() -> None:
    assert q30_floor(0.0) == MIN_FLOOR
    assert q30_floor(1.0) == Q30


def test_a_calibrated_profile_acquits_the_honest_and_sees_eight_bits(tmp_path: Path) -> None:
    """A random model calibrated on its own honest bfloat16, then served with int8 weights of one scale a row."""
    model = tiny.make(tmp_path, tiny.config(), positions=24)
    auditor, calibration, shape = Auditor(model.weights, model.profile), Calibration(), model.shape
    arrays, real = model.trace.arrays, tiny.to_real
    for layer in range(shape.layers):
        for kind, name in zip(TOLERATED, ("q", "k", "v", "attn_out", "mlp_out"), strict=True):
            columns = 256 if kind in (Kind.ATTEND, Kind.MLP) else shape.head_dim
            served = real(arrays[f"{layer}.{name}"], shape.served_dtype).numpy()
            calibration.add_tensor(kind, layer, columns, served, auditor.expected(kind, layer, arrays).numpy())
    logits = np.concatenate([tile.numpy() for _, tile in auditor.reference.logits(arrays["out"])], axis=1)
    calibration.add_logits(real(tiny.to_bits(torch.from_numpy(logits), Dtype.BFLOAT16), Dtype.BFLOAT16).numpy(), logits)
    profile = calibration.profile(shape)

    judge = Auditor(model.weights, profile)
    for layer in range(shape.layers):
        for audit in judge.layer(tiny.whole(model.trace), 0, layer):
            assert audit.worst().ratio == pytest.approx(1 / 1.4, abs=0.35) and not audit.suspicions()

    def eight_bits(weight: torch.Tensor) -> torch.Tensor:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / step).round() * step

    name = "model.layers.0.mlp.down_proj.weight"
    quantised = tiny.make_weights(tmp_path / "eight", tiny.config())
    quantised._bits[name] = tiny.to_bits(eight_bits(quantised.float64(name)), Dtype.BFLOAT16)
    false = Auditor(quantised, model.profile).expected(Kind.MLP, 0, arrays)
    trace = tiny.altered(model, "0.mlp_out", lambda _: tiny.to_bits(false, Dtype.BFLOAT16))
    (audit,) = judge.layer(tiny.whole(trace), 0, 0, [Kind.MLP])
    assert (audit.ratios > 1).mean() > 0.9
    worst = audit.worst()
    judged = replace(model, profile=profile)
    assert tiny.case_of(judged, trace, Kind.MLP, layer=0, position=worst.position, unit=worst.unit).verdict()
