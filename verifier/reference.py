"""Layer-local re-execution in float64: each tensor of a layer from the served tensors that it was made of.

The law's own numbers (QG weights, the registered RoPE table, hardware's addition) in float64 arithmetic: within 1e-6 of
the standard result, and for all positions of a request at once. What looks wrong here is judged exactly elsewhere.
Memory: one tile of weights at a time.
"""

from collections.abc import Iterator
from math import pi, sqrt

import numpy as np
import numpy.typing as npt
import torch

from verifier import vectors
from verifier.linear import Bits, fixed_weights, weight_tiles
from verifier.program import Kind, ModelShape
from verifier.referee.fixed import Q30
from verifier.referee.floats import Dtype
from verifier.weights import Weights

QUERIES = 512  # rows of attention scores at a time: 32 MB of float64 at 8192 positions
ROWS = 4096  # positions at a time through a matrix
_COLUMN_TILE = 256  # intermediate columns at a time through the MLP

_PROJECTION = {Kind.Q: "q_proj", Kind.K: "k_proj", Kind.V: "v_proj"}

Positions = npt.NDArray[np.int64]


def real(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Served bits as the law's values, float64; invalid ones are 0."""
    return torch.from_numpy(vectors.served(np.asarray(bits), dtype).astype(np.float64)).div_(float(Q30))


def product(x: torch.Tensor, bits: Bits, dtype: Dtype) -> torch.Tensor:
    """x [T, n] times raw weights [m, n]: float64 [T, m]."""
    out = torch.empty((x.shape[0], bits.shape[0]), dtype=torch.float64)
    for first, tile in weight_tiles(bits, dtype):
        tile /= float(1 << dtype.weight_fraction_bits)
        for row in range(0, x.shape[0], ROWS):
            out[row : row + ROWS, first : first + tile.shape[0]] = x[row : row + ROWS] @ tile.T
    return out


class Reference:
    """One model's layers in float64. h, q, k, v, attn_out: raw served bits [T, width]."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.shape: ModelShape = weights.shape

    def projected(self, kind: Kind, layer: int, h: Bits, positions: Positions | None = None) -> torch.Tensor:
        """q, k or v [T, width] of h, q and k after RoPE. positions: [T]; default 0 .. T-1."""
        shape, prefix = self.shape, f"model.layers.{layer}"
        x = self._normed(real(h, shape.served_dtype), f"{prefix}.input_layernorm.weight")
        out = self._times(x, f"{prefix}.self_attn.{_PROJECTION[kind]}.weight")
        return out if kind == Kind.V else self._turned(out, np.arange(len(out)) if positions is None else positions)

    def attended(self, layer: int, q: Bits, k: Bits, v: Bits) -> torch.Tensor:
        """attn_out [T, hidden]: exact causal softmax over the served q, k, v, then o_proj."""
        shape = self.shape
        dtype, hd, group = shape.served_dtype, shape.head_dim, shape.heads // shape.kv_heads
        positions = len(q)
        mixed = torch.empty((positions, shape.query_width), dtype=torch.float64)
        for head in range(shape.heads):
            own, shared = slice(head * hd, (head + 1) * hd), slice(head // group * hd, (head // group + 1) * hd)
            query, key, value = real(q[:, own], dtype), real(k[:, shared], dtype), real(v[:, shared], dtype)
            for first in range(0, positions, QUERIES):
                end = min(first + QUERIES, positions)
                scores = query[first:end] @ key[:end].T / sqrt(hd)
                future = torch.arange(end)[None, :] > torch.arange(first, end)[:, None]
                weights = torch.softmax(scores.masked_fill_(future, float("-inf")), dim=1)
                mixed[first:end, own] = weights @ value[:end]
        return self._times(mixed, f"model.layers.{layer}.self_attn.o_proj.weight")

    def transformed(self, layer: int, h: Bits, attn_out: Bits) -> torch.Tensor:
        """mlp_out [T, hidden] of h + attn_out, added as hardware does."""
        shape, prefix = self.shape, f"model.layers.{layer}"
        dtype, stored = shape.served_dtype, shape.weight_dtype
        x = real(vectors.add_bits(dtype, np.asarray(h), np.asarray(attn_out)), dtype)
        x = self._normed(x, f"{prefix}.post_attention_layernorm.weight")
        down = self.weights.raw(f"{prefix}.mlp.down_proj.weight")
        out = torch.zeros((len(x), shape.hidden), dtype=torch.float64)
        for first in range(0, shape.intermediate, _COLUMN_TILE):
            columns = slice(first, first + _COLUMN_TILE)
            gate = product(x, self.weights.raw(f"{prefix}.mlp.gate_proj.weight", columns), stored)
            up = product(x, self.weights.raw(f"{prefix}.mlp.up_proj.weight", columns), stored)
            tile = fixed_weights(down[:, columns], stored) / float(1 << stored.weight_fraction_bits)
            out += (torch.nn.functional.silu(gate) * up) @ tile.T
        return out

    def logits(self, out: Bits) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token, logits [T, tokens]) of the last layer's rows, in tiles over the vocabulary."""
        x = self._normed(real(out, self.shape.served_dtype), "model.norm.weight")
        stored = self.shape.weight_dtype
        for first, tile in weight_tiles(self.weights.raw("lm_head.weight"), stored):
            yield first, x @ (tile / float(1 << stored.weight_fraction_bits)).T

    def _times(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return product(x, self.weights.raw(name), self.shape.weight_dtype)

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gain = self.weights.float64(name)[0]
        root = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + float(self.shape.rms_eps))
        return x * root * gain

    def _turned(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """RoPE of [T, heads * head_dim] by the registered table."""
        half = self.shape.head_dim // 2
        table = np.array(self.weights.program.table, dtype=np.uint64)
        phase = positions.astype(np.uint64)[:, None] * table[None, :]  # modulo 2^64, as the law has it
        angle = torch.from_numpy(phase.astype(np.float64) * (2 * pi / 2.0**64))[:, None, :]
        pairs = x.reshape(len(x), -1, 2, half)
        a, b, c, s = pairs[:, :, 0], pairs[:, :, 1], angle.cos(), angle.sin()
        return torch.stack((a * c - b * s, b * c + a * s), dim=2).reshape(len(x), -1)
