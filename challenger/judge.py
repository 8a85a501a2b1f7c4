"""One model's judge: its weights, its profile, and the audit of a job in full."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from challenger.evidence import Dossier, Evidence, received
from contracts.client import model_id
from verifier.audit import Audit, Auditor, Stage, Verdict, audit_bill, audit_length, audit_stop
from verifier.canonical import Case
from verifier.program import Kind
from verifier.tolerance import Profile
from verifier.weights import Weights, identify

TOLERATED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP, Kind.TOKEN, Kind.SAMPLE)
KEPT = 64  # suspicions of each stage and kind that may have to be judged canonically; honest work makes none


@dataclass(frozen=True)
class Findings:
    """What an audit saw.

    worst: the largest ratio of each kind (1 is the tolerance); wrong: what to convict, most promising first.
    """

    pieces: int
    worst: dict[str, float]
    wrong: tuple[Verdict, ...]
    suspicious: int

    def receipt(self) -> dict[str, Any]:
        """For machines: what was compared and by how much it missed."""
        return {
            "pieces": self.pieces,
            "worst": {kind: _number(ratio) for kind, ratio in self.worst.items()},
            "suspicious": self.suspicious,
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

    Raises what Weights.open and Profile.load raise for a folder that is not usable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = Weights.open(folder)
        self.profile = Profile.load(folder, self.weights.shape)
        self.model = identify(self.weights, self.profile)
        self.id = model_id(self.model)
        self.auditor = Auditor(self.weights, self.profile)

    def audit(self, evidence: Evidence) -> Findings:
        """Every piece of every request that the evidence holds; a stage that withholds its trace shields nobody else.

        One wrong piece a stage is enough to convict it; each is confirmed canonically, or exact by nature.
        """
        seen = _Seen()
        trees, last = evidence.stage_trees, len(evidence.stages) - 1
        seen.exact(audit_bill(last, evidence.outputs, evidence.tokens))
        for stage, (sender, receiver) in enumerate(pairwise(trees), start=1):
            if sender is not None and receiver is not None:
                seen.exact([replace(v, stage=stage) for v in audit_length([sender.nodes, receiver.nodes])])
        for request in range(len(evidence.requests)):
            self._request(evidence, request, seen)
        wrong = tuple(self._confirmed(evidence, seen))
        return Findings(seen.pieces, seen.worst, wrong, seen.suspicious)

    def case(self, evidence: Dossier, verdict: Verdict) -> Case:
        """The canonical truth about a piece. Raises ValueError where the evidence lacks its tensors."""
        r = verdict.request
        if verdict.kind is Kind.SAMPLE:  # what is kept of a verdict does not hold the request's parameters
            verdict = replace(verdict, sampling=evidence.requests[r].sampling(r))
        return self.auditor.case(self.model, verdict, stages_of(evidence, r))

    def _request(self, evidence: Evidence, r: int, seen: _Seen) -> None:
        request, output, vocabulary = evidence.requests[r], evidence.outputs[r], self.weights.shape.vocabulary
        last, tree = len(evidence.stages) - 1, evidence.stage_trees[-1]
        if tree is not None:
            stop = audit_stop(last, r, request, output, tree.nodes[r].positions, vocabulary)
            seen.exact([stop] if stop else [])
        stages = {stage.index: stage for stage in stages_of(evidence, r)}
        fed = [*request.prompt, *output.tokens[:-1]]
        if 0 in stages:
            seen.add(self.auditor.embed(stages[0], r, fed), fed)
        for index, stage in stages.items():
            for layer in range(stage.trace.first_layer, stage.trace.end_layer):
                for audit in self.auditor.layer(stage, r, layer):
                    seen.add(audit)
                link = self.auditor.link(stage, r, layer, stages.get(index + 1))
                if link is not None:
                    seen.add(link)
        if last in stages and all(token < vocabulary for token in output.tokens):  # else STOP convicts
            seen.tokens(self.auditor.chosen(stages[last], r, request, output.tokens))

    def _confirmed(self, evidence: Evidence, seen: _Seen) -> Iterable[Verdict]:
        """For each stage the farthest piece that the law finds wrong and nobody else can be blamed for; and one that
        its sender may turn out guilty of.
        """
        found: set[tuple[int, bool]] = set()
        for verdict in seen.suspicions():
            group = (verdict.stage, may_be_senders(evidence, verdict))
            if group in found:
                continue
            if verdict.kind not in TOLERATED or self.case(evidence, verdict).verdict():
                found.add(group)
                yield verdict


class _Seen:
    """What an audit collects. Of suspicions, the farthest few of each stage and kind: a stage that serves other
    weights makes millions.
    """

    def __init__(self) -> None:
        self.pieces = 0
        self.suspicious = 0
        self.worst: dict[str, float] = {}
        self._farthest: dict[tuple[int, Kind], list[Verdict]] = {}

    def suspicions(self) -> list[Verdict]:
        """Farthest first."""
        return sorted((verdict for found in self._farthest.values() for verdict in found), reverse=True)

    def exact(self, verdicts: Sequence[Verdict]) -> None:
        self.suspicious += len(verdicts)
        for verdict in verdicts:
            place = (verdict.stage, verdict.kind)
            self._farthest[place] = heapq.nlargest(KEPT, [*self._farthest.get(place, ()), verdict])

    def add(self, audit: Audit, tokens: list[int] | None = None) -> None:
        """tokens: what EMBED embedded, by position."""
        self.pieces += audit.ratios.size
        if audit.ratios.size == 0:
            return
        worst = audit.worst()
        self._worst(audit.kind, worst.ratio)
        if worst.suspicious:
            found = audit.suspicions()
            self.exact([replace(v, token=tokens[v.position]) for v in found] if tokens is not None else found)

    def tokens(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self.pieces += 1
            self._worst(verdict.kind, verdict.ratio)
            if verdict.suspicious:
                self.exact([verdict])

    def _worst(self, kind: Kind, ratio: float) -> None:
        name = kind.name.lower()
        self.worst[name] = max(self.worst.get(name, 0.0), ratio)


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
