"""Whole steps: openings of small random models, honest and tampered, judged by the Python twin and by the EVM alike."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest

from tests.twin.evm import Answer, Contract, Refusal
from verifier.game import read_roots
from verifier.program import Kind, ModelShape, Program, WeightLayout, build_program, profile_cells
from verifier.referee import referee as judge
from verifier.referee.codec import (
    BLOCK,
    TILE_COLUMNS,
    TILE_ROWS,
    Cell,
    Instruction,
    Model,
    Opening,
    ProfileCell,
    Request,
    Source,
    Tensor,
    Trace,
    slices,
    vector_leaves,
)
from verifier.referee.errors import RefereeError
from verifier.referee.floats import Dtype
from verifier.referee.ops import Op
from verifier.referee.tree import Tree, leaf
from verifier.rope import Rope

SEED = 20
_POOL = 20_011  # more than any row of weights, so that rows differ
ELEMENTS = 3  # tried of each instruction, beside its first and last


NO_PROGRAM = Refusal("Panic")
# What the Python twin says of a program that divides by zero. The EVM refuses it too, if need be by another name.


@dataclass(frozen=True)
class Step:
    """The arguments of one step."""

    model: Model
    cell: Cell
    steps: tuple[bytes, ...]
    instruction: Instruction
    element: int
    chunk: int
    openings: tuple[Opening, ...]

    def words(self) -> tuple[Any, ...]:
        """As the ABI wants them."""
        openings = [(o.data, list(o.siblings)) for o in self.openings]
        model, cell = dataclasses.astuple(self.model), dataclasses.astuple(self.cell)
        no_pieces: list[bytes] = []
        proof = (model, self.instruction.encode(), 0, b"", no_pieces, list(self.steps), openings)
        return (cell, self.element, self.chunk, proof)

    def judged(self) -> Answer:
        """By the Python twin."""
        arguments = [getattr(self, field.name) for field in dataclasses.fields(self)]
        try:
            return judge.step(*arguments)
        except RefereeError as error:
            return Refusal(type(error).__name__)
        except ZeroDivisionError:
            return NO_PROGRAM


def grown(data: Sequence[bytes]) -> Tree:
    return Tree([leaf(each) for each in data])


@dataclass(frozen=True)
class Served:
    """One stage's served tensors: the leaves of each and the trees."""

    leaves: list[list[bytes]]
    tensors: list[Tree]
    tree: Tree
    trace: Trace


