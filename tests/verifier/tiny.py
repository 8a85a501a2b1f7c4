"""A tiny random model in a folder and its honest served tensors: what the fast half's tests share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verifier.audit import Stage
from verifier.canonical import Case
from verifier.game import Segment
from verifier.linear import Bits, float_tensor
from verifier.program import Kind, ModelShape, WeightLayout, shape_from_config
from verifier.referee.codec import GREEDY, Model
from verifier.referee.floats import Dtype
from verifier.reference import Reference
from verifier.safetensors_file import write
from verifier.tolerance import Profile, uniform_profile
from verifier.trace import RequestTrace
from verifier.vectors import add_bits
from verifier.weights import Weights, identify

JOB = bytes(31) + b"\x07"
_TORCH = {Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT16: torch.float16, Dtype.FLOAT32: torch.float32}
_NUMPY = {Dtype.BFLOAT16: np.uint16, Dtype.FLOAT16: np.uint16, Dtype.FLOAT32: np.uint32}


def config(dtype: Dtype = Dtype.BFLOAT16, **changes: Any) -> dict[str, Any]:
    """Two blocks (the second of 64 columns), grouped heads, odd sizes."""
    told = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 320,
        "intermediate_size": 600,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": dtype.name.lower(),
    }
    return told | changes


def to_bits(values: torch.Tensor, dtype: Dtype) -> Bits:
    """float64 rounded to raw bits."""
    integer = torch.int32 if dtype == Dtype.FLOAT32 else torch.int16
    return values.to(_TORCH[dtype]).contiguous().view(integer).numpy().view(_NUMPY[dtype])


def make_weights(folder: Path, told: dict[str, Any], seed: int = 0) -> Weights:
    """Writes and opens a random model."""
    shape, generator = shape_from_config(told), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    tensors = {}
    for place in WeightLayout(shape).tensors:
        values = torch.randn((place.rows, place.cols), generator=generator, dtype=torch.float64)
        norm = place.name.endswith("norm.weight")
        values = 1 + 0.1 * values if norm else values * (1.0 if "embed" in place.name else place.cols**-0.5)
        bits = to_bits(values, shape.weight_dtype)
        tensors[place.name] = bits[0] if norm else bits
    write(folder / "model.safetensors", shape.weight_dtype, tensors, {})
    return Weights.open(folder, threads=1)


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


def honest_arrays(weights: Weights, tokens: list[int]) -> dict[str, Bits]:
    """What an honest server of all layers commits to."""
    shape, reference = weights.shape, Reference(weights)
    dtype, arrays = shape.served_dtype, {}
    h = np.stack([weights.raw("model.embed_tokens.weight")[token] for token in tokens])
    for layer in range(shape.layers):
        q, k, v = (to_bits(reference.projected(kind, layer, h), dtype) for kind in (Kind.Q, Kind.K, Kind.V))
        attn_out = to_bits(reference.attended(layer, q, k, v), dtype)
        mlp_out = to_bits(reference.transformed(layer, h, attn_out), dtype)
        for name, bits in {"h": h, "q": q, "k": k, "v": v, "attn_out": attn_out, "mlp_out": mlp_out}.items():
            arrays[f"{layer}.{name}"] = bits
        h = add_bits(dtype, add_bits(dtype, h, attn_out), mlp_out)
    return arrays | {"out": h}


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
    return Case(tiny.model, tiny.weights, tiny.profile, segment(kind, **place), trace, None, token, sampling)


def whole(trace: RequestTrace) -> Stage:
    """One stage that holds all layers."""
    return Stage(0, trace)


def to_real(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Raw bits as float64."""
    return float_tensor(np.array(bits), dtype).to(torch.float64)
