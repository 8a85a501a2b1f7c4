"""Attention of one new position of each request to its own earlier ones, on a CPU: over the cache's pages, where they
lie (paged attention: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023).

A decoding request has one row for all its positions: there is nothing in that for a product of matrices, and nothing to
pad. Pages are read from one end to the other, sums are of float32, in an order that depends on a request's own length
alone: what a row attends to has the same bits whatever else is in its microbatch, and on however many threads.
Compiled for each shape of heads on first use and cached beside this file.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types

from verifier.native import compiled
from worker import vectors
from worker.cache import PAGE, Pages
from worker.vectors import LANES, add_up, score, weigh

assert PAGE == LANES

REGISTERS = 16  # vectors that the queries of one pass take, at most

WORTH = 2**19  # numbers of the keys that are worth another thread: it takes about as long to wake as to read these


def serves(device: torch.device, head_size: int) -> bool:
    """Whether `attend` is for such heads there."""
    return device.type == "cpu" and head_size % LANES == 0


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """query [n, heads, size], keys and values [slots, key heads, size], all in one dtype -> [n, heads, size] in it.

    What is in a page behind a row's last position must be finite.
    """
    (rows, heads, size), key_heads = query.shape, keys.shape[1]
    asked = query.float().contiguous().numpy().reshape(-1)
    out = np.zeros_like(asked)
    attend_rows = program(size, heads // key_heads, keys.dtype)
    pools = _bits(keys), _bits(values)

    def some(first: int, end: int) -> None:
        attend_rows(
            asked, out, *pools, pages.slots, pages.starts[first:end], pages.counts[first:end], first, key_heads, scale
        )

    ends = _shares(pages.counts, key_heads * size)
    others = [_helpers().submit(some, first, end) for first, end in pairwise(ends)]
    some(0, ends[0])
    for other in others:
        other.result()
    return torch.from_numpy(out).view(rows, heads, size).to(query.dtype)


def _shares(counts: npt.NDArray[np.int64], width: int) -> list[int]:
    """Where the rows of each of torch's threads end, for as many threads as are worth it. width: of a position."""
    threads = min(torch.get_num_threads(), int(counts.sum()) * width // WORTH)
    if threads < 2:
        return [len(counts)]
    total = np.cumsum(counts)
    return [*(int(np.searchsorted(total, total[-1] * i // threads)) for i in range(1, threads)), len(counts)]


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="attention")


def _bits(pool: torch.Tensor) -> npt.NDArray[Any]:
    return pool.view(torch.int16 if pool.element_size() == 2 else torch.float32).view(-1).numpy()


@cache
def program(size: int, shared: int, dtype: torch.dtype) -> Callable[..., None]:
    """Compiled or loaded now, before `attend` needs it. shared: heads over the same keys."""
    chunks = size // LANES
    queries = next(n for n in range(shared, 0, -1) if shared % n == 0 and (n == 1 or n * chunks <= REGISTERS))
    parts, half = shared // queries, dtype is torch.float16

    def attend_rows(
        query: Any,
        out: Any,
        keys: Any,
        values: Any,
        slots: Any,
        starts: Any,
        counts: Any,
        before: int,
        heads: int,
        scale: float,
    ) -> None:
        most = (counts.max() + LANES - 1) // LANES * LANES if len(counts) else 0
        scores = np.empty(heads * shared * most, np.float32)
        stride = heads * size
        for row in range(len(counts)):
            count, first, own = counts[row], starts[row], (before + row) * heads * shared
            pages = (count + LANES - 1) // LANES
            room = pages * LANES
            # Page by page, all heads: memory is read from one end to the other.
            for page in range(pages):
                base, left = slots[first + page] * stride, count - page * LANES
                for i in range(heads * parts):
                    at, place = (own + i * queries) * size, base + i // parts * size
                    to = i * queries * room + page * LANES
                    score(query, at, keys, place, stride, left, scale, scores, to, room, size, queries, half)  # type: ignore[call-arg]
            for i in range(heads * shared):
                weigh(scores, i * room, room)  # type: ignore[call-arg]
            for page in range(pages):
                base = slots[first + page] * stride
                for i in range(heads * parts):
                    at, place = (own + i * queries) * size, base + i // parts * size
                    of = i * queries * room + page * LANES
                    add_up(out, at, values, place, stride, scores, of, room, size, queries, half)  # type: ignore[call-arg]

    floats, ints = types.float32[::1], types.int64[::1]
    pool = floats if dtype is torch.float32 else types.int16[::1]
    numbers = (types.int64, types.int64, types.float32)
    signature = types.void(floats, floats, pool, pool, ints, ints, ints, *numbers)
    name = f"attend_{size}_{shared}_{str(dtype).removeprefix('torch.')}"
    return compiled(signature, attend_rows, name, [__file__, vectors.__file__])
