"""What the two compiled SHA-256 programs share: the constants, memory as bytes, the signature."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from verifier.native import elements


def _primes(n: int) -> list[int]:
    return [p for p in range(2, 400) if all(p % q for q in range(2, p))][:n]


def _root_fraction(prime: int, power: int) -> int:
    """The first 32 bits of the fraction of prime^(1/power), which is how FIPS 180-4 defines its constants."""
    target, low, high = prime << (32 * power), 0, 1 << 37
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= target else (low, middle)
    return low & 0xFFFFFFFF


ROUND_CONSTANTS = tuple(_root_fraction(p, 3) for p in _primes(64))
INITIAL_STATE = np.array([_root_fraction(p, 2) for p in _primes(8)], dtype=np.uint32)


def data_pointer(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    return builder.bitcast(elements(context, builder, array_type, value), ir.IntType(8).as_pointer())


@intrinsic
def copy_bytes(typing: Any, target: Any, target_first: Any, source: Any, source_first: Any, length: Any) -> Any:
    """memcpy of `length` bytes between byte arrays; the caller has checked the bounds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        origin = builder.gep(data_pointer(context, builder, signature.args[2], args[2]), [args[3]])
        cgutils.raw_memcpy(builder, to, origin, args[4], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


BYTES = types.Array(types.uint8, 1, "C", readonly=True)
SIGNATURE = types.void(
    BYTES, types.intp, types.intp, types.intp, types.intp, types.uint8, types.uint32[::1], types.intp, types.intp
)
