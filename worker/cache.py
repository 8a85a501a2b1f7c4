"""Keys and values of the requests in flight: pages of a pool, a block table for each request.

A page is PAGE positions of one request at every layer. A pool is [slots, key heads, head size], so a microbatch's rows
are written by one copy and any set of positions is read by one gather. On a CPU single rows attend to pages where they
lie (worker.paged_attention). Elsewhere requests that decode together are laid out in a run, one behind the other with
the same room each: then all their positions are a view of the pool, and a step copies nothing. A request begins as a
run of its own; runs are joined once the reads that this saves are worth the copy. Not for two threads at once.
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

AHEAD = 4 * PAGE  # positions at least that a run has room for beyond its longest request, unless they end before

FIRST_AHEAD = 16 * AHEAD  # positions at most that a request gets room for before they come

TOGETHER = 8  # requests of a run

READ_COST = {"cpu": 16}  # positions that are moved in the time that one more read takes
# Measured at 128 columns of float32: 30 us for a read with its attention, 2 us a position.

LAUNCH_COST = 1024  # the same where a read is a few launches and a copy runs at the device's own pace

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Run:
    """Requests whose slots follow one another in the pool, `room` each, from `base`."""

    requests: tuple[int, ...]
    base: int
    room: int

    def part(self, first: int, end: int) -> "Run":
        """Of its requests, first .. end - 1."""
        if (first, end) == (0, len(self.requests)):
            return self
        return Run(self.requests[first:end], self.base + first * self.room, self.room)

    def slots(self, place: int) -> Slots:
        return np.arange(self.base + place * self.room, self.base + (place + 1) * self.room, dtype=np.int64)


@dataclass(frozen=True)
class View:
    """The positions of a run up to `longest`."""

    run: Run
    longest: int


Places = torch.Tensor | View  # slots [n, positions], or a run


@dataclass(frozen=True)
class Pages:
    """Where single rows attend. int64 each: `slots` of the first positions of their pages, one row's behind the
    other's; `starts`: where each row's begin there; `counts`: how many positions each row sees.
    """

    slots: Slots
    starts: Slots
    counts: Slots

    @staticmethod
    def of(tables: Sequence[Slots]) -> "Pages":
        """tables: of each row the slots of all positions that it sees, from a page's first on."""
        firsts = [table[::PAGE] for table in tables]
        starts = np.cumsum([0, *map(len, firsts[:-1])])
        return Pages(np.concatenate(firsts), starts, np.array([len(table) for table in tables]))


