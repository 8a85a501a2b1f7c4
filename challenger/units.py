"""The work of an audit in pieces that any machine can do alone: one layer at some positions of some requests.

A unit carries the served tensors that it judges, so whoever does it needs the model's folder and nothing else. Where it
is done changes no result: units are cut before anybody knows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from challenger.evidence import Evidence
from challenger.strategy import Cell, thinned
from verifier.audit import JUDGED, Audit, Auditor, Choice, Span, Stage, Verdict
from verifier.commit import Request
from verifier.linear import Bits
from verifier.program import Kind
from verifier.sketch import Sketch
from verifier.trace import RequestTrace

GROUP_ROWS = 4096  # positions that go through a layer together: what a matrix product needs to be efficient
KEPT = 64  # suspicions of each stage and kind that may have to be judged canonically; honest work makes none


@dataclass(frozen=True)
class Rows:
    """One stage's tensors of one layer and one request: the part of a trace that an Auditor reads."""

    arrays: Mapping[str, Bits]
    first_layer: int
    end_layer: int
    positions: int


@dataclass(frozen=True)
class Piece:
    """Positions first .. end - 1 of one request at one layer.

    after: the next stage's tensors, where the layer is the last of its stage and that stage gave them. fed: the tokens
    that were embedded (layer 0). request, tokens: what was asked for and answered (the last layer). mlp: where that is
    judged; None: everywhere.
    """

    stage: int
    rows: Rows
    r: int
    first: int
    end: int
    after: tuple[int, Rows] | None = None
    fed: tuple[int, ...] = ()
    request: Request | None = None
    tokens: tuple[int, ...] = ()
    mlp: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Unit:
    """sketch: what products are screened by; None: they are repeated."""

    layer: int
    pieces: tuple[Piece, ...]
    sketch: Sketch | None = None


