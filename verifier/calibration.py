"""Measuring a tolerance profile from honest runs: collect distances, then set every threshold just above the worst.

Distances are relative: `sqrt(sum (S-D)^2 / (sum D^2 + n*A^2))`, as VERDICT has them (docs/canonical.md), with the
floor A between the unit's own size and its tensor's. Rationale: rounding noise of a weak head does not shrink with that
head, so without A the weak ones would be false frauds; half of the unit's own size keeps it from being room for a lie.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, sqrt

import numpy as np
import numpy.typing as npt

from verifier.program import Kind, ModelShape, profile_cells, profile_index
from verifier.referee.codec import BLOCK, ProfileCell
from verifier.referee.fixed import Q30
from verifier.referee.floats import Dtype
from verifier.tolerance import MIN_FLOOR, Profile

Floats = npt.NDArray[np.float64]

TOLERATED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP)
MARGIN = 1.3
# Of the threshold over the worst honest piece. Measured on random models: 1.25 still sees nearly lossless int8 (groups
# of 16) in almost every piece, 1.4 in most.
DENOMINATOR = 10**9
WIDEST_16_BIT = 0.05
WIDEST_32_BIT = 0.005
# A wider honest band cannot be told from 8-bit weights (16-bit serving) or from 16-bit serving (32-bit).
NARROWEST = {Dtype.BFLOAT16: 2.0**-10, Dtype.FLOAT16: 2.0**-13, Dtype.FLOAT32: 2.0**-20}
# Half a unit roundoff, or the error of the standard result itself: below it a threshold would only mean a poor sample.
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


class UnseparableModel(ValueError):
    """Honest runs differ too much for any threshold to tell them from fraud. Names the tensor, layer and unit."""


@dataclass
class _Pieces:
    """Of one tensor kind of one layer: by unit, sums over a piece at each observed position."""

    distance: dict[int, list[Floats]] = field(default_factory=dict)  # sum (S-D)^2
    size: dict[int, list[Floats]] = field(default_factory=dict)  # sum D^2
    elements: dict[int, int] = field(default_factory=dict)

    def joined(self, unit: int) -> tuple[Floats, Floats]:
        return np.concatenate(self.distance[unit]), np.concatenate(self.size[unit])


@dataclass(frozen=True)
class KindReport:
    """What was seen of one tensor kind. Distances are relative; worst is (layer, unit, n-th observed position)."""

    pieces: int
    quantiles: Mapping[float, float]
    worst: tuple[int, int, int]
    threshold: float


class Calibration:
    """Collects honest runs. Values are real numbers (not Q30)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Kind, int], _Pieces] = {}
        self._logit_spread = 0.0
        self._logit_rows = 0

    def add(self, kind: Kind, layer: int, unit: int, served: Floats, standard: Floats) -> None:
        """One head or block at some positions: served and standard [positions, n], finite. Raises ValueError."""
        if served.shape != standard.shape or served.ndim != 2 or not served.size:
            raise ValueError(f"expected two arrays [positions, n], got {served.shape} and {standard.shape}")
        if kind not in TOLERATED:
            raise ValueError(f"expected one of {[k.name for k in TOLERATED]}, got {kind.name}")
        if not (np.isfinite(served).all() and np.isfinite(standard).all()):
            raise ValueError(f"expected finite values of {kind.name} layer {layer} unit {unit}, got NaN or infinity")
        pieces = self._seen.setdefault((kind, layer), _Pieces())
        pieces.distance.setdefault(unit, []).append(np.square(served - standard).sum(axis=1))
        pieces.size.setdefault(unit, []).append(np.square(standard).sum(axis=1))
        pieces.elements[unit] = served.shape[1]

    def add_tensor(self, kind: Kind, layer: int, unit_columns: int, served: Floats, standard: Floats) -> None:
        """A whole tensor [positions, width], cut into units of unit_columns columns (the last one narrower)."""
        for unit, first in enumerate(range(0, served.shape[1], unit_columns)):
            columns = slice(first, first + unit_columns)
            self.add(kind, layer, unit, served[:, columns], standard[:, columns])

    def add_logits(self, served: Floats, standard: Floats) -> None:
        """All logits [positions, vocabulary], as an honest server computed them and as the standard has them."""
        if served.shape != standard.shape or served.ndim != 2 or not served.size:
            raise ValueError(f"expected two arrays [positions, vocabulary], got {served.shape} and {standard.shape}")
        # A competitor seems ahead by the difference of two errors; at a high temperature it may be any token.
        error = served - standard
        self._logit_spread = max(self._logit_spread, float((error.max(axis=1) - error.min(axis=1)).max()))
        self._logit_rows += len(served)

    def profile(self, shape: ModelShape, margin: float = MARGIN) -> Profile:
        """The profile of what was seen. Raises UnseparableModel, and ValueError where a unit was never seen."""
        self._check_complete(shape)
        widest = WIDEST_32_BIT if shape.served_dtype == Dtype.FLOAT32 else WIDEST_16_BIT
        cells = [ProfileCell(0, 1, MIN_FLOOR)] * profile_cells(shape)
        for kind in TOLERATED:
            worst, place = self._worst(kind)
            if margin * worst > widest:
                where = f"{kind.name} layer {place[0]} unit {place[1]}"
                raise UnseparableModel(
                    f"expected honest runs within {widest / margin:.4f} of the standard, got {worst:.4f} at {where}"
                )
            num = ceil(max(margin * worst, NARROWEST[shape.served_dtype]) * DENOMINATOR)
            for layer in range(shape.layers):
                for unit, floor in self._floors(kind, layer).items():
                    cells[profile_index(shape, kind, layer, unit)] = ProfileCell(num, DENOMINATOR, q30_floor(floor))
        cells[-1] = ProfileCell(1, 1, q30_floor(margin * self._logit_spread))
        return Profile(shape, tuple(cells))

    def report(self, margin: float = MARGIN) -> dict[Kind, KindReport]:
        """What was seen, by kind."""
        out = {}
        for kind in TOLERATED:
            ratios = [ratio for layer in self._layers(kind) for ratio in self._ratios(kind, layer).values()]
            if not ratios:
                continue
            every = np.concatenate(ratios)
            quantiles = {q: float(np.quantile(every, q)) for q in QUANTILES}
            worst, place = self._worst(kind)
            out[kind] = KindReport(len(every), quantiles, place, margin * worst)
        return out

    @property
    def logit_spread(self) -> float:
        """The largest seen difference of two candidates' logit errors at one position."""
        return self._logit_spread

    def _layers(self, kind: Kind) -> list[int]:
        return sorted(layer for seen, layer in self._seen if seen == kind)

    def _floors(self, kind: Kind, layer: int) -> dict[int, float]:
        """A by unit: the root of half the unit's and half the tensor's median mean square."""
        pieces = self._seen[kind, layer]
        own = {unit: pieces.joined(unit)[1] / n for unit, n in pieces.elements.items()}
        if len({len(size) for size in own.values()}) > 1:
            raise ValueError(f"expected every unit of {kind.name} layer {layer} at the same positions")
        columns = sum(pieces.elements.values())
        tensor = sum(own[unit] * n for unit, n in pieces.elements.items()) / columns
        shared = float(np.median(tensor))
        return {unit: sqrt(0.5 * float(np.median(size)) + 0.5 * shared) for unit, size in own.items()}

    def _ratios(self, kind: Kind, layer: int) -> dict[int, Floats]:
        """Relative distances by unit."""
        pieces, out = self._seen[kind, layer], {}
        for unit, floor in self._floors(kind, layer).items():
            distance, size = pieces.joined(unit)
            least = max(floor, MIN_FLOOR / Q30)
            out[unit] = np.sqrt(distance / (size + pieces.elements[unit] * least**2))
        return out

    def _worst(self, kind: Kind) -> tuple[float, tuple[int, int, int]]:
        found = [
            (float(ratio.max()), (layer, unit, int(ratio.argmax())))
            for layer in self._layers(kind)
            for unit, ratio in self._ratios(kind, layer).items()
        ]
        return max(found)

    def _check_complete(self, shape: ModelShape) -> None:
        units = {Kind.Q: shape.heads, Kind.K: shape.kv_heads, Kind.V: shape.kv_heads}
        for kind in TOLERATED:
            wide = shape.head_dim if kind in units else BLOCK
            for layer in range(shape.layers):
                seen = self._seen.get((kind, layer), _Pieces()).elements
                expected = set(range(units.get(kind, shape.blocks)))
                if set(seen) != expected:
                    missing, extra = sorted(expected - set(seen)), sorted(set(seen) - expected)
                    raise ValueError(f"{kind.name} layer {layer}: units {missing} never seen, {extra} do not exist")
                if any(n > wide for n in seen.values()):
                    raise ValueError(f"{kind.name} layer {layer}: expected units of {wide} columns, got {seen}")
        if not self._logit_rows:
            raise ValueError("expected logits of one position or more, got none")


def q30_floor(value: float) -> int:
    """A floor or margin in Q30, rounded up, never below what the law allows."""
    return max(MIN_FLOOR, ceil(value * Q30))
