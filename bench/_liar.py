"""Dishonest players: a party that lies at one or more places of a program and at a chosen depth of the descent.

A lie is consistent above its place - sums, leaf, nodes, root and, if asked for, all later instructions follow from it -
and everything beneath it is true. So a game against it goes exactly there, and who lies has nothing to say afterwards
but nonsense: `Bluffer` says it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

import numpy as np

from verifier.canonical import Case, Vector
from verifier.game import (
    HASH_BYTES,
    SUM_BYTES,
    WRONG,
    Game,
    Move,
    NothingWrong,
    Phase,
    Proof,
    next_level,
    quoted,
    read_roots,
    solve,
    span,
    sum_range,
)
from verifier.referee.codec import slices, vector_leaf_elements
from verifier.referee.ops import Op
from verifier.referee.referee import padded
from verifier.referee.tree import Tree, depth, node, nodes_at
from verifier.sha256 import HashTree


class Depth(IntEnum):
    """How deep a lie lies: what is false there is the last false thing; its children are true."""

    ROOT = 0  # the root of an instruction's vector
    NODE = 1  # a node of the first list beneath it
    LOW_NODE = 2  # a leaf's hash
    ELEMENT = 3  # an element; its sums are true
    SUM = 4  # an entry of the first list of partial sums
    CHUNK = 5  # the sum of one chunk; an element's value, where one step yields it


@dataclass(frozen=True)
class Lie:
    """One false place. delta: by how much the element is off (not 0)."""

    step: int
    element: int = 0
    chunk: int = 0
    delta: int = 1
    depth: Depth = Depth.CHUNK


class Liar(Case):
    """The truth of a piece but for some lies, and for the verdict that is claimed."""

    def __init__(self, truth: Case, lies: Sequence[Lie], wrong: bool, follows: bool = False) -> None:
        """wrong: the claimed verdict; follows: later instructions are computed from the false vectors.

        Rationale: what follows is never looked at, for the first false child decides where a game goes; leaving it
        out saves a liar's time, not its lock.
        """
        judged = (truth.model, truth.weights, truth.profile, truth.segment)
        super().__init__(*judged, truth.trace, truth.token, truth.sampling_word)
        self.truth, self.wrong, self.follows = truth, wrong, follows
        self._last = len(truth.instructions) - 1
        self._lies: dict[int, list[Lie]] = {}
        for lie in lies:
            self._lies.setdefault(lie.step, []).append(lie)
        self._first = min(self._lies, default=self._last)

    def vector(self, i: int) -> Vector:
        if not self._differs(i):
            return self.truth.vector(i)
        if i not in self._vectors:
            own = self.follows and i > self._first
            values = (self._compute(self.instructions[i]) if own else self.truth.vector(i)).copy()
            for lie in self._told(i, Depth.ELEMENT):
                values[lie.element] += lie.delta
            if i == self._last:
                values[0] = int(self.wrong)
            self._vectors[i] = values
        return self._vectors[i]

    def tree(self, i: int) -> HashTree:
        if not self._differs(i):
            return self.truth.tree(i)
        if i not in self._trees:
            tree = super().tree(i)
            for at in (Depth.NODE, Depth.LOW_NODE):
                for lie in self._told(i, at, at):
                    level = next_level(tree.depth, tree.depth) if at == Depth.NODE and tree.depth else 0
                    leaf = lie.element // vector_leaf_elements(bool(self.instructions[i].wide))
                    tree = _Bent(tree, level, leaf >> level)
            self._trees[i] = tree
        return self._trees[i]

    def steps(self) -> list[bytes]:
        roots = [self.tree(i).root for i in range(len(self.instructions))]
        for i in range(len(roots)):
            if self._told(i, Depth.ROOT, Depth.ROOT):
                roots[i] = _false(roots[i])
        if self.wrong:
            roots[-1] = WRONG
        return roots

    def chunk_sums(self, i: int, e: int) -> list[int]:
        sums = list(super().chunk_sums(i, e) if self.follows else self.truth.chunk_sums(i, e))
        for lie in self._told(i, Depth.CHUNK):
            if lie.element == e and len(sums) > 1:
                self._make_up(i, e, sums, lie.chunk % len(sums))
        return sums

    def sums(self, i: int, e: int, first_chunk: int, end_chunk: int) -> list[int]:
        found = super().sums(i, e, first_chunk, end_chunk)
        whole = end_chunk - first_chunk == self.chunks(i)
        for lie in self._told(i, Depth.SUM, Depth.SUM):
            if whole and lie.element == e and len(found) > 1:
                self._make_up(i, e, found, lie.chunk % self.chunks(i) // span(self.chunks(i)))
        return found

    def _make_up(self, i: int, e: int, sums: list[int], at: int) -> None:
        """Changes sum `at` so that all of them yield the false element."""
        instruction, false = self.instructions[i], int(self.vector(i)[e])
        if instruction.op == Op.MAX:
            sums[:] = [false if c == at else min(value, false) for c, value in enumerate(sums)]
        else:
            shift = instruction.a if instruction.op in (Op.LINEAR, Op.LOGIT) else 0
            sums[at] += (false << shift) - sum(sums)

    def _told(self, i: int, least: Depth, most: Depth = Depth.CHUNK) -> list[Lie]:
        return [lie for lie in self._lies.get(i, ()) if least <= lie.depth <= most]

    def _differs(self, i: int) -> bool:
        return i in self._lies or i == self._last or (self.follows and i > self._first)


class _Bent(HashTree):
    """A tree with one node that is no hash of what lies beneath."""

    def __init__(self, true: HashTree, level: int, index: int) -> None:
        self._levels = [true.nodes(k) for k in range(true.depth + 1)]
        told = _false(bytes(self._levels[level][index]))
        for k in range(level, true.depth + 1):
            self._levels[k] = self._levels[k].copy()
            self._levels[k][index] = np.frombuffer(told, dtype=np.uint8)
            pair = self._levels[k][index & ~1 : (index | 1) + 1]
            told = node(bytes(pair[0]), bytes(pair[1])) if len(pair) == 2 else bytes(pair[0])
            index >>= 1


def _false(digest: bytes) -> bytes:
    """Another hash, of nothing."""
    return sha256(b"a lie" + digest).digest()


def classes(truth: Case, step: int) -> dict[str, tuple[int, int]]:
    """(element, chunk) of each class that instruction `step` has: ends and both sides of every border that the law
    knows, of leaves, rows (heads), groups of heads, positions and lists of sums.
    """
    ins, t = truth.instructions[step], truth.segment.position
    n, chunks = len(truth.vector(step)), truth.chunks(step)
    per_leaf = vector_leaf_elements(bool(ins.wide))
    row = padded(t) if ins.cols == 0 else ins.cols
    borders = {"leaf": per_leaf, "last leaf": (n - 1) // per_leaf * per_leaf}
    if row < n:
        borders |= {"row": row, "last row": n - row}
        if ins.op in (Op.SCORE, Op.WSUM):
            borders["group"] = row * ins.b
    if ins.op in (Op.SCORE, Op.EXP):
        borders |= {"padding": t + 1, "last padding": n - row + t + 1}
    elements = {"first": 0, "last": n - 1}
    for name, border in borders.items():
        if 0 < border < n:
            elements |= {f"before {name}": border - 1, name: border}
    listed = span(chunks)
    sums = {"first chunk": 0, "middle chunk": chunks // 2, "last chunk": chunks - 1} if chunks > 1 else {}
    if listed > 1:
        sums |= {"before list": listed - 1, "list": listed}
    order = sorted(set(sums.values())) or [0]
    found = {name: (e, order[k % len(order)]) for k, (name, e) in enumerate(elements.items())}
    return found | {name: (n - 1, c) for name, c in sums.items()}


def places(truth: Case, step: int) -> list[tuple[int, int]]:
    """(element, chunk) of all classes."""
    return sorted(set(classes(truth, step).values()))


def depths(truth: Case, step: int) -> list[Depth]:
    """Those at which this instruction's vector has something to lie about."""
    levels, chunks = depth(truth.leaves(step)), truth.chunks(step)
    found = [Depth.ROOT, Depth.CHUNK]
    if levels:
        found.append(Depth.LOW_NODE)
        if next_level(levels, levels):
            found.append(Depth.NODE)
    if chunks > 1:
        found.append(Depth.ELEMENT)
        if span(chunks) > 1:
            found.append(Depth.SUM)
    return sorted(found)


