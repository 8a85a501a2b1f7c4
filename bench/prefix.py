"""Prompts that begin alike: what is gained where that is computed once.

One stage of a random Llama, committed as ever. Each prompt is `prefix` tokens that all share and some of its own; the
same job is served with `share_prefixes` and without, in turns. `prefill_positions` are those of prompts that went
through the model, `ttft_seconds` is when half of the requests had their first token. CPU seconds are of all threads:
other work on the machine moves them less than the clock.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench._alone import serve
from bench._models import write_llama
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from worker.batch import Batch
from worker.cache import Cache
from worker.config import Serving
from worker.sampler import Draw
from worker.stage import Captured, Stage

VOCABULARY = 1024


class WatchedStage(Stage):
    """Knows how many rows of its job it computed, and when how many tokens were chosen."""

    rows = 0
    chosen: list[tuple[float, int]]

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        self.rows += batch.rows
        return super().forward(hidden, batch, cache)

    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        ids = super().tokens(hidden, draws)
        self.chosen += [(time.perf_counter(), draw.position) for draw in draws]
        return ids


def run(
    hidden: int = 512,
    layers: int = 6,
    requests: int = 32,
    own: int = 32,
    tokens: int = 16,
    prefixes: list[int] | None = None,
    max_rows: int = 512,
    rounds: int = 3,
    threads: int = 1,
) -> dict[str, Any]:
    """own: tokens of each prompt behind the shared ones; tokens: generated for each; rounds: of which the median
    counts, a first one warms up.

    Returns {"results": [{name, prefix, tokens_per_second, prefill_positions, ttft_seconds, ratio, ...}]}; `ratio` and
    `cpu_ratio` are to `alone`, by the clock and by CPU seconds.
    """
    torch.set_num_threads(threads)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), torch.float32, hidden=hidden, layers=layers, vocabulary=VOCABULARY)
        stage = WatchedStage(Path(folder), 0, layers)
        for prefix in prefixes or [0, 16, 64, 512]:
            shared = [(13 * t + 5) % VOCABULARY for t in range(prefix)]
            prompts = [(*shared, *((31 * r + 7 * t) % VOCABULARY for t in range(own))) for r in range(requests)]
            job = [Request(prompt, tokens) for prompt in prompts]
            serving = Serving(max_rows=max_rows, stall_seconds=600)
            sides = {"shared": serving, "alone": replace(serving, share_prefixes=False)}
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for _ in range(rounds + 1):
                for name, chosen in sides.items():
                    found[name].append(_measure(stage, job, chosen))
            rows = {
                name: {"name": name, "prefix": prefix, **{key: median(row[key] for row in each[1:]) for key in each[0]}}
                for name, each in found.items()
            }
            for row in rows.values():
                for ratio, unit in (("ratio", "tokens_per_second"), ("cpu_ratio", "tokens_per_cpu_second")):
                    row[ratio] = round(row[unit] / rows["alone"][unit], 3)
            results += rows.values()
    described = {"hidden_size": hidden, "layers": layers, "requests": requests, "own": own, "tokens": tokens}
    return {**described, "max_rows": max_rows, "threads": threads, "results": results}


def _measure(stage: WatchedStage, job: Sequence[Request], serving: Serving) -> dict[str, float]:
    stage.rows, stage.chosen = 0, []
    began = time.perf_counter()
    served = serve(stage, job, serving)
    firsts = sorted(when for when, position in stage.chosen if position == len(job[0].prompt) - 1)
    return {
        "tokens_per_second": round(served.tokens / served.seconds, 2),
        "tokens_per_cpu_second": round(served.tokens / served.cpu_seconds, 2),
        "prefill_positions": stage.rows - (served.tokens - len(job)),
        "ttft_seconds": round(firsts[len(firsts) // 2] - began, 3),
    }
