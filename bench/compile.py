"""Whether torch.compile pays for a stage: its norms, or norms and MLPs, compiled by Inductor, against the stage as is.

One thread of this CPU; a microbatch of prompts and one of single rows. What is observed stays between the parts, so a
layer can't be compiled whole: the trace holds what attention and MLP put out. Needs a C++ compiler, as Inductor does.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import BenchError
from bench._models import write_llama
from worker.batch import Batch, Piece
from worker.products import fastest
from worker.stage import Stage

MODELS: dict[str, dict[str, int]] = {
    "demo": dict(hidden=256, layers=6),
    "100M": dict(hidden=768, layers=12, vocabulary=16_000),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROMPTS = (4, 128)  # requests, rows of each
SIDES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "norms and MLPs": ("input_layernorm", "post_attention_layernorm", "mlp"),
}


def run(models: list[str] | None = None, requests: int = 32, rounds: int = 20) -> dict[str, Any]:
    """requests: of which the single rows are; rounds: of which the median counts, the sides in turns.

    Returns {"results": [{name, model, dtype, first_seconds, prompts_ms, single_rows_ms, over_eager}]}. first_seconds:
    of the first calls, which compile. Raises BenchError where nothing can be compiled.
    """
    torch.set_num_threads(1)
    results = []
    for model in models or list(MODELS):
        for name, dtype in DTYPES.items():
            with tempfile.TemporaryDirectory() as folder:
                write_llama(Path(folder), dtype, **MODELS[model])
                for row in _compare(Path(folder), MODELS[model]["layers"], dtype, requests, rounds):
                    results.append({**row, "model": model, "dtype": name})
    return {"results": results}


def _compare(folder: Path, layers: int, dtype: torch.dtype, requests: int, rounds: int) -> list[dict[str, Any]]:
    first: dict[str, float] = {}
    works: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for side, parts in SIDES.items():
        # Inductor lays weights out itself, and takes none that are.
        stage = Stage(folder, 0, layers, products="mapped" if "mlp" in parts else fastest(dtype))
        for layer in stage.layers.values():
            for part in parts:
                module = layer.get_submodule(part)
                module.forward = torch.compile(module.forward, dynamic=True)
        start = time.perf_counter()
        try:
            works[side] = _prompts(stage), _single_rows(stage, requests)
            for work in works[side]:
                work()
        except RuntimeError as error:
            raise BenchError(f"bench compile: {str(error).splitlines()[0]}") from error
        first[side] = time.perf_counter() - start
    taken: dict[str, list[list[float]]] = {side: [[], []] for side in SIDES}
    for turn in range(rounds):
        for side in list(SIDES)[:: -1 if turn % 2 else 1]:
            for work, seconds in zip(works[side], taken[side], strict=True):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
    found = {side: [1e3 * median(seconds) for seconds in taken[side]] for side in SIDES}
    return [
        {
            "name": side,
            "first_seconds": round(first[side], 2),
            "prompts_ms": round(prompts, 2),
            "single_rows_ms": round(single, 2),
            "over_eager": [round(eager / own, 3) for eager, own in zip(found["eager"], (prompts, single), strict=True)],
        }
        for side, (prompts, single) in found.items()
    ]


def _prompts(stage: Stage) -> Callable[[], None]:
    count, rows = PROMPTS

    def work() -> None:
        _forward(stage, stage.cache(), [Piece(r, 0, rows) for r in range(count)])

    return work


def _single_rows(stage: Stage, requests: int) -> Callable[[], None]:
    """Each time the next position of every request."""
    cache, positions = stage.cache(), iter(range(PROMPTS[1], 2**20))
    for r in range(requests):
        _forward(stage, cache, [Piece(r, 0, PROMPTS[1])])

    def work() -> None:
        position = next(positions)
        _forward(stage, cache, [Piece(r, position, 1) for r in range(requests)])

    return work


def _forward(stage: Stage, cache: Any, pieces: list[Piece]) -> None:
    batch = Batch(tuple(pieces))
    stage.forward(torch.zeros(batch.rows, stage.shape.hidden, dtype=stage.dtype) + 0.5, batch, cache)
