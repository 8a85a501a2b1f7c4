"""The one-step judge: opens what a step reads, checks it against the committed roots, computes ("Openings").

Every step has the same beats: plan its reads, read and check each opening, compute. Nothing is taken from the caller
that the model, the cell or the instruction implies.

Rationale: longer than a sitting, because it is one argument: what a step reads, and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from verifier.referee.codec import (
    ALL_POSITIONS,
    BLOCK,
    FOLD,
    TABLE_LEAF,
    TILE_COLUMNS,
    TILE_ROWS,
    Cell,
    Instruction,
    Model,
    Opening,
    Operand,
    ProfileCell,
    Source,
    Tensor,
    decode_vector,
    slices,
    vector_leaf_elements,
)
from verifier.referee.errors import (
    ChunkOutOfRange,
    DataLength,
    ElementOutOfRange,
    IndexOutOfRange,
    OpeningCount,
    RootMismatch,
    UnknownOp,
    UnknownSource,
)
from verifier.referee.floats import Dtype, decode_served, decode_weight, valid
from verifier.referee.ops import SAMPLED, Op, run
from verifier.referee.sampling import draw_list
from verifier.referee.tree import leaf, root_of_range, root_of_range_used


class View(IntEnum):
    """How an op sees the floats it reads."""

    VALUE = 0  # decoded, invalid ones as 0
    CHECKED = 1  # decoded, invalid ones as INVALID
    RAW = 2  # bits


@dataclass(frozen=True)
class Read:
    """One operand's part of a step: columns first .. first + count - 1 of `row`, or one column of `rows` rows.

    row is a position (SERVED) or a tensor's row (WEIGHT), before the unit's stride; the other sources have none.
    """

    operand: Operand
    first: int
    count: int = 1
    row: int = 0
    rows: int = 1
    view: View = View.VALUE
    ends: bool = False  # only the first and the last element of the range are used


def step(
    model: Model,
    cell: Cell,
    steps: Sequence[bytes],
    instruction: Instruction,
    element: int,
    chunk: int,
    openings: Sequence[Opening],
) -> int:
    """`run` of one chunk of an element (chunk 0 where the instruction is no long sum), before `finish`.

    steps: the 32-byte roots of the vectors that it reads, in the order of its operands. Raises a RefereeError.
    """
    elements = element_count(instruction, cell.position, cell.unit)
    if not 0 <= element < elements:
        raise ElementOutOfRange(f"expected an element below {elements}, got {element}")
    chunks = chunk_count(instruction, cell.position)
    if not 0 <= chunk < chunks:
        raise ChunkOutOfRange(f"expected a chunk below {chunks}, got {chunk}")
    reads = reads_of(model, cell, _numbered(instruction), element, chunk)
    if len(openings) != len(reads):
        raise OpeningCount(f"expected {len(reads)} openings, got {len(openings)}")
    if not reads:
        return 0
    args = [_open(model, cell, steps, read, opening) for read, opening in zip(reads, openings, strict=True)]
    if instruction.op in SAMPLED:
        args.append(draw_list(cell.sampling, cell.position, cell.token, cell.unit, FOLD * chunk))
    if instruction.op == Op.ROPE:
        return run(instruction.op, args, cell.position, int(element >= instruction.cols // 2))
    return run(instruction.op, args, instruction.a, instruction.b)


def _numbered(instruction: Instruction) -> Instruction:
    """The operands that read a vector name its root's place in the proof."""
    operands: list[Operand] = []
    for operand in (instruction.x, instruction.y, instruction.z):
        place = sum(before.source == Source.STEP for before in operands)
        operands.append(replace(operand, id=place) if operand.source == Source.STEP else operand)
    x, y, z = operands
    return replace(instruction, x=x, y=y, z=z)


