"""Differential fuzz: every function of the referee, Python against the real EVM, values and error names alike.

Rationale: long, because it is a list: what each function is fed, and the functions.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.twin.evm import Answer, Contract, Refusal
from verifier import sampling as fast
from verifier.referee import codec, fixed, floats, sampling, tree
from verifier.referee import referee as judge
from verifier.referee.errors import RefereeError
from verifier.referee.ops import Op, combine, finish, run

_BATCH = 24
# Cases an example: one request carries them all, so a case costs a fraction of a millisecond.
FUZZ = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def twin(function: Callable[..., Any], *args: Any) -> Answer:
    """What the Python twin answers, in the EVM's terms."""
    try:
        return function(*args)
    except RefereeError as error:
        return Refusal(type(error).__name__)


def integers(bits: int) -> st.SearchStrategy[int]:
    """Signed integers of that width: all of them, and the edges."""
    top = 1 << (bits - 1)
    powers = st.builds(
        lambda sign, power, off: max(-top, min(top - 1, sign * (1 << power) + off)),
        st.sampled_from((1, -1)),
        st.integers(0, bits - 1),
        st.integers(-1, 1),
    )
    return st.one_of(powers, st.integers(-top, top - 1), st.integers(-3, 3))


def lists(bits: int, seeds: Sequence[int]) -> list[list[int]]:
    """A list for each seed, of one length up to a whole chunk, drawn outside hypothesis because 256 draws are slow."""
    length = random.Random(seeds[0]).choice((0, 1, 2, 7, 8, 9, 64, 128, 255, 256))
    out = []
    for seed in seeds:
        source = random.Random(seed)
        width = source.randint(1, bits)
        out.append([source.randint(-(1 << (width - 1)), (1 << (width - 1)) - 1) for _ in range(length)])
    return out


SEED = st.integers(0, (1 << 32) - 1)
I64, I128, U64, U32 = integers(64), integers(128), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1)
SERVED, WEIGHT = integers(51), integers(41)
SHIFT = st.sampled_from((0, 1, 23, 24, 32, 63, 64, 65, 255))
DTYPE = st.sampled_from((0, 1, 2))
CELL = st.tuples(U32, st.integers(1, (1 << 32) - 1), U64).map(list)


def bits(dtype: int) -> st.SearchStrategy[int]:
    """Raw bits, often near the ends of the exponent's range."""
    shape = floats.Dtype(dtype)
    top = (1 << shape.exponent_bits) - 1
    return st.builds(
        lambda sign, exponent, mantissa: sign | exponent << shape.mantissa_bits | mantissa,
        st.sampled_from((0, shape.sign)),
        st.one_of(st.sampled_from((0, 1, top, top - 1, shape.bias)), st.integers(0, top)),
        st.one_of(
            st.sampled_from((0, 1, (1 << shape.mantissa_bits) - 1)), st.integers(0, (1 << shape.mantissa_bits) - 1)
        ),
    )


