"""Fixed-point numbers: rounding, saturation and the canonical functions (docs/canonical.md, "Numbers" and "Functions").

Everything is a Python int; every shift and division floors. Q30 means value x 2^30.
"""

import math
from collections.abc import Sequence

Q30 = 1 << 30
SATURATION = (1 << 50) - 1
# The widest served value, 2^20 in Q30, less one: 256 products of two such values fit int128.

EXP2 = (1073741824, 744261126, 257941089, 59598342, 10322487, 1441968, 153573, 23239)
SIN = (1686629713, -693598666, 85569282, -5026892, 172072, -3685)
COS = (1073741824, -1324675879, 272375559, -22401984, 987026, -27028, 482)
# Q30, lowest degree first: 2^x on [0, 1); sin and cos of a quarter turn, in odd and even powers. Frozen.
LOG2E = 1586259972792  # log2(e), Q40


def rs(x: int, s: int) -> int:
    """`x / 2^s`, ties toward +infinity. s >= 0; s = 0 leaves x alone."""
    return (x + ((1 << s) >> 1)) >> s


def cl(x: int) -> int:
    """x saturated to +-(2^50 - 1)."""
    return max(-SATURATION, min(SATURATION, x))


def isqrt(x: int) -> int:
    """Floor of the square root, x >= 0."""
    return math.isqrt(x)


def horner(coefficients: Sequence[int], x: int) -> int:
    """The polynomial with these Q30 coefficients, lowest degree first, at x (Q30), floored after each product. Q30."""
    a = coefficients[-1]
    for k in reversed(coefficients[:-1]):
        a = ((a * x) >> 30) + k
    return a


def exp2(d: int) -> int:
    """2^d for d <= 0 (Q30; a positive d reads as 0). Q40, at most 2^40."""
    d = min(d, 0)
    n = d >> 30
    if -n >= 64:
        return 0
    return (horner(EXP2, d - (n << 30)) << 10) >> -n


def silu(g: int) -> int:
    """g / (1 + e^-g), Q30 to Q30."""
    e = exp2(-rs(abs(g) * LOG2E, 40)) >> 10
    s = (1 << 60) // (Q30 + e) if g >= 0 else (e << 30) // (Q30 + e)
    return rs(g * s, 30)


def sincos(position: int, frequency: int) -> tuple[int, int]:
    """Sine and cosine (Q30) of position x frequency, the frequency in turns x 2^64 per position."""
    p = (position * frequency) % (1 << 64)
    q = p >> 62
    z = (p >> 32) & (Q30 - 1)
    z2 = (z * z) >> 30
    s = (z * horner(SIN, z2)) >> 30
    c = horner(COS, z2)
    return ((s, c), (c, -s), (-s, -c), (-c, s))[q]
