"""The sampling law over a whole vocabulary at once: bit-equal to verifier.referee.sampling, token by token.

The noise is what a worker draws with; the folds are the vectors of a SAMPLE segment.
"""

import numpy as np
import numpy.typing as npt

from verifier.linear import Ints
from verifier.referee.codec import FOLD
from verifier.referee.fixed import Q30
from verifier.referee.sampling import (
    BEND,
    GOLDEN,
    LN,
    LN2,
    ONE,
    Draw,
    choice,
    edge,
    inverse_temperature,
    mass_limit,
    standing,
    stream,
)
from verifier.vectors import masses

Words = npt.NDArray[np.uint64]


def noise(seed: int, request: int, position: int, vocabulary: int) -> Ints:
    """The noise of tokens 0 .. vocabulary - 1 at one place, Q30."""
    row: Ints = noise_rows(seed, request, range(position, position + 1), vocabulary)[0]
    return row


def noise_rows(seed: int, request: int, positions: range, vocabulary: int) -> Ints:
    """The noise of tokens 0 .. vocabulary - 1 at each position: [positions, vocabulary], Q30."""
    counter = np.arange(1, vocabulary + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # modulo 2^64, as the law has it
    starts = np.array([stream(seed, request, position) for position in positions], dtype=np.uint64)
    return gumbel(_mix(starts[:, None] + counter))


def gumbel(x: Words) -> Ints:
    """-ln(-ln U) of 64 random bits each, Q30."""
    out = np.empty(x.shape, dtype=np.int64)
    high = (x >> np.uint64(63)).astype(bool)
    v = (~x[high] << np.uint64(1)) | np.uint64(1)
    out[high] = -_ln(v, 65) - _horner(BEND, (v >> np.uint64(35)).astype(np.int64))
    u = (x[~high] << np.uint64(1)) | np.uint64(1)
    out[~high] = -_ln((-_ln(u, 65)).astype(np.uint64), 30)
    return out


def rank_chunks(logits: Ints, margin: int, draw: Draw) -> list[int]:
    """RANK of each chunk of logits (Q30). draw: of any chunk."""
    above = _above(logits, margin, draw)
    return [int(above[c : c + FOLD].sum()) for c in range(0, len(logits), FOLD)]


def mass_chunks(logits: Ints, largest: int, margin: int, draw: Draw) -> list[int]:
    """MASS of each chunk of logits (Q30). draw: of any chunk."""
    starts = range(0, len(logits), FOLD)
    if draw.top_p >= ONE:
        return [0] * len(starts)
    p, scale, above = mass_limit(draw), inverse_temperature(draw.temperature), _above(logits, margin, draw)
    weights, lowered = np.empty_like(logits), above == draw.own
    weights[lowered] = masses(logits[lowered], largest + margin, scale)
    weights[~lowered] = masses(logits[~lowered], largest, scale) + 1
    parts = [(weights[c : c + FOLD], above[c : c + FOLD]) for c in starts]
    return [int(w[up].sum()) * (ONE - p) - int(w[~up].sum()) * p for w, up in parts]


def convicts(logits: Ints, margin: int, draw: Draw) -> bool:
    """SAMPLE's verdict on a served token: logits [vocabulary] and margin in Q30. draw: of any chunk."""
    place, excess = sum(rank_chunks(logits, margin, draw)), sum(mass_chunks(logits, int(logits.max()), margin, draw))
    stands = standing(place, excess, draw)
    return choice(int(logits[draw.token]), int(logits[draw.unit]), stands, margin, draw) == 1


def _above(logits: Ints, margin: int, draw: Draw) -> npt.NDArray[np.bool_]:
    above: npt.NDArray[np.bool_] = logits >= edge(int(logits[draw.unit]), margin, draw)
    above[draw.unit] = False
    return above


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = z ^ (z >> np.uint64(31))
    return mixed


def _ln(x: Words, fraction_bits: int) -> Ints:
    """ln(x / 2^fraction_bits) of x >= 1, Q30."""
    power = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    # float64 rounds 2^k - 1 up to 2^k where k > 53.
    power -= (x >> power.astype(np.uint64)) == 0
    down = np.maximum(power - 30, 0).astype(np.uint64)
    up = np.maximum(30 - power, 0).astype(np.uint64)
    mantissa = ((x >> down) << up).astype(np.int64)
    return LN2 * (power - fraction_bits) + _horner(LN, mantissa - Q30)


def _horner(coefficients: tuple[int, ...], x: Ints) -> Ints:
    a = np.full_like(x, coefficients[-1])
    for k in reversed(coefficients[:-1]):
        a *= x
        a >>= 30
        a += k
    return a
