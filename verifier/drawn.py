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
UNIT = 1 / WHOLE_TOP_P
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
    scores[served] = -np.inf
    # Of those that the whole margin allows, or else of those that nearly do.
    for reach in (margin, NEAR * margin):
        rivals = np.where(logits >= ranked.surely_allowed_from(reach), scores, -np.inf)
        rival = int(rivals.argmax())
        lead = float(rivals[rival])
        if lead > margin:
            break
    beaten = min(lead, ranked.allowed_up_to(float(logits[rival]), lead)) / margin if lead > 0 else 0.0
    return Seen(outside, served) if outside >= beaten else Seen(beaten, rival)


class _Ranked:
    """Logits from the largest down, with the mass of each prefix."""

    def __init__(self, logits: Floats, request: Request) -> None:
        self.logits = -np.sort(-logits)
        self.temperature = request.temperature / WHOLE_TOP_P
        self.top_k = request.top_k or len(logits)
        self.top_p = request.top_p / WHOLE_TOP_P  # a judgment gives way by one unit of it
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
        top_p = self.top_p + UNIT
        return bool(mass * np.exp(-margin / self.temperature) * (1 - top_p) > rest * top_p)

    def allowed_up_to(self, logit: float, limit: float) -> float:
        """The widest margin up to `limit` under which a token of this logit is surely allowed; at least 0."""
        if self._allowed(logit, limit):
            return limit
        low, high = 0.0, limit
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._allowed(logit, middle) else (low, middle)
        return low

    def _allowed(self, logit: float, margin: float) -> bool:
        above = int(np.searchsorted(-self.logits, margin - logit, side="right")) - 1  # but for the token itself
        if above >= self.top_k or not self.filters_mass:
            return above < self.top_k
        mass = float(self.before[above + 1]) - np.exp((logit - self.logits[0]) / self.temperature)
        rest = (float(self.before[-1]) - mass) * np.exp(-margin / self.temperature)
        top_p = max(self.top_p - UNIT, 0.0)
        return above == 0 or bool(mass * (1 - top_p) <= rest * top_p)

    def surely_allowed_from(self, margin: float) -> float:
        """The smallest logit of a token that is surely allowed under a margin; the larger ones all are."""
        above = np.searchsorted(-self.logits, margin - self.logits, side="right") - 1  # but for the token itself
        allowed = above < self.top_k
        if self.filters_mass:
            own = np.diff(self.before)
            mass = self.before[above + 1] - own
            rest = (self.before[-1] - mass) * np.exp(-margin / self.temperature)
            top_p = max(self.top_p - UNIT, 0.0)
            allowed &= (mass * (1 - top_p) <= rest * top_p) | (above == 0)
        # Another token within the margin of the first may leave nobody surely allowed.
        return float(self.logits[allowed][-1]) if allowed.any() else np.inf
