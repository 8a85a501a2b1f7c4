"""Served tensors of one request at one stage: their trees and openings (docs/canonical.md, "Served tensors").

Arrays hold raw bits [T, width], uint16 or uint32 by the model's served dtype. A tensor's key is "LAYER.NAME"
("3.attn_out"), or "out".
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np

from verifier.program import ModelShape
from verifier.referee.codec import BLOCK, TILE_COLUMNS, TILE_ROWS, Opening, Tensor, Trace
from verifier.referee.errors import IndexOutOfRange
from verifier.safetensors_file import Bits, MalformedFile, SafetensorsFile, write
from verifier.sha256 import HASH_BYTES, Bytes, HashTree, leaf_hashes, row_leaf_hashes

CACHED_BYTES = 1 << 18
# Tiles are copied before they are hashed; so much at a time stays in the second-level cache.
BESIDE = ","  # between the keys of tensors that a file holds side by side
TREES_KEPT = 16
# A tree takes an eighth of its tensor; a dispute walks through the tensors of one layer, seven at most.


class WrongTrace(ValueError):
    """Tensors that do not fit the model or one another. The message names the tensor."""


def tensor_key(layer: int, tensor: Tensor) -> str:
    """The key of a layer's tensor; `out` has no layer."""
    return "out" if tensor == Tensor.OUT else f"{layer}.{tensor.name.lower()}"


def tensor_keys(shape: ModelShape, first_layer: int, end_layer: int) -> list[str]:
    """A stage's keys in the order of its tensors' tree."""
    keys = [tensor_key(layer, kind) for layer in range(first_layer, end_layer) for kind in list(Tensor)[:6]]
    return [*keys, "out"] if end_layer == shape.layers else keys


def tensor_width(shape: ModelShape, key: str) -> int:
    """Columns of a tensor."""
    name = key.rpartition(".")[2]
    if name == "q":
        return shape.query_width
    return shape.kv_width if name in ("k", "v") else shape.hidden


def stage_metadata(first_layer: int, end_layer: int) -> dict[str, str]:
    """What the file of a trace tells besides its tensors."""
    return {"first_layer": str(first_layer), "end_layer": str(end_layer)}


def is_tiled(key: str) -> bool:
    """Whether a tensor's leaves are tiles of 8 positions by 32 columns: v's are."""
    return key.rpartition(".")[2] == "v"


