"""Auditing what workers served: every piece of a request re-executed from what it was made of, or compared exactly.

Rationale: a little over 400 lines, so that every rule is read in one file.

Tolerated pieces get a ratio, distance over tolerance by VERDICT's formula in float64: above 1 is wrong. Only `confirm`,
in the canonical arithmetic, may say so to others. Exact pieces have ratio infinity where a rule is broken, else 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from verifier import sampling, vectors
from verifier.canonical import Case
from verifier.commit import Output, Request
from verifier.drawn import ROWS, screen
from verifier.linear import Bits
from verifier.program import Kind, ModelShape, overflow_bound, profile_index
from verifier.referee.codec import BLOCK, GREEDY, Model
from verifier.referee.fixed import Q30
from verifier.reference import Reference, matrix_of, product
from verifier.sketch import DIRECTIONS, DOUBT, Sketch, pressed, seen_distances
from verifier.sources import ServedTensors
from verifier.tolerance import Profile
from verifier.weights import Weights

Ratios = npt.NDArray[np.float64]

SUSPICION = 0.97
# Above it a piece is judged canonically. The reference lies within 1e-6 of the standard result, so 3 % is plenty, and
# it costs a canonical run only for what no honest worker should come near (the margin is 1.25 or more).
WRONG = float("inf")
RIGHT = 0.0
NO_TOKEN = 0xFFFFFFFF
JUDGED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP)
_TENSOR = {Kind.Q: "q", Kind.K: "k", Kind.V: "v", Kind.ATTEND: "attn_out", Kind.MLP: "mlp_out"}


@dataclass(frozen=True, order=True)
class Verdict:
    """One piece and how far off it is. The fields are those of verifier.game.Segment but for the job."""

    ratio: float
    stage: int
    kind: Kind
    request: int
    layer: int
    position: int
    unit: int
    token: int = 0  # served (TOKEN, SAMPLE) or embedded (EMBED)
    reason: str = field(default="", compare=False)
    sampling: bytes = field(default=GREEDY, compare=False)  # the request's parameters (SAMPLE)

    @property
    def suspicious(self) -> bool:
        """Worth a canonical judgment (tolerated pieces), or simply wrong (exact ones)."""
        return self.ratio > SUSPICION


@dataclass(frozen=True)
class Stage:
    """One stage's part of a request: its place in the pipeline and the tensors it serves."""

    index: int
    trace: ServedTensors


@dataclass(frozen=True)
class Span:
    """Positions first .. end - 1 of one request at one stage."""

    stage: Stage
    request: int
    first: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        return np.arange(self.first, self.end)

    @staticmethod
    def whole(stage: Stage, request: int) -> "Span":
        return Span(stage, request, 0, stage.trace.positions)


@dataclass(frozen=True)
class Choice:
    """Output tokens of one request, chosen from the rows of `out` at positions first, first + 1 ..."""

    stage: Stage
    request: int
    first: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """Ratios of all units of one kind at one layer: [positions, units]. first: the position of the first row.

    elements: LINK, whose ratios are those of blocks: the element of each that is judged.
    """

    stage: int
    kind: Kind
    request: int
    layer: int
    ratios: Ratios
    first: int = 0
    elements: npt.NDArray[np.int64] | None = None

    def worst(self) -> Verdict:
        """The piece that is farthest off."""
        position, unit = np.unravel_index(int(self.ratios.argmax()), self.ratios.shape)
        return self._verdict(int(position), int(unit))

    @property
    def suspicious(self) -> int:
        """How many pieces are above the threshold."""
        return int((self.ratios > SUSPICION).sum())

    def suspicions(self, most: int | None = None) -> list[Verdict]:
        """Every piece above the threshold, or the farthest `most` of them, by position and unit."""
        beyond = self.ratios > SUSPICION
        places = np.argwhere(beyond)
        if most is not None and len(places) > most:
            places = places[np.sort(np.argpartition(self.ratios[beyond], -most)[-most:])]
        return [self._verdict(int(position), int(unit)) for position, unit in places]

    def _verdict(self, position: int, unit: int) -> Verdict:
        ratio = float(self.ratios[position, unit])
        if self.elements is not None:
            unit = int(self.elements[position, unit])
        return Verdict(ratio, self.stage, self.kind, self.request, self.layer, self.first + position, unit)


