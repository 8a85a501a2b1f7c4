"""Commitments on the hot path: tokens a second with the trace recorded, hashed and stored, and without.

Random Llamas in bfloat16: a few layers of hidden size 2048, and beside it the demo's size and 100 M parameters. The
sides take turns; `cpu_seconds` are of all threads of a run, which other work on the machine moves less than the clock.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from bench._alone import Silent, serve
from bench._models import write_llama
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from verifier.trace import tensor_keys, tensor_width
from worker.config import Serving
from worker.products import fastest
from worker.recorder import Recorder, Summary
from worker.stage import Stage

MODELS: dict[str, dict[str, int]] = {
    "demo": dict(hidden=256, layers=6),
    "100M": dict(hidden=768, layers=12, vocabulary=16_000),
    "2048": dict(hidden=2048, layers=2),
}


class Watched(Recorder):
    """Notes how full the queue was."""

    peaks: ClassVar[list[int]] = []

    def finish(self) -> Summary:
        summary = super().finish()
        self.peaks.append(self.peak_bytes)
        return summary


SIDES: dict[str, type[Recorder]] = {"on": Watched, "off": Silent}


def run(
    models: list[str] | None = None, requests: int = 32, prompt: int = 32, tokens: int = 64, rounds: int = 5
) -> dict[str, Any]:
    """rounds: of which the median counts; a first one warms up.

    Returns {"results": [{name, model, hidden_size, tokens_per_second, ...}], "ratios": [{model, on_over_off}]}.
    """
    torch.set_num_threads(1)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher
    results, ratios = [], []
    for name in models or list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            write_llama(Path(folder), torch.bfloat16, **MODELS[name])
            stage = Stage(Path(folder), 0, MODELS[name]["layers"], products=fastest(torch.bfloat16))
            batch = [Request(tuple((7 * r + i) % 1000 for i in range(prompt)), tokens) for r in range(requests)]
            serving = Serving()
            Watched.peaks.clear()
            taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
            for turn in range(rounds + 1):
                for side in sorted(SIDES, reverse=bool(turn % 2)):
                    served = serve(stage, batch, serving, SIDES[side])
                    taken[side].append((served.seconds, served.cpu_seconds))
        keys = tensor_keys(stage.shape, 0, stage.shape.layers)
        row_bytes = sum(tensor_width(stage.shape, key) for key in keys) * stage.shape.served_dtype.size
        for side, seconds in taken.items():
            wall, cpu = (median(each[i] for each in seconds[1:]) for i in (0, 1))
            results.append(
                {
                    "name": side,
                    "model": name,
                    "hidden_size": MODELS[name]["hidden"],
                    "layers": MODELS[name]["layers"],
                    "dtype": "bfloat16",
                    "tokens_per_second": round(requests * tokens / wall, 2),
                    "cpu_seconds": round(cpu, 3),
                    "trace_bytes_a_row": row_bytes,
                    "queue_bytes_at_most": serving.recorder_bytes if side == "on" else 0,
                    "queue_bytes_seen": max(Watched.peaks, default=0) if side == "on" else 0,
                }
            )
        pairs = list(zip(taken["on"][1:], taken["off"][1:], strict=True))
        ratios.append(
            {
                "model": name,
                "hidden_size": MODELS[name]["hidden"],
                "on_over_off": round(median(off[0] / on[0] for on, off in pairs), 4),
                "on_over_off_by_cpu": round(median(off[1] / on[1] for on, off in pairs), 4),
            }
        )
    return {"results": results, "ratios": ratios}
