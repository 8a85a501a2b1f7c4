"""What an audit costs beside the generation that it checks, and one cell of a layer of a 70B model on a small machine.

CPU seconds are those of the process that serves, all stages and their records included, and of the process that audits,
download and checks of every byte included. The workers' HTTP side runs in a third process.
"""

import asyncio
import json
import multiprocessing
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench import _tiny as tiny
from bench._attacks import integers
from bench._layer import shape_named
from bench._memory import peak_bytes, reset_peak
from bench._pipeline import JOB, split, wire
from bench._traces import WholeLayer, serve
from challenger.evidence import Archive, Evidence, Facts
from challenger.fetch import Ask, Fetcher
from challenger.judge import Findings, Judge
from challenger.look import Look
from challenger.strategy import parse_strategy
from contracts.records import Job, Stage
from deploy.calibrate import calibrate
from deploy.devnet import free_port
from verifier.audit import Auditor, Span
from verifier.audit import Stage as Served
from verifier.commit import OutputsTree, Request, StageTree, make_outputs, requests_root, total_tokens
from verifier.program import Kind
from verifier.reference import Reference
from verifier.safetensors_file import write
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace, tensor_keys, tensor_width
from verifier.weights import Weights
from worker.config import Serving
from worker.job import JobState
from worker.products import fastest
from worker.stage import DTYPES
from worker.stage import Stage as WorkerStage

STAGES = 2
CALIBRATED = 6  # sequences, as long as the prompts (the last four times as long), and as many short ones
AUTO_SECONDS = 10.0
LOOSE = (1, 10, 1 << 20, 1 << 28)  # num, den, floor, margin of the large layer, which nobody serves
MODEL: dict[str, Any] = {  # 100.7 million parameters
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
    "model_type": "llama",
}
_TERMS = ("gas_rate", "window", "clock", "grace", "accept_by", "commit_by", "prompt_price", "token_price", "lock")


