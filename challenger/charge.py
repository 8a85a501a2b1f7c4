"""What a challenge carries: the segment, the openings that show where it stands, and for a program the roots of
its instructions. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from challenger.evidence import Dossier, Unavailable, received
from challenger.judge import Judge
from verifier import link
from verifier.audit import NO_TOKEN, Verdict
from verifier.canonical import Case
from verifier.game import Segment, opening_steps
from verifier.program import Kind
from verifier.referee.codec import Opening

GAMES = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP, Kind.TOKEN, Kind.SAMPLE)


@dataclass(frozen=True)
class Charge:
    """steps: concatenated instruction roots of a challenge; empty for an exact segment, which is shown.

    premises: what LINK is prepared with before it is shown; else empty.
    """

    segment: Segment
    evidence: tuple[Opening, ...]
    steps: bytes
    premises: tuple[Opening, ...] = ()


def segment_of(job: bytes, verdict: Verdict) -> Segment:
    return Segment(
        job, verdict.stage, int(verdict.kind), verdict.request, verdict.layer, verdict.position, verdict.unit
    )


def charge(evidence: Dossier, judge: Judge, verdict: Verdict, truth: Callable[[], Case]) -> Charge:
    """`truth` is asked for where a program judges. Raises NothingWrong for a piece within tolerance, Unavailable for
    one that is not on disk.
    """
    segment = segment_of(evidence.id, verdict)
    kind, r = verdict.kind, verdict.request
    if kind in GAMES:
        openings = [evidence.tree(verdict.stage).opening(r), _header(judge, kind)]
        if kind in (Kind.TOKEN, Kind.SAMPLE):
            index = verdict.position - (len(evidence.requests[r].prompt) - 1)
            openings += [
                evidence.requests_tree.record_opening(r),
                evidence.outputs_tree.record_opening(r),
                evidence.outputs_tree.token_opening(r, index),
            ]
        return Charge(segment, tuple(openings), opening_steps(truth()))
    if kind is Kind.LINK:
        return _linked(evidence, verdict, segment)
    return Charge(segment, tuple(_shown(evidence, judge, verdict, truth)), b"")


def _linked(evidence: Dossier, verdict: Verdict, segment: Segment) -> Charge:
    r = verdict.request
    sender = verdict.stage - 1 if received(evidence, verdict) else verdict.stage
    stages = list(dict.fromkeys((sender, verdict.stage)))
    traces = [evidence.trace(stage, r) for stage in stages]
    held = [trace for trace in traces if trace is not None]
    if len(held) < len(traces):
        raise Unavailable(f"the tensors of request {r} at the stages {stages} are not on disk")
    nodes = [evidence.tree(stage).opening(r) for stage in stages]
    shown = (*nodes, *link.conclusion(segment, held[0], held[-1]))
    return Charge(segment, shown, b"", (nodes[0], *link.premises(segment, held[0])))


def _shown(evidence: Dossier, judge: Judge, verdict: Verdict, truth: Callable[[], Case]) -> list[Opening]:
    r, kind = verdict.request, verdict.kind
    requests, outputs = evidence.requests_tree, evidence.outputs_tree
    if kind is Kind.BILL:
        after = [outputs.record_opening(r + 1)] if r + 1 < len(evidence.requests) else []
        return [outputs.record_opening(r), *after]
    node = evidence.tree(verdict.stage).opening(r)
    if kind is Kind.EMBED:
        prompt = len(evidence.requests[r].prompt)
        if verdict.position < prompt:
            token = [requests.token_opening(r, verdict.position)]
        else:
            token = [outputs.record_opening(r), outputs.token_opening(r, verdict.position - prompt)]
        return [node, requests.record_opening(r), *token, *_program(judge, verdict.kind, truth())]
    if kind is Kind.STOP:
        token = [] if verdict.unit == NO_TOKEN else [outputs.token_opening(r, verdict.unit)]
        return [requests.record_opening(r), outputs.record_opening(r), node, *token]
    return [node, evidence.tree(verdict.stage - 1).opening(r)]


def _program(judge: Judge, kind: Kind, case: Case) -> list[Opening]:
    """Header, the one instruction, and the openings of its step."""
    instruction = Opening(case.record(0), case.record_proof(0))
    return [_header(judge, kind), instruction, *case.openings(0, 0, 0)]


def _header(judge: Judge, kind: Kind) -> Opening:
    program = judge.weights.program
    return Opening(program.headers[kind].encode(), tuple(program.tree.prove(int(kind))))