def singles(*parts: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.tuples(*parts).map(lambda values: [[v] for v in values])


def pairs(x_bits: int, y_bits: int) -> st.SearchStrategy[list[list[int]]]:
    def build(x: int, y: int) -> list[list[int]]:
        first = lists(x_bits, [x])[0]
        source = random.Random(y)
        return [first, [source.randint(-(1 << (y_bits - 1)), (1 << (y_bits - 1)) - 1) for _ in first]]

    return st.builds(build, SEED, SEED)


def verdict(seed: int, cell: list[int], near: bool) -> list[list[int]]:
    """Standard and served values, some invalid; where near, the distance is about the tolerance."""
    source = random.Random(seed)
    standard = lists(source.choice((20, 40, 51, 64)), [seed])[0]
    off = 1 << source.randint(0, 45)
    served = [d + source.randint(-off, off) for d in standard]
    if source.random() < 0.3 and served:
        served[source.randrange(len(served))] = floats.INVALID
    if near:
        distance = sum((s - d) ** 2 for s, d in zip(served, standard, strict=True) if s != floats.INVALID)
        size = sum(d * d for s, d in zip(served, standard, strict=True) if s != floats.INVALID)
        floor = 1 << 10
        den = 1 << 20
        num = min((1 << 32) - 1, fixed.isqrt(distance * den * den // max(1, size + len(served) * floor**2)))
        cell = [num + source.randint(0, 1), den, floor]
    return [standard, served, cell]


def blocks(seed: int, dtype: int) -> list[list[int]]:
    """Raw bits: two lists that mostly agree."""
    source = random.Random(seed)
    length = source.choice((1, 3, 16, 256))
    high = (1 << (8 * floats.Dtype(dtype).size)) - 1
    first = [source.randint(0, high) for _ in range(length)]
    second = list(first)
    if source.random() < 0.5:
        second[source.randrange(length)] ^= 1
    return [first, second]


def sampled(seed: int, names: str) -> list[list[int]]:
    """Arguments of the sampling ops, by name: logits of which many are near the judged one, any parameters."""
    source = random.Random(seed)
    width = 1 << source.randint(0, 48)
    centre, margin = source.randint(-(1 << 49), 1 << 49), source.choice((0, 1, width, source.getrandbits(64)))
    logits = [centre + source.randint(-width, width) for _ in range(source.choice((1, 3, 16, 256)))]
    token, first = source.randrange(600), source.choice((0, 256, 512))
    unit = token if source.random() < 0.4 else source.randrange(600)
    parts = [source.choice((source.getrandbits(n), source.getrandbits(17) & ((1 << n) - 1))) for n in (32, 32, 17, 64)]
    draw = [*parts, source.getrandbits(32), source.getrandbits(20), token, unit, first]
    judged = source.choice(logits) + source.choice((0, margin, -margin))
    other = judged + source.randint(-(1 << 36), 1 << 36)
    made = {
        "logits": logits,
        "judged": [judged],
        "largest": [max(logits) + source.choice((0, width))],
        "cell": [1, 1, margin],
        "rank": [source.choice((0, 1, parts[1], max(0, parts[1] - 1)))],
        "mass": [source.randint(-1, 1)],
        "other": [other],
        "standing": [source.randint(0, 1)],
        "draw": draw,
    }
    return [made[name] for name in names.split()]


NONE = st.just(0)
Case = tuple[list[list[int]], int, int]


def with_dtype(build: Callable[[int], st.SearchStrategy[list[list[int]]]]) -> st.SearchStrategy[Case]:
    return DTYPE.flatmap(lambda dtype: st.tuples(build(dtype), NONE, st.just(dtype)))


CASES: dict[Op, st.SearchStrategy[Case]] = {
    Op.ADD: with_dtype(lambda d: singles(bits(d), bits(d))),
    Op.SUMSQ: st.tuples(pairs(64, 1).map(lambda two: two[:1]), NONE, NONE),
    Op.RSQRT: st.tuples(singles(I128), st.one_of(NONE, U64), st.one_of(NONE, st.integers(0, 20000), U32)),
    Op.NORM: st.tuples(singles(I64, I64, WEIGHT), SHIFT, NONE),
    Op.LINEAR: st.tuples(pairs(64, 41), NONE, NONE),
    Op.ROPE: st.tuples(
        st.tuples(I64, I64, U64).map(lambda v: [[v[0], v[1]], [v[2]]]), st.integers(0, 1 << 20), st.sampled_from((0, 1))
    ),
    Op.SCORE: st.tuples(pairs(51, 51), U64, NONE),
    Op.MAX: st.tuples(pairs(64, 1).map(lambda two: two[:1]), NONE, NONE),
    Op.EXP: st.tuples(st.one_of(singles(I64, I64), singles(integers(37), integers(37))), NONE, NONE),
    Op.SUM: st.tuples(pairs(64, 1).map(lambda two: two[:1]), NONE, NONE),
    Op.WSUM: st.tuples(pairs(64, 51), NONE, NONE),
    Op.DIV: st.tuples(st.one_of(singles(I128, I64), singles(integers(70), integers(30))), NONE, NONE),
    Op.GATED: st.tuples(st.one_of(singles(I64, I64), singles(integers(36), integers(36))), NONE, NONE),
    Op.VERDICT: st.tuples(st.builds(verdict, SEED, CELL, st.booleans()), U64, NONE),
    Op.LOGIT: st.tuples(pairs(64, 41), NONE, NONE),
    Op.COMPARE: st.tuples(st.tuples(I64, I64, CELL).map(lambda v: [[v[0], v[1]], v[2]]), NONE, NONE),
    Op.SAME: with_dtype(lambda d: st.builds(blocks, SEED, st.just(d))),
    Op.RANK: st.tuples(st.builds(lambda s: sampled(s, "logits judged cell draw"), SEED), NONE, NONE),
    Op.MASS: st.tuples(st.builds(lambda s: sampled(s, "logits judged largest cell draw"), SEED), NONE, NONE),
    Op.STANDING: st.tuples(st.builds(lambda s: sampled(s, "rank mass draw"), SEED), NONE, NONE),
    Op.CHOICE: st.tuples(st.builds(lambda s: sampled(s, "judged other standing cell draw"), SEED), NONE, NONE),
}


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_run(op: Op, referee: Contract) -> None:
    @FUZZ
    @given(st.lists(CASES[op], min_size=_BATCH, max_size=_BATCH))
    def check(cases: list[Case]) -> None:
        expected = [twin(run, op, *case) for case in cases]
        assert referee.calls("run", [(op, *case) for case in cases]) == expected

    check()


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.integers(0, 255),
            st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5),
            st.integers(0, 40),
            st.integers(0, 2),
        ),
        min_size=_BATCH,
        max_size=_BATCH,
    ).map(lambda cases: [(op % 25, *rest) for op, *rest in cases])
)
def test_run_of_any_shape_refuses_alike(referee: Contract, cases: list[tuple[int, list[list[int]], int, int]]) -> None:
    assert referee.calls("run", cases) == [twin(run, *case) for case in cases]


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(list(Op)), integers(256), SHIFT), min_size=_BATCH, max_size=_BATCH))
def test_finish(referee: Contract, cases: list[tuple[Op, int, int]]) -> None:
    assert referee.calls("finish", cases) == [finish(*case) for case in cases]


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(list(Op)), I128, I128), min_size=_BATCH, max_size=_BATCH))
def test_combine(harness: Contract, cases: list[tuple[Op, int, int]]) -> None:
    assert harness.calls("combine", [(op, [[x, y]]) for op, x, y in cases]) == [
        combine(op, (x, y)) for op, x, y in cases
    ]


