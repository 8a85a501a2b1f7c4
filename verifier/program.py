"""A model's config -> its shape, its weights' layout and the program that judges it (docs/canonical.md, "Programs")."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

from verifier.referee.codec import (
    ALL_POSITIONS,
    BLOCK,
    Instruction,
    Operand,
    SegmentHeader,
    Source,
    Tensor,
    table_leaves,
)
from verifier.referee.errors import IndexOutOfRange
from verifier.referee.fixed import LOG2E, isqrt
from verifier.referee.floats import Dtype
from verifier.referee.ops import Op
from verifier.referee.tree import Tree, leaf
from verifier.rope import rope_table
from verifier.shape import ModelShape, UnsupportedModel, check_shape, eps60, shape_from_config

__all__ = [
    "Kind",
    "ModelShape",
    "Program",
    "TensorPlace",
    "UnsupportedModel",
    "WeightLayout",
    "build_program",
    "overflow_bound",
    "profile_cells",
    "profile_index",
    "score_scale",
    "shape_from_config",
]


class Kind(IntEnum):
    """Segment kinds. LINK judges raw bits, STOP, BILL and LENGTH judge records; they have no program."""

    EMBED = 0
    Q = 1
    K = 2
    V = 3
    ATTEND = 4
    MLP = 5
    LINK = 6
    TOKEN = 7
    STOP = 8
    BILL = 9
    LENGTH = 10
    SAMPLE = 11


def score_scale(shape: ModelShape) -> int:
    """The `a` of SCORE: log2(e) / sqrt(head_dim) in Q40."""
    return isqrt(LOG2E**2 // shape.head_dim)


def overflow_bound(dtype: Dtype) -> int:
    """The `a` of VERDICT (Q30): above it a standard value excuses a served one that is no number."""
    return 32752 << 30 if dtype == Dtype.FLOAT16 else 1 << 49


@dataclass(frozen=True)
class TensorPlace:
    """A weight tensor's leaves. name as in a Hugging Face checkpoint; a vector is one row."""

    name: str
    rows: int
    cols: int
    base: int

    @property
    def leaves(self) -> int:
        return self.rows * _chunks(self.cols)


@dataclass(frozen=True)
class WeightLayout:
    """Where every weight lies in the weights tree."""

    shape: ModelShape

    @cached_property
    def tensors(self) -> tuple[TensorPlace, ...]:
        """All tensors in the order of their leaves."""
        shape, out, base = self.shape, [], 0
        d, f, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.kv_width
        layer = (
            ("input_layernorm", 1, d),
            ("self_attn.q_proj", q, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, q),
            ("post_attention_layernorm", 1, d),
            ("mlp.gate_proj", f, d),
            ("mlp.up_proj", f, d),
            ("mlp.down_proj", d, f),
        )
        named = [(f"model.layers.{i}.{name}.weight", r, c) for i in range(shape.layers) for name, r, c in layer]
        named += [("model.norm.weight", 1, d), ("model.embed_tokens.weight", shape.vocabulary, d)]
        named += [] if shape.tied else [("lm_head.weight", shape.vocabulary, d)]
        for name, rows, cols in named:
            out.append(TensorPlace(name, rows, cols, base))
            base = out[-1].base + out[-1].leaves
        return tuple(out)

    @cached_property
    def _by_name(self) -> dict[str, TensorPlace]:
        return {place.name: place for place in self.tensors}

    def place(self, name: str) -> TensorPlace:
        """A tensor by its checkpoint name; a tied lm_head is embed_tokens. Raises KeyError."""
        tied = self.shape.tied and name == "lm_head.weight"
        return self._by_name["model.embed_tokens.weight" if tied else name]

    @property
    def layer_stride(self) -> int:
        """Leaves of one layer."""
        return self.place("model.norm.weight").base // self.shape.layers

    @property
    def leaves(self) -> int:
        return self.tensors[-1].base + self.tensors[-1].leaves

    def locate(self, leaf_index: int) -> tuple[TensorPlace, int, int]:
        """(tensor, row, chunk) of a leaf. Raises IndexOutOfRange."""
        if not 0 <= leaf_index < self.leaves:
            raise IndexOutOfRange(f"expected a leaf below {self.leaves}, got {leaf_index}")
        place = next(p for p in reversed(self.tensors) if p.base <= leaf_index)
        row, chunk = divmod(leaf_index - place.base, _chunks(place.cols))
        return place, row, chunk


