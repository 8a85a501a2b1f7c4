"""A tiny model and its cases: what the fast half's tests share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._tiny import config as config
from bench._tiny import honest_arrays as honest_arrays
from bench._tiny import make_weights as make_weights
from bench._tiny import to_bits as to_bits
from verifier.audit import Stage
from verifier.canonical import Case
from verifier.game import Segment
from verifier.linear import Bits, float_tensor
from verifier.program import Kind, ModelShape
from verifier.referee.codec import GREEDY, Model
from verifier.referee.floats import Dtype
from verifier.tolerance import Profile, uniform_profile
from verifier.trace import RequestTrace
from verifier.weights import Weights, identify

JOB = bytes(31) + b"\x07"


def set_weight(folder: Path, name: str, index: tuple[int, ...], bits: int) -> None:
    """Overwrites one bf16 weight in the file."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + size])[name]
    at = int(np.ravel_multi_index(index, place["shape"]))
    start = 8 + size + place["data_offsets"][0] + 2 * at
    data[start : start + 2] = bits.to_bytes(2, "little")
    path.write_bytes(data)


@dataclass(frozen=True)
class Tiny:
    """A model, a profile and one request's honest tensors."""

    weights: Weights
    profile: Profile
    model: Model
    tokens: list[int]  # fed in
    trace: RequestTrace

    @property
    def shape(self) -> ModelShape:
        return self.weights.shape

    def case(self, kind: Kind, **place: Any) -> Case:
        """The truth about a cell of the honest tensors."""
        return case_of(self, self.trace, kind, **place)


def make(folder: Path, told: dict[str, Any], positions: int, seed: int = 0) -> Tiny:
    """A model with an honest run: the float64 reference rounded to the served dtype."""
    weights = make_weights(folder, told, seed)
    shape = weights.shape
    fine = shape.served_dtype == Dtype.FLOAT32
    profile = uniform_profile(shape, 1 if fine else 10, 100_000 if fine else 1000, 1 << 14, 1 << 20)
    tokens = [int(t) for t in np.random.default_rng(seed).integers(0, shape.vocabulary, positions)]
    arrays = honest_arrays(weights, tokens)
    trace = RequestTrace(shape, 0, shape.layers, arrays)
    return Tiny(weights, profile, identify(weights, profile), tokens, trace)


def altered(tiny: Tiny, key: str, change: Callable[[Bits], Bits]) -> RequestTrace:
    """The honest tensors but for one."""
    arrays = dict(tiny.trace.arrays)
    arrays[key] = change(np.array(arrays[key]))
    return RequestTrace(tiny.shape, 0, tiny.shape.layers, arrays)


def segment(kind: Kind, layer: int = 0, position: int = 0, unit: int = 0) -> Segment:
    return Segment(JOB, 0, kind, 0, layer, position, unit)


def case_of(
    tiny: Tiny, trace: RequestTrace, kind: Kind, token: int = 0, sampling: bytes = GREEDY, **place: Any
) -> Case:
    return Case(tiny.model, tiny.weights, tiny.profile, segment(kind, **place), trace, token, sampling)


def whole(trace: RequestTrace) -> Stage:
    """One stage that holds all layers."""
    return Stage(0, trace)


def to_real(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Raw bits as float64."""
    return float_tensor(np.array(bits), dtype).to(torch.float64)