def tile_leaf_hashes(rows: Bits) -> Bytes:
    """Hashes of the tiles of v: bands of 8 rows, the last lower, cut into tiles of 32 columns, the last narrower.

    rows: raw bits [n, width], n > 0, starting at a band's first position. Returns [bands * ceil(width / 32), 32].
    """
    whole = len(rows) // TILE_ROWS * TILE_ROWS
    step = max(1, CACHED_BYTES // (TILE_ROWS * rows.shape[1] * rows.dtype.itemsize)) * TILE_ROWS
    parts = [_bands(rows[at : min(at + step, whole)], TILE_ROWS) for at in range(0, whole, step)]
    if whole < len(rows):
        parts.append(_bands(rows[whole:], len(rows) - whole))
    return np.concatenate(parts)


def _bands(rows: Bits, tall: int) -> Bytes:
    """As tile_leaf_hashes, for bands that are all `tall` rows high."""
    bands, width = len(rows) // tall, rows.shape[1]
    main = width // TILE_COLUMNS * TILE_COLUMNS
    parts = []
    for part, wide in ((rows[:, :main], TILE_COLUMNS), (rows[:, main:], width - main)):
        if part.shape[1]:
            tiles = part.reshape(bands, tall, -1, wide).transpose(0, 2, 1, 3)
            hashes = leaf_hashes(np.ascontiguousarray(tiles), tall * wide * rows.dtype.itemsize)
            parts.append(hashes.reshape(bands, -1, HASH_BYTES))
    return np.concatenate(parts, axis=1).reshape(-1, HASH_BYTES)


class TensorHasher:
    """Hashes one tensor's leaves while its rows are still coming, for the worker's recorder."""

    def __init__(self, width: int, element_bytes: int, tiled: bool = False) -> None:
        """width: columns; element_bytes: 2 or 4; tiled: for v."""
        if width < 1 or element_bytes not in (2, 4):
            raise ValueError(f"expected 1 column or more of 2 or 4 bytes, got {width} of {element_bytes}")
        self._width = width
        # Rationale: rows wait until a band of eight is whole even where their leaves already are; all lanes are then
        # full, and a decoding worker, which appends a row at a time, enters the hasher an eighth as often.
        self._band: Bits = np.empty((TILE_ROWS, width), dtype=f"<u{element_bytes}")
        self._waiting = 0
        self._hash = tile_leaf_hashes if tiled else lambda rows: row_leaf_hashes(rows, BLOCK)
        self._hashes: list[Bytes] = []
        self._finished = False
        self.rows = 0

    def append(self, rows: Bits) -> None:
        """Adds raw bits [n, width] behind the rows so far; they may be overwritten afterwards. Raises WrongTrace."""
        if rows.ndim != 2 or rows.shape[1] != self._width or rows.dtype != self._band.dtype:
            raise WrongTrace(f"expected {self._band.dtype} [n, {self._width}], got {rows.dtype} {list(rows.shape)}")
        if self._finished:
            raise WrongTrace("expected no rows behind the last, the tensor's root is taken")
        self.rows += len(rows)
        if self._waiting:
            taken = min(TILE_ROWS - self._waiting, len(rows))
            self._keep(rows[:taken])
            rows = rows[taken:]
            if self._waiting < TILE_ROWS:
                return
            self._flush()
        whole = len(rows) // TILE_ROWS * TILE_ROWS
        if whole:
            self._hashes.append(self._hash(rows[:whole]))
        self._keep(rows[whole:])

    def finish(self) -> bytes:
        """The tensor's root. Raises WrongTrace for no rows. Nothing can be appended afterwards."""
        return self.tree().root

    def tree(self) -> HashTree:
        """The tensor's tree. As finish."""
        if not self.rows:
            raise WrongTrace("expected one position or more, got none")
        self._finished = True
        if self._waiting:
            self._flush()
        self._hashes = [np.concatenate(self._hashes)]
        return HashTree(self._hashes[0])

    def _keep(self, rows: Bits) -> None:
        self._band[self._waiting : self._waiting + len(rows)] = rows
        self._waiting += len(rows)

    def _flush(self) -> None:
        self._hashes.append(self._hash(self._band[: self._waiting]))
        self._waiting = 0


class RequestTrace:
    """The served tensors of one request at one stage, and every opening of them."""

    def __init__(
        self,
        shape: ModelShape,
        first_layer: int,
        end_layer: int,
        arrays: Mapping[str, Bits],
        roots: Mapping[str, bytes] | None = None,
    ) -> None:
        """arrays: raw bits [T, width] by key, exactly those of tensor_keys; not copied. Raises WrongTrace.

        roots: those already known, from TensorHasher; they are believed.
        """
        if not 0 <= first_layer < end_layer <= shape.layers:
            raise WrongTrace(f"expected layers within {shape.layers}, got {first_layer} .. {end_layer - 1}")
        self.keys = tensor_keys(shape, first_layer, end_layer)
        if set(arrays) != set(self.keys):
            missing, extra = sorted(set(self.keys) - set(arrays)), sorted(set(arrays) - set(self.keys))
            raise WrongTrace(f"expected the tensors of the stage, got {missing[:3]} missing, {extra[:3]} besides")
        self.shape, self.first_layer, self.end_layer, self.arrays = shape, first_layer, end_layer, dict(arrays)
        self.positions = len(arrays[self.keys[0]])
        dtype = np.dtype(f"<u{shape.served_dtype.size}")
        for key in self.keys:
            expected, array = (self.positions, tensor_width(shape, key)), arrays[key]
            if array.shape != expected or array.dtype != dtype or not self.positions:
                raise WrongTrace(f"{key}: expected {dtype} {expected}, got {array.dtype} {array.shape}")
        self._roots = {key: root for key, root in (roots or {}).items() if key in arrays}
        self._trees: OrderedDict[str, HashTree] = OrderedDict()
        self._tensors_tree: HashTree | None = None

    @property
    def tensors_root(self) -> bytes:
        """What the request's trace node commits to."""
        return self._top().root

    @property
    def trace(self) -> Trace:
        """What the referee knows of these tensors."""
        return Trace(self.tensors_root, self.positions, self.first_layer, self.end_layer)

    def tensor_root(self, key: str) -> bytes:
        """One tensor's root. Raises KeyError."""
        if key not in self._roots:
            self._roots[key] = self._tree(key).root
        return self._roots[key]

    def block_leaf(self, key: str, position: int, block: int) -> bytes:
        """The leaf of columns 256*block .. of a row tensor at one position. Raises IndexOutOfRange."""
        array = self._rows(key)
        _within(position, position + 1, len(array))
        _within(BLOCK * block, BLOCK * block + 1, array.shape[1])
        return array[position, BLOCK * block : BLOCK * (block + 1)].tobytes()

    def open_row(self, key: str, position: int, first_col: int, end_col: int) -> Opening:
        """Opens columns first_col .. end_col - 1 at one position: row leaves, or of v the whole tiles.

        Raises IndexOutOfRange.
        """
        array = self.arrays[key]
        _within(position, position + 1, len(array))
        _within(first_col, end_col, array.shape[1])
        if is_tiled(key):
            head, end = first_col // TILE_COLUMNS, (end_col - 1) // TILE_COLUMNS + 1
            return self._open_tiles(key, position // TILE_ROWS, head, end)
        head, end = first_col // BLOCK, (end_col - 1) // BLOCK + 1
        first = position * -(-array.shape[1] // BLOCK) + head
        data = array[position, head * BLOCK : end * BLOCK].tobytes()
        return Opening(data, self._siblings(key, first, end - head))

    def open_column(self, key: str, first_position: int, end_position: int, col: int) -> Opening:
        """Opens one column of v at positions first_position .. end_position - 1, all within one band of eight.

        Raises IndexOutOfRange; for other tensors ValueError: no leaf of theirs holds a column.
        """
        array = self.arrays[key]
        if not is_tiled(key):
            raise ValueError(f"expected v, got {key}")
        _within(first_position, end_position, len(array))
        _within(col, col + 1, array.shape[1])
        band = first_position // TILE_ROWS
        if (end_position - 1) // TILE_ROWS != band:
            got = f"{first_position} .. {end_position - 1}"
            raise IndexOutOfRange(f"expected positions of one band of {TILE_ROWS}, got {got}")
        return self._open_tiles(key, band, col // TILE_COLUMNS, col // TILE_COLUMNS + 1)

    def open_leaves(self, key: str, first: int, count: int) -> Opening:
        """Opens leaves first .. first + count - 1 of a tensor. Raises IndexOutOfRange."""
        siblings = self._siblings(key, first, count)
        array, tall, wide = self.arrays[key], *((TILE_ROWS, TILE_COLUMNS) if is_tiled(key) else (1, BLOCK))
        across = -(-array.shape[1] // wide)
        places = (divmod(index, across) for index in range(first, first + count))
        tiles = (array[a * tall : (a + 1) * tall, b * wide : (b + 1) * wide].tobytes() for a, b in places)
        return Opening(b"".join(tiles), siblings)

    def open_roots(self, first: int, count: int) -> Opening:
        """Opens the roots of tensors first .. first + count - 1 in the tensors' tree. Raises IndexOutOfRange."""
        siblings = tuple(self._top().prove(first, count))
        return Opening(b"".join(self.tensor_root(key) for key in self.keys[first : first + count]), siblings)

    def save(self, path: Path) -> None:
        """Writes one safetensors file. Raises OSError."""
        metadata = stage_metadata(self.first_layer, self.end_layer)
        write(path, self.shape.served_dtype, {key: self.arrays[key] for key in self.keys}, metadata)

    @classmethod
    def load(cls, path: Path, shape: ModelShape) -> "RequestTrace":
        """Maps a file that save wrote, or a worker row by row, into memory, read-only.

        Raises MalformedFile, WrongTrace, OSError.
        """
        file = SafetensorsFile(path)
        layers = [file.metadata.get(name, "") for name in ("first_layer", "end_layer")]
        if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in layers):
            raise MalformedFile(f"{path.name}: expected first_layer and end_layer in its metadata, got {layers}")
        arrays: dict[str, Bits] = {}
        for key in file.entries:
            dtype, array = file.floats(key)
            if dtype != shape.served_dtype:
                raise WrongTrace(f"{key}: expected {shape.served_dtype.name}, got {dtype.name}")
            arrays |= _side_by_side(shape, key, array)
        return cls(shape, int(layers[0]), int(layers[1]), arrays)

    def _rows(self, key: str) -> Bits:
        if is_tiled(key):
            raise ValueError(f"expected a row tensor, got {key}")
        return self.arrays[key]

    def _open_tiles(self, key: str, band: int, head: int, end: int) -> Opening:
        array = self.arrays[key]
        rows = array[band * TILE_ROWS : (band + 1) * TILE_ROWS]
        data = b"".join(rows[:, tile * TILE_COLUMNS : (tile + 1) * TILE_COLUMNS].tobytes() for tile in range(head, end))
        return Opening(data, self._siblings(key, band * -(-array.shape[1] // TILE_COLUMNS) + head, end - head))

    def _siblings(self, key: str, first: int, n: int) -> tuple[bytes, ...]:
        """Those of the tensor's tree, then those of the tensors' tree."""
        return (*self._tree(key).prove(first, n), *self._top().prove(self.keys.index(key)))

    def _tree(self, key: str) -> HashTree:
        tree = self._trees.pop(key, None)
        if tree is None:
            array = self.arrays[key]
            tree = HashTree(tile_leaf_hashes(array) if is_tiled(key) else row_leaf_hashes(array, BLOCK))
        self._trees[key] = tree  # behind the others: dropped last
        while len(self._trees) > TREES_KEPT:
            self._trees.popitem(last=False)
        return tree

    def _top(self) -> HashTree:
        if self._tensors_tree is None:
            self._tensors_tree = HashTree.of([self.tensor_root(key) for key in self.keys])
        return self._tensors_tree


def _side_by_side(shape: ModelShape, name: str, array: Bits) -> dict[str, Bits]:
    """A matrix of a file: one tensor, or several in its columns, told by their keys with commas between them."""
    keys = name.split(BESIDE)
    ends = list(accumulate(tensor_width(shape, key) for key in keys))
    if array.ndim != 2 or array.shape[1] != ends[-1]:
        raise WrongTrace(f"{name[:80]}: expected {ends[-1]} columns, got {list(array.shape)}")
    return {key: array[:, end - tensor_width(shape, key) : end] for key, end in zip(keys, ends, strict=True)}


def _within(first: int, end: int, count: int) -> None:
    if not 0 <= first < end <= count:
        raise IndexOutOfRange(f"expected a range within {count}, got {first} .. {end - 1}")
