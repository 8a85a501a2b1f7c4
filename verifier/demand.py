"""Demands for withheld data: what may be asked for, what answers it, what it costs (docs/protocol.md, "Demands").

The twin of contracts/src/Demands.sol and contracts/src/demands/Grid.sol. A challenger reads answers with it before it
believes them, a worker makes them with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from verifier.referee import codec
from verifier.referee.codec import BLOCK, TILE_COLUMNS, TILE_ROWS, TOKENS_A_LEAF, Model, Opening, Tensor
from verifier.referee.errors import DataLength, OpeningCount, ProofLength, RootMismatch
from verifier.referee.floats import Dtype
from verifier.referee.tree import Tree, leaf, root_of_range, root_of_range_used

if TYPE_CHECKING:  # Rationale: reading answers needs no tensors
    from verifier.trace import RequestTrace

MAX_ANSWER_BYTES = 64 * 1024
MAX_ANSWER_LEAVES = 2048
ANSWER_GAS = 250_000
LEAF_GAS = 2_000
BYTE_GAS = 40
DOUBLING_GAS = 10_000_000
MAX_DOUBLINGS = 100
LAYER_TENSORS = 6
ROOT_BYTES = 32


class Wanted(IntEnum):
    """What a demand may ask for; `kind` of Demand."""

    PROMPT = 0
    OUTPUT = 1
    TENSORS = 2
    LEAVES = 3


@dataclass(frozen=True)
class Demand:
    """One range of leaves of one committed tree; field for field the struct of contracts/src/interfaces/IDemands.sol.

    first, count: leaves; those beyond the tree's end need no answer. tensor: place among the request's tensors at this
    stage (LEAVES), else 0.
    """

    job: bytes
    stage: int
    kind: int
    request: int
    tensor: int
    first: int
    count: int


@dataclass(frozen=True)
class Demanded:
    """A demand's whole state. Times in unix seconds, money in base units."""

    demand: Demand
    demander: str
    opened_at: int
    deadline: int
    pay: int
    burned: int


class DemandError(ValueError):
    """The contract would refuse it. The classes bear the names that it reverts with.

    DemandError
      WrongDemand WrongRecord
    besides those of verifier.referee.errors: OpeningCount, DataLength, ProofLength, RootMismatch.
    """


class WrongDemand(DemandError):
    """No tree of the job has what is asked for."""


class WrongRecord(DemandError):
    """The record is another request's."""