class Auditor:
    """Audits requests of one model. Holds no tensors: one tile of weights at a time."""

    def __init__(self, weights: Weights, profile: Profile, precision: torch.dtype = torch.float64) -> None:
        """profile: of the same shape. precision: as verifier.reference has it. Raises ValueError otherwise."""
        if profile.shape != weights.shape:
            raise ValueError(f"expected a profile of {weights.shape}, got one of {profile.shape}")
        self.weights, self.profile = weights, profile
        self.shape: ModelShape = weights.shape
        self.reference = Reference(weights, precision)

    def layer(self, stage: Stage, request: int, layer: int, kinds: Sequence[Kind] = JUDGED) -> list[Audit]:
        """The tolerated pieces of one layer at all positions. Raises KeyError for a layer of another stage."""
        return list(self.sweep(layer, [Span.whole(stage, request)], kinds))

    def sweep(
        self, layer: int, spans: Sequence[Span], kinds: Sequence[Kind] = JUDGED, sketch: Sketch | None = None
    ) -> Iterator[Audit]:
        """The tolerated pieces of one layer at the positions of all spans, its weights read once for all of them.

        sketch: looks at every piece and repeats the last product of those alone that seem to be off; the ratios of the
        others are estimates below DOUBT. Memory: a few times what was served of these positions at this layer, with a
        sketch the MLP's intermediate rows as well. Raises KeyError for a layer of another stage.
        """
        held = _Rows(self.reference, layer, spans)
        for kind in kinds:
            if sketch is not None and len(held.positions) > DIRECTIONS:
                ratios = self._sketched(kind, layer, held, sketch)
            else:
                ratios = self._ratios(kind, layer, *held.decoded(_TENSOR[kind]), self._made(kind, layer, held))
            row = 0
            for span in spans:
                part = ratios[row : row + span.end - span.first]
                row += len(part)
                yield Audit(span.stage.index, kind, span.request, layer, part, span.first)

    def _made(self, kind: Kind, layer: int, held: "_Rows") -> torch.Tensor:
        """What should have been served, [T, width]."""
        if kind == Kind.ATTEND:
            return self.reference.combined(layer, held.mixed)
        if kind == Kind.MLP:
            return self.reference.transformed(layer, held.bits("h"), held.bits("attn_out"))
        return self.reference.headed(kind, layer, held.entered, held.positions)

    def _sketched(self, kind: Kind, layer: int, held: "_Rows", sketch: Sketch) -> Ratios:
        """As _ratios; what the sketch finds in order keeps its estimate."""
        shape, reference, name = self.shape, self.reference, matrix_of(kind, layer)
        columns, turned = self._columns(kind), kind in (Kind.Q, Kind.K)
        rows = held.mixed if kind == Kind.ATTEND else held.entered
        if kind == Kind.MLP:
            rows = reference.activated(layer, held.bits("h"), held.bits("attn_out"))
        seen, invalid = held.decoded(_TENSOR[kind])
        directions = sketch.directions(kind, layer, columns, reference.precision)
        made = rows @ pressed(reference, name, directions).T
        plain = reference.turned(seen, held.positions, undo=True) if turned else seen
        floors, parts, counts = self._tolerances(kind, layer, seen.shape[1])
        scale = _squares(seen, columns) + counts * floors**2
        ratios: Ratios = np.sqrt(seen_distances(made, plain, directions) / scale) * parts
        doubted = ~(ratios <= DOUBT)
        if invalid is not None:
            doubted |= invalid.any(dim=1).numpy()[:, None]
        for unit in np.flatnonzero(doubted.any(axis=0)).tolist():
            again = np.flatnonzero(doubted[:, unit])
            part = slice(unit * columns, min((unit + 1) * columns, seen.shape[1]))
            expected = product(rows[again], reference.weights.raw(name, part), shape.weight_dtype)
            if turned:
                expected = reference.turned(expected, held.positions[again])
            broken = None if invalid is None else invalid[again, part]
            ratios[again, unit] = self._ratios(kind, layer, seen[again, part], broken, expected, unit)[:, 0]
        return ratios

    def link(
        self, stage: Stage, request: int, layer: int, receiver: Stage | None = None, rows: slice | None = None
    ) -> Audit | None:
        """The hand-over from a layer to the next, exactly, at the positions that both hold (`rows`: of these alone).

        Of each block the first element that differs. None where the next layer is another stage's and no receiver is
        given.
        """
        arrays, accused = stage.trace.arrays, stage
        if layer + 1 < stage.trace.end_layer:
            after = arrays[f"{layer + 1}.h"]
        elif layer + 1 == self.shape.layers:
            after = arrays["out"]
        elif receiver is None:
            return None
        else:
            after, accused = receiver.trace.arrays[f"{layer + 1}.h"], receiver
        first, end, _ = (rows or slice(None)).indices(min(len(after), stage.trace.positions))
        part = slice(first, max(first, end))
        dtype = self.shape.served_dtype
        h, attn_out, mlp_out = (np.asarray(arrays[f"{layer}.{name}"][part]) for name in ("h", "attn_out", "mlp_out"))
        total = vectors.add_bits(dtype, vectors.add_bits(dtype, h, attn_out), mlp_out)
        differences, columns = _differences(total, np.asarray(after[part]))
        return Audit(accused.index, Kind.LINK, request, layer, differences, first, columns)

    def embed(self, stage: Stage, request: int, tokens: Sequence[int], rows: slice | None = None) -> Audit:
        """h of layer 0 against the embeddings of the tokens fed in: prompt, then output but for its last. rows: of
        these positions alone.
        """
        first, end, _ = (rows or slice(None)).indices(min(stage.trace.positions, len(tokens)))
        table = self.weights.raw("model.embed_tokens.weight")
        fed = np.array(tokens[first:end], dtype=np.int64)
        known = fed < self.shape.vocabulary  # others have no row: STOP convicts them
        embedded = np.asarray(table)[np.where(known, fed, 0)]
        differences, _ = _differences(np.asarray(stage.trace.arrays["0.h"][first:end]), embedded)
        ratios = np.where(known[:, None], differences, RIGHT)
        return Audit(stage.index, Kind.EMBED, request, 0, ratios, first)

    def tokens(self, stage: Stage, request: int, prompt_count: int, output: Sequence[int]) -> list[Verdict]:
        """Each output token against its strongest competitor."""
        return self.greedy([Choice(stage, request, prompt_count - 1, tuple(output))])

    def greedy(self, choices: Sequence[Choice]) -> list[Verdict]:
        """As `tokens`, for several requests at once: the vocabulary's weights are read once for all of them."""
        parts = [np.asarray(c.stage.trace.arrays["out"][c.first : c.first + len(c.tokens)]) for c in choices]
        rows = np.concatenate(parts)
        served = torch.tensor([t for c, part in zip(choices, parts, strict=True) for t in c.tokens[: len(part)]])
        own = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        best, winner = own.clone(), torch.zeros(len(rows), dtype=torch.int64)
        for start, tile in self.reference.logits(rows):
            inside = (served >= start) & (served < start + tile.shape[1])
            columns = (served - start).clamp(0, tile.shape[1] - 1)[:, None]
            mine = tile.gather(1, columns)[:, 0]
            own = torch.where(inside, mine.double(), own)
            tile.scatter_(1, columns, torch.where(inside, -torch.inf, mine)[:, None])
            top, place = tile.max(dim=1)
            winner = torch.where(top > best, place + start, winner)
            best = torch.maximum(best, top.double())
        ratios = ((best - own) * (Q30 / self.profile.margin)).tolist()
        layer, out, row = self.shape.layers - 1, [], 0
        for choice, part in zip(choices, parts, strict=True):
            for position, token in enumerate(choice.tokens[: len(part)], choice.first):
                spot = (choice.stage.index, Kind.TOKEN, choice.request, layer, position, int(winner[row]))
                out.append(Verdict(max(ratios[row], RIGHT), *spot, token))
                row += 1
        return out

    def chosen(self, stage: Stage, r: int, request: Request, output: Sequence[int]) -> list[Verdict]:
        """Each output token by the law that its request asks for. output: ids below the vocabulary."""
        if request.greedy:
            return self.tokens(stage, r, len(request.prompt), output)
        return self.drawn(stage, r, request, output)

    def drawn(self, stage: Stage, r: int, request: Request, output: Sequence[int]) -> list[Verdict]:
        """Each drawn token against the competitor that shows best that it is wrong, or against its own membership."""
        first, margin, out = len(request.prompt) - 1, self.profile.margin / Q30, []
        rows = np.asarray(stage.trace.arrays["out"][first : first + len(output)])
        place, layer = (stage.index, Kind.SAMPLE, r), self.shape.layers - 1
        for start in range(0, len(rows), ROWS):
            tiles = [tile.double().numpy() for _, tile in self.reference.logits(rows[start : start + ROWS])]
            for i, logits in enumerate(np.concatenate(tiles, axis=1), start):
                noise = sampling.noise(request.seed, r, first + i, len(logits))
                seen = screen(logits, noise, output[i], request, margin)
                spot = (layer, first + i, seen.unit, output[i])
                out.append(Verdict(seen.ratio, *place, *spot, sampling=request.sampling(r)))
        return out

    def request(self, stages: Sequence[Stage], r: int, request: Request, output: Output) -> list[Verdict]:
        """All suspicious pieces of one request, worst first. stages: the whole pipeline, in order."""
        fed = [*request.prompt, *output.tokens[:-1]]
        embedded = self.embed(stages[0], r, fed)
        found = [_with_token(verdict, fed[verdict.position]) for verdict in embedded.suspicions()]
        for stage, receiver in zip(stages, [*stages[1:], None], strict=True):
            for layer in range(stage.trace.first_layer, stage.trace.end_layer):
                audits = self.layer(stage, r, layer)
                link = self.link(stage, r, layer, receiver)
                for audit in [*audits, *([link] if link else [])]:
                    found += audit.suspicions()
        known = all(token < self.shape.vocabulary for token in output.tokens)  # else STOP convicts
        if known:
            served = self.chosen(stages[-1], r, request, output.tokens)
            found += [verdict for verdict in served if verdict.suspicious]
        return sorted(found, reverse=True)

    def confirm(self, model: Model, verdict: Verdict, stages: Sequence[Stage]) -> bool:
        """Whether a piece is wrong by the law. stages: at least that of the layer."""
        return self.case(model, verdict, stages).verdict()

    def case(self, model: Model, verdict: Verdict, stages: Sequence[Stage]) -> Case:
        """The canonical truth about a piece with a program. Raises ValueError where no stage holds its layer."""
        trace = _holding(stages, verdict.layer)
        return Case(model, self.weights, self.profile, verdict, trace, verdict.token, verdict.sampling)

    def expected(self, kind: Kind, layer: int, arrays: Mapping[str, Bits]) -> torch.Tensor:
        """The reference [T, width] of one tolerated tensor from the served ones it is made of."""
        tensors = {name: arrays[f"{layer}.{name}"] for name in ("h", "q", "k", "v", "attn_out")}
        if kind == Kind.ATTEND:
            return self.reference.attended(layer, tensors["q"], tensors["k"], tensors["v"])
        if kind == Kind.MLP:
            return self.reference.transformed(layer, tensors["h"], tensors["attn_out"])
        return self.reference.projected(kind, layer, tensors["h"])

    def _ratios(
        self,
        kind: Kind,
        layer: int,
        seen: torch.Tensor,
        invalid: torch.Tensor | None,
        expected: torch.Tensor,
        first_unit: int = 0,
    ) -> Ratios:
        """Distance over tolerance of each unit at each position. seen, invalid: of Reference.decoded, from the columns
        of the first unit on; expected is overwritten.
        """
        columns = self._columns(kind)
        broken = None
        if invalid is not None:
            broken = invalid & ~(expected.abs() > overflow_bound(self.shape.served_dtype) / Q30)
            expected.masked_fill_(invalid, 0.0)  # as `seen` is there
        floors, parts, counts = self._tolerances(kind, layer, expected.shape[1], first_unit)
        scale = _squares(expected, columns) + counts * floors**2
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.sqrt(_squares(expected.sub_(seen), columns) / scale) * parts
        ratios: Ratios = np.nan_to_num(far, nan=RIGHT, posinf=WRONG)
        if broken is not None:
            ratios[_squares(broken.double(), columns) > 0] = WRONG
        return ratios

    def _columns(self, kind: Kind) -> int:
        """Of one unit but the last."""
        return BLOCK if kind in (Kind.ATTEND, Kind.MLP) else self.shape.head_dim

    def _tolerances(self, kind: Kind, layer: int, width: int, first: int = 0) -> tuple[Ratios, Ratios, Ratios]:
        """Floor, 1 / tolerance and number of elements of the units first .. of `width` columns."""
        columns = self._columns(kind)
        starts = range(0, width, columns)
        cells = [self.profile.values(profile_index(self.shape, kind, layer, first + i)) for i in range(len(starts))]
        floors = np.array([floor / Q30 for _, _, floor in cells])
        parts = np.array([den / num if num else np.inf for num, den, _ in cells])
        return floors, parts, np.array([float(min(columns, width - start)) for start in starts])


