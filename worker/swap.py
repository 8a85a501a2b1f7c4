"""Keys and values that live in host memory until their microbatch comes: double-buffered swapping, as in DeServe.

Requests that the main pool has no room for are guests: a slab each on the host. A microbatch's guests are copied into
one of two buffers of the device's pool, and what the microbatch adds is copied back; while it computes, those of the
one before go out and those of the next come in. So a pool of P positions and two buffers of S serve P + M * S.

A guest lies in its buffer as requests that decode together lie in the pool, in runs: attention reads both alike.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from worker.batch import Batch, Piece
from worker.cache import PAGE, Cache, Run, Slots, View
from worker.homes import laid, needed, whole_pages

log = logging.getLogger("plumb.worker.swap")

BUFFERS = 2  # one that computes, one that is emptied and filled


@dataclass(eq=False)
class Visit:
    """One microbatch's guests: where they lie while it computes, and what they may grow to."""

    batch: Batch
    pieces: Sequence[Piece]
    reserves: Mapping[int, int]
    size: int  # of the buffer, in positions
    runs: list[Run] = field(default_factory=list)  # of those that are read together
    tables: dict[int, Slots] = field(default_factory=dict)
    slabs: dict[int, torch.Tensor] = field(default_factory=dict)
    buffer: int | None = None  # which; None: it is too large for one
    brought: Future[None] = field(default_factory=Future)