# ---- fixed


@FUZZ
@given(st.lists(st.tuples(integers(256), SHIFT), min_size=_BATCH, max_size=_BATCH))
def test_rs(harness: Contract, cases: list[tuple[int, int]]) -> None:
    assert harness.calls("rs", cases) == [fixed.rs(*case) for case in cases]


@pytest.mark.parametrize(("name", "bits_"), [("cl", 256), ("exp2", 65), ("silu", 64)])
def test_functions_of_one_value(name: str, bits_: int, harness: Contract) -> None:
    @FUZZ
    @given(st.lists(st.one_of(integers(bits_), integers(37)), min_size=_BATCH, max_size=_BATCH))
    def check(values: list[int]) -> None:
        assert harness.calls(name, [(v,) for v in values]) == [getattr(fixed, name)(v) for v in values]

    check()


BITS = st.one_of(U64, st.integers(0, 1 << 20), st.integers(0, 1 << 20).map(lambda x: (1 << 64) - 1 - x))


@FUZZ
@given(st.lists(BITS, min_size=_BATCH, max_size=_BATCH))
def test_noise(harness: Contract, words: list[int]) -> None:
    for name in ("gumbel", "mix"):
        answers = harness.calls(name, [(word,) for word in words])
        assert answers == [getattr(sampling, name)(word) for word in words]
    assert fast.gumbel(np.array(words, dtype=np.uint64)).tolist() == [sampling.gumbel(word) for word in words]


WHOLE = st.integers(0, (1 << 256) - 1)
SQUARE = st.builds(lambda root, off: max(0, root * root + off), st.integers(0, (1 << 128) - 1), st.integers(-1, 1))


@FUZZ
@given(st.lists(st.one_of(WHOLE, SQUARE, st.integers(0, 9)), min_size=_BATCH, max_size=_BATCH))
def test_isqrt(harness: Contract, values: list[int]) -> None:
    assert harness.calls("isqrt", [(v,) for v in values]) == [fixed.isqrt(v) for v in values]


