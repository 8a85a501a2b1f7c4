"""A microbatch: rows of several requests, flattened without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Piece:
    """`count` consecutive positions of one request, from `first`; those before are `donor`'s, if there is one."""

    request: int
    first: int
    count: int
    donor: int | None = None  # a request whose prompt begins with the same `first` tokens; given with the first piece

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class Batch:
    """Pieces in the order of their rows; a request occurs at most once."""

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)

    def spans(self) -> list[tuple[Piece, slice]]:
        """Each piece with its rows within the microbatch."""
        ends = list(accumulate(piece.count for piece in self.pieces))
        return [(piece, slice(end - piece.count, end)) for piece, end in zip(self.pieces, ends, strict=True)]

    def positions(self) -> npt.NDArray[np.int64]:
        """[rows]: position of each row within its request."""
        return np.concatenate([np.arange(piece.first, piece.end, dtype=np.int64) for piece in self.pieces])

    def owners(self) -> npt.NDArray[np.int64]:
        """[rows]: request of each row."""
        return np.repeat([piece.request for piece in self.pieces], [piece.count for piece in self.pieces])


@dataclass(frozen=True)
class Token:
    """The `index`-th output token of a request."""

    request: int
    index: int
    token: int


def sampling(batch: Batch, prompt_counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(request, position, row within the microbatch) of every row that yields a token: a prompt's last and all behind
    it, be they fed back one by one or, after a broken attempt, several at once.
    """
    return [
        (piece.request, position, span.start + position - piece.first)
        for piece, span in batch.spans()
        for position in range(max(piece.first, prompt_counts[piece.request] - 1), piece.end)
    ]
