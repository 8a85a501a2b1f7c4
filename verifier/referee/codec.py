"""The byte formats of the law: model, programs, integer vectors, records (canonical.md "Bytes", protocol.md "Records").

Integers are big-endian unless a float's raw bytes are meant.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

from verifier.referee.errors import DataLength
from verifier.referee.tree import leaf, root

NARROW_LEAF, WIDE_LEAF = 64, 128  # elements of a vector's full leaf: 512 and 2048 bytes
BLOCK = 256
# Elements of a served or weight leaf, of a row block, and terms of a chunk: one size, so that a chunk opens one leaf.
TILE_ROWS, TILE_COLUMNS = 8, 32
# v is tiled (256 elements again), so that one leaf opens a column over a chunk of positions, and few a head's row: four
# at 128 columns. 1024 chunks, two lists of partial sums, reach to position 8191.
FOLD = 128
# Logits of a chunk of RANK and MASS: 1024 chunks, two lists of sums, hold a vocabulary of 131,072.
TABLE_LEAF = 64
ALL_POSITIONS = 0xFFFFFFFF
# `terms` of a sum over the positions 0..t
TOKENS_A_LEAF = 128
STOPS = 8


class Source(IntEnum):
    """Where an operand reads."""

    NONE = 0
    STEP = 1
    SERVED = 2
    WEIGHT = 3
    TABLE = 4
    PROFILE = 5


class Tensor(IntEnum):
    """Kinds of served tensors, by their place in a layer's six."""

    H = 0
    Q = 1
    K = 2
    V = 3
    ATTN_OUT = 4
    MLP_OUT = 5
    OUT = 6


@dataclass(frozen=True)
class Model:
    """What a model is for a judge; field for field the struct of contracts/src/interfaces/IReferee.sol."""

    weights_root: bytes
    weights_leaves: int
    program_root: bytes
    program_leaves: int
    profile_root: bytes
    profile_leaves: int
    layers: int
    hidden: int
    query_width: int
    kv_width: int
    vocabulary: int
    max_positions: int
    weight_dtype: int
    served_dtype: int

    def abi_words(self) -> bytes:
        """abi.encode(model): 14 words of 32 bytes. The model's id is the keccak256 of these bytes."""
        values = (getattr(self, field.name) for field in fields(self))
        return b"".join(v.rjust(32, b"\x00") if isinstance(v, bytes) else v.to_bytes(32, "big") for v in values)


@dataclass(frozen=True)
class Operand:
    """Where an instruction reads from: 32 bytes. NONE with all zeros reads nothing."""

    source: int = Source.NONE
    id: int = 0
    base: int = 0
    layer_stride: int = 0
    unit_stride: int = 0
    width: int = 0

    _FORMAT = ">BBQQII6x"

    def encode(self) -> bytes:
        return struct.pack(
            self._FORMAT, self.source, self.id, self.base, self.layer_stride, self.unit_stride, self.width
        )

    @classmethod
    def decode(cls, data: bytes) -> "Operand":
        """The operand of 32 bytes."""
        return cls(*struct.unpack(cls._FORMAT, data))


NOTHING = Operand()


@dataclass(frozen=True)
class Instruction:
    """One step of a program: 128 bytes."""

    op: int
    wide: int = 0
    rows: int = 1
    cols: int = 1
    limit: int = 0
    terms: int = 0
    a: int = 0
    b: int = 0
    x: Operand = NOTHING
    y: Operand = NOTHING
    z: Operand = NOTHING

    _FORMAT = ">BBIIIIQI2x"

    def encode(self) -> bytes:
        head = struct.pack(
            self._FORMAT, self.op, self.wide, self.rows, self.cols, self.limit, self.terms, self.a, self.b
        )
        return head + self.x.encode() + self.y.encode() + self.z.encode()

    @classmethod
    def decode(cls, data: bytes) -> "Instruction":
        """The instruction of 128 bytes. Raises DataLength; padding must be zero (ValueError)."""
        if len(data) != 128:
            raise DataLength(f"expected an instruction of 128 bytes, got {len(data)}")
        words = [data[i : i + 32] for i in (32, 64, 96)]
        out = cls(*struct.unpack(cls._FORMAT, data[:32]), *(Operand.decode(word) for word in words))
        if out.encode() != data:
            raise ValueError("expected zero padding in an instruction")
        return out


