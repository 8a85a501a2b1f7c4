"""The ops: pure, total arithmetic on lists of integers (docs/canonical.md, "Ops").

`args` has one list for each read, in the order of canonical.md; the ops of sampling are handed the draw as their last.
Activations are Q30, weights QG, raw float bits unsigned.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import IntEnum

from verifier.referee import sampling
from verifier.referee.errors import OperandShape, UnknownOp
from verifier.referee.fixed import cl, exp2, isqrt, rs, silu, sincos
from verifier.referee.floats import INVALID, Dtype, decode_served, valid
from verifier.referee.floats import add as add_bits

Args = Sequence[Sequence[int]]


class Op(IntEnum):
    """Every op of the law, by its number in an instruction."""

    ADD = 1
    SUMSQ = 2
    RSQRT = 3
    NORM = 4
    LINEAR = 5
    ROPE = 6
    SCORE = 7
    MAX = 8
    EXP = 9
    SUM = 10
    WSUM = 11
    DIV = 12
    GATED = 13
    VERDICT = 14
    LOGIT = 15
    COMPARE = 16
    SAME = 17
    RANK = 19
    MASS = 20
    STANDING = 21
    CHOICE = 22


SAMPLED = (Op.RANK, Op.MASS, Op.STANDING, Op.CHOICE)
# They know the request's parameters and the place besides what they read.


def run(op: int, args: Args, a: int, b: int) -> int:
    """One element, or the sum of one chunk, of an op. Raises UnknownOp and OperandShape."""
    try:
        function = _FUNCTIONS[Op(op)]
    except ValueError:
        raise UnknownOp(f"expected an op from 1 to {max(Op)}, got {op}") from None
    return function(args, a, b)


def finish(op: int, total: int, a: int) -> int:
    """The element that a sum's total stands for."""
    return cl(rs(total, a)) if op in (Op.LINEAR, Op.LOGIT) else total


def combine(op: int, parts: Sequence[int]) -> int:
    """Partial results (one or more) of an element put together."""
    return max(parts) if op == Op.MAX else sum(parts)


def add(args: Args, a: int, b: int) -> int:
    """Raw bits [x], [y] of dtype b: their hardware sum, decoded as served."""
    (x,), (y,) = _shaped(args, 1, 1)
    return valid(decode_served(add_bits(Dtype(b), x, y), Dtype(b)))


def sumsq(args: Args, a: int, b: int) -> int:
    """[x...]: the sum of squares, Q60."""
    (x,) = _shaped(args, None)
    return sum(v * v for v in x)


