"""A ring over slow links: tokens a second with injected one-way latency, against the bubble model.

`emulated`: eight stages that take 20 ms for a microbatch and compute nothing. `torch`: two stages of a random Llama, a
core each, their times measured in the run. Everything else is the worker's own: scheduler, pace, gRPC over mutual TLS,
recorder. The model: rows x min(1 / max T, M / sum(T + L)).
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench._models import write_llama
from bench._ring import Build, EmulatedStage, Returned, measure
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from worker.config import Serving
from worker.pace import MARGIN
from worker.stage import Stage

EMULATED_STAGES = 8
EMULATED_ROWS = 1
TORCH_STAGES = 2
TORCH_ROWS = 16
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """A ring to measure. stage_seconds: to choose how many requests fill it."""

    name: str
    builds: Sequence[Build]
    rows: int
    stage_seconds: float
    cores: Sequence[int | None]
    known: bool  # stage_seconds is what the stages take, not what they once took


@dataclass(frozen=True)
class Rate:
    """What a full ring made; microbatches in flight, and the stages' times as they told them."""

    tokens_per_second: float
    microbatches: int
    slowest_seconds: float
    busy_seconds: float


def run(
    latencies_ms: list[int] | None = None,
    torch_latencies_ms: list[int] | None = None,
    seconds: float = 10.0,
    rounds: int = 3,
    hidden: int = 512,
) -> dict[str, Any]:
    """latencies_ms: one way, of each hop; seconds: of each measurement after the ring is full; rounds: of which the
    median counts; hidden: of the torch model.

    Returns {"results": [{name, latency_ms, microbatches, sized, tokens_per_second, model_prediction, ...}]}.
    """
    torch.set_num_threads(1)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher once for all processes
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder / "emulated", torch.float32, hidden=32, layers=EMULATED_STAGES)
        write_llama(folder / "torch", torch.float32, hidden=hidden, layers=8)
        emulated = [_stage(folder / "emulated", EmulatedStage, i, i + 1) for i in range(EMULATED_STAGES)]
        halves = [_stage(folder / "torch", Stage, 4 * i, 4 * i + 4) for i in range(TORCH_STAGES)]
        for case, latencies in (
            (
                Case("emulated", emulated, EMULATED_ROWS, EmulatedStage.seconds, [None] * EMULATED_STAGES, True),
                latencies_ms if latencies_ms is not None else [0, 16, 64, 256],
            ),
            (
                Case("torch", halves, TORCH_ROWS, _slowest_seconds(halves), list(range(TORCH_STAGES)), False),
                torch_latencies_ms if torch_latencies_ms is not None else [0, 16, 64],
            ),
        ):
            for latency in latencies:
                for sized in (True, False):
                    results.append(_row(case, latency / 1e3, sized, seconds, rounds))
    return {"results": results, "ratios": _ratios(results)}


def _stage(folder: Path, kind: type[Stage], first: int, end: int) -> Callable[[], Stage]:
    return partial(kind, folder, first, end)


def _slowest_seconds(halves: Sequence[Build]) -> float:
    """What a microbatch takes at the slower of two neighbours. Of too few requests none would have all its rows."""
    requests = [Request(prompt=(r % 7,), limit=PROBE_TOKENS) for r in range(TORCH_STAGES * TORCH_ROWS)]
    serving = Serving(max_rows=TORCH_ROWS, microbatches=TORCH_STAGES, stall_seconds=120, attempts=1)
    returned = measure(halves, requests, serving, [0] * TORCH_STAGES, range(TORCH_STAGES))
    return rated(returned, len(requests), PROBE_TOKENS).slowest_seconds


def _row(case: Case, latency: float, sized: bool, seconds: float, rounds: int) -> dict[str, Any]:
    """The median of several runs; each with as many requests as fill the ring, or as many microbatches as stages."""
    stages = len(case.builds)
    round_seconds = stages * (case.stage_seconds + latency)
    full = math.ceil(MARGIN * round_seconds / case.stage_seconds) if sized else stages
    longest = max(round_seconds, full * case.stage_seconds)
    tokens = 4 + math.ceil(seconds / longest)
    requests = [Request(prompt=(r % 7,), limit=tokens) for r in range(full * case.rows)]
    serving = Serving(max_rows=case.rows, microbatches=0 if sized else stages, stall_seconds=120, attempts=1)
    found = []
    for _ in range(rounds):
        returned = measure(case.builds, requests, serving, [latency] * stages, case.cores)
        found.append(_modelled(case, rated(returned, len(requests), tokens), latency))
    found.sort(key=lambda row: row["tokens_per_second"] / row["model_prediction"])
    return {
        "name": case.name,
        "latency_ms": round(1e3 * latency),
        "stages": stages,
        "rows": case.rows,
        "sized": sized,
        **found[len(found) // 2],
    }


def rated(returned: Sequence[Returned], requests: int, tokens: int) -> Rate:
    """Between the second token of every request and the last of the first: the ring is full all that time."""
    total, inside = 0, []
    for row in returned:
        total += row.tokens
        if 2 * requests <= total <= (tokens - 1) * requests:
            inside.append(row)
    return Rate(
        sum(row.tokens for row in inside[1:]) / (inside[-1].seconds - inside[0].seconds),
        round(median(row.microbatches for row in inside)),
        median(row.slowest_seconds for row in inside),
        median(row.busy_seconds for row in inside),
    )


def _modelled(case: Case, rate: Rate, latency: float) -> dict[str, Any]:
    stages = len(case.builds)
    known = case.stage_seconds, stages * case.stage_seconds
    slowest, busy = known if case.known else (rate.slowest_seconds, rate.busy_seconds)
    prediction = case.rows * min(1 / slowest, rate.microbatches / (busy + stages * latency))
    return {
        "microbatches": rate.microbatches,
        "tokens_per_second": round(rate.tokens_per_second, 2),
        "model_prediction": round(prediction, 2),
        "over_model": round(rate.tokens_per_second / prediction, 4),
        "stage_ms": round(1e3 * rate.slowest_seconds, 3),
    }


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By name and latency: the sized ring over the one at no latency, and over M = N."""
    rates = {(row["name"], row["latency_ms"], row["sized"]): row["tokens_per_second"] for row in results}
    return [
        {
            "name": name,
            "latency_ms": latency,
            "over_no_latency": round(rate / rates[name, 0, True], 3) if (name, 0, True) in rates else None,
            "over_m_equals_n": round(rate / rates[name, latency, False], 3),
        }
        for (name, latency, sized), rate in rates.items()
        if sized
    ]
