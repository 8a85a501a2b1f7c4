"""How much of a job is audited: `full`, `sweep:N`, `cells:N`, `tokens`, or `auto` within a budget of seconds.

A cell is all segments of one request, layer and position; with it go the embeddings of the request up to there, which
are its history. Cells are drawn after the commitment, from a secret, and spread over the layers, so a worker that
spoils a share s of each layer's is caught by N cells with probability 1 - (1 - s)^N whatever it knows. `full` looks at
every piece; `sweep:N` too, but for the MLP, whose gate and up products are half of all arithmetic and, of a layer's,
the only ones that must be repeated (verifier/sketch.py): it is judged at one position in N of each request and layer.
`tokens`
downloads no tensor: it executes prompt and output itself and looks at the trace of a request only where a token lies
far outside of the law's margin.
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from verifier.commit import Output, Request
from verifier.shape import ModelShape

FULL, TOKENS, AUTO = "full", "tokens", "auto"
_COUNTED = re.compile(r"(cells|sweep):([1-9]\d{0,8})")
_PROBE = 512  # rows and columns of the product that tells how fast this machine is
_STREAMED = 2e8  # weights a second that one position reads through: memory and disk, not arithmetic
_OVERHEAD = 1.5  # of an audit over its products
_SKETCHED = 1 / 8  # of a product, where sixteen directions stand for 64 columns or more and some pieces are repeated
_PASSES = 3500  # products' worth, for each column of a row, of attention, norms, decoding and comparing
THIN = 16  # of `auto`, where a full audit does not fit


@dataclass(frozen=True, order=True)
class Cell:
    request: int
    layer: int
    position: int


@dataclass(frozen=True)
class Strategy:
    """name: full, tokens, auto, cells or sweep. count: how many (of `cells`), one in how many (of `sweep`)."""

    name: str = FULL
    count: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.count}" if self.count else self.name


def parse_strategy(text: str) -> Strategy:
    """Raises ValueError."""
    if text in (FULL, TOKENS, AUTO):
        return Strategy(text)
    found = _COUNTED.fullmatch(text)
    if found is None:
        raise ValueError(f"expected full, tokens, auto, sweep:N or cells:N, got {text!r}")
    return Strategy(found.group(1), int(found.group(2)))


def positions_of(requests: Sequence[Request], outputs: Sequence[Output]) -> list[int]:
    """How many positions each request has, by its outputs (STOP holds the last stage to it)."""
    return [len(q.prompt) + len(o.tokens) - 1 for q, o in zip(requests, outputs, strict=True)]


def draw(positions: Sequence[int], layers: int, count: int, seed: bytes) -> tuple[Cell, ...]:
    """`count` different cells, all of them where there are no more; every cell is equally likely.

    Spread over the layers, none of which has two more than another: a cheat in one layer of six is looked at by eight
    cells for sure, where eight drawn from anywhere would miss the layer in 23 of 100 jobs.
    """
    ends, chance = list(accumulate(positions)), random.Random(seed)
    each, more = divmod(min(count, ends[-1] * layers), layers)
    fuller = set(chance.sample(range(layers), more))
    cells = []
    for layer in range(layers):
        for row in chance.sample(range(ends[-1]), each + (layer in fuller)):
            request = bisect_right(ends, row)
            cells.append(Cell(request, layer, row - (ends[request] - positions[request])))
    return tuple(sorted(cells))


def thinned(positions: int, one_in: int, seed: bytes) -> tuple[int, ...]:
    """One position in `one_in`, at least one, drawn by a seed of their own, in order."""
    return tuple(sorted(random.Random(seed).sample(range(positions), -(-positions // one_in))))


def settled(strategy: Strategy, shape: ModelShape, positions: Sequence[int], seconds: float) -> Strategy:
    """What `auto` comes to for one job: all of it if that fits into `seconds`, else a sweep, else some cells."""
    if strategy.name != AUTO:
        return strategy
    linear = shape.hidden * (2 * shape.query_width + 2 * shape.kv_width + shape.intermediate)
    gated, head, rows = 2 * shape.hidden * shape.intermediate, shape.hidden * shape.vocabulary, sum(positions)
    for found in (Strategy(FULL), Strategy("sweep", THIN)):
        layer = gated / (found.count or 1) + _SKETCHED * linear + _PASSES * shape.hidden
        if _OVERHEAD * 2 * rows * (shape.layers * layer + head) / _speed() <= seconds:
            return found
    cells = int(seconds / ((linear + gated + head / shape.layers) / _STREAMED))
    return Strategy("cells", max(1, min(cells, rows * shape.layers)))


@cache
def _speed() -> float:
    """Multiplications and additions a second, of this machine's float32 products."""
    x = torch.ones(_PROBE, _PROBE)
    torch.mm(x, x)
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(x, x)
    return 4 * 2 * _PROBE**3 / (time.perf_counter() - started)
