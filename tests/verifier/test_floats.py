"""verifier.referee.floats against torch: decoding, and addition as the hardware does it."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verifier.referee.floats import INVALID, Dtype, add, decode, decode_served, decode_weight, valid

TORCH = {
    Dtype.BFLOAT16: (torch.bfloat16, torch.int16),
    Dtype.FLOAT16: (torch.float16, torch.int16),
    Dtype.FLOAT32: (torch.float32, torch.int32),
}
DTYPES = list(Dtype)


def floats_of(dtype: Dtype, bits: list[int]) -> torch.Tensor:
    """The floats with these unsigned bits."""
    kind, integer = TORCH[dtype]
    edge = 1 << (8 * dtype.size - 1)
    return torch.tensor([b - 2 * edge if b >= edge else b for b in bits], dtype=integer).view(kind)


def bits_of(dtype: Dtype, x: torch.Tensor) -> list[int]:
    mask = (1 << 8 * dtype.size) - 1
    return [b & mask for b in x.view(TORCH[dtype][1]).tolist()]


def edges(dtype: Dtype) -> list[int]:
    """Zeros, subnormals, the least normal, one, ties, the largest, infinity and NaN, of both signs."""
    one = dtype.bias << dtype.mantissa_bits
    least = 1 << dtype.mantissa_bits
    positive = [
        0,
        1,
        2,
        least - 1,
        least,
        least + 1,
        one - 1,
        one,
        one + 1,
        dtype.infinity - 1,
        dtype.infinity,
        dtype.nan,
    ]
    tie = one - (dtype.mantissa_bits + 1 << dtype.mantissa_bits)  # half of the last place of one
    positive += [tie, tie + 1, max(tie - 1, 0)]
    return positive + [b | dtype.sign for b in positive]


def expected_sums(dtype: Dtype, x: list[int], y: list[int]) -> list[int]:
    total = floats_of(dtype, x) + floats_of(dtype, y)
    special = [
        b & dtype.infinity == dtype.infinity or c & dtype.infinity == dtype.infinity for b, c in zip(x, y, strict=True)
    ]
    return [dtype.nan if s else b for s, b in zip(special, bits_of(dtype, total), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_equals_the_hardware_on_edges(dtype: Dtype) -> None:
    x = [b for b in edges(dtype) for _ in edges(dtype)]
    y = [b for _ in edges(dtype) for b in edges(dtype)]
    assert [add(dtype, b, c) for b, c in zip(x, y, strict=True)] == expected_sums(dtype, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_add_equals_the_hardware_on_random_bits(dtype: Dtype, data: st.DataObject) -> None:
    word = st.integers(0, (1 << 8 * dtype.size) - 1)
    x = data.draw(st.lists(word, min_size=1, max_size=40))
    near = st.integers(0, (4 << dtype.mantissa_bits) - 1)  # exponents a few apart: where rounding and cancelling happen
    y = [b ^ data.draw(near) ^ (dtype.sign if data.draw(st.booleans()) else 0) for b in x]
    assert [add(dtype, b, c) for b, c in zip(x, y, strict=True)] == expected_sums(dtype, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_decode_truncates_what_torch_reads(dtype: Dtype, data: st.DataObject) -> None:
    bits = data.draw(st.integers(0, (1 << 8 * dtype.size) - 1))
    value = floats_of(dtype, [bits]).double().item()
    for fraction, limit in ((30, 20), (24, 8), (32, 8)):
        got = decode(bits, dtype, fraction, limit)
        if not abs(value) < 2.0**limit:  # NaN too
            assert got == INVALID
        else:
            assert got == int(Fraction(value) * (1 << fraction))
            assert abs(got) <= 1 << fraction + limit


def test_decode_by_hand() -> None:
    assert decode_served(0x3F80, Dtype.BFLOAT16) == 1 << 30
    assert decode_served(0x8000, Dtype.BFLOAT16) == 0
    assert decode_served(0xBF81, Dtype.BFLOAT16) == -(1 << 30) - (1 << 23)
    assert decode_served(0x0001, Dtype.FLOAT16) == 64  # 2^-24 in Q30
    assert decode_served(0x497FFFFF, Dtype.FLOAT32) == (1 << 50) - (1 << 26)
    assert decode_served(0x49800000, Dtype.FLOAT32) == INVALID  # 2^20
    assert decode_served(0x7FC0, Dtype.BFLOAT16) == decode_served(0x7C00, Dtype.FLOAT16) == INVALID
    assert decode_weight(0x437F, Dtype.BFLOAT16) == 255 << 24
    assert decode_weight(0x4380, Dtype.BFLOAT16) == INVALID  # 2^8
    assert decode_weight(0xBF800000, Dtype.FLOAT32) == -(1 << 32)
    assert decode_weight(0x80000001, Dtype.FLOAT32) == 0
    assert (valid(INVALID), valid(-7)) == (0, -7)


def test_add_by_hand() -> None:
    assert add(Dtype.BFLOAT16, 0x8000, 0x8000) == 0x8000
    assert add(Dtype.BFLOAT16, 0x0000, 0x8000) == 0
    assert add(Dtype.BFLOAT16, 0x3F80, 0xBF80) == 0
    assert add(Dtype.BFLOAT16, 0x4380, 0x3F80) == 0x4380  # 256 + 1: a tie, to even
    assert add(Dtype.BFLOAT16, 0x4381, 0x3F80) == 0x4382  # 258 + 1: a tie, to even, upward
    assert add(Dtype.FLOAT16, 0x7BFF, 0x7BFF) == 0x7C00
    assert add(Dtype.FLOAT32, 0xFF800000, 0x7F800000) == 0x7FC00000
    assert (Dtype.BFLOAT16.nan, Dtype.FLOAT16.nan, Dtype.FLOAT32.nan) == (0x7FC0, 0x7E00, 0x7FC00000)
