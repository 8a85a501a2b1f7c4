"""SHA-256 trees over whole arrays: what verifier.referee.tree defines, computed in bulk (docs/canonical.md, "Trees").

Hashes are rows of a uint8 array [n, 32]. From FEW messages on, verifier.sha256_pairs, where that is fastest, or else
verifier.sha256_lanes hashes several at once without the GIL; it is compiled on first use, and only on little-endian
machines. Below, and elsewhere, hashlib does.
"""

import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from verifier.referee.errors import IndexOutOfRange
from verifier.referee.tree import nodes_at

Bytes = npt.NDArray[np.uint8]

LEAF_PREFIX = 0
NODE_PREFIX = 1
HASH_BYTES = 32
FEW = 8
# A group of sixteen lanes costs about 5 us at 512 bytes, a pair 0.5, one hashlib call about 2.5; the rest is the
# price of loading numba at all.


@cache
def _compiled() -> Callable[..., None]:
    from verifier import sha256_pairs

    if sha256_pairs.FASTEST:
        return sha256_pairs.hash_strided
    from verifier import sha256_lanes

    return sha256_lanes.hash_strided


def hash_strided(
    source: Bytes,
    first: int,
    stride: int,
    count: int,
    length: int,
    prefix: int,
    out: Bytes,
    out_first: int = 0,
    out_stride: int = 1,
) -> None:
    """SHA-256 of prefix | source[first + i*stride :][:length] into out[out_first + i*out_stride], for i < count.

    source: uint8 [bytes], out: uint8 [n, 32], both contiguous. Raises IndexOutOfRange where either would be left.
    """
    if count <= 0:
        return
    last, out_last = first + (count - 1) * stride + length, out_first + (count - 1) * out_stride
    if min(first, stride, length, out_first) < 0 or out_stride < 1 or last > source.size or out_last >= len(out):
        raise IndexOutOfRange(f"expected {source.size} bytes and {len(out)} hashes to hold {last} and {out_last + 1}")
    if not (source.flags.c_contiguous and out.flags.c_contiguous and source.dtype == out.dtype == np.uint8):
        raise ValueError(f"expected contiguous bytes, got {source.dtype} and {out.dtype} {out.strides}")
    if source.ndim != 1 or out.ndim != 2 or out.shape[1] != HASH_BYTES:
        raise ValueError(f"expected bytes [n] and hashes [m, 32], got {source.shape} and {out.shape}")
    if count >= FEW and sys.byteorder == "little":
        words = out.reshape(-1).view(np.uint32)
        _compiled()(source, first, stride, count, length, prefix, words, out_first, out_stride)
        return
    start, view = bytes([prefix]), memoryview(source.data)
    for i in range(count):
        at = first + i * stride
        state = sha256(start)
        state.update(view[at : at + length])
        out[out_first + i * out_stride] = np.frombuffer(state.digest(), dtype=np.uint8)


