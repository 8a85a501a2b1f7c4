"""Detection rates of every known way to cheat, and false alarms of every honest way to serve, cell by cell.

`plumb bench detect --report FILE`. Options: model (a folder; default the demo's, made if it is not there), dtypes,
requests, prompt, output (tokens), trials (audits of eight cells), settings (full or quick), sequences (of calibration;
0: as many as `plumb model calibrate` serves), honest (sequences of each honest setting), toploc (false: without it),
only (attacks whose name holds this text), processes (that work at a time).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench import BenchError
from bench._attacks import DRAWN, Attack, attacks
from bench._cells import Judged, confirmed, judge_all, peaks, row, sketched, wilson
from bench._served import Cheat, Result, Server, requests_like
from bench._toploc import flagged, install
from bench._tuned import tuned
from challenger.judge import SCREEN_MARGINS
from deploy.calibrate import calibrate, lengths, sample
from deploy.serving import PATIENT, SETTINGS, available, serve_all
from verifier.audit import Auditor, Stage, Verdict
from verifier.calibration import screen_margins
from verifier.commit import Request
from verifier.execution import Execution
from verifier.referee.codec import Model
from verifier.referee.floats import Dtype
from verifier.safetensors_file import write
from verifier.sources import ServedTensors
from verifier.tolerance import Profile
from verifier.vectors import to_bits as rounded
from verifier.weights import Weights, identify
from worker.sampler import Draw, choose_all
from worker.stage import Stage as Worker
from worker.stage import from_bits

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "bench" / "detect"
FRESH = 77  # seed of text that no calibration saw
PEAKED = 0.5
NAMES = {"bfloat16": Dtype.BFLOAT16, "float16": Dtype.FLOAT16, "float32": Dtype.FLOAT32}


@dataclass(frozen=True)
class Plan:
    """What `run` was asked for, as each process is told it. place: of the models, one folder a dtype."""

    place: Path
    settings: str
    sequences: int
    honest: int
    requests: int
    prompt: int
    output: int
    trials: int
    only: str


@dataclass(frozen=True)
class Court:
    """One model in one dtype, calibrated, and who judges its jobs. screen: the measured margin of what tokens alone
    tell, in token margins.
    """

    dtype: str
    weights: Weights
    profile: Profile
    screen: float
    trials: int

    @classmethod
    def open(cls, plan: Plan, dtype: str) -> Court:
        weights = Weights.open(plan.place / dtype)
        profile = Profile.load(weights.folder, weights.shape)
        screen = screen_margins(weights.folder, profile)
        if screen is None:
            raise ValueError(f"{weights.folder}: expected the calibration of its profile")
        return cls(dtype, weights, profile, screen, plan.trials)

    @cached_property
    def auditor(self) -> Auditor:
        return Auditor(self.weights, self.profile)

    @cached_property
    def screener(self) -> Auditor:
        """In the precision that a watchtower screens in."""
        wide = self.weights.shape.served_dtype == Dtype.FLOAT32
        return Auditor(self.weights, self.profile, torch.float64 if wide else torch.float32)

    @cached_property
    def model(self) -> Model:
        return identify(self.weights, self.profile)


def run(
    model: str = "",
    dtypes: str = "bfloat16,float16,float32",
    requests: int = 6,
    prompt: int = 64,
    output: int = 32,
    trials: int = 1000,
    settings: str = "full",
    sequences: int = 0,
    honest: int = 2,
    toploc: bool = True,
    only: str = "",
    processes: int = 2,
) -> dict[str, Any]:
    chosen = dtypes.split(",")
    unknown = set(chosen) - set(NAMES)
    if unknown:
        raise BenchError(f"expected dtypes of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if settings not in SETTINGS:
        raise BenchError(f"expected settings of {', '.join(SETTINGS)}, got {settings}")
    source = _source(model)
    python = install() if toploc and "bfloat16" in chosen else None
    plan = Plan(PLACE, settings, sequences, honest, requests, prompt, output, trials, only)
    models: dict[str, Any] = {}
    parts = []
    with _processes(processes) as pool:
        measuring = {dtype: pool.submit(measure, plan, source, dtype) for dtype in chosen}
        for dtype, measured in measuring.items():
            models[dtype] = measured.result()
            parts.append(pool.submit(honest_rows, plan, dtype))
            parts.append(pool.submit(attack_rows, plan, dtype, python if dtype == "bfloat16" else None))
        rows = [row for part in parts for row in part.result()]
    errors = [row for row in rows if "weight_error" in row]
    always, never = ([row["weight_error"] for row in errors if row["rate_8"] == rate] for rate in (1, 0))
    return {
        "intervals": "95 %, Wilson score",
        "smallest_weight_error_always_seen": min(always, default=None),
        "largest_weight_error_never_seen": max(never, default=None),
        "models": models,
        "honest_cells": sum(row["cells"] for row in rows if row["kind"] == "honest"),
        "false_alarms": sum(row["false_alarms"] for row in rows if row["kind"] == "honest"),
        "results": rows,
    }


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """Each starts afresh, with one thread unless a setting asks for more, and with threads that sleep while they wait.

    What is measured does not depend on `count`.
    """
    kept = dict(os.environ)
    os.environ.update(PATIENT, OMP_NUM_THREADS="1")
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        os.environ.clear()
        os.environ.update(kept)


def measure(plan: Plan, source: Path, dtype: str) -> dict[str, Any]:
    """Makes the model of one dtype, calibrates it and tells how."""
    folder = variant(source, NAMES[dtype], plan.place / dtype)
    start = _cpu_seconds()
    measured = calibrate(folder, sequences=plan.sequences, settings=plan.settings)
    seconds = _cpu_seconds() - start
    measured.save(folder)
    shape = measured.profile.shape
    dimensions = {"hidden": shape.hidden, "kv_width": shape.kv_width, "layers": shape.layers, "heads": shape.heads}
    return dimensions | {"calibration": measured.told(), "calibration_cpu_seconds": seconds}


def _cpu_seconds() -> float:
    """Of this process and of its children that came to an end."""
    return sum(os.times()[:4])


def variant(source: Path, dtype: Dtype, folder: Path) -> Path:
    """The model in another dtype. What is finer than the source's gets fractions that the source could not hold."""
    weights, generator = Weights.open(source), np.random.default_rng(5)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {}
    for place in weights.layout.tensors:
        values = weights.float64(place.name).numpy()
        if dtype != weights.shape.weight_dtype:
            values = values * (1 + generator.uniform(-(2.0**-9), 2.0**-9, values.shape))
        bits = rounded(torch.from_numpy(values), dtype)
        tensors[place.name] = bits[0] if place.name.endswith("norm.weight") else bits
    write(folder / "model.safetensors", dtype, tensors, {})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype.name.lower()}), encoding="utf-8")
    return folder