def every_lie(truth: Case) -> Iterator[Lie]:
    """Each instruction, each class of element, each depth: one lie a place that differs from the others."""
    for step in range(len(truth.instructions)):
        pairs = places(truth, step)
        for at in depths(truth, step):
            chosen = {Depth.ROOT: pairs[:1], Depth.NODE: [pairs[0], pairs[-1]]}.get(at, pairs)
            yield from (Lie(step, element, chunk, _delta(truth, step), at) for element, chunk in chosen)


def _delta(truth: Case, step: int) -> int:
    return -1 if truth.instructions[step].op == Op.MAX else 1


# ---- who plays


class Solver:
    """Says what follows from its case, which it takes for the truth: an honest player, or a liar until it is caught."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Move | Proof | None:
        try:
            return solve(game, posted, self.case, steps)
        except NothingWrong:
            return None


class Bluffer(Solver):
    """A liar that never gives up: nonsense in the right form wherever its case has no answer, or everywhere."""

    def __init__(self, case: Case, seed: int, always: bool = False) -> None:
        super().__init__(case)
        self._random = np.random.default_rng(seed)
        self._always = always

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Move | Proof | None:
        found = None if self._always else super().answer(game, posted, steps)
        return found or self.nonsense(game, posted, steps)

    def nonsense(self, game: Game, posted: bytes, steps: bytes) -> Move | Proof:
        """A move with a random pick and random content; where one step is left, a proof of a random entry."""
        case, i = self.case, game.step
        match game.phase:
            case Phase.STEPS:
                i = int(self._random.integers(0, len(case.instructions)))
                below = self._beneath(i, depth(case.leaves(i)), 0)
                return Move(case.record(i), case.record_proof(i), i, posted, below)
            case Phase.NODES:
                theirs = slices(posted, HASH_BYTES)
                pick = int(self._random.integers(0, len(theirs)))
                below = self._beneath(i, game.level, game.index + pick)
                return Move(case.record(i), tuple(Tree(theirs).prove(pick)), pick, theirs[pick], below)
        wide = bool(case.instructions[i].wide)
        size = SUM_BYTES if game.phase == Phase.SUMS or wide else 8
        pick = int(self._random.integers(0, len(posted) // size))
        if game.phase == Phase.ELEMENTS:
            element, first, end = game.index * vector_leaf_elements(wide) + pick, 0, case.chunks(i)
        else:
            element, (first, end) = game.index, sum_range(game.first_chunk, game.end_chunk, pick)
        if end - first == 1:
            roots = tuple(read_roots(case.instructions[i], slices(steps, HASH_BYTES)))
            openings = tuple(case.openings(i, element, first))
            return Proof(case.model, case.record(i), pick, *quoted(posted, pick, size), roots, openings)
        entries = -(-(end - first) // span(end - first))
        piece, hashes = quoted(posted, pick, size)
        return Move(case.record(i), hashes, pick, piece, self._random.bytes(SUM_BYTES * entries))

    def _beneath(self, i: int, level: int, index: int) -> bytes:
        """Random bytes as long as the list beneath node `index` of `level`."""
        case = self.case
        if level == 0:
            return self._random.bytes(len(case.leaf(i, index)))
        down = next_level(depth(case.leaves(i)), level)
        end = min((index + 1) << (level - down), nodes_at(case.leaves(i), down))
        return self._random.bytes(HASH_BYTES * (end - (index << (level - down))))
