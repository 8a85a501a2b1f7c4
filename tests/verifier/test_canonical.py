"""The fast twin against the clear one: op by op on random and extreme inputs, then whole segments through `step`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verifier import tiny
from verifier import linear, vectors
from verifier.game import read_roots
from verifier.linear import Part
from verifier.program import Kind
from verifier.referee import fixed, floats, ops
from verifier.referee.codec import GREEDY, Request, decode_vector
from verifier.referee.errors import ChunkOutOfRange, ElementOutOfRange
from verifier.referee.floats import Dtype
from verifier.referee.referee import element_count, step
from verifier.referee.tree import leaf, root

torch.set_num_threads(1)

EDGE = (1 << 50) - 1
EDGES = [0, 1, -1, EDGE, -EDGE, 1 << 30, -(1 << 30), (1 << 49) + 1]
values = st.one_of(st.sampled_from(EDGES), st.integers(-EDGE, EDGE), st.integers(-(1 << 36), 1 << 36))
dtypes = st.sampled_from(list(Dtype))


def bits_of(dtype: Dtype) -> st.SearchStrategy[int]:
    top = (1 << 8 * dtype.size) - 1
    special = [0, dtype.sign, dtype.infinity, dtype.infinity | dtype.sign, dtype.nan, dtype.infinity - 1, 1, top]
    return st.one_of(st.sampled_from(special), st.integers(0, top))


def raw(bits: list[int], dtype: Dtype) -> linear.Bits:
    return np.array(bits, dtype=np.uint32 if dtype == Dtype.FLOAT32 else np.uint16)


def ints(items: list[int]) -> linear.Ints:
    return np.array(items, dtype=np.int64)


@st.composite
def raw_lists(draw: st.DrawFn) -> tuple[Dtype, list[int], list[int]]:
    dtype, n = draw(dtypes), draw(st.integers(1, 20))
    strategy = st.lists(bits_of(dtype), min_size=n, max_size=n)
    return dtype, draw(strategy), draw(strategy)


@given(raw_lists())
@settings(max_examples=150, deadline=None)
def test_decoding_equals_the_clear_twin(case: tuple[Dtype, list[int], list[int]]) -> None:
    dtype, bits, _ = case
    assert vectors.checked_served(raw(bits, dtype), dtype).tolist() == [floats.decode_served(b, dtype) for b in bits]
    expected = [floats.valid(floats.decode_weight(b, dtype)) for b in bits]
    assert vectors.weights(raw(bits, dtype), dtype).tolist() == expected
    assert linear.fixed_weights(raw(bits, dtype), dtype).to(torch.int64).tolist() == expected


@given(raw_lists())
@settings(max_examples=150, deadline=None)
def test_adding_equals_the_clear_twin(case: tuple[Dtype, list[int], list[int]]) -> None:
    dtype, x, y = case
    total = vectors.add_bits(dtype, raw(x, dtype), raw(y, dtype))
    assert total.tolist() == [floats.add(dtype, a, b) for a, b in zip(x, y, strict=True)]
    decoded = vectors.add(raw(x, dtype), raw(y, dtype), dtype).tolist()
    assert decoded == [ops.add([[a], [b]], 0, dtype) for a, b in zip(x, y, strict=True)]


def test_every_16_bit_float_decodes_as_the_clear_twin() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (Dtype.BFLOAT16, Dtype.FLOAT16):
        assert vectors.checked_served(every, dtype).tolist() == [floats.decode_served(b, dtype) for b in range(1 << 16)]


@given(st.lists(st.tuples(values, values), min_size=1, max_size=12), st.sampled_from([24, 32]), st.integers(0, 1 << 58))
@settings(max_examples=100, deadline=None)
def test_elementwise_ops_equal_the_clear_twin(pairs: list[tuple[int, int]], g: int, inverse: int) -> None:
    x, y = ints([p[0] for p in pairs]), ints([p[1] for p in pairs])
    gain = y >> (50 - 8 - g) if g == 24 else y >> 10
    expected = [ops.norm([[a], [inverse], [int(w)]], g, 0) for (a, _), w in zip(pairs, gain, strict=True)]
    assert vectors.norm(x, inverse, gain, g).tolist() == expected
    assert vectors.gated(x, y).tolist() == [ops.gated([[a], [b]], 0, 0) for a, b in pairs]
    assert vectors.exp2(x - y).tolist() == [fixed.exp2(a - b) for a, b in pairs]
    wide = x.astype(object) * (1 << 56) + y
    expected = [ops.div([[w], [b]], 0, 0) for w, (_, b) in zip(wide.tolist(), pairs, strict=True)]
    assert vectors.divided(wide[:, None], y)[:, 0].tolist() == expected


@st.composite
def matrices(draw: st.DrawFn) -> tuple[linear.Ints, linear.Ints]:
    m, k, n = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rows = [draw(st.lists(values, min_size=k, max_size=k)) for _ in range(m + n)]
    return np.array(rows[:m], dtype=np.int64), np.array(rows[m:], dtype=np.int64)


@given(matrices(), st.sampled_from([1, 64, 128, 80]))
@settings(max_examples=100, deadline=None)
def test_products_equal_the_clear_twin(case: tuple[linear.Ints, linear.Ints], hd: int) -> None:
    q, k = case
    scale = fixed.isqrt(fixed.LOG2E**2 // hd)
    expected = [[ops.score([a.tolist(), b.tolist()], scale, 0) for b in k] for a in q]
    assert vectors.score(q, k, scale).tolist() == expected
    sums = [[sum(int(u) * int(v) for u, v in zip(a, b, strict=True)) for b in k] for a in q]
    assert vectors.weighted_sum(q, np.ascontiguousarray(k.T)).tolist() == sums


@given(st.data(), dtypes)
@settings(max_examples=150, deadline=None)
def test_linear_equals_the_clear_twin(data: st.DataObject, dtype: Dtype) -> None:
    n, m = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5))
    x = data.draw(st.lists(values, min_size=n, max_size=n))
    rows = [data.draw(st.lists(bits_of(dtype), min_size=n, max_size=n)) for _ in range(m)]
    g = dtype.weight_fraction_bits
    decoded = [[floats.valid(floats.decode_weight(b, dtype)) for b in row] for row in rows]
    expected = [ops.finish(ops.Op.LINEAR, ops.linear([x, row], g, 0), g) for row in decoded]
    weights = np.stack([raw(row, dtype) for row in rows])
    assert linear.linear(ints(x), weights, dtype).tolist() == expected
    assert linear.linear(np.stack([ints(x)] * 2), weights, dtype).tolist() == [expected] * 2


@pytest.mark.parametrize("dtype", list(Dtype))
def test_linear_is_exact_for_the_largest_rows_and_activations(dtype: Dtype) -> None:
    n = 14336
    below = (floats.WEIGHT_LIMIT_BITS + dtype.bias << dtype.mantissa_bits) - 1  # the largest weight, just below 2^8
    weights = np.full((3, n), below, dtype=raw([0], dtype).dtype)
    weights[1, ::2] |= dtype.sign
    weights[2, 1:] = 0
    x = np.full(n, EDGE, dtype=np.int64)
    x[::3] = -EDGE + 5
    g = dtype.weight_fraction_bits
    decoded = [[floats.decode_weight(int(b), dtype) for b in row] for row in weights]
    expected = [ops.finish(ops.Op.LINEAR, ops.linear([x.tolist(), row], g, 0), g) for row in decoded]
    assert linear.linear(x, weights, dtype).tolist() == expected
    small = np.random.default_rng(1).integers(-(1 << 20), 1 << 20, n)
    expected = [ops.finish(ops.Op.LINEAR, ops.linear([small.tolist(), row], g, 0), g) for row in decoded]
    assert linear.linear(small, weights, dtype).tolist() == expected


placed_values = st.tuples(st.integers(-(1 << 54), 1 << 54), st.integers(0, 90))


@given(st.lists(placed_values, min_size=1, max_size=6), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_rounding_of_parts_is_exact(parts: list[tuple[int, int]], s: int) -> None:
    # INVARIANT: the lowest part is in place; the others may stand anywhere above it.
    placed = [(value, shift if i else 0) for i, (value, shift) in enumerate(parts)]
    total = sum(value << shift for value, shift in placed)
    arrays = [Part(np.array([value], dtype=np.int64), shift) for value, shift in placed]
    assert linear.rounded(arrays, s).tolist() == [fixed.cl(fixed.rs(total, s))]


@given(st.lists(st.one_of(values, st.integers(-(1 << 63), (1 << 63) - 1)), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_vectors_encode_as_the_law_says(items: list[int]) -> None:
    assert decode_vector(vectors.encode(ints(items), False), False) == items
    wide = np.array([item << 60 for item in items], dtype=object)
    assert decode_vector(vectors.encode(wide, True), True) == wide.tolist()


# ---- whole segments

PLACES = [
    (Kind.Q, {"layer": 1, "position": 7, "unit": 3}),
    (Kind.K, {"layer": 0, "position": 17, "unit": 1}),
    (Kind.V, {"layer": 1, "position": 33, "unit": 1}),
    (Kind.ATTEND, {"layer": 1, "position": 0, "unit": 0}),
    (Kind.ATTEND, {"layer": 1, "position": 33, "unit": 1}),
    (Kind.MLP, {"layer": 1, "position": 5, "unit": 1}),
    (Kind.EMBED, {"position": 3, "unit": 1}),
    (Kind.TOKEN, {"layer": 1, "position": 4, "unit": 12}),
    (Kind.SAMPLE, {"layer": 1, "position": 4, "unit": 12}),
]


@pytest.fixture(scope="module", params=list(Dtype), ids=lambda dtype: dtype.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    folder: Path = tmp_path_factory.mktemp(request.param.name)
    return tiny.make(folder, tiny.config(request.param), positions=34, seed=int(request.param))


@pytest.mark.parametrize(("kind", "place"), PLACES, ids=lambda value: getattr(value, "name", None))
def test_steps_judged_from_openings_equal_the_vectors(model: tiny.Tiny, kind: Kind, place: dict[str, int]) -> None:
    """Every instruction, at its first, last and some other elements, every chunk: referee.step on Case's openings."""
    word = Request(3, 1, 1, 99, (), bytes(32), 70000, 9, 60000).sampling() if kind == Kind.SAMPLE else GREEDY
    case = model.case(kind, token=model.tokens[place["position"]], sampling=word, **place)
    roots, generator = case.steps(), np.random.default_rng(3)
    for i, instruction in enumerate(case.instructions):
        vector, read = case.vector(i), read_roots(instruction, roots[:i])
        assert len(vector) == element_count(instruction, case.cell.position, case.cell.unit)
        leaves = [case.leaf(i, index) for index in range(case.leaves(i))]
        assert root([leaf(data) for data in leaves]) == roots[i]
        assert decode_vector(b"".join(leaves), bool(instruction.wide)) == vector.tolist()
        for e in {0, len(vector) - 1, *generator.integers(0, len(vector), 3).tolist()}:
            sums = []
            for chunk in range(case.chunks(i)):
                openings = case.openings(i, e, chunk)
                sums.append(step(model.model, case.cell, read, instruction, e, chunk, openings))
            assert ops.finish(instruction.op, ops.combine(instruction.op, sums), instruction.a) == int(vector[e])
            assert sums == case.chunk_sums(i, e) or case.chunks(i) == 1
    if kind not in (Kind.TOKEN, Kind.SAMPLE):  # the token there is any
        assert not case.verdict()


