"""Served rows of the requests in flight, and the hashes of their leaves as they come: tensors side by side in one
array, whatever the batching, so that a microbatch costs one copy and one call of the hasher and not one for each
tensor or request.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.referee.codec import BLOCK, TILE_COLUMNS
from verifier.sha256 import HASH_BYTES, Bytes, roots, row_leaf_hashes
from verifier.trace import is_tiled, tile_leaf_hashes
from worker.batch import Batch

FIRST_ROOM = 256  # rows; arrays double from here
RESERVED_BYTES = 2**28  # of an array whose size is foreseen; memory is taken only as rows come

Bits = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]


class Ledger:
    """Rows live in slots, which are used again once their request is taken. Not for two threads at once."""

    def __init__(self, foreseen: int = 0) -> None:
        """foreseen: rows, if all requests are in flight together."""
        self._foreseen = foreseen
        self._slots: dict[int, list[Slots]] = {}
        self._others = np.empty(0, np.int64)  # by slot: requests that have it besides one
        self._free = np.empty(0, np.int64)
        self._room = 0
        self._sheets: list[_Sheet] = []

    @property
    def held_bytes(self) -> int:
        """Of the arrays, in use or not."""
        return sum(sheet.rows.nbytes + sheet.hashes.nbytes for sheet in self._sheets)

    def __contains__(self, request: int) -> bool:
        return request in self._slots

    def positions(self, request: int) -> int:
        return sum(map(len, self._slots.get(request, [])))

    def add(self, batch: Batch, tensors: Mapping[str, Bits]) -> int:
        """One microbatch: raw bits [rows, width] by key, the same keys each time; a request's rows come in order.

        Returns the largest of the floats, as its bits without the sign.
        """
        self._sheets = self._sheets or _sheets(tensors)
        slots = self._take_slots(batch.rows)
        for piece, span in batch.spans():
            self._slots.setdefault(piece.request, []).append(slots[span])
        for sheet in self._sheets:
            sheet.grow(self._room)
        return max(sheet.put(slots, tensors) for sheet in self._sheets)

    def share(self, request: int, donor: int, count: int) -> None:
        """The first `count` rows of `donor`, with their hashes, are the first of `request` too. Raises KeyError."""
        slots = np.concatenate(self._slots[donor])
        self._slots[donor] = [slots]
        self._slots[request] = [slots[:count]]
        self._others[slots[:count]] += 1

    def rows(self, request: int, key: str, count: int) -> Bits:
        """The first `count` rows of one tensor, [count, width]. Raises KeyError."""
        slots = np.concatenate(self._slots[request])[:count]
        return next(
            sheet.rows[slots, sheet.columns[sheet.keys.index(key)]] for sheet in self._sheets if key in sheet.keys
        )

    def take(self, request: int) -> tuple[dict[str, Bits], dict[str, bytes]]:
        """(rows [positions, width], roots) by key; the request is gone then. Raises KeyError."""
        slots = np.concatenate(self._slots.pop(request))
        arrays: dict[str, Bits] = {}
        leaves: dict[str, Bytes] = {}
        for sheet in self._sheets:
            arrays |= sheet.take(slots)
            leaves |= sheet.leaves(slots)
        kept = self._others[slots] > 0
        self._others[slots[kept]] -= 1
        self._free = np.concatenate([self._free, slots[~kept]])
        return arrays, _roots(leaves)

    def _take_slots(self, count: int) -> Slots:
        if count > len(self._free):
            widest = max(sheet.columns[-1].stop * sheet.rows.itemsize for sheet in self._sheets)
            first = max(FIRST_ROOM, min(self._foreseen, RESERVED_BYTES // widest))
            room = max(first, 2 * self._room, self._room + count)
            self._free = np.concatenate([self._free, np.arange(self._room, room)])
            self._others = _grown(self._others, room)
            self._others[self._room :] = 0
            self._room = room
        taken, self._free = self._free[:count], self._free[count:]
        return taken


class _Sheet:
    """Tensors side by side: rows [slots, columns], and, but for those in tiles, the hashes of their leaves
    [slots, leaves of a row, 32]. A tile spans positions: v's are hashed when all are there.
    """

    def __init__(self, keys: Sequence[str], tensors: Mapping[str, Bits]) -> None:
        """keys: of tensors whose widths are whole leaves, or all the same; in tiles all of them or none."""
        self.keys, self.tiled = keys, is_tiled(keys[0])
        self._cut = int(np.gcd.reduce([tensors[key].shape[1] for key in keys]))  # leaves begin anew at least so often
        unit = TILE_COLUMNS if self.tiled else BLOCK
        columns = np.cumsum([0] + [tensors[key].shape[1] for key in keys])
        across = np.cumsum([0] + [-(-tensors[key].shape[1] // unit) for key in keys])
        self.columns = [slice(*pair) for pair in pairwise(columns)]
        self.across = [slice(*pair) for pair in pairwise(across)]
        self.rows: Bits = np.empty((0, columns[-1]), tensors[keys[0]].dtype)
        self.hashes: Bytes = np.empty((0, 0 if self.tiled else across[-1], HASH_BYTES), np.uint8)
        self.loose = self.rows  # where rows are joined that go to slots here and there

    def grow(self, room: int) -> None:
        if len(self.rows) < room:
            self.rows, self.hashes = _grown(self.rows, room), _grown(self.hashes, room)

    def put(self, slots: Slots, tensors: Mapping[str, Bits]) -> int:
        """Returns what Ledger.add does."""
        first, count = int(slots[0]), len(slots)
        in_a_row = int(slots[-1]) - first == count - 1 and bool((np.diff(slots) == 1).all())
        if not in_a_row and len(self.loose) < count:
            self.loose = np.empty((count, self.rows.shape[1]), self.rows.dtype)
        joined = self.rows[first : first + count] if in_a_row else self.loose[:count]
        np.concatenate([tensors[key] for key in self.keys], axis=1, out=joined)
        if not in_a_row:
            self.rows[slots] = joined
        if not self.tiled:
            hashes = row_leaf_hashes(joined.reshape(-1, self._cut), BLOCK).reshape(count, -1, HASH_BYTES)
            self.hashes[slice(first, first + count) if in_a_row else slots] = hashes
        return _largest(joined)

    def take(self, slots: Slots) -> dict[str, Bits]:
        return {key: self.rows[slots, columns] for key, columns in zip(self.keys, self.columns, strict=True)}

    def leaves(self, slots: Slots) -> dict[str, Bytes]:
        """Hashes [n, 32] of each tensor's leaves."""
        if self.tiled:
            hashes = tile_leaf_hashes(self.rows[slots]).reshape(-1, self.across[-1].stop, HASH_BYTES)
        else:
            hashes = self.hashes[slots]
        return {
            key: hashes[:, across].reshape(-1, HASH_BYTES) for key, across in zip(self.keys, self.across, strict=True)
        }