def run(
    requests: int = 64,
    prompt: int = 128,
    output: int = 128,
    layers: int = 12,
    strategies: Sequence[str] = ("cells:16", "tokens", "sweep:16", "full", "auto"),
    liars: int = 8,
    large: bool = True,
    position: int = 4095,
) -> dict[str, Any]:
    """liars: requests that a worker with 4-bit weights serves, audited by `tokens`; 0: none. large: also one cell of a
    Llama-3-70B layer, at `position`. Returns {"results": rows}.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="plumb-audit-") as home:
        if requests:
            rows += _job(Path(home), requests, prompt, output, layers, strategies, liars)
        if large:
            rows.append(_apart(_cell, home, position))
            print(f"  {rows[-1]}", flush=True)
    return {"results": rows}


def _job(
    home: Path, count: int, prompt: int, output: int, layers: int, strategies: Sequence[str], liars: int
) -> list[Any]:
    torch.set_num_threads(1)  # of both sides: threads that wait for one another count as work
    weights = tiny.make_weights(home / "model", tiny.config(**{**MODEL, "num_hidden_layers": layers}))
    calibrate(home / "model", sequences=CALIBRATED, length=prompt).save(home / "model")
    judge = Judge(home / "model")
    random = np.random.default_rng(1)
    batch = [Request(tuple(int(t) for t in random.integers(0, 16384, prompt)), output) for _ in range(count)]
    products = fastest(DTYPES[judge.weights.shape.served_dtype])  # as docs/operating.md says to serve
    stages = split(home / "model", layers, STAGES, partial(WorkerStage, products=products))
    started, wall = time.process_time(), time.perf_counter()
    states = _generate(home / "data", stages, batch)
    generation = time.process_time() - started
    parameters = sum(place.rows * place.cols for place in weights.layout.tensors)
    job: dict[str, Any] = {
        "requests": count,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "parameters": parameters,
    }
    row = {
        "kind": "generation",
        **job,
        "products": products,
        "cpu_seconds": generation,
        "seconds": time.perf_counter() - wall,
    }
    print(f"  {row}", flush=True)
    rows: list[dict[str, Any]] = [row]
    with _committed(home / "data", judge, stages, batch, states) as facts:
        for strategy in strategies:
            row = {"strategy": strategy} | _audit(home / strategy, facts, judge, strategy)
            row["share_of_generation"] = row["cpu_seconds"] / generation
            rows.append(row)
            print(f"  {row}", flush=True)
    if liars:
        rows.append(_lie(home, judge, batch[:liars]))
        print(f"  {rows[-1]}", flush=True)
    return rows


def _lie(home: Path, judge: Judge, batch: Sequence[Request]) -> dict[str, Any]:
    """What `tokens` makes of a pipeline whose weights have 4 bits."""
    coarse = _coarse(judge, home / "coarse")
    stages = split(coarse, judge.weights.shape.layers, STAGES)
    states = _generate(home / "lies", stages, batch)
    with _committed(home / "lies", judge, stages, batch, states) as facts:
        audit = _audit(home / "screened", facts, judge, "tokens")
    return {
        "kind": "4-bit weights",
        "strategy": "tokens",
        "requests": len(batch),
        "looked_at_closer": audit["looked_at_closer"],
        "cpu_seconds": audit["cpu_seconds"],
        "convicted": audit["wrong"] > 0,
    }


def _coarse(judge: Judge, folder: Path) -> Path:
    """The model with the matrices of its layers in 4 bits, in groups of 64."""
    weights, rounded = judge.weights, integers(4)
    dtype, tensors = weights.shape.weight_dtype, {}
    for place in weights.layout.tensors:
        values = weights.float64(place.name).float()
        if "_proj" in place.name:
            values = rounded(values.reshape(-1, 64)).reshape(values.shape)
        bits = tiny.to_bits(values, dtype)
        tensors[place.name] = bits[0] if place.name.endswith("norm.weight") else bits
    folder.mkdir()
    write(folder / "model.safetensors", dtype, tensors, {})
    shutil.copy(judge.folder / "config.json", folder)
    return folder


@contextmanager
def _committed(
    home: Path, judge: Judge, stages: Sequence[WorkerStage], batch: Sequence[Request], states: Sequence[JobState]
) -> Iterator[Facts]:
    """The job as the chain would know it, its workers' HTTP side running."""
    outputs = make_outputs(states[-1].tokens, batch)
    trees = [StageTree(state.nodes) for state in states]
    port = free_port()
    told = json.dumps({"outputs": [asdict(each) for each in outputs]})
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(str(home), JOB.hex(), STAGES, str(judge.folder), told, port), daemon=True
    )
    server.start()
    while socket.socket().connect_ex(("127.0.0.1", port)) != 0 and server.exitcode is None:
        time.sleep(0.2)
    job = Job(
        model=judge.id,
        pipeline=bytes(32),
        requests_root=requests_root(batch),
        requests=len(batch),
        prompt_tokens=sum(len(request.prompt) for request in batch),
        max_tokens=sum(request.limit for request in batch),
        nonce=1,
        **dict.fromkeys(_TERMS, 1),
    )
    try:
        yield Facts(
            JOB,
            job,
            tuple(Stage("", stage.first_layer, stage.end_layer, 5000) for stage in stages),
            tuple(f"http://127.0.0.1:{port}/s{index}" for index in range(STAGES)),
            OutputsTree(outputs).root,
            total_tokens(outputs),
            tuple(tree.root for tree in trees),
        )
    finally:
        server.kill()
        server.join()


def _generate(home: Path, stages: Sequence[WorkerStage], batch: Sequence[Request]) -> list[JobState]:
    """Serves the batch as a pipeline of workers does, in this process; the final states of all stages."""

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            serving = Serving(cache_positions=1 << 20, stall_seconds=600.0)
            runs = wire(home, stages, batch, serving, compute)
            for each in runs:
                each.start()
            return list(await asyncio.gather(*(each.finished for each in runs)))

    return asyncio.run(work())


