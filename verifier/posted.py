"""One request's tensors at one stage as demands bring them to light: known in part, each part with its proof.

A PostedTrace is what a Case judges when nothing else was served; what is not known reads as zero, so whoever judges
asks first whether it is (`knows_row`).
"""

from collections.abc import Sequence

import numpy as np

from verifier.demand import Answer
from verifier.linear import Bits
from verifier.referee.codec import BLOCK, TILE_COLUMNS, TILE_ROWS
from verifier.referee.errors import IndexOutOfRange
from verifier.referee.tree import leaf, node
from verifier.shape import ModelShape
from verifier.trace import RequestTrace, is_tiled, tensor_keys, tensor_width


class NotPosted(ValueError):
    """A leaf that is asked for was not posted."""


class KnownTree:
    """The part of a tree that range proofs have shown. `add` believes: its caller has checked the root."""

    def __init__(self, count: int) -> None:
        """count: leaves of the whole tree, one or more."""
        self.count = count
        self._nodes: dict[tuple[int, int], bytes] = {}

    def add(self, first: int, hashes: Sequence[bytes], siblings: Sequence[bytes]) -> None:
        """Leaves from `first` on, with the siblings that root_of_range takes them with."""
        row, count, level, rest = list(hashes), self.count, 0, iter(siblings)
        while True:
            if count > 1 and first & 1:
                first -= 1
                row.insert(0, next(rest))
            if count > 1 and (first + len(row)) & 1 and first + len(row) < count:
                row.append(next(rest))
            self._nodes.update({(level, first + i): hash for i, hash in enumerate(row)})
            if count == 1:
                return
            above = [node(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
            row = [*above, row[-1]] if len(row) & 1 else above
            first, count, level = first >> 1, (count + 1) >> 1, level + 1

    def prove(self, first: int, n: int = 1) -> tuple[bytes, ...]:
        """As verifier.referee.tree.Tree.prove. Raises NotPosted, IndexOutOfRange."""
        if n < 1 or first < 0 or first + n > self.count:
            raise IndexOutOfRange(f"expected 1 or more leaves within {self.count}, got {n} from {first}")
        siblings, end, count, level = [], first + n, self.count, 0
        while count > 1:
            if first & 1:
                siblings.append(self._node(level, first - 1))
            if end & 1 and end < count:
                siblings.append(self._node(level, end))
            first, end, count, level = first >> 1, (end + 1) >> 1, (count + 1) >> 1, level + 1
        return tuple(siblings)

    def _node(self, level: int, index: int) -> bytes:
        try:
            return self._nodes[level, index]
        except KeyError:
            raise NotPosted(f"node {index} of level {level} was not posted") from None


class _Arrays(dict[str, Bits]):
    """Zeros until written; made when they are first asked for."""

    def __init__(self, shape: ModelShape, positions: int) -> None:
        super().__init__()
        self._shape, self._positions = shape, positions

    def __missing__(self, key: str) -> Bits:
        dtype = np.dtype(f"<u{self._shape.served_dtype.size}")
        # Untouched pages of a large allocation cost nothing.
        self[key] = np.zeros((self._positions, tensor_width(self._shape, key)), dtype)
        return self[key]


class PostedTrace(RequestTrace):
    """Openings come from what was posted; NotPosted where they cannot."""

    def __init__(self, shape: ModelShape, first_layer: int, end_layer: int, positions: int, root: bytes) -> None:
        """positions, root: as the trace node says."""
        self.shape, self.first_layer, self.end_layer = shape, first_layer, end_layer
        self.positions = positions
        self.keys = tensor_keys(shape, first_layer, end_layer)
        # What lies beyond the model's longest request no rule reads.
        self.arrays = _Arrays(shape, min(positions, shape.max_positions))
        self._root = root
        self._known: dict[str, set[int]] = {}
        self._trees_known: dict[str, KnownTree] = {}
        self._tops = KnownTree(len(self.keys))

    @property
    def tensors_root(self) -> bytes:
        return self._root

    def add(self, place: int, first: int, answer: Answer) -> None:
        """Takes in checked leaves of tensor `place`."""
        key = self.keys[place]
        tree = self._trees_known.setdefault(key, KnownTree(answer.grid.leaves))
        tree.add(first, [leaf(data) for data in answer.leaves], answer.siblings)
        self._tops.add(place, [leaf(answer.root)], answer.above)
        array, across = self.arrays[key], answer.grid.across
        for index, data in enumerate(answer.leaves, first):
            row, column = index // across * answer.grid.tall, index % across * answer.grid.wide
            part = array[row : row + answer.grid.tall, column : column + answer.grid.wide]
            part[:] = np.frombuffer(data, array.dtype).reshape(-1, part.shape[1])[: len(part)]
        self._known.setdefault(key, set()).update(range(first, first + len(answer.leaves)))

    def leaves_of(self, key: str, position: int) -> range:
        """The leaves that hold one position's row."""
        tall, wide = (TILE_ROWS, TILE_COLUMNS) if is_tiled(key) else (1, BLOCK)
        across = -(-tensor_width(self.shape, key) // wide)
        first = position // tall * across
        return range(first, first + across)

    def knows_row(self, key: str, position: int) -> bool:
        """Whether a whole row was posted."""
        return self._known.get(key, set()).issuperset(self.leaves_of(key, position))

    def _siblings(self, key: str, first: int, n: int) -> tuple[bytes, ...]:
        if key not in self._trees_known:
            raise NotPosted(f"nothing of {key} was posted")
        return (*self._trees_known[key].prove(first, n), *self._tops.prove(self.keys.index(key)))