@dataclass(frozen=True)
class Program:
    """A model's judge as data: instructions by segment kind, and the RoPE table."""

    segments: Mapping[Kind, tuple[Instruction, ...]]
    units: Mapping[Kind, int]
    table: tuple[int, ...]

    @cached_property
    def headers(self) -> tuple[SegmentHeader, ...]:
        """One header a kind, by kind; zeros for those without a program."""
        out, first = [], len(Kind)
        for kind in Kind:
            steps = len(self.segments.get(kind, ()))
            out.append(SegmentHeader(first, steps, self.units[kind]) if steps else SegmentHeader(0, 0, 0))
            first += steps
        return tuple(out)

    @cached_property
    def table_base(self) -> int:
        """The first leaf of the RoPE table."""
        return len(Kind) + sum(map(len, self.segments.values()))

    def leaves(self) -> list[bytes]:
        """The program tree's leaves: headers, instructions, table."""
        instructions = [i.encode() for kind in sorted(self.segments) for i in self.segments[kind]]
        return [header.encode() for header in self.headers] + instructions + table_leaves(self.table)

    @cached_property
    def tree(self) -> Tree:
        return Tree([leaf(data) for data in self.leaves()])

    def root(self) -> bytes:
        return self.tree.root


def build_program(shape: ModelShape) -> Program:
    """The program of a Llama-like model. Raises UnsupportedModel."""
    check_shape(shape)
    segments = _Builder(shape).segments()
    heads, kv, blocks = shape.heads, shape.kv_heads, shape.blocks
    counts = (blocks, heads, kv, kv, blocks, blocks, shape.vocabulary, shape.vocabulary)
    return Program(segments, dict(zip(segments, counts, strict=True)), tuple(rope_table(shape.rope, shape.head_dim)))