def as_bytes(array: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of a contiguous array, uncopied; others are copied first."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def leaf_hashes(buffer: bytes | bytearray | memoryview | npt.NDArray[np.generic], leaf_bytes: int) -> Bytes:
    """Hashes [n, 32] of the leaves of leaf_bytes bytes that a buffer is cut into; the last one may be shorter."""
    if leaf_bytes < 1:
        raise ValueError(f"expected leaves of 1 byte or more, got {leaf_bytes}")
    source = as_bytes(buffer) if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
    whole, rest = divmod(source.size, leaf_bytes)
    out = np.empty((whole + (rest > 0), HASH_BYTES), dtype=np.uint8)
    hash_strided(source, 0, leaf_bytes, whole, leaf_bytes, LEAF_PREFIX, out)
    if rest:
        hash_strided(source, whole * leaf_bytes, 0, 1, rest, LEAF_PREFIX, out, whole)
    return out


def row_leaf_hashes(rows: npt.NDArray[np.generic], leaf_elements: int) -> Bytes:
    """Hashes [n * ceil(width / leaf_elements), 32] of rows [n, width], each row cut into leaves of its own."""
    count, width = rows.shape
    source, size = as_bytes(rows), rows.dtype.itemsize
    if width % leaf_elements == 0:
        return leaf_hashes(source, leaf_elements * size)
    chunks = -(-width // leaf_elements)
    out = np.empty((count * chunks, HASH_BYTES), dtype=np.uint8)
    for chunk in range(chunks):
        first = chunk * leaf_elements
        length = min(leaf_elements, width - first) * size
        hash_strided(source, first * size, width * size, count, length, LEAF_PREFIX, out, chunk, chunks)
    return out


def parents(hashes: Bytes) -> Bytes:
    """The level [ceil(n/2), 32] above nodes [n, 32], the first of even index; an odd last one is carried up."""
    pairs, odd = divmod(len(hashes), 2)
    out = np.empty((pairs + odd, HASH_BYTES), dtype=np.uint8)
    hash_strided(as_bytes(hashes), 0, 2 * HASH_BYTES, pairs, 2 * HASH_BYTES, NODE_PREFIX, out)
    if odd:
        out[pairs] = hashes[-1]
    return out


def climb(hashes: Bytes, levels: int) -> Bytes:
    """The nodes that many levels above nodes of which the first has an index divisible by 2^levels."""
    for _ in range(levels):
        hashes = parents(hashes)
    return hashes


def roots(trees: Bytes) -> Bytes:
    """The roots [m, 32] of m trees of n leaves each, uint8 [m, n, 32]; n >= 1."""
    while (count := trees.shape[1]) > 1:
        pairs, odd = divmod(count, 2)
        above = np.empty((len(trees), pairs + odd, HASH_BYTES), dtype=np.uint8)
        above[:, :pairs] = parents(trees[:, : 2 * pairs].reshape(-1, HASH_BYTES)).reshape(-1, pairs, HASH_BYTES)
        if odd:
            above[:, pairs] = trees[:, -1]
        trees = above
    return trees[:, 0]


class HashTree:
    """All levels of a tree in memory, to prove from: 64 bytes a leaf."""

    def __init__(self, leaf_hashes: Bytes) -> None:
        """leaf_hashes: uint8 [n, 32], n >= 1; kept, not copied. Raises IndexOutOfRange for none."""
        if not len(leaf_hashes):
            raise IndexOutOfRange("expected at least one leaf, got none")
        self._levels = [leaf_hashes]
        while len(self._levels[-1]) > 1:
            self._levels.append(parents(self._levels[-1]))

    @classmethod
    def of(cls, leaves: list[bytes]) -> "HashTree":
        """The tree over the leaves' bytes, which may differ in length."""
        digests = b"".join(sha256(b"\x00" + data).digest() for data in leaves)
        return cls(np.frombuffer(digests, dtype=np.uint8).reshape(-1, HASH_BYTES))

    @property
    def root(self) -> bytes:
        return bytes(self._levels[-1][0])

    @property
    def count(self) -> int:
        """Leaves."""
        return len(self._levels[0])

    @property
    def depth(self) -> int:
        """Levels above the leaves."""
        return len(self._levels) - 1

    def nodes(self, level: int) -> Bytes:
        """All hashes [n, 32] of a level, 0 the leaves."""
        return self._levels[level]

    def prove(self, first: int, n: int = 1) -> tuple[bytes, ...]:
        """The siblings that root_of_range wants for the leaves first .. first + n - 1. Raises IndexOutOfRange."""
        return prove_range(self.count, first, n, lambda level, index: bytes(self._levels[level][index]))


def prove_range(count: int, first: int, n: int, node_of: Callable[[int, int], bytes]) -> tuple[bytes, ...]:
    """The range proof of the leaves first .. first + n - 1 of count, asking node_of(level, index) for each sibling.

    Raises IndexOutOfRange unless the range is one or more leaves of the tree.
    """
    if n < 1 or first < 0 or first + n > count:
        raise IndexOutOfRange(f"expected 1 or more leaves within {count}, got {n} from {first}")
    siblings, end, level = [], first + n, 0
    while nodes_at(count, level) > 1:
        if first & 1:
            siblings.append(node_of(level, first - 1))
        if end & 1 and end < nodes_at(count, level):
            siblings.append(node_of(level, end))
        first, end, level = first >> 1, (end + 1) >> 1, level + 1
    return tuple(siblings)
