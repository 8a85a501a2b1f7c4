"""Keys and values of the requests in flight: pages of a pool, a block table for each request.

A page is PAGE positions of one request at every layer. A pool is [slots, key heads, head size], so a microbatch's rows
are written by one copy and any set of positions is read by one gather. Requests that decode together are laid out in a
run, one behind the other with the same room each: then all their positions are a view of the pool, and a step copies
nothing. Not for two threads at once.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.batch import Batch, Piece

PAGE = 16  # positions; what a request wastes is half of it on average

PADDING = 0.15  # of the positions that one read takes: requests of like length are read together

AHEAD = 4 * PAGE  # positions that a run has room for beyond its longest request: it is laid out once in so many steps

TOGETHER = 8  # requests of a run: few have to move when one of them ends

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Run:
    """Requests whose slots follow one another in the pool, `room` each, from `base`."""

    requests: tuple[int, ...]
    base: int
    room: int

    def slots(self, place: int) -> Slots:
        return np.arange(self.base + place * self.room, self.base + (place + 1) * self.room, dtype=np.int64)


@dataclass(frozen=True)
class View:
    """The positions of a run up to `longest`."""

    run: Run
    longest: int


Places = torch.Tensor | View  # slots [n, positions], or a run


class Cache:
    """All requests of one job at one stage. `padding` tells how much of what was read was none of the requests'."""

    def __init__(self, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (heads, head_size)
        self._dtype = dtype
        self._device = device
        self._tables: dict[int, Slots] = {}  # request -> slot of each position that its pages have room for
        self._runs: dict[int, Run] = {}  # by each of its requests
        self._lengths: dict[int, int] = {}
        self._free = np.zeros(0, np.bool_)  # by page
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values
        self._taken = 0
        self._needed = 0

    @property
    def pages(self) -> int:
        """In use."""
        return len(self._free) - int(self._free.sum())

    @property
    def padding(self) -> float:
        """Share of all positions read so far that were padding; at most PADDING."""
        return 1 - self._needed / self._taken if self._taken else 0.0

    def positions(self, request: int) -> int:
        """Positions of `request` that the last finished forward left here."""
        return self._lengths.get(request, 0)

    @property
    def device_bytes(self) -> int:
        """Of the pools, in use or not."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools)

    def extend(self, batch: Batch) -> None:
        """Makes room for the rows of `batch`, in new pages where they are needed."""
        for piece in batch.pieces:
            table = self._tables.get(piece.request, np.empty(0, np.int64))
            missing = -(-(piece.end - len(table)) // PAGE)
            if missing > 0:
                self._scatter(piece.request)
                pages = np.array([self._pages(1) for _ in range(missing)])
                table = np.concatenate([table, (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)])
                self._tables[piece.request] = table

    @torch.inference_mode()
    def share(self, batch: Batch) -> None:
        """Gives requests whose first piece has a donor the positions before it; before the microbatch's forward.

        Rationale: copies, and not the donor's pages: requests that decode together lie in runs, each in one piece.
        """
        for piece in batch.pieces:
            if piece.donor is not None:
                self.extend(Batch((piece,)))
                self._take_over(piece.donor, torch.from_numpy(self._tables[piece.request][: piece.first]))
                self._lengths[piece.request] = piece.first

    def _take_over(self, donor: int, slots: torch.Tensor) -> None:
        """Copies the donor's first positions to `slots`, of every layer."""
        old = torch.from_numpy(self._tables[donor][: len(slots)]).to(self._device)
        new = slots.to(self._device)
        for layer in self._pools:
            for pool in self._pool(layer):
                pool.index_copy_(0, new, pool.index_select(0, old))

    def rows(self, batch: Batch) -> torch.Tensor:
        """[rows]: their slots, until `places` is called again."""
        parts = [self._tables[piece.request][piece.first : piece.end] for piece in batch.pieces]
        return torch.from_numpy(np.concatenate(parts)).to(self._device)

    def places(self, pieces: Sequence[Piece]) -> list[tuple[list[Piece], View]]:
        """Pieces of one row each, in groups that are read together, and where: all positions up to each piece's end.
        Behind a shorter one's end comes something finite.
        """
        loose = {piece.request: piece for piece in pieces}
        kept: list[list[Piece]] = []
        for run in {self._runs[r]: None for r in loose if r in self._runs}:
            if all(r in loose for r in run.requests):
                kept.append([loose.pop(r) for r in run.requests])
        groups = alike(list(loose.values()))
        if len(kept) + len(groups) > 2 * len(whole := alike(pieces)):
            kept, groups = [], whole  # runs that requests have left and joined are many and small
        for group in groups:
            self._lay(group)
        return [(group, self._view(group)) for group in kept + groups]

    def slots(self, piece: Piece) -> torch.Tensor:
        """[1, end]: slots of all positions up to the piece's end."""
        self._count([piece])
        return torch.from_numpy(self._tables[piece.request][None, : piece.end]).to(self._device)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[rows, key heads, head size] each."""
        for pool, rows in zip(self._pool(layer), (keys, values), strict=True):
            pool.index_copy_(0, slots, rows)

    def read(self, layer: int, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [n, key heads, positions, head size]; of a run they are views."""
        heads, size = self._shape
        if isinstance(places, View):
            run, width = places.run, heads * size
            shape, strides = (len(run.requests), heads, places.longest, size), (run.room * width, size, width, 1)
            keys, values = (pool.as_strided(shape, strides, run.base * width) for pool in self._pool(layer))
        else:
            keys, values = (
                pool.index_select(0, places.reshape(-1)).view(*places.shape, heads, size).transpose(1, 2)
                for pool in self._pool(layer)
            )
        return keys, values

    def coming(self, batch: Batch, guests: Mapping[int, int]) -> None:
        """Told of every microbatch, in their order, as soon as it is known. guests: those of its requests that live on
        the host (worker.swap), and what each may grow to.
        """

    def holding(self, batch: Batch) -> AbstractContextManager[None]:
        """While it lasts, the microbatch's requests are on the device."""
        return nullcontext()

    def advance(self, request: int, count: int) -> None:
        self._lengths[request] = self.positions(request) + count

    def drop(self, request: int) -> None:
        """Frees the pages of a request that has ended."""
        self._lengths.pop(request, None)
        self._scatter(request)
        self._release(self._tables.pop(request, np.empty(0, np.int64)))

    def _view(self, pieces: Sequence[Piece]) -> View:
        self._count(pieces)
        return View(self._runs[pieces[0].request], max(piece.end for piece in pieces))

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._taken += len(pieces) * max(piece.end for piece in pieces)
        self._needed += sum(piece.end for piece in pieces)

    def _lay(self, pieces: Sequence[Piece]) -> None:
        """Moves the requests' positions into a run."""
        room = -(-(max(piece.end for piece in pieces) + AHEAD) // PAGE) * PAGE
        base = self._pages(len(pieces) * room // PAGE) * PAGE
        run = Run(tuple(piece.request for piece in pieces), base, room)
        held = [self._tables[r][: self.positions(r)] for r in run.requests]
        tables = [run.slots(place) for place in range(len(pieces))]
        old = torch.from_numpy(np.concatenate(held)).to(self._device)
        new = torch.from_numpy(np.concatenate([t[: len(h)] for t, h in zip(tables, held, strict=True)]))
        new = new.to(self._device)
        rest = torch.from_numpy(np.concatenate([t[len(h) :] for t, h in zip(tables, held, strict=True)]))
        rest = rest.to(self._device)
        for layer in self._pools:
            for pool in self._pool(layer):
                pool.index_copy_(0, new, pool.index_select(0, old))
                pool.index_fill_(0, rest, 0.0)  # what is masked must not be NaN
        for r, table in zip(run.requests, tables, strict=True):
            self._scatter(r)
            self._release(self._tables[r])
            self._tables[r] = table
        self._runs.update((r, run) for r in run.requests)

    def _scatter(self, request: int) -> None:
        """The request's run is none any more; its members keep their slots."""
        run = self._runs.get(request)
        for r in () if run is None else run.requests:
            del self._runs[r]

    def _pages(self, count: int) -> int:
        """The first of `count` free pages in a row, taken."""
        sums = np.concatenate([[0], np.cumsum(self._free)])
        fits = np.flatnonzero(sums[count:] - sums[:-count] == count)
        if len(fits):
            first = int(fits[0])
        else:
            tail = len(self._free)
            while tail and self._free[tail - 1]:
                tail -= 1
            first = tail
            self._free = np.concatenate([self._free, np.ones(max(0, first + count - len(self._free)), np.bool_)])
        self._free[first : first + count] = False
        return first

    def _release(self, slots: Slots) -> None:
        self._free[slots[::PAGE] // PAGE] = True

    def _pool(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """With room for all pages; pools grow by a quarter or more, so n appends copy O(n) rows."""
        slots = len(self._free) * PAGE
        held = self._pools.get(layer)
        if held is None or len(held[0]) < slots:
            room = max(slots, len(held[0]) * 5 // 4 if held is not None else 0)
            grown = [torch.zeros(room, *self._shape, dtype=self._dtype, device=self._device) for _ in range(2)]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[: len(old)] = old
            held = self._pools[layer] = (grown[0], grown[1])
        return held


def alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by length, TOGETHER at most, in as few groups as keep each group's padding within PADDING."""
    groups: list[list[Piece]] = []
    total = 0
    for piece in sorted(pieces, key=lambda piece: -piece.end):
        last = groups[-1] if groups else []
        if 0 < len(last) < TOGETHER and total + piece.end >= (1 - PADDING) * last[0].end * (len(last) + 1):
            last.append(piece)
            total += piece.end
        else:
            groups.append([piece])
            total = piece.end
    return groups