def _audit(home: Path, facts: Facts, judge: Judge, strategy: str) -> dict[str, Any]:
    fetcher, wall, started, audited = Fetcher(Archive(home), 1 << 40), time.perf_counter(), time.process_time(), 0.0
    ask = Ask(parse_strategy(strategy), AUTO_SECONDS, b"bench")

    def audit(evidence: Evidence) -> Findings:
        nonlocal audited
        begun = time.process_time()
        findings = judge.audit(evidence)
        audited += time.process_time() - begun
        return findings

    evidence, findings = Look().go_on(
        lambda closer, seconds: fetcher.fetch(facts, judge.weights.shape, seconds, replace(ask, closer=closer)),
        audit,
        3600.0,
        final=False,
    )
    if findings is None:
        raise RuntimeError(f"expected a server that answers: {evidence.missing}")
    spent = time.process_time() - started
    size = sum(path.stat().st_size for path in (home / facts.id.hex()).iterdir())
    return {
        "kind": "audit",
        "plan": findings.strategy,
        "cpu_seconds": spent,
        "cpu_seconds_download": spent - audited,
        "cpu_seconds_audit": audited,
        "seconds": time.perf_counter() - wall,
        "bytes": size,
        "pieces": findings.pieces,
        "suspicious": findings.suspicious,
        "wrong": len(findings.wrong),
        "looked_at_closer": findings.looked_closer,
        "worst": findings.worst,
    }


def _cell(home: str, position: int) -> dict[str, Any]:
    """Weights from disk, served rows that an honest float64 run would give."""
    torch.set_num_threads(2)
    shape, layer = shape_named("llama-3-70b"), 0
    weights = cast(Weights, WholeLayer(shape, layer, Path(home)))
    profile = uniform_profile(shape, *LOOSE)
    random, keys = np.random.default_rng(3), tensor_keys(shape, 0, 1)
    arrays = {key: np.zeros((position + 1, tensor_width(shape, key)), dtype="<u2") for key in keys}
    for name in ("h", "k", "v"):
        wide = random.standard_normal(arrays[f"0.{name}"].shape, dtype=np.float32)
        arrays[f"0.{name}"][:] = tiny.to_bits(torch.from_numpy(wide), shape.served_dtype)
    reference, spot = Reference(weights), slice(position, position + 1)
    h = arrays["0.h"][spot]
    for kind, name in ((Kind.Q, "q"), (Kind.K, "k"), (Kind.V, "v")):
        rows = reference.projected(kind, layer, h, np.array([position]))
        arrays[f"0.{name}"][spot] = tiny.to_bits(rows, shape.served_dtype)
    mixed = reference.mixed(arrays["0.q"][spot], arrays["0.k"], arrays["0.v"], position)
    arrays["0.attn_out"][spot] = tiny.to_bits(reference.combined(layer, mixed), shape.served_dtype)
    made = reference.transformed(layer, h, arrays["0.attn_out"][spot])
    arrays["0.mlp_out"][spot] = tiny.to_bits(made, shape.served_dtype)
    trace = RequestTrace(shape, 0, 1, arrays)
    auditor = Auditor(weights, profile, torch.float32)
    reset_peak()  # what served these rows is over
    started, cpu = time.perf_counter(), time.process_time()
    audits = list(auditor.sweep(layer, [Span(Served(0, trace), 0, position, position + 1)]))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "kind": "cell",
        "shape": "llama-3-70b",
        "position": position,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_memory_bytes": peak_bytes(),
        "weight_bytes": sum(2 * place.rows * place.cols for place in cast(WholeLayer, weights)._places),
        "worst": max(audit.worst().ratio for audit in audits),
    }


def _apart(work: Any, *arguments: Any) -> dict[str, Any]:
    """In a process of its own, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(answers, work, *arguments))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"expected a measurement, the process ended with status {process.exitcode}")
    return cast(dict[str, Any], answers.get())


def _answer(answers: Any, work: Any, *arguments: Any) -> None:
    answers.put(work(*arguments))
