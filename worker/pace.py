"""How many microbatches fill the ring, from what came back. Pure: no clock.

A microbatch that waits nowhere is back after sum(T + L), stage and hop times; the slowest stage lets one pass each
max T. So M = ceil(sum(T + L) / max T) keep it busy, and some more even out what varies. Stages tell their T on the
wire; what is left of the shortest time round is the hops'.
"""

import math

MARGIN = 1.25
MOST = 4096  # whatever a stage tells
SMOOTHING = 1 / 8  # of stage times: the weight of the latest
SHORTEST_SECONDS = 1e-6


class Pace:
    """`microbatches` may be in flight; `groups` of requests, one a microbatch, would just fill the ring.

    Stage times are told by the stages themselves: a false one makes the ring slow or its queues longer, never more
    than MOST.
    """

    def __init__(self, stages: int, fixed: int = 0, swaps: bool = False) -> None:
        """fixed: microbatches in flight whatever is measured; 0 measures, beginning with one for each stage and one
        on the way. A single stage has nothing to wait for: one at a time; swaps: and one whose keys and values come in.
        """
        if stages < 1 or fixed < 0:
            raise ValueError(f"expected one stage or more and no negative bound, came {stages} and {fixed}")
        self.fixed = bool(fixed) or stages == 1
        self.microbatches = self.groups = fixed or (stages + 1 if stages > 1 else 1 + swaps)
        self.slowest_seconds = 0.0  # max T, smoothed
        self.busy_seconds = 0.0  # sum T, smoothed
        self.hops_seconds = math.inf  # sum L

    def returned(self, round_seconds: float, busy_seconds: float, slowest_seconds: float) -> None:
        """A microbatch came back: seconds since its first stage began, the sum of its stage times, and the slowest
        stage's, on average.
        """
        first = math.isinf(self.hops_seconds)
        # Rationale: the smallest, since anything above it is waiting in queues, which more microbatches only lengthen.
        self.hops_seconds = min(self.hops_seconds, max(0.0, round_seconds - busy_seconds))
        weight = 1.0 if first else SMOOTHING
        self.slowest_seconds += weight * (max(slowest_seconds, SHORTEST_SECONDS) - self.slowest_seconds)
        self.busy_seconds += weight * (busy_seconds - self.busy_seconds)
        if not self.fixed:
            full = (self.busy_seconds + self.hops_seconds) / self.slowest_seconds
            self.groups = max(1, min(MOST, math.ceil(full)))
            self.microbatches = max(1, min(MOST, math.ceil(MARGIN * full)))
