"""verifier.referee.referee against float64: every kind of segment of a small model, step by step from openings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from verifier.game import read_roots
from verifier.program import Kind, Program, WeightLayout, build_program, profile_cells, shape_from_config
from verifier.referee import errors
from verifier.referee.codec import (
    Cell,
    Instruction,
    Model,
    Opening,
    Operand,
    ProfileCell,
    Source,
    Tensor,
    Trace,
    vector_leaves,
)
from verifier.referee.errors import RefereeError
from verifier.referee.fixed import Q30
from verifier.referee.ops import Op, combine, finish
from verifier.referee.referee import (
    Read,
    chunk_count,
    element_count,
    padded,
    place_of,
    reads_of,
    step,
    tensor_of,
)
from verifier.referee.tree import Tree, leaf

Reals = npt.NDArray[np.float64]

POSITIONS = 300  # two chunks of the softmax, and a v tile cut at the lower edge
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 260,  # two blocks, the second of 4 columns
    "intermediate_size": 258,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # v is 20 wide: a tile cut at the right edge, and a head across two tiles
    "vocab_size": 9,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 128, "float16": 1000, "float32": 1_000_000}  # 1 / relative distance


def raw(x: torch.Tensor) -> bytes:
    """Little-endian bytes of a tensor's elements."""
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def reals(x: torch.Tensor) -> Reals:
    return x.double().numpy()


def tensor_leaves(x: torch.Tensor, tiled: bool) -> list[bytes]:
    """A served tensor's leaves, cut by slicing: row blocks of 256, or tiles of 8 x 32."""
    tall, wide = (8, 32) if tiled else (1, 256)
    rows, cols = x.shape
    return [raw(x[r : r + tall, c : c + wide]) for r in range(0, rows, tall) for c in range(0, cols, wide)]


