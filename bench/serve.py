"""Batched generation on one machine: this worker against transformers' `generate` and `generate_batch`.

Random Llamas, prompts of mixed length, the same number of output tokens for all, greedy; sides take turns. `plumb` is
the whole worker of one stage, its trace recorded and committed; beside it the same without, and a stage that repeats
itself (`--retain regenerate`). CPU seconds are of all threads: other work on the machine moves them less than the
clock. `padding` is the share of the positions that attention read which belonged to no request.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from bench._alone import Silent, serve
from bench._models import write_llama
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from worker.cache import Cache
from worker.config import Serving
from worker.repeat import RepeatableStage
from worker.stage import Stage, widening_pays

MODELS: dict[str, dict[str, int]] = {
    "demo": dict(hidden=256, layers=6),
    "100M": dict(hidden=768, layers=12, vocabulary=16_000),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPT_TOKENS = (8, 256)  # shortest and longest
MAX_ROWS = 512
PAGE = 16  # of transformers' cache: its default of 256 positions is made for GPUs


class WatchedStage(Stage):
    """Knows the caches that it made."""

    made: list[Cache]

    def cache(self, buffer: int = 0, reserves: Sequence[int] = (), foreseen: int = 0) -> Cache:
        self.made = [*getattr(self, "made", ()), super().cache(buffer, reserves, foreseen)]
        return self.made[-1]

    @property
    def padding(self) -> float:
        """The most in any job."""
        return max(cache.padding for cache in self.made)


def run(
    models: dict[str, list[int]] | None = None,
    dtypes: list[str] | None = None,
    rounds: int = 3,
    threads: int = 1,
) -> dict[str, Any]:
    """models: name -> [requests, tokens each]; rounds: of which the median counts, a first one warms up.

    Returns {"results": [{name, model, dtype, tokens_per_second, ...}], "ratios": [...]}.
    """
    torch.set_num_threads(threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher
    results: list[dict[str, Any]] = []
    for name, (count, limit) in (models or {"demo": [32, 48], "100M": [16, 32]}).items():
        for dtype in dtypes or ["bfloat16", "float32"]:
            with tempfile.TemporaryDirectory() as folder:
                model = write_llama(Path(folder), DTYPES[dtype], **MODELS[name])
                results += _compare(model, Path(folder), name, dtype, count, limit, rounds, threads)
    return {"results": results, "ratios": _ratios(results)}


def _compare(
    model: LlamaForCausalLM, folder: Path, name: str, dtype: str, count: int, limit: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(*PROMPT_TOKENS, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]
    requests = [Request(tuple(prompt), limit) for prompt in prompts]
    widened = widening_pays(DTYPES[dtype])
    layers = model.config.num_hidden_layers
    stage = WatchedStage(folder, 0, layers, widened=widened)
    repeatable = RepeatableStage(folder, 0, layers, weights=stage.weights, widened=widened)
    serving = Serving(max_rows=MAX_ROWS)
    sides: dict[str, Callable[[], Sequence[Sequence[int]]]] = {
        "plumb": lambda: serve(stage, requests, serving),
        "plumb without commitments": lambda: serve(stage, requests, serving, Silent),
        "plumb regenerating": lambda: serve(repeatable, requests, replace(serving, retain="regenerate")),
        "transformers generate": lambda: _generate(model, prompts, limit),
        "transformers generate_batch": lambda: _generate_batch(model, prompts, limit),
    }
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        order = list(sides)
        for side in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always comes behind the same
            work = sides[side]
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = work()
            seconds[side].append((time.perf_counter() - wall, time.process_time() - cpu))
            if [len(ids) for ids in outputs] != [limit] * count:
                raise RuntimeError(f"{side}: expected {limit} tokens each, came {[len(ids) for ids in outputs]}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    described = {"model": name, "parameters": parameters, "dtype": dtype, "requests": count, "threads": threads}
    return [
        {
            "name": side,
            **described,
            "prompt_tokens": sum(lengths),
            "tokens": count * limit,
            "tokens_per_second": round(count * limit / median(wall for wall, _ in taken[1:]), 2),
            "tokens_per_cpu_second": round(count * limit / median(cpu for _, cpu in taken[1:]), 2),
            **({"widened": widened} if side.startswith("plumb") else {}),
            **({"padding": round(stage.padding, 4)} if side in ("plumb", "plumb without commitments") else {}),
        }
        for side, taken in seconds.items()
    ]


def _generate(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """One static batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0)
    answer: list[list[int]] = out[:, longest:].tolist()
    return answer


def _generate_batch(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Continuous batching, with as many pages as the batch needs and microbatches as large as ours."""
    pages = sum(-(-(len(prompt) + limit) // PAGE) + 1 for prompt in prompts)
    out = model.generate_batch(
        [list(prompt) for prompt in prompts],
        GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=MAX_ROWS),
    )
    return [list(answer.generated_tokens) for answer in out.values()]


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model and dtype: plumb over the faster of the two peers, by the clock and by CPU seconds."""
    by = {(row["model"], row["dtype"], row["name"]): row for row in results}
    ratios = []
    for model, dtype, name in by:
        if not name.startswith("plumb"):
            continue
        peers = [by[model, dtype, f"transformers {peer}"] for peer in ("generate", "generate_batch")]
        over = {
            unit: round(by[model, dtype, name][unit] / max(peer[unit] for peer in peers), 3)
            for unit in ("tokens_per_second", "tokens_per_cpu_second")
        }
        ratios.append({"name": name, "model": model, "dtype": dtype, **over})
    return ratios