class World:
    """A model with random weights and two stages of random served tensors: layer 0, and layer 1 with `out`."""

    def __init__(self, dtype: Dtype, positions: int, tied: bool) -> None:
        self.random = random.Random(SEED + dtype + positions)
        self.dtype = dtype
        self.pool = self.drawn(_POOL)
        self.shape = ModelShape(
            layers=2,
            hidden=300,
            intermediate=270,
            heads=4,
            kv_heads=2,
            head_dim=10,
            vocabulary=9,
            max_positions=512,
            rms_eps=Decimal("0.00001"),
            rope=Rope(Decimal(10000)),
            tied=tied,
            weight_dtype=dtype,
            served_dtype=dtype,
        )
        self.program: Program = build_program(self.shape)
        self.weights = [
            part
            for place in WeightLayout(self.shape).tensors
            for _ in range(place.rows)
            for part in slices(self.floats(place.cols), BLOCK * dtype.size)
        ]
        cells = range(profile_cells(self.shape))
        self.profile = [ProfileCell(self.random.getrandbits(32), 1 << 20, 1 << 40).encode() for _ in cells]
        self.weights_tree, self.profile_tree = grown(self.weights), grown(self.profile)
        self.stages = [self.stage(0, 1, positions), self.stage(1, 2, positions)]
        self.model = Model(
            weights_root=self.weights_tree.root,
            weights_leaves=len(self.weights),
            program_root=self.program.root(),
            program_leaves=len(self.program.leaves()),
            profile_root=self.profile_tree.root,
            profile_leaves=len(self.profile),
            layers=2,
            hidden=self.shape.hidden,
            query_width=self.shape.query_width,
            kv_width=self.shape.kv_width,
            vocabulary=self.shape.vocabulary,
            max_positions=self.shape.max_positions,
            weight_dtype=dtype,
            served_dtype=dtype,
        )

    def floats(self, count: int) -> bytes:
        """Raw bits: a run of some thousand prepared ones."""
        start = self.random.randrange(_POOL - count)
        return self.pool[start * self.dtype.size : (start + count) * self.dtype.size]

    def drawn(self, count: int) -> bytes:
        """Raw bits, mostly of ordinary size."""
        source, dtype = self.random, self.dtype
        top = (1 << dtype.exponent_bits) - 1
        out = bytearray()
        for _ in range(count):
            near = source.randint(dtype.bias - 9, dtype.bias + 4)
            exponent = near if source.random() < 0.97 else source.randint(0, top)
            bits = exponent << dtype.mantissa_bits | source.getrandbits(dtype.mantissa_bits)
            out += (bits | (dtype.sign if source.random() < 0.5 else 0)).to_bytes(dtype.size, "little")
        return bytes(out)

    def stage(self, first: int, end: int, positions: int) -> Served:
        shape, size = self.shape, self.dtype.size
        d, q, kv = shape.hidden, shape.query_width, shape.kv_width
        widths = [d, q, kv, kv, d, d] * (end - first) + ([d] if end == shape.layers else [])
        leaves = []
        for kind, width in enumerate(widths):
            rows = [self.floats(width) for _ in range(positions)]
            if kind % 6 == Tensor.V and kind < 6 * (end - first):
                leaves.append(
                    [
                        b"".join(row[c * size : (c + TILE_COLUMNS) * size] for row in rows[t : t + TILE_ROWS])
                        for t in range(0, positions, TILE_ROWS)
                        for c in range(0, width, TILE_COLUMNS)
                    ]
                )
            else:
                leaves.append([part for row in rows for part in slices(row, BLOCK * size)])
        tensors = [grown(each) for each in leaves]
        tree = grown([tensor.root for tensor in tensors])
        return Served(leaves, tensors, tree, Trace(tree.root, positions, first, end))

    def cell(self, layer: int, position: int, unit: int, token: int) -> Cell:
        request = Request(
            7, 1, 1, self.random.getrandbits(64), (), bytes(32), 1 << 14, 3, self.random.choice((9000, 1 << 16))
        )
        return Cell(layer, position, unit, token, self.stages[layer].trace, request.sampling())

    def vectors(self, instructions: Sequence[Instruction], cell: Cell) -> list[list[bytes]]:
        """The leaves of a random vector for each instruction."""
        out = []
        for i in instructions:
            count = judge.element_count(i, cell.position, cell.unit)
            width = self.random.choice((20, 36, 50, 63)) if not i.wide else 100
            values = [self.random.randint(-(1 << width), 1 << width) for _ in range(count)]
            if i.op in (Op.EXP, Op.SUM, Op.RSQRT, Op.MAX):
                values = [abs(v) for v in values]
            out.append(vector_leaves(values, bool(i.wide)))
        return out

    def opening(self, cell: Cell, vectors: list[list[bytes]], read: judge.Read) -> Opening:
        place = judge.place_of(self.model, cell, read)
        first, n = place.first, place.leaves
        match read.operand.source:
            case Source.STEP:
                leaves, tree = vectors[read.operand.id], grown(vectors[read.operand.id])
            case Source.WEIGHT:
                leaves, tree = self.weights, self.weights_tree
            case Source.TABLE:
                leaves, tree = self.program.leaves(), self.program.tree
            case Source.PROFILE:
                leaves, tree = self.profile, self.profile_tree
            case _:
                stage = self.stages[cell.trace.first_layer]
                index, _ = judge.tensor_of(self.model, cell, read)
                siblings = (*stage.tensors[index].prove(first, n), *stage.tree.prove(index))
                return Opening(b"".join(stage.leaves[index][first : first + n]), siblings)
        return Opening(b"".join(leaves[first : first + n]), tuple(tree.prove(first, n)))

    def steps(self) -> Iterator[Step]:
        """Some elements and chunks of every instruction of every segment kind, honestly opened."""
        positions = self.stages[0].trace.positions
        for kind, instructions in self.program.segments.items():
            for layer in (0, 1):
                if (kind == Kind.EMBED and layer == 1) or (kind in (Kind.TOKEN, Kind.SAMPLE) and layer == 0):
                    continue
                t = self.random.choice((0, 15, positions - 2, positions - 1))
                units = self.program.units[kind]
                cell = self.cell(layer, t, self.random.choice((0, units - 1)), self.random.randrange(9))
                vectors = self.vectors(instructions, cell)
                roots = tuple(grown(v).root for v in vectors)
                for i in instructions:
                    count, chunks = judge.element_count(i, t, cell.unit), judge.chunk_count(i, t)
                    some = {0, count - 1, *(self.random.randrange(count) for _ in range(ELEMENTS))}
                    if i.cols == 0:
                        some.add(min(t, count - 1))
                    for element in sorted(some):
                        chunk = self.random.choice((0, chunks - 1))
                        reads = judge.reads_of(self.model, cell, i, element, chunk)
                        openings = tuple(self.opening(cell, vectors, read) for read in reads)
                        yield Step(self.model, cell, tuple(read_roots(i, roots)), i, element, chunk, openings)


WORLDS = [
    (Dtype.BFLOAT16, 20, False),
    (Dtype.BFLOAT16, 275, True),
    (Dtype.FLOAT16, 33, False),
    (Dtype.FLOAT32, 17, True),
]


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [World(*world) for world in WORLDS]


@pytest.fixture(scope="module")
def honest(worlds: list[World]) -> list[Step]:
    return [step for world in worlds for step in world.steps()]