@dataclass(frozen=True)
class SegmentHeader:
    """A segment kind's place in the program tree: 16 bytes."""

    first: int  # leaf of its first instruction
    steps: int
    units: int  # heads, blocks or tokens that a challenge may name

    def encode(self) -> bytes:
        return struct.pack(">IIII", self.first, self.steps, self.units, 0)

    @classmethod
    def decode(cls, data: bytes) -> "SegmentHeader":
        """The header of 16 bytes. Raises DataLength."""
        if len(data) != 16:
            raise DataLength(f"expected a segment header of 16 bytes, got {len(data)}")
        return cls(*struct.unpack(">III4x", data))


@dataclass(frozen=True)
class ProfileCell:
    """A tolerance: relative distance num / den, absolute floor in Q30. 16 bytes."""

    num: int
    den: int
    floor: int

    def encode(self) -> bytes:
        return struct.pack(">IIQ", self.num, self.den, self.floor)

    @classmethod
    def decode(cls, data: bytes) -> "ProfileCell":
        """The cell of 16 bytes. Raises DataLength."""
        if len(data) != 16:
            raise DataLength(f"expected a profile cell of 16 bytes, got {len(data)}")
        return cls(*struct.unpack(">IIQ", data))


GREEDY = bytes(32)
# The sampling word of whatever draws nothing.


@dataclass(frozen=True)
class Opening:
    """Concatenated leaves and the range proof that ties them to their root."""

    data: bytes
    siblings: tuple[bytes, ...]


@dataclass(frozen=True)
class Trace:
    """The served tensors of one request at one stage."""

    root: bytes  # tree over leaf(tensor root), 6 a layer, then `out` at the last stage
    positions: int
    first_layer: int
    end_layer: int


@dataclass(frozen=True)
class Cell:
    """The place that is judged."""

    layer: int
    position: int
    unit: int
    token: int
    trace: Trace
    sampling: bytes = GREEDY  # of SAMPLE


def encode_vector(values: Iterable[int], wide: bool) -> bytes:
    """Zigzag, 8 bytes an element, 16 if wide. Raises ValueError for a value that does not fit."""
    size = 16 if wide else 8
    edge = 1 << (8 * size - 1)
    out = bytearray()
    for value in values:
        if not -edge <= value < edge:
            raise ValueError(f"expected an i{8 * size}, got {value}")
        out += (2 * value if value >= 0 else -2 * value - 1).to_bytes(size, "big")
    return bytes(out)


def decode_vector(data: bytes, wide: bool) -> list[int]:
    """The elements of these bytes. Raises DataLength unless they are a whole number of elements."""
    size = 16 if wide else 8
    if len(data) % size:
        raise DataLength(f"expected a multiple of {size} bytes, got {len(data)}")
    codes = (int.from_bytes(data[i : i + size], "big") for i in range(0, len(data), size))
    return [code >> 1 ^ -(code & 1) for code in codes]


def vector_leaf_elements(wide: bool) -> int:
    """Elements of a full leaf."""
    return WIDE_LEAF if wide else NARROW_LEAF


def vector_leaf_bytes(wide: bool) -> int:
    """Bytes of a full leaf."""
    return WIDE_LEAF * 16 if wide else NARROW_LEAF * 8


def slices(data: bytes, leaf_bytes: int) -> list[bytes]:
    """data cut into leaves of leaf_bytes, the last one shorter."""
    return [data[i : i + leaf_bytes] for i in range(0, len(data), leaf_bytes)]


def vector_leaves(values: Iterable[int], wide: bool) -> list[bytes]:
    """The leaves of an integer vector, the last one shorter."""
    return slices(encode_vector(values, wide), vector_leaf_bytes(wide))


def vector_root(values: Iterable[int], wide: bool) -> bytes:
    """The root of an integer vector of one or more elements."""
    return root([leaf(data) for data in vector_leaves(values, wide)])


def table_leaves(table: Sequence[int]) -> list[bytes]:
    """A table of u64 as program leaves, 64 a leaf."""
    return slices(b"".join(value.to_bytes(8, "big") for value in table), 8 * TABLE_LEAF)


