"""Where to look when nothing is served: from the roots alone to a wrong piece, one round of demands after the other.

Decides, sends nothing. Every decision follows anew from what is known, so a process that was killed goes on where it
stood. The own execution of a request only says where to look; what is wrong is said by the canonical judge, from what
was posted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from challenger.judge import Judge
from challenger.posted import Posted
from verifier.audit import SUSPICION, WRONG, Stage, Verdict
from verifier.demand import Demand
from verifier.execution import Execution
from verifier.posted import NotPosted
from verifier.program import Kind, profile_index
from verifier.record_rules import audit_length, audit_stop
from verifier.referee.codec import BLOCK
from verifier.sources import ServedTensors

FAN = 3  # rows that one round of a bisection asks for: the layers between are quartered
PROBES = 3  # layers looked at where nothing disagrees
GROWTH = 2.0
# An honest row of h may differ from our own by what the tolerances of all layers before it add up to; twice that covers
# what later layers make of it. Too low costs demands, too high is caught by probes alone.
CELL = ("h", "q", "k", "v", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Step:
    """What comes next for a request: demands, or pieces that are wrong. Both empty: nothing was found."""

    demands: tuple[Demand, ...] = ()
    wrong: tuple[Verdict, ...] = ()


class Inquiry:
    """One job. seed: secret, or a worker could cheat where no probe will fall."""

    def __init__(
        self, posted: Posted, judge: Judge, seed: bytes, execute: Callable[[Sequence[int]], Execution] | None = None
    ) -> None:
        self.posted, self.judge, self.seed = posted, judge, seed
        self.shape = judge.weights.shape
        self._execute = execute or (lambda tokens: Execution(judge.weights, tokens))
        self._executions: dict[int, Execution] = {}

    def step(self, r: int) -> Step:
        """The next step for request r. Raises ValueError for records that no accepted job has."""
        posted, shape = self.posted, self.shape
        tokens = [posted.ask_tokens(r, outputs) for outputs in (False, True)]
        nodes = [posted.ask_node(stage, r) for stage in range(len(posted.stages))]
        asked = tuple(demand for demand in (*tokens, *nodes) if demand is not None)
        if asked:
            return Step(asked)
        request, output, last = posted.requests[r], posted.outputs[r], len(posted.stages) - 1
        held = [posted.node(stage, r) for stage in range(last + 1)]
        known = [node for node in held if node is not None]
        stop = audit_stop(last, r, request, output, known[last].positions, shape.vocabulary)
        if stop is not None:
            return Step(wrong=(stop,))
        bill = self._bill(r, last)
        if bill is not None:
            return Step(wrong=(bill,))
        lengths = audit_length([[node] for node in known])
        if lengths:
            return Step(wrong=tuple(replace(verdict, request=r) for verdict in lengths[:1]))
        fed = [*request.prompt, *output.tokens[:-1]]
        if r not in self._executions:
            self._executions[r] = self._execute(fed)
        own = self._executions[r]
        position, doubtful = self._position(own, len(request.prompt), output.tokens)
        found = self._token(r, position, output.tokens, len(request.prompt)) if doubtful else Step()
        if found == Step():
            found = self._search(own, r, position, fed)
        return found if found != Step() else self._probe(r, len(fed))

    def _bill(self, r: int, stage: int) -> Verdict | None:
        """BILL up to request r, whose neighbours come to light one after the other."""
        output, posted = self.posted.outputs[r], self.posted
        if r == 0 and output.start != 0:
            return Verdict(WRONG, stage, Kind.BILL, 0, 0, 0, 0, reason="expected start 0")
        before = posted.outputs.get(r - 1) if r else None
        if before is not None and before.start + before.count != output.start:
            return Verdict(WRONG, stage, Kind.BILL, r - 1, 0, 0, 0, reason=f"expected the next start {output.start}")
        total = posted.facts.tokens
        if r + 1 == posted.job.requests and output.start + output.count != total:
            return Verdict(WRONG, stage, Kind.BILL, r, 0, 0, 0, reason=f"expected a total of {total}")
        return None

    # ---- a position, and the layers there

    def _position(self, own: Execution, prompt: int, output: Sequence[int]) -> tuple[int, bool]:
        """The first position whose token our own logits would not choose; else the last, which all others lead to."""
        whole = Stage(0, cast(ServedTensors, own))
        for verdict in self.judge.auditor.tokens(whole, 0, prompt, output):
            if verdict.ratio > SUSPICION:
                return verdict.position, True
        return prompt + len(output) - 2, False

    def _token(self, r: int, t: int, output: Sequence[int], prompt: int) -> Step:
        """Whether the last layer's row itself does not yield the token."""
        posted, end = self.posted, self.shape.layers
        asked = posted.ask_rows(end, "out", r, t, t + 1)
        if asked:
            return Step(tuple(asked))
        last = len(posted.stages) - 1
        trace = posted.trace(last, r)
        assert trace is not None
        verdict = self.judge.auditor.tokens(Stage(last, trace), r, prompt, output)[t - prompt + 1]
        wrong = verdict.suspicious and self._confirmed(verdict)
        return Step(wrong=(verdict,)) if wrong else Step()

    def _search(self, own: Execution, r: int, t: int, fed: Sequence[int]) -> Step:
        """From a position whose h agrees with ours in no layer or in the first ones alone, down to a piece."""
        top = self.shape.layers
        while True:
            good, bad, asked = self._bracket(own, r, t, top)
            if asked:
                return Step(asked)
            if bad is None:
                # h agrees where k or v did not (the first time round: it agrees everywhere).
                return self._cell(r, top, t, (Kind.K, Kind.V)) if top < self.shape.layers else Step()
            if bad == 0:
                return self._wrong(self._pieces(Kind.EMBED, r, 0, t, fed[t]))
            found = self._cell(r, good, t, (Kind.LINK, Kind.MLP, Kind.Q, Kind.K, Kind.V))
            if found == Step():
                found = self._attend(r, good, t)
            if found != Step():
                return found
            earlier = self._disagreeing(own, r, good, t)
            if earlier is None:
                return Step()
            top, t = good, earlier

    def _bracket(self, own: Execution, r: int, t: int, top: int) -> tuple[int, int | None, tuple[Demand, ...]]:
        """(last layer whose h agrees, first whose does not, what to ask for before that can be said) up to `top`."""
        rows = {i: self.posted.row(i, "h", r, t) for i in range(top + 1)}
        wrong = [i for i, row in rows.items() if row is not None and not self._agrees(own, i, t, row)]
        bad = wrong[0] if wrong else None
        good = max((i for i, row in rows.items() if row is not None and (bad is None or i < bad)), default=-1)
        if bad is None and rows[top] is not None:
            return good, None, ()
        end = top if bad is None else bad
        points = {good + 1 + (end - good - 1) * k // (FAN + 1) for k in range(1, FAN + 1)} if end - good > 1 else set()
        points = {i for i in points if rows[i] is None} | ({top} if bad is None else set())
        return good, bad, tuple(d for i in sorted(points) for d in self.posted.ask_rows(i, "h", r, t, t + 1))

    def _agrees(self, own: Execution, layer: int, t: int, row: object) -> bool:
        key = self._key(layer)
        return own.distance(key, t, row) <= self._limit(own, layer, t)  # type: ignore[arg-type]

    def _limit(self, own: Execution, layer: int, t: int) -> float:
        """How far an honest row of a layer's h may be from ours, relative to its size."""
        total = 0.0
        for before in range(layer):
            for kind, name in ((Kind.ATTEND, "attn_out"), (Kind.MLP, "mlp_out")):
                num, den, _ = self.judge.profile.values(profile_index(self.shape, kind, before, 0))
                total += num / den * own.size(f"{before}.{name}", t)
        return GROWTH * total / max(own.size(self._key(layer), t), 1e-30)

    def _disagreeing(self, own: Execution, r: int, layer: int, t: int) -> int | None:
        """The first earlier position whose k or v differs from ours by more than h may."""
        for s in range(t):
            for name in ("k", "v"):
                row = self.posted.row(layer, name, r, s)
                if row is not None and own.distance(f"{layer}.{name}", s, row) > self._limit(own, layer + 1, s):
                    return s
        return None

    # ---- one layer at one position

    def _cell(self, r: int, layer: int, t: int, kinds: Iterable[Kind]) -> Step:
        """Judges what one position's rows of a layer are enough for."""
        asked = [d for name in CELL for d in self.posted.ask_rows(layer, name, r, t, t + 1)]
        asked += self.posted.ask_rows(layer + 1, "h", r, t, t + 1) if Kind.LINK in kinds else []
        if asked:
            return Step(tuple(asked))
        return self._wrong(piece for kind in kinds for piece in self._pieces(kind, r, layer, t))

    def _attend(self, r: int, layer: int, t: int) -> Step:
        """Judges attention, which takes all k and v before."""
        asked = [d for name in ("k", "v") for d in self.posted.ask_rows(layer, name, r, 0, t + 1)]
        return Step(tuple(asked)) if asked else self._wrong(self._pieces(Kind.ATTEND, r, layer, t))

    def _probe(self, r: int, positions: int) -> Step:
        """Some layers of the stages that serve nothing, at positions that nobody can foresee."""
        stages = [stage for index, stage in enumerate(self.posted.stages) if self.posted.withheld(index)]
        layers = [layer for stage in stages for layer in range(stage.first_layer, stage.end_layer)]
        for number in range(PROBES if layers else 0):
            draw = hashlib.sha256(self.seed + bytes([number]) + r.to_bytes(4, "big")).digest()
            layer = layers[int.from_bytes(draw[:8], "big") % len(layers)]
            # At position 0 attention has no past, so that a whole layer costs six rows.
            t = 0 if number == 0 else int.from_bytes(draw[8:16], "big") % positions
            found = self._cell(r, layer, t, (Kind.LINK, Kind.MLP, Kind.Q, Kind.K, Kind.V))
            if found == Step() and t == 0:
                found = self._attend(r, layer, t)
            if found != Step():
                return found
        return Step()

    def _pieces(self, kind: Kind, r: int, layer: int, t: int, token: int = 0) -> Iterable[Verdict]:
        shape = self.shape
        units = {Kind.Q: shape.heads, Kind.K: shape.kv_heads, Kind.V: shape.kv_heads}
        stage, _ = self.posted.place(layer, "h")
        if kind is Kind.LINK:
            yield from self._links(r, layer, t, stage)
            return
        for unit in range(units.get(kind, -(-shape.hidden // BLOCK))):
            yield Verdict(WRONG, stage, kind, r, layer, t, unit, token)

    def _links(self, r: int, layer: int, t: int, sender: int) -> Iterable[Verdict]:
        """The elements of the next layer's input that are not what this one adds up to, one a block."""
        places = (sender, self.posted.place(layer + 1, "h")[0])
        here, there = (Stage(index, cast(ServedTensors, self.posted.trace(index, r))) for index in places)
        link = self.judge.auditor.link(here, r, layer, there, slice(t, t + 1))
        return link.suspicions() if link is not None else ()

    def _wrong(self, pieces: Iterable[Verdict]) -> Step:
        """The first piece that the law finds wrong."""
        found = next((piece for piece in pieces if self._confirmed(piece)), None)
        return Step(wrong=(found,)) if found else Step()

    def _confirmed(self, piece: Verdict) -> bool:
        if piece.kind is Kind.LINK:
            return True  # raw bits were compared
        try:
            return self.judge.case(self.posted, piece).verdict()
        except NotPosted:
            return False

    def _key(self, layer: int) -> str:
        return "out" if layer == self.shape.layers else f"{layer}.h"