class _Rows:
    """What was served of one layer at the positions of some spans, one tensor behind the other, decoded once."""

    def __init__(self, reference: Reference, layer: int, spans: Sequence[Span]) -> None:
        self.reference, self.layer, self.spans = reference, layer, spans
        self.positions = np.concatenate([span.positions for span in spans])
        self._ends = np.cumsum([span.end - span.first for span in spans])
        self._bits: dict[str, Bits] = {}
        self._decoded: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @cached_property
    def entered(self) -> torch.Tensor:
        return self.reference.entered(self.layer, self.decoded("h")[0])

    @cached_property
    def mixed(self) -> torch.Tensor:
        mixed = [self.reference.mixture(self.part("q", i), *self.history(i)) for i in range(len(self.spans))]
        return torch.cat(mixed)

    def bits(self, name: str) -> Bits:
        if name not in self._bits:
            parts = [self._whole(span, name)[span.rows] for span in self.spans]
            self._bits[name] = np.concatenate(parts)
        return self._bits[name]

    def decoded(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Reference.decoded."""
        if name not in self._decoded:
            self._decoded[name] = self.reference.decoded(self.bits(name))
        return self._decoded[name]

    def part(self, name: str, i: int) -> torch.Tensor:
        """Of one span."""
        end = int(self._ends[i])
        return self.decoded(name)[0][end - (self.spans[i].end - self.spans[i].first) : end]

    def history(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of one span's request up to the span's end."""
        span = self.spans[i]
        if span.first == 0:
            return self.part("k", i), self.part("v", i)
        k, v = (self.reference.real(self._whole(span, name)[: span.end]) for name in "kv")
        return k, v

    def _whole(self, span: Span, name: str) -> Bits:
        return np.asarray(span.stage.trace.arrays[f"{self.layer}.{name}"])


def _squares(x: torch.Tensor, columns: int) -> Ratios:
    """The sum of squares of each `columns` columns of a row, the last of them fewer: [positions, units]."""
    whole, rest = divmod(x.shape[1], columns)
    main = x[:, : whole * columns].reshape(len(x), whole, columns)
    norms = [torch.linalg.vector_norm(main, dim=2).double()]
    if rest:
        norms.append(torch.linalg.vector_norm(x[:, -rest:], dim=1, keepdim=True).double())
    squares: Ratios = torch.cat(norms, dim=1).square_().numpy()
    return squares


def _differences(x: Bits, y: Bits) -> tuple[Ratios, npt.NDArray[np.int64]]:
    """WRONG for every block of a row that differs, and its first column that does: each [positions, blocks]."""
    starts = range(0, x.shape[1], BLOCK)
    if np.array_equal(x, y):
        return np.full((len(x), len(starts)), RIGHT), np.broadcast_to(np.array(starts), (len(x), len(starts)))
    differs = [x[:, first : first + BLOCK] != y[:, first : first + BLOCK] for first in starts]
    ratios = np.where(np.stack([block.any(axis=1) for block in differs], axis=1), WRONG, RIGHT)
    columns = [first + block.argmax(axis=1) for first, block in zip(starts, differs, strict=True)]
    return ratios, np.stack(columns, axis=1)


def _holding(stages: Sequence[Stage], layer: int) -> ServedTensors:
    for stage in stages:
        if stage.trace.first_layer <= layer < stage.trace.end_layer:
            return stage.trace
    raise ValueError(f"expected a stage that holds layer {layer}, got none")


def _with_token(verdict: Verdict, token: int) -> Verdict:
    fields = (verdict.request, verdict.layer, verdict.position, verdict.unit)
    return Verdict(verdict.ratio, verdict.stage, verdict.kind, *fields, token=token, reason=verdict.reason)