def honest_rows(plan: Plan, dtype: str) -> list[dict[str, Any]]:
    """Every honest setting on fresh text; each position's token is chosen, greedily and drawn in turn, and judged."""
    court = Court.open(plan, dtype)
    shape, auditor = court.weights.shape, court.auditor
    here, _ = available(SETTINGS[plan.settings])
    stage = Worker(court.weights.folder, 0, shape.layers, weights=court.weights)
    texts = sample(stage, lengths(plan.honest, 96, shape.max_positions - 1), FRESH)
    out = []
    for run in serve_all(court.weights.folder, court.weights, texts, here):
        results = []
        for r, (text, arrays, logits) in enumerate(zip(texts, run.traces, run.logits, strict=True)):
            drawn: dict[str, Any] = {} if r % 2 else DRAWN
            asked = Request((text[0],), len(text), **drawn)
            draws = [Draw(asked, r, position) for position in range(len(text))]
            tokens = tuple(choose_all(logits.double().numpy(), draws))
            results.append(Result(r, asked, tokens, arrays, tuple(text)))
        judged = judge_all(auditor, results)
        out.append(row("honest", run.setting.name, dtype, judged, plan.trials) | _alarms(court, judged))
    return out


def attack_rows(plan: Plan, dtype: str, python: Path | None) -> list[dict[str, Any]]:
    """Every attack on the same prompts. python: of TOPLOC's environment, if it is to look at the same tensors."""
    court, requests, prompt, output = Court.open(plan, dtype), plan.requests, plan.prompt, plan.output
    weights, auditor = court.weights, court.auditor
    random = np.random.default_rng(FRESH)
    shape = weights.shape
    stage = Worker(weights.folder, 0, shape.layers, weights=weights)
    # Half of the prompts are the model's own text, half are random.
    own = np.array([text[-prompt:] for text in sample(stage, [2 * prompt] * (requests // 2), FRESH)]).reshape(
        -1, prompt
    )
    prompts = np.concatenate([own, random.integers(0, shape.vocabulary, (requests - len(own), prompt))])
    greedy, drawn = requests_like(prompts, output), requests_like(prompts, output, **DRAWN)
    earlier = Server(weights).run(requests_like(random.integers(0, shape.vocabulary, prompts.shape), output))
    others = tuned(weights)
    rows, compared = [], {}
    screened = _Screen(court)
    honest = [Attack("nobody cheats, greedy", Cheat), Attack("nobody cheats, drawn", Cheat, drawn=True)]
    for attack in [*honest, *(one for one in attacks(weights, others, earlier) if plan.only in one.name)]:
        results = Server(weights, attack.cheat()).run(drawn if attack.drawn else greedy)
        judged = judge_all(auditor, results)
        kind = "honest" if attack in honest else "attack"
        found = row(kind, attack.name, dtype, judged, plan.trials) | screened.rates(results)
        found["sketch"] = sketched(court.screener, results, attack.name.encode())
        if kind == "honest":
            found |= _alarms(court, judged)
        else:
            found["canonical"] = _weakest_holds(court, judged)
            found |= {"weight_error": _error(weights, attack)} if "weights" in attack.name else {}
        rows.append(found)
        if attack.by_peak:
            rows += by_peak(court, attack, results, judged)
        if python is not None:
            compared[attack.name] = (*_last_hidden(weights, results), prompt)
    if python is not None:
        for name, refused in flagged(python, compared).items():
            hits = sum(refused)
            told = {"toploc_rate": hits / len(refused), "toploc_ci95": wilson(hits, len(refused))}
            next(found for found in rows if found["name"] == name).update(told)
    return rows


def _alarms(court: Court, judged: Sequence[Judged]) -> dict[str, Any]:
    """Of honest serving: cells that the audit calls wrong, what the law confirms of it, and the farthest piece."""
    return {
        "false_alarms": sum(int(j.own.sum()) for j in judged),
        "false_convictions": sum(len(confirmed(court.auditor, court.model, j)) for j in judged),
        "suspicions": sum(len(j.suspicions) for j in judged),
        "largest_ratio": max(float(j.ratio.max()) for j in judged),
    }


def by_peak(court: Court, attack: Attack, results: Sequence[Result], judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """A KV cache's rows by how peaked the attention of a cell is, and by its position."""
    peak = [peaks(court.auditor, result) for result in results]
    early = [np.broadcast_to(np.arange(p.shape[1]) < p.shape[1] // 4, p.shape) for p in peak]
    parts = {
        f"largest probability {PEAKED} or more": [p >= PEAKED for p in peak],
        "largest probability 0.25 to 0.5": [(p >= 0.25) & (p < PEAKED) for p in peak],
        "largest probability below 0.25": [p < 0.25 for p in peak],
        "first quarter of the positions": early,
        "last three quarters of the positions": [~e for e in early],
    }
    return [row("attack", f"{attack.name}, {n}", court.dtype, judged, court.trials, a) for n, a in parts.items()]


class _Screen:
    """What the tokens alone tell, as a watchtower's `tokens` looks at them, and within the margin that was measured."""

    def __init__(self, court: Court) -> None:
        self.court = court
        self.executed: dict[tuple[int, ...], Stage] = {}  # mild attacks serve the model's own tokens

    def rates(self, results: Sequence[Result]) -> dict[str, Any]:
        worst = [max(v.ratio for v in self._chosen(result)) for result in results]
        hits, close = (sum(ratio > limit for ratio in worst) for limit in (SCREEN_MARGINS, self.court.screen))
        rates = {"rate_tokens": hits / len(worst), "rate_tokens_measured": close / len(worst)}
        return rates | {"ci95_tokens": wilson(hits, len(worst)), "ci95_tokens_measured": wilson(close, len(worst))}

    def _chosen(self, result: Result) -> list[Verdict]:
        fed = tuple(result.fed)
        if fed not in self.executed:
            self.executed[fed] = Stage(0, cast(ServedTensors, Execution(self.court.weights, fed)))
        return self.court.auditor.chosen(self.executed[fed], result.index, result.request, result.tokens)


def _weakest_holds(court: Court, judged: Sequence[Judged]) -> bool | None:
    """Whether the canonical arithmetic convicts what the float64 audit found wrong by least; None: it found nothing."""
    found = [(verdict, j) for j in judged for verdict in j.suspicions if 1 < verdict.ratio]
    if not found:
        return None
    verdict, there = min(found, key=lambda pair: pair[0].ratio)
    return court.auditor.confirm(court.model, verdict, [there.stage])


def _error(weights: Weights, attack: Attack) -> float:
    """Root mean square of the weights' error, relative, over the matrices that are not the model's."""
    honest, cheating = Server(weights).tensors, Server(weights, attack.cheat()).tensors
    wrong = [name for name, tensor in honest.items() if not torch.equal(tensor, cheating[name])]
    off = sum(float((honest[name].double() - cheating[name].double()).square().sum()) for name in wrong)
    size = sum(float(honest[name].double().square().sum()) for name in wrong)
    return float((off / size) ** 0.5) if wrong else 0.0


def _last_hidden(weights: Weights, results: Sequence[Result]) -> tuple[torch.Tensor, torch.Tensor]:
    """[requests, positions, hidden] as served, and as TOPLOC's verifier computes it."""
    server = Server(weights)
    with torch.inference_mode():
        own, _ = server.forward(torch.tensor([result.fed for result in results]), 0)
    served = torch.stack([from_bits(np.array(result.arrays["out"]), own.dtype) for result in results])
    return served, own.clone()


def _source(model: str) -> Path:
    folder = Path(model) if model else ROOT / ".plumb" / "models" / "demo"
    if not model and not (folder / "config.json").exists():
        from deploy.model import make_demo

        make_demo(folder)
    if not (folder / "config.json").exists():
        raise BenchError(f"expected a model's folder, got {folder}")
    return folder
