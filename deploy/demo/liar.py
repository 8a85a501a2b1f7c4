"""A party that lies in a game, consistently above its lie: what dishonest workers and challengers of the demo argue
with.

The vector before the verdict is made up so that the verdict comes out as the liar needs it; everything above follows
from it, roots and sums included. Only
one step, somewhere beneath, is false - and that is the one the EVM computes.
"""

from __future__ import annotations

import numpy as np

from verifier.canonical import Case, Vector
from verifier.referee.fixed import Q30
from verifier.referee.ops import Op, finish

LINEAR_SUMS = (Op.LINEAR, Op.LOGIT)


class _Pretence(Case):
    """Another view of the piece that `truth` is about."""

    def __init__(self, truth: Case) -> None:
        judged = (truth.model, truth.weights, truth.profile, truth.segment)
        super().__init__(*judged, truth.trace, truth.token, truth.sampling_word)
        self._truth = truth


class DenyingCase(_Pretence):
    """The truth, but for the verdict: "within tolerance"."""

    def vector(self, i: int) -> Vector:
        return np.zeros(1, dtype=np.int64) if i == len(self.instructions) - 1 else super().vector(i)


class LyingCase(_Pretence):
    """`truth` seen by somebody who wants the verdict to be `wrong`.

    The first false vector is the first that fits in one leaf, so that the very next move puts a false number on the
    table; all between follows from it; the vector that the verdict reads is made up to fit.
    """

    def __init__(self, truth: Case, wrong: bool) -> None:
        super().__init__(truth)
        self._wrong = wrong
        self._told = len(self.instructions) - 2
        self._first = next(i for i in range(self._told + 1) if self.leaves(i) == 1)

    def vector(self, i: int) -> Vector:
        if i not in self._vectors:
            if i == self._told:
                self._vectors[i] = self._made_up(self._truth.vector(i))
            elif i == self._first:
                true = self._truth.vector(i)
                self._vectors[i] = true + abs(true) // 64 + 1
        return super().vector(i)

    def chunk_sums(self, i: int, e: int) -> list[int]:
        """True partial sums but for the last one, which makes up for the lie."""
        if i not in (self._first, self._told):
            return super().chunk_sums(i, e)
        instruction = self.instructions[i]
        chunks = list(self._truth.chunk_sums(i, e))
        told = int(self.vector(i)[e])
        if instruction.op == Op.MAX:
            chunks[-1] = told
        else:
            scale = instruction.a if instruction.op in LINEAR_SUMS else 0
            chunks[-1] += (told - finish(instruction.op, sum(chunks), instruction.a)) << scale
        return chunks

    def _made_up(self, true: Vector) -> Vector:
        """Served values, or values far from them: the verdict is computed from these."""
        verdict = self.instructions[-1]
        if verdict.op == Op.COMPARE:
            far = np.int64(2**40)
            return np.array([true[0], true[0] + (far if self._wrong else -far)], dtype=np.int64)
        if verdict.op == Op.CHOICE:
            return np.array([int(self._wrong)], dtype=np.int64)
        told = np.asarray(self._values(verdict.y, len(true)), dtype=np.int64)
        return told + np.int64(2 * Q30) if self._wrong else told
