"""A ring of unlike devices: the planner's layers against an even split, both served and measured.

Devices are emulated, each with its own time for a layer; the planner is given the times measured on them. All else is
the worker's own, as in `plumb bench ring`.
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench._models import write_llama
from bench._ring import Build, EmulatedStage, measure
from bench.ring import rated
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from worker.batch import Batch, Piece
from worker.config import Serving
from worker.planner import Device, Hop, Load, Measurements, Model, plan

ROWS = 1


def run(
    layer_ms: list[float] | None = None, layers: int = 24, latency_ms: float = 20, seconds: float = 8, rounds: int = 3
) -> dict[str, Any]:
    """layer_ms: of each device; latency_ms: one way, of each hop; seconds: of each measurement; rounds: of which the
    median counts.

    Returns {"results": [{name: planned | even, layers, tokens_per_second, model_prediction, ...}], "over_even"}.
    """
    torch.set_num_threads(1)
    leaf_hashes(bytes(2**14), 512)
    times = [milliseconds / 1e3 for milliseconds in layer_ms or [4, 8, 16, 8]]
    latency = latency_ms / 1e3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder, torch.float32, hidden=32, layers=layers)
        devices = tuple(Device(f"device {i}", _measured(folder, took), 1e9) for i, took in enumerate(times))
        found = plan(Measurements(Model(layers, 1.0, 1.0, 1.0), Load(ROWS, 100), Hop(latency), devices))
        held = {share.device: share.end_layer - share.first_layer for share in found.shares}
        n = len(times)
        splits = {
            "planned": [held.get(device.name, 0) for device in devices],
            "even": [layers * (i + 1) // n - layers * i // n for i in range(n)],
        }
        results = [_row(side, folder, counts, times, latency, seconds, rounds) for side, counts in splits.items()]
    rates = [row["tokens_per_second"] for row in results]
    return {"results": results, "over_even": round(rates[0] / rates[1], 3)}


def _emulated(folder: Path, first: int, end: int, layer_seconds: float) -> EmulatedStage:
    stage = EmulatedStage(folder, first, end)
    stage.seconds = (end - first) * layer_seconds
    return stage


def _measured(folder: Path, layer_seconds: float) -> float:
    """A device's time for one layer, as its operator would take it."""
    stage = _emulated(folder, 0, 1, layer_seconds)
    batch, hidden = Batch((Piece(0, 0, ROWS),)), stage.embed(np.zeros(ROWS, np.int64))
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        stage.forward(hidden, batch, stage.cache())
        taken.append(time.perf_counter() - began)
    return median(taken)


def _row(
    side: str, folder: Path, counts: Sequence[int], times: Sequence[float], latency: float, seconds: float, rounds: int
) -> dict[str, Any]:
    used = [(count, took) for count, took in zip(counts, times, strict=True) if count]
    bounds = pairwise([0, *accumulate(count for count, _ in used)])
    builds: list[Build] = [
        partial(_emulated, folder, first, end, took) for (first, end), (_, took) in zip(bounds, used, strict=True)
    ]
    stages = [count * took for count, took in used]
    whole = sum(stages) + len(used) * latency
    full = int(1.5 * whole / max(stages)) + 1
    tokens = 4 + int(seconds / max(whole, full * max(stages)))
    requests = [Request(prompt=(r % 7,), limit=tokens) for r in range(full * ROWS)]
    rows = []
    for _ in range(rounds):
        returned = measure(builds, requests, Serving(max_rows=ROWS, attempts=1), [latency] * len(used))
        rows.append(rated(returned, len(requests), tokens))
    rows.sort(key=lambda row: row.tokens_per_second)
    taken = rows[len(rows) // 2]
    return {
        "name": side,
        "layers": list(counts),
        "latency_ms": round(1e3 * latency, 3),
        "microbatches": taken.microbatches,
        "tokens_per_second": round(taken.tokens_per_second, 2),
        "model_prediction": round(ROWS * min(1 / max(stages), taken.microbatches / whole), 2),
    }
