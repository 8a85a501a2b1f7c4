"""Every op over whole vectors, bit-equal to verifier.referee.ops element by element (docs/canonical.md, "Ops").

Arrays are int64 wherever the law's bounds fit and Python integers (dtype object) where they do not: widths of a hidden
state cost milliseconds that way; only products over matrices take the float64 road of verifier.linear.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verifier.linear import FLOATS, Bits, Ints, Part, digits, float_tensor, matmul, rounded, totals
from verifier.referee.fixed import EXP2, LOG2E, SATURATION
from verifier.referee.floats import (
    INVALID,
    SERVED_FRACTION_BITS,
    SERVED_LIMIT_BITS,
    WEIGHT_LIMIT_BITS,
    Dtype,
)

Wide = npt.NDArray[Any]  # Python integers
_SCALE_BITS = 41  # a score's scale is at most log2(e) in Q40


def decode(bits: Bits, dtype: Dtype, fraction_bits: int, limit_bits: int) -> Ints:
    """Raw bits to integers x 2^fraction_bits, truncated toward zero; INVALID for NaN, Inf and |v| >= 2^limit_bits."""
    raw = bits.astype(np.int64)
    exponent = (raw & dtype.infinity) >> dtype.mantissa_bits
    significand = (raw & ((1 << dtype.mantissa_bits) - 1)) | ((exponent > 0).astype(np.int64) << dtype.mantissa_bits)
    power = np.maximum(exponent, 1) - dtype.bias - dtype.mantissa_bits
    length = np.frexp(significand.astype(np.float64))[1]  # bit length: a significand is exact in float64
    invalid = (raw & dtype.infinity == dtype.infinity) | (length + power > limit_bits)
    shift = power + fraction_bits
    # A valid value shifts by at most limit + fraction <= 50: the clips only tame results that are 0 or not used.
    magnitude = np.where(shift >= 0, significand << np.clip(shift, 0, 50), significand >> np.clip(-shift, 0, 62))
    return np.where(invalid, INVALID, np.where(raw & dtype.sign, -magnitude, magnitude))


def checked_served(bits: Bits, dtype: Dtype) -> Ints:
    """Served values in Q30, invalid ones as INVALID: what VERDICT sees."""
    return decode(bits, dtype, SERVED_FRACTION_BITS, SERVED_LIMIT_BITS)


def served(bits: Bits, dtype: Dtype) -> Ints:
    """Served values in Q30, invalid ones as 0."""
    return valid(checked_served(bits, dtype))


def weights(bits: Bits, dtype: Dtype) -> Ints:
    """Weights in QG, invalid ones as 0."""
    return valid(decode(bits, dtype, dtype.weight_fraction_bits, WEIGHT_LIMIT_BITS))


def valid(values: Ints) -> Ints:
    """INVALID counts as 0."""
    return np.where(values == INVALID, 0, values)


def add_bits(dtype: Dtype, x: Bits, y: Bits) -> Bits:
    """Raw bits of x + y as hardware adds: in float32, then rounded to dtype (docs/canonical.md, "Adding floats")."""
    # torch adds halves as the law does, or at once: float32 has room enough (2 p + 2 bits) that both round alike.
    bits = _rounded_bits(float_tensor(x, dtype) + float_tensor(y, dtype), dtype)
    if not bits.size or int((bits & bits.dtype.type(dtype.sign - 1)).max()) < dtype.infinity:  # so are x and y
        return bits
    not_finite = (x & dtype.infinity == dtype.infinity) | (y & dtype.infinity == dtype.infinity)
    return np.where(not_finite, bits.dtype.type(dtype.nan), bits)


def _rounded_bits(values: torch.Tensor, dtype: Dtype) -> Bits:
    """Values of dtype, or float32 ones rounded to it, ties to even; any bits for a NaN."""
    if dtype is Dtype.FLOAT32:
        return values.view(torch.int32).numpy().view(np.uint32)
    rounded: Bits = values.to(FLOATS[dtype]).view(torch.int16).numpy().view(np.uint16)
    return rounded


def to_bits(values: torch.Tensor, dtype: Dtype) -> Bits:
    """Real numbers as a server stores them: rounded to float32, then to dtype."""
    return _rounded_bits(values.to(torch.float32).contiguous(), dtype)


def add(x: Bits, y: Bits, dtype: Dtype) -> Ints:
    """ADD: raw bits; their hardware sum as served, Q30."""
    return served(add_bits(dtype, x, y), dtype)


def rs(x: Wide, s: int) -> Wide:
    """`rs` of Python integers."""
    shifted: Wide = (x + (1 << (s - 1))) >> s
    return shifted


def cl(x: Wide) -> Ints:
    """`cl` of Python integers."""
    return np.clip(x, -SATURATION, SATURATION).astype(np.int64)


def norm(x: Ints, root: int, gain: Ints, a: int) -> Ints:
    """NORM: x (Q30) times root (Q40) times gain (Qa), Q30."""
    return cl(rs(rs(x.astype(object) * root, 40) * gain.astype(object), a))


def exp2(d: Ints) -> Ints:
    """2^d of Q30 values (positive ones read as 0), Q40."""
    d = np.minimum(d, 0)
    n = d >> 30
    x = d - (n << 30)
    a = np.full_like(d, EXP2[-1])
    for k in reversed(EXP2[:-1]):
        a = ((a * x) >> 30) + k
    out: Ints = (a << 10) >> np.minimum(-n, 63)
    return out  # a << 10 is below 2^42, so a shift of 63 gives the law's 0


def silu(g: Ints) -> Wide:
    """g / (1 + e^-g), Q30."""
    e = exp2(-rs(np.abs(g).astype(object) * LOG2E, 40).astype(np.int64)) >> 10
    s = np.where(g >= 0, 1 << 60, e << 30) // ((1 << 30) + e)
    return rs(g.astype(object) * s, 30)


def gated(x: Ints, y: Ints) -> Ints:
    """GATED: silu(x) y, Q30."""
    return cl(rs(silu(x) * y.astype(object), 30))


def score(q: Ints, k: Ints, scale: int) -> Ints:
    """SCORE of heads that share a key head: q [heads, hd], k [keys, hd]; scale Q40. [heads, keys], Q30."""
    raw = rounded(matmul(q, np.ascontiguousarray(k.T)), 30)
    if scale.bit_length() > _SCALE_BITS:
        return rs(raw.astype(object) * scale, 40).astype(np.int64)
    low, *high = digits(np.array(scale), 21)
    parts = []
    for j, factor in enumerate([low, *high]):
        parts += [Part(d * factor, 25 * i + 21 * j) for i, d in enumerate(digits(raw, 25))]
    return rounded(parts, 40, saturate=False)


def weighted_sum(p: Ints, v: Ints) -> Wide:
    """WSUM of some heads that share a value head: p [heads, keys], v [keys, hd]. [heads, hd], Q70."""
    return totals(matmul(p, v))


def divided(x: Wide, y: Ints) -> Ints:
    """DIV: x [rows, n] // y [rows], floored; 0 where y <= 0."""
    below = np.where(y > 0, y, 1).astype(object)[:, None]
    return np.where((y > 0)[:, None], cl(x // below), 0)


def chunk_sums(x: npt.NDArray[np.int64] | Wide, y: npt.NDArray[np.int64] | Wide, size: int) -> list[int]:
    """The sums of products of each chunk of `size` terms; the last chunk may be shorter."""
    products = x.astype(object) * y.astype(object)
    return [int(products[i : i + size].sum()) for i in range(0, len(products), size)]


def masses(x: Ints, largest: int, scale: int) -> Ints:
    """2^((x - largest) scale) of logits (Q30) under a scale (Q40), Q40: the weights that MASS folds."""
    exponents = (x.astype(object) - largest) * scale >> 40
    return exp2(np.clip(exponents, -64 << 30, 0).astype(np.int64))


def encode(values: npt.NDArray[np.int64] | Wide, wide: bool) -> bytes:
    """The elements' bytes: zigzag, big-endian, 8 bytes each or 16 if wide (docs/canonical.md, "Integer vectors")."""
    if not wide:
        narrow = values.astype(np.int64)
        return ((narrow << 1) ^ (narrow >> 63)).view(np.uint64).astype(">u8").tobytes()
    return b"".join((2 * v if v >= 0 else -2 * v - 1).to_bytes(16, "big") for v in map(int, values))
