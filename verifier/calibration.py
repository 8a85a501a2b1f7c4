"""Measuring a tolerance profile from honest runs: collect distances, then set every threshold just above the worst.

Distances are relative: `sqrt(sum (S-D)^2 / (sum D^2 + n*A^2))`, as VERDICT has them (docs/canonical.md), with the
floor A between the unit's own size and its tensor's. Rationale: rounding noise of a weak head does not shrink with that
head, so without A the weak ones would be false frauds; half of the unit's own size keeps it from being room for a lie.
How much of the noise does not shrink differs by kind and layer (what attention sums is rounded in proportion, a
projection in proportion to its input), so the floor's share is measured too: the one that leaves the least room.

A head or block has a usual honest distance of its own. The threshold is so many usual distances, the same number for
all units of a kind at a layer: the width is read from each unit alone, the tail from all units of the layer together,
or from those of all layers, whichever tail is known to be shorter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log, sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt

from verifier.program import Kind, ModelShape, profile_cells, profile_index
from verifier.referee.codec import BLOCK, ProfileCell
from verifier.referee.fixed import Q30
from verifier.referee.floats import Dtype
from verifier.tolerance import MIN_FLOOR, InvalidProfile, Profile

Floats = npt.NDArray[np.float64]

TOLERATED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP)
REPORT_NAME = "calibration.json"  # beside the profile: how it came about; no law
MARGIN = 1.25
# The least of the threshold over the worst honest piece; small samples get more (`bound`).
SHARES = (0.0625, 0.25, 1.0, 4.0)
# Of the floor's square in the sizes' mean square. None smaller: an unseen position may be weaker than all seen ones.
USUAL = 0.9
# The quantile of honest distances that counts as usual, and of the room that a share leaves. One cell sees nearly
# lossless int8 (groups of 16) in bfloat16 more often with widths by unit and shares by layer than with one of each by
# kind, and with this quantile than with the median: the demo's model in 94 %, and in 98 % with tails by layer as well.
RARITY = 1e-9
# How often a threshold may be passed by honest serving, per verdict, were the tail exponential beyond the worst seen.
# Measured tails of 25,000 to 200,000 verdicts are exponential (MLP) or fall faster (V, attention).
TAIL = 0.01  # the share of the largest distances that the tail is read from
TAIL_LEAST = 10
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
class Bound:
    """Where a threshold stands over `count` values: above the worst by `margin`, which the sample's size decides.

    scale: by how much the largest values exceed where they begin, on average: the tail's, if it is exponential.
    """

    count: int
    worst: float
    scale: float
    threshold: float

    @property
    def margin(self) -> float:
        """threshold / worst; 1 where nothing was off at all."""
        return self.threshold / self.worst if self.worst else 1.0


def bound(values: Floats, margin: float, repeats: float = 1.0) -> Bound:
    """The threshold over honest values: `margin` times the worst, or more where the sample is small for its tail.

    An exponential tail that showed its worst in n values passes worst + scale * ln(1 / (n * p)) once in 1/p. values:
    one or more; repeats: how many of them count as one.
    """
    largest = np.sort(values)[-_tail(len(values)) :]
    worst, scale = float(largest[-1]), float(largest.mean() - largest[0])
    beyond = scale * max(0.0, log(repeats / (len(values) * RARITY)))
    return Bound(len(values), worst, scale, max(margin * worst, worst + beyond))


def clustered(units: Sequence[Floats], settings: int) -> float:
    """How many of the largest values stem from one position of one unit, on average, so that they count as one: from 1,
    each setting by itself, to `settings`, all alike. units: values of each, setting by setting, the positions in one
    order; where they are not, as many as there are settings.
    """
    if any(len(rows) % settings for rows in units):
        return float(settings)
    every = np.concatenate(units)
    start = np.partition(every, -_tail(len(every)))[-_tail(len(every))]
    beyond = [rows.reshape(settings, -1) >= start for rows in units]
    return float(sum(int(b.sum()) for b in beyond) / sum(int(b.any(axis=0).sum()) for b in beyond))


def _tail(count: int) -> int:
    """How many of the largest values the tail is read from."""
    return min(count, max(TAIL_LEAST, ceil(TAIL * count)))


@dataclass(frozen=True)
class KindReport:
    """What was seen of one tensor kind. Quantiles, scale and thresholds count usual distances of each unit; usual holds
    the least and the largest of those, relative; worst is (layer, unit, n-th observed position); shares and thresholds
    go by layer. scale and margin: of all layers together.
    """

    pieces: int
    quantiles: Mapping[float, float]
    worst: tuple[int, int, int]
    shares: tuple[float, ...]
    usual: tuple[float, float]
    scale: float
    margin: float
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class _Fit:
    """One kind at one layer under one share: each unit's floor, its usual distance, and all distances in usual ones."""

    share: float
    floors: dict[int, float]
    usual: dict[int, float]
    ratios: dict[int, Floats]
    room: float  # relative distance that `usual` ones would leave room for, at most pieces

    @property
    def every(self) -> Floats:
        return np.concatenate(list(self.ratios.values()))


