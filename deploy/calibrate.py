"""Calibration: serve a model honestly in several settings, and set the tolerances just above what honest serving does.

Settings differ in what changes the bits of honest floating point without making it wrong: whole prefill, chunked
prefill, one-token decode; fused and plain attention; one and more threads. What is served comes from the worker's own
stage; what it should have been, from the judge's float64 reference. The two never share arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from verifier.calibration import MARGIN, Calibration
from verifier.program import Kind
from verifier.referee.codec import BLOCK
from verifier.reference import Reference, real
from verifier.tolerance import Profile
from verifier.trace import tensor_keys
from verifier.weights import Weights
from worker.batch import Batch, Piece
from worker.stage import Stage, to_bits

Bits = npt.NDArray[Any]
Tensors = dict[str, Bits]

SEQUENCES = 16
LENGTH = 96  # positions of a sequence, where the model allows so many
CHUNK = 7  # of chunked prefill: never a divisor of a kernel's tile
SEED = 20_260_101


@dataclass(frozen=True)
class Setting:
    """One honest way to serve.

    rows: positions of one sequence in one forward (0: all); plain: attention without fusion.
    """

    name: str
    rows: int
    plain: bool
    threads: int


SETTINGS = (
    Setting("whole prefill", 0, False, 1),
    Setting("whole prefill, plain attention, 2 threads", 0, True, 2),
    Setting("chunked prefill, 2 threads", CHUNK, False, 2),
    Setting("one-token decode", 1, False, 1),
    Setting("one-token decode, plain attention", 1, True, 1),
)


def calibrate(
    folder: Path,
    margin: float = MARGIN,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Profile, Calibration]:
    """The profile of the model in `folder`, and what it was measured on. Deterministic on one machine.

    Raises ModelFolderError and UnsupportedModel for a folder that can't be served, UnseparableModel where honest runs
    differ too much.
    """
    weights = Weights.open(folder)
    weights.check()
    stage = Stage(folder, 0, weights.shape.layers, weights=weights)
    tokens = sample(stage, sequences, min(length, weights.shape.max_positions - 1))
    calibration = Calibration()
    reference = Reference(weights)
    for setting in SETTINGS:
        progress(setting.name)
        _compare(calibration, reference, *serve(stage, tokens, setting))
    return calibration.profile(weights.shape, margin), calibration


def sample(stage: Stage, sequences: int, length: int) -> list[list[int]]:
    """Token sequences to serve: random beginnings of several lengths, continued greedily as a real job would be."""
    generator = np.random.default_rng(SEED)
    out = []
    for index in range(sequences):
        start = max(1, length * (index + 1) // (sequences + 1))
        tokens = [int(token) for token in generator.integers(0, stage.shape.vocabulary, start)]
        cache = stage.cache()
        first = 0
        while len(tokens) < length:
            batch = Batch((Piece(0, first, len(tokens) - first),))
            hidden, _ = stage.forward(stage.embed(np.array(tokens[first:], dtype=np.int64)), batch, cache)
            first = len(tokens)
            tokens.append(stage.tokens(hidden[-1:])[0])
        out.append(tokens[:length])
    return out


def serve(stage: Stage, sequences: Sequence[Sequence[int]], setting: Setting) -> tuple[list[Tensors], torch.Tensor]:
    """Serves all sequences together: each one's trace (raw bits [T, width]), and the logits of all [S * T,
    vocabulary].
    """
    keys = tensor_keys(stage.shape, 0, stage.shape.layers)
    captured: list[dict[str, list[Bits]]] = [{key: [] for key in keys} for _ in sequences]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    cache = stage.cache()
    length = len(sequences[0])
    rows = setting.rows or length
    with _running(setting):
        for first in range(0, length, rows):
            count = min(rows, length - first)
            batch = Batch(tuple(Piece(request, first, count) for request in range(len(sequences))))
            ids = np.array([token for tokens in sequences for token in tokens[first : first + count]], dtype=np.int64)
            hidden, tensors = stage.forward(stage.embed(ids), batch, cache)
            scores = stage.logits(hidden)
            for piece, span in batch.spans():
                logits[piece.request].append(scores[span])
                for key in keys:
                    captured[piece.request][key].append(to_bits(tensors[key][span]))
    traces = [{key: np.concatenate(parts) for key, parts in arrays.items()} for arrays in captured]
    return traces, torch.cat([row for rows_of in logits for row in rows_of])


@contextmanager
def _running(setting: Setting) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        if setting.plain:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield
    finally:
        torch.set_num_threads(threads)


def _compare(calibration: Calibration, reference: Reference, traces: Sequence[Tensors], logits: torch.Tensor) -> None:
    shape, dtype = reference.shape, reference.shape.served_dtype
    positions = np.concatenate([np.arange(len(trace["out"])) for trace in traces])
    all_rows = {key: np.concatenate([trace[key] for trace in traces]) for key in traces[0]}

    def add(kind: Kind, layer: int, name: str, columns: int, standard: torch.Tensor) -> None:
        served = real(all_rows[f"{layer}.{name}"], dtype).numpy()
        calibration.add_tensor(kind, layer, columns, served, standard.numpy())

    for layer in range(shape.layers):
        h, attn_out = all_rows[f"{layer}.h"], all_rows[f"{layer}.attn_out"]
        for kind, name in ((Kind.Q, "q"), (Kind.K, "k"), (Kind.V, "v")):
            add(kind, layer, name, shape.head_dim, reference.projected(kind, layer, h, positions))
        attended = [reference.attended(layer, *(trace[f"{layer}.{name}"] for name in "qkv")) for trace in traces]
        add(Kind.ATTEND, layer, "attn_out", BLOCK, torch.cat(attended))
        add(Kind.MLP, layer, "mlp_out", BLOCK, reference.transformed(layer, h, attn_out))
    exact = torch.cat([tile for _, tile in reference.logits(all_rows["out"])], dim=1)
    calibration.add_logits(logits.double().numpy(), exact.numpy())
