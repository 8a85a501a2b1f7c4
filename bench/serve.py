"""Batched generation on one machine: this worker against transformers' `generate` and `generate_batch`.

Random Llamas, prompts of mixed length, greedy; sides take turns. Each request gets the same number of output tokens,
the kindest case for a static batch and the hardest for traces, for all of which the disk is waited at the end; or
(`outputs`: "mixed") a quarter of it to seven quarters, the same in sum. llama.cpp runs beside them where it is
installed (bench/_llama_cpp.py). `plumb` is the whole worker of one stage, its
trace recorded and committed; beside it the same without, and a stage that repeats itself (`--retain regenerate`). CPU
seconds are of all threads: other work on the machine moves them less than the clock. `padding` is the share of the
positions that attention read which belonged to no request.
"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.utils import WorkloadHints

from bench._alone import Served, Silent, serve, timed
from bench._llama_cpp import LlamaCpp, installed, write_gguf
from bench._models import write_llama
from verifier.commit import Request
from verifier.sha256 import leaf_hashes
from worker.cache import Cache
from worker.config import Serving
from worker.products import fastest
from worker.repeat import RepeatableStage
from worker.stage import Stage

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
    outputs: list[str] | None = None,
    rounds: int = 3,
    threads: int = 1,
) -> dict[str, Any]:
    """models: name -> [requests, tokens each]; outputs: "equal", "mixed"; rounds: of which the median counts, a first
    one warms up.

    Returns {"results": [{name, model, dtype, outputs, tokens_per_second, ...}], "ratios": [...]}.
    """
    torch.set_num_threads(threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher
    results: list[dict[str, Any]] = []
    for name, (count, limit) in (models or {"demo": [32, 48], "100M": [16, 32]}).items():
        for dtype in dtypes or ["bfloat16", "float32"]:
            with tempfile.TemporaryDirectory() as folder:
                model = write_llama(Path(folder), DTYPES[dtype], **MODELS[name])
                for kind in outputs or ["equal", "mixed"]:
                    described = {"model": name, "dtype": dtype, "outputs": kind, "requests": count, "threads": threads}
                    results += _compare(model, Path(folder), _limits(kind, count, limit), described, rounds)
    return {"results": results, "ratios": _ratios(results)}


def _limits(kind: str, count: int, mean: int) -> list[int]:
    """Output tokens of each request, `count` * `mean` in sum."""
    if kind not in ("equal", "mixed"):
        raise ValueError(f"expected outputs equal or mixed, got {kind}")
    if kind == "equal":
        return [mean] * count
    spread = torch.linspace(mean // 4, 2 * mean - mean // 4, count).round().long()
    spread = spread[torch.randperm(count, generator=torch.Generator().manual_seed(2))]
    spread[0] += count * mean - int(spread.sum())
    return [int(limit) for limit in spread]


def _compare(
    model: LlamaForCausalLM, folder: Path, limits: list[int], described: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(*PROMPT_TOKENS, (len(limits),), generator=generator).tolist()
    prompts = [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]
    requests = [Request(tuple(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
    products = fastest(DTYPES[described["dtype"]])
    layers = model.config.num_hidden_layers
    stage = WatchedStage(folder, 0, layers, products=products)
    repeatable = RepeatableStage(folder, 0, layers, weights=stage.weights, products=products)
    serving = Serving(max_rows=MAX_ROWS)
    sides: dict[str, Callable[[], Served]] = {
        "plumb": lambda: serve(stage, requests, serving),
        "plumb without commitments": lambda: serve(stage, requests, serving, Silent),
        "plumb regenerating": lambda: serve(repeatable, requests, replace(serving, retain="regenerate")),
        "transformers generate": lambda: timed(lambda: _generate(model, prompts, limits)),
        "transformers generate_batch": lambda: timed(lambda: _generate_batch(model, prompts, limits)),
    }
    with ExitStack() as opened:
        if installed():
            positions = max(map(sum, zip(lengths, limits, strict=True)))
            write_gguf(model, folder / "model.gguf")
            peer = opened.enter_context(LlamaCpp(folder / "model.gguf", len(prompts), positions, described["threads"]))
            sides["llama.cpp"] = lambda: timed(lambda: peer.generate(prompts, limits))
        taken = _in_turns(sides, limits, rounds)
    _check_same_model(taken)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "name": side,
            **described,
            "parameters": parameters,
            "prompt_tokens": sum(lengths),
            "tokens": sum(limits),
            "tokens_per_second": round(sum(limits) / median(each.seconds for each in rounds_taken[1:]), 2),
            "tokens_per_cpu_second": round(sum(limits) / median(each.cpu_seconds for each in rounds_taken[1:]), 2),
            **({"products": products} if side.startswith("plumb") else {}),
            **({"padding": round(stage.padding, 4)} if side in ("plumb", "plumb without commitments") else {}),
        }
        for side, rounds_taken in taken.items()
    ]


def _in_turns(sides: dict[str, Callable[[], Served]], limits: list[int], rounds: int) -> dict[str, list[Served]]:
    taken: dict[str, list[Served]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        order = list(sides)
        for side in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always comes behind the same
            served = sides[side]()
            if (got := [len(ids) for ids in served.outputs]) != limits:
                raise RuntimeError(f"{side}: expected {limits} tokens, came {got}")
            taken[side].append(served)
    return taken


def _check_same_model(taken: dict[str, list[Served]]) -> None:
    """Of random models roundings change a token here and there: three quarters of the first ones must be the same."""
    firsts = {side: [output[0] for output in rounds_taken[0].outputs] for side, rounds_taken in taken.items()}
    for side, tokens in firsts.items():
        same = sum(map(int.__eq__, tokens, firsts["plumb"]))
        if 4 * same < 3 * len(tokens):
            raise RuntimeError(f"{side}: expected the first tokens of plumb, {same} of {len(tokens)} are the same")


def _generate(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """One static batch, padded on the left, until the last request is done."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=0)
    return [row[:limit] for row, limit in zip(out[:, longest:].tolist(), limits, strict=True)]


def _generate_batch(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> list[list[int]]:
    """Continuous batching, with as many pages as the batch needs and microbatches as large as ours."""
    pages = sum(-(-(len(prompt) + limit) // PAGE) + 1 for prompt, limit in zip(prompts, limits, strict=True))
    answers: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=MAX_ROWS
        ),
        workload_hints=WorkloadHints(max(map(len, prompts)), max(limits), len(prompts)),
    ) as manager:
        names = [
            manager.add_request(list(prompt), max_new_tokens=limit, eos_token_id=-1)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        while len(answers) < len(names):
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                answers[answer.request_id] = list(answer.generated_tokens)
            elif answer is None and not manager.is_running():
                raise RuntimeError("generate_batch ended before its requests")
    return [answers[str(name)] for name in names]


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model, dtype and outputs: plumb over the faster of transformers' two, and over llama.cpp where it ran; by
    the clock and by CPU seconds.
    """
    cases = ("model", "dtype", "outputs")
    ratios = []
    for row in results:
        case = {key: row[key] for key in cases}
        for over in ("transformers", "llama.cpp"):
            peers = [peer for peer in results if peer["name"].startswith(over) and case.items() <= peer.items()]
            if not peers or not row["name"].startswith("plumb"):
                continue
            best = {
                unit: round(row[unit] / max(peer[unit] for peer in peers), 3)
                for unit in ("tokens_per_second", "tokens_per_cpu_second")
            }
            ratios.append({"name": row["name"], "over": over, **case, **best})
    return ratios
