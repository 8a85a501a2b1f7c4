"""Served rows of the requests in flight: on their way to the files of their traces as they come, the hashes of their
leaves kept. Tensors lie side by side in one array, whatever the batching, so that a microbatch costs one copy and one
call of the hasher and not one for each tensor, and a request one write.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.program import ModelShape
from verifier.referee.codec import BLOCK, TILE_COLUMNS
from verifier.safetensors_file import GrowingFile
from verifier.sha256 import HASH_BYTES, Bytes, roots, row_leaf_hashes
from verifier.trace import BESIDE, is_tiled, stage_metadata, tile_leaf_hashes
from worker.batch import Batch

Bits = npt.NDArray[Any]


@dataclass(frozen=True)
class Taken:
    """A request that is done. roots: by tensor; file: of its trace, still to be published; without one, `arrays` are
    the trace.
    """

    positions: int
    roots: Mapping[str, bytes]
    file: GrowingFile | None
    arrays: Mapping[str, Bits]


class Ledger:
    """Rows of the first sheet are in their request's file, those of the others in memory: v's, and those of a model
    whose tensors aren't whole leaves. Not for two threads at once. Each method raises OSError.
    """

    def __init__(self, shape: ModelShape, first_layer: int, end_layer: int, path: Callable[[int], Path] | None) -> None:
        """path: where the trace of a request is to be; None: all rows stay in memory."""
        self._dtype, self._path = shape.served_dtype, path
        self._metadata = stage_metadata(first_layer, end_layer)
        self._sheets: list[_Sheet] = []
        self._kept: dict[int, _Kept] = {}

    @property
    def held_bytes(self) -> int:
        """In memory, of the requests in flight."""
        arrays = (array for kept in self._kept.values() for array in (*kept.rows, *kept.hashes))
        return sum(array.first(array.count).nbytes for array in arrays if isinstance(array, _Growing))

    def __contains__(self, request: int) -> bool:
        return request in self._kept

    def add(self, batch: Batch, tensors: Mapping[str, Bits]) -> int:
        """One microbatch: raw bits [rows, width] by key, the same keys each time; a request's rows come in order.

        Returns the largest of the floats, as its bits without the sign.
        """
        self._sheets = self._sheets or _sheets(tensors)
        joined = [sheet.join(tensors, batch.rows) for sheet in self._sheets]
        hashes = [sheet.hash(rows) for sheet, rows in zip(self._sheets, joined, strict=True)]
        for piece, span in batch.spans():
            kept = self._kept.get(piece.request) or self._open(piece.request)
            kept.add([rows[span] for rows in joined], [found[span] for found in hashes])
        return max(map(_largest, joined))

    def share(self, request: int, donor: int, count: int) -> None:
        """The first `count` rows of `donor`, with their hashes, are the first of `request` too. Raises KeyError."""
        kept = self._kept[donor]
        rows = [array.first(count) for array in kept.rows]
        self._open(request).add(rows, [array.first(count) for array in kept.hashes])

    def rows(self, request: int, key: str, count: int) -> Bits:
        """The first `count` rows of one tensor, [count, width]. Raises KeyError."""
        kept = self._kept[request]
        at, sheet = next((i, sheet) for i, sheet in enumerate(self._sheets) if key in sheet.columns)
        return kept.rows[at].first(count)[:, sheet.columns[key]]

    def take(self, request: int) -> Taken:
        """The request is gone then. Raises KeyError."""
        kept = self._kept.pop(request)
        first, *others = kept.rows
        leaves: dict[str, Bytes] = {}
        for sheet, rows, hashes in zip(self._sheets, kept.rows, kept.hashes, strict=True):
            # A tile spans positions: v's are hashed when all are there.
            found = tile_leaf_hashes(rows.first(rows.count)) if sheet.tiled else hashes.first(hashes.count)
            leaves |= sheet.leaves(found)
        roots = _roots(leaves)
        if isinstance(first, GrowingFile):
            first.finish(array.first(array.count) for array in others)
            return Taken(first.count, roots, first, {})
        arrays = {
            key: array.first(array.count)[:, columns]
            for sheet, array in zip(self._sheets, kept.rows, strict=True)
            for key, columns in sheet.columns.items()
        }
        return Taken(first.count, roots, None, arrays)

    def _open(self, request: int) -> "_Kept":
        rows: list[_Growing | GrowingFile] = [_Growing() for _ in self._sheets]
        if self._path is not None:
            columns = {BESIDE.join(sheet.columns): sheet.width for sheet in self._sheets}
            rows[0] = GrowingFile(self._path(request), self._dtype, columns, self._metadata)
        kept = self._kept[request] = _Kept(rows, [_Growing() for _ in self._sheets])
        return kept


class _Sheet:
    """Tensors side by side, whose leaves are hashed together."""

    def __init__(self, keys: Sequence[str], tensors: Mapping[str, Bits]) -> None:
        """keys: of tensors whose widths are whole leaves, or all the same; in tiles all of them or none."""
        self.tiled = is_tiled(keys[0])
        widths = [tensors[key].shape[1] for key in keys]
        self._cut = int(np.gcd.reduce(widths))  # leaves begin anew at least so often
        unit = TILE_COLUMNS if self.tiled else BLOCK
        self.width = sum(widths)
        self.columns = dict(zip(keys, _slices(widths), strict=True))
        self._across = dict(zip(keys, _slices([-(-width // unit) for width in widths]), strict=True))
        self._joined: Bits = np.empty((0, self.width), tensors[keys[0]].dtype)

    def join(self, tensors: Mapping[str, Bits], count: int) -> Bits:
        """[count, width], valid until the next call."""
        if len(self._joined) < count:
            self._joined = np.empty((count, self.width), self._joined.dtype)
        return np.concatenate([tensors[key] for key in self.columns], axis=1, out=self._joined[:count])

    def hash(self, rows: Bits) -> Bytes:
        """Hashes [rows, leaves of a row, 32]; of tiles none."""
        if self.tiled:
            return np.empty((len(rows), 0, HASH_BYTES), np.uint8)
        return row_leaf_hashes(rows.reshape(-1, self._cut), BLOCK).reshape(len(rows), -1, HASH_BYTES)

    def leaves(self, hashes: Bytes) -> dict[str, Bytes]:
        """Hashes [n, 32] of each tensor's leaves, from those of all, in rows of leaves that lie side by side."""
        hashes = hashes.reshape(-1, list(self._across.values())[-1].stop, HASH_BYTES)
        return {key: hashes[:, across].reshape(-1, HASH_BYTES) for key, across in self._across.items()}


class _Growing:
    """An array to which rows are added."""

    def __init__(self) -> None:
        self.count = 0  # of rows
        self._rows: Bits = np.empty(0)

    def add(self, rows: Bits) -> None:
        before, self.count = self.count, self.count + len(rows)
        if self.count > len(self._rows):
            grown = np.empty((max(self.count, 2 * before), *rows.shape[1:]), rows.dtype)
            if before:
                grown[:before] = self._rows[:before]
            self._rows = grown
        self._rows[before : self.count] = rows

    def first(self, count: int) -> Bits:
        return self._rows[:count]


@dataclass(frozen=True)
class _Kept:
    """Of one request, by sheet."""

    rows: Sequence[_Growing | GrowingFile]
    hashes: Sequence[_Growing]

    def add(self, rows: Sequence[Bits], hashes: Sequence[Bytes]) -> None:
        for array, new in zip((*self.rows, *self.hashes), (*rows, *hashes), strict=True):
            array.add(new)


def _slices(sizes: Iterable[int]) -> list[slice]:
    return [slice(*pair) for pair in pairwise(np.cumsum([0, *sizes]).tolist())]


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
