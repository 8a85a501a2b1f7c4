"""A small random model, calibrated as a real one would be, and what a worker's stage serves of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.calibrate import calibrate
from tests.verifier import tiny
from verifier.audit import Stage as Served
from verifier.referee.floats import Dtype
from verifier.tolerance import Profile
from verifier.trace import RequestTrace, tensor_keys
from verifier.weights import Weights
from worker.batch import Batch, Piece
from worker.stage import Stage, to_bits

torch.set_num_threads(1)

SEED = 20_260_101


def config(dtype: Dtype, **changes: Any) -> dict[str, Any]:
    """Hidden width 256, two key heads of 64. The weights' deviation is 1/16, one over the root of the hidden width."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    return tiny.config(dtype, **{**wide, "model_type": "llama", "num_hidden_layers": 3, "vocab_size": 259, **changes})


def make(folder: Path, dtype: Dtype, sequences: int = 8, length: int = 32, **changes: Any) -> tuple[Weights, Profile]:
    """Writes the model with its measured profile."""
    weights = tiny.make_weights(folder, config(dtype, **changes), SEED)
    measured = calibrate(folder, sequences=sequences, length=length)
    measured.save(folder)
    return weights, measured.profile


def serve(weights: Weights, stage_class: type[Stage], tokens: list[int], rows: int = 0) -> tuple[Served, list[int]]:
    """One request through all layers, `rows` positions at a time (0: all). Its trace, and the token chosen at each
    position.
    """
    shape = weights.shape
    stage = stage_class(weights.folder, 0, shape.layers, weights=weights)
    keys, cache = tensor_keys(shape, 0, shape.layers), stage.cache()
    parts: list[dict[str, Any]] = []
    chosen: list[int] = []
    for first in range(0, len(tokens), rows or len(tokens)):
        fed = tokens[first : first + (rows or len(tokens))]
        batch = Batch((Piece(0, first, len(fed)),))
        hidden, tensors = stage.forward(stage.embed(np.array(fed, dtype=np.int64)), batch, cache)
        parts.append({key: to_bits(tensors[key]) for key in keys})
        chosen += stage.tokens(hidden)
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    return Served(0, RequestTrace(shape, 0, shape.layers, arrays)), chosen


def prompt(weights: Weights, length: int, seed: int) -> list[int]:
    """Tokens that no calibration saw."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, weights.shape.vocabulary, length)]