def padded(position: int) -> int:
    """P: the positions 0 .. position, filled up to whole chunks."""
    return BLOCK * (position // BLOCK + 1)


def element_count(instruction: Instruction, position: int, unit: int) -> int:
    """Elements of an instruction's vector."""
    return _elements(instruction.rows, instruction.cols, instruction.limit, position, unit)


def chunk_count(instruction: Instruction, position: int, element: int = 0) -> int:
    """Chunks of an element's sum: 1 for a step that is computed at once. The same for every element."""
    size = chunk_terms(instruction)
    return max(1, -(-_terms(instruction, position) // size))


def _elements(rows: int, cols: int, limit: int, position: int, unit: int) -> int:
    if cols == 0:
        return rows * padded(position)
    if limit > 0:
        return rows * max(0, min(cols, limit - unit * cols))
    return rows * cols


def _terms(instruction: Instruction, position: int) -> int:
    return position + 1 if instruction.terms == ALL_POSITIONS else instruction.terms


def chunk_terms(instruction: Instruction) -> int:
    """Terms of one chunk of an instruction's sums."""
    sizes: dict[int, int] = {Op.WSUM: TILE_ROWS, Op.RANK: FOLD, Op.MASS: FOLD}
    return sizes.get(instruction.op, BLOCK)


def reads_of(model: Model, cell: Cell, instruction: Instruction, element: int, chunk: int) -> list[Read]:
    """What chunk `chunk` of element `element` reads, one Read for each opening; none for a padding element.

    Raises UnknownOp and UnknownSource.
    """
    t, e, u, cols = cell.position, element, cell.unit, instruction.cols
    x, y, z = instruction.x, instruction.y, instruction.z
    size = chunk_terms(instruction)
    start = size * chunk
    count = min(size, _terms(instruction, t) - start)
    head, place = divmod(e, padded(t))

    match instruction.op:
        case Op.ADD:
            reads = [Read(x, e, row=t, view=View.RAW), Read(y, e, row=t, view=View.RAW)]
        case Op.SUMSQ:
            reads = [Read(x, start, count, row=t)]
        case Op.RSQRT:
            reads = [Read(x, 0)]
        case Op.NORM:
            reads = [Read(x, e, row=t), Read(y, 0), Read(z, e)]
        case Op.LINEAR:
            reads = [Read(x, start, count), Read(y, start, count, row=e)]
        case Op.ROPE:
            half = cols // 2
            reads = [Read(x, e % half, half + 1, ends=True), Read(y, e % half)]
        case Op.SCORE:
            if place > t:
                return []
            reads = [Read(x, head * count, count, row=t), Read(y, head // instruction.b * count, count, row=place)]
        case Op.MAX | Op.SUM:
            reads = [Read(x, e * padded(t) + start, count)]
        case Op.EXP:
            if place > t:
                return []
            reads = [Read(x, e), Read(y, head)]
        case Op.WSUM:
            head, column = divmod(e, cols)
            column += head // instruction.b * cols
            reads = [Read(x, head * padded(t) + start, count), Read(y, column, row=start, rows=count)]
        case Op.DIV:
            reads = [Read(x, e), Read(y, e // cols)]
        case Op.GATED:
            reads = [Read(x, e), Read(y, e)]
        case Op.VERDICT:
            n = _vector_elements(cell, x)
            reads = [Read(x, 0, n), Read(y, 0, n, row=t, view=View.CHECKED), Read(z, 0)]
        case Op.LOGIT:
            reads = [Read(x, start, count), Read(y, start, count, row=u if e else cell.token)]
        case Op.COMPARE:
            reads = [Read(x, 0, 2, ends=True), Read(z, 0)]
        case Op.SAME:
            block = u * x.unit_stride
            n = min(BLOCK, x.width - block)
            reads = [Read(x, 0, n, row=t, view=View.RAW), Read(y, block, n, row=cell.token, view=View.RAW)]
        case Op.RANK:
            reads = [Read(x, start, count), Read(x, u), Read(z, 0)]
        case Op.MASS:
            reads = [Read(x, start, count), Read(x, u), Read(y, 0), Read(z, 0)]
        case Op.STANDING:
            reads = [Read(x, 0), Read(y, 0)]
        case Op.CHOICE:
            reads = [Read(x, cell.token), Read(x, u), Read(y, 0), Read(z, 0)]
        case _:
            raise UnknownOp(f"expected an op from 1 to {max(Op)}, got {instruction.op}")
    for read, allowed in zip(reads, _SOURCES[Op(instruction.op)], strict=True):
        if read.operand.source not in allowed:
            raise UnknownSource(f"expected one of {allowed} for op {instruction.op}, got {read.operand.source}")
    return reads


_STEP, _SERVED, _WEIGHT = (Source.STEP,), (Source.SERVED,), (Source.WEIGHT,)
_TABLE, _PROFILE, _EITHER = (Source.TABLE,), (Source.PROFILE,), (Source.STEP, Source.SERVED)

_SOURCES: dict[Op, tuple[tuple[Source, ...], ...]] = {
    Op.ADD: (_SERVED, _SERVED),
    Op.SUMSQ: (_EITHER,),
    Op.RSQRT: (_STEP,),
    Op.NORM: (_EITHER, _STEP, _WEIGHT),
    Op.LINEAR: (_STEP, _WEIGHT),
    Op.ROPE: (_STEP, _TABLE),
    Op.SCORE: (_SERVED, _SERVED),
    Op.MAX: (_STEP,),
    Op.EXP: (_STEP, _STEP),
    Op.SUM: (_STEP,),
    Op.WSUM: (_STEP, _SERVED),
    Op.DIV: (_STEP, _STEP),
    Op.GATED: (_STEP, _STEP),
    Op.VERDICT: (_STEP, _SERVED, _PROFILE),
    Op.LOGIT: (_STEP, _WEIGHT),
    Op.COMPARE: (_STEP, _PROFILE),
    Op.SAME: (_SERVED, _WEIGHT),
    Op.RANK: (_STEP, _STEP, _PROFILE),
    Op.MASS: (_STEP, _STEP, _STEP, _PROFILE),
    Op.STANDING: (_STEP, _STEP),
    Op.CHOICE: (_STEP, _STEP, _STEP, _PROFILE),
}
# What an op reads from a place that it was not made for has no meaning in the law, so no program may ask for it.


@dataclass(frozen=True)
class Place:
    """Where a read's leaves lie: `leaves` of them from leaf `first` of a tree of `count`."""

    first: int
    leaves: int
    count: int
    leaf_bytes: int  # of each leaf but the last
    data_bytes: int
    elements: tuple[int, ...]  # the indices of the read's elements in the data


def place_of(model: Model, cell: Cell, read: Read) -> Place:
    """Where a read's leaves lie in its tree. Raises IndexOutOfRange for what the vector or tensor does not hold."""
    operand, u, first, last = read.operand, cell.unit, read.first, read.first + read.count - 1
    match operand.source:
        case Source.STEP:
            wide = bool(operand.layer_stride)
            length, full = _vector_elements(cell, operand), vector_leaf_elements(wide)
            return _row_place(0, 0, first, last, length, full, 16 if wide else 8, 1)
        case Source.SERVED:
            trace = cell.trace
            size = Dtype(model.served_dtype).size
            _within(read.row, read.row + read.rows - 1, trace.positions)
            first, last = first + u * operand.unit_stride, last + u * operand.unit_stride
            if operand.id == Tensor.V:
                return _tile_place(read, first, last, trace.positions, size)
            return _row_place(0, read.row, first, last, operand.width, BLOCK, size, trace.positions)
        case Source.WEIGHT:
            size = Dtype(model.weight_dtype).size
            base = operand.base + cell.layer * operand.layer_stride
            row = read.row + u * operand.unit_stride
            place = _row_place(base, row, first, last, operand.width, BLOCK, size, 1)
            return replace(place, count=model.weights_leaves)
        case Source.TABLE:
            place = _row_place(operand.base, 0, first, last, operand.width, TABLE_LEAF, 8, 1)
            return replace(place, count=model.program_leaves)
        case Source.PROFILE:
            index = operand.base + cell.layer * operand.layer_stride + u * operand.unit_stride
            return Place(index, 1, model.profile_leaves, 16, 16, (0,))
        case _:
            raise UnknownSource(f"expected a source from 1 to {len(Source) - 1}, got {operand.source}")


def tensor_of(model: Model, cell: Cell, read: Read) -> tuple[int, int]:
    """The index of a SERVED read's tensor in its trace's tree, and how many lie there. Raises IndexOutOfRange."""
    trace = cell.trace
    kind, tensors = read.operand.id, 6 * (trace.end_layer - trace.first_layer)
    last = trace.end_layer == model.layers
    if kind == Tensor.OUT and last:
        return tensors, tensors + 1
    if kind >= Tensor.OUT or not trace.first_layer <= cell.layer < trace.end_layer:
        held = f"layers {trace.first_layer} .. {trace.end_layer - 1}"
        raise IndexOutOfRange(f"expected a tensor of {held}, got kind {kind} of layer {cell.layer}")
    return 6 * (cell.layer - trace.first_layer) + kind, tensors + last


def _open(model: Model, cell: Cell, steps: Sequence[bytes], read: Read, opening: Opening) -> list[int]:
    """The integers of one read, once its opening is checked."""
    place = place_of(model, cell, read)
    operand, siblings = read.operand, opening.siblings
    if len(opening.data) != place.data_bytes:
        raise DataLength(f"expected {place.data_bytes} bytes, got {len(opening.data)}")
    hashes = [leaf(data) for data in slices(opening.data, place.leaf_bytes)]
    if operand.source == Source.SERVED:
        index, count = tensor_of(model, cell, read)
        top, used = root_of_range_used(hashes, place.first, place.count, siblings)
        _check_root(root_of_range([leaf(top)], index, count, siblings[used:]), cell.trace.root)
    else:
        _check_root(root_of_range(hashes, place.first, place.count, siblings), _root(model, steps, operand))
    values = _values(model, read, opening.data)
    if operand.source == Source.PROFILE:
        return values
    picked = [values[i] for i in place.elements]
    return [picked[0], picked[-1]] if read.ends else picked


def _root(model: Model, steps: Sequence[bytes], operand: Operand) -> bytes:
    """The committed root that an operand other than SERVED reads under. Raises IndexOutOfRange."""
    match operand.source:
        case Source.WEIGHT:
            return model.weights_root
        case Source.TABLE:
            return model.program_root
        case Source.PROFILE:
            return model.profile_root
    if operand.id >= len(steps):
        raise IndexOutOfRange(f"expected a step below {len(steps)}, got {operand.id}")
    return steps[operand.id]


def _values(model: Model, read: Read, data: bytes) -> list[int]:
    """All integers of an opening's data, as the op sees them."""
    match read.operand.source:
        case Source.STEP:
            return decode_vector(data, bool(read.operand.layer_stride))
        case Source.TABLE:
            return [int.from_bytes(word, "big") for word in slices(data, 8)]
        case Source.PROFILE:
            cell = ProfileCell.decode(data)
            return [cell.num, cell.den, cell.floor]
    served = read.operand.source == Source.SERVED
    dtype = Dtype(model.served_dtype if served else model.weight_dtype)
    bits = [int.from_bytes(element, "little") for element in slices(data, dtype.size)]
    if read.view == View.RAW:
        return bits
    decoded = [decode_served(v, dtype) if served else decode_weight(v, dtype) for v in bits]
    return decoded if read.view == View.CHECKED else [valid(v) for v in decoded]


def _vector_elements(cell: Cell, operand: Operand) -> int:
    """Elements of the vector that a STEP operand names."""
    return _elements(operand.base, operand.width, operand.unit_stride, cell.position, cell.unit)


def _row_place(
    base: int, row: int, first: int, last: int, width: int, leaf_elements: int, size: int, rows: int
) -> Place:
    """Columns first .. last of a row whose leaves never cross its end, in a tree whose row 0 starts at leaf `base`."""
    _within(first, last, width)
    a_row = -(-width // leaf_elements)
    head, tail = first // leaf_elements, last // leaf_elements
    held = min((tail + 1) * leaf_elements, width) - head * leaf_elements
    skip = first - head * leaf_elements
    elements = tuple(range(skip, skip + last - first + 1))
    return Place(base + row * a_row + head, tail - head + 1, rows * a_row, leaf_elements * size, held * size, elements)


def _tile_place(read: Read, first: int, last: int, positions: int, size: int) -> Place:
    """Columns first .. last of v at one position, or one column at read.rows positions of a tile."""
    width, row = read.operand.width, read.row
    _within(first, last, width)
    head, tail, band = first // TILE_COLUMNS, last // TILE_COLUMNS, row // TILE_ROWS
    _within(row % TILE_ROWS + read.rows - 1, row % TILE_ROWS + read.rows - 1, TILE_ROWS)
    a_band = -(-width // TILE_COLUMNS)
    tall = min(TILE_ROWS, positions - TILE_ROWS * band)
    held = min((tail + 1) * TILE_COLUMNS, width) - head * TILE_COLUMNS

    def index(position: int, column: int) -> int:
        tile = column // TILE_COLUMNS
        wide = min(TILE_COLUMNS, width - TILE_COLUMNS * tile)
        return (tile - head) * TILE_COLUMNS * tall + position % TILE_ROWS * wide + column % TILE_COLUMNS

    elements = tuple(index(r, c) for r in range(row, row + read.rows) for c in range(first, last + 1))
    full, data = tall * TILE_COLUMNS * size, tall * held * size
    return Place(band * a_band + head, tail - head + 1, -(-positions // TILE_ROWS) * a_band, full, data, elements)


def _within(first: int, last: int, count: int) -> None:
    if not 0 <= first <= last < count:
        raise IndexOutOfRange(f"expected a range within {count}, got {first} .. {last}")


def _check_root(computed: bytes, committed: bytes) -> None:
    if computed != committed:
        raise RootMismatch(f"expected {committed.hex()}, got {computed.hex()}")
