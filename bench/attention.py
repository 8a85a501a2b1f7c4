"""What one stage's step is made of on this CPU: attention of single rows over pages against torch's SDPA, and products
from weights as they lie mapped, packed and widened.

One thread. The sides take turns; a row is the median of their times. SDPA gets requests of one length, side by side,
with a mask, as in a run of the cache: its best case.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.cache import PAGE, Pages
from worker.errors import ConfigError
from worker.paged_attention import attend
from worker.products import product
from worker.stage import DTYPES

HEADS = {"demo": (2, 2, 64), "100M": (6, 2, 64), "8B": (8, 4, 128)}  # key heads, heads over each, size
MATRICES = {"demo": (768, 256), "100M": (2304, 768), "2048": (6144, 2048)}  # gate, up
ROUNDS = 5


def run(positions: int = 250, requests: list[int] | None = None, rows: list[int] | None = None) -> dict[str, Any]:
    """positions: of each request; requests: that decode together; rows: of a product.

    Returns {"results": [{name: "attention" | "product", dtype, model, ..., microseconds by side}]}.
    """
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in DTYPES:
            named = {"dtype": str(dtype).removeprefix("torch.")}
            for model, heads in HEADS.items():
                for count in requests or [1, 8, 32]:
                    taken = _timed(_attentions(dtype, heads, count, positions))
                    over = {"paged_over_sdpa": round(taken["sdpa"] / taken["paged"], 2)}
                    results.append({"name": "attention", **named, "model": model, "requests": count, **taken, **over})
            for model, shape in MATRICES.items():
                for count in rows or [1, 16, 64, 512]:
                    taken = _timed(_products(dtype, shape, count))
                    results.append({"name": "product", **named, "model": model, "rows": count, **taken})
    return {"positions": positions, "results": results}


def _attentions(
    dtype: torch.dtype, heads: tuple[int, int, int], count: int, positions: int
) -> Mapping[str, Callable[[], object]]:
    key_heads, shared, size = heads
    room = -(-positions // PAGE) * PAGE
    query = torch.randn(count, key_heads * shared, size).to(dtype)
    pools = tuple(torch.randn(count * room, key_heads, size).to(dtype) for _ in range(2))
    pages = Pages.of([np.arange(r * room, r * room + positions) for r in range(count)])
    keys, values = (pool.view(count, room, key_heads, size)[:, :positions].transpose(1, 2) for pool in pools)
    mask = torch.zeros(count, 1, 1, positions, dtype=dtype).expand(-1, -1, shared, -1)
    grouped = query.view(count, key_heads, shared, size)
    return {
        "paged": lambda: attend(query, pools[0], pools[1], pages, size**-0.5),
        "sdpa": lambda: scaled_dot_product_attention(grouped, keys, values, attn_mask=mask),
    }


def _products(dtype: torch.dtype, shape: tuple[int, int], count: int) -> Mapping[str, Callable[[], object]]:
    """Those that are for such weights here."""
    matrix, given = (torch.randn(*size).to(dtype) for size in (shape, (count, shape[1])))
    sides: dict[str, Callable[[], object]] = {}
    for products in ("mapped", "packed", "widened")[: 2 if dtype is torch.float32 else 3]:
        try:
            multiply = product(products, matrix)
        except ConfigError:
            continue
        sides[products] = lambda multiply=multiply: multiply(given)  # type: ignore[misc]
    return sides


def _timed(sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each, the median of ROUNDS in turns, each of as many calls as take some milliseconds."""
    calls = {}
    for side, work in sides.items():
        work()
        start = time.perf_counter()
        work()
        calls[side] = max(3, min(200, int(5e-3 / (time.perf_counter() - start))))
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, work in sides.items():
            start = time.perf_counter()
            for _ in range(calls[side]):
                work()
            taken[side].append((time.perf_counter() - start) / calls[side])
    return {side: round(1e6 * median(seconds), 1) for side, seconds in taken.items()}