def test_a_long_attention_sum_is_split_by_powers_of_32(tmp_path: Path) -> None:
    told = tiny.config(num_attention_heads=2, num_key_value_heads=1, head_dim=8, hidden_size=64, intermediate_size=96)
    long = tiny.make(tmp_path, told, positions=600)
    case = long.case(Kind.ATTEND, layer=1, position=599)
    wsum = 4
    assert case.chunks(wsum) == 75
    chunks = case.chunk_sums(wsum, 3)
    assert case.sums(wsum, 3, 0, 75) == [sum(chunks[:32]), sum(chunks[32:64]), sum(chunks[64:])]
    assert case.sums(wsum, 3, 64, 75) == chunks[64:]
    assert sum(case.chunk_sums(wsum, 3)) == int(case.vector(wsum)[3])
    assert not case.verdict()


def test_openings_out_of_range_are_refused(model: tiny.Tiny) -> None:
    case = model.case(Kind.Q, layer=0, position=0, unit=0)
    with pytest.raises(ElementOutOfRange):
        case.openings(3, model.shape.head_dim)
    with pytest.raises(ChunkOutOfRange):
        case.openings(0, 0, 2)
    with pytest.raises(ChunkOutOfRange):
        case.sums(0, 0, 1, 3)


def test_a_verdict_sees_what_is_wrong_and_what_is_no_number(model: tiny.Tiny) -> None:
    dtype = model.shape.served_dtype

    def flipped(bits: linear.Bits) -> linear.Bits:
        bits[5, 3] ^= dtype.sign
        bits[6, 3] = dtype.nan
        return bits

    trace = tiny.altered(model, "1.mlp_out", flipped)
    verdicts = [
        tiny.case_of(model, trace, Kind.MLP, layer=1, position=position, unit=0).verdict() for position in (4, 5, 6)
    ]
    assert verdicts == [False, True, True]
    assert not tiny.case_of(model, trace, Kind.MLP, layer=1, position=5, unit=1).verdict()
