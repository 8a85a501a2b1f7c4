"""Layer-local re-execution in floating point: each tensor of a layer from the served tensors that it was made of.

The law's own numbers (QG weights, the registered RoPE table, hardware's addition) in float64 arithmetic: within 1e-6 of
the standard result, and for all positions of a request at once. What looks wrong here is judged exactly elsewhere.
In float32 it costs half and lies within 1e-5: enough to screen what was served in 16 bits, whose last bit is 4e-4 or
more. Memory: one tile of weights at a time.
"""

from collections.abc import Iterator
from math import pi, sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from verifier import vectors
from verifier.linear import Bits, float_tensor, weight_tiles
from verifier.program import Kind, ModelShape
from verifier.referee.fixed import Q30
from verifier.referee.floats import INVALID, SERVED_LIMIT_BITS, WEIGHT_LIMIT_BITS, Dtype
from verifier.weights import Weights

QUERIES = 64  # positions whose attention is computed together: what lies in their future is computed in vain
SCORES = 1 << 20  # attention scores at a time, of all heads: 8 MB of float64
ROWS = 4096  # positions at a time through a matrix
_COLUMN_TILE = 256  # intermediate columns at a time through the MLP
_SCREEN_TILE = 1 << 20  # float32 weights at a time, 4 MiB

_LAST_MATRIX = {
    Kind.Q: "self_attn.q_proj",
    Kind.K: "self_attn.k_proj",
    Kind.V: "self_attn.v_proj",
    Kind.ATTEND: "self_attn.o_proj",
    Kind.MLP: "mlp.down_proj",
}

Positions = npt.NDArray[np.int64]


def real(bits: Bits, dtype: Dtype) -> torch.Tensor:
    """Served bits as the law's values, float64; invalid ones are 0."""
    return torch.from_numpy(vectors.served(np.asarray(bits), dtype).astype(np.float64)).div_(float(Q30))


def values(bits: Bits, dtype: Dtype, limit_bits: int, precision: torch.dtype) -> torch.Tensor:
    """Raw bits as floats of a precision that holds them; invalid ones (NaN, Inf, |v| >= 2^limit_bits) as 0."""
    return _decoded(np.asarray(bits), dtype, limit_bits, precision)[0]


