"""One model's judge: its weights, its profile, and the audit of a job in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from challenger.evidence import Dossier, Evidence, received
from challenger.strategy import Cell
from challenger.units import Rows, Seen, Unit, examine, grouped, units_of
from contracts.client import model_id
from verifier.audit import Auditor, Choice, Stage, Verdict
from verifier.calibration import screen_margins
from verifier.canonical import Case
from verifier.execution import last_rows
from verifier.program import Kind
from verifier.record_rules import audit_bill, audit_length, audit_stop
from verifier.referee.floats import Dtype
from verifier.sources import ServedTensors
from verifier.tolerance import Profile
from verifier.weights import Weights, identify

TOLERATED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP, Kind.TOKEN, Kind.SAMPLE)
SCREEN_MARGINS = 8.0
# Of the sampling law: what rounding through all layers may add to it on an honest machine, where nobody measured less.
EXECUTED_ROWS = 1 << 14  # positions executed at a time: 2 GB at a hidden size of 8192

MISSES = 8  # of a stage and kind. The reference errs by far less than what separates this many pieces.

Work = Callable[[Iterator[Unit]], Iterable[Seen]]


@dataclass(frozen=True)
class Findings:
    """What an audit saw.

    worst: the largest ratio of each kind (1 is the tolerance), and of what was screened alone (1 asks for a closer
    look); wrong: what to convict, most promising first. strategy,
    cells: what was looked at. closer: requests whose whole trace must be seen before anything can be said, the farthest
    off first; looked_closer: how many were.
    """

    pieces: int
    worst: dict[str, float]
    wrong: tuple[Verdict, ...]
    suspicious: int
    strategy: str = "full"
    cells: tuple[Cell, ...] = ()
    closer: tuple[int, ...] = ()
    looked_closer: int = 0

    def joined(self, later: Findings, requests: Sequence[int]) -> Findings:
        """With what was found at some of the requests in `closer`. What is wrong needs no further look."""
        rest = () if later.wrong else tuple(r for r in self.closer if r not in requests)
        return replace(
            later,
            pieces=self.pieces + later.pieces,
            worst={k: max(self.worst.get(k, 0.0), later.worst.get(k, 0.0)) for k in {**self.worst, **later.worst}},
            suspicious=self.suspicious + later.suspicious,
            closer=rest,
            looked_closer=self.looked_closer + len(requests),
        )

    def receipt(self) -> dict[str, Any]:
        """For machines: what was compared and by how much it missed."""
        return {
            "strategy": self.strategy,
            "cells": [[cell.request, cell.layer, cell.position] for cell in self.cells],
            "pieces": self.pieces,
            "worst": {kind: _number(ratio) for kind, ratio in self.worst.items()},
            "suspicious": self.suspicious,
            "looked_closer": self.looked_closer,
            "wrong": [
                {
                    "stage": verdict.stage,
                    "segment": verdict.kind.name.lower(),
                    "request": verdict.request,
                    "layer": verdict.layer,
                    "position": verdict.position,
                    "unit": verdict.unit,
                    "margin": _number(verdict.ratio),
                    "reason": verdict.reason,
                }
                for verdict in self.wrong
            ],
        }


class Judge:
    """Judges jobs of the model in `folder`.

    Raises what Weights.open, Profile.load and screen_margins raise for a folder that is not usable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = Weights.open(folder)
        self.profile = Profile.load(folder, self.weights.shape)
        self.model = identify(self.weights, self.profile)
        self.id = model_id(self.model)
        self.auditor = Auditor(self.weights, self.profile)
        # What was served in 16 bits is screened at half the price.
        wide = self.weights.shape.served_dtype == Dtype.FLOAT32
        self.screener = self.auditor if wide else Auditor(self.weights, self.profile, torch.float32)
        # SAFETY: the report is not part of the model's identity, and whoever wrote it may want no token looked at.
        self.margins = min(screen_margins(folder, self.profile) or SCREEN_MARGINS, SCREEN_MARGINS)

    def audit(self, evidence: Evidence, work: Work | None = None) -> Findings:
        """Every piece of every request that the evidence holds, or the cells that were drawn; a stage that withholds
        its trace shields nobody else.

        One wrong piece a stage is enough to convict it; each is confirmed canonically, or exact by nature.
        work: does the units, in any order; by default they are done here.
        """
        seen = Seen()
        trees, last = evidence.stage_trees, len(evidence.stages) - 1
        seen.exact(audit_bill(last, evidence.outputs, evidence.tokens))
        for stage, (sender, receiver) in enumerate(pairwise(trees), start=1):
            if sender is not None and receiver is not None:
                seen.exact([replace(v, stage=stage) for v in audit_length([sender.nodes, receiver.nodes])])
        tree = trees[-1]
        if tree is not None:
            for r, (request, output) in enumerate(zip(evidence.requests, evidence.outputs, strict=True)):
                vocabulary = self.weights.shape.vocabulary
                stop = audit_stop(last, r, request, output, tree.nodes[r].positions, vocabulary)
                seen.exact([stop] if stop else [])
        do = work or (lambda units: (examine(self.screener, unit) for unit in units))
        for part in do(units_of(evidence)):
            seen.merge(part)
        self._histories(evidence, seen)
        wrong = tuple(self._confirmed(evidence, seen))
        closer = () if wrong or evidence.drawn != () else self._screened(evidence, seen)
        return Findings(seen.pieces, seen.worst, wrong, seen.suspicious, evidence.plan, evidence.drawn or (), closer)

    def _histories(self, evidence: Evidence, seen: Seen) -> None:
        """The embeddings that the drawn cells' attention goes back to, against the tokens that were fed in."""
        ends: dict[int, int] = {}
        for cell in evidence.drawn or ():
            ends[cell.request] = max(ends.get(cell.request, 0), cell.position + 1)
        for r, end in ends.items():
            if not evidence.has(0, r, ["0.h"]):
                continue
            trace = evidence.trace(0, r)
            if trace is not None:
                fed = (*evidence.requests[r].prompt, *evidence.outputs[r].tokens[:-1])
                seen.add(self.screener.embed(Stage(0, trace), r, fed, slice(0, end)), fed)

    def _screened(self, evidence: Evidence, seen: Seen) -> tuple[int, ...]:
        """The requests whose tokens this machine would not have chosen, the farthest first: their traces are worth a
        look. Honest rounding has come through all layers by then, so the law's own margin is too narrow.
        """
        vocabulary, far = self.weights.shape.vocabulary, []
        known = (
            r
            for r, (request, output) in enumerate(zip(evidence.requests, evidence.outputs, strict=True))
            if all(token < vocabulary for token in (*request.prompt, *output.tokens))
        )
        for group in grouped(evidence, known, EXECUTED_ROWS):
            for r, (tokens, worst) in self._executed(evidence, group).items():
                seen.screened(tokens, worst / self.margins)
                far += [(worst, r)] if worst > self.margins else []
        return tuple(r for _, r in sorted(far, reverse=True))

    def _executed(self, evidence: Evidence, group: Sequence[int]) -> dict[int, tuple[int, float]]:
        """By request, how many tokens it has and how far the farthest lies from what an own execution of prompt and
        output allows, in token margins.
        """
        fed = [(*evidence.requests[r].prompt, *evidence.outputs[r].tokens[:-1]) for r in group]
        choices, drawn = [], []
        for r, out in zip(group, last_rows(self.screener.reference, fed), strict=True):
            request, output = evidence.requests[r], evidence.outputs[r]
            own = Stage(0, cast(ServedTensors, Rows({"out": out}, 0, self.weights.shape.layers, len(out))))
            if request.greedy:
                choices.append(Choice(own, r, len(request.prompt) - 1, output.tokens))
            else:
                drawn += self.screener.drawn(own, r, request, output.tokens)
        found: dict[int, tuple[int, float]] = {}
        for verdict in [*(self.screener.greedy(choices) if choices else ()), *drawn]:
            tokens, worst = found.get(verdict.request, (0, 0.0))
            found[verdict.request] = tokens + 1, max(worst, verdict.ratio)
        return found

    def case(self, evidence: Dossier, verdict: Verdict) -> Case:
        """The canonical truth about a piece. Raises ValueError where the evidence lacks its tensors."""
        r = verdict.request
        if verdict.kind is Kind.SAMPLE:  # what is kept of a verdict does not hold the request's parameters
            verdict = replace(verdict, sampling=evidence.requests[r].sampling(r))
        return self.auditor.case(self.model, verdict, stages_of(evidence, r))

    def _confirmed(self, evidence: Evidence, seen: Seen) -> Iterable[Verdict]:
        """For each stage the farthest piece that the law finds wrong and nobody else can be blamed for; and one that
        its sender may turn out guilty of.
        """
        found: set[tuple[int, bool]] = set()
        missed = Counter[tuple[int, Kind]]()
        for verdict in seen.suspicions():
            group, place = (verdict.stage, may_be_senders(evidence, verdict)), (verdict.stage, verdict.kind)
            # SAFETY: a canonical run takes seconds, and whoever bends its tensors to just within the tolerance has as
            # many as it likes. Those that follow lie nearer still.
            if group in found or missed[place] >= MISSES:
                continue
            if verdict.kind not in TOLERATED or self.case(evidence, verdict).verdict():
                found.add(group)
                yield verdict
            else:
                missed[place] += 1


def stages_of(evidence: Dossier, request: int) -> list[Stage]:
    """One request's part of every stage that gave its trace, as the auditor wants it."""
    traces = [(index, evidence.trace(index, request)) for index in range(len(evidence.stages))]
    return [Stage(index, trace) for index, trace in traces if trace is not None]


def may_be_senders(evidence: Dossier, verdict: Verdict) -> bool:
    """Whether a signed hand-off can shift the blame (docs/protocol.md, "Segments")."""
    if verdict.kind is Kind.EMBED:
        return verdict.position >= len(evidence.requests[verdict.request].prompt) and len(evidence.stages) > 1
    return verdict.kind is Kind.LENGTH or (verdict.kind is Kind.LINK and received(evidence, verdict))


def _number(ratio: float) -> float | str:
    """JSON has no infinity."""
    return "exact" if ratio == float("inf") else ratio