@dataclass(frozen=True)
class Request:
    """What a requester wants generated; a leaf of the requests tree: 100 bytes. temperature and top_p in 1/65536."""

    index: int
    prompt_count: int
    limit: int
    seed: int
    stops: tuple[int, ...]
    prompt_root: bytes
    temperature: int = 0
    top_k: int = 0
    top_p: int = 65536

    _FORMAT = f">IIIIIIQI{STOPS}I32s"

    def encode(self) -> bytes:
        """100 bytes. Raises ValueError for more than 8 stop ids."""
        if len(self.stops) > STOPS:
            raise ValueError(f"expected at most {STOPS} stop ids, got {len(self.stops)}")
        head = (self.index, self.prompt_count, self.limit, self.temperature, self.top_k, self.top_p, self.seed)
        stops = (*self.stops, *([0] * (STOPS - len(self.stops))))
        return struct.pack(self._FORMAT, *head, len(self.stops), *stops, self.prompt_root)

    def sampling(self) -> bytes:
        """What SAMPLE knows of the request, 32 bytes: temperature, top_k, top_p, seed, index; zeros if it is greedy."""
        if not self.temperature:
            return GREEDY
        return struct.pack(">IIIQI8x", self.temperature, self.top_k, self.top_p, self.seed, self.index)

    @classmethod
    def decode(cls, data: bytes) -> "Request":
        """The request of 100 bytes. Raises DataLength; ValueError for 9 or more stops, or unused ones not 0."""
        if len(data) != 100:
            raise DataLength(f"expected a request of 100 bytes, got {len(data)}")
        index, prompt_count, limit, temperature, top_k, top_p, seed, stop_count, *rest = struct.unpack(
            cls._FORMAT, data
        )
        stops, prompt_root = tuple(rest[:stop_count]), rest[-1]
        if stop_count > STOPS or any(rest[stop_count:STOPS]):
            raise ValueError(f"expected up to {STOPS} stop ids, then zeros, got {stop_count}: {rest[:STOPS]}")
        return cls(index, prompt_count, limit, seed, stops, prompt_root, temperature, top_k, top_p)


@dataclass(frozen=True)
class Output:
    """What a request produced; a leaf of the outputs tree: 52 bytes. start: output tokens of all earlier requests."""

    index: int
    start: int
    count: int
    code: int
    tokens_root: bytes

    _FORMAT = ">IQII32s"

    def encode(self) -> bytes:
        return struct.pack(self._FORMAT, self.index, self.start, self.count, self.code, self.tokens_root)

    @classmethod
    def decode(cls, data: bytes) -> "Output":
        """The output of 52 bytes. Raises DataLength."""
        if len(data) != 52:
            raise DataLength(f"expected an output of 52 bytes, got {len(data)}")
        return cls(*struct.unpack(cls._FORMAT, data))


@dataclass(frozen=True)
class TraceNode:
    """A request's served tensors; a leaf of the stage tree: 40 bytes."""

    index: int
    positions: int
    tensors_root: bytes

    _FORMAT = ">II32s"

    def encode(self) -> bytes:
        return struct.pack(self._FORMAT, self.index, self.positions, self.tensors_root)

    @classmethod
    def decode(cls, data: bytes) -> "TraceNode":
        """The trace node of 40 bytes. Raises DataLength."""
        if len(data) != 40:
            raise DataLength(f"expected a trace node of 40 bytes, got {len(data)}")
        return cls(*struct.unpack(cls._FORMAT, data))


def token_leaves(tokens: Sequence[int]) -> list[bytes]:
    """Token ids as leaves of up to 128, u32 each."""
    return slices(struct.pack(f">{len(tokens)}I", *tokens), 4 * TOKENS_A_LEAF)


def handoff_row(index: int, position: int, chunk: int, block: bytes) -> bytes:
    """The hand-off record of one row block of h: request, position, chunk and the trace leaf's bytes."""
    return struct.pack(">III", index, position, chunk) + block


def handoff_token(index: int, i: int, token: int) -> bytes:
    """The hand-off record of the i-th output token of a request."""
    return struct.pack(">III", index, i, token)