@dataclass(frozen=True)
class Grid:
    """The leaves of a tree as tiles of a table, row by row of tiles, those at the lower and right edge smaller."""

    rows: int
    width: int
    tall: int
    wide: int
    element_bytes: int

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.width // self.wide)

    @property
    def leaves(self) -> int:
        return -(-self.rows // self.tall) * self.across

    @property
    def leaf_bytes(self) -> int:
        """Bytes of the longest leaf, wherever the rows end."""
        return self.tall * min(self.width, self.wide) * self.element_bytes

    @property
    def most_leaves(self) -> int:
        """Leaves that one demand may ask for."""
        return min(MAX_ANSWER_BYTES // self.leaf_bytes, MAX_ANSWER_LEAVES)

    def bytes_of(self, index: int) -> int:
        """Bytes of leaf `index` < leaves."""
        rows = min(self.rows - index // self.across * self.tall, self.tall)
        return rows * min(self.width - index % self.across * self.wide, self.wide) * self.element_bytes

    def cut(self, first: int, count: int, data: bytes) -> list[bytes]:
        """The leaves first .. first + count - 1. Raises DataLength unless data is exactly these."""
        sizes = [self.bytes_of(first + i) for i in range(count)]
        if sum(sizes) != len(data):
            raise DataLength(f"expected {sum(sizes)} bytes, got {len(data)}")
        out, start = [], 0
        for size in sizes:
            out.append(data[start : start + size])
            start += size
        return out


def tensor_grid(model: Model, place: int, positions: int) -> Grid:
    """The leaves of a request's tensor `place` at a stage; the one behind the last layer's six is `out`."""
    kind, size = place % LAYER_TENSORS, Dtype(model.served_dtype).size
    if kind == Tensor.V:
        return Grid(positions, model.kv_width, TILE_ROWS, TILE_COLUMNS, size)
    width = model.query_width if kind == Tensor.Q else model.kv_width if kind == Tensor.K else model.hidden
    return Grid(positions, width, 1, BLOCK, size)


def tensor_count(model: Model, first_layer: int, end_layer: int) -> int:
    """Tensors of a request at a stage."""
    return LAYER_TENSORS * (end_layer - first_layer) + (end_layer == model.layers)


def grid_of(demand: Demand, model: Model, first_layer: int, end_layer: int, rows: int = 0) -> Grid:
    """The tree that is asked for. first_layer, end_layer: the stage's; rows: what the record says. Raises WrongDemand.

    The job's own bounds (request, status, window) are the contract's to check.
    """
    tensors = tensor_count(model, first_layer, end_layer)
    if demand.kind == Wanted.LEAVES:
        if demand.tensor >= tensors:
            raise WrongDemand(f"expected a tensor below {tensors}, got {demand.tensor}")
        grid = tensor_grid(model, demand.tensor, rows)
    elif demand.tensor:
        raise WrongDemand(f"expected tensor 0, got {demand.tensor}")
    elif demand.kind == Wanted.TENSORS:
        grid = Grid(tensors, 1, 1, 1, ROOT_BYTES)
    elif demand.kind == Wanted.OUTPUT and end_layer != model.layers:
        raise WrongDemand("expected the last stage: it committed to the outputs")
    elif demand.kind in (Wanted.PROMPT, Wanted.OUTPUT):
        grid = Grid(rows, 1, TOKENS_A_LEAF, 1, 4)
    else:
        raise WrongDemand(f"expected a kind below {len(Wanted)}, got {demand.kind}")
    if not 0 < demand.count <= grid.most_leaves:
        raise WrongDemand(f"expected 1 .. {grid.most_leaves} leaves, got {demand.count}")
    return grid


# ---- money and time


def answer_gas(demand: Demand, grid: Grid) -> int:
    """Gas that an answer is paid for."""
    return ANSWER_GAS + demand.count * (LEAF_GAS + BYTE_GAS * grid.leaf_bytes)


def price(pay: int, queued_gas: int) -> int:
    """What a demander pays, in base units. pay: the worker's part; queued_gas: of the stage's open demands."""
    return (pay + pay // 4 + 1) << min(queued_gas // DOUBLING_GAS, MAX_DOUBLINGS)


def deadline(now: int, clock: int, grace: int, open_demands: int) -> int:
    """The last second in which a new demand may be answered. clock, grace: the job's."""
    return now + clock + grace * open_demands


# ---- answers


@dataclass(frozen=True)
class Answer:
    """What a demand brought to light. grid: of the whole tree; leaves: demand.first and those behind it, none where the
    tree ends before; siblings: the range proof that ties these to `root`, the tree's own.
    """

    record: bytes
    record_siblings: tuple[bytes, ...]
    grid: Grid
    leaves: tuple[bytes, ...]
    siblings: tuple[bytes, ...]
    root: bytes
    above: tuple[bytes, ...]  # LEAVES: siblings of the tensor's root in the tensors' tree


def read_answer(
    demand: Demand,
    model: Model,
    layers: tuple[int, int],
    committed: bytes,
    requests: int,
    openings: Sequence[Opening],
) -> Answer:
    """What the openings say, if they are an answer.

    layers: first and end layer of the stage; committed: root of the records (requests, outputs or trace nodes) of a job
    of so many requests. Raises DemandError, RefereeError.
    """
    if not openings:
        raise OpeningCount("expected the record, got nothing")
    record = openings[0].data
    index, rows, inner = _record(demand.kind, record)
    if index != demand.request:
        raise WrongRecord(f"expected the record of request {demand.request}, got one of {index}")
    _rooted(committed, root_of_range([leaf(record)], demand.request, requests, openings[0].siblings))
    grid = grid_of(demand, model, *layers, rows)
    beyond = demand.first >= grid.leaves
    if len(openings) != (1 if beyond else 2):
        raise OpeningCount(f"expected {1 if beyond else 2} openings, got {len(openings)}")
    if beyond:
        return Answer(record, openings[0].siblings, grid, (), (), inner, ())
    count = min(demand.count, grid.leaves - demand.first)
    found = tuple(grid.cut(demand.first, count, openings[1].data))
    siblings = openings[1].siblings
    top, used = root_of_range_used([leaf(data) for data in found], demand.first, grid.leaves, siblings)
    root, last = top, used
    if demand.kind == Wanted.LEAVES:
        tensors = tensor_count(model, *layers)
        top, more = root_of_range_used([leaf(top)], demand.tensor, tensors, siblings[used:])
        last += more
    if last != len(siblings):
        raise ProofLength(f"expected {last} siblings, got {len(siblings)}")
    _rooted(inner, top)
    return Answer(record, openings[0].siblings, grid, found, siblings[:used], root, siblings[used:])


def answer_tokens(demand: Demand, record: Opening, tokens: Sequence[int]) -> tuple[Opening, ...]:
    """The answer to PROMPT or OUTPUT. record: the request's, under its root; tokens: those that it counts."""
    leaves = codec.token_leaves(tokens)
    found = leaves[demand.first : demand.first + demand.count]
    if not found:
        return (record,)
    siblings = Tree([leaf(data) for data in leaves]).prove(demand.first, len(found))
    return record, Opening(b"".join(found), tuple(siblings))


def answer_trace(demand: Demand, record: Opening, trace: RequestTrace, model: Model) -> tuple[Opening, ...]:
    """The answer to TENSORS or LEAVES. record: the trace node, under the stage's root."""
    roots = demand.kind == Wanted.TENSORS
    leaves = len(trace.keys) if roots else tensor_grid(model, demand.tensor, trace.positions).leaves
    count = min(demand.count, leaves - demand.first)
    if count <= 0:
        return (record,)
    if roots:
        return record, trace.open_roots(demand.first, count)
    return record, trace.open_leaves(trace.keys[demand.tensor], demand.first, count)


def _record(kind: int, data: bytes) -> tuple[int, int, bytes]:
    """Request, rows of the tree beneath, and its root. Raises DataLength."""
    if kind == Wanted.PROMPT:
        if len(data) != 100:
            raise DataLength(f"expected a request of 100 bytes, got {len(data)}")
        return int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big"), data[68:]
    if kind == Wanted.OUTPUT:
        output = codec.Output.decode(data)
        return output.index, output.count, output.tokens_root
    node = codec.TraceNode.decode(data)
    return node.index, node.positions, node.tensors_root


def _rooted(expected: bytes, actual: bytes) -> None:
    if actual != expected:
        raise RootMismatch(f"expected root {expected.hex()}, got {actual.hex()}")
