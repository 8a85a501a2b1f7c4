"""Screening outputs without any trace: the prompt executed again, and each token held against the sampling law.

Nothing is downloaded but tokens. Both sides' rounding has come through every layer by then, so the margin is wider than
the law's (calibration measures it): what lies beyond is a suspicion, worth the download of a trace, never a verdict.
"""

from collections.abc import Sequence
from dataclasses import replace

from verifier.audit import Auditor, Stage, Verdict
from verifier.commit import Request
from verifier.execution import Execution
from verifier.tolerance import Profile
from verifier.trace import RequestTrace
from verifier.weights import Weights


class Screen:
    """Screens requests of one model. Time: one forward in float64 a request."""

    def __init__(self, weights: Weights, profile: Profile, margin: int) -> None:
        """margin: by how much two logits' errors may differ end to end, Q30. Raises ValueError below the law's own."""
        if margin < profile.margin:
            raise ValueError(f"expected a margin of at least the law's {profile.margin}, got {margin}")
        self._weights = weights
        wider = replace(profile.cells[-1], floor=margin)
        self._auditor = Auditor(weights, replace(profile, cells=(*profile.cells[:-1], wider)))

    def request(self, r: int, request: Request, output: Sequence[int]) -> list[Verdict]:
        """Each output token, one or more, below the vocabulary: ratios above 1 are suspicions."""
        arrays = Execution(self._weights, [*request.prompt, *output[:-1]]).arrays
        trace = RequestTrace(self._weights.shape, 0, self._weights.shape.layers, arrays)
        return self._auditor.chosen(Stage(0, trace), r, request, output)