@dataclass
class Seen:
    """What an audit collects. Of suspicions, the farthest few of each stage and kind: a stage that serves other weights
    makes millions.
    """

    pieces: int = 0
    suspicious: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    farthest: dict[tuple[int, Kind], list[Verdict]] = field(default_factory=dict)

    def suspicions(self) -> list[Verdict]:
        """Farthest first."""
        return sorted((verdict for found in self.farthest.values() for verdict in found), reverse=True)

    def exact(self, verdicts: Sequence[Verdict]) -> None:
        self.suspicious += len(verdicts)
        for verdict in verdicts:
            self._keep((verdict.stage, verdict.kind), [verdict])

    def add(self, audit: Audit, tokens: Sequence[int] = ()) -> None:
        """tokens: what EMBED embedded, by position."""
        self.pieces += audit.ratios.size
        if audit.ratios.size == 0:
            return
        worst = audit.worst()
        self._worst(audit.kind.name.lower(), worst.ratio)
        if worst.suspicious:
            self.suspicious += audit.suspicious
            found = audit.suspicions(KEPT)
            place = (audit.stage, audit.kind)
            self._keep(place, [replace(v, token=tokens[v.position]) for v in found] if tokens else found)

    def tokens(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self.pieces += 1
            self._worst(verdict.kind.name.lower(), verdict.ratio)
            if verdict.suspicious:
                self.exact([verdict])

    def screened(self, pieces: int, ratio: float) -> None:
        """What led to no verdict, only to a closer look or none."""
        self.pieces += pieces
        self._worst("screen", ratio)

    def merge(self, other: Seen) -> None:
        self.pieces += other.pieces
        self.suspicious += other.suspicious
        for name, ratio in other.worst.items():
            self._worst(name, ratio)
        for place, verdicts in other.farthest.items():
            self._keep(place, verdicts)

    def _keep(self, place: tuple[int, Kind], verdicts: Sequence[Verdict]) -> None:
        self.farthest[place] = heapq.nlargest(KEPT, [*self.farthest.get(place, ()), *verdicts])

    def _worst(self, name: str, ratio: float) -> None:
        self.worst[name] = max(self.worst.get(name, 0.0), ratio)


def units_of(evidence: Evidence) -> Iterator[Unit]:
    """All that the evidence holds, or the cells that were drawn of it. Made one after the other: a job may be large."""
    shape, cells = evidence.shape, evidence.drawn
    # A handful of cells costs less than the sketch itself.
    sketch = Sketch(evidence.seed) if evidence.seed and cells is None else None
    for group in _groups(evidence):
        held = {r: _traces(evidence, r) for r in group}
        for layer in range(shape.layers):
            pieces = []
            for r in group:
                for rows in _spans(cells, r, layer):
                    piece = _piece(evidence, held[r], r, layer, rows)
                    if piece is not None:
                        pieces.append(piece)
            if pieces:
                yield Unit(layer, tuple(pieces), sketch)


def examine(auditor: Auditor, unit: Unit) -> Seen:
    """Does a unit."""
    seen, layer, layers = Seen(), unit.layer, auditor.shape.layers
    stages = [Stage(piece.stage, piece.rows) for piece in unit.pieces]  # type: ignore[arg-type]
    spans = [Span(stage, p.r, p.first, p.end) for stage, p in zip(stages, unit.pieces, strict=True)]
    thin = [
        Span(span.stage, span.request, t, t + 1)
        for span, piece in zip(spans, unit.pieces, strict=True)
        for t in piece.mlp or ()
    ]
    kinds = [kind for kind in JUDGED if not thin or kind != Kind.MLP]
    parts = [(spans, kinds), (thin, [Kind.MLP])] if thin else [(spans, kinds)]
    for where, which in parts:
        for audit in auditor.sweep(layer, where, which, unit.sketch):
            seen.add(audit)
    greedy: list[Choice] = []
    for stage, piece in zip(stages, unit.pieces, strict=True):
        rows = slice(piece.first, piece.end)
        if piece.fed:
            seen.add(auditor.embed(stage, piece.r, piece.fed, rows), piece.fed)
        after = Stage(piece.after[0], piece.after[1]) if piece.after else None  # type: ignore[arg-type]
        link = auditor.link(stage, piece.r, layer, after, rows)
        if link is not None:
            seen.add(link)
        if layer + 1 == layers and piece.request is not None:
            first = len(piece.request.prompt) - 1
            chosen = range(max(first, piece.first), min(first + len(piece.tokens), piece.end))
            if not chosen:
                continue
            if piece.request.greedy:
                served = piece.tokens[chosen.start - first : chosen.stop - first]
                greedy.append(Choice(stage, piece.r, chosen.start, served))
            else:
                drawn = auditor.drawn(stage, piece.r, piece.request, piece.tokens)
                seen.tokens(verdict for verdict in drawn if verdict.position in chosen)
    if greedy:
        seen.tokens(auditor.greedy(greedy))
    return seen


def grouped(evidence: Evidence, requests: Iterable[int], rows: int) -> Iterator[list[int]]:
    """Requests in their order, in groups that have `rows` positions or a little more."""
    group, held = [], 0
    for r in requests:
        group.append(r)
        held += len(evidence.requests[r].prompt) + len(evidence.outputs[r].tokens) - 1
        if held >= rows:
            yield group
            group, held = [], 0
    if group:
        yield group


def _groups(evidence: Evidence) -> Iterator[list[int]]:
    """Requests that are judged together."""
    if evidence.drawn is None:
        yield from grouped(evidence, range(len(evidence.requests)), GROUP_ROWS)
    elif evidence.drawn:
        yield sorted({cell.request for cell in evidence.drawn})


def _spans(cells: Sequence[Cell] | None, r: int, layer: int) -> list[range | None]:
    if cells is None:
        return [None]
    return [range(c.position, c.position + 1) for c in cells if (c.request, c.layer) == (r, layer)]


def _traces(evidence: Evidence, r: int) -> dict[int, RequestTrace]:
    traces = ((index, evidence.trace(index, r)) for index in range(len(evidence.stages)))
    return {index: trace for index, trace in traces if trace is not None}


def _piece(
    evidence: Evidence, held: Mapping[int, RequestTrace], r: int, layer: int, rows: range | None
) -> Piece | None:
    """None where the stage did not give all that is judged together, or has no such position."""
    index = next(i for i, stage in enumerate(evidence.stages) if stage.first_layer <= layer < stage.end_layer)
    trace, shape = held.get(index), evidence.shape
    if trace is None:
        return None
    rows = rows if rows is not None else range(trace.positions)
    if rows.stop > trace.positions:
        return None
    last = layer + 1 == shape.layers
    keys = [f"{layer}.{name}" for name in ("h", "q", "k", "v", "attn_out", "mlp_out")]
    keys += ["out"] if last else [f"{layer + 1}.h"] if layer + 1 < trace.end_layer else []
    if not evidence.has(index, r, keys):
        return None
    after, entered = None, [f"{layer + 1}.h"]
    if layer + 1 == trace.end_layer and not last and index + 1 in held and evidence.has(index + 1, r, entered):
        after = (index + 1, _rows(held[index + 1], entered))
    request, output = evidence.requests[r], evidence.outputs[r]
    known = all(token < shape.vocabulary for token in output.tokens)  # else STOP convicts
    # Of cells that were drawn, the judge compares all embeddings up to them.
    fed = (*request.prompt, *output.tokens[:-1]) if layer == 0 and evidence.drawn is None else ()
    asked, answered = (request, output.tokens) if last and known else (None, ())
    mlp = None
    if evidence.one_in > 1:
        place = evidence.seed + r.to_bytes(4, "big") + layer.to_bytes(4, "big")
        mlp = thinned(trace.positions, evidence.one_in, place)
    return Piece(index, _rows(trace, keys), r, rows.start, rows.stop, after, fed, asked, answered, mlp)


def _rows(trace: RequestTrace, keys: Sequence[str]) -> Rows:
    arrays = {key: trace.arrays[key] for key in keys}
    return Rows(arrays, trace.first_layer, trace.end_layer, trace.positions)
