"""Served rows of the requests in flight, and the hashes of their leaves as they come: one array a tensor, whatever the
batching, so that a microbatch costs one copy and one call of the hasher for each tensor and not for each request.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.referee.codec import BLOCK
from verifier.sha256 import HASH_BYTES, HashTree, row_leaf_hashes
from verifier.trace import is_tiled, tile_leaf_hashes
from worker.batch import Batch

FIRST_ROOM = 256  # rows; arrays double from here

Bits = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]


class Ledger:
    """Rows live in slots, which are used again once their request is taken. Not for two threads at once."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Slots]] = {}
        self._free = np.empty(0, np.int64)
        self._room = 0
        self._rows: dict[str, Bits] = {}
        self._hashes: dict[str, npt.NDArray[np.uint8]] = {}  # [slots, leaves of a row, 32]

    @property
    def held_bytes(self) -> int:
        """Of the arrays, in use or not."""
        return sum(array.nbytes for arrays in (self._rows, self._hashes) for array in arrays.values())

    def __contains__(self, request: int) -> bool:
        return request in self._slots

    def positions(self, request: int) -> int:
        return sum(map(len, self._slots.get(request, [])))

    def add(self, batch: Batch, tensors: Mapping[str, Bits]) -> None:
        """One microbatch: raw bits [rows, width] by key, the same keys each time; a request's rows come in order."""
        slots = self._take_slots(batch.rows)
        for piece, span in batch.spans():
            self._slots.setdefault(piece.request, []).append(slots[span])
        for key, rows in tensors.items():
            self._grown(self._rows, key, rows.shape[1:], rows.dtype)[slots] = rows
            if not is_tiled(key):  # a tile spans positions: those of v are hashed when all are there
                hashes = row_leaf_hashes(rows, BLOCK).reshape(len(rows), -1, HASH_BYTES)
                self._grown(self._hashes, key, hashes.shape[1:], hashes.dtype)[slots] = hashes

    def take(self, request: int) -> tuple[dict[str, Bits], dict[str, bytes]]:
        """(rows [positions, width], roots) by key; the request is gone then. Raises KeyError."""
        slots = np.concatenate(self._slots.pop(request))
        arrays = {key: rows[slots] for key, rows in self._rows.items()}
        roots = {
            key: HashTree(
                tile_leaf_hashes(rows) if is_tiled(key) else self._hashes[key][slots].reshape(-1, HASH_BYTES)
            ).root
            for key, rows in arrays.items()
        }
        self._free = np.concatenate([self._free, slots])
        return arrays, roots

    def _take_slots(self, count: int) -> Slots:
        if count > len(self._free):
            room = max(FIRST_ROOM, 2 * self._room, self._room + count)
            self._free = np.concatenate([self._free, np.arange(self._room, room)])
            self._room = room
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _grown(self, arrays: dict[str, Any], key: str, shape: tuple[int, ...], dtype: Any) -> Any:
        held = arrays.get(key)
        if held is None or len(held) < self._room:
            grown = np.empty((self._room, *shape), dtype)
            if held is not None:
                grown[: len(held)] = held
            arrays[key] = grown
        return arrays[key]
