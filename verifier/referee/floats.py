"""Raw floats: decoding to fixed point, and adding as hardware does (docs/canonical.md, "Numbers").

Bits are unsigned ints read little-endian from the tensor's bytes.
"""

from enum import IntEnum

INVALID = 1 << 62
# Above every decoded value (2^50 served, 2^40 weights), so it can be told from all of them.

SERVED_FRACTION_BITS = 30
SERVED_LIMIT_BITS = 20
WEIGHT_LIMIT_BITS = 8

_UNIT = 149  # sums are exact in units of 2^-149, the smallest subnormal of float32 and finer than that of the others


class Dtype(IntEnum):
    """The float formats that the law knows, by their number in the model's id."""

    BFLOAT16 = 0
    FLOAT16 = 1
    FLOAT32 = 2

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return 4 if self is Dtype.FLOAT32 else 2

    @property
    def exponent_bits(self) -> int:
        return 5 if self is Dtype.FLOAT16 else 8

    @property
    def mantissa_bits(self) -> int:
        return (7, 10, 23)[self]

    @property
    def bias(self) -> int:
        return 15 if self is Dtype.FLOAT16 else 127

    @property
    def infinity(self) -> int:
        """Bits of +Inf: an all-ones exponent and no mantissa."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (8 * self.size - 1)

    @property
    def nan(self) -> int:
        """Bits of the quiet NaN."""
        return self.infinity | (1 << (self.mantissa_bits - 1))

    @property
    def weight_fraction_bits(self) -> int:
        """G: fractional bits of a decoded weight."""
        return 32 if self is Dtype.FLOAT32 else 24


def decode(bits: int, dtype: Dtype, fraction_bits: int, limit_bits: int) -> int:
    """The value x 2^fraction_bits, truncated toward zero; INVALID for NaN, Inf and |v| >= 2^limit_bits."""
    exponent, significand = _split(bits, dtype)
    if bits & dtype.infinity == dtype.infinity or significand.bit_length() + exponent > limit_bits:
        return INVALID
    shift = exponent + fraction_bits
    magnitude = significand << shift if shift >= 0 else significand >> -shift
    return -magnitude if bits & dtype.sign else magnitude


def decode_served(bits: int, dtype: Dtype) -> int:
    """A served value in Q30, or INVALID."""
    return decode(bits, dtype, SERVED_FRACTION_BITS, SERVED_LIMIT_BITS)


def decode_weight(bits: int, dtype: Dtype) -> int:
    """A weight in QG, or INVALID."""
    return decode(bits, dtype, dtype.weight_fraction_bits, WEIGHT_LIMIT_BITS)


def valid(value: int) -> int:
    """A decoded value as all but VERDICT read it: INVALID counts as 0."""
    return 0 if value == INVALID else value


def add(dtype: Dtype, x: int, y: int) -> int:
    """Bits of x + y: the exact sum rounded to float32, then to dtype, each time to nearest, ties to even."""
    if x & dtype.infinity == dtype.infinity or y & dtype.infinity == dtype.infinity:
        return dtype.nan
    total = _units(x, dtype) + _units(y, dtype)
    if total == 0:
        return x & y & dtype.sign
    sign = dtype.sign if total < 0 else 0
    single = _round(abs(total), Dtype.FLOAT32)
    if single == Dtype.FLOAT32.infinity:
        return sign | dtype.infinity
    return sign | _round(_units(single, Dtype.FLOAT32), dtype)


def _split(bits: int, dtype: Dtype) -> tuple[int, int]:
    """(e, m) with |value| = m x 2^e, of a finite float."""
    mantissa = bits & ((1 << dtype.mantissa_bits) - 1)
    exponent = (bits & dtype.infinity) >> dtype.mantissa_bits
    if exponent:
        mantissa |= 1 << dtype.mantissa_bits
    return max(exponent, 1) - dtype.bias - dtype.mantissa_bits, mantissa


def _units(bits: int, dtype: Dtype) -> int:
    """A finite float, exactly, in units of 2^-149."""
    exponent, significand = _split(bits, dtype)
    magnitude = significand << (exponent + _UNIT)
    return -magnitude if bits & dtype.sign else magnitude


def _round(magnitude: int, dtype: Dtype) -> int:
    """Bits of the positive float nearest to magnitude x 2^-149, ties to even; Inf beyond the range."""
    least = 1 - dtype.bias  # exponent of the smallest normal number and of all subnormals
    exponent = max(magnitude.bit_length() - 1 - _UNIT, least)
    shift = exponent - dtype.mantissa_bits + _UNIT
    quotient, rest = magnitude >> shift, magnitude & ((1 << shift) - 1)
    half = (1 << shift) >> 1
    if shift and (rest > half or (rest == half and quotient & 1)):
        quotient += 1
    # The hidden bit adds one to the exponent field, and a carry out of the mantissa another: both are right.
    return min(((exponent - least) << dtype.mantissa_bits) + quotient, dtype.infinity)
