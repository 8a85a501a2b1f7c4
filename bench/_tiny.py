"""A tiny random model in a folder, and what an honest server makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verifier.linear import Bits
from verifier.program import Kind, WeightLayout, shape_from_config
from verifier.referee.floats import Dtype
from verifier.reference import Reference
from verifier.safetensors_file import write
from verifier.vectors import add_bits
from verifier.weights import Weights

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
