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


class DenyingCase(Case):
    """The truth, but for the verdict: "within tolerance"."""

    def __init__(self, truth: Case) -> None:
        super().__init__(
            truth.model, truth.weights, truth.profile, truth.segment, truth.trace, truth.next_trace, truth.token
        )

    def vector(self, i: int) -> Vector:
        return np.zeros(1, dtype=np.int64) if i == len(self.instructions) - 1 else super().vector(i)


class LyingCase(Case):
    """`truth` seen by somebody who wants the verdict to be `wrong`. Lies about the vector that the verdict reads."""

    def __init__(self, truth: Case, wrong: bool) -> None:
        super().__init__(
            truth.model, truth.weights, truth.profile, truth.segment, truth.trace, truth.next_trace, truth.token
        )
        self._truth = truth
        self._wrong = wrong
        self._lie = len(self.instructions) - 2

    def vector(self, i: int) -> Vector:
        if i == self._lie and i not in self._vectors:
            self._vectors[i] = self._made_up(self._truth.vector(i))
        return super().vector(i)

    def chunk_sums(self, i: int, e: int) -> list[int]:
        """True partial sums but for the last one, which makes up for the lie."""
        chunks = list(self._truth.chunk_sums(i, e))
        instruction = self.instructions[i]
        if i == self._lie and instruction.op in LINEAR_SUMS:
            told, true = int(self.vector(i)[e]), finish(instruction.op, sum(chunks), instruction.a)
            if told != true:
                chunks[-1] += (told - true) << instruction.a
        return chunks

    def _made_up(self, true: Vector) -> Vector:
        """Served values, or values far from them: the verdict is computed from these."""
        verdict = self.instructions[-1]
        if verdict.op == Op.COMPARE:
            far = np.int64(2**40)
            return np.array([true[0], true[0] + (far if self._wrong else -far)], dtype=np.int64)
        served = self._values(verdict.y, len(true))
        told = np.asarray(served, dtype=np.int64)
        return told + np.int64(2 * Q30) if self._wrong else told
