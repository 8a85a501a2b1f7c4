"""verifier.referee.fixed: rounding, and the functions against float64 within stated bounds."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.referee.fixed import LOG2E, Q30, cl, exp2, horner, isqrt, rs, silu, sincos


@given(st.integers(-(1 << 200), 1 << 200), st.integers(1, 60))
def test_rs_rounds_to_nearest_and_ties_up(x: int, s: int) -> None:
    assert rs(x, s) == math.floor(Fraction(x, 1 << s) + Fraction(1, 2))


@pytest.mark.parametrize(
    ("x", "s", "rounded"),
    [(3, 1, 2), (-3, 1, -1), (-1, 1, 0), (1, 1, 1), (-5, 2, -1), (-6, 2, -1), (-7, 2, -2), (9, 0, 9)],
)
def test_rs_by_hand(x: int, s: int, rounded: int) -> None:
    assert rs(x, s) == rounded


@given(st.integers(-(1 << 60), 1 << 60))
def test_cl_saturates_at_plus_minus_2_50_less_one(x: int) -> None:
    assert cl(x) == (x if abs(x) < 1 << 50 else int(math.copysign((1 << 50) - 1, x)))


@given(st.integers(0, 1 << 180))
def test_isqrt_is_the_floor_of_the_root(x: int) -> None:
    assert isqrt(x) ** 2 <= x < (isqrt(x) + 1) ** 2


def test_horner_by_hand() -> None:
    # 3 + 2x + x^2 at x = 1/2, in Q30: 4.25
    assert horner((3 * Q30, 2 * Q30, Q30), Q30 // 2) == 17 * Q30 // 4
    assert horner((0, -1), 1) == -1  # floors, where truncation gives 0


@given(st.integers(-40 * Q30, 0))
def test_exp2_is_within_4e_9_of_the_power(d: int) -> None:
    # Relative error 4e-9, plus one unit of Q40 from the last shift.
    true = math.exp2(d / Q30) * (1 << 40)
    assert abs(exp2(d) - true) <= 4e-9 * true + 1


def test_exp2_at_its_edges() -> None:
    assert exp2(0) == exp2(1) == exp2(1 << 50) == 1 << 40
    assert exp2(-Q30) == 1 << 39
    assert exp2(-40 * Q30) == 1
    assert exp2(-63 * Q30) == exp2(-64 * Q30) == exp2(-65 * Q30) == exp2(-(1 << 51)) == 0
    assert 0 <= min(exp2(-k) for k in range(0, Q30, Q30 // 997)) and max(exp2(-k) for k in range(9)) <= 1 << 40


@given(st.integers(-(1 << 50), 1 << 50))
def test_silu_is_within_4e_9_of_the_function(g: int) -> None:
    x = g / Q30
    true = (x / (1 + math.exp(-x)) if x > -700 else 0.0) * Q30
    assert abs(silu(g) - true) <= 4e-9 * abs(g) + 1


def test_silu_at_its_edges() -> None:
    assert silu(0) == 0
    assert silu(1 << 50) == 1 << 50
    assert silu(-(1 << 50)) == 0


@given(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1))
def test_sincos_is_within_6e_9_of_the_functions(position: int, frequency: int) -> None:
    turns = Fraction(position * frequency % (1 << 64), 1 << 64)
    angle = 2 * math.pi * float(turns)
    s, c = sincos(position, frequency)
    assert abs(s / Q30 - math.sin(angle)) < 6e-9
    assert abs(c / Q30 - math.cos(angle)) < 6e-9


def test_sincos_of_whole_quarters() -> None:
    quarter = 1 << 62
    assert [sincos(k, quarter) for k in range(5)] == [(0, Q30), (Q30, 0), (0, -Q30), (-Q30, 0), (0, Q30)]


def test_log2e_is_the_constant() -> None:
    assert round(math.log2(math.e) * (1 << 40)) == LOG2E
