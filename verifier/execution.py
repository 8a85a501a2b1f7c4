"""A request executed from its tokens, layer by layer: what an honest stage would have served, up to rounding.

Needed only where nothing was served: then it says where to look (docs/protocol.md, "Demands"). Verdicts never rest on
it, for its error grows with the layers; they compare what was posted with what was posted.
"""

from collections.abc import Sequence

import numpy as np
import torch

from verifier import vectors
from verifier.linear import Bits
from verifier.program import Kind
from verifier.reference import Reference, real
from verifier.weights import Weights


class Execution:
    """All layers' tensors of one request. Memory: all of them, as served; time: one forward in float64."""

    def __init__(self, weights: Weights, tokens: Sequence[int]) -> None:
        """tokens: those fed in, prompt and output but for its last; each below the vocabulary."""
        self.shape = weights.shape
        reference, dtype = Reference(weights), weights.shape.served_dtype
        table = weights.raw("model.embed_tokens.weight")
        h: Bits = np.stack([np.asarray(table[token]) for token in tokens])
        self.arrays: dict[str, Bits] = {}

        def stored(values: torch.Tensor) -> Bits:
            return vectors.to_bits(values.numpy(), dtype)

        for layer in range(weights.shape.layers):
            q, k, v = (stored(reference.projected(kind, layer, h)) for kind in (Kind.Q, Kind.K, Kind.V))
            attn_out = stored(reference.attended(layer, q, k, v))
            mlp_out = stored(reference.transformed(layer, h, attn_out))
            names = {"h": h, "q": q, "k": k, "v": v, "attn_out": attn_out, "mlp_out": mlp_out}
            self.arrays |= {f"{layer}.{name}": bits for name, bits in names.items()}
            h = vectors.add_bits(dtype, vectors.add_bits(dtype, h, attn_out), mlp_out)
        self.arrays["out"] = h

    def size(self, key: str, position: int) -> float:
        """|own| of one row."""
        return float(real(self.arrays[key][position], self.shape.served_dtype).norm())

    def distance(self, key: str, position: int, served: Bits) -> float:
        """|served - own| / |own| of one row."""
        dtype = self.shape.served_dtype
        own = real(self.arrays[key][position], dtype)
        size = float(own.norm())
        return float((real(np.asarray(served), dtype) - own).norm()) / size if size else float("inf")
