"""A sketch passes over no more than it is said to, and whatever it doubts is judged as without it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.verifier import tiny
from verifier.audit import JUDGED, SUSPICION, Auditor, Span
from verifier.linear import Bits
from verifier.program import Kind
from verifier.referee.codec import BLOCK
from verifier.referee.floats import Dtype
from verifier.sketch import DIRECTIONS, DOUBT, Sketch, seen_distances

torch.set_num_threads(1)
POSITIONS = 40


@pytest.fixture(scope="module", params=list(Dtype), ids=lambda dtype: dtype.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp(request.param.name), tiny.config(request.param), POSITIONS)


@pytest.mark.parametrize(("rho", "said"), [(1.0, 0.087), (1.25, 0.0095), (1.5, 0.0011), (2.0, 0.000024)])
@pytest.mark.parametrize("columns", [1, 2, BLOCK], ids=lambda n: f"an error in {n} columns")
def test_what_is_passed_over_is_as_rare_as_it_is_said(rho: float, said: float, columns: int) -> None:
    """Of errors of rho tolerances, whatever they look like: the directions are fresh for each."""
    pieces, missed = 4000, 0
    error = torch.zeros((1, BLOCK), dtype=torch.float64)
    error[0, :columns] = rho / columns**0.5
    for number in range(pieces):
        directions = Sketch(number.to_bytes(8, "big")).directions(Kind.MLP, 3, BLOCK, torch.float64)
        seen = seen_distances(torch.zeros((1, DIRECTIONS), dtype=torch.float64), error, directions)
        missed += seen[0, 0] <= DOUBT**2
    assert missed <= said * pieces + 5 * (said * pieces) ** 0.5


def test_directions_are_a_layers_and_a_kinds_own() -> None:
    def drawn(seed: bytes, kind: Kind, layer: int) -> tuple[float, ...]:
        return tuple(Sketch(seed).directions(kind, layer, 8, torch.float64).flatten().tolist())

    assert drawn(b"x", Kind.Q, 0) == drawn(b"x", Kind.Q, 0)
    all_of_them = {drawn(seed, kind, layer) for seed in (b"x", b"y") for kind in JUDGED for layer in (0, 1)}
    assert len(all_of_them) == 2 * len(JUDGED) * 2


def scaled(position: int, first: int, end: int, factor: float, dtype: Dtype) -> Callable[[Bits], Bits]:
    def change(bits: Bits) -> Bits:
        values = factor * tiny.to_real(bits[position : position + 1, first:end], dtype)
        bits[position, first:end] = tiny.to_bits(values, dtype)
        return bits

    return change


@pytest.mark.parametrize("lie", ["none", "1.q", "1.k", "1.v", "1.attn_out", "1.mlp_out", "no number"])
def test_a_sketched_audit_finds_what_an_audit_finds(model: tiny.Tiny, lie: str) -> None:
    dtype = model.shape.served_dtype
    precision = torch.float64 if dtype == Dtype.FLOAT32 else torch.float32  # as a judge screens
    trace = model.trace
    if lie == "no number":

        def spoiled(bits: Bits) -> Bits:
            bits[1, 7] = dtype.nan
            return bits

        trace = tiny.altered(model, "1.q", spoiled)
    elif lie != "none":
        trace = tiny.altered(model, lie, scaled(31, 0, 16, 1.5, dtype))
    auditor = Auditor(model.weights, model.profile, precision)
    span = Span.whole(tiny.whole(trace), 0)
    for seed in (b"one", b"two", b"three"):
        for exact, seen in zip(auditor.sweep(1, [span]), auditor.sweep(1, [span], sketch=Sketch(seed)), strict=True):
            assert exact.kind == seen.kind and exact.ratios.shape == seen.ratios.shape
            again = seen.ratios > DOUBT
            assert seen.ratios[again] == pytest.approx(exact.ratios[again], rel=1e-3)
            assert (seen.ratios[exact.ratios > 2] > SUSPICION).all() and (again | (exact.ratios < 2)).all()
            assert (exact.ratios[seen.ratios > SUSPICION] > SUSPICION - 1e-3).all()
            # An estimate of what passes is one: chi-square, of as many degrees as there are directions.
            told = ~again & (exact.ratios > 1e-3)
            assert not told.any() or 0.3 < np.median(seen.ratios[told] / exact.ratios[told]) < 3