class _Builder:
    """Writes the instructions of each segment kind for one shape."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.layout = WeightLayout(shape)
        self.fraction = shape.weight_dtype.weight_fraction_bits

    def segments(self) -> dict[Kind, tuple[Instruction, ...]]:
        shape = self.shape
        q_steps, k_steps = (self._projected(kind) for kind in (Kind.Q, Kind.K))
        out = {
            Kind.EMBED: (self._embed(),),
            Kind.Q: q_steps,
            Kind.K: k_steps,
            Kind.V: self._projected(Kind.V),
            Kind.ATTEND: self._attend(),
            Kind.MLP: self._mlp(),
            Kind.TOKEN: self._token(),
            Kind.SAMPLE: self._sample(),
        }
        # The table follows all instructions, so its first leaf is known only now.
        base = len(Kind) + sum(map(len, out.values()))
        table = Operand(Source.TABLE, base=base, width=shape.head_dim // 2)
        for kind in (Kind.Q, Kind.K):
            out[kind] = tuple(replace(step, y=table) if step.op == Op.ROPE else step for step in out[kind])
        return out

    def _embed(self) -> Instruction:
        row = self._weight("model.embed_tokens.weight")
        return Instruction(Op.SAME, x=self._served(Tensor.H, BLOCK), y=row)

    def _projected(self, kind: Kind) -> tuple[Instruction, ...]:
        """Q, K and V: one head of q, k or v."""
        shape, letter = self.shape, kind.name.lower()
        hd = shape.head_dim
        steps = self._normed(self._served(Tensor.H), "input_layernorm")
        weight = self._weight(f"self_attn.{letter}_proj", hd)
        steps.append(self._linear(steps, weight, cols=hd))
        if kind != Kind.V:
            steps.append(Instruction(Op.ROPE, cols=hd, x=_last(steps)))
        return (*steps, self._verdict(steps, Tensor[kind.name], kind, hd))

    def _attend(self) -> tuple[Instruction, ...]:
        """One block of the attention's output: the softmax of all heads, then o_proj."""
        shape = self.shape
        heads, hd, group = shape.heads, shape.head_dim, shape.heads // shape.kv_heads
        q, k, v = self._served(Tensor.Q), self._served(Tensor.K), self._served(Tensor.V)
        score = Instruction(Op.SCORE, rows=heads, cols=0, terms=hd, a=score_scale(shape), b=group, x=q, y=k)
        steps = [score]
        steps.append(Instruction(Op.MAX, rows=heads, terms=ALL_POSITIONS, x=_step(steps, 0)))
        steps.append(Instruction(Op.EXP, rows=heads, cols=0, x=_step(steps, 0), y=_step(steps, 1)))
        weights = _step(steps, 2)
        steps.append(Instruction(Op.SUM, rows=heads, terms=ALL_POSITIONS, x=weights))
        wsum = Instruction(Op.WSUM, wide=1, rows=heads, cols=hd, terms=ALL_POSITIONS, b=group, x=weights, y=v)
        steps.append(wsum)
        steps.append(Instruction(Op.DIV, rows=heads, cols=hd, x=_step(steps, 4), y=_step(steps, 3)))
        steps.append(self._linear(steps, self._weight("self_attn.o_proj", BLOCK), cols=BLOCK, limit=shape.hidden))
        return (*steps, self._verdict(steps, Tensor.ATTN_OUT, Kind.ATTEND, BLOCK))

    def _mlp(self) -> tuple[Instruction, ...]:
        """One block of the MLP's output."""
        shape = self.shape
        x, y = self._served(Tensor.H), self._served(Tensor.ATTN_OUT)
        steps = [Instruction(Op.ADD, cols=shape.hidden, b=shape.served_dtype, x=x, y=y)]
        steps += self._normed(_last(steps), "post_attention_layernorm", first=1)
        normed = _last(steps)
        for name in ("gate", "up"):
            steps.append(self._product(normed, self._weight(f"mlp.{name}_proj"), cols=shape.intermediate))
        steps.append(Instruction(Op.GATED, cols=shape.intermediate, x=_step(steps, 4), y=_step(steps, 5)))
        steps.append(self._linear(steps, self._weight("mlp.down_proj", BLOCK), cols=BLOCK, limit=shape.hidden))
        return (*steps, self._verdict(steps, Tensor.MLP_OUT, Kind.MLP, BLOCK))

    def _token(self) -> tuple[Instruction, ...]:
        """The served token's logit against a competitor's."""
        steps = self._normed(self._served(Tensor.OUT), "model.norm.weight")
        head = self._weight("lm_head.weight")
        steps.append(Instruction(Op.LOGIT, cols=2, terms=self.shape.hidden, a=self.fraction, x=_last(steps), y=head))
        return (*steps, Instruction(Op.COMPARE, x=_last(steps), z=self._margin()))

    def _sample(self) -> tuple[Instruction, ...]:
        """A drawn token against a competitor, or its own membership: folds over the logits of the whole vocabulary."""
        vocabulary, margin = self.shape.vocabulary, self._margin()
        steps = self._normed(self._served(Tensor.OUT), "model.norm.weight")
        steps.append(self._linear(steps, self._weight("lm_head.weight"), cols=vocabulary))
        logits = _last(steps)
        steps.append(Instruction(Op.MAX, terms=vocabulary, x=logits))
        steps.append(Instruction(Op.RANK, terms=vocabulary, x=logits, z=margin))
        steps.append(Instruction(Op.MASS, wide=1, terms=vocabulary, x=logits, y=_step(steps, 4), z=margin))
        steps.append(Instruction(Op.STANDING, x=_step(steps, 5), y=_step(steps, 6)))
        return (*steps, Instruction(Op.CHOICE, x=logits, y=_last(steps), z=margin))

    def _margin(self) -> Operand:
        return Operand(Source.PROFILE, base=profile_cells(self.shape) - 1)

    def _normed(self, x: Operand, weight: str, first: int = 0) -> list[Instruction]:
        """SUMSQ, RSQRT, NORM of x, as instructions first .. first + 2 of their list."""
        shape = self.shape
        sumsq = Instruction(Op.SUMSQ, wide=1, terms=shape.hidden, x=x)
        rsqrt = Instruction(Op.RSQRT, a=eps60(shape), b=shape.hidden, x=_reading(sumsq, first))
        y, z = _reading(rsqrt, first + 1), self._weight(weight)
        return [sumsq, rsqrt, Instruction(Op.NORM, cols=shape.hidden, a=self.fraction, x=x, y=y, z=z)]

    def _linear(self, steps: list[Instruction], weight: Operand, cols: int, limit: int = 0) -> Instruction:
        """weight times the last step."""
        return self._product(_last(steps), weight, cols, limit)

    def _product(self, x: Operand, weight: Operand, cols: int, limit: int = 0) -> Instruction:
        return Instruction(Op.LINEAR, cols=cols, limit=limit, terms=weight.width, a=self.fraction, x=x, y=weight)

    def _verdict(self, steps: list[Instruction], tensor: Tensor, kind: Kind, unit_columns: int) -> Instruction:
        shape = self.shape
        z = Operand(Source.PROFILE, base=_profile_base(shape, kind), layer_stride=_profile_stride(shape), unit_stride=1)
        y = self._served(tensor, unit_columns)
        return Instruction(Op.VERDICT, a=overflow_bound(shape.served_dtype), x=_last(steps), y=y, z=z)

    def _served(self, tensor: Tensor, unit_columns: int = 0) -> Operand:
        shape = self.shape
        narrow = {Tensor.Q: shape.query_width, Tensor.K: shape.kv_width, Tensor.V: shape.kv_width}
        width = narrow.get(tensor, shape.hidden)
        return Operand(Source.SERVED, tensor, unit_stride=unit_columns, width=width)

    def _weight(self, name: str, unit_rows: int = 0) -> Operand:
        """A tensor of every layer by its name within the layer, or a whole-model tensor by its full name."""
        full = name.endswith(".weight")
        place = self.layout.place(name if full else f"model.layers.0.{name}.weight")
        stride = 0 if full else self.layout.layer_stride
        return Operand(Source.WEIGHT, 0, place.base, stride, unit_rows, place.cols)


