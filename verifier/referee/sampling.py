"""The sampling law: noise, and who may be chosen (docs/canonical.md, "Sampling").

Everything is a Python int; every shift and division floors. Logits and noise are Q30, masses Q40 x 1/65536.

A token's noise is `-ln(-ln U)` for a uniform U of (seed, request, position, token): the largest of
`logit + temperature x noise` is then a draw from the softmax (Gumbel's trick), and anyone can repeat it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.referee.fixed import LOG2E, exp2, horner

LN = (1, 1073741577, -536860845, 357751363, -267061634, 207787834, -156057253, 101743012, -50520772, 16165559, -2427725)
BEND = (-1, 536871275, 223672512, 134811307, 86124193, 123739353, -166609944, 606438234, -747396562, 538147262)
# Q30, lowest degree first: ln(1 + x) on [0, 1); ln(-ln(1 - v) / v) on [0, 1/2). Within 1e-8. Frozen.
LN2 = 744261118  # ln 2, Q30

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
ONE = 65536  # temperature 1, and the whole mass: request records count both in 1/65536


@dataclass(frozen=True)
class Draw:
    """One draw as a step sees it: the request's parameters, the place, and the tokens that are compared.

    temperature and top_p in 1/65536; top_k 0 and top_p 65536 filter nothing. first: token of a chunk's first logit.
    """

    temperature: int
    top_k: int
    top_p: int
    seed: int
    request: int
    position: int
    token: int  # served
    unit: int  # the competitor; the served token itself when its membership is judged
    first: int

    @property
    def own(self) -> bool:
        """Whether the served token's own membership is judged."""
        return self.unit == self.token


def draw_list(word: bytes, position: int, token: int, unit: int, first: int) -> list[int]:
    """The fields of a Draw, as ops are handed them. word: the request's 32 bytes, as in a Cell."""
    return [*struct.unpack(">IIIQI8x", word), position, token, unit, first]


def mix(z: int) -> int:
    """The finaliser of splitmix64 on a u64: each bit of z moves half the bits of the result."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def stream(seed: int, request: int, position: int) -> int:
    """Where a position's counter starts, u64."""
    return mix((mix(seed) + GOLDEN * (1 + (request << 32 | position))) & _MASK)


def bits(start: int, token: int) -> int:
    """A token's 64 random bits in a stream."""
    return mix((start + GOLDEN * (1 + token)) & _MASK)


def ln(x: int, fraction_bits: int) -> int:
    """The natural logarithm of x / 2^fraction_bits, x >= 1. Q30."""
    power = x.bit_length() - 1
    mantissa = x >> power - 30 if power >= 30 else x << 30 - power
    return LN2 * (power - fraction_bits) + horner(LN, mantissa - (1 << 30))


def gumbel(x: int) -> int:
    """-ln(-ln U), Q30, for U = (2x + 1) / 2^65 of 64 random bits x. Between -3.9 and 45.1."""
    if x >> 63:
        # Near 1, where the winners are, 1 - U keeps all its digits: -ln U = v (1 + v/2 + ...).
        v = 2 * (x ^ _MASK) + 1
        return -ln(v, 65) - horner(BEND, v >> 35)
    return -ln(-ln(2 * x + 1, 65), 30)


def noise(draw: Draw, token: int) -> int:
    """A token's noise in a draw, Q30."""
    return gumbel(bits(stream(draw.seed, draw.request, draw.position), token))


def rank(logits: Sequence[int], own_logit: int, margin: int, draw: Draw) -> int:
    """How many tokens of a chunk lie above the judged one: possibly (a competitor), surely (the served token)."""
    above_from = edge(own_logit, margin, draw)
    return sum(x >= above_from for i, x in enumerate(logits) if draw.first + i != draw.unit)


def mass(logits: Sequence[int], own_logit: int, largest: int, margin: int, draw: Draw) -> int:
    """A chunk's part of (1 - p) x mass above - p x the rest's: above 0, more than p lies above the judged token.

    The logits served may differ from these by errors of which no two differ by more than the margin. So a competitor
    sees the rest lowered by it, p less by one unit and weights rounded against it; the served token the contrary.
    """
    if draw.top_p >= ONE:
        return 0
    p, scale, above_from = mass_limit(draw), inverse_temperature(draw.temperature), edge(own_logit, margin, draw)
    total = 0
    for i, x in enumerate(logits):
        above = x >= above_from and draw.first + i != draw.unit
        # Whatever errors could favour is lowered by the margin; the other side is rounded up.
        if above == draw.own:
            weight = exp2((x - largest - margin) * scale >> 40)
        else:
            weight = exp2((x - largest) * scale >> 40) + 1
        total += weight * (ONE - p if above else -p)
    return total


def standing(rank: int, mass: int, draw: Draw) -> int:
    """A competitor: 1 if it is surely allowed. The served token: 1 if it is surely excluded."""
    if draw.own:
        return int((draw.top_k > 0 and rank >= draw.top_k) or (draw.top_p < ONE and mass > 0))
    return int((draw.top_k == 0 or rank < draw.top_k) and (draw.top_p >= ONE or mass <= 0))


def choice(served: int, other: int, standing: int, margin: int, draw: Draw) -> int:
    """1 if the served token is wrong: excluded, or beaten by more than the margin by a competitor that is allowed."""
    if draw.own or standing != 1:
        return int(standing == 1)
    lead = (other - served << 16) + draw.temperature * (noise(draw, draw.unit) - noise(draw, draw.token))
    return int(lead > margin << 16)


def inverse_temperature(temperature: int) -> int:
    """log2(e) / temperature, Q40. Temperature 0, which is greedy and never asked for, counts as the smallest."""
    return (LOG2E << 16) // max(temperature, 1)


def mass_limit(draw: Draw) -> int:
    """The share of the mass above which a judgment is sure, in 1/65536: one unit covers what floats round."""
    return draw.top_p + 1 if draw.own else max(draw.top_p - 1, 0)


def edge(own_logit: int, margin: int, draw: Draw) -> int:
    """The logit from which on a token counts as above."""
    return own_logit + margin + 1 if draw.own else own_logit - margin
