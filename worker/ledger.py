"""Served rows of the requests in flight: on their way to the files of their traces as they come, the hashes of their
leaves kept. Tensors lie side by side in one array, whatever the batching, and rows wait there until there are some of
each request: a microbatch costs one copy, and the hasher and the files are called once for many rows of all tensors.
Each such call needs the interpreter, which serving needs as well.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from worker.errors import JobFailed

Bits = npt.NDArray[Any]

AT_ONCE = 8 * 2**20  # bytes of rows that wait, if there is more than one microbatch


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
        self._waiting: list[Batch] = []  # whose rows lie behind one another in each sheet
        self._rows = 0  # of these

    @property
    def held_bytes(self) -> int:
        """In memory, of the requests in flight, besides the rows that wait."""
        arrays = (array for kept in self._kept.values() for array in (*kept.rows, *kept.hashes))
        return sum(array.first(array.count).nbytes for array in arrays if isinstance(array, _Growing))

    def add(self, batch: Batch, tensors: Mapping[str, Bits]) -> int:
        """One microbatch: raw bits [rows, width] by key, the same keys each time; a request's rows come in order.

        Returns the largest of the floats, as its bits without the sign.
        """
        self._sheets = self._sheets or _sheets(tensors)
        if (self._rows + batch.rows) * sum(sheet.row_bytes for sheet in self._sheets) > AT_ONCE:
            self._flush()
        joined = [sheet.join(tensors, self._rows, batch.rows) for sheet in self._sheets]
        self._waiting.append(batch)
        self._rows += batch.rows
        return max(map(_largest, joined))

    def share(self, request: int, donor: int, count: int) -> None:
        """The first `count` rows of `donor`, with their hashes, are the first of `request` too. Raises KeyError."""
        self._flush()
        kept = self._kept[donor]
        rows = [array.first(count) for array in kept.rows]
        self._open(request).add(rows, [array.first(count) for array in kept.hashes])

    def rows(self, request: int, key: str, count: int) -> Bits:
        """The first `count` rows of one tensor, [count, width]. Raises KeyError."""
        self._flush()
        kept = self._kept[request]
        at, sheet = next((i, sheet) for i, sheet in enumerate(self._sheets) if key in sheet.columns)
        return kept.rows[at].first(count)[:, sheet.columns[key]]

    def take(self, requests: Iterable[int]) -> Iterator[Taken]:
        """Each in turn; it is gone then. Raises JobFailed for one that has no rows.

        Trees of one size climb together, those of many requests too: of as many as have AT_ONCE bytes of hashes.
        """
        self._flush()
        group: list[_Kept] = []
        held = 0
        for request in requests:
            kept = self._kept.pop(request, None)
            if kept is None:
                raise JobFailed(f"request {request} ended without a single position")
            size = sum(array.first(array.count).nbytes for array in kept.hashes)
            if group and held + size > AT_ONCE:
                yield from self._taken(group)
                group, held = [], 0
            group.append(kept)
            held += size
        yield from self._taken(group)

    def _taken(self, group: Sequence["_Kept"]) -> Iterator[Taken]:
        for kept, tops in zip(group, _roots([self._leaves(kept) for kept in group]), strict=True):
            first, *others = kept.rows
            if isinstance(first, GrowingFile):
                first.finish(array.first(array.count) for array in others)
                yield Taken(first.count, tops, first, {})
                continue
            arrays = {
                key: array.first(array.count)[:, columns]
                for sheet, array in zip(self._sheets, kept.rows, strict=True)
                for key, columns in sheet.columns.items()
            }
            yield Taken(first.count, tops, None, arrays)

    def _leaves(self, kept: "_Kept") -> dict[str, Bytes]:
        leaves: dict[str, Bytes] = {}
        for sheet, rows, hashes in zip(self._sheets, kept.rows, kept.hashes, strict=True):
            # A tile spans positions: v's are hashed when all are there.
            found = tile_leaf_hashes(rows.first(rows.count)) if sheet.tiled else hashes.first(hashes.count)
            leaves |= sheet.leaves(found)
        return leaves

    def _flush(self) -> None:
        """Rows that wait go where their requests' rows are."""
        batches, self._waiting, count, self._rows = self._waiting, [], self._rows, 0
        if not batches:
            return
        if len(batches) == 1:
            spans, order = [(piece.request, span) for piece, span in batches[0].spans()], None
        else:
            owners = np.concatenate([batch.owners() for batch in batches])
            order = np.argsort(owners, kind="stable")
            requests, firsts = np.unique(owners[order], return_index=True)
            ends = [*firsts[1:].tolist(), count]
            spans = [(r, slice(*pair)) for r, *pair in zip(requests.tolist(), firsts.tolist(), ends, strict=True)]
        ordered = [sheet.ordered(count, order) for sheet in self._sheets]
        hashes = [sheet.hash(rows) for sheet, rows in zip(self._sheets, ordered, strict=True)]
        for request, span in spans:
            kept = self._kept.get(request) or self._open(request)
            kept.add([rows[span] for rows in ordered], [found[span] for found in hashes])

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
        self._joined = _Growing()
        self.row_bytes = self.width * tensors[keys[0]].itemsize

    def join(self, tensors: Mapping[str, Bits], first: int, count: int) -> Bits:
        """Puts [count, width] behind the first rows that wait. Returns it, valid until the next call."""
        room = self._joined.room(first, first + count, (self.width,), next(iter(tensors.values())).dtype)
        return np.concatenate([tensors[key] for key in self.columns], axis=1, out=room)

    def ordered(self, count: int, order: npt.NDArray[np.int64] | None) -> Bits:
        """The rows that wait, [count, width], in some order or that of their coming."""
        rows = self._joined.first(count)
        return rows if order is None else rows[order]

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
        self.room(self.count, self.count + len(rows), rows.shape[1:], rows.dtype)[:] = rows

    def room(self, first: int, end: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Bits:
        """For rows first .. end - 1, behind which there are none."""
        self.count = end
        if end > len(self._rows):
            grown = np.empty((max(end, 2 * first), *shape), dtype)
            if first:
                grown[:first] = self._rows[:first]
            self._rows = grown
        return self._rows[first:end]

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


def _roots(requests: Sequence[Mapping[str, Bytes]]) -> list[dict[str, bytes]]:
    """Of each request's leaves, by tensor."""
    sizes: dict[int, list[tuple[int, str]]] = {}
    for i, leaves in enumerate(requests):
        for key, hashes in leaves.items():
            sizes.setdefault(len(hashes), []).append((i, key))
    found: list[dict[str, bytes]] = [{} for _ in requests]
    for trees in sizes.values():
        tops = roots(np.stack([requests[i][key] for i, key in trees]))
        for (i, key), root in zip(trees, tops, strict=True):
            found[i][key] = root.tobytes()
    return found
