"""SHA-256 of two equally long messages at once, by an x86 processor's own SHA instructions.

Each instruction waits four cycles for the one before it and another may begin every two: two messages, their rounds
interleaved, keep the unit busy. Leaves of 512 bytes on one core: 2.2 GB/s where verifier.sha256_lanes has AVX2 and
comes to 0.85, 1.5 GB/s where that has AVX-512 and comes to 2.8. `AVAILABLE` says whether what numba compiles for here
has them, `FASTEST` whether they are what to hash with. Importing this module imports numba; compiled once for a machine
and cached beside this file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from verifier import sha256_program
from verifier.native import compiled
from verifier.sha256_program import INITIAL_STATE, ROUND_CONSTANTS, SIGNATURE, copy_bytes, data_pointer

MESSAGES = 2

_WORD = ir.IntType(32)
_QUAD = ir.VectorType(_WORD, 4)

# Where word i of A .. H stands in the registers that the instructions want: F E B A, H G D C, lowest lane first.
PLACES = np.array([3, 2, 7, 6, 1, 0, 5, 4])


def _features() -> set[str]:
    """What numba compiles for: the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise."""
    settings: Any = config
    if settings.CPU_NAME == "generic" or not binding.get_default_triple().startswith("x86_64"):
        return set()
    if settings.CPU_FEATURES is not None:
        return {each[1:] for each in settings.CPU_FEATURES.split(",") if each.startswith("+")}
    return {name for name, present in binding.get_host_cpu_features().items() if present}


AVAILABLE = _features() >= {"sha", "sse4.1"}
FASTEST = AVAILABLE and "avx512f" not in _features()


def _shuffled(builder: Any, low: Any, high: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_WORD, 4), lanes))


def _rounds(builder: Any, call: Callable[..., Any], states: list[list[Any]], words: list[list[Any]]) -> None:
    """The 64 rounds on one block of each message; states: [F E B A, H G D C] each, words: the block's 16 in fours."""
    for i in range(16):
        constants = ir.Constant(_QUAD, list(ROUND_CONSTANTS[4 * i : 4 * i + 4]))
        for state, w in zip(states, words, strict=True):
            if i >= 4:
                a, b, c, d = (w[(i + k) % 4] for k in range(4))
                between = _shuffled(builder, c, d, [1, 2, 3, 4])  # words i - 7
                w[i % 4] = call("sha256msg2", builder.add(call("sha256msg1", a, b), between), d)
            keyed = builder.add(w[i % 4], constants)
            state[1] = call("sha256rnds2", state[1], state[0], keyed)
            state[0] = call("sha256rnds2", state[0], state[1], _shuffled(builder, keyed, keyed, [2, 3, 0, 0]))


@intrinsic
def _compress(typing: Any, state: Any, messages: Any, first: Any, stride: Any, blocks: Any) -> Any:
    """Feeds `blocks` blocks of each message into state u32 [MESSAGES * 8], in the order of PLACES; message i begins at
    byte first + i * stride.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def call(name: str, *values: Any) -> Any:
            kind = ir.FunctionType(_QUAD, [_QUAD] * len(values))
            full = f"llvm.x86.{name}"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), values)  # type: ignore[no-untyped-call]

        swap = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(_QUAD, [_QUAD]), "llvm.bswap.v4i32"
        )
        kept = builder.bitcast(data_pointer(context, builder, signature.args[0], args[0]), _QUAD.as_pointer())
        source = data_pointer(context, builder, signature.args[1], args[1])
        size = args[2].type
        if "avx" in _features():
            # The SHA instructions know nothing of the upper halves of vector registers. As long as one of those is in
            # use, an Intel processor saves them at every change between such an instruction and one of AVX: here four
            # times a round, which made this program 250 times as slow.
            clear = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, clear, "llvm.x86.avx.vzeroupper"), [])  # type: ignore[no-untyped-call]
        places = [[builder.gep(kept, [ir.Constant(size, 2 * m + i)]) for i in (0, 1)] for m in range(MESSAGES)]
        with cgutils.for_range(builder, args[4]) as loop:
            at = builder.add(args[2], builder.mul(loop.index, ir.Constant(size, 64)))
            words = []
            for m in range(MESSAGES):
                block = builder.gep(source, [builder.add(at, builder.mul(args[3], ir.Constant(size, m)))])
                quads = builder.bitcast(block, _QUAD.as_pointer())
                words.append(
                    [
                        builder.call(swap, [builder.load(builder.gep(quads, [ir.Constant(size, i)]), align=1)])
                        for i in range(4)
                    ]
                )
            before = [[builder.load(place, align=4) for place in pair] for pair in places]
            after = [list(pair) for pair in before]
            _rounds(builder, call, after, words)
            for pair, old, new in zip(places, before, after, strict=True):
                for place, was, now in zip(pair, old, new, strict=True):
                    builder.store(builder.add(was, now), place, align=4)
        return context.get_dummy_value()

    return types.void(state, messages, types.intp, types.intp, types.intp), generate


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
    """As that of verifier.sha256_lanes. SAFETY: no bounds are checked here, verifier.sha256 has done so."""
    blocks = (length + 1 + 9 + 63) // 64
    span = blocks * 64
    scratch = np.zeros(MESSAGES * span, dtype=np.uint8)
    bits = (length + 1) * 8
    for m in range(MESSAGES):
        scratch[m * span] = prefix
        scratch[m * span + 1 + length] = 0x80
        for i in range(8):
            scratch[m * span + span - 1 - i] = (bits >> (8 * i)) & 0xFF
    state = np.empty(8 * MESSAGES, dtype=np.uint32)
    done = 0
    while done < count:
        taken = min(MESSAGES, count - done)  # an idle one hashes what was there before
        for m in range(taken):
            copy_bytes(scratch, m * span + 1, source, first + (done + m) * stride, length)  # type: ignore[call-arg]
        for m in range(MESSAGES):
            for i in range(8):
                state[8 * m + PLACES[i]] = INITIAL_STATE[i]
        _compress(state, scratch, 0, span, blocks)  # type: ignore[call-arg]
        for m in range(taken):
            place = (out_first + (done + m) * out_stride) * 8
            for i in range(8):
                word = state[8 * m + PLACES[i]]
                swapped = (word >> 24) | ((word >> 8) & 0xFF00) | ((word << 8) & 0xFF0000) | (word << 24)
                out[place + i] = np.uint32(swapped & 0xFFFFFFFF)
        done += taken


if AVAILABLE:
    hash_strided = compiled(SIGNATURE, _hash_strided, "sha256_pairs", [__file__, sha256_program.__file__])
