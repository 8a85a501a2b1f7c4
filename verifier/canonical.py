"""The standard result of one segment, exactly and fast: what a judge, a challenger and an accused worker compute alike.

A `Case` runs the program's instructions over whole vectors (verifier.vectors), lazily, and proves any of its values:
the openings it gives are those that verifier.referee.referee.step wants.
"""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier import linear, sampling, vectors
from verifier.game import span
from verifier.linear import Bits, Ints
from verifier.program import Kind
from verifier.referee.codec import (
    ALL_POSITIONS,
    GREEDY,
    Cell,
    Instruction,
    Model,
    Opening,
    Operand,
    Source,
    Tensor,
    Trace,
    vector_leaf_bytes,
    vector_leaf_elements,
)
from verifier.referee.errors import ChunkOutOfRange, ElementOutOfRange, UnknownOp, UnknownSource
from verifier.referee.floats import Dtype
from verifier.referee.ops import Op, combine, finish, run
from verifier.referee.referee import Place, Read, chunk_count, chunk_terms, element_count, padded, place_of, reads_of
from verifier.referee.sampling import Draw, draw_list
from verifier.sha256 import HashTree, leaf_hashes
from verifier.sources import Judged, ModelWeights, ProfileCells, ServedTensors
from verifier.trace import tensor_key
from verifier.vectors import Wide

Vector = npt.NDArray[Any]  # int64, or Python integers (object) where the instruction is wide