def alike(expected: Answer, answer: Answer) -> bool:
    return expected == answer or (expected == NO_PROGRAM and isinstance(answer, Refusal))


def same(referee: Contract, steps: Sequence[Step]) -> list[Answer]:
    """Requires both twins to give the same answers, and returns them."""
    expected = [step.judged() for step in steps]
    answers = referee.calls("judge", [step.words() for step in steps])
    wrong = [(s, e, a) for s, e, a in zip(steps, expected, answers, strict=True) if not alike(e, a)]
    for step, expect, answer in wrong[:3]:
        where = f"{Op(step.instruction.op).name if 0 < step.instruction.op < 19 else step.instruction.op}"
        print(f"{where} element {step.element} chunk {step.chunk}: Python {expect}, EVM {answer}")
    assert not wrong
    return answers


def test_honest_openings_give_the_same_value(referee: Contract, honest: list[Step]) -> None:
    answers = same(referee, honest)
    assert not [answer for answer in answers if isinstance(answer, Refusal)]
    assert {step.instruction.op for step in honest} == set(Op), "every op is stepped"
    assert len(set(answers)) > len(answers) // 4, "the values are not all alike"


def tampered(step: Step, source: random.Random) -> Step:
    """One thing wrong with the arguments."""
    openings = list(step.openings)
    kinds = ["drop", "extra", "element", "chunk", "op", "source", "instruction", "roots", "layer", "position", "unit"]
    if openings:
        kinds += ["byte", "short", "long", "empty", "sibling", "fewer", "more", "swap"] * 2
    kind = source.choice(kinds)
    i = step.instruction
    at = source.randrange(len(openings)) if openings else 0
    if openings:
        data, siblings = openings[at].data, list(openings[at].siblings)
    match kind:
        case "byte":
            place = source.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << source.randrange(8)]) + data[place + 1 :]
        case "short":
            data = data[: -source.randint(1, min(len(data), 20))]
        case "long":
            data += bytes(source.randint(1, 20))
        case "empty":
            data = b""
        case "sibling" if siblings:
            place = source.randrange(len(siblings))
            siblings[place] = source.randbytes(32)
        case "fewer":
            siblings = siblings[:-1]
        case "more":
            siblings = [*siblings, bytes(32)]
        case "swap":
            openings[0], openings[at] = openings[at], openings[0]
            return replace(step, openings=tuple(openings))
        case "drop":
            return replace(step, openings=step.openings[:-1])
        case "extra":
            return replace(step, openings=(*step.openings, Opening(b"", ())))
        case "element":
            count = judge.element_count(i, step.cell.position, step.cell.unit)
            return replace(step, element=source.choice((count, count + 1, (1 << 64) - 1, source.randrange(count))))
        case "chunk":
            return replace(step, chunk=source.choice((1, 2, (1 << 32) - 1)))
        case "op":
            return replace(step, instruction=replace(i, op=source.choice((0, 19, 255, source.randint(1, 18)))))
        case "source":
            name = source.choice(("x", "y", "z"))
            operand = replace(getattr(i, name), source=source.randint(0, 7))
            return replace(step, instruction=replace(i, **{name: operand}))
        case "instruction":
            return replace(step, instruction=changed(i, source))
        case "roots":
            return replace(step, steps=step.steps[:-1])
        case "layer" | "position" | "unit":
            value = source.choice((0, 1, 2, 3, 18, 300))
            spot = {"layer": step.cell.layer, "position": step.cell.position, "unit": step.cell.unit} | {kind: value}
            fields: dict[str, Any] = spot
            return replace(step, cell=replace(step.cell, **fields))
    if openings:
        openings[at] = Opening(data, tuple(siblings))
    return replace(step, openings=tuple(openings))


def changed(i: Instruction, source: random.Random) -> Instruction:
    """One field of an instruction or of an operand changed."""
    value = source.choice((1, 2, 7, 64, 255, 256, 257, 301))
    if source.random() < 0.4:
        numbers: dict[str, Any] = {source.choice(("rows", "cols", "limit", "terms", "b")): value}
        return replace(i, **numbers)
    name = source.choice(("x", "y", "z"))
    field = source.choice(("id", "base", "layer_stride", "unit_stride", "width"))
    operand = replace(getattr(i, name), **{field: value % 8 if field == "id" else value})
    operands: dict[str, Any] = {name: operand}
    return replace(i, **operands)


def test_tampered_openings_are_refused_alike(referee: Contract, honest: list[Step]) -> None:
    source = random.Random(SEED)
    answers = same(referee, [tampered(step, source) for step in honest for _ in range(3)])
    refusals = {answer.name for answer in answers if isinstance(answer, Refusal)}
    expected = {
        "ChunkOutOfRange",
        "DataLength",
        "ElementOutOfRange",
        "IndexOutOfRange",
        "OpeningCount",
        "ProofLength",
        "RootMismatch",
        "UnknownOp",
        "UnknownSource",
    }
    assert expected <= refusals, "every error but OperandShape, which no reading leads to"