def _decoded(
    bits: Bits, dtype: Dtype, limit_bits: int, precision: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `values`, and where the invalid ones are; None if there are none."""
    floats = float_tensor(bits, dtype).to(precision, copy=True)
    # Without their sign, bits are in the order of the absolute values, Inf and NaN on top.
    largest = min((dtype.bias + limit_bits) << dtype.mantissa_bits, dtype.infinity)
    if not bits.size or int((bits & bits.dtype.type(dtype.sign - 1)).max()) < largest:
        return floats, None
    invalid = ~(floats.abs() < float(1 << limit_bits))  # a NaN compares false as well
    return floats.masked_fill_(invalid, 0.0), invalid


def matrix_of(kind: Kind, layer: int) -> str:
    """The tensor whose product is served, for q and k before RoPE."""
    return f"model.layers.{layer}.{_LAST_MATRIX[kind]}.weight"


def product(x: torch.Tensor, bits: Bits, dtype: Dtype) -> torch.Tensor:
    """x [T, n] times raw weights [m, n]: [T, m], in x's precision."""
    out = torch.empty((x.shape[0], bits.shape[0]), dtype=x.dtype)
    for first, tile in _tiles(bits, dtype, x.dtype):
        for row in range(0, x.shape[0], ROWS):
            torch.mm(x[row : row + ROWS], tile.T, out=out[row : row + ROWS, first : first + tile.shape[0]])
    return out


def _tiles(bits: Bits, dtype: Dtype, precision: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, weights [rows, n]) over raw weights [m, n]."""
    if precision == torch.float64:
        for first, tile in weight_tiles(bits, dtype):
            yield first, tile.div_(float(1 << dtype.weight_fraction_bits))
        return
    step = max(1, _SCREEN_TILE // bits.shape[1])
    for first in range(0, bits.shape[0], step):
        yield first, values(bits[first : first + step], dtype, WEIGHT_LIMIT_BITS, precision)


class Reference:
    """One model's layers. h, q, k, v, attn_out: raw served bits [T, width]."""

    def __init__(self, weights: Weights, precision: torch.dtype = torch.float64) -> None:
        """precision: torch.float64, or torch.float32 to screen what was served in 16 bits. Raises ValueError."""
        allowed = {torch.float64, torch.float32} if weights.shape.served_dtype != Dtype.FLOAT32 else {torch.float64}
        if precision not in allowed:
            raise ValueError(f"expected one of {sorted(map(str, allowed))} for what was served, got {precision}")
        self.weights = weights
        self.shape: ModelShape = weights.shape
        self.precision = precision
        # A layer's q and k turn alike, and so do the next layer's.
        self._turns = (np.empty(0, np.int64), torch.empty(0), torch.empty(0))

    def real(self, bits: Bits) -> torch.Tensor:
        """Served bits as the law's values; invalid ones are 0."""
        return self.decoded(bits)[0]

    def decoded(self, bits: Bits) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `real`, and where served bits are none of the law's: a mask, None if they all are."""
        dtype = self.shape.served_dtype
        if self.precision != torch.float64:
            return _decoded(np.asarray(bits), dtype, SERVED_LIMIT_BITS, self.precision)
        fixed = vectors.checked_served(np.asarray(bits), dtype)
        invalid = fixed == INVALID
        broken = bool(invalid.any())
        numbers = torch.from_numpy((np.where(invalid, 0, fixed) if broken else fixed).astype(np.float64))
        return numbers.div_(float(Q30)), torch.from_numpy(invalid) if broken else None

    def projected(self, kind: Kind, layer: int, h: Bits, positions: Positions | None = None) -> torch.Tensor:
        """q, k or v [T, width] of h, q and k after RoPE. positions: [T]; default 0 .. T-1."""
        return self.headed(kind, layer, self.entered(layer, self.real(h)), positions)

    def entered(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """What q, k and v are made of: h [T, hidden] as `real` has it, normalised."""
        return self._normed(h, f"model.layers.{layer}.input_layernorm.weight")

    def headed(self, kind: Kind, layer: int, entered: torch.Tensor, positions: Positions | None = None) -> torch.Tensor:
        """As `projected`, of what `entered` gave."""
        out = self._times(entered, matrix_of(kind, layer))
        return out if kind == Kind.V else self.turned(out, np.arange(len(out)) if positions is None else positions)

    def attended(self, layer: int, q: Bits, k: Bits, v: Bits) -> torch.Tensor:
        """attn_out [T, hidden]: exact causal softmax over the served q, k, v, then o_proj."""
        return self.combined(layer, self.mixed(q, k, v))

    def mixed(self, q: Bits, k: Bits, v: Bits, first: int = 0) -> torch.Tensor:
        """What the heads make of k and v [T, width] for the queries q [n, width] at positions first .. first + n - 1:
        [n, query width].
        """
        end = first + len(q)
        return self.mixture(self.real(q), self.real(k[:end]), self.real(v[:end]))

    def mixture(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `mixed`, of what `real` gave: queries q [n, width] at the last n of the positions of k and v."""
        shape, count, end = self.shape, len(q), len(k)
        hd, heads, group, first = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads, end - count
        query = (q / sqrt(hd)).reshape(count, heads, group, hd).transpose(0, 1)
        key, value = (x.reshape(end, heads, hd).transpose(0, 1).contiguous() for x in (k, v))
        out = torch.empty((heads, count, group, hd), dtype=self.precision)
        step = max(1, min(QUERIES, SCORES // (shape.heads * end)))
        for low in range(0, count, step):
            high = min(low + step, count)
            rows, seen = high - low, first + high
            scores = torch.bmm(query[:, low:high].reshape(heads, rows * group, hd), key[:, :seen].transpose(1, 2))
            future = torch.ones((rows, rows), dtype=torch.bool).triu_(1)[:, None]
            scores.view(heads, rows, group, seen)[..., first + low :].masked_fill_(future, float("-inf"))
            scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
            mixed = torch.bmm(scores, value[:, :seen]).div_(scores.sum(dim=-1, keepdim=True))
            out[:, low:high] = mixed.view(heads, rows, group, hd)
        return out.transpose(0, 1).reshape(count, shape.query_width)

    def combined(self, layer: int, mixed: torch.Tensor) -> torch.Tensor:
        """attn_out [T, hidden] of what the heads made."""
        return self._times(mixed, matrix_of(Kind.ATTEND, layer))

    def transformed(self, layer: int, h: Bits, attn_out: Bits) -> torch.Tensor:
        """mlp_out [T, hidden] of h + attn_out, added as hardware does."""
        down = self.weights.raw(matrix_of(Kind.MLP, layer))
        out = torch.zeros((len(h), self.shape.hidden), dtype=self.precision)
        for columns, active in self._activations(layer, h, attn_out):
            for start, tile in _tiles(down[:, columns], self.shape.weight_dtype, self.precision):
                out[:, start : start + tile.shape[0]].addmm_(active, tile.T)
        return out

    def activated(self, layer: int, h: Bits, attn_out: Bits) -> torch.Tensor:
        """What down_proj makes mlp_out of: [T, intermediate]."""
        out = torch.empty((len(h), self.shape.intermediate), dtype=self.precision)
        for columns, active in self._activations(layer, h, attn_out):
            out[:, columns] = active
        return out

    def _activations(self, layer: int, h: Bits, attn_out: Bits) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, silu(gate) * up [T, columns]) in tiles over the intermediate columns."""
        prefix, dtype, stored = f"model.layers.{layer}", self.shape.served_dtype, self.shape.weight_dtype
        x = self.real(vectors.add_bits(dtype, np.asarray(h), np.asarray(attn_out)))
        x = self._normed(x, f"{prefix}.post_attention_layernorm.weight")
        for first in range(0, self.shape.intermediate, _COLUMN_TILE):
            columns = slice(first, min(first + _COLUMN_TILE, self.shape.intermediate))
            gate = product(x, self.weights.raw(f"{prefix}.mlp.gate_proj.weight", columns), stored)
            up = product(x, self.weights.raw(f"{prefix}.mlp.up_proj.weight", columns), stored)
            yield columns, functional.silu(gate, inplace=True).mul_(up)

    def logits(self, out: Bits) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token, logits [T, tokens]) of the last layer's rows, in tiles over the vocabulary."""
        x = self._normed(self.real(out), "model.norm.weight")
        for first, tile in _tiles(self.weights.raw("lm_head.weight"), self.shape.weight_dtype, self.precision):
            yield first, x @ tile.T

    def _times(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return product(x, self.weights.raw(name), self.shape.weight_dtype)

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gain = self.weights.float64(name)[0].to(x.dtype)
        squares: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_()
        return (x * (squares / x.shape[1] + float(self.shape.rms_eps)).rsqrt_()).mul_(gain)

    def turned(self, x: torch.Tensor, positions: Positions, undo: bool = False) -> torch.Tensor:
        """RoPE of [T, heads * head_dim] by the registered table."""
        cos, sin = (turn.to(x.dtype)[:, None, :] for turn in self._rotation(positions))
        pairs = x.reshape(len(x), -1, 2, self.shape.head_dim // 2)
        out = torch.empty_like(pairs)
        for part, (a, b), sign in ((0, (0, 1), -1.0), (1, (1, 0), 1.0)):
            torch.mul(pairs[:, :, a], cos, out=out[:, :, part])
            out[:, :, part].addcmul_(pairs[:, :, b], sin, value=-sign if undo else sign)
        return out.reshape(len(x), -1)

    def _rotation(self, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, head_dim / 2], float64, of the law's angles."""
        last = self._turns
        if not np.array_equal(last[0], positions):
            table = np.array(self.weights.program.table, dtype=np.uint64)
            phase = positions.astype(np.uint64)[:, None] * table[None, :]  # modulo 2^64, as the law has it
            angle = torch.from_numpy(phase.astype(np.float64) * (2 * pi / 2.0**64))
            last = self._turns = (positions, angle.cos(), angle.sin())
        return last[1:]
