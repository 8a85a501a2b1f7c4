"""Draws a token from a row of logits exactly as docs/canonical.md, "Sampling", says: the same seed, the same token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verifier import sampling
from verifier.commit import WHOLE_TOP_P, Request
from verifier.referee.fixed import Q30

ONE = 65536  # temperature and top_p count in 1/65536

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """Whose token a row yields: a request, its index in the batch and the position of the row."""

    request: Request
    index: int
    position: int


def choose(logits: Floats, draw: Draw) -> int:
    """The token of [vocabulary] logits. A greedy request's is the largest, the lowest id among equals."""
    request = draw.request
    if request.greedy:
        return int(logits.argmax())
    return pick(logits, sampling.noise(request.seed, draw.index, draw.position, len(logits)), request)


def pick(logits: Floats, noise: npt.NDArray[np.int64], request: Request) -> int:
    """The allowed token with the largest logit + temperature x noise (Q30); both [vocabulary]."""
    scores = logits + request.temperature / ONE * (noise / Q30)
    if request.top_k or request.top_p < WHOLE_TOP_P:
        scores = np.where(allowed(logits, request), scores, -np.inf)
    return int(scores.argmax())


def allowed(logits: Floats, request: Request) -> npt.NDArray[np.bool_]:
    """[vocabulary]: fewer than top_k tokens and less than top_p of the mass come before, by logit and then by id."""
    order = np.argsort(-logits, kind="stable")
    kept = len(order) if request.top_k == 0 else min(request.top_k, len(order))
    if request.top_p < WHOLE_TOP_P:
        weights = np.exp((logits[order] - logits[order[0]]) / (request.temperature / ONE))
        before = np.cumsum(weights) - weights
        kept = min(kept, int(np.searchsorted(before, request.top_p / ONE * weights.sum())))
    out = np.zeros(len(order), dtype=np.bool_)
    out[order[: max(kept, 1)]] = True
    return out


def choose_all(rows: Floats, draws: Sequence[Draw]) -> list[int]:
    """One token a row of [rows, vocabulary] logits."""
    return [choose(row, draw) for row, draw in zip(rows, draws, strict=True)]
