"""Verdicts over the cells of requests, by the audit that a watchtower uses, and how often samples of them convict.

A cell is all segments of one request, layer and position: q, k, v, attention, MLP and the link to the next layer; the
embedding in the first layer, the token in the last. Whoever looks at a cell also compares the embeddings up to its
position with the prompt's: they are the history that attention reads, and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench._served import Result
from verifier.audit import Audit, Auditor, Span, Stage, Verdict
from verifier.commit import LIMITED, Output
from verifier.record_rules import audit_stop
from verifier.referee.codec import Model
from verifier.reference import real
from verifier.sketch import DOUBT, Sketch

Z = 1.959964  # of 95 %, two-sided
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """One request's verdicts. ratio: [layers, T], the worst of each cell; prompt: [T], whether an embedding is wrong;
    suspicions: those that only the canonical arithmetic may decide; whole: a rule about the request is broken.
    """

    ratio: Floats
    prompt: Flags
    suspicions: list[Verdict]
    whole: bool
    stage: Stage

    @property
    def own(self) -> Flags:
        """[layers, T]: convicted by the cell's own segments."""
        return self.ratio > 1

    @property
    def cells(self) -> Flags:
        """[layers, T]: convicted by whoever looks at the cell."""
        return self.own | np.logical_or.accumulate(self.prompt)[None, :]

    @property
    def full(self) -> bool:
        """Convicted by a full audit."""
        return self.whole or bool(self.own.any())


def judge(auditor: Auditor, result: Result) -> Judged:
    """All segments of one request that was served by one stage."""
    return judge_all(auditor, [result])[0]


def judge_all(auditor: Auditor, results: Sequence[Result]) -> list[Judged]:
    """All segments of every request, each matrix read once for all of them."""
    shape, stages = auditor.shape, [result.stage(auditor.weights) for result in results]
    ratios = [np.zeros((shape.layers, stage.trace.positions)) for stage in stages]
    found: list[list[Verdict]] = [[] for _ in results]

    def saw(r: int, layer: int, audit: Audit) -> None:
        rows = ratios[r][layer, : len(audit.ratios)]
        np.maximum(rows, audit.ratios.max(axis=1), out=rows)
        found[r] += audit.suspicions()

    spans = [Span.whole(stage, r) for r, stage in enumerate(stages)]
    for layer in range(shape.layers):
        for audit in auditor.sweep(layer, spans):
            saw(audit.request, layer, replace(audit, request=results[audit.request].index))
        for r, (stage, result) in enumerate(zip(stages, results, strict=True)):
            link = auditor.link(stage, result.index, layer)
            if link is not None:
                saw(r, layer, link)
    return [_completed(auditor, *parts) for parts in zip(results, stages, ratios, found, strict=True)]


def _completed(auditor: Auditor, result: Result, stage: Stage, ratio: Floats, found: list[Verdict]) -> Judged:
    """With the embeddings, the tokens and the count."""
    embedded = auditor.embed(stage, result.index, result.fed).ratios.max(axis=1)
    ratio[0, : len(embedded)] = np.maximum(ratio[0, : len(embedded)], embedded)
    prompt = np.zeros(ratio.shape[1], dtype=np.bool_)
    prompt[: len(embedded)] = embedded > 1
    for verdict in auditor.chosen(stage, result.index, result.request, result.tokens):
        ratio[-1, verdict.position] = max(ratio[-1, verdict.position], verdict.ratio)
        found += [verdict] if verdict.suspicious else []
    output = Output(0, len(result.tokens), LIMITED, result.tokens)
    vocabulary = auditor.shape.vocabulary
    stopped = audit_stop(0, result.index, result.request, output, stage.trace.positions, vocabulary)
    return Judged(ratio, prompt, found, stopped is not None, stage)


def sketched(auditor: Auditor, results: Sequence[Result], seed: bytes) -> dict[str, int]:
    """What a sketch makes of the tolerated pieces of every request: how many there are, how many are wrong by their
    products, how many of these it sees, and how many pieces it repeats.
    """
    stages = [result.stage(auditor.weights) for result in results]
    spans = [Span.whole(stage, r) for r, stage in enumerate(stages)]
    told = dict.fromkeys(("pieces", "wrong", "seen", "repeated"), 0)
    for layer in range(auditor.shape.layers):
        both = (auditor.sweep(layer, spans, sketch=sketch) for sketch in (None, Sketch(seed)))
        for exact, screened in zip(*both, strict=True):
            wrong, seen = exact.ratios > 1, screened.ratios > 1
            counts = (wrong.size, wrong.sum(), (wrong & seen).sum(), (screened.ratios > DOUBT).sum())
            for name, count in zip(told, counts, strict=True):
                told[name] += int(count)
    return told


