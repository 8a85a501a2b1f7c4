"""Rotary position embedding as a table of integers, the same on every machine (docs/canonical.md, "Functions")."""

from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal, localcontext

DIGITS = 60
TABLE_BITS = 64


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. kind: default, linear or llama3; linear uses factor alone, default nothing but theta."""

    theta: Decimal
    kind: str = "default"
    factor: Decimal = Decimal(1)
    low_freq_factor: Decimal = Decimal(1)
    high_freq_factor: Decimal = Decimal(4)
    original_max_positions: int = 8192


def rope_table(rope: Rope, head_dim: int) -> list[int]:
    """head_dim / 2 frequencies in turns x 2^64 per position, as u64."""
    with localcontext(law_context()) as context:
        turn = 2 * _pi(context)
        log_theta = rope.theta.ln()
        # Rationale: ln and exp are correctly rounded in every implementation of decimal; power need not be.
        plain = [(-log_theta * (2 * i) / head_dim).exp() for i in range(head_dim // 2)]
        scaled = [_scaled(frequency, turn, rope) for frequency in plain]
        return [int((f / turn * (1 << TABLE_BITS)).to_integral_value(ROUND_FLOOR)) for f in scaled]


def _scaled(frequency: Decimal, turn: Decimal, rope: Rope) -> Decimal:
    """A frequency (radians per position) as transformers' modeling_rope_utils scales it."""
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
    wavelength = turn / frequency
    if wavelength > original / low:
        return frequency / rope.factor
    if wavelength < original / high:
        return frequency
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def law_context() -> Context:
    """The law's decimal arithmetic, whatever the caller's context."""
    return Context(prec=DIGITS, rounding=ROUND_HALF_EVEN, Emin=-999999, Emax=999999)


def _pi(context: Context) -> Decimal:
    """Machin: pi = 16 atan(1/5) - 4 atan(1/239), with ten digits to spare."""

    def atan_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k = 1
        while power > Decimal(10) ** -(DIGITS + 10):
            power /= n * n
            total += power / (2 * k + 1) * (-1) ** k
            k += 1
        return total

    with localcontext(context) as wider:
        wider.prec = DIGITS + 10
        value = 16 * atan_inverse(5) - 4 * atan_inverse(239)
    return context.plus(value)