class SwappingCache(Cache):
    """As Cache, for the compute thread; `coming` may be called by another. One thread of its own copies."""

    def __init__(
        self,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: range,
        buffer: int,
        reserves: Sequence[int] = (),
        foreseen: int = 0,
    ) -> None:
        """buffer: positions of each of the two; reserves and foreseen: as for Cache, of those in the main pool."""
        super().__init__(heads, head_size, dtype, device, reserves, foreseen)
        self._layers = layers
        self._buffer = whole_pages(buffer)
        self._foreseen += BUFFERS * self._buffer
        self._free = np.zeros(BUFFERS * self._buffer // PAGE, np.bool_)  # the buffers' pages are never free
        self._unused = deque(range(BUFFERS))
        self._slabs: dict[int, torch.Tensor] = {}  # by guest, [2, layers, positions, heads, head size]
        self._coming: deque[Visit] = deque()  # not brought in yet
        self._leaving: dict[int, Future[None]] = {}  # by guest, its latest copying out
        self._visits: deque[Visit] = deque()  # all whose microbatch is not over
        self._here: list[Visit] = []  # in a buffer
        # Rationale: pages are taken and pools grow in the compute thread while the other copies.
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "swap")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.moved_bytes = 0  # either way
        self.peak_host_bytes = 0

    def coming(self, batch: Batch, guests: Mapping[int, int]) -> None:
        pieces = [piece for piece in batch.pieces if piece.request in guests]
        visit = Visit(batch, pieces, guests, needed(pieces))
        with self._lock:
            self._visits.append(visit)
            if self._error is not None:
                visit.brought.set_exception(self._error)
            elif pieces:
                self._coming.append(visit)
                self._bring_next()
            else:
                visit.brought.set_result(None)

    @contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        visit = self._visits[0]
        if visit.batch is not batch:
            raise ValueError("microbatches are held in the order in which they were told to come")
        if visit.size > self._buffer:
            self._bring_large(visit)
        visit.brought.result()
        self._tables.update(visit.tables)
        for run in visit.runs:
            self._runs.update((r, run) for r in run.requests)
        yield
        for piece in visit.pieces:
            self._tables.pop(piece.request)
            self._runs.pop(piece.request, None)
        self._visits.popleft()
        if visit.pieces:
            done = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
            out = self._thread.submit(self._take_out, visit, done)
            self._leaving.update((piece.request, out) for piece in visit.pieces)

    def places(self, pieces: Sequence[Piece]) -> list[tuple[list[Piece], View]]:
        by_request = {piece.request: piece for piece in pieces}
        groups = [[by_request.pop(r) for r in run.requests] for run in self._visits[0].runs]
        return super().places(list(by_request.values())) + [
            (group, self._view(group, self._runs[group[0].request])) for group in groups
        ]

    def extend(self, batch: Batch) -> None:
        super().extend(batch)
        for layer in self._layers:
            self.pools(layer)  # grows here, never while it is copied to

    def drop(self, request: int) -> None:
        super().drop(request)
        self._slabs.pop(request, None)
        self._leaving.pop(request, None)

    def _take_over(self, donor: int, slots: torch.Tensor) -> None:
        if donor in self._tables:
            super()._take_over(donor, slots)
            return
        self._leaving[donor].result()  # a guest that is not in this microbatch: it is whole once it is out
        if self._error is not None:
            raise self._error
        slab, new = self._slabs[donor], slots.to(self._device)
        for index, layer in enumerate(self._layers):
            for which, pool in enumerate(self.pools(layer)):
                pool.index_copy_(0, new, slab[which, index, : len(slots)].to(self._device))

    # ------------------------------------------------------------------------------------------------------ the copies

    def _bring_next(self) -> None:
        """Has the next visit copied in, if a buffer is free and what it needs has been copied out. With the lock."""
        if not self._coming or not self._unused:
            return
        visit = self._coming[0]
        busy = any(visit.reserves.keys() & other.reserves.keys() for other in self._here)
        if busy or visit.size > self._buffer:
            return
        visit.buffer = self._unused.popleft()
        self._bring(visit, visit.buffer * self._buffer)

    def _bring_large(self, visit: Visit) -> None:
        """One that no buffer holds, since a prompt that was cut short lies otherwise than foreseen (twice as large at
        most, see Homes.least): into pages of the main pool, at its turn. In the compute thread: only there pools may
        grow.
        """
        log.warning("a microbatch's guests take %d positions, a buffer has %d", visit.size, self._buffer)
        base = self._pages(visit.size // PAGE) * PAGE
        for layer in self._layers:
            self.pools(layer)
        if self._stream is not None:  # these pages may have been another's until a moment ago
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._lock:
            self._bring(visit, base)
            self._bring_next()

    def _bring(self, visit: Visit, base: int) -> None:
        self._coming.remove(visit)
        self._here.append(visit)
        for group, room in laid(visit.pieces):
            run = Run(tuple(piece.request for piece in group), base, room)
            visit.tables.update((r, run.slots(place)) for place, r in enumerate(run.requests))
            if group[0].count == 1:
                visit.runs.append(run)
            base += len(group) * room
        # What an earlier microbatch adds is copied out before: by the same thread.
        self._thread.submit(self._bring_in, visit)

    def _bring_in(self, visit: Visit) -> None:
        try:
            for request, positions in visit.reserves.items():
                if request not in self._slabs:
                    self._slabs[request] = self._slab(positions)
                visit.slabs[request] = self._slabs[request]
            self.peak_host_bytes = max(self.peak_host_bytes, sum(slab.nbytes for slab in list(self._slabs.values())))
            self._copy(visit, [(p, 0, p.first) for p in visit.pieces if p.donor is None], inward=True)
            visit.brought.set_result(None)
        except BaseException as error:  # raised where the microbatch computes
            visit.brought.set_exception(error)

    def _take_out(self, visit: Visit, done: Any) -> None:
        """done: the event of CUDA behind which the microbatch has been computed."""
        try:
            if self._stream is not None:
                self._stream.wait_event(done)
            spans = [(p, p.first if p.donor is None else 0, p.end) for p in visit.pieces]
            self._copy(visit, spans, inward=False)
        except BaseException as error:  # raised where the next microbatches compute
            self._error = error
        with self._lock:
            self._here.remove(visit)
            if visit.buffer is not None:
                self._unused.append(visit.buffer)
            else:
                for table in visit.tables.values():
                    self._release(table)
            if self._error is None:
                self._bring_next()
            else:
                for waiting in self._coming:
                    waiting.brought.set_exception(self._error)
                self._coming.clear()

    @torch.inference_mode()
    def _copy(self, visit: Visit, spans: Sequence[tuple[Piece, int, int]], inward: bool) -> None:
        """Positions first .. end - 1 of each piece's request, of every layer: slices on both sides."""
        for index, layer in enumerate(self._layers):
            with self._lock, self._streaming():
                pools = self.pools(layer)
                for piece, first, end in spans:
                    base, slab = int(visit.tables[piece.request][0]), visit.slabs[piece.request]
                    for which, pool in enumerate(pools):
                        there, here = slab[which, index, first:end], pool[base + first : base + end]
                        target, source = (here, there) if inward else (there, here)
                        target.copy_(source, non_blocking=True)
                        self.moved_bytes += source.nbytes
                if self._stream is not None:
                    self._stream.synchronize()

    def _slab(self, positions: int) -> torch.Tensor:
        shape = (2, len(self._layers), positions, *self._shape)
        return torch.empty(shape, dtype=self._dtype, pin_memory=self._stream is not None)

    def _streaming(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            before = self._pools.get(layer)
            pools = super().pools(layer)
            if self._stream is not None and pools is not before:
                torch.cuda.current_stream(self._device).synchronize()  # or what is moved might overwrite what comes in
            return pools

    def _pages(self, count: int) -> int:
        with self._lock:
            return super()._pages(count)

    def _release(self, slots: Slots) -> None:
        with self._lock:
            super()._release(slots)