@FUZZ
@given(st.lists(st.tuples(st.integers(0, (1 << 32) - 1), U64), min_size=_BATCH, max_size=_BATCH))
def test_sincos(harness: Contract, cases: list[tuple[int, int]]) -> None:
    assert harness.calls("sincos", cases) == [fixed.sincos(*case) for case in cases]


# ---- floats


@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize(("limit", "fraction"), [(20, 30), (8, 24)], ids=["served", "weight"])
def test_decode_of_all_16_bit_floats(dtype: int, limit: int, fraction: int, harness: Contract) -> None:
    for start in range(0, 1 << 16, 1 << 12):
        every = list(range(start, start + (1 << 12)))
        expected = [floats.decode(v, floats.Dtype(dtype), fraction, limit) for v in every]
        assert list(harness.call("decode", every, dtype, fraction, limit)) == expected


@FUZZ
@given(st.lists(bits(2), min_size=200, max_size=200), st.sampled_from(((20, 30), (8, 32))))
def test_decode_of_float32(harness: Contract, values: list[int], kind: tuple[int, int]) -> None:
    limit, fraction = kind
    expected = [floats.decode(v, floats.Dtype.FLOAT32, fraction, limit) for v in values]
    assert list(harness.call("decode", values, 2, fraction, limit)) == expected


@pytest.mark.parametrize("dtype", list(floats.Dtype), ids=lambda d: d.name)
def test_add(dtype: floats.Dtype, harness: Contract) -> None:
    @FUZZ
    @given(st.lists(st.tuples(bits(dtype), bits(dtype)), min_size=100, max_size=100))
    def check(cases: list[tuple[int, int]]) -> None:
        x, y = ([case[i] for case in cases] for i in (0, 1))
        assert list(harness.call("add", dtype, x, y)) == [floats.add(dtype, *case) for case in cases]

    check()


@FUZZ
@given(st.binary(min_size=1200, max_size=1200), DTYPE, st.integers(0, 40), st.integers(0, 256))
def test_raw_bits(harness: Contract, data: bytes, dtype: int, first: int, count: int) -> None:
    size = floats.Dtype(dtype).size
    expected = [int.from_bytes(data[i * size : (i + 1) * size], "little") for i in range(first, first + count)]
    assert list(harness.call("rawBits", data, first, count, dtype)) == expected


# ---- tree


@FUZZ
@given(
    st.lists(
        st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 12), st.integers(-2, 2), SEED),
        min_size=_BATCH,
        max_size=_BATCH,
    )
)
def test_root_of_range(harness: Contract, cases: list[tuple[int, int, int, int, int]]) -> None:
    calls = []
    for count, first, length, change, seed in cases:
        source = random.Random(seed)
        hashes = [source.randbytes(32) for _ in range(length)]
        # As many siblings as an honest proof has, give or take `change`.
        try:
            needed = len(tree.Tree([bytes(32)] * count).prove(first, length))
        except RefereeError:
            needed = 3
        siblings = [source.randbytes(32) for _ in range(max(0, needed + (change if source.random() < 0.3 else 0)))]
        calls.append((hashes, first, count, siblings))
    assert harness.calls("rootOfRange", calls) == [twin(tree.root_of_range, *call) for call in calls]


@FUZZ
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=40))
def test_fold(harness: Contract, hashes: list[bytes]) -> None:
    assert harness.call("fold", hashes) == twin(tree.fold, hashes)


@FUZZ
@given(st.lists(st.tuples(st.integers(1, (1 << 40) - 1), st.integers(0, 41)), min_size=_BATCH, max_size=_BATCH))
def test_counts_of_levels(harness: Contract, cases: list[tuple[int, int]]) -> None:
    assert harness.calls("nodes", cases) == [tree.nodes_at(*case) for case in cases]
    assert harness.calls("depth", [case[:1] for case in cases]) == [tree.depth(case[0]) for case in cases]


@FUZZ
@given(st.binary(max_size=1500), st.integers(1, 600))
def test_leaves(harness: Contract, data: bytes, size: int) -> None:
    assert list(harness.call("leaves", data, size)) == [tree.leaf(part) for part in codec.slices(data, size)]
    assert harness.call("leaf", data) == tree.leaf(data)