class Case:
    """The truth about one segment. Nothing is computed before it is asked for; every vector, tree and sum once."""

    def __init__(
        self,
        model: Model,
        weights: ModelWeights,
        profile: ProfileCells,
        segment: Judged,
        trace: ServedTensors,
        token: int = 0,
        sampling_word: bytes = GREEDY,
    ) -> None:
        """token: the served or embedded one; sampling_word: the request's parameters, for SAMPLE."""
        self.model = model
        self.weights = weights
        self.profile = profile
        self.segment = segment
        self.trace = trace
        self.token = token
        self.sampling_word = sampling_word
        self._vectors: dict[int, Vector] = {}
        self._trees: dict[int, HashTree] = {}
        self._sums: dict[tuple[int, int], list[int]] = {}

    # ---- what is judged

    @cached_property
    def cell(self) -> Cell:
        place = (self.segment.layer, self.segment.position, self.segment.unit, self.token)
        return Cell(*place, trace=_header(self.trace), sampling=self.sampling_word)

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        return tuple(self.weights.program.segments[Kind(self.segment.kind)])

    @cached_property
    def first_instruction(self) -> int:
        """Leaf of the first instruction in the program tree."""
        return int(self.weights.program.headers[self.segment.kind].first)

    def record(self, i: int) -> bytes:
        """The 128 bytes of instruction i."""
        return self.instructions[i].encode()

    def record_proof(self, i: int) -> tuple[bytes, ...]:
        """Siblings of instruction i in the program tree."""
        return tuple(self.weights.program.tree.prove(self.first_instruction + i))

    def verdict(self) -> bool:
        """True: the served piece is wrong."""
        return int(self.vector(len(self.instructions) - 1)[0]) == 1

    # ---- vectors and their trees

    def vector(self, i: int) -> Vector:
        """All elements of instruction i: int64 [n], or Python integers if it is wide."""
        if i not in self._vectors:
            self._vectors[i] = self._compute(self.instructions[i])
        return self._vectors[i]

    def leaves(self, i: int) -> int:
        """Leaves of instruction i's vector."""
        instruction = self.instructions[i]
        elements = element_count(instruction, self.cell.position, self.cell.unit)
        return -(-elements // vector_leaf_elements(bool(instruction.wide)))

    def leaf(self, i: int, index: int) -> bytes:
        """Leaf `index` of instruction i's vector."""
        return self._leaves(i, index, 1)

    def tree(self, i: int) -> HashTree:
        if i not in self._trees:
            wide = bool(self.instructions[i].wide)
            data = vectors.encode(self.vector(i), wide)
            self._trees[i] = HashTree(leaf_hashes(data, vector_leaf_bytes(wide)))
        return self._trees[i]

    def steps(self) -> list[bytes]:
        """The roots of all instructions' vectors."""
        return [self.tree(i).root for i in range(len(self.instructions))]

    # ---- sums

    def chunks(self, i: int) -> int:
        """Chunks of the sum that yields each element of instruction i; 1 where it is computed at once."""
        return chunk_count(self.instructions[i], self.cell.position)

    def chunk_sums(self, i: int, e: int) -> list[int]:
        """The results of `run` on every chunk of element e of instruction i."""
        if (i, e) not in self._sums:
            self._sums[i, e] = self._chunk_sums(self.instructions[i], e)
        return self._sums[i, e]

    def sums(self, i: int, e: int, first_chunk: int, end_chunk: int) -> list[int]:
        """The list of partial sums of element e over chunks first_chunk .. end_chunk - 1. Raises ChunkOutOfRange."""
        chunks, step = self.chunk_sums(i, e), span(end_chunk - first_chunk)
        if not 0 <= first_chunk < end_chunk <= len(chunks):
            raise ChunkOutOfRange(f"expected a range within {len(chunks)} chunks, got {first_chunk} .. {end_chunk}")
        starts = range(first_chunk, end_chunk, step)
        return [combine(self.instructions[i].op, chunks[c : min(c + step, end_chunk)]) for c in starts]

    # ---- openings

    def openings(self, i: int, e: int, chunk: int = 0) -> list[Opening]:
        """What `step` wants for one chunk of element e of instruction i. Raises ElementOutOfRange, ChunkOutOfRange."""
        instruction, t = self.instructions[i], self.cell.position
        if not 0 <= e < element_count(instruction, t, self.cell.unit):
            raise ElementOutOfRange(f"expected an element of instruction {i}, got {e}")
        if not 0 <= chunk < self.chunks(i):
            raise ChunkOutOfRange(f"expected a chunk below {self.chunks(i)}, got {chunk}")
        return [self._open(read) for read in reads_of(self.model, self.cell, instruction, e, chunk)]

    def _open(self, read: Read) -> Opening:
        operand = read.operand
        if operand.source == Source.SERVED:
            return self._open_served(read)
        place = place_of(self.model, self.cell, read)
        match operand.source:
            case Source.STEP:
                data = self._leaves(operand.id, place.first, place.leaves)
                return Opening(data, self.tree(operand.id).prove(place.first, place.leaves))
            case Source.WEIGHT:
                data = b"".join(self.weights.leaf(place.first + k) for k in range(place.leaves))
                return Opening(data, tuple(self.weights.prove(place.first, place.leaves)))
            case Source.TABLE:
                return self._open_table(place)
            case Source.PROFILE:
                return Opening(self.profile.leaf(place.first), tuple(self.profile.prove(place.first)))
        raise UnknownSource(f"expected a source from 1 to {len(Source) - 1}, got {operand.source}")

    def _open_served(self, read: Read) -> Opening:
        operand, trace = read.operand, self.trace
        key = tensor_key(self.cell.layer, Tensor(operand.id))
        first = read.first + self.cell.unit * operand.unit_stride
        if read.rows > 1:
            return trace.open_column(key, read.row, read.row + read.rows, first)
        return trace.open_row(key, read.row, first, first + read.count)

    def _open_table(self, place: Place) -> Opening:
        leaves = self.weights.program.leaves()[place.first : place.first + place.leaves]
        return Opening(b"".join(leaves), tuple(self.weights.program.tree.prove(place.first, place.leaves)))

    def _leaves(self, i: int, first: int, count: int) -> bytes:
        wide = bool(self.instructions[i].wide)
        per_leaf = vector_leaf_elements(wide)
        return vectors.encode(self.vector(i)[first * per_leaf : (first + count) * per_leaf], wide)

    # ---- execution

    def _compute(self, ins: Instruction) -> Vector:
        """The whole vector of an instruction. One case an op; the order is that of the law."""
        t, n = self.cell.position, element_count(ins, self.cell.position, self.cell.unit)
        dtype = Dtype(self.model.served_dtype)
        match ins.op:
            case Op.ADD:
                return vectors.add(self._bits(ins.x, n), self._bits(ins.y, n), dtype)
            case Op.SUMSQ:
                return _objects(sum(self._chunk_sums(ins, e)) for e in range(n))
            case Op.RSQRT:
                return _ints(run(ins.op, [self._list(ins.x, 1)], ins.a, ins.b) for _ in range(n))
            case Op.NORM:
                gain = self._weight_rows(ins.z, 0, 1)[0, :n]
                root = int(self._values(ins.y, 1)[0])
                return vectors.norm(self._values(ins.x, n), root, vectors.weights(gain, self._weight_dtype), ins.a)
            case Op.LINEAR:
                x = self._values(ins.x, _term_count(ins, t))
                return linear.linear(x, self._weight_rows(ins.y, 0, n), self._weight_dtype)
            case Op.LOGIT:
                return _ints(finish(ins.op, sum(self._chunk_sums(ins, e)), ins.a) for e in range(n))
            case Op.ROPE:
                return self._rope(ins, n)
            case Op.SCORE:
                return self._score(ins)
            case Op.MAX | Op.SUM:
                terms = _term_count(ins, t)
                row = padded(t) if ins.terms == ALL_POSITIONS else terms
                table = self._values(ins.x, n * row).reshape(n, -1)[:, :terms]
                return np.asarray(table.max(axis=1) if ins.op == Op.MAX else table.sum(axis=1))
            case Op.EXP:
                heads = n // padded(t)
                x = self._values(ins.x, n).reshape(heads, -1)
                out = vectors.exp2(x - self._values(ins.y, heads)[:, None])
                out[:, t + 1 :] = 0
                return out.reshape(-1)
            case Op.WSUM:
                return self._weighted_sum(ins)
            case Op.DIV:
                rows = n // ins.cols
                return vectors.divided(self._values(ins.x, n).reshape(rows, -1), self._values(ins.y, rows)).reshape(-1)
            case Op.GATED:
                return vectors.gated(self._values(ins.x, n), self._values(ins.y, n))
            case Op.VERDICT:
                return _ints([self._verdict(ins)])
            case Op.COMPARE:
                return _ints([run(ins.op, [self._list(ins.x, 2), self._cell(ins.z)], ins.a, ins.b)])
            case Op.SAME:
                return _ints([self._same(ins)])
            case Op.RANK | Op.MASS:
                total = sum(self._chunk_sums(ins, 0))
                return _objects([total]) if ins.wide else _ints([total])
            case Op.STANDING | Op.CHOICE:
                return _ints([self._folded(ins)])
        raise UnknownOp(f"expected an op from 1 to {max(Op)}, got {ins.op}")

    def _rope(self, ins: Instruction, n: int) -> Ints:
        half, t = ins.cols // 2, self.cell.position
        x, table = self._list(ins.x, n), self.weights.program.table
        pairs = [([x[e % half], x[e % half + half]], [table[e % half]], int(e >= half)) for e in range(n)]
        return _ints(run(ins.op, [pair, frequency], t, b) for pair, frequency, b in pairs)

    def _score(self, ins: Instruction) -> Ints:
        t, hd, group = self.cell.position, ins.terms, ins.b
        q = self._values(ins.x, ins.rows * hd).reshape(ins.rows, hd)
        key_heads = -(-ins.rows // group)
        k = self._past(ins.y, t).reshape(t + 1, -1, hd)[:, :key_heads]
        out = np.zeros((ins.rows, padded(t)), dtype=np.int64)
        for g in range(key_heads):
            heads = slice(g * group, (g + 1) * group)
            out[heads, : t + 1] = vectors.score(q[heads], k[:, g], ins.a)
        return out.reshape(-1)

    def _weighted_sum(self, ins: Instruction) -> Wide:
        t, hd, group = self.cell.position, ins.cols, ins.b
        p = self._values(ins.x, ins.rows * padded(t)).reshape(ins.rows, -1)[:, : t + 1]
        v = self._past(ins.y, t).reshape(t + 1, -1, hd)
        parts = [vectors.weighted_sum(p[g : g + group], v[:, g // group]) for g in range(0, ins.rows, group)]
        return np.concatenate(parts).reshape(-1)

    def _verdict(self, ins: Instruction) -> int:
        n = element_count(self.instructions[ins.x.id], self.cell.position, self.cell.unit)
        seen = vectors.checked_served(self._bits(ins.y, n), Dtype(self.model.served_dtype))
        return run(ins.op, [self._list(ins.x, n), [int(v) for v in seen], self._cell(ins.z)], ins.a, ins.b)

    def _same(self, ins: Instruction) -> int:
        """Raw bits of one block."""
        reads = reads_of(self.model, self.cell, ins, 0, 0)
        blocks = [self._raw(read) for read in reads]
        return int(not np.array_equal(blocks[0], blocks[1]))

    def _draw(self) -> list[int]:
        return draw_list(self.cell.sampling, self.cell.position, self.cell.token, self.cell.unit, 0)

    def _folded(self, ins: Instruction) -> int:
        """STANDING and CHOICE: what the folds decide."""
        (y,) = self._list(ins.y, 1)
        draw = self._draw()
        if ins.op == Op.STANDING:
            return run(ins.op, [self._list(ins.x, 1), [y], draw], ins.a, ins.b)
        logits = self.vector(ins.x.id)
        pair = [[int(logits[token])] for token in (self.cell.token, self.cell.unit)]
        return run(ins.op, [*pair, [y], self._cell(ins.z), draw], ins.a, ins.b)

    def _chunk_sums(self, ins: Instruction, e: int) -> list[int]:
        t, terms, size = self.cell.position, _term_count(ins, self.cell.position), chunk_terms(ins)
        match ins.op:
            case Op.SUMSQ:
                x = self._values(ins.x, terms)
                return vectors.chunk_sums(x, x, size)
            case Op.LINEAR | Op.LOGIT:
                row = self.cell.token if ins.op == Op.LOGIT and e == 0 else self.cell.unit if ins.op == Op.LOGIT else e
                w = vectors.weights(self._weight_rows(ins.y, row, 1)[0, :terms], self._weight_dtype)
                return vectors.chunk_sums(self._values(ins.x, terms), w, size)
            case Op.MAX | Op.SUM:
                row = padded(t) if ins.terms == ALL_POSITIONS else terms
                x = self._values(ins.x, (e + 1) * row)[e * row :][:terms]
                parts = [x[c : c + size] for c in range(0, terms, size)]
                return [int(part.max() if ins.op == Op.MAX else part.sum()) for part in parts]
            case Op.WSUM:
                head, column = divmod(e, ins.cols)
                p = self._values(ins.x, (head + 1) * padded(t))[head * padded(t) :][:terms]
                v = self._past(ins.y, t, head // ins.b * ins.cols + column)[:, 0]
                return vectors.chunk_sums(p, v, size)
            case Op.RANK | Op.MASS:
                logits, margin = self._values(ins.x, terms), self._cell(ins.z)[2]
                draw = Draw(*self._draw())
                if ins.op == Op.RANK:
                    return sampling.rank_chunks(logits, margin, draw)
                return sampling.mass_chunks(logits, int(self._values(ins.y, 1)[0]), margin, draw)
        # No long sum: its only chunk is the element itself.
        return [int(self.vector(self.instructions.index(ins))[e])]

    # ---- operands

    @property
    def _weight_dtype(self) -> Dtype:
        return Dtype(self.model.weight_dtype)

    def _values(self, operand: Operand, count: int) -> Vector:
        """The first `count` elements that an operand reads, at the judged position."""
        if operand.source == Source.STEP:
            return self.vector(operand.id)[:count]
        return vectors.served(self._bits(operand, count), Dtype(self.model.served_dtype))

    def _list(self, operand: Operand, count: int) -> list[int]:
        return [int(value) for value in self._values(operand, count)]

    def _bits(self, operand: Operand, count: int) -> Bits:
        first = self.cell.unit * operand.unit_stride
        tensor = self.trace.arrays[tensor_key(self.cell.layer, Tensor(operand.id))]
        return np.asarray(tensor[self.cell.position, first : first + count])

    def _past(self, operand: Operand, t: int, column: int | None = None) -> Ints:
        """Rows 0 .. t of a served tensor, Q30; all columns or one."""
        tensor = self.trace.arrays[tensor_key(self.cell.layer, Tensor(operand.id))]
        columns = slice(None) if column is None else slice(column, column + 1)
        return vectors.served(np.asarray(tensor[: t + 1, columns]), Dtype(self.model.served_dtype))

    def _raw(self, read: Read) -> Bits:
        operand = read.operand
        if operand.source == Source.WEIGHT:
            return self._weight_rows(operand, read.row, 1)[0, read.first : read.first + read.count]
        first = read.first + self.cell.unit * operand.unit_stride
        tensor = self.trace.arrays[tensor_key(self.cell.layer, Tensor(operand.id))]
        return np.asarray(tensor[self.cell.position, first : first + read.count])

    def _weight_rows(self, operand: Operand, first: int, count: int) -> Bits:
        """Raw rows of the judged unit's part of a weight tensor."""
        place, row, _ = self.weights.layout.locate(operand.base + self.cell.layer * operand.layer_stride)
        row += self.cell.unit * operand.unit_stride + first
        return np.asarray(self.weights.raw(place.name)[row : row + count])

    def _cell(self, operand: Operand) -> list[int]:
        """num, den, floor."""
        index = operand.base + self.cell.layer * operand.layer_stride + self.cell.unit * operand.unit_stride
        return list(self.profile.values(index))


def _header(trace: ServedTensors) -> Trace:
    return Trace(trace.tensors_root, trace.positions, trace.first_layer, trace.end_layer)


def _term_count(ins: Instruction, position: int) -> int:
    return position + 1 if ins.terms == ALL_POSITIONS else ins.terms


def _ints(values: Any) -> Ints:
    return np.array(list(values), dtype=np.int64)


def _objects(values: Any) -> Wide:
    return np.array(list(values), dtype=object)
