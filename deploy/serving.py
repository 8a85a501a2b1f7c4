"""Honest ways to serve one model: everything that changes the bits of floating point without making them wrong.

A setting is served by the worker's own stage. What is decided when a process starts - the instruction sets of torch,
oneDNN and MKL, and how threads wait - is served by a child: `python -m deploy.serving FOLDER`, files in and files out,
its exit code read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from verifier.referee.floats import Dtype
from verifier.safetensors_file import SafetensorsFile, write
from verifier.trace import tensor_keys
from verifier.weights import Weights
from worker.batch import Batch, Piece
from worker.stage import Stage, from_bits, to_bits

Bits = npt.NDArray[Any]
Tensors = dict[str, Bits]

CHUNK = 7  # of chunked prefill: never a divisor of a kernel's tile
JOB = "job.json"
ROOT = Path(__file__).resolve().parent.parent


class ServingFailed(RuntimeError):
    """A child process that served a setting came to a bad end. Names the settings, its exit code and its last words."""


@dataclass(frozen=True)
class Setting:
    """One honest way to serve.

    rows: positions of one sequence in one forward (0: all); plain: attention without fusion; together: sequences in one
    forward (0: all); onednn: whether oneDNN's kernels are used; isa: a key of INSTRUCTIONS, "" to serve right here;
    products: as a worker computes them (worker.products); paged: single rows attend over pages (paged_attention).
    """

    name: str
    rows: int = 0
    plain: bool = False
    threads: int = 1
    together: int = 0
    onednn: bool = True
    isa: str = ""
    device: str = "cpu"
    products: str = "mapped"
    paged: bool = True


_SSE4 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16"
_AVX2 = f"{_SSE4},+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"

# What the processor may do, as its libraries read it from the environment when a process starts.
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    "sse4": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NUMBA_CPU_NAME": "nehalem",
        "NUMBA_CPU_FEATURES": _SSE4,
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": _AVX2,
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
    },
}
NEEDED: Mapping[str, Sequence[str]] = {  # torch.cpu.get_capabilities(); without them the libraries die of SIGILL
    "sse4": ("sse4_1", "sse4_2"),
    "avx2": ("avx2", "fma3"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
}

QUICK = (
    Setting("whole prefill"),
    Setting("whole prefill, plain attention, 2 threads", plain=True, threads=2),
    Setting("chunked prefill, 2 threads", rows=CHUNK, threads=2),
    Setting("one-token decode", rows=1),
    Setting("one-token decode, plain attention", rows=1, plain=True),
    Setting("whole prefill, widened weights", products="widened"),
    Setting("one-token decode, widened weights", rows=1, products="widened"),
)
FULL = (
    *QUICK,
    Setting("whole prefill, plain attention", plain=True),
    Setting("whole prefill, each sequence alone", together=1),
    Setting("chunked prefill, three sequences together", rows=CHUNK, together=3),
    Setting("chunked prefill, plain attention", rows=CHUNK, plain=True),
    Setting("whole prefill without oneDNN", onednn=False),
    Setting("chunked prefill without oneDNN, plain attention", rows=CHUNK, onednn=False, plain=True),
    Setting("one-token decode, SDPA", rows=1, paged=False),
    Setting("one-token decode without oneDNN", rows=1, onednn=False),
    Setting("one-token decode, each sequence alone, 2 threads", rows=1, together=1, threads=2, isa="all"),
    *(
        Setting(f"{name}, {isa} instructions", rows=rows, isa=isa, paged=paged)
        for isa in INSTRUCTIONS
        if isa != "all"
        for name, rows, paged in (("whole prefill", 0, True), ("one-token decode", 1, True), ("decode, SDPA", 1, False))
    ),
    Setting("whole prefill, CUDA", device="cuda"),
    Setting("chunked prefill, plain attention, CUDA", rows=CHUNK, plain=True, device="cuda"),
    Setting("one-token decode, CUDA", rows=1, device="cuda"),
)
PATIENT = {"OMP_WAIT_POLICY": "passive"}
# Threads that sleep while they wait: two that spin, on cores that others use, take ten times as long over single rows.
SETTINGS: Mapping[str, Sequence[Setting]] = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True)
class Run:
    """What one setting served: each sequence's trace (raw bits [T, width] by key) and logits [T, vocabulary]."""

    setting: Setting
    traces: list[Tensors]
    logits: list[torch.Tensor]


def available(settings: Sequence[Setting]) -> tuple[list[Setting], list[Setting]]:
    """Those that this machine can run, and those that it can't."""
    able, has = torch.cuda.is_available(), torch.cpu.get_capabilities()
    here = [
        setting
        for setting in settings
        if (setting.device == "cpu" or able) and all(has.get(each) for each in NEEDED.get(setting.isa, ()))
    ]
    return here, [setting for setting in settings if setting not in here]


