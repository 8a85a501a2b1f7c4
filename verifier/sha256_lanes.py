"""SHA-256 of sixteen equally long messages at once, as one vector program.

A single SHA-256 is a chain of dependent additions; sixteen of them fill a vector unit. The program is written in LLVM's
generic <16 x i32> vectors, so the same text becomes AVX-512, AVX2 or NEON, whatever the host has, and needs no
instruction that a host may lack. Importing this module imports numba: verifier.sha256 does so on first use. Compiled
once for a machine (5 s) and cached beside this file.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from verifier import sha256_program
from verifier.native import compiled
from verifier.sha256_program import INITIAL_STATE, ROUND_CONSTANTS, SIGNATURE, copy_bytes, data_pointer

LANES = 16

_WORD = ir.IntType(32)
_VECTOR = ir.VectorType(_WORD, LANES)


def _load_transposed(builder: Any, messages: Any, stride: Any) -> list[Any]:
    """Word i of all sixteen 64-byte blocks as vector i: a 16 x 16 transposition in four stages of shuffles."""
    rows = []
    for lane in range(LANES):
        block = builder.gep(messages, [builder.mul(stride, ir.Constant(stride.type, lane))])
        rows.append(builder.load(builder.bitcast(block, _VECTOR.as_pointer()), align=1))
    # Each stage interleaves row i with row i + 8, which moves one bit of the lane number into the column number.
    low = ir.Constant(ir.VectorType(_WORD, LANES), [i // 2 + LANES * (i % 2) for i in range(LANES)])
    high = ir.Constant(ir.VectorType(_WORD, LANES), [i // 2 + LANES * (i % 2) + LANES // 2 for i in range(LANES)])
    for _ in range(4):
        stage = []
        for i in range(LANES // 2):
            stage.append(builder.shuffle_vector(rows[i], rows[i + LANES // 2], low))
            stage.append(builder.shuffle_vector(rows[i], rows[i + LANES // 2], high))
        rows = stage
    kind = ir.FunctionType(_VECTOR, [_VECTOR])
    swap = cgutils.get_or_insert_function(builder.module, kind, "llvm.bswap.v16i32")  # type: ignore[no-untyped-call]
    return [builder.call(swap, [row]) for row in rows]


def _splat(value: int) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _rotate(builder: Any, x: Any, bits: int) -> Any:
    return builder.or_(builder.lshr(x, _splat(bits)), builder.shl(x, _splat(32 - bits)))


def _rounds(builder: Any, words: list[Any], state: list[Any]) -> list[Any]:
    """The 64 rounds of FIPS 180-4, section 6.2.2, on sixteen blocks."""
    add, xor = builder.add, builder.xor
    a, b, c, d, e, f, g, h = state
    words = list(words)
    for i in range(64):
        if i >= 16:
            w2, w15 = words[(i - 2) % 16], words[(i - 15) % 16]
            s0 = xor(xor(_rotate(builder, w15, 7), _rotate(builder, w15, 18)), builder.lshr(w15, _splat(3)))
            s1 = xor(xor(_rotate(builder, w2, 17), _rotate(builder, w2, 19)), builder.lshr(w2, _splat(10)))
            words[i % 16] = add(add(words[i % 16], s0), add(words[(i - 7) % 16], s1))
        sum1 = xor(xor(_rotate(builder, e, 6), _rotate(builder, e, 11)), _rotate(builder, e, 25))
        choice = xor(g, builder.and_(e, xor(f, g)))
        first = add(add(add(h, _splat(ROUND_CONSTANTS[i])), words[i % 16]), add(sum1, choice))
        sum0 = xor(xor(_rotate(builder, a, 2), _rotate(builder, a, 13)), _rotate(builder, a, 22))
        majority = builder.or_(builder.and_(a, b), builder.and_(c, builder.or_(a, b)))
        h, g, f, e, d, c, b, a = g, f, e, add(d, first), c, b, a, add(first, add(sum0, majority))
    return [a, b, c, d, e, f, g, h]


@intrinsic
def _compress(typing: Any, state: Any, messages: Any, first: Any, stride: Any) -> Any:
    """Feeds one block a lane into state u32 [8 * 16]; lane i's block starts at byte first + i * stride of messages."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        state_bytes = data_pointer(context, builder, signature.args[0], args[0])
        vectors = builder.bitcast(state_bytes, _VECTOR.as_pointer())
        places = [builder.gep(vectors, [ir.Constant(ir.IntType(64), i)]) for i in range(8)]
        before = [builder.load(place, align=4) for place in places]
        blocks = builder.gep(data_pointer(context, builder, signature.args[1], args[1]), [args[2]])
        after = _rounds(builder, _load_transposed(builder, blocks, args[3]), before)
        for place, old, new in zip(places, before, after, strict=True):
            builder.store(builder.add(old, new), place, align=4)
        return context.get_dummy_value()

    return types.void(state, messages, types.intp, types.intp), generate


def _hash_strided(
    source: Any,
    first: int,
    stride: int,
    count: int,
    length: int,
    prefix: int,
    out: Any,
    out_first: int,
    out_stride: int,
) -> None:
    """SHA-256 of prefix | source[first + i*stride :][:length], for i < count.

    Into the 8 words, in memory's order, of hash out_first + i*out_stride. SAFETY: no bounds are checked here,
    verifier.sha256 has done so.
    """
    blocks = (length + 1 + 9 + 63) // 64  # one prefix byte, 0x80 and the length in bits
    span = blocks * 64
    scratch = np.zeros(LANES * span, dtype=np.uint8)
    bits = (length + 1) * 8
    for lane in range(LANES):
        scratch[lane * span] = prefix
        scratch[lane * span + 1 + length] = 0x80
        for i in range(8):
            scratch[lane * span + span - 1 - i] = (bits >> (8 * i)) & 0xFF
    state = np.empty(8 * LANES, dtype=np.uint32)
    done = 0
    while done < count:
        lanes = min(LANES, count - done)  # idle lanes hash what an earlier group left there
        for lane in range(lanes):
            copy_bytes(scratch, lane * span + 1, source, first + (done + lane) * stride, length)  # type: ignore[call-arg]
        for i in range(8 * LANES):
            state[i] = INITIAL_STATE[i // LANES]
        for block in range(blocks):
            _compress(state, scratch, block * 64, span)  # type: ignore[call-arg]
        for lane in range(lanes):
            place = (out_first + (done + lane) * out_stride) * 8
            for i in range(8):
                word = state[i * LANES + lane]
                swapped = (word >> 24) | ((word >> 8) & 0xFF00) | ((word << 8) & 0xFF0000) | (word << 24)
                out[place + i] = np.uint32(swapped & 0xFFFFFFFF)
        done += lanes


hash_strided = compiled(SIGNATURE, _hash_strided, "sha256_lanes", [__file__, sha256_program.__file__])