def _sheets(tensors: Mapping[str, Bits]) -> list[_Sheet]:
    """Rows of whole leaves share one, tiles of whole columns another; the others those of their width."""
    shared: dict[object, list[str]] = {}
    for key, rows in tensors.items():
        tiled, width = is_tiled(key), rows.shape[1]
        whole = width % (TILE_COLUMNS if tiled else BLOCK) == 0
        shared.setdefault((tiled, 0 if whole else key if tiled else width), []).append(key)
    return [_Sheet(keys, tensors) for keys in shared.values()]


def _largest(rows: Bits) -> int:
    """Two reductions that copy nothing: over the positive floats, and over the negative ones."""
    sign = 1 << (8 * rows.itemsize - 1)
    positive = int(rows.view(np.int16 if rows.itemsize == 2 else np.int32).max())
    return max(positive, int(rows.max()) - sign, 0)


def _roots(leaves: Mapping[str, Bytes]) -> dict[str, bytes]:
    """Trees of one size climb together."""
    sizes: dict[int, list[str]] = {}
    for key, hashes in leaves.items():
        sizes.setdefault(len(hashes), []).append(key)
    return {
        key: bytes(root)
        for keys in sizes.values()
        for key, root in zip(keys, roots(np.stack([leaves[key] for key in keys])), strict=True)
    }


def _grown(array: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    grown = np.empty((room, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
