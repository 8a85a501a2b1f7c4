"""verifier.referee.ops: what each op means in real numbers, its shapes, and the bounds of docs/canonical.md."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.referee.errors import OperandShape, UnknownOp
from verifier.referee.fixed import LOG2E, Q30, SATURATION, isqrt
from verifier.referee.floats import INVALID, Dtype, add
from verifier.referee.ops import Op, combine, finish, run

STORED = st.integers(-(1 << 50), 1 << 50)
LISTS = st.lists(STORED, min_size=1, max_size=256)
PAIRS = st.lists(st.tuples(STORED, STORED), min_size=1, max_size=256)

DRAW = [65536, 2, 60000, 7, 0, 3, 0, 1, 0]
SHAPES: dict[Op, list[list[int]]] = {
    Op.ADD: [[0], [0]],
    Op.SUMSQ: [[1, 2]],
    Op.RSQRT: [[1]],
    Op.NORM: [[1], [1], [1]],
    Op.LINEAR: [[1, 2], [3, 4]],
    Op.ROPE: [[1, 2], [3]],
    Op.SCORE: [[1, 2], [3, 4]],
    Op.MAX: [[1, 2]],
    Op.EXP: [[1], [2]],
    Op.SUM: [[1, 2]],
    Op.WSUM: [[1, 2], [3, 4]],
    Op.DIV: [[1], [2]],
    Op.GATED: [[1], [2]],
    Op.VERDICT: [[1, 2], [3, 4], [1, 1, 1024]],
    Op.LOGIT: [[1, 2], [3, 4]],
    Op.COMPARE: [[1, 2], [1, 1, 5]],
    Op.SAME: [[1, 2], [3, 4]],
    Op.RANK: [[1, 2], [1], [1, 1, 5], DRAW],
    Op.MASS: [[1, 2], [1], [2], [1, 1, 5], DRAW],
    Op.STANDING: [[1], [2], DRAW],
    Op.CHOICE: [[1], [2], [1], [1, 1, 5], DRAW],
}
ANY_LENGTH = {Op.SUMSQ, Op.MAX, Op.SUM, Op.RANK, Op.MASS}


@pytest.mark.parametrize("op", list(Op))
def test_lists_of_another_shape_are_refused(op: Op) -> None:
    args = SHAPES[op]
    run(op, args, 1, 1)
    wrong = [args[:-1], [*args, [1]]]
    if op not in ANY_LENGTH:
        wrong += [[*args[:i], [*args[i], 1], *args[i + 1 :]] for i in range(len(args))]
    for lists in wrong:
        with pytest.raises(OperandShape):
            run(op, lists, 1, 1)


@pytest.mark.parametrize("op", [-1, 0, 23, 255])
def test_other_numbers_are_no_ops(op: int) -> None:
    with pytest.raises(UnknownOp):
        run(op, [[1]], 0, 0)


def test_the_largest_of_nothing_is_refused() -> None:
    with pytest.raises(OperandShape):
        run(Op.MAX, [[]], 0, 0)


@given(PAIRS)
def test_sums_are_sums(pairs: list[tuple[int, int]]) -> None:
    x, y = [list(v) for v in zip(*pairs, strict=True)]
    dot = sum(a * b for a, b in pairs)
    assert run(Op.LINEAR, [x, y], 24, 0) == run(Op.LOGIT, [x, y], 24, 0) == run(Op.WSUM, [x, y], 0, 0) == dot
    assert run(Op.SUM, [x], 0, 0) == sum(x)
    assert run(Op.MAX, [x], 0, 0) == max(x)
    assert run(Op.SUMSQ, [x], 0, 0) == sum(v * v for v in x) <= 256 << 100


@given(st.lists(STORED, min_size=2, max_size=64), st.data())
def test_sums_may_be_cut_anywhere(x: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(x) - 1))
    for op in (Op.SUMSQ, Op.MAX, Op.SUM):
        parts = [run(op, [x[:cut]], 0, 0), run(op, [x[cut:]], 0, 0)]
        assert combine(op, parts) == run(op, [x], 0, 0)


@given(st.integers(-(1 << 110), 1 << 110), st.integers(0, 32))
def test_finish_rounds_products_and_leaves_the_rest(total: int, a: int) -> None:
    for op in Op:
        if op in (Op.LINEAR, Op.LOGIT):
            exact = 2 * total + (1 << a) >> a + 1
            assert finish(op, total, a) == max(-SATURATION, min(SATURATION, exact))
        else:
            assert finish(op, total, a) == total


@given(st.integers(-(1 << 100), 1 << 132), st.integers(1 << 24, (1 << 64) - 1), st.integers(1, (1 << 32) - 1))
def test_rsqrt_is_the_inverse_root(x: int, a: int, b: int) -> None:
    argument = (b << 140) // (max(x, 0) + b * a)
    assert argument <= 1 << 172
    root = run(Op.RSQRT, [[x]], a, b)
    assert 0 <= root <= 1 << 58
    assert root**2 <= argument < (root + 1) ** 2
    true = 1 / math.sqrt(max(x, 0) / b / 2**60 + a / 2**60) * 2**40
    assert abs(root - true) <= 1e-12 * true + 2


def test_rsqrt_of_nothing_is_0() -> None:
    assert run(Op.RSQRT, [[0]], 0, 4096) == run(Op.RSQRT, [[-5]], 0, 0) == 0


@given(STORED, st.integers(0, 1 << 58), st.integers(-(1 << 32), 1 << 32))
def test_norm_stays_in_its_bounds(x: int, y: int, z: int) -> None:
    assert abs(run(Op.NORM, [[x], [y], [z]], 24, 0)) <= SATURATION


@given(STORED, STORED, st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 20))
def test_rope_turns(x0: int, x1: int, frequency: int, position: int) -> None:
    first, second = (run(Op.ROPE, [[x0, x1], [frequency]], position, b) for b in (0, 1))
    assert max(abs(first), abs(second)) < 1 << 51
    length = math.hypot(x0, x1)
    assert abs(math.hypot(first, second) - length) <= 1e-8 * length + 2


def test_rope_of_a_quarter_turn() -> None:
    assert [run(Op.ROPE, [[3, 5], [1 << 62]], 1, b) for b in (0, 1)] == [-5, 3]


@given(st.lists(st.tuples(STORED, STORED), min_size=1, max_size=256))
def test_score_stays_in_its_bounds(pairs: list[tuple[int, int]]) -> None:
    q, k = [list(v) for v in zip(*pairs, strict=True)]
    scale = isqrt(LOG2E**2 // len(pairs))
    assert abs(run(Op.SCORE, [q, k], scale, 1)) <= 1 << 51


@given(STORED, STORED)
def test_exp_stays_in_its_bounds(x: int, y: int) -> None:
    assert 0 <= run(Op.EXP, [[min(x, y)], [max(x, y)]], 0, 0) <= 1 << 40


def test_the_softmax_sums_fit_their_words_at_128k_positions() -> None:
    positions = 1 << 17
    assert positions * (1 << 40) == 1 << 57
    assert positions * (1 << 40) * (1 << 50) == 1 << 107
    assert 32 * (1 << 127) < 1 << 255


@given(st.integers(-(1 << 107), 1 << 107), st.integers(-5, 1 << 57))
def test_div_floors_and_is_total(x: int, y: int) -> None:
    got = run(Op.DIV, [[x], [y]], 0, 0)
    if y <= 0:
        assert got == 0
    else:
        q = max(-SATURATION - 1, min(SATURATION + 1, x // y))
        assert got == max(-SATURATION, min(SATURATION, q))
    assert run(Op.DIV, [[-1], [2]], 0, 0) == -1


@given(STORED, STORED)
def test_gated_stays_in_its_bounds(x: int, y: int) -> None:
    assert abs(run(Op.GATED, [[x], [y]], 0, 0)) <= SATURATION


CELL = [1, 100, 1 << 10]


@given(LISTS, st.integers(1, (1 << 32) - 1), st.integers(1, (1 << 32) - 1), st.integers(1 << 10, (1 << 64) - 1))
def test_verdict_stays_in_256_bits_and_forgives_equality(x: list[int], num: int, den: int, floor: int) -> None:
    assert run(Op.VERDICT, [x, x, [num, den, floor]], 1 << 49, 0) == 0
    far = [-(1 << 50)] * 256
    assert sum((1 << 51) ** 2 for _ in far) * ((1 << 32) - 1) ** 2 < 1 << 175 <= 1 << 64 << 111


@given(st.integers(1, 1 << 40), st.integers(1, 256))
def test_verdict_draws_its_line(d: int, n: int) -> None:
    # One element off by e, tolerance 1 %, n equal elements: wrong iff e^2 * 100^2 > n (d^2 + floor^2).
    line = isqrt(n * (d * d + (1 << 20)) // 10_000)
    for error, wrong in ((line, 0), (line + 1, 1)):
        served = [d + error] + [d] * (n - 1)
        assert run(Op.VERDICT, [[d] * n, served, CELL], 1 << 49, 0) == wrong


def test_verdict_excuses_an_overflow_only_above_the_bound() -> None:
    a = 1 << 49
    for d, wrong in ((a, 1), (a + 1, 0), (-a, 1), (-a - 1, 0), (0, 1)):
        assert run(Op.VERDICT, [[d, 7], [INVALID, 7], CELL], a, 0) == wrong
    # The excused element counts in neither sum, but its floor does: 15^2 x 10^4 > 49 + 2 x 2^20, 14^2 x 10^4 is not.
    assert run(Op.VERDICT, [[a + 1, 7], [INVALID, 7 + 15], CELL], a, 0) == 1
    assert run(Op.VERDICT, [[a + 1, 7], [INVALID, 7 + 14], CELL], a, 0) == 0


def test_compare_needs_more_than_the_margin() -> None:
    assert [run(Op.COMPARE, [[10, v], [1, 1, 5]], 0, 0) for v in (14, 15, 16)] == [0, 0, 1]


def test_same_and_add_see_every_bit() -> None:
    assert run(Op.SAME, [[0, 0x8000], [0, 0x8000]], 0, 0) == 0
    assert run(Op.SAME, [[0, 0x8000], [0, 0]], 0, 0) == 1
    one, two = 0x3F80, 0x4000
    assert run(Op.ADD, [[one], [one]], 0, Dtype.BFLOAT16) == 2 * Q30
    assert run(Op.ADD, [[two], [0x7F80]], 0, Dtype.BFLOAT16) == 0


def test_a_link_rounds_each_sum() -> None:
    # 256 + 1 = 256 (a tie, to even), twice; 256 + (1 + 1) would be 258.
    assert add(Dtype.BFLOAT16, add(Dtype.BFLOAT16, 0x4380, 0x3F80), 0x3F80) == 0x4380
    assert add(Dtype.BFLOAT16, 0x4380, add(Dtype.BFLOAT16, 0x3F80, 0x3F80)) == 0x4381


def test_a_number_that_was_given_up_is_no_op() -> None:
    with pytest.raises(UnknownOp, match="from 1 to 22, got 18"):
        run(18, [[1], [2], [3], [6]], 0, 0)
