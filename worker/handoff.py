"""Hand-offs: what a sender signs about the rows or tokens it sent, so that the receiver is not blamed for them
(docs/protocol.md, "Records").

Order of the records, ours to choose since a proof names its index: by request, then position (or token), then block.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier import sha256
from verifier.referee import tree

BLOCK = 256  # elements of a row block: one leaf of the trace

TOKEN_BYTES = 12  # of a token's record

LeafHashes = npt.NDArray[np.uint8]  # [..., 32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Handoff:
    """Root and number of records, and the sender's signature over them."""

    root: bytes
    leaves: int
    signature: bytes


class RowHandoff:
    """Hashes row blocks as they pass, whatever the batching. Either end of a boundary computes the same."""

    def __init__(self) -> None:
        self._owners: list[Indices] = []
        self._positions: list[Indices] = []
        self._leaves: list[LeafHashes] = []

    def add(self, owners: Indices, positions: Indices, bits: npt.NDArray[Any]) -> None:
        """Rows [n, width] of raw bits, of requests owners [n] at positions [n]."""
        self._owners.append(owners)
        self._positions.append(positions)
        self._leaves.append(row_leaves(owners, positions, bits))

    def finish(self) -> tuple[bytes, int]:
        """(root, number of records) of everything added; raises ValueError if that is nothing."""
        if not self._leaves:
            return _root(np.empty((0, 32), np.uint8))
        order = np.lexsort((np.concatenate(self._positions), np.concatenate(self._owners)))
        return _root(np.concatenate(self._leaves)[order].reshape(-1, 32))


class TokenHandoff:
    """The same for output tokens."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}

    def add(self, request: int, token: int) -> None:
        self._tokens.setdefault(request, []).append(token)

    def finish(self) -> tuple[bytes, int]:
        records = token_records(self._tokens)
        return _root(sha256.leaf_hashes(b"".join(records), TOKEN_BYTES))


def row_leaves(owners: Indices, positions: Indices, bits: npt.NDArray[Any]) -> LeafHashes:
    """[n, blocks, 32]: leaf hashes of the records of rows [n, width], of requests owners [n] at positions [n]."""
    count, width = bits.shape
    blocks = -(-width // BLOCK)
    data = np.ascontiguousarray(bits).view(np.uint8).reshape(count, -1)
    block_bytes = BLOCK * bits.itemsize
    out = np.empty((count, blocks, 32), np.uint8)
    for start, end in ((0, width // BLOCK), (width // BLOCK, blocks)):  # full blocks, then the shorter last one
        if start == end:
            continue
        columns = data[:, start * block_bytes : end * block_bytes].reshape(count, end - start, -1)
        records = np.empty((count, end - start, 12 + columns.shape[2]), np.uint8)
        header = records[:, :, :12].view(">u4")
        header[:, :, 0] = owners[:, None]
        header[:, :, 1] = positions[:, None]
        header[:, :, 2] = np.arange(start, end, dtype=np.uint32)
        records[:, :, 12:] = columns
        hashed = sha256.leaf_hashes(records.reshape(-1), records.shape[2])
        out[:, start:end] = hashed.reshape(count, end - start, 32)
    return out


def row_record(request: int, position: int, block: int, data: bytes) -> bytes:
    return request.to_bytes(4, "big") + position.to_bytes(4, "big") + block.to_bytes(4, "big") + data


def token_records(tokens: Mapping[int, Sequence[int]]) -> list[bytes]:
    """Records of all output tokens, request by request."""
    return [
        np.array([request, index, token], ">u4").tobytes()
        for request in sorted(tokens)
        for index, token in enumerate(tokens[request])
    ]


def row_index(positions: Sequence[int], request: int, position: int, block: int, width: int) -> int:
    """Where the record of a row block stands; positions[r] = rows handed over for request r."""
    blocks = -(-width // BLOCK)
    return (sum(positions[:request]) + position) * blocks + block


def prove_token(tokens: Mapping[int, Sequence[int]], request: int, index: int) -> tuple[int, bytes, tuple[bytes, ...]]:
    """(index, record, siblings) of one output token."""
    records = token_records(tokens)
    place = sum(len(tokens[r]) for r in sorted(tokens) if r < request) + index
    leaves = sha256.leaf_hashes(b"".join(records), TOKEN_BYTES)
    return place, records[place], tuple(sha256.HashTree(leaves).prove(place))


def prove_row(
    rows: Iterable[npt.NDArray[Any]], request: int, position: int, block: int
) -> tuple[int, bytes, tuple[bytes, ...]]:
    """(index, record, siblings) of one row block; of each request all rows handed over for it, [positions, width] raw
    bits: looked at one after another, and let go. Raises IndexError where there is no such row.
    """
    leaves: list[LeafHashes] = []
    counts: list[int] = []
    width, data = 0, b""
    for r, bits in enumerate(rows):
        leaves.append(row_leaves(np.full(len(bits), r), np.arange(len(bits)), bits).reshape(-1, 32))
        counts.append(len(bits))
        if r == request:
            width, data = bits.shape[1], bits[position, block * BLOCK : (block + 1) * BLOCK].tobytes()
    place = row_index(counts, request, position, block, width)
    siblings = sha256.HashTree(np.concatenate(leaves)).prove(place)
    return place, row_record(request, position, block, data), tuple(siblings)


def _root(leaves: LeafHashes) -> tuple[bytes, int]:
    if len(leaves) == 0:
        raise ValueError("a hand-off of nothing has no root")
    return sha256.climb(leaves, tree.depth(len(leaves)))[0].tobytes(), len(leaves)
