"""Keys and values of the requests in flight: pages of a pool that grows, a block table for each request.

A page is PAGE positions of one request at every layer. A pool is [slots, key heads, head size], so a microbatch's rows
are written by one copy and any set of positions is read by one gather. Not for two threads at once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from worker.batch import Batch, Piece

PAGE = 16  # positions; what a request wastes is half of it on average

PADDING = 0.15  # of the positions that one gather reads: requests of like length are read together

Slots = npt.NDArray[np.int64]


class Cache:
    """All requests of one job at one stage. `padding` tells how much of what was gathered was none of the requests'."""

    def __init__(self, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (heads, head_size)
        self._dtype = dtype
        self._device = device
        self._tables: dict[int, Slots] = {}  # request -> slot of each position that its pages have room for
        self._lengths: dict[int, int] = {}
        self._free: list[int] = []  # pages, the last one next
        self._pages = 0
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values
        self._gathered = 0
        self._needed = 0

    @property
    def pages(self) -> int:
        """In use."""
        return self._pages - len(self._free)

    @property
    def padding(self) -> float:
        """Share of all gathered positions so far that were padding; at most PADDING."""
        return 1 - self._needed / self._gathered if self._gathered else 0.0

    def positions(self, request: int) -> int:
        """Positions of `request` that the last finished forward left here."""
        return self._lengths.get(request, 0)

    def extend(self, batch: Batch) -> torch.Tensor:
        """[rows]: slots for the rows of `batch`, in new pages where they are needed."""
        parts = []
        for piece in batch.pieces:
            table = self._tables.get(piece.request, np.empty(0, np.int64))
            missing = -(-(piece.end - len(table)) // PAGE)
            if missing > 0:
                pages = [self._page() for _ in range(missing)]
                table = np.concatenate([table, (np.array(pages)[:, None] * PAGE + np.arange(PAGE)).reshape(-1)])
                self._tables[piece.request] = table
            parts.append(table[piece.first : piece.end])
        return torch.from_numpy(np.concatenate(parts)).to(self._device)

    def slots(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """[pieces, longest end]: slots of all positions up to each piece's end; behind it, its first once more."""
        longest = max(piece.end for piece in pieces)
        out = np.empty((len(pieces), longest), np.int64)
        for row, piece in zip(out, pieces, strict=True):
            table = self._tables[piece.request]
            row[: piece.end] = table[: piece.end]
            row[piece.end :] = table[0]  # written, so finite: what is masked must not be NaN
        self._gathered += out.size
        self._needed += sum(piece.end for piece in pieces)
        return torch.from_numpy(out).to(self._device)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[rows, key heads, head size] each."""
        for pool, rows in zip(self._pool(layer), (keys, values), strict=True):
            pool.index_copy_(0, slots, rows)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [n, key heads, positions, head size], of slots [n, positions]."""
        n, positions = slots.shape
        keys, values = (
            pool.index_select(0, slots.reshape(-1)).view(n, positions, *self._shape).transpose(1, 2)
            for pool in self._pool(layer)
        )
        return keys, values

    def advance(self, request: int, count: int) -> None:
        self._lengths[request] = self.positions(request) + count

    def drop(self, request: int) -> None:
        """Frees the pages of a request that has ended."""
        self._lengths.pop(request, None)
        table = self._tables.pop(request, np.empty(0, np.int64))
        self._free.extend(int(slot) // PAGE for slot in table[::PAGE])

    def _page(self) -> int:
        if self._free:
            return self._free.pop()
        self._pages += 1
        return self._pages - 1

    def _pool(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """With room for all pages; pools double, so n appends copy O(n) rows."""
        slots = self._pages * PAGE
        held = self._pools.get(layer)
        if held is None or len(held[0]) < slots:
            room = max(slots, 2 * len(held[0]) if held is not None else 0)
            grown = [torch.empty(room, *self._shape, dtype=self._dtype, device=self._device) for _ in range(2)]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[: len(old)] = old
            held = self._pools[layer] = (grown[0], grown[1])
        return held


def alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by length, in as few groups as keep each group's padding within PADDING."""
    groups: list[list[Piece]] = []
    total = 0
    for piece in sorted(pieces, key=lambda piece: -piece.end):
        if groups and total + piece.end >= (1 - PADDING) * groups[-1][0].end * (len(groups[-1]) + 1):
            groups[-1].append(piece)
            total += piece.end
        else:
            groups.append([piece])
            total = piece.end
    return groups
