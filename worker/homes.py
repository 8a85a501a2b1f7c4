"""Where the keys and values of a job's requests live: in the device's main pool, or as guests on the host. Pure.

INVARIANT: a request's home follows from the job's requests and the bounds alone, never from the order of events: so
stages with the same bounds have the same guests, and what stage 0 sends together has room in all their buffers.
"""

from collections.abc import Sequence

from verifier.commit import Request
from worker.batch import Batch, Piece
from worker.cache import PAGE, alike


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

    def __init__(self, requests: Sequence[Request], main: int, buffer: int = 0, host: int = 0) -> None:
        """main: of the device's pool; buffer: of one microbatch's guests; host: of all guests; both 0: no guests."""
        if main < 1 or not 0 <= buffer <= host or (host > 0) != (buffer > 0):
            raise ValueError(f"expected main >= 1 and 0 < buffer <= host, or no guests; came {main}, {buffer}, {host}")
        self.reserves = [len(request.prompt) + request.limit for request in requests]
        self.buffer = buffer
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
        self._admitted: set[int] = set()

    def admit(self, request: int, forced: bool = False) -> bool:
        """Takes the request in if its home has room; forced: in any case."""
        positions, guest = self.reserves[request], request in self.guests
        if positions > (self._host_left if guest else self._main_left) and not forced:
            return False
        self._admitted.add(request)
        self._charge(request, positions)
        return True

    def visiting(self, batch: Batch) -> dict[int, int]:
        """The microbatch's guests, and what each may grow to."""
        return {p.request: self.reserves[p.request] for p in batch.pieces if p.request in self.guests}

    def leave(self, request: int) -> None:
        self._admitted.remove(request)
        self._charge(request, -self.reserves[request])

    def _charge(self, request: int, positions: int) -> None:
        if request in self.guests:
            self._host_left -= positions
        else:
            self._main_left -= positions

    @property
    def turns(self) -> int:
        """Microbatches that it takes until every admitted guest had its turn, once all have grown."""
        grown = sum(whole_pages(self.reserves[r]) for r in self._admitted & self.guests)
        return max(1, -(-grown // self.buffer)) if self.buffer else 1