# ---- codec


@pytest.mark.parametrize("dtype", list(floats.Dtype))
def test_every_kind_of_element_decodes_alike_whatever_its_neighbours(harness: Contract, dtype: floats.Dtype) -> None:
    # All patterns of 16 bits: the EVM decodes sixteen at once, so each meets odd and plain neighbours, at every place.
    random.seed(dtype)
    patterns = list(range(1 << 16)) if dtype.size == 2 else [random.getrandbits(32) for _ in range(1 << 12)]
    plain = [0x3C00 + i % 64 for i in range(1 << 12)]  # magnitudes near 1: no truncation, nothing invalid
    random.shuffle(patterns)
    for bits in (plain, patterns):
        for first in range(0, len(bits), 4096):
            part = bits[first : first + 4096]
            data = b"".join(value.to_bytes(dtype.size, "little") for value in part)
            at, count = random.randrange(20), len(part) - random.randrange(20, 40)
            seen = part[at : at + count]
            values = [floats.decode_served(value, dtype) for value in seen]
            assert list(harness.call("served", data, at, count, dtype, floats.INVALID)) == values
            assert list(harness.call("served", data, at, count, dtype, 0)) == [floats.valid(v) for v in values]
            held = [floats.valid(floats.decode_weight(value, dtype)) for value in seen]
            assert list(harness.call("weights", data, at, count, dtype)) == held


@FUZZ
@given(st.lists(I64, max_size=70), st.lists(I128, max_size=40))
def test_vectors(harness: Contract, narrow: list[int], broad: list[int]) -> None:
    for values, wide in ((narrow, False), (broad, True)):
        data = codec.encode_vector(values, wide)
        assert b"".join(harness.calls("encodeValue", [(v, wide) for v in values])) == data
        for first in {0, len(values) // 2, max(0, len(values) - 1)}:
            answer = harness.call("decodeValues", data, first, len(values) - first, wide)
            assert list(answer) == values[first:]


OPERAND = st.builds(codec.Operand, st.integers(0, 255), st.integers(0, 255), U64, U64, U32, U32)
INSTRUCTION = st.builds(
    codec.Instruction,
    st.integers(0, 255),
    st.integers(0, 255),
    *(st.one_of(st.integers(0, 600), U32) for _ in range(3)),
    st.one_of(st.integers(0, 20000), U32, st.just(codec.ALL_POSITIONS)),
    U64,
    U32,
    OPERAND,
    OPERAND,
    OPERAND,
)


def fields(instruction: codec.Instruction) -> tuple[Any, ...]:
    """An instruction as the EVM returns it."""
    i = instruction
    operands = ((o.source, o.id, o.base, o.layer_stride, o.unit_stride, o.width) for o in (i.x, i.y, i.z))
    return (i.op, i.wide, i.rows, i.cols, i.limit, i.terms, i.a, i.b, *operands)


@FUZZ
@given(
    st.lists(
        st.tuples(INSTRUCTION, st.one_of(st.integers(0, 70000), U32), st.one_of(st.integers(0, 9), U32)),
        min_size=_BATCH,
        max_size=_BATCH,
    )
)
def test_instructions_and_their_counts(harness: Contract, cases: list[tuple[codec.Instruction, int, int]]) -> None:
    read = harness.calls("instruction", [(i.encode(),) for i, _, _ in cases])
    assert read == [fields(i) for i, _, _ in cases]
    counts = harness.calls("counts", [(i.encode(), t, u) for i, t, u in cases])
    expected = [(judge.element_count(i, t, u), judge.chunk_count(i, t)) for i, t, u in cases]
    assert [count[:2] for count in counts] == expected


@FUZZ
@given(U32, U32, U32, st.integers(0, 200))
def test_headers_and_wrong_lengths(harness: Contract, first: int, steps: int, units: int, length: int) -> None:
    assert harness.call("header", codec.SegmentHeader(first, steps, units).encode()) == (first, steps, units)
    for name, size in (("header", 16), ("instruction", 128)):
        if length != size:
            assert harness.call(name, bytes(length)) == Refusal("DataLength")
