"""Where the keys and values of a job's requests live: in the device's main pool, or as guests on the host. Pure.

INVARIANT: a request's home follows from the job's requests and the bounds alone, never from the order of events: so
stage 0 knows each stage's guests, and what it sends has room in all their pools and buffers.
"""

from collections.abc import Sequence

from verifier.commit import Request
from worker.batch import Batch, Piece
from worker.cache import PAGE, alike
from worker.config import Bounds


def whole_pages(positions: int) -> int:
    """Positions of the pages that hold as many."""
    return -(-positions // PAGE) * PAGE


def laid(pieces: Sequence[Piece]) -> list[tuple[list[Piece], int]]:
    """How guests lie in a buffer: those that are read together, and the room of each."""
    groups = alike([piece for piece in pieces if piece.count == 1])
    groups += [[piece] for piece in pieces if piece.count > 1]
    return [(group, whole_pages(max(piece.end for piece in group))) for group in groups]


def needed(pieces: Sequence[Piece]) -> int:
    """Positions of a buffer that these guests take."""
    return sum(len(group) * room for group, room in laid(pieces))


def largest(main: int, buffer: int) -> int:
    """Positions of the largest request that there is room for."""
    return max(main, buffer // PAGE * PAGE)


class Homes:
    """`guests`, `reserves`, `foreseen`; and, for who admits requests, how much room is left. In positions."""

    def __init__(self, requests: Sequence[Request], bounds: Bounds) -> None:
        main, buffer, host = bounds.main, bounds.buffer, bounds.host
        self.reserves = [len(request.prompt) + request.limit for request in requests]
        self.buffer, self.rows = buffer, bounds.rows
        self.guests: set[int] = set()
        here = there = 0
        for r, positions in enumerate(self.reserves):
            if whole_pages(positions) <= buffer and here + positions > main:
                # Both are full then: who comes next waits for the home of which less was promised.
                if positions > main or (here + positions) * host > (there + positions) * main:
                    self.guests.add(r)
                    there += positions
                    continue
            here += positions
        self.foreseen = min(main, here)  # of the main pool, at most
        self._main_left = main
        self._host_left = host
        self.admitted: set[int] = set()

    def has_room(self, request: int) -> bool:
        """Whether its home has room, or nobody is in: one is always admitted, however long."""
        left = self._host_left if request in self.guests else self._main_left
        return self.reserves[request] <= left or not self.admitted

    def admit(self, request: int) -> None:
        self.admitted.add(request)
        self._charge(request, self.reserves[request])

    def fits(self, pieces: Sequence[Piece]) -> bool:
        """Whether a buffer holds those of a microbatch that are guests."""
        return not self.guests or needed([p for p in pieces if p.request in self.guests]) <= self.buffer

    def least(self, pieces: Sequence[Piece]) -> int:
        """Positions of a buffer that a microbatch's guests take however they are laid out: half of what they take, or
        more. Of pieces that fit, no part takes more than a buffer by this measure, nor do they if one is cut short.
        """
        return sum(whole_pages(piece.end) for piece in pieces if piece.request in self.guests)

    def visiting(self, batch: Batch) -> dict[int, int]:
        """The microbatch's guests, and what each may grow to."""
        return {p.request: self.reserves[p.request] for p in batch.pieces if p.request in self.guests}

    def leave(self, request: int) -> None:
        """Of one that was never in, nothing."""
        if request in self.admitted:
            self.admitted.remove(request)
            self._charge(request, -self.reserves[request])

    def _charge(self, request: int, positions: int) -> None:
        if request in self.guests:
            self._host_left -= positions
        else:
            self._main_left -= positions

    @property
    def turns(self) -> int:
        """Microbatches that it takes until every admitted guest had its turn, once all have grown."""
        grown = sum(whole_pages(self.reserves[r]) for r in self.admitted & self.guests)
        return max(1, -(-grown // self.buffer)) if self.buffer else 1