class Calibration:
    """Collects honest runs. Values are real numbers (not Q30)."""

    def __init__(self, repeats: int = 1) -> None:
        """repeats: in how many settings each position is served."""
        self._repeats = repeats
        self._seen: dict[tuple[Kind, int], _Pieces] = {}
        self._spreads: list[Floats] = []
        self._chosen: dict[tuple[Kind, float], tuple[dict[int, _Fit], Bound]] = {}

    def add(self, kind: Kind, layer: int, unit: int, served: Floats, standard: Floats) -> None:
        """One head or block at some positions: served and standard [positions, n], finite. Raises ValueError."""
        if served.shape != standard.shape or served.ndim != 2 or not served.size:
            raise ValueError(f"expected two arrays [positions, n], got {served.shape} and {standard.shape}")
        if kind not in TOLERATED:
            raise ValueError(f"expected one of {[k.name for k in TOLERATED]}, got {kind.name}")
        if not (np.isfinite(served).all() and np.isfinite(standard).all()):
            raise ValueError(f"expected finite values of {kind.name} layer {layer} unit {unit}, got NaN or infinity")
        self._chosen.clear()
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
        self._spreads.append(error.max(axis=1) - error.min(axis=1))

    def profile(self, shape: ModelShape, margin: float = MARGIN) -> Profile:
        """The profile of what was seen. Raises UnseparableModel, and ValueError where a unit was never seen."""
        self._check_complete(shape)
        widest = WIDEST_32_BIT if shape.served_dtype == Dtype.FLOAT32 else WIDEST_16_BIT
        cells = [ProfileCell(0, 1, MIN_FLOOR)] * profile_cells(shape)
        for kind in TOLERATED:
            fits, found = self._choice(kind, margin)
            thresholds = {layer: self._threshold(fit, found, margin) for layer, fit in fits.items()}
            # One weak head may stay hard to judge; half of a tensor's units must not.
            width, layer, unit = max(
                sorted((thresholds[layer] * usual, layer, unit) for unit, usual in fit.usual.items())[
                    (len(fit.usual) - 1) // 2
                ]
                for layer, fit in fits.items()
            )
            if width > widest:
                worst = fits[layer].usual[unit] * float(fits[layer].ratios[unit].max())
                raise UnseparableModel(
                    f"expected a tolerance of at most {widest}, got {width:.4f}: honest runs lie up "
                    f"to {worst:.4f} from the standard, at {kind.name} layer {layer} unit {unit}"
                )
            for layer, fit in fits.items():
                for unit, floor in fit.floors.items():
                    width = max(thresholds[layer] * fit.usual[unit], NARROWEST[shape.served_dtype])
                    cell = ProfileCell(ceil(width * DENOMINATOR), DENOMINATOR, q30_floor(floor))
                    cells[profile_index(shape, kind, layer, unit)] = cell
        cells[-1] = ProfileCell(1, 1, q30_floor(self.logits(margin).threshold))
        return Profile(shape, tuple(cells))

    def report(self, margin: float = MARGIN) -> dict[Kind, KindReport]:
        """What was seen, by kind."""
        out = {}
        for kind in TOLERATED:
            if not self._layers(kind):
                continue
            fits, found = self._choice(kind, margin)
            every = np.concatenate([fit.every for fit in fits.values()])
            quantiles = {q: float(np.quantile(every, q)) for q in QUANTILES}
            widths = [usual for fit in fits.values() for usual in fit.usual.values()]
            _, worst = max(
                (float(ratio.max()), (layer, unit, int(ratio.argmax())))
                for layer, fit in fits.items()
                for unit, ratio in fit.ratios.items()
            )
            shares, usual = tuple(fit.share for fit in fits.values()), (min(widths), max(widths))
            rest = found.scale, found.margin, tuple(self._threshold(fit, found, margin) for fit in fits.values())
            out[kind] = KindReport(found.count, quantiles, worst, shares, usual, *rest)
        return out

    def logits(self, margin: float = MARGIN) -> Bound:
        """Of the difference of two candidates' logit errors at one position, the largest of each; in logits."""
        return bound(np.concatenate(self._spreads), margin, self._repeats)

    @property
    def logit_spread(self) -> float:
        """The largest seen difference of two candidates' logit errors at one position."""
        return self.logits().worst

    def _layers(self, kind: Kind) -> list[int]:
        return sorted(layer for seen, layer in self._seen if seen == kind)

    def _choice(self, kind: Kind, margin: float) -> tuple[dict[int, _Fit], Bound]:
        """By layer, the share that leaves the least room; the bound of all of them, in usual distances."""
        if (kind, margin) not in self._chosen:
            fits = {}
            for layer in self._layers(kind):
                tried = [self._fit(kind, layer, share) for share in SHARES]
                rooms = [self._bound([fit], margin).threshold * fit.room for fit in tried]
                fits[layer] = tried[rooms.index(min(rooms))]
            self._chosen[kind, margin] = fits, self._bound(list(fits.values()), margin)
        return self._chosen[kind, margin]

    def _threshold(self, fit: _Fit, everywhere: Bound, margin: float) -> float:
        """Of one layer, in usual distances. It is `margin` times the layer's worst or more, for both bounds are."""
        return min(self._bound([fit], margin).threshold, everywhere.threshold)

    def _bound(self, fits: Sequence[_Fit], margin: float) -> Bound:
        every = np.concatenate([fit.every for fit in fits])
        return bound(every, margin, clustered([rows for fit in fits for rows in fit.ratios.values()], self._repeats))

    def _fit(self, kind: Kind, layer: int, share: float) -> _Fit:
        pieces = self._seen[kind, layer]
        floors = self._floors(kind, layer, share)
        usual, ratios, rooms = {}, {}, []
        for unit, floor in floors.items():
            distance, size = pieces.joined(unit)
            n, least = pieces.elements[unit], MIN_FLOOR / Q30
            scale = size + n * max(floor, least) ** 2
            far = np.sqrt(distance / scale)
            usual[unit] = max(float(np.quantile(far, USUAL)), least)
            ratios[unit] = far / usual[unit]
            rooms.append(usual[unit] * np.sqrt(scale / np.maximum(size, n * least**2)))
        return _Fit(share, floors, usual, ratios, float(np.quantile(np.concatenate(rooms), USUAL)))

    def _floors(self, kind: Kind, layer: int, share: float) -> dict[int, float]:
        """A by unit: the root of half the unit's and half the tensor's median mean square, times the share."""
        pieces = self._seen[kind, layer]
        own = {unit: pieces.joined(unit)[1] / n for unit, n in pieces.elements.items()}
        if len({len(size) for size in own.values()}) > 1:
            raise ValueError(f"expected every unit of {kind.name} layer {layer} at the same positions")
        columns = sum(pieces.elements.values())
        tensor = sum(own[unit] * n for unit, n in pieces.elements.items()) / columns
        shared = float(np.median(tensor))
        return {unit: sqrt(share * (0.5 * float(np.median(size)) + 0.5 * shared)) for unit, size in own.items()}

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
        if not self._spreads:
            raise ValueError("expected logits of one position or more, got none")


def screen_margins(folder: Path, profile: Profile) -> float | None:
    """By how many token margins two honest executions of a whole model may differ about a token, as REPORT_NAME in
    `folder` tells. None where it is not there, or belongs to another profile. Raises InvalidProfile, OSError.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        logits = told["logits"]
        margins = float(logits["screen"]["threshold"]) / float(logits["token"]["threshold"])
        root = told["profile_root"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise InvalidProfile(f"{path}: expected what plumb model calibrate wrote, got {error!r}") from error
    if not 0 < margins < inf:
        raise InvalidProfile(f"{path}: expected a screen's margin above 0, got {margins}")
    return margins if root == profile.root.hex() else None


def q30_floor(value: float) -> int:
    """A floor or margin in Q30, rounded up, never below what the law allows."""
    return max(MIN_FLOOR, ceil(value * Q30))
