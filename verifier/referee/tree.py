"""SHA-256 trees (RFC 6962): leaves, nodes, range proofs and children lists (docs/canonical.md, "Trees").

A hash is 32 bytes. Level 0 is the leaves; an unpaired last node is carried up unchanged.
"""

from collections.abc import Sequence
from hashlib import sha256

from verifier.referee.errors import IndexOutOfRange, ProofLength


def leaf(data: bytes) -> bytes:
    """The hash of a leaf's bytes."""
    return sha256(b"\x00" + data).digest()


def node(left: bytes, right: bytes) -> bytes:
    """The hash above two neighbours."""
    return sha256(b"\x01" + left + right).digest()


def depth(count: int) -> int:
    """Levels above the leaves of a tree of count >= 1 leaves: ceil(log2 count)."""
    return (count - 1).bit_length()


def nodes_at(count: int, level: int) -> int:
    """Nodes at a level of a tree of count leaves: ceil(count / 2^level)."""
    return (count + (1 << level) - 1) >> level


def pair(hashes: Sequence[bytes]) -> list[bytes]:
    """The level above these nodes, of which the first has an even index."""
    above = [node(hashes[i], hashes[i + 1]) for i in range(0, len(hashes) - 1, 2)]
    return [*above, hashes[-1]] if len(hashes) & 1 else above


def fold(children: Sequence[bytes]) -> bytes:
    """The node above a children list. Raises IndexOutOfRange for an empty list."""
    if not children:
        raise IndexOutOfRange("expected at least one child, got none")
    level = list(children)
    while len(level) > 1:
        level = pair(level)
    return level[0]


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """The root of a tree of one or more leaf hashes. Raises IndexOutOfRange for none."""
    return fold(leaf_hashes)


def root_of_range(hashes: Sequence[bytes], first: int, count: int, siblings: Sequence[bytes]) -> bytes:
    """The root above the nodes first .. first + len(hashes) - 1 of a level with count nodes, using every sibling.

    Raises IndexOutOfRange (no hashes, or past the level's end) and ProofLength (too few or too many siblings).
    """
    top, used = root_of_range_used(hashes, first, count, siblings)
    if used != len(siblings):
        raise ProofLength(f"expected {used} siblings, got {len(siblings)}")
    return top


def root_of_range_used(hashes: Sequence[bytes], first: int, count: int, siblings: Sequence[bytes]) -> tuple[bytes, int]:
    """As root_of_range, but the proof may go on: returns the root and how many siblings it took."""
    if not hashes or first < 0 or first + len(hashes) > count:
        raise IndexOutOfRange(f"expected 1 or more nodes within {count}, got {len(hashes)} from {first}")
    level, used = list(hashes), 0
    while count > 1:
        if first & 1:
            level.insert(0, _sibling(siblings, used))
            used += 1
        end = first + len(level) - (first & 1)
        if end & 1 and end < count:
            level.append(_sibling(siblings, used))
            used += 1
        level = pair(level)
        first, count = first >> 1, (count + 1) >> 1
    return level[0], used


def _sibling(siblings: Sequence[bytes], index: int) -> bytes:
    if index >= len(siblings):
        raise ProofLength(f"expected more than {index} siblings, got {len(siblings)}")
    return siblings[index]


class Tree:
    """A whole tree in memory, to prove from."""

    def __init__(self, leaf_hashes: Sequence[bytes]) -> None:
        """leaf_hashes: one or more 32-byte hashes. Raises IndexOutOfRange for none."""
        if not leaf_hashes:
            raise IndexOutOfRange("expected at least one leaf, got none")
        self._levels = [list(leaf_hashes)]
        while len(self._levels[-1]) > 1:
            self._levels.append(pair(self._levels[-1]))

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    @property
    def count(self) -> int:
        """Leaves."""
        return len(self._levels[0])

    @property
    def depth(self) -> int:
        """Levels above the leaves."""
        return len(self._levels) - 1

    def nodes(self, level: int) -> list[bytes]:
        """All hashes of a level, 0 the leaves."""
        return self._levels[level]

    def children(self, level: int, parent_level: int, parent: int) -> list[bytes]:
        """The nodes at `level` beneath node `parent` of `parent_level`. Raises IndexOutOfRange."""
        if not (0 <= level <= parent_level <= self.depth and 0 <= parent < len(self._levels[parent_level])):
            raise IndexOutOfRange(f"expected a node of {self.depth + 1} levels, got {parent} of level {parent_level}")
        up = parent_level - level
        return self._levels[level][parent << up : (parent + 1) << up]

    def prove(self, first: int, n: int = 1) -> list[bytes]:
        """The siblings that root_of_range wants for the leaves first .. first + n - 1. Raises IndexOutOfRange."""
        if n < 1 or first < 0 or first + n > self.count:
            raise IndexOutOfRange(f"expected 1 or more leaves within {self.count}, got {n} from {first}")
        siblings, end = [], first + n
        for level in self._levels[:-1]:
            if first & 1:
                siblings.append(level[first - 1])
            if end & 1 and end < len(level):
                siblings.append(level[end])
            first, end = first >> 1, (end + 1) >> 1
        return siblings