def _reading(instruction: Instruction, id: int) -> Operand:
    """The operand that reads the vector of an instruction that is number id of its list."""
    return Operand(Source.STEP, id, instruction.rows, instruction.wide, instruction.limit, instruction.cols)


def _step(steps: list[Instruction], id: int) -> Operand:
    return _reading(steps[id], id)


def _last(steps: list[Instruction]) -> Operand:
    return _step(steps, len(steps) - 1)


def _profile_stride(shape: ModelShape) -> int:
    """Cells of one layer."""
    return shape.heads + 2 * shape.kv_heads + 2 * shape.blocks


def _profile_base(shape: ModelShape, kind: Kind) -> int:
    """A kind's first cell within a layer. Raises ValueError for a kind that has no tolerance."""
    heads, kv, blocks = shape.heads, shape.kv_heads, shape.blocks
    bases = {
        Kind.Q: 0,
        Kind.K: heads,
        Kind.V: heads + kv,
        Kind.ATTEND: heads + 2 * kv,
        Kind.MLP: heads + 2 * kv + blocks,
    }
    if kind not in bases:
        raise ValueError(f"expected one of {[k.name for k in bases]}, got {kind.name}")
    return bases[kind]


def profile_cells(shape: ModelShape) -> int:
    """Leaves of the tolerance profile, the token margin's included."""
    return shape.layers * _profile_stride(shape) + 1


def profile_index(shape: ModelShape, kind: Kind, layer: int = 0, unit: int = 0) -> int:
    """The profile leaf that judges a cell; TOKEN's and SAMPLE's is the margin's.

    Raises ValueError for a kind without tolerance.
    """
    if kind in (Kind.TOKEN, Kind.SAMPLE):
        return profile_cells(shape) - 1
    return layer * _profile_stride(shape) + _profile_base(shape, kind) + unit


def _chunks(columns: int) -> int:
    """Leaves of a row."""
    return -(-columns // BLOCK)
