"""Loops over float32 in LLVM's generic <16 x float>, which becomes AVX-512, AVX2 or NEON, for programs that numba
compiles: what attention of single rows is made of. SAFETY: nothing here checks bounds.

Arguments `size`, `queries` and `half` are constants of the program; `size` is a multiple of LANES. Keys and values are
float32, bfloat16 or, if `half`, float16, the latter two as int16; all finite.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from verifier.native import elements

LANES = 16

_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)

# exp(r) = 1 + r + r^2 p(r) for |r| <= ln 2 / 2: Cephes, expf.c.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_ROUNDING = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the lowest bits
_LEAST = -87.0  # below, exp is 0 here: it is added to the largest, which is 1


class _Code:
    """Instructions over vectors of float32."""

    def __init__(self, builder: Any, half: bool) -> None:
        self.builder, self.half = builder, half

    def constant(self, value: float) -> Any:
        return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)

    def words(self, value: int) -> Any:
        return ir.Constant(_WORDS, [value] * LANES)

    def splat(self, value: Any) -> Any:
        """A float, or a word, in every lane."""
        one = self.builder.insert_element(ir.VectorType(value.type, LANES)(ir.Undefined), value, _WORD(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))

    def call(self, name: str, *values: Any, result: Any = _FLOATS) -> Any:
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)  # type: ignore[no-untyped-call]

    def add_product(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("llvm.fmuladd.v16f32", a, b, c)

    def at(self, data: Any, index: Any) -> Any:
        return self.builder.gep(data, [index])

    def load(self, pointer: Any) -> Any:
        """LANES floats from where their bits lie, be they of 32 or 16; finite ones."""
        b = self.builder
        if pointer.type.pointee == _FLOAT:
            return b.load(b.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        bits = b.load(b.bitcast(pointer, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
        if not self.half:
            return b.bitcast(b.shl(b.zext(bits, _WORDS), self.words(16)), _FLOATS)
        # The exponent's bias of 15 becomes 127 by a product, which makes subnormals right as well.
        wide = b.sext(bits, _WORDS)
        magnitude = b.bitcast(b.shl(b.and_(wide, self.words(0x7FFF)), self.words(13)), _FLOATS)
        sign = b.and_(wide, self.words(0x80000000))
        return b.bitcast(b.or_(b.bitcast(b.fmul(magnitude, self.constant(2.0**112)), _WORDS), sign), _FLOATS)

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)

    def exp(self, x: Any) -> Any:
        b = self.builder
        shifted = self.add_product(x, self.constant(_LOG2E), self.constant(_ROUNDING))
        n = b.fsub(shifted, self.constant(_ROUNDING))
        r = self.add_product(n, self.constant(-_LN2_LOW), self.add_product(n, self.constant(-_LN2_HIGH), x))
        p = self.constant(_EXP[0])
        for coefficient in _EXP[1:]:
            p = self.add_product(p, r, self.constant(coefficient))
        p = b.fadd(self.add_product(b.fmul(r, r), p, r), self.constant(1))
        power = b.shl(b.bitcast(shifted, _WORDS), self.words(23))
        return b.bitcast(b.add(b.bitcast(p, _WORDS), power), _FLOATS)


@intrinsic(prefer_literal=True)
def score(
    typing: Any,
    query: Any,
    at: Any,
    keys: Any,
    place: Any,
    stride: Any,
    left: Any,
    scale: Any,
    scores: Any,
    to: Any,
    room: Any,
    size: Any,
    queries: Any,
    half: Any,
) -> Any:
    """scores[to + q * room :][:LANES] = scale * query[at + q * size :] . keys[place + j * stride :], for each q; -inf
    for positions from `left` on.
    """
    chunks, count, is_half = size.literal_value // LANES, queries.literal_value, half.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder, is_half)
        asked, held, found = (elements(context, builder, signature.args[i], args[i]) for i in (0, 2, 7))
        vectors = [
            [code.load(code.at(asked, builder.add(args[1], _INT(LANES * (q * chunks + c))))) for c in range(chunks)]
            for q in range(count)
        ]

        def products(j: int) -> list[Any]:
            """Of position j with each query, LANES partial sums."""
            row = builder.add(args[3], builder.mul(args[4], _INT(j)))
            sums: list[Any] = [None] * count
            for c in range(chunks):
                key = code.load(code.at(held, builder.add(row, _INT(LANES * c))))
                for q in range(count):
                    sums[q] = (
                        builder.fmul(key, vectors[q][c]) if c == 0 else code.add_product(key, vectors[q][c], sums[q])
                    )
            return sums

        even, odd = (ir.Constant(_WORDS, list(range(first, 2 * LANES, 2))) for first in (0, 1))

        def summed(first: int, n: int) -> list[Any]:
            """Lanes of positions first .. first + n - 1, in order, LANES / n partial sums of each."""
            if n == 1:
                return products(first)
            pairs = zip(summed(first, n // 2), summed(first + n // 2, n // 2), strict=True)
            return [
                builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
            ]

        lanes = ir.Constant(_WORDS, list(range(LANES)))
        seen = builder.icmp_signed("<", lanes, code.splat(builder.trunc(args[5], _WORD)))
        scaling = code.splat(args[6])
        for q, sums in enumerate(summed(0, LANES)):
            product = builder.select(seen, builder.fmul(sums, scaling), code.constant(-np.inf))
            code.store(product, code.at(found, builder.add(args[8], builder.mul(args[9], _INT(q)))))
        return context.get_dummy_value()

    floats, whole = types.float32, types.intp
    return types.void(
        query, whole, keys, whole, whole, whole, floats, scores, whole, whole, size, queries, half
    ), generate


@intrinsic
def weigh(typing: Any, scores: Any, at: Any, count: Any) -> Any:
    """scores[at :][:count], whole vectors of them, become their softmax."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder, False)
        held = code.at(elements(context, builder, signature.args[0], args[0]), args[1])
        vectors = builder.sdiv(args[2], _INT(LANES))

        def each(start: float, step: Callable[[Any, Any], Any]) -> Any:
            """Folds the vectors."""
            total = cgutils.alloca_once_value(builder, code.constant(start))  # type: ignore[no-untyped-call]
            with cgutils.for_range(builder, vectors) as loop:
                pointer = code.at(held, builder.mul(loop.index, _INT(LANES)))
                builder.store(step(builder.load(total), pointer), total)
            return builder.load(total)

        most = each(-np.inf, lambda found, pointer: code.call("llvm.maxnum.v16f32", found, code.load(pointer)))
        most = code.splat(code.call("llvm.vector.reduce.fmax.v16f32", most, result=_FLOAT))

        def exponential(total: Any, pointer: Any) -> Any:
            below = builder.fsub(code.load(pointer), most)
            small = builder.fcmp_ordered("<", below, code.constant(_LEAST))
            power = builder.select(small, code.constant(0), code.exp(builder.select(small, code.constant(0), below)))
            code.store(power, pointer)
            return builder.fadd(total, power)

        total = code.call("llvm.vector.reduce.fadd.v16f32", _FLOAT(0.0), each(0, exponential), result=_FLOAT)
        share = code.splat(builder.fdiv(_FLOAT(1.0), total))

        def divided(found: Any, pointer: Any) -> Any:
            code.store(builder.fmul(code.load(pointer), share), pointer)
            return found

        each(0, divided)
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def add_up(
    typing: Any,
    out: Any,
    at: Any,
    values: Any,
    place: Any,
    stride: Any,
    scores: Any,
    of: Any,
    room: Any,
    size: Any,
    queries: Any,
    half: Any,
) -> Any:
    """out[at + q * size :][:size] += the sum over j of scores[of + q * room + j] * values[place + j * stride :]."""
    chunks, count, is_half = size.literal_value // LANES, queries.literal_value, half.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder, is_half)
        given, held, weights = (elements(context, builder, signature.args[i], args[i]) for i in (0, 2, 5))
        places = [code.at(given, builder.add(args[1], _INT(LANES * i))) for i in range(count * chunks)]
        sums = [code.load(place) for place in places]
        for j in range(LANES):
            row = builder.add(args[3], builder.mul(args[4], _INT(j)))
            share = [
                code.splat(
                    builder.load(
                        code.at(weights, builder.add(args[6], builder.add(_INT(j), builder.mul(args[7], _INT(q)))))
                    )
                )
                for q in range(count)
            ]
            for c in range(chunks):
                value = code.load(code.at(held, builder.add(row, _INT(LANES * c))))
                for q in range(count):
                    sums[q * chunks + c] = code.add_product(value, share[q], sums[q * chunks + c])
        for place, value in zip(places, sums, strict=True):
            code.store(value, place)
        return context.get_dummy_value()

    whole = types.intp
    return types.void(out, whole, values, whole, whole, scores, whole, whole, size, queries, half), generate
