"""Servers that cheat somewhere and are consistent everywhere else."""

from collections.abc import Callable, Container

import numpy as np

from tests.verifier import tiny
from verifier.linear import Bits
from verifier.program import Kind
from verifier.reference import Reference
from verifier.vectors import add_bits
from verifier.weights import Weights

Cheat = Callable[[int, str, Bits], Bits]  # layer, tensor, honest rows [T, width] -> served ones


def made(cheat: Cheat) -> Callable[[Weights, list[int]], dict[str, Bits]]:
    """What a server computes that applies `cheat` to each tensor and goes on from it."""

    def make(weights: Weights, tokens: list[int]) -> dict[str, Bits]:
        shape, reference, dtype = weights.shape, Reference(weights), weights.shape.served_dtype
        arrays: dict[str, Bits] = {}
        table = weights.raw("model.embed_tokens.weight")
        h = cheat(-1, "h", np.stack([table[token] for token in tokens]))
        for layer in range(shape.layers):
            arrays[f"{layer}.h"] = h
            for kind, name in ((Kind.Q, "q"), (Kind.K, "k"), (Kind.V, "v")):
                arrays[f"{layer}.{name}"] = cheat(layer, name, tiny.to_bits(reference.projected(kind, layer, h), dtype))
            q, k, v = (arrays[f"{layer}.{name}"] for name in "qkv")
            attn_out = cheat(layer, "attn_out", tiny.to_bits(reference.attended(layer, q, k, v), dtype))
            mlp_out = cheat(layer, "mlp_out", tiny.to_bits(reference.transformed(layer, h, attn_out), dtype))
            arrays |= {f"{layer}.attn_out": attn_out, f"{layer}.mlp_out": mlp_out}
            h = cheat(layer, "next", add_bits(dtype, add_bits(dtype, h, attn_out), mlp_out))
        return arrays | {"out": h}

    return make


def at(layer: int, name: str, position: int, change: int = 0x80, columns: int = 256) -> Cheat:
    """One row altered, in its first columns."""

    def cheat(here: int, tensor: str, rows: Bits) -> Bits:
        if (here, tensor) != (layer, name) or len(rows) <= position:
            return rows
        out = np.array(rows)
        out[position, :columns] ^= change
        return out

    return cheat


def coarse(layers: Container[int]) -> Cheat:
    """All that some layers compute, with three bits of mantissa: as from weights of that kind."""

    def cheat(layer: int, name: str, rows: Bits) -> Bits:
        return rows & np.uint16(0xFFF0) if layer in layers and name != "next" else rows

    return cheat