@dataclass
class World:
    """A model and one honest trace of it, in float64 rounded to the served dtype."""

    dtype: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    served: dict[tuple[int, Tensor], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.shape = shape_from_config(CONFIG | {"dtype": self.dtype})
        self.layout = WeightLayout(self.shape)
        self.program: Program = build_program(self.shape)
        for place in self.layout.tensors:
            size = 1.0 if place.rows == 1 or "embed" in place.name else place.cols**-0.5
            made = torch.randn(place.rows, place.cols, generator=generator, dtype=torch.float64) * size
            self.weights[place.name] = made.to(TORCH[self.dtype])
        self.tokens = torch.randint(0, 9, (POSITIONS,), generator=generator)
        self.serve()
        self.commit()

    def serve(self) -> None:
        """Every tensor from the served ones before it, by plain formulas."""
        h = self.weights["model.embed_tokens.weight"][self.tokens]
        for i in range(self.shape.layers):
            layer = {Tensor.H: h}
            x = self.normed(reals(h), f"model.layers.{i}.input_layernorm.weight")
            for kind in (Tensor.Q, Tensor.K, Tensor.V):
                y = x @ self.weight(i, f"self_attn.{kind.name.lower()}_proj").T
                layer[kind] = self.rounded(y if kind == Tensor.V else self.turned(y))
            layer[Tensor.ATTN_OUT] = self.rounded(self.attention(i, *(reals(layer[k]) for k in (1, 2, 3))))  # type: ignore[index]
            middle = h + layer[Tensor.ATTN_OUT]
            x = self.normed(reals(middle), f"model.layers.{i}.post_attention_layernorm.weight")
            gate, up = (x @ self.weight(i, f"mlp.{name}_proj").T for name in ("gate", "up"))
            layer[Tensor.MLP_OUT] = self.rounded((gate / (1 + np.exp(-gate)) * up) @ self.weight(i, "mlp.down_proj").T)
            h = middle + layer[Tensor.MLP_OUT]
            self.served |= {(i, kind): x for kind, x in layer.items()}
        self.served[self.shape.layers, Tensor.OUT] = h

    def rounded(self, x: Reals) -> torch.Tensor:
        return torch.from_numpy(x).to(TORCH[self.dtype])

    def weight(self, layer: int, name: str) -> Reals:
        return reals(self.weights[f"model.layers.{layer}.{name}.weight"])

    def normed(self, x: Reals, name: str) -> Reals:
        out: Reals = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * reals(self.weights[name])
        return out

    def turned(self, x: Reals) -> Reals:
        """rotate_half of Hugging Face's Llama."""
        hd = self.shape.head_dim
        angle = np.arange(POSITIONS)[:, None] * (10000.0 ** (-np.arange(0, hd, 2) / hd))
        cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
        heads = x.reshape(POSITIONS, -1, hd)
        half = np.concatenate([-heads[..., hd // 2 :], heads[..., : hd // 2]], -1)
        out: Reals = (heads * cos + half * sin).reshape(POSITIONS, -1)
        return out

    def attention(self, layer: int, q: Reals, k: Reals, v: Reals) -> Reals:
        hd, group = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        mask = np.triu(np.full((POSITIONS, POSITIONS), -np.inf), 1)
        heads = []
        for i in range(self.shape.heads):
            mine, theirs = slice(i * hd, (i + 1) * hd), slice(i // group * hd, (i // group + 1) * hd)
            scores = q[:, mine] @ k[:, theirs].T / math.sqrt(hd) + mask
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, theirs])
        return np.concatenate(heads, -1) @ self.weight(layer, "self_attn.o_proj").T

    def commit(self) -> None:
        """Leaves and trees of weights, profile and trace; the model's id fields."""
        shape = self.shape
        self.weight_leaves = [x for p in self.layout.tensors for x in tensor_leaves(self.weights[p.name], False)]
        judged = ProfileCell(1, TOLERANCE[self.dtype], 1 << 10).encode()
        margin = ProfileCell(1, 1, Q30 // 8).encode()
        self.profile_leaves = [judged] * (profile_cells(shape) - 1) + [margin]
        self.trees: dict[Source, tuple[list[bytes], Tree]] = {}
        for source, leaves in (
            (Source.WEIGHT, self.weight_leaves),
            (Source.TABLE, self.program.leaves()),
            (Source.PROFILE, self.profile_leaves),
        ):
            self.trees[source] = (leaves, Tree([leaf(x) for x in leaves]))
        w, p, t = (self.trees[s][1] for s in (Source.WEIGHT, Source.TABLE, Source.PROFILE))
        widths = (shape.layers, shape.hidden, shape.query_width, shape.kv_width, shape.vocabulary)
        sizes = (*widths, shape.max_positions, shape.weight_dtype, shape.served_dtype)
        self.model = Model(w.root, w.count, p.root, p.count, t.root, t.count, *sizes)
        self.leaves = {key: tensor_leaves(x, key[1] == Tensor.V) for key, x in self.served.items()}
        self.tensor_trees = {key: Tree([leaf(x) for x in leaves]) for key, leaves in self.leaves.items()}
        self.trace_trees = [self.trace_tree(0, 1), self.trace_tree(1, 2)]
        self.traces = [Trace(tree.root, POSITIONS, i, i + 1) for i, tree in enumerate(self.trace_trees)]

    def trace_tree(self, first: int, end: int) -> Tree:
        """A stage's tensors; the stage of the last layer adds `out`."""
        keys = [(i, Tensor(kind)) for i in range(first, end) for kind in range(6)]
        keys += [(end, Tensor.OUT)] if end == self.shape.layers else []
        return Tree([leaf(self.tensor_trees[key].root) for key in keys])

    def cell(self, layer: int, position: int, unit: int) -> Cell:
        """Two stages of one layer each."""
        return Cell(layer, position, unit, int(self.tokens[position]), self.traces[layer])

    def open(self, cell: Cell, read: Read, vectors: Sequence[tuple[list[bytes], Tree]]) -> Opening:
        place, source = place_of(self.model, cell, read), read.operand.source
        last = place.first + place.leaves
        more: list[bytes] = []
        if source == Source.STEP:
            leaves, tree = vectors[read.operand.id]
        elif source == Source.SERVED:
            kind = Tensor(read.operand.id)
            layer = self.shape.layers if kind == Tensor.OUT else cell.layer
            leaves, tree = self.leaves[layer, kind], self.tensor_trees[layer, kind]
            more = self.trace_trees[cell.trace.first_layer].prove(tensor_of(self.model, cell, read)[0])
        else:
            leaves, tree = self.trees[Source(source)]
        assert place.count == tree.count
        return Opening(b"".join(leaves[place.first : last]), (*tree.prove(place.first, place.leaves), *more))

    def element(self, cell: Cell, i: Instruction, e: int, vectors: Sequence[tuple[list[bytes], Tree]]) -> int:
        """One element: all its chunks, each from openings, put together."""
        parts, roots = [], read_roots(i, [tree.root for _, tree in vectors])
        for chunk in range(chunk_count(i, cell.position)):
            openings = [self.open(cell, read, vectors) for read in reads_of(self.model, cell, i, e, chunk)]
            parts.append(step(self.model, cell, roots, i, e, chunk, openings))
        return finish(i.op, combine(i.op, parts), i.a)

    def run(self, kind: Kind, cell: Cell) -> list[list[int]]:
        """Every vector of a segment, each step judged from openings of those before it."""
        values: list[list[int]] = []
        vectors: list[tuple[list[bytes], Tree]] = []
        for i in self.program.segments[kind]:
            n = element_count(i, cell.position, cell.unit)
            values.append([self.element(cell, i, e, vectors) for e in range(n)])
            leaves = vector_leaves(values[-1], bool(i.wide))
            vectors.append((leaves, Tree([leaf(x) for x in leaves])))
        return values


@cache
def world(dtype: str) -> World:
    return World(dtype)


# The standard vector that a verdict reads, by kind: its index in the program, the served tensor, columns of a unit.
JUDGED = {
    Kind.Q: (-2, Tensor.Q, 10),
    Kind.K: (-2, Tensor.K, 10),
    Kind.V: (-2, Tensor.V, 10),
    Kind.ATTEND: (-2, Tensor.ATTN_OUT, 256),
    Kind.MLP: (-2, Tensor.MLP_OUT, 256),
}


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("kind", list(JUDGED))
def test_a_segment_computes_what_float64_computes_and_acquits_it(kind: Kind, dtype: str) -> None:
    w = world(dtype)
    index, tensor, wide = JUDGED[kind]
    values = w.run(kind, w.cell(1, 17, 1))
    served = reals(w.served[1, tensor])[17, wide : 2 * wide]
    standard = np.array(values[index]) / Q30
    assert len(standard) == len(served)
    np.testing.assert_allclose(standard, served, rtol=1 / TOLERANCE[dtype], atol=2e-5)
    assert values[-1] == [0]


def test_a_long_softmax_crosses_chunks_and_tiles() -> None:
    w = world("float32")
    t = POSITIONS - 1
    values = w.run(Kind.ATTEND, w.cell(0, t, 1))
    assert padded(t) == 512 and len(values[0]) == 4 * 512
    assert values[0][t + 1 : 512] == values[2][t + 1 : 512] == [0] * (511 - t)
    np.testing.assert_allclose(np.array(values[-2]) / Q30, reals(w.served[0, Tensor.ATTN_OUT])[t, 256:], atol=2e-6)
    assert values[-1] == [0]


@pytest.mark.parametrize("kind", list(JUDGED))
def test_another_served_value_is_convicted(kind: Kind) -> None:
    w = World("bfloat16")
    _, tensor, wide = JUDGED[kind]
    w.served[1, tensor][17, wide] += 0.25
    w.commit()
    assert w.run(kind, w.cell(1, 17, 1))[-1] == [1]
    assert w.run(kind, w.cell(1, 18, 1))[-1] == [0]


@pytest.mark.parametrize("unit", [0, 1])
def test_an_embedding_is_compared_bit_by_bit(unit: int) -> None:
    w = World("bfloat16")
    assert w.run(Kind.EMBED, w.cell(0, 20, unit)) == [[0]]
    w.served[0, Tensor.H].view(torch.int16)[20, 256 * unit + 3] ^= 1
    w.commit()
    assert w.run(Kind.EMBED, w.cell(0, 20, unit)) == [[1]]
    assert w.run(Kind.EMBED, w.cell(0, 21, unit)) == [[0]]


def test_a_token_is_convicted_by_a_better_one_only() -> None:
    w = world("float32")
    logits = w.normed(reals(w.served[2, Tensor.OUT]), "model.norm.weight") @ reals(w.weights["lm_head.weight"]).T
    for served in range(2):
        for other in (1, 2, 8):
            cell = replace(w.cell(1, 40, other), token=served)
            values = w.run(Kind.TOKEN, cell)
            np.testing.assert_allclose(np.array(values[3]) / Q30, logits[40, [served, other]], atol=1e-5)
            assert values[-1] == [int(logits[40, other] - logits[40, served] > 1 / 8)]


def honest(kind: Kind, index: int, element: int = 0, chunk: int = 0) -> tuple[World, Cell, Instruction, list[Opening]]:
    """A step whose reads are all served tensors, weights or tables, with its openings."""
    w = world("bfloat16")
    cell, instruction = w.cell(1, 20, 1), w.program.segments[kind][index]
    reads = reads_of(w.model, cell, instruction, element, chunk)
    return w, cell, instruction, [w.open(cell, read, []) for read in reads]


def refuse(
    error: type[RefereeError], w: World, cell: Cell, i: Instruction, openings: list[Opening], e: int = 0, c: int = 0
) -> None:
    with pytest.raises(error, match="expected"):
        step(w.model, cell, [], i, e, c, openings)


def test_openings_must_be_exact() -> None:
    w, cell, i, (x, y) = honest(Kind.MLP, 0)
    assert isinstance(step(w.model, cell, [], i, 0, 0, [x, y]), int)
    refuse(errors.OpeningCount, w, cell, i, [x])
    refuse(errors.OpeningCount, w, cell, i, [x, y, y])
    refuse(errors.DataLength, w, cell, i, [x, replace(y, data=y.data + b"\0")])
    refuse(errors.DataLength, w, cell, i, [replace(x, data=x.data[:-1]), y])
    refuse(errors.RootMismatch, w, cell, i, [replace(x, data=bytes([x.data[0] ^ 1]) + x.data[1:]), y])
    refuse(errors.RootMismatch, w, cell, i, [y, x])
    refuse(errors.ProofLength, w, cell, i, [x, replace(y, siblings=(*y.siblings, bytes(32)))])
    refuse(errors.ProofLength, w, cell, i, [x, replace(y, siblings=y.siblings[:-1])])
    refuse(errors.ProofLength, w, cell, i, [x, replace(y, siblings=())])


def test_elements_and_chunks_end_where_the_shape_says() -> None:
    w, cell, i, openings = honest(Kind.MLP, 0)
    refuse(errors.ElementOutOfRange, w, cell, i, openings, 260)
    refuse(errors.ChunkOutOfRange, w, cell, i, openings, 0, 1)
    w, cell, i, openings = honest(Kind.Q, 0, 0, 1)
    assert step(w.model, cell, [], i, 0, 1, openings) >= 0
    refuse(errors.ChunkOutOfRange, w, cell, i, openings, 0, 2)
    block = w.program.segments[Kind.MLP][-2]
    assert [element_count(block, 20, u) for u in range(3)] == [256, 4, 0]
    refuse(errors.ElementOutOfRange, w, replace(cell, unit=2), block, [], 0)


def test_a_padding_element_is_0_and_takes_no_opening() -> None:
    w, cell, i, openings = honest(Kind.ATTEND, 0, 256 + 20)
    refuse(errors.OpeningCount, w, cell, i, openings, 256 + 21)
    assert step(w.model, cell, [], i, 256 + 21, 0, []) == 0


def test_what_is_not_held_is_out_of_range() -> None:
    w, cell, i, openings = honest(Kind.ATTEND, 0)
    trace = cell.trace
    refuse(errors.IndexOutOfRange, w, replace(cell, trace=replace(trace, positions=20)), i, openings)
    refuse(errors.IndexOutOfRange, w, replace(cell, layer=0), i, openings)
    refuse(errors.IndexOutOfRange, w, replace(cell, layer=2), i, openings)
    refuse(errors.IndexOutOfRange, w, cell, replace(i, x=replace(i.x, id=6, width=4)), openings)
    refuse(errors.IndexOutOfRange, w, cell, replace(i, x=replace(i.x, id=7)), openings)
    w, cell, i, openings = honest(Kind.EMBED, 0)
    refuse(errors.IndexOutOfRange, w, replace(cell, unit=2), i, openings)
    out_of_table = replace(i, y=replace(i.y, base=w.model.weights_leaves))
    refuse(errors.IndexOutOfRange, w, cell, out_of_table, openings)
    rsqrt = w.program.segments[Kind.Q][1]
    refuse(errors.IndexOutOfRange, w, cell, rsqrt, [Opening(bytes(16), ())])


def test_the_last_v_tile_holds_no_positions_that_were_not_served() -> None:
    w = world("bfloat16")
    verdict = w.program.segments[Kind.V][-1]
    read = reads_of(w.model, w.cell(1, 299, 0), verdict, 0, 0)[1]
    assert place_of(w.model, w.cell(1, 299, 0), read).data_bytes == 4 * 20 * 2
    beyond = w.cell(1, 298, 0)
    with pytest.raises(errors.IndexOutOfRange):
        place_of(w.model, beyond, replace(read, row=300))


def test_ops_and_sources_that_the_law_does_not_know_are_refused() -> None:
    w, cell, i, openings = honest(Kind.MLP, 0)
    refuse(errors.UnknownOp, w, cell, replace(i, op=0), openings)
    refuse(errors.UnknownOp, w, cell, replace(i, op=23), openings)
    for source in (Source.NONE, Source.STEP, Source.WEIGHT, Source.TABLE, 6):
        refuse(errors.UnknownSource, w, cell, replace(i, x=replace(i.x, source=source)), openings)
    with pytest.raises(errors.UnknownSource):
        place_of(w.model, cell, Read(Operand(), 0))


def test_a_sum_of_the_wrong_length_is_out_of_range() -> None:
    w, cell, _, _ = honest(Kind.Q, 0)
    linear = replace(w.program.segments[Kind.Q][3], terms=600)
    assert linear.op == Op.LINEAR and chunk_count(linear, 20) == 3
    refuse(errors.IndexOutOfRange, w, cell, linear, [Opening(b"", ())] * 2, 0, 2)
