"""Exact integer products at the speed of float64 GEMM.

A factor is cut into balanced digits so narrow that every partial sum of the float64 product, in whatever order, is an
integer of at most 2^53: the result is exact whatever the library, the thread count, the tiling or fused multiply-adds.
(Not on hardware that emulates float64.)

A product is a list of `Part`s: its value is the sum of part.value << part.shift.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from verifier.referee.fixed import SATURATION
from verifier.referee.floats import WEIGHT_LIMIT_BITS, Dtype

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[Any]  # raw floats: uint16 or uint32

_EXACT_BITS = 53  # float64 holds every integer up to 2^53
_TILE_ELEMENTS = 1 << 18
# Whole matrices in float64 would quadruple a 16-bit model; tiles of 2 MiB are several times faster as well (cache).
_NARROWEST_DIGIT = 8
# A row with an L1 norm above 2^46 is cut into digits itself: narrower digits of x would cost more passes.

FLOATS = {Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT16: torch.float16, Dtype.FLOAT32: torch.float32}


class Part(NamedTuple):
    """An int64 array of magnitude at most 2^55 and the power of two that it counts."""

    value: Ints
    shift: int


def digits(x: Ints, width: int) -> list[Ints]:
    """x = sum of digit[i] << (width * i), |digit| <= 2^(width - 1); |x| < 2^62, at least one digit."""
    half, out, rest = 1 << (width - 1), [], x
    while True:
        low = ((rest + half) & ((1 << width) - 1)) - half
        out.append(low)
        rest = (rest - low) >> width
        if not rest.any():
            return out


def matmul(x: Ints, y: Ints) -> list[Part]:
    """x [m, k] @ y [k, n], elements below 2^62 in magnitude. Parts of [m, n]."""
    width = (_EXACT_BITS + 2 - x.shape[1].bit_length()) // 2
    left = [torch.from_numpy(d.astype(np.float64)) for d in digits(x, width)]
    right = [torch.from_numpy(d.astype(np.float64)) for d in digits(y, width)]
    parts = []
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            parts.append(Part((a @ b).numpy().astype(np.int64), width * (i + j)))
    return parts


def float_tensor(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Raw bits as a torch tensor of that dtype; shares the memory where it is writable."""
    signed = np.ascontiguousarray(bits).view(np.int32 if dtype is Dtype.FLOAT32 else np.int16)
    return torch.from_numpy(signed if signed.flags.writeable else signed.copy()).view(FLOATS[dtype])


def fixed_weights(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Raw weights as integers QG held in float64; invalid ones are 0 (canonical.md, "Decoding a float")."""
    # float32 holds every weight of every dtype; scaling by a power of two and cutting the fraction off keep it exact.
    values = float_tensor(bits, dtype).to(torch.float32, copy=True)
    sound = values.abs() < float(1 << WEIGHT_LIMIT_BITS)  # a NaN compares false as well
    if not bool(sound.all()):
        values = torch.where(sound, values, 0.0)
    return values.mul_(float(1 << dtype.weight_fraction_bits)).trunc_().to(torch.float64)


def weight_tiles(bits: Bits, dtype: Dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, integers QG as float64 [rows, n]) over bits [m, n], in tiles of about 2 MiB."""
    step = max(1, _TILE_ELEMENTS // bits.shape[1])
    for first in range(0, bits.shape[0], step):
        yield first, fixed_weights(bits[first : first + step], dtype)


def linear(x: Ints, bits: Bits, dtype: Dtype, saturate: bool = True) -> Ints:
    """`cl(rs(W x, G))` for x [n] or [k, n] (Q30) and raw weights [m, n]. Returns [m] or [k, m], Q30."""
    rows = np.atleast_2d(x)
    out = np.empty((rows.shape[0], bits.shape[0]), dtype=np.int64)
    held: dict[int, list[torch.Tensor]] = {}  # digits of x by their width

    def cut(width: int) -> list[torch.Tensor]:
        if width not in held:
            held[width] = [torch.from_numpy(d.astype(np.float64).T.copy()) for d in digits(rows, width)]
        return held[width]

    for first, tile in weight_tiles(bits, dtype):
        parts = _tile_product(tile, rows, cut)
        out[:, first : first + tile.shape[0]] = rounded(parts, dtype.weight_fraction_bits, saturate).T
    return out if x.ndim == 2 else out[0]


def _tile_product(tile: torch.Tensor, rows: Ints, cut: Callable[[int], list[torch.Tensor]]) -> list[Part]:
    """tile [m, n] of integers times rows [k, n]: parts of [m, k]."""
    norm_bits = int(tile.abs().sum(dim=1).max()).bit_length()
    width = _EXACT_BITS + 1 - norm_bits
    if width < _NARROWEST_DIGIT:
        return matmul(tile.to(torch.int64).numpy(), np.ascontiguousarray(rows.T))
    return [
        Part((tile @ digit).numpy().astype(np.int64), width * i) for i, digit in enumerate(cut(min(width, _EXACT_BITS)))
    ]


def rounded(parts: list[Part], s: int, saturate: bool = True) -> Ints:
    """`rs(sum of parts, s)`, then `cl` if asked; without it the result must fit int64. 1 <= s <= 40."""
    ordered = sorted(parts, key=lambda part: part.shift)
    low = np.full(ordered[0].value.shape, 1 << (s - 1), dtype=np.int64)
    position = 0
    above: list[Part] = []
    # Floors compose: what is shifted out below a part's place is final, for all the rest is a multiple of that power.
    for value, shift in ordered:
        if shift > s:
            above.append(Part(value, shift - s))
            continue
        low = (low >> (shift - position)) + value
        position = shift
    low = low >> (s - position)
    total = low.copy()
    estimate = low.astype(np.float64)
    for value, shift in above:
        if shift < 64:
            total += value << shift  # modulo 2^64: right where the true total fits
        estimate += np.ldexp(value.astype(np.float64), shift)
    if not saturate:
        return total
    total = np.where(np.abs(estimate) < 2.0**52, total, np.where(estimate < 0, -SATURATION, SATURATION))
    return np.clip(total, -SATURATION, SATURATION)


def totals(parts: list[Part]) -> npt.NDArray[np.object_]:
    """The sum of the parts as Python integers."""
    out = np.zeros(parts[0].value.shape, dtype=object)
    for value, shift in parts:
        out += value.astype(object) << shift
    return out