def serve_all(
    folder: Path,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    settings: Sequence[Setting],
    stage_class: type[Stage] = Stage,
) -> Iterator[Run]:
    """Every setting in turn. Raises ServingFailed where a child process does."""
    stages: dict[tuple[str, str], Stage] = {}
    for isa, group in groupby(settings, key=lambda setting: setting.isa):
        if isa:
            yield from _in_child(folder, sequences, list(group))
            continue
        for setting in group:
            kind = (setting.device, setting.products)
            if kind not in stages:
                device, products = kind
                layers = weights.shape.layers
                stages[kind] = stage_class(folder, 0, layers, weights=weights, device=device, products=products)
            yield serve(stages[kind], sequences, setting)


def serve(stage: Stage, sequences: Sequence[Sequence[int]], setting: Setting) -> Run:
    """Serves the sequences as the setting says; they may differ in length."""
    keys = tensor_keys(stage.shape, 0, stage.shape.layers)
    captured: list[dict[str, list[Bits]]] = [{key: [] for key in keys} for _ in sequences]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    together = setting.together or len(sequences)
    with _running(setting, stage):
        for start in range(0, len(sequences), together):
            cache = stage.cache()
            group = range(start, min(start + together, len(sequences)))
            longest = max(len(sequences[request]) for request in group)
            rows = setting.rows or longest
            for first in range(0, longest, rows):
                pieces = [
                    Piece(r, first, min(rows, len(sequences[r]) - first)) for r in group if first < len(sequences[r])
                ]
                batch = Batch(tuple(pieces))
                fed = [token for piece in pieces for token in sequences[piece.request][first : piece.end]]
                hidden, tensors = stage.forward(stage.embed(np.array(fed, dtype=np.int64)), batch, cache)
                scores = stage.logits(hidden).cpu()
                for piece, span in batch.spans():
                    logits[piece.request].append(scores[span])
                    for key in keys:
                        captured[piece.request][key].append(to_bits(tensors[key][span]))
    traces = [{key: np.concatenate(parts) for key, parts in arrays.items()} for arrays in captured]
    return Run(setting, traces, [torch.cat(parts) for parts in logits])


@contextmanager
def _running(setting: Setting, stage: Stage) -> Iterator[None]:
    threads, onednn, paged = torch.get_num_threads(), bool(torch.backends.mkldnn.enabled), stage.paged
    torch.set_num_threads(setting.threads)
    stage.paged = paged and setting.paged and not setting.plain
    # Rationale: not by `mkldnn.flags`, which also sets what it was not asked for (TF32, which CPUs don't have).
    torch.backends.mkldnn.enabled = setting.onednn  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH) if setting.plain else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = onednn  # type: ignore[assignment]
        stage.paged = paged


# ---- children


def _in_child(folder: Path, sequences: Sequence[Sequence[int]], settings: Sequence[Setting]) -> Iterator[Run]:
    """Settings of one instruction set."""
    with tempfile.TemporaryDirectory(prefix="plumb-serving-") as name:
        place = Path(name)
        told = {
            "folder": str(folder.resolve()),
            "sequences": [[int(token) for token in tokens] for tokens in sequences],
            "settings": [asdict(setting) for setting in settings],
        }
        (place / JOB).write_text(json.dumps(told), encoding="utf-8")
        command = [sys.executable, "-m", "deploy.serving", name]
        environment = os.environ | PATIENT | dict(INSTRUCTIONS[settings[0].isa])
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = done.stderr.strip().splitlines()[-1:] or ["(silent)"]
            raise ServingFailed(f"{settings[0].name}: expected exit code 0, got {done.returncode}: {words[0]}")
        for n, setting in enumerate(settings):
            run = Run(setting, [], [])
            for request in range(len(sequences)):
                served = SafetensorsFile(place / f"{n}.{request}.served")
                run.traces.append({key: np.array(served.floats(key)[1]) for key in served.entries})
                scores = SafetensorsFile(place / f"{n}.{request}.logits").floats("logits")[1]
                run.logits.append(from_bits(np.array(scores), torch.float32))
            yield run


def _child(place: Path) -> None:
    told = json.loads((place / JOB).read_text(encoding="utf-8"))
    folder = Path(told["folder"])
    weights = Weights.open(folder)
    stage = Stage(folder, 0, weights.shape.layers, weights=weights)
    for n, setting in enumerate(told["settings"]):
        run = serve(stage, told["sequences"], Setting(**setting))
        for request, (arrays, scores) in enumerate(zip(run.traces, run.logits, strict=True)):
            write(place / f"{n}.{request}.served", weights.shape.served_dtype, arrays, {})
            write(place / f"{n}.{request}.logits", Dtype.FLOAT32, {"logits": to_bits(scores)}, {})


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