class Cache:
    """All requests of one job at one stage. `padding` tells how much of what was read was none of the requests'."""

    def __init__(
        self,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        reserves: Sequence[int] = (),
        foreseen: int = 0,
    ) -> None:
        """reserves: positions that each request may grow to, if that is known; foreseen: of all that are here together,
        for which pools have room from the start.
        """
        self._reserves = reserves
        # Where memory is taken only as rows come, there is room to join runs as well: a pool that grows moves whole.
        self._foreseen = foreseen * (2 if device.type == "cpu" else 1)
        self._read_cost = READ_COST.get(device.type, LAUNCH_COST)
        self._saved = 0  # reads that joining runs would have saved since they were last joined
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
        """Of the pools' pages, in use or not; on a CPU, of those that ever were."""
        rows = len(self._free) * PAGE if self._device.type == "cpu" else None
        return sum(pool[:rows].nbytes for pools in self._pools.values() for pool in pools)

    def extend(self, batch: Batch) -> None:
        """Makes room for the rows of `batch`, in new pages where they are needed."""
        for piece in batch.pieces:
            table = self._tables.get(piece.request)
            if table is None or not len(table):
                room = self._room([piece], FIRST_AHEAD)
                run = Run((piece.request,), self._pages(room // PAGE) * PAGE, room)
                self._tables[piece.request], self._runs[piece.request] = run.slots(0), run
            elif piece.end > len(table):
                self._scatter(piece.request)
                pages = np.array([self._pages(1) for _ in range(-(-(piece.end - len(table)) // PAGE))])
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
            for pool in self.pools(layer):
                pool.index_copy_(0, new, pool.index_select(0, old))

    def rows(self, batch: Batch) -> torch.Tensor:
        """[rows]: their slots, until `places` is called again."""
        parts = [self._tables[piece.request][piece.first : piece.end] for piece in batch.pieces]
        return torch.from_numpy(np.concatenate(parts)).to(self._device)

    def places(self, pieces: Sequence[Piece]) -> list[tuple[list[Piece], View]]:
        """Pieces of one row each, in groups that are read together, and where: all positions up to each piece's end.
        Behind a shorter one's end comes something finite.
        """
        by_request = {piece.request: piece for piece in pieces}
        groups = self._kept(by_request)
        loose = alike([piece for r, piece in by_request.items() if r not in self._runs])
        whole = alike(pieces)
        self._saved += max(0, len(groups) + len(loose) - len(whole))
        if self._saved * self._read_cost > sum(piece.end for piece in pieces):
            groups, loose, self._saved = [], whole, 0
        for group in loose:
            self._lay(group)
            groups.append((group, self._runs[group[0].request]))
        return [(group, self._view(group, run)) for group, run in groups]

    def _kept(self, by_request: Mapping[int, Piece]) -> list[tuple[list[Piece], Run]]:
        """Neighbours of a run that are all here and of like length. Who has left it, or waits, parts them."""
        groups: list[tuple[list[Piece], Run]] = []
        for run in {self._runs[r]: None for r in by_request if r in self._runs}:
            first = total = longest = 0
            for place, r in enumerate((*run.requests, None)):
                piece = None if r is None or self._runs.get(r) is not run else by_request.get(r)
                if piece is not None:
                    total, longest = total + piece.end, max(longest, piece.end)
                    if total >= (1 - PADDING) * longest * (place - first + 1):
                        continue
                if first < place:
                    groups.append(([by_request[r] for r in run.requests[first:place]], run.part(first, place)))
                first = place if piece is not None else place + 1
                total = longest = piece.end if piece is not None else 0
        return groups

    def place(self, piece: Piece) -> Places:
        """All positions of one request up to the piece's end."""
        run = self._runs.get(piece.request)
        if run is None:
            return self.slots(piece)
        at = run.requests.index(piece.request)
        return self._view([piece], run.part(at, at + 1))

    def slots(self, piece: Piece) -> torch.Tensor:
        """[1, end]: slots of all positions up to the piece's end."""
        self._count([piece])
        return torch.from_numpy(self._tables[piece.request][None, : piece.end]).to(self._device)

    def pages_of(self, pieces: Sequence[Piece]) -> Pages:
        """For each piece all positions up to its end."""
        self._count(pieces, padded=False)
        return Pages.of([self._tables[piece.request][: piece.end] for piece in pieces])

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[rows, key heads, head size] each."""
        for pool, rows in zip(self.pools(layer), (keys, values), strict=True):
            pool.index_copy_(0, slots, rows)

    def read(self, layer: int, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [n, key heads, positions, head size]; of a run they are views."""
        heads, size = self._shape
        if isinstance(places, View):
            run, width = places.run, heads * size
            shape, strides = (len(run.requests), heads, places.longest, size), (run.room * width, size, width, 1)
            keys, values = (pool.as_strided(shape, strides, run.base * width) for pool in self.pools(layer))
        else:
            keys, values = (
                pool.index_select(0, places.reshape(-1)).view(*places.shape, heads, size).transpose(1, 2)
                for pool in self.pools(layer)
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
        self._runs.pop(request, None)
        self._release(self._tables.pop(request, np.empty(0, np.int64)))

    def _view(self, pieces: Sequence[Piece], run: Run) -> View:
        self._count(pieces)
        return View(run, max(piece.end for piece in pieces))

    def _room(self, pieces: Sequence[Piece], ahead: int) -> int:
        """Positions of whole pages: what the requests may grow to, or the longest and `ahead` more if that is less."""
        longest = max(piece.end for piece in pieces)
        if self._reserves:
            most = max(self._reserves[piece.request] for piece in pieces)
            room = max(longest, min(most, longest + max(ahead, longest // 4)))
        else:
            room = longest + AHEAD
        return -(-room // PAGE) * PAGE

    def _count(self, pieces: Sequence[Piece], padded: bool = True) -> None:
        needed = sum(piece.end for piece in pieces)
        self._needed += needed
        self._taken += len(pieces) * max(piece.end for piece in pieces) if padded else needed

    def _lay(self, pieces: Sequence[Piece]) -> None:
        """Moves the requests' positions into a run."""
        room = self._room(pieces, AHEAD)
        base = self._pages(len(pieces) * room // PAGE) * PAGE
        run = Run(tuple(piece.request for piece in pieces), base, room)
        held = [self._tables[r][: self.positions(r)] for r in run.requests]
        tables = [run.slots(place) for place in range(len(pieces))]
        old = torch.from_numpy(np.concatenate(held)).to(self._device)
        new = torch.from_numpy(np.concatenate([t[: len(h)] for t, h in zip(tables, held, strict=True)]))
        new = new.to(self._device)
        for layer in self._pools:
            for pool in self.pools(layer):
                pool.index_copy_(0, new, pool.index_select(0, old))
        for r, table in zip(run.requests, tables, strict=True):
            self._release(self._tables[r])
            self._tables[r] = table
        self._runs.update((r, run) for r in run.requests)

    def _scatter(self, request: int) -> None:
        """The request's run is none any more; its members keep their slots. Who has left it may be in another."""
        run = self._runs.get(request)
        for r in () if run is None else run.requests:
            if self._runs.get(r) is run:
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

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """With room for all pages; pools grow by a quarter or more, so n appends copy O(n) rows. What no request has
        written is zero: what is masked must not be NaN. (What one has written is finite, or its job fails.)
        """
        slots = len(self._free) * PAGE
        held = self._pools.get(layer)
        if held is None or len(held[0]) < slots:
            room = max(slots, len(held[0]) * 5 // 4 if held is not None else self._foreseen)
            grown = [self._zeros(room) for _ in range(2)]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[: len(old)] = old
            held = self._pools[layer] = (grown[0], grown[1])
        return held

    def _zeros(self, room: int) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.zeros(room, *self._shape, dtype=self._dtype, device=self._device)
        # The system's own zeros: memory is taken, and cleared, only where rows come.
        columns = self._shape[0] * self._shape[1] * self._dtype.itemsize
        return torch.from_numpy(np.zeros((room, columns), np.uint8)).view(self._dtype).view(room, *self._shape)


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
