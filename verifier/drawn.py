"""Screening drawn tokens in float64: how far a served token is from what the sampling law forbids.

A ratio above 1 is wrong; `verifier.audit` has what comes near it judged canonically.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verifier.commit import WHOLE_TOP_P, Request
from verifier.linear import Ints
from verifier.referee.fixed import Q30

Floats = npt.NDArray[np.float64]

ROWS = 64  # rows of logits at a time: 64 MB at a vocabulary of 128,256
NEAR = 0.97  # of the margin: what is nearer to it is left to the canonical judgment
_HALVINGS = 20  # of a margin's range: far finer than what a ratio is compared with


@dataclass(frozen=True)
class Seen:
    """The worst that can be said of a served token: by how much, in margins, and with which unit of SAMPLE."""

    ratio: float
    unit: int


def screen(logits: Floats, noise: Ints, served: int, request: Request, margin: float) -> Seen:
    """One drawn token against all. logits: [vocabulary], standard; noise: theirs, Q30; margin in logits."""
    ranked = _Ranked(logits, request)
    outside = ranked.excluded_by(float(logits[served])) / margin
    scores = logits + request.temperature / WHOLE_TOP_P * (noise / Q30)
    scores -= scores[served]
    scores[logits < ranked.surely_allowed_from(NEAR * margin)] = -np.inf
    scores[served] = -np.inf
    rival = int(scores.argmax())
    beaten = float(scores[rival]) / margin
    return Seen(outside, served) if outside >= beaten else Seen(max(beaten, 0.0), rival)


class _Ranked:
    """Logits from the largest down, with the mass of each prefix."""

    def __init__(self, logits: Floats, request: Request) -> None:
        self.logits = -np.sort(-logits)
        self.temperature = request.temperature / WHOLE_TOP_P
        self.top_k = request.top_k or len(logits)
        self.top_p = request.top_p / WHOLE_TOP_P
        weights = np.exp((self.logits - self.logits[0]) / self.temperature)
        self.before = np.concatenate([[0.0], np.cumsum(weights)])
        self.filters_mass = request.top_p < WHOLE_TOP_P

    def excluded_by(self, logit: float) -> float:
        """The widest margin under which a token of this logit is still surely excluded; 0 for one that is allowed."""
        if not self._excluded(logit, 0.0):
            return 0.0
        low, high = 0.0, float(self.logits[0]) - logit
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._excluded(logit, middle) else (low, middle)
        return low

    def _excluded(self, logit: float, margin: float) -> bool:
        above = int(np.searchsorted(-self.logits, -(logit + margin), side="left"))
        if above >= self.top_k:
            return True
        if not self.filters_mass:
            return False
        mass = float(self.before[above])
        rest = float(self.before[-1]) - mass
        return bool(mass * np.exp(-margin / self.temperature) * (1 - self.top_p) > rest * self.top_p)

    def surely_allowed_from(self, margin: float) -> float:
        """The smallest logit of a token that is surely allowed under a margin; the larger ones all are."""
        above = np.searchsorted(-self.logits, margin - self.logits, side="right") - 1  # but for the token itself
        allowed = above < self.top_k
        if self.filters_mass:
            own = np.diff(self.before)
            mass = self.before[above + 1] - own
            rest = (self.before[-1] - mass) * np.exp(-margin / self.temperature)
            allowed &= (mass * (1 - self.top_p) <= rest * self.top_p) | (above == 0)
        # Another token within the margin of the first may leave nobody surely allowed.
        return float(self.logits[allowed][-1]) if allowed.any() else np.inf