def confirmed(auditor: Auditor, model: Model, judged: Judged) -> list[Verdict]:
    """The suspicions that are wrong by the law."""
    return [verdict for verdict in judged.suspicions if auditor.confirm(model, verdict, [judged.stage])]


def peaks(auditor: Auditor, result: Result) -> Floats:
    """[layers, T]: the largest attention probability, averaged over the heads."""
    shape, out, positions = auditor.shape, [], len(result.arrays["out"])
    for layer in range(shape.layers):
        q, k = (
            real(result.arrays[f"{layer}.{name}"], shape.served_dtype).reshape(positions, -1, shape.head_dim)
            for name in "qk"
        )
        k = k.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / sqrt(shape.head_dim)
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        out.append(weights.amax(dim=-1).mean(dim=0).numpy())
    return np.stack(out)


def wilson(hits: int, tries: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927)."""
    if not tries:
        return 0.0, 1.0
    rate, square = hits / tries, Z * Z
    middle = (rate + square / (2 * tries)) / (1 + square / tries)
    half = Z / (1 + square / tries) * sqrt(rate * (1 - rate) / tries + square / (4 * tries * tries))
    return max(0.0, middle - half), min(1.0, middle + half)


def sampled(
    flags: Sequence[Flags],
    count: int,
    trials: int,
    random: np.random.Generator,
    among: Sequence[Flags] | None = None,
    spread: bool = True,
) -> int:
    """In how many of `trials` audits of one request each `count` random cells convict.

    spread: over the layers, none of which is looked at twice before each was looked at once; else all cells are equally
    likely. among: the cells that may be drawn, [layers, T] a request; default all.
    """
    hits = 0
    open_cells = among if among is not None else [np.ones_like(flag) for flag in flags]
    places = [[np.flatnonzero(row) for row in allowed] for allowed in open_cells]
    able = [r for r, rows in enumerate(places) if any(len(row) for row in rows)]
    for _ in range(trials if able else 0):
        r = able[int(random.integers(len(able)))]
        if not spread:
            drawn = random.choice(np.flatnonzero(open_cells[r]), count)
            hits += bool(flags[r].ravel()[drawn].any())
            continue
        layers = [layer for layer, row in enumerate(places[r]) if len(row)]
        order: list[int] = []
        while len(order) < count:
            order += [layers[i] for i in random.permutation(len(layers))]
        hits += any(flags[r][layer, random.choice(places[r][layer])] for layer in order[:count])
    return hits


def row(
    kind: str, name: str, dtype: str, judged: Sequence[Judged], trials: int, among: Sequence[Flags] | None = None
) -> dict[str, Any]:
    """A row of the report: rates from one random cell, from eight, and from a full audit, each with its interval."""
    random = np.random.default_rng(len(name))
    flags, own = [j.cells for j in judged], [j.own for j in judged]
    allowed = among if among is not None else [np.ones_like(flag) for flag in flags]
    cells = sum(int(a.sum()) for a in allowed)
    ones = sum(int(f[a].sum()) for f, a in zip(flags, allowed, strict=True))
    eight = sampled(flags, 8, trials, random, among)
    uniform = sampled(own, 8, trials, random, among, spread=False)
    full = sum(j.full for j in judged)
    counted = {"rate_1": (ones, cells), "rate_8": (eight, trials), "rate_full": (full, len(judged))}
    return {
        "kind": kind,
        "name": name,
        "dtype": dtype,
        "cells": cells,
        **{key: hits / tries if tries else 0.0 for key, (hits, tries) in counted.items()},
        "ci95": {key: wilson(hits, tries) for key, (hits, tries) in counted.items()},
        "rate_8_uniform": uniform / trials,  # drawn anywhere, and their own segments alone
        "median_ratio": float(np.median(np.concatenate([j.ratio[a] for j, a in zip(judged, allowed, strict=True)]))),
    }
