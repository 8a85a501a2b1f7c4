"""KV swap: a stage with several times the sequences that its main pool holds, against that pool alone.

One stage of a random Llama, committed as ever; all sequences grow in step, greedy, as many in a microbatch as the main
pool holds. `main`: no others. `swapped`: `times` as many, who come over a bus of so many bytes a second, emulated: each
copy takes at least what the bus would; null: what this machine's memory takes. Tokens are counted while all decode.
`device_bytes` are of the pools that attention reads (grown for runs as they are laid out), `host_bytes` of the rest.
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
from worker.batch import Piece
from worker.cache import Cache
from worker.config import Serving
from worker.homes import needed
from worker.sampler import Draw
from worker.stage import Stage
from worker.swap import SwappingCache, Visit

VOCABULARY = 1024


class BusCache(SwappingCache):
    """Its copies take what the bus would."""

    bytes_per_second: float | None = None

    def _copy(self, visit: Visit, spans: Sequence[tuple[Piece, int, int]], inward: bool) -> None:
        began, before = time.perf_counter(), self.moved_bytes
        super()._copy(visit, spans, inward)
        if self.bytes_per_second is not None:
            due = began + (self.moved_bytes - before) / self.bytes_per_second
            time.sleep(max(0.0, due - time.perf_counter()))


class WatchedStage(Stage):
    """Knows the caches of its job, and when how many tokens were chosen."""

    bus: float | None = None
    made: list[Cache]
    chosen: list[tuple[float, int]]

    def cache(self, buffer: int = 0, reserves: Sequence[int] = (), foreseen: int = 0) -> Cache:
        cache = super().cache(0, reserves, foreseen)
        if buffer:
            layers = range(self.first_layer, self.end_layer)
            form = (self.kv_heads, self.head_size, self.dtype, self.device)
            cache = BusCache(*form, layers, buffer, reserves, foreseen)
            cache.bytes_per_second = self.bus
        self.made.append(cache)
        return cache

    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        ids = super().tokens(hidden, draws)
        self.chosen.append((time.perf_counter(), len(ids)))
        return ids


def run(
    hidden: int = 1024,
    layers: int = 4,
    rows: int = 16,
    prompt: int = 96,
    tokens: int = 32,
    times: list[int] | None = None,
    bandwidths: list[float | None] | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """rows: sequences of the main pool, and of a microbatch; times: the first of them at each of the bandwidths (bytes
    a second), the others at the first bandwidth; rounds: of which the median counts.

    Returns {"results": [{name, bandwidth, sequences, tokens_per_second, ratio, device_bytes, host_bytes, ...}]}.
    """
    torch.set_num_threads(1)
    leaf_hashes(bytes(2**14), 512)  # loads the hasher
    many, buses = times or [5, 9], bandwidths or [None, 4e9, 2e9, 1e9, 0.5e9]
    cases = [("main", 1, None), *(("swapped", many[0], bus) for bus in buses)]
    cases += [("swapped", more, buses[0]) for more in many[1:]]
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), torch.float32, hidden=hidden, layers=layers, vocabulary=VOCABULARY)
        stage = WatchedStage(Path(folder), 0, layers)
        for _ in range(rounds):
            for case, (_, more, bus) in enumerate(cases):
                found[case].append(_measure(stage, rows, more * rows, prompt, tokens, bus))
    results = []
    for (name, _, bus), rows_found in zip(cases, found, strict=True):
        rows_found.sort(key=lambda row: row["tokens_per_second"])
        results.append({"name": name, "bandwidth": bus, **rows_found[len(rows_found) // 2]})
    for row in results:
        row["ratio"] = round(row["tokens_per_second"] / results[0]["tokens_per_second"], 4)
    return {"hidden_size": hidden, "layers": layers, "prompt": prompt, "tokens": tokens, "results": results}


def _measure(
    stage: WatchedStage, rows: int, sequences: int, prompt: int, tokens: int, bus: float | None
) -> dict[str, Any]:
    grown = prompt + tokens
    serving = Serving(max_rows=rows * prompt, cache_positions=rows * grown, stall_seconds=600)
    if sequences > rows:
        buffer = needed([Piece(r, grown - 1, 1) for r in range(rows)])
        host = max(buffer, (sequences - rows) * grown)
        serving = replace(serving, swap_positions=buffer, host_positions=host)
    requests = [Request(tuple((31 * r + 7 * t) % VOCABULARY for t in range(prompt)), tokens) for r in range(sequences)]
    stage.bus, stage.made, stage.chosen = bus, [], []
    serve(stage, requests, serving)
    total, inside = 0, []
    for when, count in stage.chosen:
        total += count
        if 2 * sequences <= total <= (tokens - 1) * sequences:  # all decode
            inside.append((when, count))
    seconds = inside[-1][0] - inside[0][0]
    swapping = [cache for cache in stage.made if isinstance(cache, SwappingCache)]
    return {
        "sequences": sequences,
        "rows": round(median(count for _, count in inside)),
        "tokens_per_second": round(sum(count for _, count in inside[1:]) / seconds, 2),
        "main_positions": serving.cache_positions,
        "swap_positions": serving.swap_positions,
        "host_positions": serving.host_positions,
        "device_bytes": max(cache.device_bytes for cache in stage.made),
        "host_bytes": max((cache.peak_host_bytes for cache in swapping), default=0),
        "moved_bytes_per_token": sum(cache.moved_bytes for cache in swapping) // (sequences * tokens),
    }
