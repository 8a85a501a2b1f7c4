"""Prompts that begin alike: who computes what they share, and who takes it from whom. Pure.

Whole pages only. A page is computed once among the requests in flight, by whoever comes to it first; the others wait
until it is on its way and take it then from somebody who has it. Who leaves gives nothing any more: if nobody else
has the page, the next one computes it again.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from worker.cache import PAGE


class Prefixes:
    """Of all requests of a job, by index."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        # A page has one number in all prompts that begin with it and what is before it.
        numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        paths: list[list[int]] = []
        for prompt in prompts:
            path = [-1]
            for first in range(0, len(prompt) - PAGE + 1, PAGE):
                path.append(numbers.setdefault((path[-1], tuple(prompt[first : first + PAGE])), len(numbers)))
            paths.append(path[1:])
        counts = Counter(chain.from_iterable(paths))
        self._paths = [[page for page in path if counts[page] > 1] for path in paths]
        # The last token of a prompt is computed by its own request: that row chooses the first output token.
        self._takable = [min(len(path), (len(p) - 1) // PAGE) for path, p in zip(self._paths, prompts, strict=True)]
        self._having: dict[int, dict[int, None]] = {}  # page -> requests in flight that have it
        self._coming: dict[int, int] = {}  # page that nobody has yet -> who computes it

    def waits(self, request: int) -> bool:
        """Whether one that has not begun had better wait: somebody is computing the next page that it needs."""
        had = self._had(request)
        return had < self._takable[request] and self._paths[request][had] in self._coming

    def taken(self, request: int) -> tuple[int, int | None]:
        """(positions that one who has not begun need not compute, whose they are); (0, None) if it must compute all."""
        had = self._had(request)
        return (had * PAGE, next(iter(self._having[self._paths[request][had - 1]]))) if had else (0, None)

    def begins(self, request: int) -> None:
        """It computes what it does not take."""
        for page in self._paths[request][self._had(request) :]:
            if not self._having.get(page):
                self._coming.setdefault(page, request)

    def sent(self, request: int, first: int, end: int) -> None:
        """Its positions `first` .. `end` - 1 are on their way: whatever is sent behind them finds them."""
        for page in self._paths[request][first // PAGE : end // PAGE]:
            self._having.setdefault(page, {})[request] = None
            self._coming.pop(page, None)

    def leaves(self, request: int) -> None:
        for page in self._paths[request]:
            self._having.get(page, {}).pop(request, None)

    def _had(self, request: int) -> int:
        """Pages that somebody has, of those that it may take: who has a page has those before it."""
        path = self._paths[request]
        return bisect_left(range(self._takable[request]), True, key=lambda place: not self._having.get(path[place]))
