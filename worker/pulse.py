"""Heartbeats of one attempt at one stage: what tells a neighbour that died, hangs or turned slow. Pure: time is given.

A stage beats to its successor every `beat_seconds` and tells how long it has had the oldest microbatch that it has
not computed. Silence for `silence_seconds`, or a microbatch held for `slow_seconds`, ends the attempt.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from worker.config import Serving
from worker.errors import Silent, Stalled


class Pulse:
    """Seconds by one monotonic clock. Until the predecessor was heard first it isn't judged: it may not know of the
    attempt yet.
    """

    def __init__(self, predecessor: str, serving: Serving) -> None:
        self._predecessor = predecessor
        self._serving = serving
        self._heard: float | None = None
        self._judged: float | None = None
        self._waiting = 0  # messages of the predecessor for which there is no room yet
        self._last = False
        self._told_seconds = 0.0  # for how long it holds its oldest microbatch
        self._held: deque[float] = deque()  # since when we hold ours that are not begun
        self._begun: float | None = None  # and the one that is computed

    # ---- of the predecessor

    def came(self, now: float) -> None:
        """A message came, and waits to be queued."""
        self._heard = now
        self._waiting += 1

    def queued(self, now: float) -> None:
        self._heard = now
        self._waiting -= 1

    def beat(self, held_seconds: float, last: bool, now: float) -> None:
        self._heard = now
        self._told_seconds = held_seconds
        self._last = self._last or last

    def judge(self, now: float) -> None:
        """Raises Stalled; Silent if that is all there is."""
        late = self._judged is not None and now - self._judged > self._serving.silence_seconds / 2
        self._judged = now
        if self._last:  # the Finish of a stage that dies now comes when it is back: its trace is final
            return
        if self._told_seconds > self._serving.slow_seconds:
            raise Stalled(self._predecessor, f"has had a microbatch for {self._told_seconds:.1f} s")
        if self._heard is None or self._waiting:
            return
        if late:  # it was ourselves who had no time to listen
            self._heard = now
        elif now - self._heard > self._serving.silence_seconds:
            raise Silent(self._predecessor, f"silent for {now - self._heard:.1f} s")

    def heard_since(self, then: float) -> bool:
        return self._heard is not None and self._heard >= then

    def answered(self, now: float) -> None:
        """It was asked, and is well: its beats are behind something."""
        self._heard = now

    # ---- of ourselves

    def took(self, now: float) -> None:
        """A microbatch is ours to compute; they are computed in order."""
        self._held.append(now)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The oldest, in any one thread. It is held no more behind this, whatever comes of it."""
        self._begun = self._held.popleft() if self._held else None
        try:
            yield
        finally:
            self._begun = None

    def over(self) -> None:
        """The attempt is: what was not begun is held no more. Else a stage would seem ill that nobody waits for."""
        self._held = deque()

    def held_seconds(self, now: float) -> float:
        begun, held = self._begun, list(self._held)
        return now - min(held if begun is None else [begun, *held], default=now)
