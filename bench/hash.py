"""Hashing: leaves of served tensors and the identity of a model, in MB per CPU-second.

Nodes and, for the model, the check for NaN, Inf and |w| >= 2^8 are included. Random bits; the best of several rounds.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from verifier.program import WeightLayout, shape_from_config
from verifier.referee.codec import BLOCK
from verifier.referee.floats import Dtype
from verifier.safetensors_file import write
from verifier.sha256 import HashTree, leaf_hashes
from verifier.trace import TensorHasher, tile_leaf_hashes
from verifier.weights import SINGLE_FILE, Weights

ROUNDS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def run(megabytes: int = 64) -> dict[str, Any]:
    """megabytes: of each buffer. Returns {"results": [{name, megabytes, megabytes_per_cpu_second}]}."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 0x4000, (megabytes * 10**6 // 4096, 2048), dtype=np.uint16)
    leaf_hashes(rows[:1], 512)  # compiles

    def appended(step: int) -> None:
        hasher = TensorHasher(rows.shape[1], 2)
        for at in range(0, len(rows), step):
            hasher.append(rows[at : at + step])
        hasher.finish()

    results = [
        _row("leaves of 512 bytes", rows.nbytes, lambda: leaf_hashes(rows, 512)),
        _row("leaves of 1024 bytes", rows.nbytes, lambda: leaf_hashes(rows, 1024)),
        _row("tree over leaves of 512 bytes", rows.nbytes, lambda: HashTree(leaf_hashes(rows, 512))),
        _row("tree over tiles of v", rows.nbytes, lambda: HashTree(tile_leaf_hashes(rows))),
        _row("TensorHasher, 512 rows at a time", rows.nbytes, lambda: appended(512)),
        _row("TensorHasher, a row at a time", rows.nbytes, lambda: appended(1)),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        layout = WeightLayout(shape_from_config(CONFIG))
        tensors = {}
        for place in layout.tensors:
            shape = (place.cols,) if "norm" in place.name else (place.rows, place.cols)
            tensors[place.name] = random.integers(0, 0x4000, shape, dtype=np.uint16)
        write(folder / SINGLE_FILE, Dtype.BFLOAT16, tensors, {})
        size = sum(bits.nbytes for bits in tensors.values())

        def identity() -> None:
            for cached in folder.glob(".plumb/*"):
                cached.unlink()
            _ = Weights.open(folder).root

        results.append(_row("identity of a model", size, identity))
    return {"leaf_elements": BLOCK, "results": results}


def _row(name: str, size_bytes: int, work: Callable[[], object]) -> dict[str, Any]:
    """One measurement: CPU seconds of all threads, the best of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    rate = round(size_bytes / 1e6 / min(seconds), 1)
    return {"name": name, "megabytes": round(size_bytes / 1e6, 1), "megabytes_per_cpu_second": rate}
