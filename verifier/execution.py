"""Requests executed from their tokens, layer by layer: what an honest stage would have served, up to rounding.

Needed only where nothing was served, or nothing downloaded: then it says where to look (docs/protocol.md, "Demands";
challenger/strategy.py). Verdicts never rest on it, for its error grows with the layers; they compare what was posted
with what was posted.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from verifier import vectors
from verifier.linear import Bits
from verifier.program import Kind
from verifier.reference import Reference, real
from verifier.weights import Weights


def layers(reference: Reference, sequences: Sequence[Sequence[int]]) -> Iterator[dict[str, Bits]]:
    """Each layer's tensors of all sequences, their rows one behind the other, then `out`; stored as a server stores
    them, computed in the reference's precision. The weights of a layer are read once for all rows.

    sequences: tokens fed in, each below the vocabulary.
    """
    dtype, table = reference.shape.served_dtype, reference.weights.raw("model.embed_tokens.weight")
    positions = np.concatenate([np.arange(len(tokens)) for tokens in sequences])
    ends = np.cumsum([len(tokens) for tokens in sequences])
    spans = [slice(end - len(tokens), end) for end, tokens in zip(ends, sequences, strict=True)]
    h: Bits = np.asarray(table)[np.concatenate([np.array(tokens, dtype=np.int64) for tokens in sequences])]

    def stored(values: torch.Tensor) -> Bits:
        return vectors.to_bits(values, dtype)

    for layer in range(reference.shape.layers):
        entered = reference.entered(layer, reference.real(h))
        q, k, v = (stored(reference.headed(kind, layer, entered, positions)) for kind in (Kind.Q, Kind.K, Kind.V))
        mixed = torch.cat([reference.mixed(q[span], k[span], v[span]) for span in spans])
        attn_out = stored(reference.combined(layer, mixed))
        mlp_out = stored(reference.transformed(layer, h, attn_out))
        names = {"h": h, "q": q, "k": k, "v": v, "attn_out": attn_out, "mlp_out": mlp_out}
        yield {f"{layer}.{name}": bits for name, bits in names.items()}
        h = vectors.add_bits(dtype, vectors.add_bits(dtype, h, attn_out), mlp_out)
    yield {"out": h}


def last_rows(reference: Reference, sequences: Sequence[Sequence[int]]) -> list[Bits]:
    """`out` [T, hidden] of each sequence. Memory: a few times one layer's tensors."""
    out: Bits = np.empty(0)
    for tensors in layers(reference, sequences):
        out = tensors.get("out", out)
    return np.split(out, np.cumsum([len(tokens) for tokens in sequences])[:-1])


class Execution:
    """All layers' tensors of one request. Memory: all of them, as served; time: one forward in float64."""

    def __init__(self, weights: Weights, tokens: Sequence[int]) -> None:
        """tokens: those fed in, prompt and output but for its last; each below the vocabulary."""
        self.shape = weights.shape
        self.arrays: dict[str, Bits] = {}
        for tensors in layers(Reference(weights), [tokens]):
            self.arrays |= tensors

    def size(self, key: str, position: int) -> float:
        """|own| of one row."""
        return float(real(self.arrays[key][position], self.shape.served_dtype).norm())

    def distance(self, key: str, position: int, served: Bits) -> float:
        """|served - own| / |own| of one row."""
        dtype = self.shape.served_dtype
        own = real(self.arrays[key][position], dtype)
        size = float(own.norm())
        return float((real(np.asarray(served), dtype) - own).norm()) / size if size else float("inf")