def rsqrt(args: Args, a: int, b: int) -> int:
    """[x] a sum of b squares, a = floor(eps x 2^60): 1 / sqrt(x / b + eps), Q40. 0 where that divides by zero."""
    ((x,),) = _shaped(args, 1)
    below = max(x, 0) + b * a
    return isqrt((b << 140) // below) if below else 0


def norm(args: Args, a: int, b: int) -> int:
    """[x], [y] the inverse root (Q40), [z] the gain (Qa)."""
    (x,), (y,), (z,) = _shaped(args, 1, 1, 1)
    return cl(rs(rs(x * y, 40) * z, a))


def linear(args: Args, a: int, b: int) -> int:
    """[x...], [y...]: the sum of products, Q(30+a)."""
    x, y = _equal(_shaped(args, None, None))
    return sum(v * w for v, w in zip(x, y, strict=True))


def rope(args: Args, a: int, b: int) -> int:
    """[x0, x1], [frequency] at position a: the first (b = 0) or second half's element of the turned pair."""
    (x0, x1), (frequency,) = _shaped(args, 2, 1)
    s, c = sincos(a, frequency)
    if b == 0:
        return rs(x0 * c, 30) - rs(x1 * s, 30)
    return rs(x1 * c, 30) + rs(x0 * s, 30)


def score(args: Args, a: int, b: int) -> int:
    """[q...], [k...]: their product times the scale a (Q40), for a softmax in base 2."""
    q, k = _equal(_shaped(args, None, None))
    return rs(cl(rs(sum(v * w for v, w in zip(q, k, strict=True)), 30)) * a, 40)


def max_(args: Args, a: int, b: int) -> int:
    """[x...], at least one: the largest."""
    (x,) = _shaped(args, None)
    if not x:
        raise OperandShape("expected at least one value, got none")
    return max(x)


def exp(args: Args, a: int, b: int) -> int:
    """[x], [y]: 2^(x - y), Q40."""
    (x,), (y,) = _shaped(args, 1, 1)
    return exp2(x - y)


def sum_(args: Args, a: int, b: int) -> int:
    """[x...]: the sum."""
    (x,) = _shaped(args, None)
    return sum(x)


def wsum(args: Args, a: int, b: int) -> int:
    """[x...], [y...]: the sum of products, Q70."""
    x, y = _equal(_shaped(args, None, None))
    return sum(v * w for v, w in zip(x, y, strict=True))


def div(args: Args, a: int, b: int) -> int:
    """[x], [y]: the quotient, floored; 0 when y <= 0."""
    (x,), (y,) = _shaped(args, 1, 1)
    return cl(x // y) if y > 0 else 0


def gated(args: Args, a: int, b: int) -> int:
    """[x], [y]: silu(x) y."""
    (x,), (y,) = _shaped(args, 1, 1)
    return cl(rs(silu(x) * y, 30))


def verdict(args: Args, a: int, b: int) -> int:
    """[D...] standard, [S...] served or INVALID, [num, den, floor]: 1 if S is out of tolerance, else 0.

    An invalid S is excused, and left out of both sums, only where |D| exceeds a, the dtype's bound (Q30).
    """
    standard, served, (num, den, floor) = _shaped(args, None, None, 3)
    _equal([standard, served])
    distance = size = 0
    for d, s in zip(standard, served, strict=True):
        if s == INVALID:
            if abs(d) <= a:
                return 1
            continue
        distance += (s - d) ** 2
        size += d * d
    return int(distance * den**2 > num**2 * (size + len(standard) * floor**2))


def logit(args: Args, a: int, b: int) -> int:
    """[x...], [y...]: the sum of products, Q(30+a)."""
    return linear(args, a, b)


def compare(args: Args, a: int, b: int) -> int:
    """[served token's logit, competitor's], [num, den, margin]: 1 if the competitor wins by more than the margin."""
    (served, other), (_, _, margin) = _shaped(args, 2, 3)
    return int(other - served > margin)


def same(args: Args, a: int, b: int) -> int:
    """Raw bits [x...], [y...]: 1 if any differ, else 0."""
    x, y = _equal(_shaped(args, None, None))
    return int(list(x) != list(y))


def rank(args: Args, a: int, b: int) -> int:
    """[x...] logits, [the judged token's], [num, den, margin], draw: how many lie above it."""
    logits, (own,), (_, _, margin), draw = _shaped(args, None, 1, 3, DRAW_FIELDS)
    return sampling.rank(logits, own, margin, sampling.Draw(*draw))


def mass(args: Args, a: int, b: int) -> int:
    """[x...] logits, [the judged one's], [the largest], [num, den, margin], draw: (1-p) x mass above - p x the rest."""
    logits, (own,), (largest,), (_, _, margin), draw = _shaped(args, None, 1, 1, 3, DRAW_FIELDS)
    return sampling.mass(logits, own, largest, margin, sampling.Draw(*draw))


def standing(args: Args, a: int, b: int) -> int:
    """[rank], [mass], draw: 1 if a competitor is surely allowed, or the served token surely excluded."""
    (place,), (excess,), draw = _shaped(args, 1, 1, DRAW_FIELDS)
    return sampling.standing(place, excess, sampling.Draw(*draw))


def choice(args: Args, a: int, b: int) -> int:
    """[served token's logit], [competitor's], [standing], [num, den, margin], draw: 1 if the served token is wrong."""
    (served,), (other,), (stands,), (_, _, margin), draw = _shaped(args, 1, 1, 1, 3, DRAW_FIELDS)
    return sampling.choice(served, other, stands, margin, sampling.Draw(*draw))


DRAW_FIELDS = len(fields(sampling.Draw))

_FUNCTIONS: dict[Op, Callable[[Args, int, int], int]] = {
    Op.ADD: add,
    Op.SUMSQ: sumsq,
    Op.RSQRT: rsqrt,
    Op.NORM: norm,
    Op.LINEAR: linear,
    Op.ROPE: rope,
    Op.SCORE: score,
    Op.MAX: max_,
    Op.EXP: exp,
    Op.SUM: sum_,
    Op.WSUM: wsum,
    Op.DIV: div,
    Op.GATED: gated,
    Op.VERDICT: verdict,
    Op.LOGIT: logit,
    Op.COMPARE: compare,
    Op.SAME: same,
    Op.RANK: rank,
    Op.MASS: mass,
    Op.STANDING: standing,
    Op.CHOICE: choice,
}


def _shaped(args: Args, *lengths: int | None) -> Args:
    """args, if it has a list of each length (None: any). Raises OperandShape."""
    if len(args) != len(lengths) or any(n is not None and len(x) != n for x, n in zip(args, lengths, strict=True)):
        raise OperandShape(f"expected lists of lengths {lengths} (None: any), got {[len(x) for x in args]}")
    return args


def _equal(args: Args) -> Args:
    """args, if all its lists have the same length. Raises OperandShape."""
    if len({len(x) for x in args}) > 1:
        raise OperandShape(f"expected lists of one length, got {[len(x) for x in args]}")
    return args
