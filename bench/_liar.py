"""A party that lies in one place: one element of one instruction, and one chunk of its sum, and is consistent above."""

from verifier.canonical import Case, Vector
from verifier.game import WRONG
from verifier.referee.ops import Op


class WrongAt(Case):
    """The truth, but for one element of instruction `step`; a lying challenger also claims the verdict.

    What follows from the false vector is never looked at: the first false child decides where a game goes.
    """

    def __init__(self, truth: Case, step: int, element: int, chunk: int, accuses: bool) -> None:
        judged = (truth.model, truth.weights, truth.profile, truth.segment)
        super().__init__(*judged, truth.trace, truth.next_trace, truth.token, truth.sampling_word)
        self._lie = (step, element, chunk)
        self._accuses = accuses
        self._truth = truth

    def vector(self, i: int) -> Vector:
        step, element, _ = self._lie
        last = i == len(self.instructions) - 1
        if i != step and not (last and self._accuses):
            return self._truth.vector(i)
        if i not in self._vectors:
            value = self._truth.vector(i).copy()
            if last:
                value[0] = int(self._accuses)
            else:
                value[element] += 1
            self._vectors[i] = value
        return self._vectors[i]

    def steps(self) -> list[bytes]:
        roots = list(self._truth.steps())
        roots[self._lie[0]] = self.tree(self._lie[0]).root
        if self._accuses:
            roots[-1] = WRONG
        return roots

    def chunk_sums(self, i: int, e: int) -> list[int]:
        sums = list(self._truth.chunk_sums(i, e))
        if (i, e) == self._lie[:2]:
            ins = self.instructions[i]
            # finish(sum + 2^a) = finish(sum) + 1; a maximum must move all its chunks' maximum.
            if ins.op == Op.MAX:
                sums[self._lie[2]] = max(sums) + 1
            else:
                sums[self._lie[2]] += 1 << ins.a if ins.op in (Op.LINEAR, Op.LOGIT) else 1
        return sums
